"""`python -m patches`, and the console script."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line, or say which extra it needs."""
    try:
        from . import cli
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        sys.exit(
            f"patches: the command line needs {error.name}, which is not installed: "
            "pip install 'model-surgery-patches[cli]'"
        )
    cli.main()


if __name__ == "__main__":
    main()
