"""Patches of transformers, one per module. Importing this package does not import it."""
