"""Parts of `bench_experts.py`: mixtures of experts loaded and trained in several ways."""
