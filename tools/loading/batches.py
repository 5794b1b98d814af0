"""Shape of a batch, as it is written on a command line."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Batch"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One shape of a batch; written `4x2048`, or `4x2048c` with checkpointing."""

    sequences: int
    tokens: int
    checkpointing: bool

    @classmethod
    def of(cls, text: str) -> Batch:
        """Parse the written form. Raises `ValueError` for another."""
        sequences, _, tokens = text.removesuffix("c").partition("x")
        return cls(sequences=int(sequences), tokens=int(tokens), checkpointing=text.endswith("c"))

    def __str__(self) -> str:
        return f"{self.sequences}x{self.tokens}{'c' if self.checkpointing else ''}"

    def draw(self, vocabulary: int, *, seed: int) -> torch.Tensor:
        """Random tokens, `(sequences, tokens)` int64 on the CPU, equal for equal seeds."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, vocabulary, (self.sequences, self.tokens), generator=generator)
