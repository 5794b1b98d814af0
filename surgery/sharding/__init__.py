"""How ranks share a model: the protocol is in `base`, and each strategy is a file of its own, imported here."""

from surgery.sharding import ddp, fsdp1, fsdp2, unsharded

__all__ = ["ddp", "fsdp1", "fsdp2", "unsharded"]
