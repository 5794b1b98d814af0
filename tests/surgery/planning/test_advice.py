"""Options that would make a plan fit."""

from __future__ import annotations

import shlex

import pytest
import torch
from peft import LoraConfig

from surgery.config import DDP, FSDP1, Quant
from surgery.errors import ConfigError
from surgery.finetune.parser import parse
from surgery.planning import advice as advising
from surgery.planning.advice import Advice, advise, advise_all, command
from surgery.planning.inventory import Inventory
from surgery.planning.plan import make_plan
from surgery.planning.training import Training
from surgery.planning.verdict import OUTSIDE_ALLOCATOR, as_dict, check_fits, say
from surgery.sharding import fsdp2
from surgery.step.kernels import INSTALL
from tests.surgery.planning.conftest import setting

GIB = 1 << 30


def test_options_come_in_order_and_each_one_fits(inventory: Inventory) -> None:
    found = list(advise_all(make_plan(inventory, setting(), Training(batch=2)), 50 * GIB))
    assert [advice.options[0].split()[0] for advice in found] == [
        "--gradient-checkpointing",
        "--per-device-train-batch-size",
        "--max-length",
    ]
    assert all(advice.device_peak <= 50 * GIB for advice in found)


def test_the_smallest_number_of_ranks_is_found(inventory: Inventory) -> None:
    plan = make_plan(inventory, setting(), Training(checkpointing=True))
    memory = 12 * GIB
    (advice,) = [each for each in advise_all(plan, memory) if each.options[0].startswith("--world")]
    ranks = int(advice.options[0].split()[1])
    assert make_plan(inventory, setting(world_size=ranks), plan.training).device_peak == advice.device_peak <= memory
    assert make_plan(inventory, setting(world_size=ranks - 1), plan.training).device_peak > memory


def test_options_add_up_where_none_is_enough(inventory: Inventory) -> None:
    advice = advise(make_plan(inventory, setting(), Training()), 10 * GIB)
    assert advice is not None
    assert advice.options[:2] == ("--kernels fused,liger", "--gradient-checkpointing")
    assert advice.device_peak <= 10 * GIB


@pytest.mark.parametrize("found", [None, object()])
def test_kernels_come_first_and_a_package_that_is_missing_is_named(
    inventory: Inventory, found: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.step.kernels.find_spec", lambda _name: found)
    monkeypatch.setattr(advising, "CHANGES", advising.CHANGES[:1])
    missing = None if found else "pip install 'model-surgery[kernels]'"
    plan = make_plan(inventory, setting(), Training())

    def first(memory: int) -> Advice:
        advice = advise(plan, memory)
        assert advice is not None
        return advice

    least, fused = (
        make_plan(inventory, setting(), Training(kernels=names)) for names in (("fused", "liger"), ("fused",))
    )
    advice = first(least.device_peak)
    assert (advice.options, advice.install) == (("--kernels fused,liger",), missing)
    assert (INSTALL in " ".join(say(plan, least.device_peak + OUTSIDE_ALLOCATOR))) == (found is None)
    assert as_dict(plan, least.device_peak + OUTSIDE_ALLOCATOR)["would_fit_with"][0]["install"] == missing
    with pytest.raises(
        ConfigError, match=r"--kernels fused,liger \(.*GiB\)" + (", which need pip" if missing else "$")
    ):
        check_fits(plan, least.device_peak)
    advice = first(fused.device_peak)
    assert (advice.options, advice.install) == ((f"--kernels fused{'' if missing else ',liger'}",), None)
    assert advise(least, GIB) is None  # which has them
    in_16_bits = make_plan(inventory, setting(quant=None), Training())
    assert next(iter(advise_all(in_16_bits, in_16_bits.device_peak - 1))).options == ("--kernels liger",)


def test_graphs_are_left_out_before_a_step_takes_longer(inventory: Inventory) -> None:
    kernels = ("fused", "liger")
    plan, without = (
        make_plan(inventory, setting(), Training(checkpointing=True, kernels=kernels, graphs=graphs))
        for graphs in (8, 0)
    )
    advice = advise(plan, without.device_peak)
    assert advice is not None
    assert advice.options == ("no --cuda-graphs",)
    assert "--cuda-graphs" not in command(advice.plan, "m")
    assert "--cuda-graphs" in command(plan, "m")
    assert advising._offloaded_shards(plan, 0) is None  # whose steps cannot be recorded


def test_another_placement_is_named(inventory: Inventory) -> None:
    plan = make_plan(inventory, setting(shard=FSDP1(), placement="replicated"), None)
    advice = advise(plan, 24 * GIB)
    assert advice is not None
    assert advice.options == ("--fsdp 2 --placement sharded",)


def test_there_may_be_nothing_to_say(inventory: Inventory) -> None:
    assert advise(make_plan(inventory, setting(), Training()), GIB // 2) is None


def test_what_would_be_refused_is_no_advice(inventory: Inventory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older torch cannot shard integers."""
    whole = setting(shard=DDP(), placement="replicated", quant=Quant(quant_storage=torch.uint8))

    def options() -> list[str]:
        return [advice.options[0] for advice in advise_all(make_plan(inventory, whole, Training()), 60 * GIB)]

    assert "--fsdp 2 --placement sharded" in options()
    monkeypatch.setattr(fsdp2, "SHARDS_INTEGERS", (99,))
    assert "--fsdp 2 --placement sharded" not in options()


def test_commands_can_be_pasted(inventory: Inventory) -> None:
    """`surgery finetune` takes them, and means the same by them."""
    changed = setting(
        shard=FSDP1(cpu_offload=True),
        placement="rank0-cpu",
        quant=Quant("fp4", double_quant=False, quant_storage=torch.float32),
        lora=LoraConfig(r=8, target_modules=["q_proj", "v_proj"], target_parameters=["experts.down_proj"]),
        dtype=torch.float32,
        compute_dtype=torch.float32,
    )
    training = Training(batch=2, seq=512, optimizer="sgd")
    line = shlex.split(command(make_plan(inventory, changed, training), "./a model"))
    assert line[:8] == ["torchrun", "--nproc-per-node", "2", "-m", "surgery", "finetune", "./a model", "--data"]
    request = parse(line[6:])
    assert request.model.model_name_or_path == "./a model"
    wanted = {
        "fsdp": "1", "fsdp_config": '{"cpu_offload": true}', "bnb_4bit_quant_type": "fp4", "dtype": "float32",
        "use_bnb_nested_quant": False, "bnb_4bit_quant_storage": "float32", "lora_r": 8, "optim": "sgd",
        "lora_target_modules": ["q_proj", "v_proj"], "per_device_train_batch_size": 2, "max_length": 512,
        "gradient_checkpointing": False, "lora_target_parameters": ["experts.down_proj"],
    }  # fmt: skip
    assert {name: request.values[name] for name in wanted} == wanted
    usual = make_plan(inventory, setting(), Training(checkpointing=True))
    assert command(usual, "m") == "torchrun --nproc-per-node 2 -m surgery finetune m --data DATA"
    defaults = parse(["m", "--data", "DATA"]).values
    usual_values = {"lora_r": 16, "dtype": "bfloat16", "max_length": 1024, "gradient_checkpointing": True, "fsdp": "2"}
    assert {name: defaults[name] for name in usual_values} == usual_values
