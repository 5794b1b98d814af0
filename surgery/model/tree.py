"""Walking a module tree: every module once, with the aliases that share it; decoder blocks; tied parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from surgery.model.fqn import WRAPPER_SEGMENTS, join, split

__all__ = [
    "Site",
    "convert",
    "decoder_blocks",
    "ends_of",
    "is_conv1d",
    "is_linear_like",
    "modules_of",
    "own_tensors",
    "replace_module",
    "sites",
    "tied_parameters",
    "unwrapped",
    "was_conv1d",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """One place in a module tree. `fqn` is the first name under which `module` is met; `aliases` are the others."""

    fqn: str
    module: nn.Module
    aliases: tuple[str, ...] = ()


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Every module of `model` once, in the order of `model.modules()`, whose generators in generators take longer."""
    found: dict[nn.Module, None] = {}
    left: list[nn.Module | None] = [model]
    while left:
        module = left.pop()
        if module is not None and module not in found:
            found[module] = None
            left.extend(reversed(module._modules.values()))
    return list(found)


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under every name, in the order of `model.named_modules(remove_duplicate=False)`."""
    left: list[tuple[str, nn.Module]] = [("", model)]
    while left:
        prefix, module = left.pop()
        yield prefix, module
        children = [(join(prefix, name), child) for name, child in module._modules.items() if child is not None]
        left.extend(reversed(children))


def unwrapped(module: nn.Module) -> nn.Module:
    """`module` itself, or what FSDP1, activation checkpointing or `torch.compile` has wrapped in it."""
    inner = next((module._modules[name] for name in WRAPPER_SEGMENTS if name in module._modules), None)
    return module if inner is None else unwrapped(inner)


def sites(model: nn.Module) -> Iterator[Site]:
    """Every module of `model` once, parents before children, with all its names."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in _named_modules(model):
        names.setdefault(module, []).append(name)
    for module, (first, *others) in names.items():
        yield Site(fqn=first, module=module, aliases=tuple(others))


def replace_module(model: nn.Module, site: Site, new: nn.Module) -> None:
    """Put `new` wherever `site.module` was: at its FQN and at every alias, so that sharing survives."""
    if not site.fqn:
        raise ValueError("the root module cannot be replaced in its own tree")
    for fqn in (site.fqn, *site.aliases):
        parent, name = split(fqn)
        setattr(model.get_submodule(parent), name, new)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """`(name, tensor)` of the parameters and persistent buffers that `module` itself holds: what a checkpoint fills."""
    yield from ((name, p) for name, p in module._parameters.items() if p is not None)
    yield from (
        (name, b)
        for name, b in module._buffers.items()
        if b is not None and name not in module._non_persistent_buffers_set
    )


def tied_parameters(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First FQN of every parameter or persistent buffer of `model` -> the other FQNs that share it (often none)."""
    names: dict[int, list[str]] = {}
    for prefix, module in _named_modules(model):
        for name, tensor in own_tensors(module):
            names.setdefault(id(tensor), []).append(join(prefix, name))
    return {first: tuple(others) for first, *others in names.values()}


def decoder_blocks(model: nn.Module) -> list[Site]:
    """The repeated blocks of `model`: children of every outermost `ModuleList` (or `Sequential` of one class).

    Found from the structure, not from class names: what a decoder repeats lives in a container of equals. Containers
    within a block (experts, say) are not looked at, and a container without parameters is none.
    """
    found: list[Site] = []
    seen: set[nn.Module] = set()
    left: list[tuple[str, nn.Module]] = [("", model)]
    while left:
        fqn, module = left.pop()
        if module in seen:
            continue
        children = [(join(fqn, name), child) for name, child in module.named_children()]
        if _repeats(module):
            seen.update(modules_of(module))
            found.extend(Site(fqn=name, module=child) for name, child in children)
        else:
            seen.add(module)
            left.extend(reversed(children))
    return found


def _repeats(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    children = list(module.children())
    if len({type(child) for child in children}) != 1 and not isinstance(module, nn.ModuleList):
        return False
    return bool(children) and all(any(True for _ in child.parameters()) for child in children)


def ends_of(model: nn.Module, blocks: Sequence[Site]) -> tuple[nn.Module | None, tuple[nn.Module, ...]]:
    """The modules before and after the `blocks` of a language model: `(embedding, (last norm, head))`.

    The embedding is None if there is none, or if the head shares its weight: then it is among the others. The last norm
    is found by its place, beside the blocks and after them. What a model does not have is left out, and so is an end
    that shares a parameter with the rest of the model, such as the bias of BERT's head.
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    norm = _after(model, blocks)
    before: tuple[nn.Module | None, ...] = (embedding,)
    after: tuple[nn.Module | None, ...] = (norm, head)
    if embedding is not None and head is not None and not set(embedding.parameters()).isdisjoint(head.parameters()):
        before, after = (), (norm, embedding, head)
    rest = _parameters_beside(model, {*(site.module for site in blocks), *before, *after})
    ends = (tuple(module for module in end if module is not None) for end in (before, after))
    first, last = (() if any(not rest.isdisjoint(m.parameters()) for m in end) else end for end in ends)
    return (first[0] if first else None), last


def _parameters_beside(model: nn.Module, parts: Collection[nn.Module | None]) -> set[nn.Parameter]:
    """The parameters of `model` outside of its `parts`."""
    found: set[nn.Parameter] = set()
    stack = [model]
    while stack:
        module = stack.pop()
        if module not in parts:
            found.update(parameter for parameter in module._parameters.values() if parameter is not None)
            stack.extend(module.children())
    return found


def _after(model: nn.Module, blocks: Sequence[Site]) -> nn.Module | None:
    """The last module with parameters of its own that follows the container of the last block."""
    container = split(blocks[-1].fqn)[0] if blocks else ""
    if not container:  # no blocks, or the model itself is what contains them
        return None
    parent, name = split(container)
    siblings = dict(model.get_submodule(parent).named_children())
    later = list(siblings)[list(siblings).index(name) + 1 :]
    plain = [siblings[each] for each in later if siblings[each]._parameters]
    return next((module for module in reversed(plain) if all(p.dim() == 1 for p in module.parameters())), None)


def is_linear_like(module: nn.Module) -> bool:
    """Whether `module` multiplies by one weight: exactly `nn.Linear`, or transformers' transposed `Conv1D`."""
    return type(module) is nn.Linear or is_conv1d(module)


def was_conv1d(module: nn.Module) -> bool:
    """Whether `module` was made of a `Conv1D` by upstream, and keeps as `(out, in)` what the checkpoint has turned."""
    return getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D"


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D` (GPT-2): a linear layer that keeps its weight as `(in, out)`."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def convert(
    parameters: Iterable[nn.Parameter], *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> None:
    """Cast or move `parameters` in place. Views of one memory, by which PEFT ties adapters, stay such views."""
    sharing: dict[int, list[nn.Parameter]] = {}
    for parameter in parameters:
        sharing.setdefault(parameter.untyped_storage()._cdata, []).append(parameter)
    for held in sharing.values():
        if len(held) == 1:
            held[0].data = held[0].data.to(device=device, dtype=dtype)
            continue
        elements = held[0].untyped_storage().nbytes() // held[0].element_size()
        memory = held[0].data.as_strided((elements,), (1,), 0).to(device=device, dtype=dtype)
        for parameter in held:
            parameter.data = memory.as_strided(parameter.shape, parameter.stride(), parameter.storage_offset())
