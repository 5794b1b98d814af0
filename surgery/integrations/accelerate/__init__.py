"""Patches of accelerate."""
