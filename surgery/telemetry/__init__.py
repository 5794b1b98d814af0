"""Measurements of this process: times, memory, bytes, progress; sizes and files as they are written."""
