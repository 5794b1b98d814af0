"""What `make_checkpoint.py` is made of: sources of weights, splitting them, publishing a folder."""
