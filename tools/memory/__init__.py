"""Parts of `bench_memory.py`: memory measurements of each way of loading, and their bounds."""
