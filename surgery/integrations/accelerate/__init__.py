"""Patches of accelerate, one per module. Importing this package does not import it."""
