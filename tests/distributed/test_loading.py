"""However many ranks load a model, in whatever placement: the bits of quantizing each tensor whole, read once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import save_file
from torch import nn

from surgery.checkpoint import Checkpoint
from surgery.config import FSDP1, FSDP2, Quant
from surgery.quantizers.base import STATISTICS
from tests.distributed.loads import Job, Loaded, Setup, load, load_all
from tests.helpers.damage import edit_tensors
from tests.helpers.experts import packed_stack
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed

#: Dimensions that neither two nor three ranks divide, and weights that end within a block.
ODD: dict[str, Any] = {"hidden_size": 56, "intermediate_size": 102, "head_dim": 14, "vocab_size": 97}

SHARDED = Setup(placement="sharded", shard=FSDP2())
WAYS = {
    "sharded": SHARDED,
    "rank0-cpu": Setup(placement="rank0-cpu", shard=FSDP1()),
    "replicated-fsdp1": Setup(placement="replicated", shard=FSDP1()),
    "replicated-fsdp2": Setup(placement="replicated", shard=FSDP2()),
    "replicated": Setup(placement="replicated", shard=None),
}

#: Models of which a checkpoint tensor is no range of a parameter: transposed in it.
CONVERTED = {"gpt2": ("c_attn.weight", "c_proj.weight", "c_fc.weight")}


class Plain(nn.Module):
    """No model of transformers: weights smaller than a block and than the ranks are many, and buffers of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 8)) for _ in range(2))
        self.smallest = nn.Linear(1, 4, bias=False)
        self.out = nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("shift", torch.tensor(0.5))
        self.register_buffer("counts", torch.arange(5))
        self.register_buffer("mask", torch.tensor([[True, False, True]]))
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("table", torch.arange(8.0), persistent=False)


class Shared(Plain):
    """A layer of a block, used outside of it too."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.layers[0][0]


def save_plain(folder: Path) -> Path:
    """A checkpoint of `Plain`, of other values than it is made with."""
    torch.manual_seed(0)
    state = {name: tensor.clone() for name, tensor in Plain().state_dict().items()}
    state |= {"steps": torch.tensor(11), "shift": torch.tensor(-2.0), "counts": torch.arange(5, 10)}
    state |= {"mask": torch.tensor([[False, True, True]]), "gain": torch.tensor([3.0])}
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    return folder


def save_twice(folder: Path, *, differing: bool = False) -> Path:
    """A tied llama whose checkpoint holds the tied tensor under both names."""
    save_tiny(folder, tie_word_embeddings=True)

    def repeat(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][-1, -1] += differing

    edit_tensors(folder, repeat)
    return folder


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    root = tmp_path_factory.mktemp("models")
    fp4 = Quant("fp4", blocksize=128, double_quant=False, quant_storage=torch.bfloat16)
    gpt2 = {"n_embd": 56, "n_layer": 2, "n_head": 4}
    # 9,216 values an expert, of which a share ends within one.
    mixtral = save_tiny(root / "mixtral", "mixtral", num_local_experts=3, intermediate_size=48)
    return {
        "llama": Job(folder=save_tiny(root / "llama"), dtype=torch.bfloat16),
        "odd": Job(folder=save_tiny(root / "odd", dtype=torch.float32, **ODD), dtype=torch.bfloat16),
        "biased": Job(folder=save_tiny(root / "biased", "qwen2", dtype=torch.float16), dtype=torch.float32, quant=fp4),
        "tied": Job(folder=save_tiny(root / "tied", tie_word_embeddings=True), dtype=torch.bfloat16),
        "twice": Job(folder=save_twice(root / "twice"), dtype=torch.float16),
        "untied": Job(folder=save_twice(root / "untied", differing=True), dtype=torch.bfloat16),
        "gpt2": Job(folder=save_tiny(root / "gpt2", "gpt2", dtype=torch.float32, **gpt2), dtype=torch.float32),
        "mixtral": Job(folder=mixtral, dtype=torch.bfloat16, quant=Quant(experts=False)),
        "experts": Job(folder=mixtral, dtype=torch.bfloat16),
        "plain": Job(folder=save_plain(root / "plain"), dtype=torch.bfloat16, build=Plain),
    }


@pytest.fixture(scope="module")
def expected(jobs: dict[str, Job]) -> dict[str, Loaded]:
    """What upstream makes of the same checkpoints, each tensor quantized whole, in one process."""
    return {name: stock(job) for name, job in jobs.items()}


def stock(job: Job) -> Loaded:
    model = _stock_model(job)
    tensors = {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in {"Linear", "Conv1D"} and module is not head
    }
    found = Loaded(packed={}, states={}, plain=tensors, ranges={}, bytes_read={}, threads=[])
    for name, module in linears.items():
        weight = tensors.pop(f"{name}.weight")
        logical = weight.t().contiguous() if type(module).__name__ == "Conv1D" else weight
        found.packed[name], found.states[name] = _quantized(logical, job)
        storage = job.quant.storage_for(job.dtype)
        if f"{name}.bias" in tensors and storage.is_floating_point:
            tensors[f"{name}.bias"] = tensors[f"{name}.bias"].to(storage)
    if job.quant.experts:
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            options = {field: getattr(job.quant, field) for field in ("quant_type", "blocksize", "double_quant")}
            _, packed, statistics = packed_stack(tensors[name], **options)
            storage = job.quant.storage_for(job.dtype)
            tensors[name], tensors[name + STATISTICS] = (t.view(storage).view(-1, 1) for t in (packed, statistics))
    return found


def _stock_model(job: Job) -> nn.Module:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    if job.build is None:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(job.folder, dtype=job.dtype)
        return model
    plain = job.build()
    plain.load_state_dict(load_file(job.folder / "model.safetensors"), strict=False)
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(job.dtype)
    return plain


def _quantized(weight: torch.Tensor, job: Job) -> tuple[torch.Tensor, dict[str, Any]]:
    packed, state = quantize_4bit(
        weight,
        blocksize=job.quant.blocksize,
        compress_statistics=job.quant.double_quant,
        quant_type=job.quant.quant_type,
        quant_storage=job.quant.storage_for(job.dtype),
    )
    return packed.reshape(-1).view(torch.uint8), state.as_dict()


def require_same(found: Loaded, expected: Loaded) -> None:
    assert found.packed.keys() == expected.packed.keys()
    for name, packed in expected.packed.items():
        assert torch.equal(found.packed[name], packed), f"packed bytes of {name}"
        require_same_state(found.states[name], expected.states[name], name)
    assert found.plain.keys() == expected.plain.keys()
    for name, tensor in expected.plain.items():
        assert found.plain[name].dtype == tensor.dtype, name
        # Bytes, since those of packed experts are no numbers.
        assert found.plain[name].shape == tensor.shape, name
        assert torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (found.plain[name], tensor))), name
    assert found.threads == []


def require_same_state(found: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    assert found.keys() == expected.keys(), f"keys of the quant_state of {name}"
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype, f"{key} of {name}"
            assert torch.equal(found[key], value), f"{key} of {name}"
        else:
            assert found[key] == value, f"{key} of {name}"


def require_read_once(by_rank: list[Loaded], job: Job, *, converted: tuple[str, ...] = (), nodes: int = 1) -> None:
    """Every element of every tensor is read, by one rank, apart from what rounding out to blocks adds.

    Tensors whose name has one of `converted` in it are read whole, by one rank of each node.
    """
    index = Checkpoint.open(job.folder).index
    for name, entry in index.items():
        ranges = [each for loaded in by_rank for each in loaded.ranges.get(name, [])]
        total = sum(loaded.bytes_read.get(name, 0) for loaded in by_rank)
        assert total == sum(stop - start for start, stop in ranges) * entry.dtype.itemsize, name
        if any(part in name for part in converted):
            assert ranges == [(0, entry.numel)] * nodes, name
            continue
        assert covered(ranges) == set(range(entry.numel)), name
        is_quantized = name.removesuffix(".weight") in by_rank[0].packed or ".experts." in name
        beyond = 2 * job.quant.blocksize * len(by_rank) * entry.dtype.itemsize if is_quantized else 0
        assert entry.nbytes <= total <= entry.nbytes + beyond, name


def covered(ranges: list[tuple[int, int]]) -> set[int]:
    return {element for start, stop in ranges for element in range(start, stop)}


def require_all(by_rank: list[dict[str, Loaded]], jobs: dict[str, Job], expected: dict[str, Loaded]) -> None:
    for name in jobs:
        for loaded in by_rank:
            require_same(loaded[name], expected[name])


#: Four ranks are below, in meshes and on two nodes.
@pytest.mark.parametrize(
    ("world_size", "way"), [(2, way) for way in WAYS] + [(3, way) for way in ("sharded", "rank0-cpu", "replicated")]
)
def test_ranks_together_load_what_one_would_and_read_it_once(
    jobs: dict[str, Job], expected: dict[str, Loaded], way: str, world_size: int
) -> None:
    by_rank = run_ranks(load_all, world_size, jobs, WAYS[way])
    require_all(by_rank, jobs, expected)
    for name, job in jobs.items():
        require_read_once([loaded[name] for loaded in by_rank], job, converted=CONVERTED.get(name, ()))


@pytest.mark.parametrize("way", ["sharded", "rank0-cpu"])
def test_one_rank_with_a_group(jobs: dict[str, Job], expected: dict[str, Loaded], way: str) -> None:
    by_rank = run_ranks(load_all, 1, jobs, WAYS[way])
    require_all(by_rank, jobs, expected)


@pytest.mark.parametrize("placement", ["replicated", "rank0-cpu"])
def test_one_process_without_a_group(jobs: dict[str, Job], expected: dict[str, Loaded], placement: Any) -> None:
    for name, job in jobs.items():
        found = load(job, Setup(placement=placement, shard=None))
        require_same(found, expected[name])
        require_read_once([found], job, converted=CONVERTED.get(name, ()))
        assert sum(found.bytes_read.values()) == Checkpoint.open(job.folder).index.total_bytes


@pytest.mark.parametrize(("mesh", "placement"), [((2, 2), "sharded"), ((2, 2), "replicated"), ((4, 1), "sharded")])
def test_replicas_of_shards(
    jobs: dict[str, Job], expected: dict[str, Loaded], mesh: tuple[int, int], placement: Any
) -> None:
    by_rank = run_ranks(load_all, 4, jobs, Setup(placement=placement, shard=FSDP2(mesh=mesh)))
    require_all(by_rank, jobs, expected)
    for name, job in jobs.items():
        require_read_once([loaded[name] for loaded in by_rank], job, converted=CONVERTED.get(name, ()))


@pytest.mark.parametrize("way", ["sharded", "rank0-cpu", "replicated"])
def test_what_is_converted_is_read_once_on_each_node(
    jobs: dict[str, Job], expected: dict[str, Loaded], way: str
) -> None:
    chosen = {name: jobs[name] for name in ("llama", "experts", *CONVERTED)}
    by_rank = run_ranks(load_all, 4, chosen, replace(WAYS[way], local_world_size=2))
    require_all(by_rank, chosen, expected)
    for name, job in chosen.items():
        require_read_once([loaded[name] for loaded in by_rank], job, converted=CONVERTED.get(name, ()), nodes=2)


QUANTS = {
    "nf4-32-uint8": Quant(blocksize=32, quant_storage=torch.uint8),
    "nf4-4096-fp32": Quant(blocksize=4096, quant_storage=torch.float32),
    "fp4-64-fp16": Quant("fp4", quant_storage=torch.float16),
    "nf4-256-single-bf16": Quant(blocksize=256, double_quant=False, quant_storage=torch.bfloat16),
}


def test_formats_on_ranks_that_do_not_divide_the_rows(jobs: dict[str, Job]) -> None:
    variations = {
        f"{model}-{name}": replace(jobs[model], quant=quant, dtype=torch.float32)
        for model in ("odd", "plain")
        for name, quant in QUANTS.items()
        if model == "odd" or quant.quant_storage != torch.float32  # which the smallest weight does not fill
    }
    by_rank = run_ranks(load_all, 3, variations, SHARDED)
    require_all(by_rank, variations, {name: stock(job) for name, job in variations.items()})
    for name, job in variations.items():
        require_read_once([loaded[name] for loaded in by_rank], job)


def refusal(job: Job, setup: Setup) -> str:
    import patches
    import surgery

    try:
        load(job, setup)
    except surgery.SurgeryError as error:
        assert patches.active() == []
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was refused")


def test_a_layer_in_two_groups_is_refused_by_fsdp2(tmp_path: Path) -> None:
    job = Job(folder=save_plain(tmp_path / "model"), dtype=torch.bfloat16, build=Shared)
    for text in run_ranks(refusal, 2, job, SHARDED):
        assert "again.weight and layers.0.0.weight are one parameter, but are used in two groups of FSDP2" in text
