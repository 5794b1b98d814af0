"""Parts of `bench_load.py`: ways to load a model and make it ready to train, and their measurement."""
