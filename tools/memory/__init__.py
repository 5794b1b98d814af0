"""What `bench_memory.py` is made of: loading in each way with memory measured, and what the measure is held against."""
