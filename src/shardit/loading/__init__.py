"""Resolves model folders and hub ids, builds modules on meta and reads only owned tensors."""
