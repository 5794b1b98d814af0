"""The memory plan: bytes that every rank of a job will read, hold and peak at, from a checkpoint's index alone."""
