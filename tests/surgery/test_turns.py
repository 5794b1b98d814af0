"""Turns: one thread at a time, a pause lets the next one in, and nobody waits any more once work was stopped."""

from __future__ import annotations

import threading
import time

import pytest

from surgery.turns import TURN, Turns


def in_thread(action: object) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


def test_one_thread_at_a_time_has_its_turn() -> None:
    turns, inside, most = Turns(threading.Event()), [], []

    def work() -> None:
        for _ in range(200):
            with turns.taken():
                inside.append(1)
                most.append(len(inside))
                time.sleep(0)
                inside.pop()

    threads = [in_thread(work) for _ in range(3)]
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert most == [1] * 600


def test_a_pause_lets_the_one_in_that_waits() -> None:
    turns, order, waits = Turns(threading.Event()), [], threading.Event()

    def wait() -> None:
        waits.set()
        with turns.taken():
            order.append("other")

    with turns.taken():
        thread = in_thread(wait)
        waits.wait()
        deadline = time.monotonic() + 10
        while "other" not in order and time.monotonic() < deadline:
            turns.pause()
        order.append("own, again")
    thread.join(10)
    assert order == ["other", "own, again"]


def test_a_pause_that_nobody_waits_for_keeps_the_turn() -> None:
    turns = Turns(threading.Event())
    with turns.taken():
        time.sleep(2 * TURN)
        turns.pause()
        assert turns._turn.locked()
    turns.pause()  # outside of a turn
    assert not turns._turn.locked()


def test_nobody_waits_once_work_is_stopped() -> None:
    stop = threading.Event()
    turns, done = Turns(stop), threading.Event()

    def work() -> None:
        with turns.taken():
            turns.pause()
            done.set()

    with turns.taken():
        in_thread(work)
        assert not done.wait(0.2)
        stop.set()
        assert done.wait(10), "it goes on without its turn"
        assert turns._turn.locked(), "which is still this thread's"
    assert not turns._turn.locked()


def test_a_turn_ends_with_an_exception() -> None:
    turns = Turns(threading.Event())
    with pytest.raises(ZeroDivisionError), turns.taken():
        raise ZeroDivisionError
    with turns.taken():
        assert turns._turn.locked()
