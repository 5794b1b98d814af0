"""Run a function in a process of its own that may be killed, mount, or change what it may do."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.helpers.ranks import PRELOAD

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000


def run_apart(function: Callable[..., Any], *args: Any, timeout: float = 240) -> Any:
    """What `function(*args)` returns there; raises `AssertionError` with its traceback, or if it ends without one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(function, args, sender), daemon=True)
    process.start()
    sender.close()
    try:
        assert receiver.poll(timeout), f"still running after {timeout} s"
        result, failure = receiver.recv()
    except EOFError:
        result, failure = None, "the process ended without a result"
    finally:
        process.kill()
        process.join()
    if failure is not None:
        raise AssertionError(failure)
    return result


def _main(function: Callable[..., Any], args: tuple[Any, ...], sender: Connection) -> None:
    try:
        sender.send((function(*args), None))
    except BaseException:  # noqa: BLE001  # brought back to the test, whatever it is
        sender.send((None, traceback.format_exc()))


def mount_alone() -> None:
    """Let this process mount what no other process sees; without root, as root of a user namespace of its own."""
    user, group = os.geteuid(), os.getegid()
    flags = _CLONE_NEWNS if user == 0 else _CLONE_NEWNS | _CLONE_NEWUSER
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def mount_tmpfs(folder: Path, *options: str) -> Path:
    """A file system of its own at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(("mode=755", *options)), "none", folder], check=True)
    return folder


def remount(folder: Path, *options: str) -> None:
    """The same file system with other options, such as `ro`."""
    subprocess.run(["mount", "-o", ",".join(("remount", *options)), folder], check=True)
