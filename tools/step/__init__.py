"""Parts of `bench_step.py`: ways to take a training step, each in processes of its own, which take turns."""
