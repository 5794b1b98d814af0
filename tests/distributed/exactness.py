"""What a rank does in the exactness tests, and the stock single-process model that it is compared with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from surgery.config import DDP, FSDP1, FSDP2, Placement
from tests.helpers.lookup import look_up, require_looked_up
from tests.helpers.whole_blocks import right_kernels

STEPS = 2
GLOBAL_BATCH = 12
LENGTH = 16
LEARNING_RATE = 0.01
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One variation. `quant` and `shard` are arguments of `surgery.Quant` and of `kind`.

    placement: None is that sharding's own. accumulation: micro-batches that a rank makes of its part of a batch.
    stored: whether the checkpoint is packed already.
    """

    name: str
    model: str = "llama"
    quant: dict[str, Any] = field(default_factory=dict)
    kind: type[DDP | FSDP1 | FSDP2] = FSDP1
    shard: dict[str, Any] = field(default_factory=dict)
    checkpointing: str | None = None
    placement: Placement | None = None
    accumulation: int = 1
    stored: bool = False

    @property
    def folder(self) -> str:
        """The name of its checkpoint."""
        return self.base if self.stored else self.model

    @property
    def base(self) -> str:
        """What decides the stock model's result: cases of the same base have the same."""
        return f"{self.model} {sorted(self.quant.items())}"


@dataclass
class Result:
    """What is compared: losses and adapter gradients by step, and every 4-bit weight as forward sees it."""

    losses: list[float]
    gradients: list[dict[str, torch.Tensor]]
    packed: dict[str, torch.Tensor]
    quant_states: dict[str, dict[str, Any]]


def lora() -> Any:
    """Adapters on every linear layer; B is random too, so that A has a gradient from the first step on."""
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)


def batch(step: int) -> torch.Tensor:
    """Token ids of the global batch, `(GLOBAL_BATCH, LENGTH)`."""
    return torch.randint(3, 96, (GLOBAL_BATCH, LENGTH), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss, float32."""
    logits = model(input_ids=ids).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def stock(checkpoint: Path, case: Case, device: torch.device = CPU, *, by_table: bool = False) -> Any:
    """The same model made by upstream alone: transformers loads, bitsandbytes quantizes, PEFT adapts. No patch.

    by_table: with plain linear layers, whose weights are looked up in the table of codes, so that no kernel of
    bitsandbytes multiplies or dequantizes.
    """
    from peft import get_peft_model

    model = quantized(checkpoint, case, device, by_table=by_table)
    torch.manual_seed(0)
    return get_peft_model(model.train(), lora(), autocast_adapter_dtype=False)


def quantized(checkpoint: Path, case: Case, device: torch.device = CPU, *, by_table: bool = False) -> Any:
    """The base model of `stock`."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.to(device)
    storage = case.quant.get("quant_storage", torch.float32)
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name == "lm_head":
            continue
        new: Any = Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=torch.float32,
            compress_statistics=case.quant.get("double_quant", True),
            quant_type=case.quant.get("quant_type", "nf4"),
            quant_storage=storage,
        )
        new.weight = Params4bit(
            module.weight.data,
            False,
            blocksize=case.quant.get("blocksize", 64),
            quant_storage=storage,
            module=new,
            quant_type=new.weight.quant_type,
            compress_statistics=new.weight.compress_statistics,
        )
        if module.bias is not None:
            bias_dtype = storage if storage.is_floating_point else module.bias.dtype
            new.bias = nn.Parameter(module.bias.data.to(bias_dtype), requires_grad=False)
        new = new.to(device)
        model.set_submodule(name, _looked_up(new, module.weight) if by_table else new)
    model.is_loaded_in_4bit = True
    return model


def save_packed(model: nn.Module, folder: Path, config: Path) -> None:
    """Save a quantized `model` as bitsandbytes has its modules save themselves, bytes as bytes."""
    from safetensors.torch import save_file

    folder.mkdir()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    packed = [name.removesuffix(".absmax") for name in state if name.endswith("weight.absmax")]
    state |= {name: state[name].view(torch.uint8) for name in packed if state[name].dtype == torch.float32}
    if model.config.tie_word_embeddings:  # type: ignore[union-attr]  # of transformers
        del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes(config.read_bytes())


def _looked_up(layer: Any, weight: torch.Tensor) -> nn.Module:
    """A plain layer in place of a 4-bit one that was made of `weight`."""
    table = look_up(layer.weight, layer.weight.quant_state)
    require_looked_up(table, layer.weight, layer.weight.quant_state, weight)
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
    plain.weight = nn.Parameter(table.to(layer.weight.device), requires_grad=False)
    bias = None if layer.bias is None else nn.Parameter(layer.bias.data.float(), requires_grad=False)
    plain.register_parameter("bias", bias)
    return plain


def ours(checkpoint: Path, case: Case, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Any:
    """The model of this project, on this rank; a context manager that releases it."""
    import surgery

    torch.manual_seed(0)
    model = surgery.qlora(
        checkpoint,
        quant=surgery.Quant(**case.quant),
        lora=lora(),
        placement=case.placement,
        shard=case.kind(**case.shard) if dist.is_initialized() else None,
        dtype=dtype,
        device=device,
        report=surgery.Report(),
    )
    if case.checkpointing:
        surgery.checkpoint_activations(model, reentrant=case.checkpointing == "reentrant")
    return model


@right_kernels()
def train(model: nn.Module, device: torch.device = CPU, *, accumulation: int = 1) -> Result:
    """Steps of SGD on this rank's part of every global batch; the result is on the CPU."""
    from bitsandbytes.nn import Linear4bit

    layers: dict[str, Any] = {_plain(name): m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda m, _, name=name: seen.__setitem__(name, m.weight.detach().clone()))
        for name, layer in layers.items()
    ]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    losses, gradients = [], []
    for step in range(STEPS):
        losses.append(_mean(_accumulate(model, step, accumulation, device)))
        gradients.append({name: grad.cpu() for name, grad in adapter_gradients(model, device).items()})
        optimizer.step()
        optimizer.zero_grad()
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        _require_table(seen[name], layer.quant_state, name)
    states = {name: _on_cpu(layer.quant_state.as_dict()) for name, layer in layers.items()}
    packed = {name: _bytes(weight) for name, weight in seen.items()}
    return Result(losses=losses, gradients=gradients, packed=packed, quant_states=states)


def _require_table(packed: torch.Tensor, quant_state: Any, name: str) -> None:
    """bitsandbytes, by the function that backward and PEFT call, gives what is looked up in the table."""
    from bitsandbytes import functional

    found = functional.dequantize_4bit(packed, quant_state).cpu()
    torch.testing.assert_close(found, look_up(packed, quant_state).to(found.dtype), msg=f"values of {name}")


def _accumulate(model: nn.Module, step: int, micro_batches: int, device: torch.device) -> torch.Tensor:
    """The gradients of this rank's part of the batch, and its mean loss."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parts = batch(step).chunk(world)[rank].to(device).chunk(micro_batches)
    total = torch.zeros((), device=device)
    for number, ids in enumerate(parts, start=1):
        with _exchanging(model, is_last=number == len(parts)):
            loss = loss_of(model, ids) / len(parts)
            loss.backward()  # type: ignore[no-untyped-call]  # no annotation upstream
        total += loss.detach()
    return total


def _exchanging(model: Any, *, is_last: bool) -> AbstractContextManager[object]:
    """A block for a micro-batch, after the last of which gradients are exchanged, by what each sharding offers."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
        return nullcontext()
    return model.no_sync() if hasattr(model, "no_sync") and not is_last else nullcontext()


def _mean(value: torch.Tensor) -> float:
    """Over the ranks."""
    if not dist.is_initialized():
        return value.item()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def adapter_gradients(model: nn.Module, device: torch.device = CPU) -> dict[str, torch.Tensor]:
    """Whole gradients of all adapter parameters, by plain name, gathered from the shards through `device`."""
    units = [m for m in model.modules() if isinstance(m, FullyShardedDataParallel) and m._handle is not None]
    if not units:
        return {_plain(n): _whole(p.grad, device) for n, p in model.named_parameters() if p.grad is not None}
    found: dict[str, torch.Tensor] = {}
    for prefix, unit in model.named_modules():
        if unit in units:
            found.update(_unit_gradients(prefix, unit, device))
    return found


def _whole(gradient: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy; FSDP2's shards may be on the CPU, and meet on `device`."""
    if not isinstance(gradient, DTensor):
        return gradient.clone()
    moved: Any = gradient.to(device)
    whole: torch.Tensor = moved.full_tensor()
    return whole


def _unit_gradients(prefix: str, unit: Any, device: torch.device) -> dict[str, torch.Tensor]:
    flat, handle = unit._handle.flat_param, unit._handle
    grad = handle.sharded_grad if handle.uses_sharded_strategy else flat.grad
    if handle._use_orig_params and handle.uses_sharded_strategy:
        grad = getattr(flat, "_saved_grad_shard", None) if flat.grad is None else flat.grad
    if grad is None or not flat.requires_grad:
        return {}
    if handle.uses_sharded_strategy:
        grad = grad.to(device)
        pieces = [torch.empty_like(grad) for _ in range(handle.process_group.size())]
        dist.all_gather(pieces, grad.contiguous(), group=handle.process_group)
        grad = torch.cat(pieces)
    infos = list(zip(flat._param_infos, flat._shapes, flat._numels, strict=False))
    found, start, position = {}, 0, 0
    for numel, is_padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
        if not is_padding:
            (info, shape, _), position = infos[position], position + 1
            if "lora_" in f"{prefix}.{info.module_name}":
                name = _plain(f"{prefix}.{info.module_name}.{info.param_name}")
                found[name] = grad[start : start + numel].view(shape).clone()
        start += numel
    return found


def _plain(name: str) -> str:
    from surgery.model.fqn import clean

    return ".".join(part for part in clean(name).split(".") if part).removeprefix("module.")  # of DDP


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8).cpu()


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in state.items()}


def run_cases(checkpoints: dict[str, Path], cases: list[Case], device: torch.device = CPU) -> dict[str, Result]:
    """Every case on this rank, in one process: results by name."""
    results = {}
    for case in cases:
        with ours(checkpoints[case.folder], case, device) as model:
            results[case.name] = train(model, device, accumulation=case.accumulation)
    return results


def require_equal(found: Result, expected: Result) -> None:
    """Bits of the base model exactly; losses and gradients within 1e-5 relative. Raises `AssertionError`."""
    assert found.packed.keys() == expected.packed.keys()
    assert len(found.packed) == 14, f"{len(found.packed)} quantized layers"
    for name, packed in expected.packed.items():
        assert torch.equal(found.packed[name], packed), f"packed bytes of {name}"
        _require_same_state(found.quant_states[name], expected.quant_states[name], name)
    require_same_training(found, expected)


def require_same_training(found: Result, expected: Result) -> None:
    """Losses and gradients within 1e-5 relative. Raises `AssertionError`."""
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(expected.losses), rtol=1e-5, atol=0)
    assert expected.losses[-1] != expected.losses[0], "nothing was learned"
    for got, wanted in zip(found.gradients, expected.gradients, strict=True):
        assert got.keys() == wanted.keys()
        assert len(got) == 28, f"{len(got)} gradients"
        for name, gradient in wanted.items():
            error = (got[name] - gradient).norm() / gradient.norm()
            assert error < 1e-5, f"gradient of {name}: relative error {error:.2e}"


def _require_same_state(found: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    assert found.keys() == expected.keys(), f"keys of the quant_state of {name}"
    for key, value in expected.items():
        same = torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
        assert same, f"{key} of {name}"
