"""Checkpoints in safetensors: find, check, read whole tensors or ranges of them."""

from surgery.checkpoint.checkpoint import Checkpoint
from surgery.checkpoint.header import TensorEntry
from surgery.checkpoint.index import Index
from surgery.checkpoint.packed import PackedSettings, PackedWeight
from surgery.checkpoint.prefetch import Chunk, Prefetch, Request, Segment
from surgery.checkpoint.reader import Reader

__all__ = [
    "Checkpoint",
    "Chunk",
    "Index",
    "PackedSettings",
    "PackedWeight",
    "Prefetch",
    "Reader",
    "Request",
    "Segment",
    "TensorEntry",
]
