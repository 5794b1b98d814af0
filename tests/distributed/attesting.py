"""What a rank does in the tests of attestation: build, train, change a bit, and say what is found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

import patches
import surgery
from surgery.attestation.differences import Attestation, Difference
from surgery.config import Placement
from surgery.quantizers.digest import records_of
from surgery.sharding.base import strategy_of
from tests.distributed.exactness import lora, loss_of
from tests.helpers.rewritten_nans import rewritten_nans

PATCH = "torch.fsdp2-bit-exact-gather"

DDP, FSDP1, FSDP2 = surgery.DDP, surgery.FSDP1, surgery.FSDP2
DTYPE = torch.bfloat16
#: In the flat parameter of its block, two ranks hold a part of it each.
LAYER = "model.layers.1.mlp.gate_proj"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A way to build the model."""

    name: str
    shard: DDP | FSDP1 | FSDP2 | None
    placement: Placement | None = None
    quant: dict[str, Any] = field(default_factory=dict)


ON_TWO = [
    Setup(name="fsdp2", shard=FSDP2()),
    Setup(name="fsdp2-single-quant-fp32", shard=FSDP2(), quant={"double_quant": False, "quant_storage": torch.float32}),
    Setup(name="fsdp2-replicated", shard=FSDP2(), placement="replicated"),
    Setup(name="fsdp2-kept-after-forward", shard=FSDP2(reshard_after_forward=False)),
    Setup(name="fsdp2-replicas-only", shard=FSDP2(mesh=(2, 1))),
    Setup(name="fsdp1", shard=FSDP1()),
    Setup(name="fsdp1-replicated", shard=FSDP1(), placement="replicated"),
    Setup(name="fsdp1-orig-params", shard=FSDP1(use_orig_params=True)),
    Setup(name="fsdp1-block-units", shard=FSDP1(use_orig_params=True, units="block")),
    Setup(name="fsdp1-shard-grad-op", shard=FSDP1(strategy="shard-grad-op")),
    Setup(name="fsdp1-no-shard", shard=FSDP1(strategy="no-shard")),
    Setup(name="ddp", shard=DDP()),
    Setup(name="unsharded", shard=None),
]
#: Adapters and all are bfloat16, so that FSDP2 copies a block as such.
BF16 = ON_TWO[0]
ON_FOUR = [
    Setup(name="fsdp2-hybrid", shard=FSDP2(mesh=(2, 2))),
    Setup(name="fsdp1-hybrid", shard=FSDP1(strategy="hybrid-shard", mesh=(2, 2))),
]


@contextlib.contextmanager
def built(checkpoint: Path, setup: Setup) -> Iterator[nn.Module]:
    """The model of `setup`, trained for no step."""
    torch.manual_seed(0)
    with surgery.qlora(
        checkpoint,
        quant=surgery.Quant(**setup.quant),
        lora=lora(),
        placement=setup.placement,
        shard=setup.shard,
        dtype=DTYPE,
        report=surgery.Report(),
    ) as model:
        yield model


def step(model: nn.Module) -> None:
    """One step of training on a batch of this rank's own."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    forward(model).backward()  # type: ignore[no-untyped-call]  # no annotation upstream
    optimizer.step()


def forward(model: nn.Module) -> torch.Tensor:
    """The loss of a batch of this rank's own."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(rank))
    return loss_of(model, ids)


def clean(checkpoint: Path, setup: Setup, output: Path) -> dict[str, Attestation]:
    """Attest at every stage of a short run."""
    found: dict[str, Attestation] = {}
    with built(checkpoint, setup) as model:
        found["start"] = surgery.attest(model)
        with surgery.attesting(model) as watch, torch.no_grad():
            forward(model)
        assert watch.attestation is not None
        found["forward"] = watch.attestation
        with surgery.attesting(model, 3) as watch:
            step(model)
        assert watch.attestation is not None
        found["training"] = watch.attestation
        found["trained"] = surgery.attest(model)
        surgery.save_adapter(model, output)
        found["saved"] = surgery.attest(model, 3)
    return found


def clean_all(checkpoint: Path, setups: list[Setup], output: Path) -> dict[str, dict[str, Attestation]]:
    """`clean` for each of `setups`."""
    return {setup.name: clean(checkpoint, setup, output / setup.name) for setup in setups}


Place = Literal["shard", "absmax", "blocksize", "gathered"]


def plant(model: nn.Module, place: Place, layer: str = LAYER) -> Callable[[], None]:
    """Change something of `layer` on this rank: a bit, a setting, or, in each forward from now on, three words.

    Returns what takes it back.
    """
    module: Any = next(module for (module, _), record in records_of(model).items() if record.fqn == layer)
    state = module.quant_state
    if place == "blocksize":
        state.blocksize //= 2
        return lambda: setattr(state, "blocksize", state.blocksize * 2)
    if place == "gathered":
        return module.register_forward_pre_hook(lambda module, _: _flip(module.weight, 0, 1, 2, 100, 1001)).remove
    tensor = (
        state.absmax
        if place == "absmax"
        else strategy_of(model).shards(model, [(module, "weight")])[module, "weight"].piece.data
    )
    _flip(tensor, 5)
    return lambda: _flip(tensor, 5)


@torch.no_grad()
def _flip(tensor: torch.Tensor, *places: int) -> None:
    data = tensor.detach().view(-1).view(torch.uint8)
    for place in places:
        data[place] ^= 8


@dataclass(frozen=True, kw_only=True)
class Caught:
    """What was raised on this rank, and how often it was clean: before anything was planted, and after."""

    message: str
    differences: tuple[Difference, ...]
    clean: int


def planted(checkpoint: Path, setup: Setup, place: Place, on_rank: int, attested_before: bool) -> Caught:
    """Plant something on one rank; attest at rest, or in forward if that is where it shows."""
    clean = 0
    with built(checkpoint, setup) as model:
        if attested_before:
            surgery.attest(model)
            clean += 1
        take_back = plant(model, place) if dist.get_rank() == on_rank else lambda: None
        error = _attested(model, in_forward=place == "gathered")
        take_back()
        for in_forward in (False, True):
            clean += _attested(model, in_forward=in_forward) is None
    assert error is not None, "nothing was found"
    return Caught(message=str(error), differences=error.differences, clean=clean)


def _attested(model: nn.Module, *, in_forward: bool) -> surgery.AttestationError | None:
    try:
        if not in_forward:
            surgery.attest(model)
            return None
        with surgery.attesting(model), torch.no_grad():
            forward(model)
    except surgery.AttestationError as error:
        return error
    return None


def planted_all(checkpoint: Path, cases: list[tuple[Setup, Place, int, bool]]) -> list[Caught]:
    """`planted` for each of `cases`."""
    return [planted(checkpoint, *case) for case in cases]


def gathered_as_on_cuda(checkpoint: Path) -> tuple[Caught, dict[str, int], Attestation]:
    """Attest FSDP2 where its copies rewrite NaN, without the patch and with it; and words that differ, by layer."""
    with built(checkpoint, BF16) as model:
        packed = _seen(model)
        with rewritten_nans():
            seen = _seen(model)
            error = _attested(model, in_forward=True)
            layers = [layer for layer, _ in records_of(model)]
            with patches.transaction(PATCH, on=layers, reason="a test", force=True), surgery.attesting(model) as watch:
                step(model)
    assert error is not None, "nothing was found"
    assert watch.attestation is not None
    words = {name: int((seen[name] != packed[name]).sum()) for name in packed}
    return Caught(message=str(error), differences=error.differences, clean=1), words, watch.attestation


def _seen(model: nn.Module) -> dict[str, torch.Tensor]:
    """The packed weights that forward uses, as 16-bit words, by layer; looked at by hooks of this test's own."""
    seen: dict[str, torch.Tensor] = {}

    def look(module: Any, fqn: str) -> None:
        seen[fqn] = module.weight.detach().view(-1).view(torch.int16).clone()

    hooks = [
        layer.register_forward_pre_hook(lambda module, _, fqn=record.fqn: look(module, fqn))
        for (layer, _), record in records_of(model).items()
    ]
    with torch.no_grad():
        forward(model)
    for hook in hooks:
        hook.remove()
    return seen
