"""Adapter configurations of PEFT, tried on tiny models: stock in one process, and here under every sharding."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from surgery.config import FSDP1, FSDP2, Quant
from tests.helpers.models import tiny_config

__all__ = ["CASES", "SHARDINGS", "STEPS", "Case", "Found", "make_checkpoints", "on_this_rank", "reloaded", "stock"]

#: SPREAD: standard deviation of weights.
STEPS, RATE, SPREAD = 2, 0.3, 0.2

#: Column of the table -> how the two ranks share a model; None: one process.
SHARDINGS: dict[str, FSDP1 | FSDP2 | None] = {
    "one process": None,
    "FSDP1": FSDP1(),
    "FSDP1, use_orig_params": FSDP1(use_orig_params=True),
    "FSDP2": FSDP2(),
}

#: Rows are whole blocks, which stock kernels dequantize rightly on every CPU.
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

#: Biases, so that there is something to train where an option says so.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral-4bit": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}

#: What is adapted where a case does not say.
Q = ["q_proj", "v_proj"]

#: Each row has the tokens 5 and 6 in it, one after the other.
IDS = torch.randint(7, 96, (2, 12), generator=torch.Generator().manual_seed(3))
IDS[:, 4:6] = torch.tensor([5, 6])


@dataclass(frozen=True, kw_only=True)
class Case:
    """A configuration. name: what the table calls it. options: arguments of `LoraConfig`; make: builds another one.

    is_random: each rank takes the whole batch, so that what it draws in forward is what one process draws.
    """

    name: str
    model: str = "llama"
    options: dict[str, Any] = field(default_factory=dict)
    make: Callable[[], Any] | None = None
    is_random: bool = False

    @property
    def key(self) -> str:
        """Unique, and fit for the name of a folder."""
        return f"{self.model}-{''.join(c if c.isalnum() else '-' for c in self.name)}"

    @property
    def quant(self) -> Quant:
        """Experts are in 16 bits, as in stock, but for the model that says otherwise."""
        return Quant(experts=self.model == "mixtral-4bit")

    def config(self) -> Any:
        from peft import LoraConfig

        if self.make is not None:
            return self.make()
        options = {"r": 4, "lora_alpha": 8, "target_modules": Q, "task_type": "CAUSAL_LM", **self.options}
        return LoraConfig(**options)


@dataclass(kw_only=True)
class Found:
    """start, losses, logits: of a model before, while and after it is trained. refusal: what was said instead.

    reads: of weights. trainable: bytes on this rank.
    """

    start: torch.Tensor | None = None
    losses: list[float] = field(default_factory=list)
    logits: torch.Tensor | None = None
    refusal: str = ""
    reads: int = 0
    trainable: int = 0


def _of(kind: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        import peft

        return getattr(peft, kind)(**options)

    return make


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

CASES = (
    Case(name="all-linear", options={"target_modules": "all-linear"}),
    Case(name="the family's own targets", options={"target_modules": None}),
    Case(name="rsLoRA", options={"use_rslora": True}),
    Case(name="DoRA", options={"use_dora": True}),
    Case(name="Gaussian", options={"init_lora_weights": "gaussian"}),
    Case(name="orthogonal", options={"init_lora_weights": "orthogonal"}),
    Case(name="no initialization", options={"init_lora_weights": False}),
    Case(name="PiSSA", options={"init_lora_weights": "pissa"}),
    Case(name="dropout", options={"lora_dropout": 0.2}, is_random=True),
    Case(
        name="rank_pattern",
        options={"target_modules": "all-linear", "rank_pattern": {"down_proj": 2, r".*\.0\..*q_proj": 6}},
    ),
    Case(name="alpha_pattern", options={"alpha_pattern": {"layers.1.self_attn.q_proj": 32}}),
    Case(name="patterns that overlap", options={"alpha_pattern": {"q_proj": 2, r"(.*\.)?self_attn\.q_proj": 4}}),
    Case(name="a pattern that matches nothing", options={"rank_pattern": {"nowhere": 2}}),
    Case(name="layers_to_transform", options={"layers_to_transform": [1]}),
    Case(
        name="layers_pattern",
        options={"layers_to_transform": 0, "layers_pattern": "layers"},
    ),
    Case(name="layers_to_transform out of range", options={"layers_to_transform": [1, 7]}),
    Case(name="exclude_modules", options={"target_modules": "all-linear", "exclude_modules": ["down_proj", "v_proj"]}),
    Case(name="exclude_modules by a regex", options={"exclude_modules": r".*layers\.0.*"}),
    Case(name="exclude_modules that match nothing", options={"exclude_modules": ["nowhere"]}),
    Case(name="a regex of targets", options={"target_modules": r".*\.1\..*(q|up)_proj"}),
    Case(name="a target that matches nothing", options={"target_modules": [*Q, "nowhere"]}),
    Case(name="bias all", options={"bias": "all"}),
    Case(name="bias lora_only", options={"bias": "lora_only"}),
    Case(name="lora_bias", options={"lora_bias": True}),
    Case(name="head", options={"target_modules": [*Q, "lm_head"]}),
    Case(name="embedding", options={"target_modules": [*Q, "embed_tokens"]}),
    Case(name="head and embedding", options={"target_modules": ["lm_head", "embed_tokens"]}),
    Case(name="DoRA on the embedding", options={"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    Case(name="modules_to_save: head", options={"modules_to_save": ["lm_head"]}),
    Case(name="modules_to_save: embedding", options={"modules_to_save": ["embed_tokens"]}),
    Case(name="modules_to_save: both", options={"modules_to_save": ["embed_tokens", "lm_head"]}),
    Case(name="modules_to_save: norms", options={"modules_to_save": ["layernorm", "model.norm"]}),
    Case(name="modules_to_save: a 4-bit layer", options={"modules_to_save": ["up_proj"]}),
    Case(name="modules_to_save: a block", options={"modules_to_save": ["mlp"]}),
    Case(name="modules_to_save that match nothing", options={"modules_to_save": ["lm_head", "score"]}),
    Case(name="token indices", options={"trainable_token_indices": [5, 7, 90]}),
    Case(name="token indices out of range", options={"trainable_token_indices": [5, 96]}),
    Case(
        name="token indices of the head",
        options={"trainable_token_indices": {"embed_tokens": [5], "lm_head": [7]}},
    ),
    Case(
        name="token indices of what is saved whole",
        options={"trainable_token_indices": [5], "modules_to_save": ["embed_tokens"]},
    ),
    Case(name="ensure_weight_tying, nothing tied", options={"ensure_weight_tying": True}),
    Case(name="all-linear", model="tied", options={"target_modules": "all-linear"}),
    Case(name="embedding", model="tied", options={"target_modules": [*Q, "embed_tokens"]}),
    Case(name="head", model="tied", options={"target_modules": [*Q, "lm_head"]}),
    Case(
        name="embedding, ensure_weight_tying",
        model="tied",
        options={"target_modules": [*Q, "embed_tokens"], "ensure_weight_tying": True},
    ),
    Case(
        name="modules_to_save: embedding",
        model="tied",
        options={"modules_to_save": ["embed_tokens"]},
    ),
    Case(name="modules_to_save: head", model="tied", options={"modules_to_save": ["lm_head"]}),
    Case(
        name="modules_to_save: embedding, ensure_weight_tying",
        model="tied",
        options={"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    Case(name="token indices", model="tied", options={"trainable_token_indices": [5, 7]}),
    Case(
        name="token indices, ensure_weight_tying",
        model="tied",
        options={"trainable_token_indices": [5, 7], "ensure_weight_tying": True},
    ),
    Case(name="all-linear", model="mixtral", options={"target_modules": "all-linear"}),
    Case(name="attention alone", model="mixtral", options={"target_modules": [*Q, "o_proj"]}),
    Case(
        name="names of experts before transformers 5", model="mixtral", options={"target_modules": ["w1", "w2", "w3"]}
    ),
    Case(name="one of two fused experts' names", model="mixtral", options={"target_modules": ["w1"]}),
    Case(name="the router", model="mixtral", options={"target_modules": [*Q, "gate"]}),
    Case(name="target_parameters", model="mixtral", options={"target_parameters": EXPERTS}),
    Case(
        name="target_parameters alone",
        model="mixtral",
        options={"target_modules": [], "target_parameters": EXPERTS[1:]},
    ),
    Case(name="target_parameters of a 4-bit layer", options={"target_parameters": ["up_proj.weight"]}),
    Case(
        name="target_parameters that match nothing",
        model="mixtral",
        options={"target_parameters": [EXPERTS[0], "nowhere.weight"]},
    ),
    Case(name="modules_to_save: router", model="mixtral", options={"modules_to_save": ["gate"]}),
    Case(name="modules_to_save: experts", model="mixtral", options={"modules_to_save": ["experts"]}),
    Case(
        name="rank_pattern beside that of PEFT",
        model="mixtral",
        options={"target_modules": "all-linear", "rank_pattern": {"gate_up_proj": 6}},
    ),
    Case(name="experts with dropout", model="mixtral", options={"target_parameters": EXPERTS, "lora_dropout": 0.1}),
    Case(name="attention alone", model="mixtral-4bit", options={"target_modules": [*Q, "o_proj"]}),
    Case(name="target_parameters", model="mixtral-4bit", options={"target_parameters": EXPERTS}),
    Case(
        name="target_parameters alone",
        model="mixtral-4bit",
        options={"target_modules": [], "target_parameters": EXPERTS[1:]},
    ),
    Case(name="rsLoRA", model="mixtral-4bit", options={"target_parameters": EXPERTS, "use_rslora": True}),
    Case(
        name="rank_pattern",
        model="mixtral-4bit",
        options={"target_parameters": EXPERTS, "rank_pattern": {"experts.gate_up_proj": 2}},
    ),
    Case(
        name="names of experts before transformers 5",
        model="mixtral-4bit",
        options={"target_modules": ["w1", "w2", "w3"]},
    ),
    Case(name="the router", model="mixtral-4bit", options={"target_modules": [*Q, "gate"]}),
    Case(name="modules_to_save: router", model="mixtral-4bit", options={"modules_to_save": ["gate"]}),
    Case(name="modules_to_save: experts", model="mixtral-4bit", options={"modules_to_save": ["experts"]}),
    Case(name="experts with DoRA", model="mixtral-4bit", options={"target_parameters": EXPERTS, "use_dora": True}),
    Case(name="layer_replication", options={"layer_replication": [(0, 2), (0, 2)]}),
    Case(name="QALoRA", options={"use_qalora": True}),
    Case(name="aLoRA", options={"alora_invocation_tokens": [5, 6]}),
    Case(name="nothing to train", options={"inference_mode": True}),
    Case(name="AdaLoRA", make=_of("AdaLoraConfig", target_modules=Q, total_step=9)),
    Case(name="IA3", make=_of("IA3Config", target_modules=["k_proj"], feedforward_modules=[])),
    Case(name="VeRA", make=_of("VeraConfig", target_modules=Q)),
    Case(name="prompt tuning", make=_of("PromptTuningConfig", num_virtual_tokens=4, task_type="CAUSAL_LM")),
    Case(name="several adapters", make=lambda: {"one": Case(name="").config(), "two": Case(name="").config()}),
)


def make_checkpoints(root: Path) -> Path:
    """A checkpoint of each model, under its name; of weights so large that a step of training shows."""
    from transformers import AutoModelForCausalLM

    for name, changes in MODELS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(**SMALL, **changes), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=SPREAD) if parameter.dim() > 1 else parameter.add_(0.1)
        model.save_pretrained(root / name)
    return root


def _base(root: Path, case: Case) -> Any:
    """The stock model in 4 bits, in one process."""
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        root / case.model, quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"}
    )
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # repacks weights when it evaluates, and rounds
        if case.quant.experts and hasattr(module, "gate_up_proj"):
            _round(module.gate_up_proj, module.down_proj)
    return model.train()


def _round(*stacks: torch.Tensor) -> None:
    """Give experts the values that they have in 4 bits, each by itself."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for stack in stacks:
        for expert in stack.detach():
            packed, state = quantize_4bit(expert.flatten(), quant_type="nf4", compress_statistics=True)
            expert.copy_(dequantize_4bit(packed, state).view_as(expert))


def stock(root: Path, case: Case) -> Found:
    """What transformers, bitsandbytes and PEFT make of it; a failure of theirs is the refusal."""
    from peft import get_peft_model

    model = _base(root, case)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model = get_peft_model(model, case.config(), autocast_adapter_dtype=False)
            start, losses = _logits(model), _train(model, IDS)
            return Found(start=start, losses=losses, logits=_logits(model))
    except Exception as error:  # noqa: BLE001  # whatever upstream raises
        return Found(refusal=f"{type(error).__name__}: {error}")


def reloaded(root: Path, case: Case, folder: Path) -> torch.Tensor:
    """The logits of the stock model with what was saved."""
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(_base(root, case), folder)
    lost = [str(each.message) for each in caught if "missing" in str(each.message).lower()]
    assert not lost, lost
    return _logits(model)


def on_this_rank(root: Path, out: Path, column: str, keys: list[str]) -> dict[str, Found]:
    """Every case of `keys` here, sharded as `column` says; adapters are saved under `out`."""
    from surgery.checkpoint import Reader
    from tests.helpers.reads import count_reads

    reads, Reader.read_bytes = count_reads()  # type: ignore[method-assign]  # of this process alone
    found = {}
    for case in CASES:
        if case.key in keys:
            reads.clear()
            found[case.key] = _tried(root, out / case.key, case, SHARDINGS[column], reads)
    return found


def _tried(root: Path, folder: Path, case: Case, shard: FSDP1 | FSDP2 | None, reads: list[str]) -> Found:
    import patches
    import surgery

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = surgery.qlora(
                root / case.model,
                quant=case.quant,
                lora=case.config(),
                shard=shard,
                dtype=torch.float32,
                report=surgery.Report(),
            )
        except surgery.SurgeryError as error:
            assert patches.active() == []
            return Found(refusal=f"{type(error).__name__}: {error}", reads=len(reads))
        with model:  # type: ignore[attr-defined]  # what `qlora` adds to the class
            trainable = sum(_local(p).nbytes for p in model.parameters() if p.requires_grad)
            losses = _train(model, _batch(case, shard))
            surgery.save_adapter(model, folder)
            return Found(losses=losses, logits=_logits(model), reads=len(reads), trainable=trainable)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _batch(case: Case, shard: FSDP1 | FSDP2 | None) -> torch.Tensor:
    return IDS if shard is None or case.is_random else IDS[dist.get_rank()][None]


def _train(model: nn.Module, ids: torch.Tensor) -> list[float]:
    """Losses of some steps of SGD, as means over ranks; what is drawn at random is drawn from one seed."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    model.train()
    torch.manual_seed(1)
    losses = []
    for _ in range(STEPS):
        logits = model(input_ids=ids).logits.float()
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(mean.item())
    return losses


def _logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()
