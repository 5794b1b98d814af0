"""`python -m surgery`, and so `torchrun ... -m surgery`."""

from surgery.cli import main

main()
