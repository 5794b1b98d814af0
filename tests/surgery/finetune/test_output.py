"""The folder that a job writes to: tried and locked before anything is loaded, and left whole or as it was."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from surgery.adapters.folder import hold
from surgery.checkpoint import Reader
from surgery.cli import app
from tests.helpers.apart import mount_alone, mount_tmpfs, remount, run_apart
from tests.helpers.reads import count_reads

# peft 0.21 asks a model of transformers 5.23 for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "summary.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "the cat", "completion": " sat on the mat"}\n' * 4)
    return path


def finetune(checkpoint: Path, data: Path, output: Path, *options: object) -> tuple[int, str, int]:
    """Exit code, stderr on one line, and how many tensors were read."""
    seen, Reader.read_bytes = count_reads()  # type: ignore[method-assign]
    arguments = ["finetune", checkpoint, "--data", data, "--output", output, "--max-steps", 2, "--lora-r", 4, *options]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result.exit_code, re.sub(r"\s+", " ", result.stderr), len(seen)


def contents(folder: Path) -> dict[str, str]:
    """Digests of the files by name."""
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def other_file_systems(checkpoint: Path, data: Path, folder: Path) -> dict[str, Any]:
    """What jobs do to outputs on other file systems."""
    mount_alone()
    found: dict[str, Any] = {}
    point = mount_tmpfs(folder / "point", "size=4m")
    link = folder / "link"
    link.symlink_to(mount_tmpfs(folder / "target", "size=4m") / "adapter")
    found["mount point"] = finetune(checkpoint, data, point), set(contents(point))
    found["link"] = finetune(checkpoint, data, link), set(contents(link)), link.is_symlink()

    before = contents(point)
    remount(point, "ro")
    found["read-only"] = finetune(checkpoint, data, point, "--overwrite"), contents(point) == before
    remount(point, "rw", "size=60k")
    found["small"] = finetune(checkpoint, data, point, "--overwrite"), contents(point) == before
    remount(point, "size=4m")
    (point / ".surgery-staged").mkdir()
    (point / ".surgery-staged" / "adapter_model.safetensors").write_bytes(b"half")
    (point / ".summary.json.host.1.partial").write_text("{")
    found["leftovers"] = finetune(checkpoint, data, point, "--overwrite"), set(contents(point))
    return found


def test_other_file_systems(tiny: Path, data: Path, tmp_path: Path) -> None:
    found = run_apart(other_file_systems, tiny, data, tmp_path)
    (code, _, _), names = found["mount point"]
    assert (code, names) == (0, FILES)
    (code, _, _), names, is_link = found["link"]
    assert (code, names, is_link) == (0, FILES, True)
    (code, message, read), is_intact = found["read-only"]
    assert (code, read, is_intact) == (2, 0, True)
    assert "cannot be written: Read-only file system; choose another output" in message
    (code, message, read), is_intact = found["small"]
    assert (code, read, is_intact) == (2, 0, True)
    assert re.search(r"the adapter needs [\d,]+ bytes in .*, found [\d,]+ free", message)
    (code, _, _), names = found["leftovers"]
    assert (code, names) == (0, FILES)


def two_jobs(checkpoint: Path, data: Path, folder: Path) -> tuple[int, tuple[int, str, int], tuple[int, str, int]]:
    """Who has the folder, what a second job says, and what it does once the first was killed."""
    ready, tell = os.pipe()
    pid = os.fork()
    if not pid:
        with hold(folder):
            os.write(tell, b".")
            signal.pause()
    os.read(ready, 1)
    second = finetune(checkpoint, data, folder)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return pid, second, finetune(checkpoint, data, folder)


def test_second_job_with_the_same_output_is_refused(tiny: Path, data: Path, tmp_path: Path) -> None:
    first, (code, message, read), third = run_apart(two_jobs, tiny, data, tmp_path / "adapter")
    assert (code, read) == (2, 0)
    assert f"adapter is in use by process {first} on {os.uname().nodename}" in message
    assert third[0] == 0
    assert set(contents(tmp_path / "adapter")) == FILES


def terminated(checkpoint: Path, data: Path, folder: Path) -> tuple[tuple[int, str, int], bool]:
    """A job that gets SIGTERM after its second step, over an older adapter; whether that is as it was."""
    output, metrics = folder / "adapter", folder / "metrics.jsonl"
    assert finetune(checkpoint, data, output)[0] == 0
    before = contents(output)

    def terminate() -> None:
        while not metrics.exists() or metrics.read_text().count("\n") < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    ended = finetune(checkpoint, data, output, "--overwrite", "--max-steps", 100_000, "--metrics", metrics)
    return ended, contents(output) == before


def test_sigterm_leaves_what_was_there(tiny: Path, data: Path, tmp_path: Path) -> None:
    (code, message, _), is_intact = run_apart(terminated, tiny, data, tmp_path)
    assert code == 143
    assert "terminated; every patch is undone" in message
    assert is_intact


def test_adapter_with_nan_is_not_saved(tiny: Path, data: Path, tmp_path: Path) -> None:
    """Its last step sends it there, after the last loss was looked at."""
    assert finetune(tiny, data, tmp_path / "adapter")[0] == 0
    before = contents(tmp_path / "adapter")
    options = ("--overwrite", "--max-steps", 1, "--weight-decay", 1e9, "--lr", 1e30)
    code, message, _ = finetune(tiny, data, tmp_path / "adapter", *options)
    assert code == 2
    assert re.search(r"found NaN or infinity in \d+ of 28 tensors .*lora_\w\.weight: [\d,]+ of", message)
    assert contents(tmp_path / "adapter") == before


def test_outputs_that_are_refused_before_anything_is_read(tiny: Path, data: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny, checkpoint)
    (tmp_path / "link").symlink_to(checkpoint)
    before = contents(checkpoint)
    for output in (checkpoint, tmp_path / "link"):
        code, message, read = finetune(checkpoint, data, output, "--overwrite")
        assert (code, read) == (2, 0)
        assert "expected a folder for an adapter, found that of a model" in message
    assert contents(checkpoint) == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "README.md").write_text("foreign")
    code, message, read = finetune(tiny, data, tmp_path / "foreign")
    assert (code, read) == (2, 0)
    assert "has no adapter, but files of names that one has (README.md)" in message
    assert (tmp_path / "foreign" / "README.md").read_text() == "foreign"
