"""Sharding strategies: the protocol in `base`, and a file for each strategy, imported here."""

from surgery.sharding import ddp, fsdp1, fsdp2, unsharded

__all__ = ["ddp", "fsdp1", "fsdp2", "unsharded"]
