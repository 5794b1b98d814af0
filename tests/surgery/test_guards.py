"""Options that cannot work are refused before anything is opened; what an upstream library would do is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import CordaConfig

import patches
import surgery
from surgery.adapters.options import OPTIONS
from surgery.config import DDP, FSDP1, FSDP2, Quant
from surgery.errors import ConfigError, PassError, SelectorError

#: Opening it would be a CheckpointError: a ConfigError proves that it was not tried.
NOWHERE = Path("/no/such/checkpoint")


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": "all-linear", **changes})


def refused(*says: str, **options: Any) -> None:
    """`surgery.qlora` with `options` raises a ConfigError that has all of `says`, and leaves no patch."""
    with pytest.raises(ConfigError) as caught:
        surgery.qlora(NOWHERE, report=surgery.Report(), **options)
    for text in says:
        assert text in str(caught.value)
    assert patches.active() == []


@pytest.mark.parametrize("shard", [FSDP1(), FSDP2(), DDP()])
def test_sharding_without_a_process_group(shard: FSDP1 | FSDP2 | DDP) -> None:
    refused(type(shard).__name__, "process group", "torchrun", shard=shard, lora=lora())


def test_shards_of_a_model_that_is_not_sharded() -> None:
    refused("placement sharded", "without shard there is none", "shard=FSDP2()", placement="sharded")


@pytest.mark.parametrize("promised", ["2", "8"])
def test_launcher_without_a_process_group(monkeypatch: pytest.MonkeyPatch, promised: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", promised)
    refused(f"started {promised} processes", "no process group", "init_process_group")


def test_launcher_that_says_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    refused("WORLD_SIZE", "'two'")


def test_launcher_of_one_is_one_process(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with surgery.qlora(tiny, report=surgery.Report()) as model:
        assert isinstance(model, torch.nn.Module)


def test_unknown_placement() -> None:
    refused("placement", "sharded, rank0-cpu, replicated", "'everywhere'", placement="everywhere")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_dtype_that_adapters_cannot_have(dtype: torch.dtype) -> None:
    refused("float32, bfloat16 or float16", str(dtype), dtype=dtype)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "PiSSA", "eva", "corda", "loftq", "lora_ga"])
def test_initialization_from_weights_that_are_not_kept(init: str) -> None:
    config = lora()
    config.init_lora_weights = init  # type: ignore[assignment]  # PEFT wants more options with some, on construction
    refused(f"init_lora_weights={init!r}", "unquantized", lora=config)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_initialization_that_needs_no_weights(tiny: Path, init: bool | str) -> None:
    config = lora(init_lora_weights=init)
    with surgery.qlora(tiny, lora=config, report=surgery.Report()) as model:
        assert all(p.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_initializations_that_need_no_weights_are_those_of_peft_that_do_not_name_one() -> None:
    """What PEFT learns to derive from weights is refused before anybody has looked at it."""
    config = lora()
    config.init_lora_weights = "invented"  # type: ignore[assignment]  # as a later release may have it
    refused("init_lora_weights='invented'", lora=config)


def test_every_option_that_is_let_through_is_one_of_peft() -> None:
    """A name that PEFT no longer has would let nothing through."""
    assert vars(LoraConfig()).keys() >= OPTIONS


@pytest.mark.parametrize("kind", sorted(each.__name__ for each in PEFT_TYPE_TO_CONFIG_MAPPING.values()))
def test_methods_of_peft_other_than_lora(kind: str) -> None:
    config = object.__new__(getattr(peft, kind, None) or type(kind, (), {}))
    config.peft_type = kind
    refused(f"expected one peft.LoraConfig, found {kind}", lora=config)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"one": lora(), "two": lora()}, "found dict of 2"),
        ([lora()], "found list of 1"),
        ("all-linear", "found str"),
        (lora(inference_mode=True), "inference_mode=True leaves nothing to train"),
        (lora(modules_to_save="lm_head"), "use ['lm_head']"),
    ],
)
def test_what_is_no_single_adapter_to_train(config: Any, says: str) -> None:
    refused(says, lora=config)


OTHERS = {
    "layer_replication": [(0, 2), (0, 2)],
    "megatron_config": {"a": 1},
    "eva_config": peft.EvaConfig(),
    "corda_config": CordaConfig(),
    "loftq_config": {"loftq_bits": 4},
    "use_qalora": True,
    "qalora_group_size": 8,
    "arrow_config": peft.ArrowConfig(),
    "invented_config": 1,
}


@pytest.mark.parametrize("name", OTHERS)
def test_options_of_lora_that_are_not_known_to_work(name: str) -> None:
    config = lora()
    setattr(config, name, OTHERS[name])
    refused(f"{name}=", "is not supported: leave it at its default", lora=config)


def test_quant_options() -> None:
    with pytest.raises(ConfigError, match="quant_type must be one of nf4, fp4; got 'int4'"):
        Quant("int4")  # type: ignore[arg-type]  # refused
    with pytest.raises(ConfigError, match=r"blocksize must be one of 32, .*; got 100"):
        Quant(blocksize=100)
    with pytest.raises(ConfigError, match=r"quant_storage must be one of .*; got torch\.int32"):
        Quant(quant_storage=torch.int32)
    with pytest.raises(ConfigError, match=r"skip_modules: '\(' is not a regular expression"):
        Quant(skip_modules=("(",))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"strategy": "zero-3"}, "strategy must be one of full-shard, .*; got 'zero-3'"),
        ({"units": "layer"}, "units must be one of auto, block; got 'layer'"),
        ({"strategy": "hybrid-shard"}, r"hybrid-shard needs mesh=\(replicate, shard\)"),
        ({"mesh": (2, 2)}, r"mesh is for strategy hybrid-shard; got mesh=\(2, 2\) with full-shard"),
        ({"strategy": "hybrid-shard", "mesh": (4, 1)}, r"mesh=\(4, 1\) has a shard dimension of 1: .* says nothing"),
        ({"strategy": "hybrid-shard", "mesh": (0, 2)}, r"two positive integers; got \(0, 2\)"),
        ({"strategy": "hybrid-shard", "mesh": (8,)}, r"two positive integers; got \(8,\)"),
    ],
)
def test_fsdp1_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FSDP1(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mesh": (0, 2)}, r"two positive integers; got \(0, 2\)"),
        ({"mesh": (8,)}, r"two positive integers; got \(8,\)"),
    ],
)
def test_fsdp2_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FSDP2(**options)
    assert FSDP2(mesh=(4, 1)).mesh == (4, 1)  # which FSDP2 can do, other than FSDP1


def test_ddp_options() -> None:
    with pytest.raises(ConfigError, match="bucket_cap_mb must be above 0; got -1"):
        DDP(bucket_cap_mb=-1)


def test_uint8_storage_is_fine_in_one_process(tiny: Path) -> None:
    quant = Quant(quant_storage=torch.uint8)
    with surgery.qlora(tiny, quant=quant, lora=lora(), report=surgery.Report()) as model:
        logits = model(input_ids=torch.arange(8).view(1, 8)).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (["nowhere", "neither"], "'neither', 'nowhere' matches no module of LlamaForCausalLM.*q_proj"),
        (r".*\.nowhere", "nowhere' matches no module"),
    ],
)
def test_target_modules_that_match_nothing(tiny: Path, reads: list[str], target: Any, says: str) -> None:
    with pytest.raises(SelectorError, match=says):
        surgery.qlora(tiny, lora=lora(target_modules=target), report=surgery.Report())
    assert reads == []
    assert patches.active() == []


@pytest.mark.parametrize("patterns", [("nowhere",), ("^lm_head$", "nowhere")])
def test_skip_modules_that_match_nothing(tiny: Path, reads: list[str], patterns: tuple[str, ...]) -> None:
    with pytest.raises(SelectorError, match="skip_modules: 'nowhere' matches no module") as caught:
        surgery.qlora(tiny, quant=Quant(skip_modules=patterns), report=surgery.Report())
    assert caught.value.patterns == ("nowhere",)
    assert reads == []


def test_skipping_everything(tiny: Path, reads: list[str]) -> None:
    with pytest.raises(SelectorError, match="no linear module to quantize"):
        surgery.qlora(tiny, quant=Quant(skip_modules=("proj",)), report=surgery.Report())
    assert reads == []


def test_weight_that_storage_cannot_hold(tmp_path: Path, reads: list[str]) -> None:
    from safetensors.torch import save_file

    weight = torch.zeros(3, 3)
    save_file({"0.weight": weight, "0.bias": weight[0].clone()}, tmp_path / "model.safetensors")

    def model() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(3, 3))

    with pytest.raises(PassError, match=r"shape \(3, 3\) packs into 5 bytes, which torch.float32 .*skip_modules"):
        surgery.qlora(tmp_path, model=model, dtype=torch.float32, report=surgery.Report())
    assert reads == []
