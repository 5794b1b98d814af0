from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

import patches
from tests.helpers.declare import FUNCTIONS, LAYERS, declare
from tests.helpers.fake_upstream import functions, layers
from tests.helpers.snapshot import Snapshot

pytestmark = pytest.mark.usefixtures("unchanged")


def flatten(result: object) -> tuple[set[str], object]:
    tags = set()
    while isinstance(result, tuple) and isinstance(result[1], tuple | int):
        tags.add(result[0])
        result = result[1]
    return tags, result


TAGS = ("a", "b", "c")


def test_applying_undoing_and_calling_at_once(unchanged: Snapshot) -> None:
    """A call sees each patch wholly or not at all, and when all is done nothing is left."""
    shared = [declare(tag, f"{FUNCTIONS}:scale") for tag in TAGS]
    scoped = declare("scoped", f"{LAYERS}:Unhashable.to")
    instances = [layers.Unhashable(number) for number in range(4)]
    failures: list[Exception] = []
    end = time.monotonic() + 2

    def apply(number: int) -> None:
        items = (shared[number % 3], patches.on(scoped, [instances[number]]))
        with patches.transaction(*items, reason=f"thread {number}"):
            tags, result = flatten(functions.scale(2))
            assert TAGS[number % 3] in tags
            assert result == 4
            assert instances[number].to("cpu") == ("scoped", "cpu")

    def call(number: int) -> None:
        tags, result = flatten(functions.scale(2))
        assert result == 4
        assert tags <= set(TAGS)
        assert layers.Unhashable(number).to("cpu") == "cpu"

    def repeat(work: Callable[[int], None], number: int) -> None:
        try:
            while time.monotonic() < end:
                work(number)
        except Exception as error:  # noqa: BLE001 - shown by the main thread
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=(work, n)) for work in (apply, call) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    assert patches.active() == []
    assert unchanged.differences() == []
