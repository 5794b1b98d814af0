"""Traces of every rank, kept and drawn: memory over time, phases, bytes read, beside predictions.

Each rank writes a file (`recorder`, `record`); `folder` joins them, without torch, into `page` and `chrome`.
"""
