"""Fully qualified names of modules and parameters, with and without the wrappers that sharding puts in between."""

from __future__ import annotations

__all__ = ["PEFT_PREFIX", "WRAPPER_SEGMENTS", "clean", "join", "split"]

#: Attribute names under which FSDP1 and torch's activation checkpointing keep the module that they wrap.
WRAPPER_SEGMENTS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")

#: What PEFT puts before the names of the base model inside of its own.
PEFT_PREFIX = "base_model.model."


def clean(fqn: str) -> str:
    """`fqn` without wrapper segments: what the parameter is called in the unwrapped model."""
    return ".".join(segment for segment in fqn.split(".") if segment not in WRAPPER_SEGMENTS)


def join(prefix: str, name: str) -> str:
    """`prefix.name`, or `name` alone at the root."""
    return f"{prefix}.{name}" if prefix else name


def split(fqn: str) -> tuple[str, str]:
    """`(parent, name)`; the parent of a root name is the empty string."""
    parent, _, name = fqn.rpartition(".")
    return parent, name
