"""Adapters merged into a checkpoint: read, merged and written piece by piece, on any number of ranks."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery.adapters.metadata import TOKENIZER_FILES, versions
from surgery.checkpoint import Checkpoint, Reader, TensorEntry
from surgery.comm.environment import compute_device, launched_world_size
from surgery.comm.failures import everyone, together
from surgery.comm.ranks import Ranks, current_ranks
from surgery.errors import ConfigError, ExportError
from surgery.export.merge_adapters import Matched, StoredAdapter, check_together, match
from surgery.export.merging import MergeSite, adapt, chunks, find_sites
from surgery.export.output import MAX_SHARD_BYTES, Output, Planned, check_output, output
from surgery.model.fqn import join, split
from surgery.model.keys import Assignment, group_keys
from surgery.model.skeleton import build_on_meta, causal_lm
from surgery.model.tree import tied_parameters
from surgery.model.weights import plan_weights
from surgery.telemetry.report import Report

__all__ = ["DTYPES", "merge"]
