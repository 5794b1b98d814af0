"""Compiled blocks: how many graphs Dynamo makes of a model, and that they compute what the model computes."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter

import patches
import surgery
from surgery.config import FSDP2, Quant
from surgery.errors import ConfigError
from surgery.model.fqn import clean
from surgery.model.tree import decoder_blocks
from surgery.step.fuse import fuse
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

IDS, LONGER, LONGEST = (
    torch.randint(3, 96, (2, tokens), generator=torch.Generator().manual_seed(tokens)) for tokens in (7, 9, 12)
)

pytestmark = [  # by Dynamo
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), num_hidden_layers=3, dtype=torch.float32)


def loaded(folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "down_proj"], init_lora_weights=False)
    quant = Quant(quant_storage=torch.float32)
    return surgery.qlora(folder, quant=quant, lora=lora, dtype=torch.float32, report=surgery.Report(), **options)


def step(model: Any, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and the gradient of every adapter."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    wanted = ((clean(name), p.grad) for name, p in model.named_parameters() if p.requires_grad)
    return loss.item(), {name: getattr(grad, "full_tensor", grad.clone)() for name, grad in wanted}


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_number_of_graphs_is_that_of_kinds_of_inputs_and_not_of_blocks(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two, since the first block's input needs no gradient; two more for the first other length, and none after."""
    monkeypatch.setattr("surgery.step.fuse._told", [])
    model, graphs = loaded(folder, device=torch.device("cpu")), CompileCounter()
    fuse(model)
    eager = {ids: step(model, ids) for ids in (IDS, LONGER, LONGEST)}
    assert surgery.compile_blocks(model, backend=graphs) is model
    for ids, expected in ((IDS, 2), (IDS, 2), (LONGER, 4), (LONGEST, 4), (IDS, 4)):
        assert_close(step(model, ids), eager[ids])
        assert graphs.frame_count == expected
    assert caplog.text.count("in code that torch.compile traces") == 1
    surgery.release(model)


def test_blocks_under_fsdp2_are_compiled_inside_of_its_hooks(folder: Path) -> None:
    assert run_ranks(train_sharded, 2, folder) == [2, 2]


def train_sharded(folder: Path) -> int:
    model, stock = (loaded(folder, shard=FSDP2()) for _ in range(2))
    expected, graphs = step(stock, IDS), CompileCounter()
    surgery.compile_blocks(surgery.checkpoint_activations(model), backend=graphs)
    for _ in range(2):
        assert_close(step(model, IDS), expected)
    surgery.release(model)
    surgery.release(stock)
    return graphs.frame_count


def test_generation_with_a_cache_is_not_compiled_and_evaluation_is(folder: Path) -> None:
    model, graphs = loaded(folder, device=torch.device("cpu")).eval(), CompileCounter()
    with torch.no_grad():
        expected = model(IDS).logits
    said = model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, use_cache=True)
    surgery.compile_blocks(model, backend=graphs)
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, use_cache=True), said)
    assert graphs.frame_count == 0
    with torch.no_grad():
        assert_close(model(IDS).logits, expected)
    # Two where the layers of the first block share the list of active adapters, and those of others do not.
    assert graphs.frame_count in (1, 2)


def test_a_released_model_a_copy_and_a_pickle_have_blocks_as_they_were(folder: Path) -> None:
    model = loaded(folder, device=torch.device("cpu"))
    plain = [type(site.module) for site in decoder_blocks(model)]
    surgery.compile_blocks(model)
    with pytest.raises(ConfigError, match="compiled already"):
        surgery.compile_blocks(model)
    file = io.BytesIO()
    torch.save(decoder_blocks(model)[0].module, file)
    others = [
        copy.deepcopy(decoder_blocks(model)[1].module),
        torch.load(io.BytesIO(file.getvalue()), weights_only=False),
    ]
    assert [type(other) for other in others] == plain[:2]
    assert all(type(site.module) is not kind for site, kind in zip(decoder_blocks(model), plain, strict=True))
    surgery.release(model)
    assert [type(site.module) for site in decoder_blocks(model)] == plain
    assert not patches.audit()


def test_what_cannot_be_compiled_by_block_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no ModuleList of blocks"):
        surgery.compile_blocks(torch.nn.Linear(2, 2))
    model = loaded(folder, device=torch.device("cpu"))
    block = decoder_blocks(model)[1].module
    vars(block)["forward"] = block.forward
    with pytest.raises(ConfigError, match="a forward of its own"):
        surgery.compile_blocks(model)
    assert not any("run_compiled" in vars(type(site.module)) for site in decoder_blocks(model))


def test_beyond_the_limit_of_recompilations_a_call_is_not_compiled_and_says_so(folder: Path) -> None:
    model, graphs = loaded(folder, device=torch.device("cpu")), CompileCounter()
    eager = step(model, IDS)
    surgery.compile_blocks(model, backend=graphs)
    with torch._dynamo.config.patch(recompile_limit=1), pytest.warns(UserWarning, match="not compiled: "):
        assert_close(step(model, IDS), eager)
    assert graphs.frame_count == 1
