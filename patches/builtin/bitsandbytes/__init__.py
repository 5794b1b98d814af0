"""Patches of bitsandbytes, one per module. Importing this package does not import bitsandbytes."""
