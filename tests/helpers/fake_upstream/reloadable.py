"""A module that tests reload."""

from __future__ import annotations


def compute() -> int:
    return 1


class Thing:
    def run(self) -> int:
        return 2
