"""Parts of `gpu_check.py`: the job, its findings, and the checks that it runs."""
