"""Patches of the libraries that people train with, one a file, registered through entry points like anybody's."""
