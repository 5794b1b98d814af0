"""Formats of quantized weights: the protocol is in `base`, and each format is a file of its own, imported here."""

from surgery.quantizers import bnb, bnb8, experts, none

__all__ = ["bnb", "bnb8", "experts", "none"]
