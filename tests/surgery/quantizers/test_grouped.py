"""Experts in 4 bits compute what stock computes with the dequantized weights, and never hold these as a whole."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type, quantize_4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import model_surgery_patches as patches
from surgery.errors import QuantizerError
from surgery.integrations.transformers.experts_4bit import ID, find_forward
from surgery.quantizers import grouped
from surgery.quantizers.grouped import SplitLora
from surgery.quantizers.stack import as_bytes, stacks_of
from tests.helpers.experts import CLASSES, EXPERTS, HIDDEN, experts_module, packed_experts, packed_stack

FLOATS = (torch.float32, torch.bfloat16)
TOKENS, TOP_K = 12, 2


@pytest.fixture(autouse=True)
def dispatched() -> Iterator[None]:
    """Packed experts find their forward, as beside a model that has some."""
    with patches.transaction(ID, reason="a test") as transaction:
        assert transaction.receipts[0].patch.wrapper is find_forward
        yield


def routed(dtype: torch.dtype, tokens: int = TOKENS, experts: int = EXPERTS) -> tuple[torch.Tensor, ...]:
    """Hidden states, the experts of each token and their weights; expert 2, and the last, get no token."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(tokens, experts - 1, generator=generator)
    scores[:, 2] = -1
    weights, index = scores.topk(TOP_K, -1)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    return hidden.to(dtype).requires_grad_(), index, weights.to(dtype).requires_grad_()


def computed(module: nn.Module, inputs: Sequence[torch.Tensor], **given: Any) -> tuple[torch.Tensor, ...]:
    """The output of `module` and the gradients of hidden states and of routing weights."""
    hidden, index, weights = inputs
    output = module(hidden, index, weights, **given)
    return output, *torch.autograd.grad(output.float().square().sum(), (hidden, weights))


def same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Whether tensors have the same bits, dtypes and shapes."""
    return all(a.dtype == b.dtype and a.equal(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_value_of_four_bits_is_looked_up_in_its_table(quant_type: str) -> None:
    stack, packed, _ = packed_stack(torch.zeros(2, 8, 16), quant_type=quant_type, blocksize=64, double_quant=False)
    numbers = torch.arange(16).repeat(16)
    packed[:] = numbers[::2] * 16 + numbers[1::2]
    absmax = torch.tensor([1.0, 2.0, 0.5, 3.0])
    table = get_4bit_type(quant_type, device="cpu")
    found = stack.dequantize(packed, stack.assemble({"absmax": absmax}), range(2))
    assert found.view(4, -1).equal(table.repeat(4).expand(4, -1) * absmax[:, None])


@pytest.mark.parametrize("double_quant", [False, True])
def test_runs_of_experts_have_the_values_that_bitsandbytes_gives_each(double_quant: bool) -> None:
    options = {"blocksize": 64, "double_quant": double_quant}
    # Rows that are not whole blocks; 300 statistics of each expert, in a whole nested block and a part; or 256.
    shapes = (8, 40), (96, 200), (128, 128)
    for dtype, shape, kind in itertools.product((*FLOATS, torch.float16), shapes, ("nf4", "fp4")):
        weights = torch.randn(3, *shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        stack, packed, statistics = packed_stack(weights, quant_type=kind, **options)
        expected = torch.stack([packed_alone(each, kind, options) for each in weights])
        odd = torch.cat([statistics.new_zeros(1), statistics])[1:]  # begins where no float32 may
        for run, given in ((range(3), statistics.view(torch.float32)), (range(1, 3), odd), (range(1), statistics)):
            assert stack.dequantize(packed.view(torch.bfloat16)[:, None], given, run).equal(
                expected[run.start : run.stop]
            )
        assert len(statistics) == stack.statistics_bytes
        assert stack.statistics_bytes % 16 == 0
        assert as_bytes(stack.assemble(stack.views(odd))).equal(statistics)


def packed_alone(weight: torch.Tensor, quant_type: str, options: dict[str, Any]) -> torch.Tensor:
    """`weight` of one expert, quantized and dequantized by bitsandbytes, flat, as its kernel for a CPU is right."""
    packed, state = quantize_4bit(
        weight.view(-1),
        blocksize=options["blocksize"],
        compress_statistics=options["double_quant"],
        quant_type=quant_type,
    )
    assert isinstance(state, QuantState)
    return dequantize_4bit(packed, state).view(weight.shape)


@pytest.mark.parametrize("family", CLASSES)
def test_outputs_and_gradients_have_the_bits_of_stock(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, storage, double_quant in itertools.product(FLOATS, (torch.uint8, torch.bfloat16), (False, True)):
        packed, stock = packed_experts(experts_module(family, dtype), storage=storage, double_quant=double_quant)
        inputs = routed(dtype)
        expected = computed(stock, inputs)
        assert expected[0].abs().sum() > 0
        for budget in (1, 2 * max(stack.numel for stack in stacks_of(packed).values()) * dtype.itemsize, 1 << 30):
            monkeypatch.setattr(grouped, "DEQUANTIZED_BYTES", budget)
            assert same(computed(packed, inputs), expected)
        assert same(computed(packed, routed(dtype, 0)), computed(stock, routed(dtype, 0)))


def test_tokens_of_other_ranks_experts_are_left_out_like_stock_leaves_them_out() -> None:
    packed, stock = packed_experts(experts_module("gpt_oss", torch.bfloat16))
    packed._is_expert_parallel = stock._is_expert_parallel = True
    hidden, index, weights = routed(torch.bfloat16)
    index[::3] = EXPERTS
    index[:, 1] = EXPERTS
    weights = torch.where(index < EXPERTS, weights, 0).detach().requires_grad_()
    assert same(computed(packed, (hidden, index, weights)), computed(stock, (hidden, index, weights)))
    index[:] = EXPERTS  # for a rank none of whose experts gets a token
    found = computed(packed, (hidden, index, weights))
    assert all(each.count_nonzero() == 0 for each in found)


def test_a_parameter_that_is_not_packed_is_used_as_it_is() -> None:
    packed, stock = packed_experts(experts_module("olmoe", torch.float32))
    packed.down_proj = stock.down_proj
    del packed.packed_stacks["down_proj"]
    inputs = routed(torch.float32)
    assert same(computed(packed, inputs), computed(stock, inputs))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_packed_bytes_that_were_cast_are_refused_and_those_in_bytes_are_never_cast(storage: torch.dtype) -> None:
    """Of the same size or of another, by whatever way; on the whole, or on a part."""
    module = experts_module("olmoe", torch.float32)
    packed, _stock = packed_experts(module, storage=storage)
    inputs = routed(torch.float32)
    expected = packed(*inputs)
    for other in {torch.float64, torch.bfloat16, torch.float16} - {storage}:
        with pytest.raises(QuantizerError, match=f"in {storage}, found them cast to {other}"):
            copy.deepcopy(packed).to(other)(*inputs)
    assert packed.to("cpu", storage)(*inputs).equal(expected)
    packed, _stock = packed_experts(module)
    assert packed.double().float()(*inputs).equal(expected)


def test_they_find_their_forward_for_as_long_as_one_model_needs_it() -> None:
    packed, stock = packed_experts(experts_module("olmoe", torch.float32))
    inputs = routed(torch.float32)
    with patches.transaction(ID, reason="another model"):
        assert same(computed(packed, inputs), computed(stock, inputs))
    assert packed(*inputs).equal(stock(*inputs))
    patches.revert(ID)
    with pytest.raises(KeyError, match="surgery_4bit"):
        packed(*inputs)


def test_it_runs_where_stock_runs() -> None:
    packed, stock = packed_experts(experts_module("qwen3_moe", torch.bfloat16), storage=torch.bfloat16)
    float32 = routed(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(computed(packed, float32), computed(stock, float32))
    inputs = routed(torch.bfloat16)
    expected = computed(stock, inputs)
    for without_grad in (torch.no_grad(), torch.inference_mode()):
        with without_grad:
            assert packed(*inputs).equal(expected[0])
    for reentrant in (False, True):
        again = checkpoint(packed, *inputs, use_reentrant=reentrant)
        again.float().square().sum().backward()
        assert same((again, inputs[0].grad, inputs[2].grad), expected)
        inputs[0].grad = inputs[2].grad = None


def test_adapters_train_where_hidden_states_do_not() -> None:
    packed, _stock = packed_experts(experts_module("olmoe", torch.float32))
    hidden, index, weights = (each.detach() for each in routed(torch.float32))
    lora = list(adapters(packed))
    packed(hidden, index, weights, lora=lora).sum().backward()
    assert all(factor.grad is not None and factor.grad.isfinite().all() for each in lora for factor in (each.a, each.b))
    again = [(each.a.grad, each.b.grad) for each in lora]
    for each in lora:
        each.a.grad = each.b.grad = None
    packed(hidden.requires_grad_(), index, weights, lora=lora).sum().backward()
    assert all(same(before, (each.a.grad, each.b.grad)) for before, each in zip(again, lora, strict=True))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_a_compiled_module_has_the_same_bits() -> None:
    packed, _stock = packed_experts(experts_module("gpt_oss", torch.float32))
    lora = tuple(adapters(packed))
    inputs = routed(torch.float32)
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    assert same(computed(compiled, inputs), computed(packed, inputs))
    found, expected = (
        torch.autograd.grad(each(*inputs, lora=lora).sum(), [lora[0].a, lora[1].b]) for each in (compiled, packed)
    )
    assert same(found, expected)


def adapters(packed: nn.Module, rank: int = 3, **given: Any) -> Iterator[SplitLora]:
    """One adapter of each packed weight, with random factors."""
    generator = torch.Generator().manual_seed(3)
    for name, stack in stacks_of(packed).items():
        out, inner = stack.shape[:: -1 if packed.is_transposed else 1]
        a = torch.randn(rank * stack.experts, inner, generator=generator).requires_grad_()
        b = torch.randn(out, rank * stack.experts, generator=generator).requires_grad_()
        yield SplitLora(parameter=name, a=a, b=b, scaling=0.5, **given)


class Around(nn.Module):
    """What PEFT looks for experts in."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.experts(*inputs)


@pytest.mark.parametrize("names", [("default",), ("default", "other")])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h"])
def test_lora_has_the_gradients_of_peft_over_dequantized_weights(family: str, names: Sequence[str]) -> None:
    packed, stock = packed_experts(experts_module(family, torch.float32))
    adapted, lora = adapted_by_peft(stock, packed, names)
    inputs = routed(torch.float32)
    expected = stepped(adapted, lora, inputs)
    found = stepped(packed, lora, inputs, lora=lora)
    assert all(apart(mine, theirs) < 1e-6 for mine, theirs in zip(found, expected, strict=True))
    of_a = found[2::2]
    assert all(idle.count_nonzero() == 0 for each in of_a for idle in each.chunk(EXPERTS)[2::3])


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_in_16_bits_lora_is_as_near_to_float32_as_peft_is(family: str) -> None:
    packed, stock = packed_experts(experts_module(family, torch.bfloat16))
    adapted, lora = adapted_by_peft(stock, packed, ["default"])
    inputs = routed(torch.bfloat16)
    found, theirs = stepped(packed, lora, inputs, lora=lora), stepped(adapted, lora, inputs)
    assert [each.dtype for each in found] == [each.dtype for each in theirs]
    exact = stepped(adapted.float(), lora, [inputs[0].float(), inputs[1], inputs[2].float()])
    mine, others = (sum(map(apart, each, exact)) / len(exact) for each in (found, theirs))
    assert mine < min(1.5 * others, 1e-2)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, relative to that of what is expected."""
    return ((found.float() - expected).norm() / expected.norm()).item()


def adapted_by_peft(stock: nn.Module, packed: nn.Module, names: Sequence[str]) -> tuple[Any, list[SplitLora]]:
    """`stock` with adapters on what is packed in `packed`, float32 and random, and the same as split ones."""
    targets = [f"experts.{name}" for name in stacks_of(packed)]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=targets)
    adapted: Any = get_peft_model(Around(stock), config)
    for name in names[1:]:
        adapted.add_adapter(name, config)
    adapted.base_model.set_adapter(list(names))
    return adapted, list(splits(adapted.base_model.model.experts, names))


def splits(wrapper: Any, names: Sequence[str]) -> Iterator[SplitLora]:
    """The adapters called `names` of PEFT's wrappers, one around the other, with random factors."""
    generator = torch.Generator().manual_seed(4)
    while hasattr(wrapper, "parameter_name"):
        for name in names:
            a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
            for factor in (a, b):
                nn.init.normal_(factor, std=0.3, generator=generator)
            yield SplitLora(parameter=wrapper.parameter_name, a=a, b=b, scaling=wrapper.scaling[name])
        wrapper = wrapper.base_layer


def stepped(
    module: nn.Module, wanted: Sequence[SplitLora], inputs: Sequence[torch.Tensor], **given: Any
) -> list[torch.Tensor]:
    """The output of `module`, and the gradients of hidden states and of the factors of `wanted`."""
    output = module(*inputs, **given)
    factors = [factor for each in wanted for factor in (each.a, each.b)]
    return [output, *torch.autograd.grad(output.float().square().mean(), (inputs[0], *factors))]


def test_dropout_is_of_what_the_adapter_is_given() -> None:
    packed, _stock = packed_experts(experts_module("olmoe", torch.float32))
    inputs = routed(torch.float32)
    dropped = list(adapters(packed, dropout=nn.Dropout(1.0)))
    assert packed(*inputs, lora=dropped).equal(packed(*inputs))
    without = packed(*inputs, lora=list(adapters(packed)))
    for each in dropped:
        assert each.dropout is not None
        each.dropout.eval()
    assert packed(*inputs, lora=dropped).equal(without)
    assert not without.allclose(packed(*inputs))


class Largest(TorchDispatchMode):
    """The most bytes of any tensor that operations make, those inside of the products of packed weights too."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.surgery.grouped_mm_4bit.default:
            self.products += 1
            with self:
                return grouped.grouped_mm_4bit._init_fn(*args, **(kwargs or {}))
        found = func(*args, **(kwargs or {}))
        self.nbytes = max([self.nbytes, *(each.nbytes for each in [found] if isinstance(each, torch.Tensor))])
        return found


def test_no_more_than_the_budget_is_dequantized_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _stock = packed_experts(experts_module("olmoe", torch.bfloat16), double_quant=True)
    stack = stacks_of(packed)["gate_up_proj"]
    budget = 2 * stack.numel * stack.dtype.itemsize
    monkeypatch.setattr(grouped, "DEQUANTIZED_BYTES", budget)
    with Largest() as seen:
        computed(packed, routed(torch.bfloat16), lora=list(adapters(packed, rank=1)))
    assert (seen.products, seen.nbytes) == (4, budget)  # of a third of the experts
