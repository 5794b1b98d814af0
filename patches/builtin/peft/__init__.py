"""Patches of PEFT, one a module. Importing this package imports nothing of peft."""
