"""Runs of whole training scripts, observed from outside."""
