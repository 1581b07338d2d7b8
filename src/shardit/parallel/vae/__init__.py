"""Tiles of a VAE over ranks."""
