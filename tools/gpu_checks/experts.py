"""Experts in 4 bits on the devices of this job, against bitsandbytes, transformers and PEFT on dequantized weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import surgery
from checkpoints.experts import SHAPES
from checkpoints.folder import build, is_complete
from checkpoints.synthetic import SyntheticCheckpoint
from gpu_checks.findings import Findings, attempt
from gpu_checks.job import Job, Ranks
from surgery.quantizers.stack import stacks_of

__all__ = ["check_experts"]

FAMILIES = ("qwen3-moe-tiny", "glm4-moe-tiny")

#: A loss, and gradients by the names of adapters.
Stepped = tuple[float, dict[str, torch.Tensor]]

#: Relative error of a loss and of the gradient of an adapter, by norm, in float32. In bfloat16, where a token may go to
#: another expert, so many times that.
LOSS_ERROR, GRADIENT_ERROR = 1e-6, 1e-4
LOOSE = 5000


def check_experts(job: Job, ranks: Ranks, findings: Findings) -> None:
    """Compare two families, with double quantization and without; compiled blocks come last, as the most brittle."""
    if job.rank == 0:
        for shape in FAMILIES:
            _make(shape, job.work / shape)
    ranks.gather(None)
    checks: tuple[Callable[[Job, Path, bool], dict[str, Any]], ...] = (
        _bytes,
        _logits,
        _values,
        _checkpointed,
        _compiled,
    )
    for check, shape, double_quant in itertools.product(checks, FAMILIES, (True, False)):
        outcome = attempt(partial(check, job, job.work / shape, double_quant))
        name = f"{check.__name__[1:]} {shape}{' double' if double_quant else ''}"
        findings.add("experts", name, ranks.gather(outcome))


def _make(shape: str, folder: Path) -> None:
    # On the CPU: ranks on other types of device get the same values.
    checkpoint = SyntheticCheckpoint(shape=SHAPES[shape], device=torch.device("cpu"))
    if not is_complete(folder, checkpoint.recipe()):
        with build(folder, checkpoint.recipe(), force=True) as draft:
            list(checkpoint.write(draft, processes=1))


def _bytes(job: Job, folder: Path, double_quant: bool) -> dict[str, int]:
    """Compare packed bytes and statistics of every expert with `quantize_4bit` of its slice."""
    from bitsandbytes.functional import quantize_4bit

    model, stock = _ours(job, folder, double_quant), _stock(job, folder, double_quant)
    compared = 0
    for (name, packed), (_, weights) in zip(_experts(model), _experts(stock), strict=True):
        for parameter, stack in stacks_of(packed).items():
            raw = _whole(packed.get_parameter(parameter)).view(torch.uint8).view(stack.experts, -1)
            statistics = _whole(packed.get_parameter(f"{parameter}_statistics")).view(torch.uint8).view(-1)
            views = {each: values.view(stack.experts, -1) for each, values in stack.views(statistics).items()}
            for expert, weight in enumerate(weights.get_parameter(parameter)):
                wanted, state = quantize_4bit(
                    weight.contiguous(), blocksize=64, compress_statistics=double_quant, quant_type="nf4"
                )
                expected = {"packed": wanted, "absmax": state.absmax}
                if double_quant:
                    expected |= {"nested_absmax": state.state2.absmax, "offset": state.offset}
                found = {"packed": raw[expert], **{each: values[expert] for each, values in views.items()}}
                wrong = [each for each in expected if not torch.equal(found[each], expected[each].view(-1))]
                if wrong:
                    raise AssertionError(f"{name}.{parameter}, expert {expert}: other {', '.join(wrong)}")
                compared += 1
    return {"compared": compared}


def _values(job: Job, folder: Path, double_quant: bool) -> dict[str, float]:
    """Compare loss and gradients with stock PEFT over dequantized weights; without adapters logits are equal."""
    model, ids = _ours(job, folder, double_quant, torch.float32), _ids(job)
    stock = _dequantized(_stock(job, folder, double_quant, torch.float32), double_quant)
    # With gradients: on a CPU bitsandbytes packs weights in another way, for good, when there are none.
    with model.disable_adapter():
        found = model(input_ids=ids).logits.detach()
    wanted = stock(input_ids=ids).logits.detach()
    _fill_adapters(model, ids)
    errors = _compare(_step(model, ids), _step(_with_adapters_of(stock, model), ids))
    model.eval()
    with torch.no_grad():
        first, second = (model(input_ids=ids).logits for _ in range(2))
    return errors | {
        "logits_that_differ": int((found != wanted).sum()),
        "largest_difference": float((found - wanted).abs().max()),
        "differ_in_a_second_evaluation": int((first != second).sum()),
    }


def _logits(job: Job, folder: Path, double_quant: bool) -> dict[str, float]:
    """Compare logits without adapters, in bfloat16."""
    model, ids = _ours(job, folder, double_quant), _ids(job)
    stock = _dequantized(_stock(job, folder, double_quant), double_quant)
    with model.disable_adapter():
        difference = (model(input_ids=ids).logits - stock(input_ids=ids).logits).detach()
    return {"that_differ": int((difference != 0).sum()), "largest_difference": float(difference.abs().max())}


def _checkpointed(job: Job, folder: Path, double_quant: bool) -> dict[str, float]:
    """Compare with and without activation checkpointing."""
    model, ids = _ours(job, folder, double_quant), _ids(job)
    _fill_adapters(model, ids)
    plain = _step(model, ids)
    surgery.checkpoint_activations(model)
    return _compare(_step(model, ids), plain)


def _compiled(job: Job, folder: Path, double_quant: bool) -> dict[str, float]:
    """Compare with and without `torch.compile` of each decoder block, in bfloat16 or in float32."""
    dtype = torch.bfloat16 if double_quant else torch.float32
    model, ids = _ours(job, folder, double_quant, dtype), _ids(job)
    _fill_adapters(model, ids)
    plain = _step(model, ids)
    for block in model.get_submodule("base_model.model.model.layers").children():
        block.compile()
    return _compare(_step(model, ids), plain, times=1 if dtype == torch.float32 else LOOSE)


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )


def _ours(job: Job, folder: Path, double_quant: bool, dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    return surgery.qlora(
        folder,
        quant=surgery.Quant("nf4", double_quant=double_quant),
        lora=_lora(),
        dtype=dtype,
        shard=surgery.FSDP2() if job.world > 1 else None,
        device=job.device,
    )


def _stock(job: Job, folder: Path, double_quant: bool, dtype: torch.dtype = torch.bfloat16) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=dtype, device_map={"": job.device}, trust_remote_code=False
    )
    return model.requires_grad_(requires_grad=False).train()


def _experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "_apply_gate")]


def _dequantized(model: Any, double_quant: bool) -> Any:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for _, module in _experts(model):
        for stacked in (module.get_parameter("gate_up_proj"), module.get_parameter("down_proj")):
            for weight in stacked.data:
                flat = weight.reshape(-1)  # the kernel for a CPU misreads rows that are not whole blocks
                packed, state = quantize_4bit(flat, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
                weight.copy_(dequantize_4bit(packed, state).view_as(weight))
    return model


def _ids(job: Job) -> torch.Tensor:
    return torch.randint(3, 500, (2, 48), generator=torch.Generator().manual_seed(1)).to(job.device)


def _whole(tensor: Any) -> torch.Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()  # type: ignore[no-any-return]


def _fill_adapters(model: Any, ids: torch.Tensor) -> None:
    """Give `lora_B`, which are zeros, values of the size of weights, by one step along their gradient."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.sub_(parameter.grad, alpha=0.02 / float(_whole(parameter.grad).abs().max()))
    model.zero_grad(set_to_none=True)


def _with_adapters_of(stock: Any, model: Any) -> Any:
    from peft import get_peft_model

    adapted: Any = get_peft_model(stock, _lora(), autocast_adapter_dtype=False)
    values = {name: _whole(parameter) for name, parameter in model.named_parameters() if "lora_" in name}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data = values.pop(name).clone()
    if values:
        raise AssertionError(f"PEFT has no {', '.join(values)}")
    return adapted


def _step(model: Any, ids: torch.Tensor) -> Stepped:
    model.train()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    trained = ((name.replace("_checkpoint_wrapped_module.", ""), each) for name, each in model.named_parameters())
    gradients = {name: _whole(each.grad).float() for name, each in trained if each.requires_grad}
    model.zero_grad(set_to_none=True)
    return loss.item(), gradients


def _compare(found: Stepped, wanted: Stepped, *, times: int = 1) -> dict[str, float]:
    loss = abs(found[0] - wanted[0]) / wanted[0]
    if found[1].keys() != wanted[1].keys():
        raise AssertionError(f"other adapters: {found[1].keys() ^ wanted[1].keys()}")
    errors = {name: float((found[1][name] - each).norm() / each.norm()) for name, each in wanted[1].items()}
    worst = max(errors, key=lambda name: errors[name])
    if not (loss <= times * LOSS_ERROR and errors[worst] <= times * GRADIENT_ERROR):
        raise AssertionError(f"loss {found[0]} instead of {wanted[0]}; gradient of {worst} is off by {errors[worst]}")
    return {"loss_error": loss, "gradient_error": errors[worst], "gradients": len(errors)}
