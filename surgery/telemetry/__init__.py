"""Measurements of this process, and what is said of them: times, memory, bytes, progress."""
