"""Traces of every rank, kept and drawn: memory over time, phases, bytes read, beside predictions.

`recorder` has the way in (`surgery.trace`). Each rank writes one file (`record`, `folder`); whoever has them, on any
machine, joins them into a page (`page`) and Chrome's trace format (`chrome`), which needs neither torch nor a network.
"""
