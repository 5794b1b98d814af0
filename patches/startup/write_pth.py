"""Build of the distribution: a .pth file beside the package, whose line Python runs at its start.

So an installed package needs no `PYTHONPATH` to apply `PATCHES_APPLY`.
"""  # noqa: INP001 - as sitecustomize

import shutil
from pathlib import Path
from typing import Final

from setuptools.command.build_py import build_py  # type: ignore[import-untyped]

__all__ = ["LINE", "NAME", "BuildWithPth"]

NAME: Final = "model_surgery_patches.pth"
LINE: Final = (
    "import os; os.environ.get('PATCHES_APPLY') "
    "and __import__('model_surgery_patches.run', fromlist=['run']).apply_from_environment()\n"
)


class BuildWithPth(build_py):  # type: ignore[misc] # setuptools has no types
    """The command `build_py`, in pyproject.toml under `tool.setuptools.cmdclass`."""

    def run(self) -> None:
        """Build the package, and write the file, unless the package stays where it is (`pip install -e`)."""
        if not self.editable_mode:  # a module that has been deleted since the last build would be installed
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            Path(self.build_lib, NAME).write_text(LINE, encoding="utf-8")
