"""Folders and hub ids of models, building on meta, reading only owned tensors."""
