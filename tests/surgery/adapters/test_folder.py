"""A saved adapter is the old one or the new one, never a mixture, wherever the process that saves it is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from surgery.adapters.folder import CARD, CONFIG, STAGED, WEIGHTS, WHOLE, hold, make_room
from surgery.adapters.place import LOCK
from surgery.errors import AdapterError, ConfigError
from tests.helpers.apart import mount_alone, mount_tmpfs, remount, run_apart

OLD, NEW = 1, 2

#: The lines at which a process is killed are those of these files.
TRACED = {"folder.py", "lock.py", "atomic.py"}

FILES = {WEIGHTS, CONFIG, CARD, "tokenizer.json"}


def save(path: Path, value: int, *, r: int = 4, elements: int = 8, vocabulary: str = "tokenizer.json") -> None:
    """An adapter all of whose files tell `value`, or `r`."""
    from peft import LoraConfig

    with hold(path) as folder:
        folder.save(
            {f"layer.{i}.weight": torch.full((r, elements), float(value)) for i in range(2)},
            LoraConfig(r=r, target_modules=["a", "b"]),
            card=f"value {value}\n",
            tokenizer={vocabulary: f"{r}".encode()},
        )


def read(path: Path) -> int | None:
    """The value of the adapter that PEFT would find, None where it finds none; all that belongs together is."""
    if not (path / CONFIG).exists():
        return None
    r = json.loads((path / CONFIG).read_text())["r"]
    tensors = load_file(path / WEIGHTS)
    values = {float(value) for tensor in tensors.values() for value in tensor.unique()}
    assert len(tensors) == 2
    assert {tensor.shape[0] for tensor in tensors.values()} == {r}
    assert len(values) == 1
    assert {file.name: file.read_text() for file in path.glob("tokenizer*")} == {"tokenizer.json": str(r)}
    return int(values.pop())


def names(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


class Terminated(BaseException):
    """What a handler of SIGTERM raises."""


def _terminate(*_: object) -> None:
    raise Terminated


def struck(at: int, number: int, work: Callable[[], object]) -> int:
    """Fork, and send the signal `number` at the `at`-th line of `TRACED` that `work` runs; how it ended.

    Minus the signal that it died of; 0 if it came to its end before, 143 if the signal was heeded.
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if Path(frame.f_code.co_filename).name not in TRACED:
            return None
        lines += event == "line"
        if event == "line" and lines == at:
            os.kill(os.getpid(), number)
        return trace

    try:
        signal.signal(signal.SIGTERM, _terminate)
        sys.settrace(trace)
        work()
    except Terminated:
        os._exit(143)
    finally:
        os._exit(0)


def strike(
    folder: Path, number: int, lines: range, before: Callable[[Path], object], work: Callable[[Path], object]
) -> Any:
    """What is found where `work` is struck at one of `lines` after the other, until it comes to its end.

    Each is: what a reader sees, names of the files, what a reader sees after the folder was held again, names then.
    """
    found = []
    mount_alone()
    mount_tmpfs(folder)  # a disk takes most of a second for each
    for at in lines:
        path = folder / str(at)
        before(path)
        ended = struck(at, number, lambda path=path: work(path))  # type: ignore[misc]
        seen, left = read(path), names(path)
        with hold(path):
            pass
        found.append((ended, seen, left, read(path), names(path)))
        if ended == 0:
            return found
    raise AssertionError("no end")


def save_old(path: Path) -> None:
    save(path, OLD)


@pytest.mark.parametrize("r", [4, 3], ids=["same-config", "other-config"])
def test_killed_anywhere(tmp_path: Path, r: int) -> None:
    found = run_apart(strike, tmp_path, signal.SIGKILL, range(r - 2, 1000, 4), save_old, SaveNew(r=r))
    assert len(found) > 40
    assert {ended for ended, *_ in found[:-1]} == {-signal.SIGKILL}
    for _, seen, left, after, settled in found:
        assert after in (OLD, NEW)
        assert settled == FILES, "something is left over"
        # PEFT finds no adapter only while the whole new one is being moved in place of one with another configuration.
        assert seen in (OLD, NEW) or (r != 4 and WHOLE in left and after == NEW)
    order = [after for _, _, _, after, _ in found]
    assert order == sorted(order)
    assert order[0] == OLD
    assert found[-1][1] == NEW


def test_terminated_anywhere(tmp_path: Path) -> None:
    found = run_apart(strike, tmp_path, signal.SIGTERM, range(3, 1000, 4), save_old, SaveNew(r=3))
    assert {ended for ended, *_ in found[:-1]} == {143}
    for _, seen, _, _, settled in found:
        assert seen in (OLD, NEW)
        assert settled == FILES
    dirty = [left for _, _, left, _, _ in found if left != FILES]
    assert len(dirty) <= 0.2 * len(found), "only what is struck while it cleans up leaves something behind"


def test_killed_at_any_line_while_it_finishes_what_another_had_begun(tmp_path: Path) -> None:
    found = run_apart(strike, tmp_path, signal.SIGKILL, range(1, 1000), whole_but_not_in_place, held)
    assert len(found) > 30
    for _, seen, left, after, settled in found:
        assert seen in (OLD, NEW, None)
        assert seen is not None or WHOLE in left
        assert after == NEW
        assert settled == FILES


class SaveNew:
    """Saves the new adapter; with r=3 its configuration and tokenizer are others."""

    def __init__(self, *, r: int) -> None:
        self.r = r

    def __call__(self, path: Path) -> None:
        save(path, NEW, r=self.r)


def held(path: Path) -> None:
    with hold(path):
        pass


def whole_but_not_in_place(path: Path) -> None:
    save_old(path)
    save(path.with_name("other"), NEW, r=3)
    path.with_name("other").rename(path / WHOLE)


def killed_at_random(folder: Path) -> list[tuple[int | None, int | None, set[str]]]:
    """Twenty processes that save megabytes, one after the other, each killed after some milliseconds."""
    mount_alone()
    mount_tmpfs(folder)
    moments = random.Random(0)
    save(folder, OLD, elements=1 << 18)
    found = []
    for number in [signal.SIGKILL, signal.SIGTERM] * 10:
        pid = os.fork()
        if not pid:
            while True:
                save(folder, moments.choice([OLD, NEW]), r=moments.choice([3, 4]), elements=1 << 18)
        time.sleep(moments.uniform(0.005, 0.06))
        os.kill(pid, number)
        os.waitpid(pid, 0)
        seen = read(folder)
        with hold(folder):
            pass
        found.append((seen, read(folder), names(folder)))
    return found


def test_killed_at_random_moments(tmp_path: Path) -> None:
    for seen, after, settled in run_apart(killed_at_random, tmp_path):
        assert seen in (OLD, NEW, None)
        assert after in (OLD, NEW)
        assert settled == FILES


def on_file_systems(folder: Path) -> dict[str, Any]:
    """What saving does on other file systems; by what was tried, what is found."""
    mount_alone()
    found: dict[str, Any] = {}

    point = mount_tmpfs(folder / "point", "size=1m")
    save(point, OLD)
    save(point, NEW, r=3)
    found["mount point"] = read(point), names(point)

    target = mount_tmpfs(folder / "target", "size=1m") / "adapter"
    link = folder / "link"
    link.symlink_to(target)
    assert target.parent.stat().st_dev != folder.stat().st_dev
    save(link, OLD)
    save(link, NEW, r=3)
    found["link"] = read(target), names(target), link.is_symlink()

    remount(point, "ro")
    found["read-only"] = refusal(lambda: save(point, OLD)), read(point), names(point)
    remount(point, "rw")

    with hold(point) as place:
        found["too small"] = refusal(lambda: place.make_room(2 << 20)), names(point) - {LOCK}
        place.make_room(1 << 18)
        fill(point)
        save(point, OLD, elements=1 << 12)  # in the room that was kept for it
        found["filled meanwhile"] = read(point)
    found["full, new"] = refusal(lambda: save(point, NEW, elements=1 << 16)), read(point), names(point)

    full = mount_tmpfs(folder / "full", "size=1m")
    fill(full)
    found["full"] = refusal(lambda: save(full, OLD)), names(full)
    return found


def fill(folder: Path) -> None:
    with (folder / "other-data").open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises((ConfigError, AdapterError)) as caught:
        work()
    return f"{caught.type.__name__}: {caught.value}"


def test_other_file_systems(tmp_path: Path) -> None:
    found = run_apart(on_file_systems, tmp_path)
    assert found["mount point"] == (NEW, FILES)
    assert found["link"] == (NEW, FILES, True)
    message, *there = found["read-only"]
    assert message.startswith("ConfigError: the output folder")
    assert "Read-only file system" in message
    assert there == [NEW, FILES]
    message, left = found["too small"]
    assert message.startswith("ConfigError: the adapter needs 2,097,152 bytes in")
    assert left == FILES
    assert found["filled meanwhile"] == OLD
    message, *there = found["full, new"]
    assert "No space left on device" in message
    assert there == [OLD, FILES | {"other-data"}]
    message, left = found["full"]
    assert message.startswith("ConfigError: the output folder")
    assert "No space left on device" in message
    assert left == {"other-data"}


def test_folder_of_somebody_else() -> None:
    message = run_apart(save_without_permission)
    assert message.startswith("ConfigError: the output folder")
    assert "Permission denied" in message


def save_without_permission() -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            return refusal(lambda: save(folder, NEW))
        finally:
            os.seteuid(os.getuid())


def test_disk_that_fills_up_while_it_is_written(tmp_path: Path) -> None:
    """As a limit on the size of files has it, which nothing foretells."""
    message, seen, left = run_apart(save_beyond_limit, tmp_path)
    assert message.startswith("AdapterError: the adapter cannot be written")
    assert (seen, left) == (OLD, FILES)


def save_beyond_limit(folder: Path) -> tuple[str, int | None, set[str]]:
    import resource

    save(folder, OLD)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    return refusal(lambda: save(folder, NEW, elements=1 << 16)), read(folder), names(folder)


def test_folder_is_one_process_at_a_time(tmp_path: Path) -> None:
    ours, message, taken = run_apart(hold_twice, tmp_path)
    assert f"process {ours} on {os.uname().nodename}" in message
    assert "choose another output" in message
    assert taken, "the lock of a killed process has outlived it"


def hold_twice(folder: Path) -> tuple[int, str, bool]:
    """Who holds the folder, what another is told, by the way of a link, and whether it can be had once he is killed."""
    link = folder / "link"
    (folder / "adapter").mkdir()
    link.symlink_to(folder / "adapter")
    ready, tell = os.pipe()
    pid = os.fork()
    if not pid:
        with hold(folder / "adapter"):
            os.write(tell, b".")
            signal.pause()
    os.read(ready, 1)
    message = refusal(lambda: save(link, NEW))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    save(link, NEW)
    return pid, message, read(folder / "adapter") == NEW


def test_not_finite_values_are_named_and_counted(tmp_path: Path) -> None:
    from peft import LoraConfig

    save(tmp_path, OLD)
    bad = {"a.weight": torch.tensor([1.0, torch.nan, torch.inf]), "b.weight": torch.zeros(2)}
    with hold(tmp_path) as folder, pytest.raises(AdapterError, match=r"a.weight: 2 of 3") as caught:
        folder.save(bad, LoraConfig(), card="", tokenizer={})
    assert caught.value.not_finite == {"a.weight": 2}
    assert (read(tmp_path), names(tmp_path)) == (OLD, FILES)


def test_tokenizer_is_replaced_as_a_whole_or_left(tmp_path: Path) -> None:
    from peft import LoraConfig

    save(tmp_path, OLD, vocabulary="vocab.json")
    save(tmp_path, NEW)
    assert names(tmp_path) == FILES
    with hold(tmp_path) as folder:
        folder.save({"a": torch.zeros(1)}, LoraConfig(), card="", tokenizer={})
    assert names(tmp_path) == FILES


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save(tmp_path / "adapter", NEW)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "adapter").iterdir()} == {0o666 & ~mask}
    assert (tmp_path / "adapter").stat().st_mode & 0o777 == 0o777 & ~mask


def test_folder_that_nothing_was_put_in_goes_again(tmp_path: Path) -> None:
    with hold(tmp_path / "made" / "here"), hold(tmp_path / "made" / "here"):
        assert names(tmp_path / "made" / "here") == {LOCK}
    assert not (tmp_path / "made" / "here").exists()
    (tmp_path / "there").mkdir()
    held(tmp_path / "there")
    assert (tmp_path / "there").exists()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_adapter_that_may_not_be_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=f"already has an adapter .{name}"), hold(tmp_path, overwrite=False):
        pass


def test_adapter_of_a_killed_process_may_not_be_replaced_either(tmp_path: Path) -> None:
    save(tmp_path / "other", NEW)
    (tmp_path / "here").mkdir()
    (tmp_path / "other").rename(tmp_path / "here" / WHOLE)
    with pytest.raises(ConfigError, match="already has an adapter"), hold(tmp_path / "here", overwrite=False):
        pass
    assert read(tmp_path / "here") == NEW


@pytest.mark.parametrize("name", [WEIGHTS, CARD, "tokenizer_config.json", "vocab.txt", "summary.json"])
def test_folder_in_the_way_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=f"expected {name} in .* to be a file, found a folder"), hold(tmp_path):
        pass
    assert names(tmp_path) == {name}


@pytest.mark.parametrize("name", [CARD, "vocab.txt", "tokenizer.json", "summary.json"])
def test_file_that_no_adapter_has_left_is_not_replaced_unasked(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("foreign")
    (tmp_path / "notes.txt").write_text("foreign")
    with pytest.raises(ConfigError, match=f"has no adapter, but .*{name}"), hold(tmp_path, overwrite=False):
        pass
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {name: "foreign", "notes.txt": "foreign"}


def test_only_what_an_adapter_has_saved_is_removed(tmp_path: Path) -> None:
    from peft import LoraConfig

    (tmp_path / "dict.txt").write_text("foreign")
    save(tmp_path, OLD, vocabulary="vocab.json")
    (tmp_path / "vocab.txt").write_text("foreign")
    with hold(tmp_path) as folder:  # another adapter, the same tokenizer
        folder.save({"a": torch.zeros(1)}, LoraConfig(), card="", tokenizer={})
    assert "vocab.json" in names(tmp_path)
    save(tmp_path, NEW)
    assert names(tmp_path) == FILES | {"dict.txt", "vocab.txt"}
    assert {(tmp_path / name).read_text() for name in ("dict.txt", "vocab.txt")} == {"foreign"}


def test_nothing_is_removed_beside_weights_of_others(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / "vocab.txt").write_text("foreign")
    save(tmp_path, NEW)
    assert names(tmp_path) == FILES | {"vocab.txt"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", ""),
        ("model-00001-of-00002.safetensors", ""),
        ("model.safetensors.index.json", "{}"),
        ("pytorch_model.bin", ""),
        ("config.json", '{"model_type": "llama"}'),
    ],
)
def test_folder_of_a_model_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_text(content)
    (tmp_path / "link").symlink_to("model")
    for path in (tmp_path / "model", tmp_path / "link", tmp_path / "model" / ".." / "model"):
        with pytest.raises(ConfigError, match="found that of a model"), hold(path):
            pass
    assert names(tmp_path / "model") == {name}
    save(tmp_path / "model" / "adapter", NEW)
    assert read(tmp_path / "model" / "adapter") == NEW


def test_folder_of_the_base_is_refused_whatever_its_weights_are_called(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "weights.safetensors").touch()
    (tmp_path / "link").symlink_to("base")
    with hold(tmp_path / "base"), pytest.raises(ConfigError, match="the base model's own folder"):
        make_room(1, base=tmp_path / "link")
    with hold(tmp_path / "base" / "adapter"):
        make_room(1, base=tmp_path / "link")
    assert names(tmp_path / "base") == {"weights.safetensors"}


def test_config_that_is_no_model_s_is_let_be(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"lr": 1}')
    save(tmp_path, NEW)
    assert names(tmp_path) == FILES | {"config.json"}


def test_empty_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="found an empty path"), hold(""):
        pass


@pytest.mark.parametrize("kind", ["symlink", "dangling", "hard link", "file"])
def test_lock_of_somebody_else_is_not_written_to(tmp_path: Path, kind: str) -> None:
    folder, theirs = tmp_path / "adapter", tmp_path / "theirs"
    folder.mkdir()
    lock = folder / LOCK
    if kind != "dangling":
        theirs.write_text("process of theirs" if kind == "hard link" else "theirs")
    if kind == "hard link":
        lock.hardlink_to(theirs)
    elif kind == "file":
        theirs.rename(lock)
    else:
        lock.symlink_to(theirs)
    before = {file: file.read_text() for file in (lock, theirs) if file.exists()}
    with pytest.raises(ConfigError, match="to be the lock of an earlier job"), hold(folder):
        pass
    assert {file: file.read_text() for file in (lock, theirs) if file.exists()} == before
    assert os.path.lexists(lock)


def test_what_cannot_be_replaced_is_refused_at_once(tmp_path: Path) -> None:
    for message in run_apart(hold_over_mounts, tmp_path):
        assert "cannot be replaced: it is a mount point; choose another output" in message


def hold_over_mounts(folder: Path) -> list[str]:
    import subprocess

    mount_alone()
    save(folder, OLD)
    (folder / "summary.json").touch()
    messages = []
    for name in (WEIGHTS, "tokenizer.json", "summary.json"):
        subprocess.run(["mount", "--bind", folder / name, folder / name], check=True)
        messages.append(refusal(lambda: save(folder, NEW)))
        subprocess.run(["umount", folder / name], check=True)
    assert read(folder) == OLD
    return messages


def test_file_that_only_forbids_writing_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, OLD)
    for file in tmp_path.iterdir():
        file.chmod(0o444)
    save(tmp_path, NEW)
    assert read(tmp_path) == NEW


def test_disk_without_names_for_files(tmp_path: Path) -> None:
    message, left = run_apart(room_without_inodes, tmp_path)
    assert message.startswith("ConfigError: the adapter needs")
    assert "for 6 files" in message
    assert left == {LOCK}


def room_without_inodes(folder: Path) -> tuple[str, set[str]]:
    base, point = folder / "base", folder / "point"
    base.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).touch()
    mount_alone()
    mount_tmpfs(point, "nr_inodes=9")  # itself, the lock, the folder to write to, and six files in it
    with hold(point):
        make_room(1, base=base)
    mount_tmpfs(point, "nr_inodes=8")
    with hold(point):
        return refusal(lambda: make_room(1, base=base)), names(point)


def test_file_that_cannot_be_replaced_costs_no_training(tmp_path: Path) -> None:
    """It has become a mount of its own: what was trained is whole beside it, and is moved once that is gone."""
    message, value, left = run_apart(save_over_mounted_file, tmp_path)
    assert message.startswith(f"AdapterError: the adapter is whole in {tmp_path / WHOLE}, but")
    assert (value, left) == (NEW, FILES)


def save_over_mounted_file(folder: Path) -> tuple[str, int | None, set[str]]:
    import subprocess

    mount_alone()
    save(folder, OLD)
    with hold(folder):
        subprocess.run(["mount", "--bind", folder / WEIGHTS, folder / WEIGHTS], check=True)
        message = refusal(lambda: save(folder, NEW))
    assert read(folder / WHOLE) in (NEW, None)
    subprocess.run(["umount", folder / WEIGHTS], check=True)
    with hold(folder):
        pass
    assert not (folder / STAGED).exists()
    return message, read(folder), names(folder)
