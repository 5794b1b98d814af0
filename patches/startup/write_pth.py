"""Build of the distribution: a .pth file beside the package, whose line Python runs at its start.

So an installed package needs no `PYTHONPATH` to apply `PATCHES_APPLY`.
"""  # noqa: INP001 - as sitecustomize

import shutil
from pathlib import Path
from typing import Any, Final

from setuptools.command.build_py import build_py  # type: ignore[import-untyped]
from setuptools.command.editable_wheel import editable_wheel  # type: ignore[import-untyped]

__all__ = ["LINE", "NAME", "BuildWithPth", "EditableWithPth"]

NAME: Final = "model_surgery_patches.pth"
LINE: Final = (
    "import os; os.environ.get('PATCHES_APPLY') "
    "and __import__('model_surgery_patches.run', fromlist=['run']).apply_from_environment()\n"
)


class BuildWithPth(build_py):  # type: ignore[misc] # setuptools has no types
    """The command `build_py`, in pyproject.toml under `tool.setuptools.cmdclass`."""

    def run(self) -> None:
        """Build the package, and write the file, which `EditableWithPth` does for a package that stays where it is."""
        if not self.editable_mode:  # a module that has been deleted since the last build would be installed
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            Path(self.build_lib, NAME).write_text(LINE, encoding="utf-8")


class EditableWithPth(editable_wheel):  # type: ignore[misc] # as above
    """The command `editable_wheel` (`pip install -e`)."""

    def _run_build_commands(self, dist_name: str, unpacked_wheel: str, *folders: Any) -> Any:
        # Not a public method: nothing else is asked where the files of the wheel are put together.
        Path(unpacked_wheel, NAME).write_text(LINE, encoding="utf-8")
        return super()._run_build_commands(dist_name, unpacked_wheel, *folders)
