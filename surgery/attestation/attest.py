"""Attest a model at rest."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from surgery.attestation.agreement import complete, fingerprint, state_disagreements
from surgery.attestation.differences import Attestation, Difference, error_of
from surgery.attestation.rest import shard_differences, state_differences
from surgery.comm.collectives import gather_objects
from surgery.comm.failures import together
from surgery.errors import ConfigError, SelectorError
from surgery.quantizers.digest import Record, Records, records_of, settle
from surgery.sharding.base import strategy_of

__all__ = ["attest", "chosen_records", "raise_any", "rest_differences"]


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
    found = list(records.values())
    return Attestation(
        where="at rest",
        layers=tuple(each.fqn for each in found),
        nbytes=sum(each.nbytes for each in found),
        digest=fingerprint(found),
        seconds=time.perf_counter() - start,
    )


def chosen_records(model: nn.Module, layers: int | Sequence[str] | None, *, seed: int) -> Records:
    """The records of `layers`, as `attest` takes them, ready to be compared: on the CPU, and complete; collective."""
    records = _choose(records_of(model), layers, seed)
    settle(records.values())
    complete(list(records.values()))
    return records


def _choose(records: dict[nn.Module, Record], layers: int | Sequence[str] | None, seed: int) -> Records:
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
    """What this rank has to say of its shards and quant_states; collective, once all have said it."""
    found = shard_differences(records, strategy_of(model).shards(model, records))
    return [*found, *state_differences(records), *state_disagreements(list(records.values()))]


def raise_any(found: Iterable[Difference], *, layers: int) -> None:
    """Raise `AttestationError` on every rank if any has `found` a difference; collective."""
    everyone = [difference for of_rank in gather_objects(list(found)) for difference in of_rank]
    if everyone:
        raise error_of(everyone, layers=layers)
