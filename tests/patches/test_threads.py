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


@pytest.mark.parametrize(
    ("seconds", "each"), [pytest.param(2, 4, id="short"), pytest.param(10, 8, id="long", marks=pytest.mark.slow)]
)
def test_applying_undoing_and_calling_at_once(seconds: float, each: int, unchanged: Snapshot) -> None:
    """A call sees each patch wholly or not at all, and when all is done nothing is left."""
    shared = [declare(tag, f"{FUNCTIONS}:scale") for tag in TAGS]
    scoped = declare("scoped", f"{LAYERS}:Unhashable.to")
    instances = [layers.Unhashable(number) for number in range(each)]
    failures: list[Exception] = []
    end = time.monotonic() + seconds
    rounds = {"apply": [0] * each, "call": [0] * each}

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
                rounds[work.__name__][number] += 1
        except Exception as error:  # noqa: BLE001 - shown by the main thread
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=(work, n)) for work in (apply, call) for n in range(each)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    assert all(count > 0 for counts in rounds.values() for count in counts), "every thread got its turn"
    assert patches.active() == []
    assert unchanged.differences() == []
