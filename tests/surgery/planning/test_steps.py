"""What a step keeps, as planned, beside the tensors of a real one on a CPU; and what kernels and offload change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from trl.trainer.utils import add_fused_lm_head

import surgery
from surgery.checkpoint import Checkpoint
from surgery.config import DDP, FSDP1, FSDP2, Quant
from surgery.errors import ConfigError
from surgery.passes.prepare import prepare
from surgery.planning.inventory import Inventory, take_inventory
from surgery.planning.plan import make_plan
from surgery.planning.ranks import Step
from surgery.planning.training import Training
from surgery.planning.verdict import predictions
from surgery.step.fuse import fuse
from tests.helpers.live import LiveBytes
from tests.helpers.models import save_tiny
from tests.surgery.planning.conftest import setting

TOKENS = 1024


def lora(dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")


def planned(folder: Path, training: Training, **changes: Any) -> Step:
    of_one: dict[str, Any] = {"world_size": 1, "shard": None, "placement": None, "device": torch.device("cpu")}
    one = setting(**{**of_one, "lora": lora(), **changes})
    step = make_plan(take_inventory(prepare(Checkpoint.open(folder), one)), one, training).of_rank(0).train
    assert step is not None
    return step


def live(folder: Path, *, checkpointing: bool, fused: bool, adapters: LoraConfig, loss: str) -> int:
    """The most bytes of tensors that a forward and a backward make."""
    model = surgery.qlora(folder, quant=Quant(), lora=adapters, dtype=torch.bfloat16, device=torch.device("cpu"))
    if checkpointing:
        surgery.checkpoint_activations(model)
    if fused:
        fuse(model)
    if loss == "trl":
        add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))  # as SFTTrainer does
    ids = torch.randint(3, 60, (1, TOKENS))
    model.train()
    more = {"fused_lm_head": True} if loss == "trl" else {}
    with LiveBytes([*model.parameters(), *model.buffers()]) as found:
        output = model(input_ids=ids, labels=ids, use_cache=False, **more)  # with its logits
        torch.autograd.backward(output.loss)
    surgery.release(model)
    return found.peak


@pytest.mark.parametrize(
    ("vocabulary", "checkpointing", "fused", "dropout", "loss"),
    [
        (64, False, False, 0.0, "model"),
        (64, True, False, 0.0, "model"),
        (64, True, True, 0.0, "model"),
        (64, False, False, 0.1, "model"),
        (2048, True, True, 0.0, "model"),
        (64, True, True, 0.0, "trl"),
        (2048, True, False, 0.0, "trl"),
    ],
)
def test_a_plan_is_within_a_twentieth_of_the_tensors_of_a_step(
    tmp_path: Path, *, vocabulary: int, checkpointing: bool, fused: bool, dropout: float, loss: Any
) -> None:
    """The sizes are those of 8B, divided by 32."""
    sizes = {"hidden_size": 128, "intermediate_size": 448, "num_attention_heads": 4, "num_key_value_heads": 1}
    sizes |= {"num_hidden_layers": 4, "vocab_size": vocabulary, "max_position_embeddings": TOKENS}
    folder = save_tiny(tmp_path, **sizes)
    training = Training(seq=TOKENS, checkpointing=checkpointing, kernels=("fused",) if fused else (), loss=loss)
    step = planned(folder, training, lora=lora(dropout))
    found = live(folder, checkpointing=checkpointing, fused=fused, adapters=lora(dropout), loss=loss)
    assert step.moment == ("backward" if vocabulary < 100 and loss == "model" else "loss")
    assert step.activations + step.logits + step.dequantized == pytest.approx(found, rel=0.05)


def of_70b(inventory: Inventory, **choices: Any) -> Step:
    found = make_plan(inventory, setting(), Training(**{"checkpointing": True, "seq": 4096, **choices})).of_rank(0)
    assert found.train is not None
    return found.train


def test_offloaded_inputs_are_the_hosts_but_for_two(inventory: Inventory) -> None:
    kept, offloaded = of_70b(inventory), of_70b(inventory, offload=True)
    one = 4096 * 8192 * 2
    assert kept.device_peak - offloaded.device_peak == 78 * one
    assert offloaded.host_peak - kept.host_peak == offloaded.offloaded == 79 * one  # a power of two
    assert of_70b(inventory, offload=True, seq=4097).offloaded == 79 * 2 * one
    plan = make_plan(inventory, setting(), Training(checkpointing=True, seq=4096, offload=True))
    assert predictions(plan, 0)["train"] == (kept.host_peak, offloaded.device_peak)  # pinned: not anonymous
    on_cpu = make_plan(inventory, setting(device=torch.device("cpu")), plan.training).of_rank(0).train
    assert on_cpu is not None
    assert on_cpu.offloaded == 0


def test_liger_keeps_less_and_makes_logits_in_chunks(inventory: Inventory) -> None:
    plain, liger = of_70b(inventory, seq=16384), of_70b(inventory, seq=16384, kernels=("liger",))
    # In 16 bits: the result of an activation function, norms (32 bits before), and one of the gradients in backward.
    less = 16384 * (2 * 28672 + 2 * 8192 * 2 + 2 * 28672)
    assert plain.activations - liger.activations == less
    # As the source of Liger says of 16,384 tokens, 32,000 words and a hidden size of 4,096.
    small = replace(inventory, hidden=4096, units=tuple(each for each in inventory.units if each.kind != "block"))
    found = of_70b(small, seq=16384, kernels=("fused", "liger"))
    assert (found.moment, found.logits) == ("loss", 2048 * 32000 * 2)
    assert not inventory.stock_loss
    stock = of_70b(replace(small, stock_loss=True), seq=16384, kernels=("fused", "liger"))
    assert stock.logits == of_70b(small, seq=16384).logits == 16384 * 32000 * (2 + 3 * 4)
    assert found.dequantized == of_70b(inventory).dequantized  # at the loss too: the workspace stays


def test_a_large_vocabulary_is_no_more_to_the_loss_of_trl_than_a_small_one(inventory: Inventory) -> None:
    large = replace(inventory, vocabulary=128256)
    found = [of_70b(each, seq=16384, offload=True, loss="trl") for each in (inventory, large)]
    assert found[0].device_peak == found[1].device_peak < 0.6 * of_70b(large, seq=16384, offload=True).device_peak


def test_choices_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="found 'ligre'"):
        Training(kernels=("ligre",))
    with pytest.raises(ConfigError, match="checkpointing"):
        Training(offload=True)
    with pytest.raises(ConfigError, match="graphs to be 0 or more, found -1"):
        Training(graphs=-1)


@pytest.mark.parametrize(("shards", "copies"), [(2, (1, 15)), (1, (2, 9))])
def test_recorded_steps_are_there_once_more_with_what_each_shape_keeps(
    inventory: Inventory, shards: int, copies: tuple[int, int]
) -> None:
    """copies: of all gradients, in the graphs of one shape, and of eight."""
    shard = FSDP2() if shards == 2 else DDP()
    where = setting(shard=shard, placement="sharded" if shards == 2 else "replicated")

    def of(graphs: int, loss: Any, **changes: Any) -> Step:
        training = Training(**{"checkpointing": True, "seq": 4096, "loss": loss, "graphs": graphs, **changes})
        found = make_plan(inventory, where, training).of_rank(0).train
        assert found is not None
        return found

    without, one, eight = (of(graphs, "trl") for graphs in (0, 1, 8))
    moment = without.gathered + without.dequantized + without.activations + without.logits
    assert [each.recorded for each in (one, eight)] == [
        copies[0] * without.gradients,
        moment + copies[1] * without.gradients,
    ]
    assert eight.device_peak - without.device_peak == eight.recorded
    # Its logits are an output: the graph keeps them, and each replay copies them.
    whole, logits = of(0, "model"), 4096 * 32000 * 2
    assert whole.moment == "backward"
    assert of(1, "model").recorded - one.recorded == 2 * logits
    # The loss is the stock one, since Liger's would have the host wait.
    stock, chunked = (of(graphs, "model", seq=16384, offload=True, kernels=("liger",)) for graphs in (1, 0))
    assert stock.logits == 4 * 7 * logits > chunked.logits
    # What the eager stream and the recorded one dequantize into.
    assert of(1, "trl", kernels=("fused",)).recorded == one.recorded + without.dequantized


@pytest.mark.parametrize(
    "changes",
    [{"shard": FSDP1(), "placement": "rank0-cpu"}, {"shard": FSDP2(cpu_offload=True)}, {"device": torch.device("cpu")}],
)
def test_steps_that_are_not_captured_take_no_more(inventory: Inventory, changes: dict[str, Any]) -> None:
    found = [make_plan(inventory, setting(**changes), Training(graphs=graphs)).of_rank(0).train for graphs in (0, 8)]
    assert found[0] == found[1]


def test_each_recording_has_host_memory_of_its_own(inventory: Inventory) -> None:
    once = of_70b(inventory, offload=True).offloaded
    assert [of_70b(inventory, offload=True, graphs=graphs).offloaded for graphs in (1, 8)] == [once, 9 * once]
