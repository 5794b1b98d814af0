"""The steps that build a model: one pass a file, named after it."""
