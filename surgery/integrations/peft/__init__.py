"""Patches of PEFT, one per module. Importing this package does not import it."""
