"""Communication between the ranks of a job: collectives, comparison, heartbeat, and failures that end all ranks."""
