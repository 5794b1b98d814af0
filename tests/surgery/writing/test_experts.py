"""Experts in 4 bits on disk: quantized, loaded, dequantized, exported and merged, equal bit for bit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed import is_initialized
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import surgery
from surgery.checkpoint import Checkpoint
from surgery.cli import app
from surgery.config import FSDP2, Quant
from surgery.errors import CheckpointError, ConfigError
from surgery.passes import loading
from surgery.quantizers.stack import as_bytes
from surgery.writing import export_plan, merge_plan, merging
from surgery.writing.live import Tensors
from tests.helpers.damage import edit_tensors
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

MOE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},  # under other names upstream
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},  # transposed, fused upstream too
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 320,  # statistics of an expert in one block and a half
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
}
QUANTS = {
    "mixtral": Quant(),
    "qwen3_moe": Quant("fp4", double_quant=False),
    "gpt_oss": Quant(double_quant=False, blocksize=128),
    "deepseek_v3": Quant(),
}
STACK = "model.layers.1.mlp.experts.down_proj"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for file in sorted(folder.glob("*.safetensors")) for name, each in load_file(file).items()}


def require_same(one: Path, other: Path) -> None:
    """Require the same names, dtypes, shapes and bytes."""
    found, expected = tensors(one), tensors(other)
    assert found.keys() == expected.keys()
    for name, each in found.items():
        wanted = expected[name]
        assert (each.dtype, each.shape) == (wanted.dtype, wanted.shape), name
        assert torch.equal(as_bytes(each), as_bytes(wanted)), name


def loaded(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """The parameters of the model of a checkpoint."""
    with surgery.qlora(folder, **options) as model:
        return {name: each.detach() for name, each in model.named_parameters()}


def require_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Require the same bytes, in whatever dtype packed ones are stored."""
    assert found.keys() == expected.keys()
    for name, each in found.items():
        assert torch.equal(as_bytes(each.data), as_bytes(expected[name].data)), name


def require_quantized(folder: Path, dequantized: Path, source: Path, quant: Quant) -> None:
    """Require of each expert in `folder` what bitsandbytes makes of it, and in `dequantized` its values."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    made = tensors(folder)
    before, after = (loaded(each, quant=None) for each in (source, dequantized))
    stacks = [name for name, packed in Checkpoint.open(folder).packed.items() if packed.settings.is_stack]
    assert len(stacks) in (2, 4)
    for name in stacks:
        whole = before[name]
        states = []
        for number, expert in enumerate(whole):
            packed, state = quantize_4bit(
                expert.contiguous(),
                blocksize=quant.blocksize,
                quant_type=quant.quant_type,
                compress_statistics=quant.double_quant,
            )
            states.append(state)
            assert torch.equal(made[name].view(len(whole), -1)[number], packed.view(-1))
            state.shape = torch.Size((expert.numel(),))  # flat, which no kernel misreads
            values = dequantize_4bit(packed, state).view_as(expert)
            assert torch.equal(after[name][number], values)
        assert torch.equal(made[f"{name}.absmax"], torch.cat([state.absmax for state in states]))
        if quant.double_quant:
            assert torch.equal(made[f"{name}.nested_absmax"], torch.cat([state.state2.absmax for state in states]))
            assert torch.equal(made[f"{name}.nested_offset"], torch.stack([state.offset for state in states]))


def save_adapter(source: Path, folder: Path, merged: Path) -> None:
    """An adapter on experts as PEFT saves it, and the model with it merged as PEFT does."""
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=8, target_modules=["o_proj"], target_parameters=parameters, task_type="CAUSAL_LM")
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16), config)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
            parameter.data = parameter.data.bfloat16().float()  # in whatever dtype it is loaded
    peft.save_pretrained(folder)
    peft.merge_and_unload().save_pretrained(merged)


@pytest.mark.parametrize("family", MOE)
def test_experts_are_written_as_they_are_in_memory(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quant = QUANTS[family]
    source = save_tiny(tmp_path / "source", family, **MOE[family])
    packed = surgery.quantize(source, tmp_path / "packed", quant=quant, verify=True)
    back = surgery.dequantize(packed, tmp_path / "back", verify=True)
    before = {name: (each.dtype, each.shape) for name, each in tensors(source).items()}
    assert {name: (each.dtype, each.shape) for name, each in tensors(back).items()} == before
    require_quantized(packed, back, source, quant)

    require_alike(loaded(packed), loaded(source, quant=quant))
    require_alike(loaded(packed, quant=None), loaded(back, quant=None))
    monkeypatch.setattr(export_plan, "RUN", 1)  # two experts at a time
    with surgery.qlora(packed) as model:
        require_same(surgery.export(model, tmp_path / "base", merged=False), packed)
        require_same(surgery.export(model, tmp_path / "base-16", merged=False, dtype=torch.bfloat16), back)
    plain = surgery.qlora(source, quant=None)
    require_same(surgery.export(plain, tmp_path / "made", merged=False, dtype=quant), packed)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_adapters_are_merged_into_experts_as_peft_does(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into 16 bits and into packed ones, by runs of experts; to 16 bits, and packed again."""
    monkeypatch.setattr(merging, "CHUNK", 1)
    monkeypatch.setattr(export_plan, "RUN", 1)
    quant, adapter = QUANTS[family], tmp_path / "adapter"
    source = save_tiny(tmp_path / "source", family, **MOE[family])
    save_adapter(source, adapter, tmp_path / "by-peft")
    surgery.merge(source, adapter, tmp_path / "merged")
    require_same(tmp_path / "merged", tmp_path / "by-peft")
    surgery.merge(source, adapter, tmp_path / "merged-4bit", quant=quant)
    require_same(tmp_path / "merged-4bit", surgery.quantize(tmp_path / "merged", tmp_path / "packed", quant=quant))

    base = surgery.quantize(source, tmp_path / "base", quant=quant)
    surgery.merge(base, adapter, tmp_path / "of-packed")
    surgery.merge(surgery.dequantize(base, tmp_path / "base-16"), adapter, tmp_path / "of-16")
    require_same(tmp_path / "of-packed", tmp_path / "of-16")
    surgery.merge(base, adapter, tmp_path / "packed-again", quant=quant)
    found, expected = tensors(tmp_path / "packed-again"), tensors(base)
    changed = {name for name, each in expected.items() if not torch.equal(each, found[name])}
    assert {name for name in changed if name.endswith("proj")} >= {STACK, STACK.replace("down", "gate_up")}
    again = surgery.quantize(tmp_path / "of-packed", tmp_path / "again", quant=quant)
    assert all(torch.equal(tensors(again)[name], found[name]) for name in changed)

    for storage in (torch.bfloat16, torch.uint8, torch.float32):
        with surgery.qlora(base, adapter=adapter, quant=Quant(quant_storage=storage)) as model:
            out = tmp_path / f"in-{storage.itemsize}"
            require_same(surgery.export(model, out / "exported"), tmp_path / "of-packed")
            require_same(surgery.export(model, out / "exported-4bit", dtype=quant), tmp_path / "packed-again")


def test_what_was_cast_is_not_exported(tmp_path: Path) -> None:
    with surgery.qlora(save_tiny(tmp_path / "source", "mixtral", **MOE["mixtral"])) as model:
        layer: Any = model.get_submodule("model.layers.0")
        for part in (layer.self_attn.q_proj, layer.mlp.experts):
            part.to(torch.float16)
            with pytest.raises(ConfigError, match=r"in torch\.bfloat16, found it cast to torch\.float16"):
                surgery.export(model, tmp_path / "exported")
            part.to(torch.bfloat16)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor of numbers that this thread computes or views."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        # What is empty, and on meta soon, has no pages.
        for each in [] if function is torch.ops.aten.empty.memory_format else torch.utils._pytree.tree_leaves(made):
            if isinstance(each, torch.Tensor) and not each.is_meta and each.is_floating_point():
                self.elements = max(self.elements, each.numel())
        return made


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_no_stack_of_experts_is_ever_whole(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "CHUNK", 1)
    monkeypatch.setattr(export_plan, "RUN", 1)
    monkeypatch.setattr(merge_plan, "ROOM", 1 << 16)
    monkeypatch.setattr(merge_plan, "UNPACKED", 1 << 14)
    monkeypatch.setitem(loading.CHUNK_ELEMENTS, "cpu", 1 << 14)
    adapter, experts = tmp_path / "adapter", 40
    source = save_tiny(tmp_path / "source", family, **{**MOE[family], "num_local_experts": experts})
    save_adapter(source, adapter, tmp_path / "by-peft")
    packed = surgery.quantize(source, tmp_path / "packed")
    stack = experts * 112 * 64  # of `down_proj`, the smaller one
    with Largest() as largest:
        surgery.dequantize(packed, tmp_path / "back")
    assert 0 < largest.elements < stack / 10
    with surgery.qlora(packed, adapter=adapter) as model, Largest() as largest:
        surgery.merge(source, adapter, tmp_path / "merged")
        surgery.merge(packed, adapter, tmp_path / "merged-4bit", quant=Quant())
        surgery.export(model, tmp_path / "exported")
        surgery.export(model, tmp_path / "exported-4bit", dtype="nf4")
    assert 0 < largest.elements < stack


def export_merged(folder: Path, out: Path) -> list[int]:
    """Export the model of `source` with `adapter`, both in `folder`; how often each whole tensor was gathered here."""
    gathered: Counter[Any] = Counter()
    stock = Tensors.gather

    def gather(self: Tensors, held: Any, rank: int, wanted: range | None = None) -> torch.Tensor | None:
        gathered[held] += wanted is None and rank == self.ranks.rank
        return stock(self, held, rank, wanted)

    model = surgery.qlora(folder / "source", adapter=folder / "adapter", shard=FSDP2() if is_initialized() else None)
    with model, pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_plan, "RUN", 1)
        patch.setattr(Tensors, "gather", gather)
        surgery.export(model, out)
    return list(gathered.values())


def test_factors_are_gathered_once_for_all_runs_of_a_stack(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "mixtral", **{**MOE["mixtral"], "num_local_experts": 8})
    save_adapter(source, tmp_path / "adapter", tmp_path / "by-peft")
    of_one = export_merged(tmp_path, tmp_path / "1")
    assert max(of_one) == 1, "of four runs of each stack"
    for of_rank in run_ranks(export_merged, 2, tmp_path, tmp_path / "2"):
        assert max(of_rank) == 1
    require_same(tmp_path / "2", tmp_path / "1")


def write_all(folder: Path, out: Path) -> None:
    """Whatever is written of the checkpoint `source` and of `adapter`, both in `folder`."""
    source, adapter = folder / "source", folder / "adapter"
    packed = surgery.quantize(source, out / "packed")
    surgery.dequantize(packed, out / "back")
    surgery.merge(packed, adapter, out / "merged")
    surgery.merge(source, adapter, out / "merged-4bit", quant=Quant())


def test_two_ranks_write_the_same_files(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "qwen3_moe", **MOE["qwen3_moe"])
    save_adapter(source, tmp_path / "adapter", tmp_path / "by-peft")
    write_all(tmp_path, tmp_path / "1")
    run_ranks(write_all, 2, tmp_path, tmp_path / "2")
    for one in sorted((tmp_path / "1").rglob("*.*")):
        assert one.read_bytes() == (tmp_path / "2" / one.relative_to(tmp_path / "1")).read_bytes(), one


def invoke(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    return done.exit_code, done.output


def stacks(folder: Path) -> int:
    return sum(packed.settings.is_stack for packed in Checkpoint.open(folder).packed.values())


def test_experts_stay_in_16_bits_where_that_is_asked_for_or_said(tmp_path: Path) -> None:
    """`--experts 16bit` of each command; and blocks that would straddle experts, whose weights are named."""
    source = save_tiny(tmp_path / "source", "qwen3_moe", **MOE["qwen3_moe"])
    other = save_tiny(tmp_path / "other", "qwen3_moe", **{**MOE["qwen3_moe"], "num_experts": 3})
    llama = {"num_local_experts": 2, "intermediate_size_mlp": 48, "layer_types": ["full_attention"] * 2}
    save_tiny(tmp_path / "llama", "llama4_text", **llama)
    adapter = tmp_path / "adapter"
    save_adapter(source, adapter, tmp_path / "by-peft")
    of_16, of_4, out = tmp_path / "of-16", tmp_path / "of-4", tmp_path / "out"
    assert invoke("quantize", source, of_16, "--experts", "16bit")[0] == 0
    assert invoke("quantize", source, of_4)[0] == 0
    assert (stacks(of_16), stacks(of_4)) == (0, 4)
    for base in (source, of_16, of_4):
        for experts, expected in (("16bit", 0), ("4bit", 4)):
            merged = tmp_path / f"{base.name}-{experts}"
            code, said = invoke("merge", base, adapter, merged, "--dtype", "nf4", "--experts", experts)
            assert (code, stacks(merged)) == (0, expected), said
    AutoModelForCausalLM.from_pretrained(tmp_path / "of-4-16bit", device_map="cpu")

    code, said = invoke("quantize", source, tmp_path / "wide", "--blocksize", "2048")
    assert (code, stacks(tmp_path / "wide")) == (0, 2)
    assert "2 fused weights of experts stay in 16 bits" in " ".join(said.split())
    assert "model.layers.*.mlp.experts.down_proj" in said
    for arguments, says in (
        (("quantize", tmp_path / "llama", out), "Llama4TextExperts holds its experts as parameters"),
        (("quantize", source, out, "--skip-modules", "experts.down_proj"), "no module, and modules alone count"),
        (("quantize", of_4, out), "expected weights in 16 or 32 bits"),
        (("merge", other, adapter, out), "does not fit this model"),
        (("merge", of_4, adapter, out, "--dtype", "fp4"), "is packed already, with 'nf4'"),
    ):
        code, said = invoke(*arguments)
        assert (code, out.exists()) == (2, False), said
        assert says in " ".join(said.split())


def test_who_reads_packed_experts(tmp_path: Path) -> None:
    """Stock transformers refuses them; low_memory() keeps them; those of upstream's checkpoints are quantized."""
    source = save_tiny(tmp_path / "source", "qwen3_moe", **MOE["qwen3_moe"])
    packed = surgery.quantize(source, tmp_path / "packed")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(packed, device_map="cpu")
    expected = loaded(source)
    with surgery.low_memory():
        bound = AutoModelForCausalLM.from_pretrained(packed, device_map="cpu")
    with surgery.fill(bound) as model:
        require_alike(dict(model.named_parameters()), expected)
    for _ in range(2):
        require_alike(loaded(source, packed_cache=tmp_path / "cache"), expected)

    upstream = surgery.quantize(source, tmp_path / "upstream", quant=Quant(experts=False))  # as transformers writes it
    require_alike(loaded(upstream), expected)
    plain = loaded(upstream, quant=Quant(experts=False))
    skipped = loaded(source, quant=Quant(skip_modules=("experts",)), packed_cache=tmp_path / "cache")
    assert plain[STACK].shape == skipped[STACK].shape == (4, 64, 48)
    with pytest.raises(ConfigError, match="experts='fp4', and the checkpoint has them packed already, as nf4"):
        surgery.qlora(packed, quant=Quant(experts="fp4"))
    with pytest.raises(ConfigError, match="one kind of packed weights, found experts='fp4' beside 'nf4'"):
        surgery.quantize(source, tmp_path / "out", quant=Quant(experts="fp4"))


def cut(end: str, size: int = 1) -> Callable[[dict[str, torch.Tensor]], Any]:
    """Take elements away from a tensor of a stack."""
    return lambda found: found.update({f"{STACK}{end}": found[f"{STACK}{end}"][:-size].clone()})


def reset(**changes: Any) -> Callable[[dict[str, torch.Tensor]], Any]:
    """Change settings of a stack."""

    def change(found: dict[str, torch.Tensor]) -> None:
        name = f"{STACK}.quant_state.bitsandbytes__nf4"
        text = json.dumps({**json.loads(bytes(found[name].tolist())), **changes})
        found[name] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda found: found.pop(f"{STACK}.absmax"), r"down_proj\.absmax is missing"),
        (
            lambda found: found.pop(f"{STACK}.nested_offset"),
            r"down_proj\.nested_offset, of the means of experts, is mis",
        ),
        (cut(".nested_offset"), r"expected .*nested_offset to have 4 elements of float32.*found 3"),
        (cut(".nested_absmax"), r"expected .*nested_absmax to have 4 elements"),
        (cut(".absmax"), r"expected .*absmax to have 192 elements of uint8"),
        (cut("", 64), r"expected .*down_proj to have 6,144 elements"),
        (reset(shape=[3, 64, 48]), r"expected .*down_proj to have 4,608 elements"),
        (reset(shape=[192, 64]), "nested_offset to be a number that is finite in float32, found None"),
        (reset(shape=[4, 3, 1024], blocksize=4096), r"expected experts of whole blocks of 4096"),
        (reset(nested_offset=0.5), "nested_offset of a whole stack of experts"),
    ],
)
def test_damaged_experts_are_refused_before_anything_is_read(damage: Any, says: str, tmp_path: Path) -> None:
    edit_tensors(save_packed(tmp_path), damage)
    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open(tmp_path / "packed")


def save_packed(folder: Path) -> Path:
    """A tiny Qwen3-MoE with all packed."""
    source = save_tiny(folder / "source", "qwen3_moe", **MOE["qwen3_moe"])
    return surgery.quantize(source, folder / "packed")
