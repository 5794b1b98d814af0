"""A module that tests reload."""

from __future__ import annotations

import functools


def compute() -> int:
    return 1


@functools.cache
def cached() -> int:
    return 3


class Thing:
    def run(self) -> int:
        return 2
