"""Patches of bitsandbytes, one a module. Importing this package imports nothing of bitsandbytes."""
