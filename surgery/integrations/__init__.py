"""Patches of the libraries that train: one library a folder, one patch a file."""
