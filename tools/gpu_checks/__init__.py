"""What `gpu_check.py` is made of: the job, its findings, and the parts that it runs."""
