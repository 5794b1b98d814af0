"""Peaks of memory in two places that are reached at different times."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Peaks"]


@dataclass(kw_only=True)
class Peaks:
    """Maxima over moments, in bytes: of the host, of the device, and of both together."""

    host: int = 0
    device: int = 0
    both: int = 0

    def note(self, *, host: int, device: int) -> None:
        """A moment at which so much is held."""
        self.host = max(self.host, host)
        self.device = max(self.device, device)
        self.both = max(self.both, host + device)
