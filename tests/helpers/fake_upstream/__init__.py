"""A library to patch: every kind of target, and nothing else."""
