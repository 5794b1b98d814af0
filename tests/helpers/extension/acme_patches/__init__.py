"""Two patches: one registered when its module is imported, one that the entry point names."""
