"""Patches of PyTorch, one per module. Importing this package does not import torch."""
