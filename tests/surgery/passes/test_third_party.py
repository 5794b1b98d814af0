"""Passes of third parties: found by name, seen by every tensor, and no danger to other ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks
from tests.surgery.passes.failing_passes import PLACES, build

ROOT = Path(__file__).parents[3]

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "acme-passes"
version = "1.0"
[project.entry-points."surgery.passes"]
acme-scale = "acme_passes:Scale"
acme-broken = "acme_passes:Absent"
acme-other = "acme_passes:NO_PASS"
[tool.setuptools]
py-modules = ["acme_passes"]
"""

MODULE = """
import surgery

class Scale(surgery.Pass):
    name = "acme-scale"
    after = "install"
    def run(self, model):
        model.get_submodule("model.norm").weight.data.mul_(2)
        return model

NO_PASS = 7
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("passes")
    return {kind: save_tiny(root / kind, kind) for kind in ("llama", "gpt2")}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("acme")
    (folder / "source").mkdir()
    (folder / "source" / "pyproject.toml").write_text(PROJECT)
    (folder / "source" / "acme_passes.py").write_text(MODULE)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "install", *offline, "--target", folder / "site", folder / "source"], check=True)
    return folder / "site"


def run_with(site: Path, code: str) -> str:
    path = os.pathsep.join(map(str, (site, ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_installed_distribution_offers_passes_by_name(site: Path, checkpoints: dict[str, Path]) -> None:
    code = f"""
import surgery
plain = surgery.qlora({str(checkpoints["llama"])!r}, report=surgery.Report())
scaled = surgery.qlora({str(checkpoints["llama"])!r}, report=surgery.Report(), passes=("acme-scale",))
print((scaled.model.norm.weight / plain.model.norm.weight).unique().tolist())
for name in ("acme-broken", "acme-other", "unheard-of"):
    try:
        surgery.qlora({str(checkpoints["llama"])!r}, report=surgery.Report(), passes=(name,))
    except surgery.ConfigError as error:
        print(error)
"""
    scaled, broken, other, unknown = run_with(site, code).splitlines()
    assert scaled == "[2.0]"
    assert "pass acme-broken (acme_passes:Absent) cannot be loaded: AttributeError" in broken
    assert "expected objects of surgery.Pass or names, found 7" in other
    assert "(acme-broken, acme-other, acme-scale), found 'unheard-of'" in unknown


class Seeing(surgery.Pass):
    """Keeps all that it is shown."""

    name = "seeing"

    def __init__(self) -> None:
        self.values: dict[str, list[torch.Tensor]] = {}
        self.packed: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def see_values(self, target: Any, start: int, values: torch.Tensor) -> None:
        pieces = self.values.setdefault(target.fqn, [])
        assert start == sum(each.numel() for each in pieces)
        pieces.append(values.clone())

    def see_tensor(self, buffer: Any) -> None:
        statistics = None if buffer.statistics is None else buffer.statistics.clone()
        self.packed[buffer.target.fqn] = buffer.data.clone(), statistics


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_tensor_is_seen_before_and_after(kind: str, checkpoints: dict[str, Path]) -> None:
    from bitsandbytes.functional import quantize_4bit

    seeing = Seeing()
    opened = surgery.Checkpoint.open(checkpoints[kind])
    with surgery.qlora(opened, passes=(seeing,), report=surgery.Report()) as model:
        names = {name for name, _ in model.named_parameters()}
        assert names <= seeing.values.keys() == seeing.packed.keys()
        with opened.reader() as reader:
            for name in names:
                module = model.get_submodule(name.rpartition(".")[0])
                stored = reader.read(name if name in opened else name.removeprefix("transformer."))
                turned = hasattr(module, "source_cls") and module.source_cls.__name__ == "Conv1D"
                assert torch.equal(torch.cat(seeing.values[name]), (stored.t() if turned else stored).reshape(-1))
                packed, statistics = seeing.packed[name]
                if statistics is not None:
                    wanted, state = quantize_4bit(stored.t() if turned else stored, quant_type="nf4")
                    assert torch.equal(packed.view(torch.uint8), wanted.view(-1))
                    assert torch.equal(statistics, state.absmax)


@pytest.mark.distributed
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "shard", [surgery.FSDP2(), surgery.FSDP1(), surgery.DDP()], ids=lambda shard: type(shard).__name__
)
def test_one_that_fails_on_one_rank_ends_all(shard: Any, checkpoints: dict[str, Path]) -> None:
    other, failing = run_ranks(build, 2, checkpoints, shard, list(PLACES), timeout=300)
    for place in PLACES:
        assert failing[place].startswith("PassError: pass failing failed at "), place
        assert "on purpose" in failing[place], place
        if "values" in place or "tensor" in place:
            assert ".1." in failing[place], place
        assert other[place] == f"PeerError: rank 1 failed: {failing[place]}"


def test_ranks_that_ask_for_different_passes_are_refused(checkpoints: dict[str, Path]) -> None:
    for error in run_ranks(_differing, 2, checkpoints["llama"]):
        assert "the ranks differ in passes" in error


def _differing(checkpoint: Path) -> str:
    import torch.distributed as dist

    try:
        surgery.qlora(checkpoint, report=surgery.Report(), passes=(Seeing(),) * dist.get_rank())
    except surgery.ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("wrong", [7, Seeing, surgery], ids=["a number", "a class", "a module"])
def test_what_is_no_pass_is_refused(wrong: Any, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(surgery.ConfigError, match=r"passes: expected objects of surgery\.Pass or names"):
        surgery.qlora(checkpoints["llama"], report=surgery.Report(), passes=(wrong,))


def test_a_place_that_there_is_not_is_refused(checkpoints: dict[str, Path]) -> None:
    wrong = Seeing()
    wrong.after = "reed"  # type: ignore[misc]  # of this object
    with pytest.raises(surgery.ConfigError, match="expected after to be one of replace, adapt, install, shard"):
        surgery.qlora(checkpoints["llama"], report=surgery.Report(), passes=(wrong,))


class Forgetful(surgery.Pass):
    name = "forgetful"

    def run(self, model: Any) -> Any:
        return None


class Nameless(surgery.Pass):
    """It has nothing."""


def test_a_pass_that_returns_no_model_is_named(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(surgery.PassError, match="pass forgetful failed at the model: TypeError: run must return"):
        surgery.qlora(checkpoints["llama"], report=surgery.Report(), passes=(Forgetful(),))


def test_a_pass_without_a_name_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(surgery.ConfigError, match="Nameless has no name"):
        surgery.qlora(checkpoints["llama"], report=surgery.Report(), passes=(Nameless(),))


def test_a_pass_after_adapters_that_there_are_none_of_is_refused(checkpoints: dict[str, Path]) -> None:
    late = Seeing()
    late.after = "adapt"  # type: ignore[misc]  # of this object
    with pytest.raises(surgery.ConfigError, match="comes after 'adapt', and there are no adapters"):
        surgery.qlora(checkpoints["llama"], report=surgery.Report(), passes=(late,))


@pytest.mark.parametrize("wrong", [None, Seeing(), (each for each in [Seeing()])], ids=["none", "one", "generator"])
def test_what_is_no_list_of_passes_is_refused(wrong: Any, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(surgery.ConfigError, match="passes: expected a list or tuple of passes"):
        surgery.qlora(checkpoints["llama"], report=surgery.Report(), passes=wrong)


@pytest.mark.distributed
def test_one_that_cannot_be_made_on_one_rank_ends_all(checkpoints: dict[str, Path]) -> None:
    first, second = run_ranks(_without_one, 2, checkpoints["llama"], timeout=60)
    assert "expected the name of an installed pass" in second
    assert first == f"rank 1 failed: ConfigError: {second}"


def _without_one(checkpoint: Path) -> str:
    import torch.distributed as dist

    from surgery.passes import base

    entry = type("Entry", (), {"name": "seeing", "value": "here:Seeing", "load": lambda _: Seeing})()
    base.entry_points = lambda group: [entry] * (1 - dist.get_rank())  # type: ignore[assignment, attr-defined, misc]
    try:
        surgery.qlora(checkpoint, report=surgery.Report(), passes=("seeing",))
    except surgery.SurgeryError as error:
        dist.barrier()
        return str(error)
    return ""
