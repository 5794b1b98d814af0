"""Ways and their options, on the command line and between processes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["OPTIONS", "Options", "Way"]

#: Base -> the options it has. Options that stand together compose, but for those that choose how ranks share the model.
OPTIONS: dict[str, tuple[str, ...]] = {
    "ours": ("fused", "liger", "compile", "graphs", "offload", "ddp", "kept"),
    "stock": ("axolotl", "liger", "ddp"),
    "accelerate": ("axolotl", "liger"),
    "unsloth": ("ddp", "fsdp2", "sharded", "balanced"),
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to train, written `ours`, `ours:fused,liger`, or `ours:fused@1` on one rank of several."""

    base: str
    options: tuple[str, ...]
    ranks: int | None

    @classmethod
    def of(cls, text: str) -> Way:
        """Parse the written form. Raises `ValueError` naming the choices."""
        name, _, ranks = text.partition("@")
        base, _, listed = name.partition(":")
        options = tuple(option for option in listed.split(",") if option)
        if base not in OPTIONS:
            raise ValueError(f"expected a way of {', '.join(OPTIONS)}; found {text!r}")
        if unknown := [option for option in options if option not in OPTIONS[base]]:
            raise ValueError(f"{base} has the options {', '.join(OPTIONS[base])}; found {', '.join(unknown)}")
        return cls(base=base, options=options, ranks=int(ranks) if ranks else None)

    def __str__(self) -> str:
        return self.base + (f":{','.join(self.options)}" if self.options else "")

    def processes(self, ranks: int) -> int:
        """Number of its processes among `ranks` GPUs: `balanced` spreads layers over all of them from one."""
        return 1 if "balanced" in self.options else self.ranks or ranks


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything that a process needs to know to play one way.

    tokens: of the longest sequence that it will see. memory_cap: GiB that torch may use of each GPU.
    """

    checkpoint: str
    way: str
    device: str
    tokens: int
    memory_cap: float | None
    seed: int = 0
