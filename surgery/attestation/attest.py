"""Attest a model at rest, and the gathered weights in forward."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from surgery.attestation.differences import Attestation, AttestationError, Difference, Where, error_of
from surgery.attestation.rest import (
    complete,
    fingerprint,
    gather_whole,
    rank,
    shard_differences,
    state_differences,
    state_disagreements,
)
from surgery.comm.collectives import gather_objects
from surgery.comm.failures import together
from surgery.errors import ConfigError, SelectorError
from surgery.quantizers.digest import Piece, Place, Record, Records, page_count, page_sums, records_of, settle
from surgery.sharding.base import strategy_of

__all__ = ["Watch", "attest", "attesting"]


@together()
@torch.no_grad()
def attest(model: nn.Module, layers: int | Sequence[str] | None = None, *, seed: int = 0) -> Attestation:
    """Check that 4-bit weights and their `quant_state` are, bit for bit, what was quantized; collective.

    Of a model that `surgery.qlora` returned, between steps. Shards are compared where they are, and nothing is
    gathered: see `surgery.attesting` for what forward sees.

    Args:
        model: sharded or not, on all ranks alike.
        layers: None attests all; a number so many; names those modules, as they are called in the model before adapters
            (`model.layers.0.mlp.up_proj`).
        seed: of the draw, where `layers` is a number; the same on all ranks.

    Raises:
        AttestationError: on every rank, with all differences of all ranks: layer, rank, count.
        ConfigError: the model has 4-bit layers that `surgery.qlora` did not quantize, or none.
        PeerError: another rank has failed.
    """
    start = time.perf_counter()
    records = chosen_records(model, layers, seed=seed)
    raise_any(rest_differences(model, records), layers=len(records))
    return _attestation("at rest", records, start)


def _attestation(where: Where, records: Records, start: float, *, calls: int = 0) -> Attestation:
    found = list(records.values())
    return Attestation(
        where=where,
        layers=tuple(each.fqn for each in found),
        nbytes=sum(each.nbytes for each in found),
        digest=fingerprint(found),
        seconds=time.perf_counter() - start,
        calls=calls,
    )


def chosen_records(model: nn.Module, layers: int | Sequence[str] | None, *, seed: int) -> Records:
    """The records of `layers`, as `attest` takes them, ready to be compared: on the CPU, and complete; collective."""
    records = _choose(records_of(model), layers, seed)
    settle(records.values())
    complete(list(records.values()))
    return records


def _choose(records: dict[Place, Record], layers: int | Sequence[str] | None, seed: int) -> Records:
    if layers is None:
        return records
    if isinstance(layers, int):
        if layers < 1:
            raise ConfigError(f"expected 1 layer or more to attest, found {layers}")
        drawn = set(random.Random(seed).sample(range(len(records)), min(layers, len(records))))  # noqa: S311  # no secret
        return {layer: record for number, (layer, record) in enumerate(records.items()) if number in drawn}
    names = [record.fqn for record in records.values()]
    unknown = [name for name in layers if name not in names]
    if unknown or not layers:
        raise SelectorError(
            f"expected names of 4-bit layers, such as {names[0]}; found {', '.join(unknown) or 'none'}",
            patterns=unknown,
        )
    return {layer: record for layer, record in records.items() if record.fqn in layers}


def rest_differences(model: nn.Module, records: Records) -> list[Difference]:
    """Differences that this rank has found in its shards and quant_states; collective."""
    found = shard_differences(records, strategy_of(model).shards(model, records))
    return [*found, *state_differences(records), *state_disagreements(list(records.values()))]


def raise_any(found: Iterable[Difference], *, layers: int) -> None:
    """Raise `AttestationError` on every rank if any has `found` a difference; collective."""
    everyone = [difference for of_rank in gather_objects(list(found)) for difference in of_rank]
    if everyone:
        raise error_of(everyone, layers=layers)


#: Weights that are wrong are kept, for as many layers, until their words can be counted. Of others pages are counted.
KEPT = 4


@dataclass(kw_only=True, eq=False)
class Watch:
    """Progress of `attesting`. calls: of forward so far, on this rank. attestation: set at the end of the block."""

    calls: int = 0
    attestation: Attestation | None = None
    _seen: dict[Place, _Seen] = field(default_factory=dict, init=False, repr=False)

    @torch.no_grad()
    def _look(self, record: Record, name: str, layer: nn.Module, _inputs: object) -> None:
        """Compare the weight `name` that `layer` is about to use; waits for the device."""
        weight = getattr(layer, name).detach().reshape(-1)  # of FSDP1 no parameter
        sums = page_sums([Piece(data=weight)])[0].cpu()
        self.calls += 1
        assert record.whole is not None
        if (layer, name) in self._seen or torch.equal(sums, record.whole):
            return
        pages = int((sums != record.whole).sum()) if sums.shape == record.whole.shape else len(record.whole)
        kept = sum(seen.weight is not None for seen in self._seen.values())
        copy = weight.view(torch.uint8).to("cpu", copy=True) if kept < KEPT else None  # FSDP frees the weight itself
        self._seen[layer, name] = _Seen(pages=pages, weight=copy)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Seen:
    """A weight, as forward first used it, that is not what was quantized: pages that differ, and its bytes."""

    pages: int
    weight: torch.Tensor | None


@contextlib.contextmanager
def attesting(model: nn.Module, layers: int | Sequence[str] | None = None, *, seed: int = 0) -> Iterator[Watch]:
    """A block in which `model` runs, and each of `layers` is compared as its forward uses it; collective at both ends.

    Nothing is raised in forward, where other ranks would wait for this one for ever: a difference is counted, and at
    the end of the block all ranks raise what any of them found. Differences of shards and quant_state of the same
    layers are among them. Every forward of these layers waits for the device, so sample them where time matters.

    Args:
        model: as for `surgery.attest`.
        layers: as for `surgery.attest`.
        seed: as for `surgery.attest`.

    Raises:
        AttestationError: at the end, on every rank; `words` counts exactly how many 16-bit words differ from the
            shards, for the first layers on each rank. Also if no layer ran on any rank.
        ConfigError: the model has 4-bit layers that `surgery.qlora` did not quantize, or none.
        PeerError: another rank has failed, at either end of the block.
    """
    start = time.perf_counter()
    with together():
        records = chosen_records(model, layers, seed=seed)
    watch = Watch()
    with contextlib.ExitStack() as hooks:
        for (layer, name), record in records.items():
            hooks.callback(layer.register_forward_pre_hook(partial(watch._look, record, name)).remove)
        yield watch
    with together(), torch.no_grad():
        _judge(model, records, watch)
    watch.attestation = _attestation("in forward", records, start, calls=watch.calls)


def _judge(model: nn.Module, records: Records, watch: Watch) -> None:
    """Raise on every rank what any of them has seen."""
    if not any(gather_objects(watch.calls)):
        raise AttestationError(
            f"none of {len(records)} layers ran in the block, so that nothing was attested: run the model in it. A "
            "compiled model keeps the hooks that it had when it was compiled; attest it before"
        )
    bad = {name for of_rank in gather_objects([records[layer].fqn for layer in watch._seen]) for name in of_rank}
    shards = strategy_of(model).shards(model, records)
    found = []
    for layer, record in records.items():
        if record.fqn in bad:
            whole = gather_whole(shards[layer], record.nbytes, device=record.device)
            found += [_difference(record, seen, whole) for seen in (watch._seen.get(layer),) if seen is not None]
    raise_any([*found, *rest_differences(model, records)], layers=len(records))


def _difference(record: Record, seen: _Seen, whole: torch.Tensor) -> Difference:
    return Difference(
        layer=record.fqn,
        where="in forward",
        ranks=(rank(),),
        pages=seen.pages,
        of_pages=page_count(record.nbytes),
        words=None if seen.weight is None else _differing_words(seen.weight, whole),
        of_words=-(-record.nbytes // 2),
    )


def _differing_words(one: torch.Tensor, other: torch.Tensor) -> int:
    """16-bit words that two rows of bytes do not have in common, place by place."""
    words, others = _words(one), _words(other)
    common = min(len(words), len(others))
    return int((words[:common] != others[:common]).sum()) + max(len(words), len(others)) - common


def _words(data: torch.Tensor) -> torch.Tensor:
    return torch.cat([data, data.new_zeros(data.numel() % 2)]).view(torch.int16)
