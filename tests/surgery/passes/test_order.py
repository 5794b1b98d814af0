"""Passes that run in a wrong order are refused by what they find, with the name of the pass and the reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn

import surgery
from surgery.checkpoint import Checkpoint
from surgery.comm.environment import Node
from surgery.comm.ranks import Ranks
from surgery.errors import ConfigError, PassError
from surgery.model.skeleton import build_on_meta, causal_lm
from surgery.passes.adapt import Adapt
from surgery.passes.base import Pass
from surgery.passes.exchange import Exchange
from surgery.passes.install import Install
from surgery.passes.loading import Job, Loading, loading
from surgery.passes.pipeline import Pipeline
from surgery.passes.prepare import Prepared, prepare
from surgery.passes.quantize import Quantize
from surgery.passes.read import Read, ReadAhead
from surgery.passes.record import Record
from surgery.passes.relocate import Relocate
from surgery.passes.replace import Replace, quantizable
from surgery.passes.setting import Setting
from surgery.passes.shard import Finish

CPU = torch.device("cpu")

Make = Callable[[Loading], Pass]

#: The built-in passes by name, in their order, but for `replace`, which is given a model instead of its weights.
MAKE: dict[str, Make] = {
    "adapt": lambda shared: Adapt(loading=shared, lora=LoraConfig(r=2, target_modules="all-linear")),
    "read-ahead": lambda shared: ReadAhead(loading=shared),
    "read": lambda shared: Read(loading=shared),
    "quantize": lambda shared: Quantize(loading=shared),
    "exchange": lambda shared: Exchange(loading=shared, quantize=Quantize(loading=shared)),
    "record": lambda shared: Record(loading=shared),
    "relocate": lambda shared: Relocate(loading=shared),
    "install": lambda shared: Install(loading=shared),
    "shard": lambda shared: Finish(loading=shared),
}

#: Passes in a wrong order, the one that refuses, and why.
WRONG: list[tuple[str, str, str]] = [
    ("read-ahead quantize", "quantize", "nothing was read: quantize comes after read"),
    ("read-ahead quantize read exchange", "quantize", "nothing was read: quantize comes after read"),
    ("read-ahead read exchange", "exchange", "not complete on this rank: exchange comes after quantize"),
    ("read-ahead read exchange quantize", "exchange", "not complete on this rank: exchange comes after quantize"),
    ("read-ahead read quantize record", "record", "no state yet: record comes after exchange"),
    ("read-ahead read quantize record exchange", "record", "no state yet: record comes after exchange"),
    ("read-ahead read quantize relocate", "relocate", "not complete on this rank: relocate comes after exchange"),
    ("read-ahead read relocate quantize", "relocate", "not complete on this rank: relocate comes after exchange"),
    ("install", "install", "nothing was loaded: install comes after read"),
    ("read install", "install", "nothing was loaded: install comes after read"),
    ("read-ahead install read", "install", "nothing was loaded: install comes after read"),
    ("read-ahead read install", "install", "not complete on this rank: install comes after exchange"),
    ("read-ahead read quantize install", "install", "not complete on this rank: install comes after exchange"),
    ("shard", "shard", "is on meta .*: a complete model comes after install"),
    ("read-ahead read quantize exchange relocate shard", "shard", "is on meta .*: a complete model comes after"),
]


def setting() -> Setting:
    return Setting(
        quant=surgery.Quant(),
        shard=None,
        lora=None,
        placement=None,
        dtype=torch.bfloat16,
        compute_dtype=torch.bfloat16,
        device=CPU,
    )


@pytest.fixture
def prepared(tiny: Path) -> Prepared:
    return prepare(Checkpoint.open(tiny), setting())


@pytest.fixture
def shared(tiny: Path, prepared: Prepared) -> Iterator[Loading]:
    job = Job(ranks=Ranks(), node=Node.of(0, 1), rng_state=torch.get_rng_state())
    with loading(Checkpoint.open(tiny), prepared.targets, prepared.setting, job, surgery.Report()) as found:
        yield found


def run(names: str, model: nn.Module, shared: Loading) -> nn.Module:
    passes = tuple(MAKE[name](shared) for name in names.split())
    return Pipeline(passes=passes, loading=shared).run(model)


def refused(pass_name: str, reason: str, action: Callable[[], object]) -> None:
    with pytest.raises(PassError, match=rf"pass {pass_name} failed at .*: ConfigError: .*{reason}") as caught:
        action()
    assert caught.value.pass_name == pass_name
    assert isinstance(caught.value.__cause__, ConfigError)


@pytest.mark.parametrize(("names", "pass_name", "reason"), WRONG, ids=[case[0] for case in WRONG])
def test_a_wrong_order_is_refused_by_the_pass_that_comes_too_early(
    prepared: Prepared, shared: Loading, names: str, pass_name: str, reason: str
) -> None:
    refused(pass_name, reason, lambda: run(names, prepared.model, shared))


def test_the_right_order_fills_the_model(prepared: Prepared, shared: Loading) -> None:
    model = run(" ".join(MAKE), prepared.model, shared)
    assert not [name for name, parameter in model.named_parameters() if parameter.is_meta]
    with pytest.raises(PassError, match=re.escape("nothing was loaded")):
        run("install", model, shared)


def skeleton(tiny: Path) -> nn.Module:
    return build_on_meta(causal_lm(Checkpoint.open(tiny), torch.bfloat16), dtype=torch.bfloat16, device=CPU)


def test_adapt_comes_after_replace(tiny: Path, shared: Loading) -> None:
    reason = "no module is quantized yet: adapt comes after replace"
    refused("adapt", reason, lambda: run("adapt read-ahead", skeleton(tiny), shared))


def test_replace_comes_before_the_weights(tiny: Path, shared: Loading) -> None:
    model, quant = skeleton(tiny).to_empty(device=CPU), shared.setting.format
    replace = Replace(quant=quant, chosen=quantizable(model, [quant])[quant])
    reason = "is not on meta: build the model on meta"
    refused("replace", reason, lambda: Pipeline(passes=[replace], loading=shared).run(model))
