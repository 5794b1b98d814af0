"""The commands that write a checkpoint: quantize, dequantize, merge. Nothing heavy is imported before they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from surgery.errors import ConfigError, ExportError
from surgery.planning.arguments import EXPERTS_HELP, Experts
from surgery.telemetry.numbers import parse_size, say_size

__all__ = [
    "CONVERT",
    "DEQUANTIZE",
    "MERGE",
    "QUANTIZE",
    "convert",
    "dequantize",
    "in_process_group",
    "merge",
    "quantize",
    "uploading",
]

CONVERT = """
Examples

An adapter on experts of a model whose checkpoint has one tensor for each of them, served beside its base model:

  surgery convert ./adapter ./for-vllm

  vllm serve ./model --enable-lora --lora-modules mine=./for-vllm

ADAPTER is as PEFT and surgery save it, and stays the one to train on from. In OUT each projection of each expert has
factors of its own, under the names of the checkpoint, all of one rank and one scale; where a checkpoint has the experts
of a layer in one tensor, as gpt-oss has, they stay together, which vLLM reads too. An adapter of linear layers alone
needs no converting.

Exit codes: 0 done; 2 refused, or not written (the message says what to change); 130 interrupted; 143 terminated.
"""

QUANTIZE = """
Examples

A folder that loads with a quarter of the reading, and is trained on as it is:

  surgery quantize meta-llama/Llama-3.1-8B ./llama-4bit

  surgery finetune ./llama-4bit --data train.jsonl

By four processes, compared with the source once more before it gets its name:

  torchrun --nproc-per-node 4 -m surgery quantize ./model ./packed --verify

In OUT are the tensors that save_pretrained of transformers writes of a model in 4 bits, which plain from_pretrained
reads, tokenizer and configuration beside them. Embedding, output head and norms stay in 16 bits. In memory are a few
MiB that were read, and of a layer or two this process's share, packed. Fused experts in 4 bits are read here alone:
plain from_pretrained wants --experts 16bit.

OUT appears when it is whole. If the command is stopped, the same command goes on where it was, from the hidden folder
.OUT.surgery beside it.

Exit codes: 0 done; 2 refused, or not written (the message says what to change); 130 interrupted; 143 terminated.
"""

DEQUANTIZE = """
Example

  surgery dequantize ./llama-4bit ./llama-16bit

The weights are those that quantized layers multiply with: what quantizing has lost stays lost. OUT appears when it is
whole. If the command is stopped, the same command goes on where it was.

Exit codes: 0 done; 2 refused, or not written (the message says what to change); 130 interrupted; 143 terminated.
"""

MERGE = """
Examples

An adapter merged into the 4-bit weights that it was trained on, which gives a model in 16 bits that answers as the
adapter did:

  surgery quantize meta-llama/Llama-3.1-8B ./llama-4bit

  surgery merge ./llama-4bit ./adapter ./merged

Into the weights in 16 bits; packed again, which rounds what the adapter has learnt:

  surgery merge meta-llama/Llama-3.1-8B ./adapter ./merged

  surgery merge meta-llama/Llama-3.1-8B ./adapter ./merged-4bit --dtype nf4

Half of one adapter, and the whole of another:

  surgery merge ./model ./style ./facts ./merged --weight 0.5 --weight 1

On 4 processes of one host, which share the tensors:

  torchrun --nproc-per-node 4 -m surgery merge ./model ./adapter ./merged

The values are those of PEFT's merge_and_unload. A few MiB are in memory at a time; what no adapter changes is copied.
OUT appears when it is whole, with the names of the base's tensors, and the tokenizer of the last adapter that has one.
If the command is stopped, the same command goes on where it was.

Exit codes: 0 done; 2 refused, or not written (the message says what to change); 130 interrupted; 143 terminated.
"""

Source = Annotated[str, typer.Argument(metavar="MODEL", help="A folder with a safetensors checkpoint, or a hub id.")]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="The new folder.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.", show_default=False)]
MaxSize = Annotated[str, typer.Option(help="Most bytes of a file of weights, such as 5GB.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a checkpoint that is in OUT, with all in its folder.")
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Read MODEL again, and compare with what is on the disk. Takes twice the time.")
]
Upload = Annotated[
    str | None,
    typer.Option(metavar="REPO", help="Upload OUT to this hub id, made private if it is new.", show_default=False),
]
Dtype = Literal["bfloat16", "float16", "float32"]


def quantize(
    model: Source,
    out: Target,
    *,
    quant_type: Annotated[Literal["nf4", "fp4"], typer.Option("--type", help="The 4-bit data type.")] = "nf4",
    blocksize: Annotated[int, typer.Option(help="Elements that share one statistic, a power of 2 from 32 on.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Quantize the statistics too.")] = True,
    quant_storage: Annotated[
        Literal["uint8", "bfloat16", "float16", "float32"],
        typer.Option(help="Dtype that packs the weights; the same bytes whatever it is."),
    ] = "uint8",
    experts: Annotated[Experts, typer.Option(help=EXPERTS_HELP)] = "4bit",
    skip_modules: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX",
            help="Leave modules in 16 bits in whose names this is found. Repeatable.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of what is not quantized, and in which the rest is quantized.", show_default="as in MODEL"),
    ] = None,
    max_shard_size: MaxSize = "5GB",
    overwrite: Overwrite = False,
    verify: Verify = False,
    upload: Upload = None,
    model_revision: Revision = None,
) -> None:
    """Write MODEL to OUT with its linear weights, and experts, in 4 bits, in the format of bitsandbytes."""
    most = parse_size(max_shard_size)
    with in_process_group(), uploading(upload, out):
        import torch

        from surgery.checkpoint import Checkpoint
        from surgery.config import Quant
        from surgery.writing.output import check_output

        quant = Quant(
            quant_type,
            blocksize=blocksize,
            double_quant=double_quant,
            quant_storage=getattr(torch, quant_storage),
            skip_modules=tuple(skip_modules or ()),
            experts=experts == "4bit",
        )
        check_output(out, overwrite=overwrite)
        checkpoint = Checkpoint.open(model, revision=model_revision)
        from surgery.writing.quantize import quantize as write

        write(
            checkpoint,
            out,
            quant=quant,
            dtype=None if dtype is None else getattr(torch, dtype),
            max_shard_bytes=most,
            overwrite=overwrite,
            verify=verify,
        )


def dequantize(
    model: Source,
    out: Target,
    *,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of all weights.", show_default="as they were before they were quantized")
    ] = None,
    max_shard_size: MaxSize = "5GB",
    overwrite: Overwrite = False,
    verify: Verify = False,
    upload: Upload = None,
    model_revision: Revision = None,
) -> None:
    """Write MODEL, which is packed in 4 or 8 bits, to OUT in 16 bits."""
    most = parse_size(max_shard_size)
    with in_process_group(), uploading(upload, out):
        import torch

        from surgery.checkpoint import Checkpoint
        from surgery.writing.output import check_output

        check_output(out, overwrite=overwrite)
        checkpoint = Checkpoint.open(model, revision=model_revision)
        from surgery.writing.quantize import dequantize as write

        write(
            checkpoint,
            out,
            dtype=None if dtype is None else getattr(torch, dtype),
            max_shard_bytes=most,
            overwrite=overwrite,
            verify=verify,
        )


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A folder with a safetensors checkpoint, or a hub id.")],
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER", help="Folders, or hub ids, of LoRA adapters, in this order.")
    ],
    out: Target,
    *,
    weight: Annotated[
        list[float] | None,
        typer.Option(metavar="NUMBER", help="Of each adapter, in their order; repeated.", show_default="1 for all"),
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32", "nf4", "fp4"] | None,
        typer.Option(help="Of the result; nf4 and fp4 pack linear weights.", show_default="as BASE, unpacked"),
    ] = None,
    double_quant: Annotated[bool, typer.Option(help="With nf4 or fp4, quantize the statistics too.")] = True,
    experts: Annotated[
        Experts, typer.Option(help="With nf4 or fp4, whether fused experts are in 4 bits too, or left in 16.")
    ] = "4bit",
    max_shard_size: MaxSize = "5GB",
    overwrite: Overwrite = False,
    upload: Upload = None,
    model_revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a hub id.", show_default="that of the adapter, if it says so"),
    ] = None,
) -> None:
    """Write BASE to OUT with LoRA adapters merged into it, so that it loads without PEFT."""
    most = parse_size(max_shard_size)
    with in_process_group(), uploading(upload, out):
        from surgery.config import Quant
        from surgery.writing.output import check_output

        check_output(out, overwrite=overwrite)
        from surgery.writing.merge import DTYPES
        from surgery.writing.merge import merge as write

        write(
            base,
            adapters,
            out,
            weights=weight or (),
            dtype=DTYPES.get(dtype or ""),
            quant=Quant(dtype, double_quant=double_quant, experts=experts == "4bit")
            if dtype in ("nf4", "fp4")
            else None,
            revision=model_revision,
            overwrite=overwrite,
            max_shard_bytes=most,
        )


def convert(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A folder, or a hub id, of a LoRA adapter.")],
    out: Target,
    *,
    format: Annotated[Literal["vllm"], typer.Option(help="Who reads it.")] = "vllm",  # noqa: A002, ARG001
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The base model, whose names are asked for.",
            show_default="the one that adapter_config.json names",
        ),
    ] = None,
    model_revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a hub id.", show_default="that of the adapter, if it says so"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is in OUT.")] = False,
    upload: Upload = None,
) -> None:
    """Write an adapter in PEFT's format to OUT as a server reads it."""
    with uploading(upload, out):
        from surgery.adapters.convert import convert as write

        write(adapter, out, base=base, revision=model_revision, overwrite=overwrite)
        size = say_size(sum(file.stat().st_size for file in out.glob("*.safetensors")))
        typer.echo(f"Converted {adapter} for vLLM: {size} in {out}", err=True)


@contextmanager
def in_process_group() -> Iterator[None]:
    """A block in the process group that torchrun describes; in none where there is one process."""
    from surgery.comm.environment import launched_world_size, local_rank

    if (launched_world_size() or 1) == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() or 0)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def uploading(repo: str | None, folder: Path) -> Iterator[None]:
    """A block that makes `folder`, which is then uploaded by the first rank; the hub is asked for `repo` before it."""
    from surgery.comm.environment import launched_rank

    if repo is None or launched_rank():
        yield
        return
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repo = api.create_repo(repo, private=True, exist_ok=True).repo_id
    # Across its releases, errors of the libraries below it have no root in common but Exception.
    except Exception as error:
        raise ConfigError(
            f"--upload: {repo} cannot be made, or written to: {type(error).__name__}: {error}; log in with `hf auth "
            "login`, or set HF_TOKEN"
        ) from error
    yield
    try:
        api.upload_folder(repo_id=repo, folder_path=folder)
    except Exception as error:
        raise ExportError(
            f"{folder} is whole, and its upload to {repo} has failed: {type(error).__name__}: {error}; go on with "
            f"`hf upload {repo} {folder}`"
        ) from error
