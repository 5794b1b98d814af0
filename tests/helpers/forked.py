"""Run a script of `tests/helpers` in a process that is forked after torch is imported, in an environment of its own."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.helpers.ranks import PRELOAD


class Forked:
    """As a `subprocess.Popen` with its output piped. The script imports `huggingface_hub` anew, in its environment."""

    def __init__(self, script: Path, *arguments: str, env: Mapping[str, str], cwd: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._folder = TemporaryDirectory()
        said = [str(Path(self._folder.name, name)) for name in ("stdout", "stderr")]
        self._process = context.Process(target=_main, args=([str(script), *arguments], dict(env), cwd, said))
        self._process.start()
        self._said = said

    @property
    def returncode(self) -> int | None:
        """As of `Popen`: None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """End it at once, if it runs."""
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has written to stdout and stderr when it has ended. To be called once."""
        self._process.join(timeout)
        assert not self._process.is_alive(), f"still running after {timeout} s"
        with self._folder:
            stdout, stderr = (Path(file).read_text() for file in self._said)
        return stdout, stderr


def _main(argv: list[str], env: dict[str, str], cwd: Path, said: list[str]) -> None:
    for descriptor, file in zip((1, 2), said, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
