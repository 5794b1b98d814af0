"""`python -m patches`."""

from .cli import main

main()
