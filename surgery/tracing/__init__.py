"""What happened on every rank, kept and drawn: memory over time, phases, bytes read, next to what was predicted.

`recorder` has the way in (`surgery.trace`). Each rank writes one file (`record`, `folder`); whoever has them, on any
machine, joins them and draws the page (`page`, `chart`), which needs neither torch nor a network.
"""
