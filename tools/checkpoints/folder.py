"""A checkpoint folder that is either complete or absent, and that records the recipe it was made from."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

__all__ = ["RECIPE_NAME", "FolderError", "Recipe", "build", "is_complete", "write_json"]

RECIPE_NAME = "recipe.json"

#: The inputs that a folder was made from: JSON values only, compared for equality.
Recipe = Mapping[str, str | int | float | bool | None]


class FolderError(Exception):
    """A folder exists at the destination and must not be replaced."""


def is_complete(folder: Path, recipe: Recipe) -> bool:
    """Whether `folder` already holds the result of `recipe`.

    `build` publishes a folder by renaming it, so a folder that has a recipe is complete.
    """
    file = folder / RECIPE_NAME
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")) == dict(recipe)


@contextmanager
def build(folder: Path, recipe: Recipe, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; rename it to `folder` when the block ends without an exception.

    force: replace a folder that was made by another recipe. A folder without a recipe is never replaced.
    Raises `FolderError` when `folder` is in the way.
    """
    _require_replaceable(folder, force=force)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield draft
        write_json(draft / RECIPE_NAME, dict(recipe))
        _make_readable(draft)
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _make_readable(folder: Path) -> None:
    """Let everyone read the folder: temporary folders and files of safetensors are readable by their owner alone."""
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


def _require_replaceable(folder: Path, *, force: bool) -> None:
    if not folder.exists():
        return
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if not (folder / RECIPE_NAME).is_file():
        raise FolderError(
            f"{folder} exists and was not made by this tool (no {RECIPE_NAME} in it). Choose another folder."
        )
    if not force:
        raise FolderError(f"{folder} was made by another recipe. Pass --force to replace it, or choose another folder.")


def write_json(file: Path, value: object) -> None:
    """Write `value` as indented JSON, keys in the order given."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
