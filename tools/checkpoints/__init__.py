"""Parts of `make_checkpoint.py`: sources of weights, splitting them, publishing a folder."""
