"""What `bench_load.py` is made of: ways to load a model and make it ready to train, and what is measured of each."""
