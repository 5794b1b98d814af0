"""Peaks of memory in two places that are reached at different times."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Peaks"]


@dataclass(kw_only=True)
class Peaks:
    """Maxima over moments, in bytes: of the host, of what is not pinned of it, of the device, and of host and device
    together.
    """

    host: int = 0
    anonymous: int = 0
    device: int = 0
    both: int = 0

    def note(self, *, host: int, device: int, pinned: int = 0) -> None:
        """A moment at which so much is held; `pinned` is part of `host`."""
        self.host = max(self.host, host)
        self.anonymous = max(self.anonymous, host - pinned)
        self.device = max(self.device, device)
        self.both = max(self.both, host + device)
