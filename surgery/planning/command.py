"""The command `surgery plan`: a table of what every rank would need. Nothing heavy is imported before it runs."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, Literal

import typer

from surgery.errors import ConfigError
from surgery.planning.arguments import (
    EXPERTS_HELP,
    OFFLOADING_HELP,
    Experts,
    QuantType,
    offloads_shards,
    parse_list,
    parse_lora,
    parse_mesh,
    parse_shard,
    require_recordable,
)
from surgery.step.kernels import KERNELS_HELP
from surgery.telemetry.numbers import parse_size

__all__ = ["EPILOG", "plan"]

EPILOG = """
Examples

Does a 70B model fit two GPUs of 24 GiB? If not, what would make it fit?

  surgery plan meta-llama/Llama-3.1-70B --world 2 --gpu-memory 24GiB

With activations kept, where they are recomputed by default as in training:

  surgery plan meta-llama/Llama-3.1-8B --no-gradient-checkpointing

A sequence of 16,384 tokens, with kernels, and the inputs of recomputed blocks on the CPU:

\b
  surgery plan meta-llama/Llama-3.1-8B --max-length 16384 \\
    --activation-offloading --kernels fused,liger

Going on from an adapter that was trained before:

  surgery plan ./model --adapter ./adapter --world 2

FSDP1 in its low-memory mode, and what rank 0's host must have for it:

  surgery plan ./model --world 8 --fsdp 1 --placement rank0-cpu

Options have the names that they have in surgery finetune. Of a hub id only the headers of the files are fetched; no
weight is downloaded or read. Sizes are above what a process holds before it loads; the driver, cuBLAS and NCCL take
their part of --gpu-memory too, and that is counted.

Exit codes: 0 it fits, or no --gpu-memory was given; 1 it does not fit; 2 refused (the message says what
to change).
"""

_of_training = partial(typer.Option, rich_help_panel="Training")
_of_adapter = partial(typer.Option, rich_help_panel="Adapter")
_of_precision = partial(typer.Option, rich_help_panel="Quantization and precision")
_of_ranks = partial(typer.Option, rich_help_panel="Ranks and sharding")


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder with a safetensors checkpoint, or a hub id.", show_default=False
        ),
    ],
    *,
    world: Annotated[int, _of_ranks(help="Number of ranks.")] = 1,
    gpu_memory: Annotated[str | None, _of_ranks(help="Of each GPU, such as 24GiB: says whether it fits.")] = None,
    fsdp: Annotated[
        Literal["2", "1", "none"], _of_ranks(help="Which FSDP, on several ranks; none keeps the model whole on each.")
    ] = "2",
    fsdp_config: Annotated[
        str | None,
        _of_ranks(metavar="JSON", help="Settings of FSDP; cpu_offload decides, others change nothing that is planned."),
    ] = None,
    placement: Annotated[
        str | None,
        _of_ranks(
            help="Where weights wait to be sharded: sharded, rank0-cpu or replicated.",
            show_default="sharded; rank0-cpu with --fsdp 1",
        ),
    ] = None,
    mesh: Annotated[str | None, _of_ranks(help="REPLICATExSHARD, for hybrid sharding.", metavar="RxS")] = None,
    device: Annotated[Literal["cuda", "cpu"], _of_ranks(help="What ranks compute on.")] = "cuda",
    max_length: Annotated[int, _of_training(help="Tokens a sample.")] = 1024,
    per_device_train_batch_size: Annotated[
        int, _of_training(help="Samples a rank puts through the model at once.")
    ] = 1,
    optim: Annotated[str, _of_training(help="sgd keeps nothing; every other is counted as AdamW.")] = "adamw",
    gradient_checkpointing: Annotated[bool, _of_training(help="Recompute activations in backward.")] = True,
    activation_offloading: Annotated[bool, _of_training(help=OFFLOADING_HELP)] = False,
    kernels: Annotated[str | None, _of_training(help=KERNELS_HELP, metavar="NAMES", show_default=False)] = None,
    cuda_graphs: Annotated[
        bool,
        _of_training(help="Count steps that are recorded as CUDA graphs, of 8 shapes of batches, the most there are."),
    ] = False,
    adapter: Annotated[
        str | None,
        _of_adapter(help="Go on from this adapter, a folder or a hub id.", metavar="DIR", show_default=False),
    ] = None,
    lora_r: Annotated[int | None, _of_adapter(help="Rank of the adapters.", show_default="16")] = None,
    lora_target_modules: Annotated[
        list[str] | None,
        _of_adapter(
            help="Names of linear modules, separated by commas, or repeated.",
            metavar="NAMES",
            show_default="all-linear",
        ),
    ] = None,
    lora_target_parameters: Annotated[
        list[str] | None,
        _of_adapter(
            help="Names of parameters, such as experts.gate_up_proj, likewise; beside linear modules by name.",
            metavar="NAMES",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], _of_precision(help="Of what is not quantized, and how it computes.")
    ] = "bfloat16",
    bnb_4bit_quant_type: Annotated[QuantType, _of_precision(help="The 4-bit data type.")] = "nf4",
    use_bnb_nested_quant: Annotated[bool, _of_precision(help="Quantize the block statistics too.")] = True,
    experts: Annotated[Experts, _of_precision(help=EXPERTS_HELP)] = "4bit",
    bnb_4bit_quant_storage: Annotated[
        Literal["bfloat16", "float16", "float32", "uint8"] | None,
        _of_precision(help="Dtype that packs the 4-bit weights.", show_default="as --dtype"),
    ] = None,
    model_revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Plan the memory of fine-tuning MODEL. It says what every rank would read, hold and peak at; nothing is loaded."""
    if adapter is not None and (lora_r, lora_target_modules, lora_target_parameters) != (None, None, None):
        raise ConfigError("expected --adapter without --lora-r and --lora-target-...: its configuration decides")
    memory = parse_size(gpu_memory) if gpu_memory is not None else None
    offloads, sizes = _offloads(fsdp_config), parse_mesh(mesh)
    with _not_collecting():
        import torch

        from surgery.checkpoint.peek import peek
        from surgery.config import Quant

    if activation_offloading and not gradient_checkpointing:
        raise ConfigError("--activation-offloading moves the inputs of recomputed blocks: add --gradient-checkpointing")
    if cuda_graphs:
        require_recordable(on_cpu=device == "cpu", fsdp=fsdp if world > 1 else "none")
    # What can be refused is refused before the longest imports.
    shard = _sharding(fsdp, world=world, sizes=sizes, cpu_offload=offloads)
    checkpoint = peek(model, revision=model_revision)
    with _not_collecting():
        from surgery.adapters.saved import SavedAdapter
        from surgery.passes.prepare import prepare
        from surgery.passes.setting import Setting
        from surgery.planning.inventory import take_inventory
        from surgery.planning.plan import make_plan
        from surgery.planning.table import show
        from surgery.planning.training import Training
        from surgery.step.graphs import SHAPES

        saved = None if adapter is None else SavedAdapter.open(adapter)
        lora = (
            saved.config
            if saved
            else parse_lora(
                16 if lora_r is None else lora_r,
                ",".join(lora_target_modules or ["all-linear"]),
                ",".join(lora_target_parameters or ()),
            )
        )
    of_name: dict[str, torch.dtype] = {
        name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "uint8")
    }
    setting = Setting(
        world_size=world,
        placement=placement,
        shard=shard,
        quant=Quant(
            bnb_4bit_quant_type,
            double_quant=use_bnb_nested_quant,
            quant_storage=of_name[bnb_4bit_quant_storage or dtype],
            experts=experts == "4bit",
        ),
        lora=lora,
        adapter=saved,
        dtype=of_name[dtype],
        compute_dtype=of_name[dtype],
        device=torch.device(device),
    )
    training = Training(
        batch=per_device_train_batch_size,
        seq=max_length,
        optimizer="sgd" if optim == "sgd" else "adamw",
        checkpointing=gradient_checkpointing,
        offload=activation_offloading,
        kernels=parse_list(kernels or ""),
        loss="trl",
        graphs=SHAPES if cuda_graphs else 0,
    )
    prepared = prepare(checkpoint, setting)
    show(make_plan(take_inventory(prepared), prepared.setting, training), model, memory, as_json=as_json)


@contextmanager
def _not_collecting() -> Iterator[None]:
    """A block of imports: they make a million objects that stay, and looking for garbage in them takes a second."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _offloads(fsdp_config: str | None) -> bool:
    """Whether `fsdp_config`, JSON as transformers takes it, has shards wait on the CPU."""
    try:
        found = json.loads(fsdp_config or "{}")
    except ValueError as error:
        raise ConfigError(f"--fsdp-config: expected a JSON object, found {fsdp_config!r:.80}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--fsdp-config: expected a JSON object, found {fsdp_config!r:.80}")
    return offloads_shards(found)


def _sharding(fsdp: Literal["2", "1", "none"], *, world: int, sizes: tuple[int, int] | None, cpu_offload: bool) -> Any:
    """The sharding of several ranks; None for one, which is not sharded."""
    if world == 1 and (sizes is not None or cpu_offload):
        raise ConfigError(
            "expected --world of 2 or more with --mesh or --fsdp-config, found 1: one rank is not sharded"
        )
    if world == 1:
        return None
    if fsdp != "none":
        return parse_shard(fsdp, mesh=sizes, cpu_offload=cpu_offload)
    if sizes is not None or cpu_offload:
        raise ConfigError("expected --fsdp 1 or 2 with --mesh or --fsdp-config, found none")
    from surgery.config import DDP

    return DDP()
