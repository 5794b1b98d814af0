"""Patches of PyTorch, one a module. Importing this package imports nothing of torch."""
