"""The command `surgery generate`: answers to prompts, or a conversation. Nothing heavy is imported before it runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from surgery.planning.arguments import EXPERTS_HELP, Experts, QuantType

if TYPE_CHECKING:
    from surgery.generate.generator import Generator, Message

__all__ = ["EPILOG", "generate"]

EPILOG = """
Examples

What has the adapter learnt? The base model is the one that it names:

  surgery generate --adapter ./adapter --prompt "Who wrote Faust?"

Several prompts, sampled alike each time, as JSON:

\b
  surgery generate ./model --adapter ./adapter --prompt "Hello" \\
    --prompt "Bye" --temperature 0.7 --seed 1 --json

A conversation, where standard input is a terminal and there is no --prompt; its end is Ctrl-D, /reset forgets it:

  surgery generate --adapter ./adapter

A prompt is a message of the user, in the chat template that the tokenizer has; with --raw, or where it has none, it is
text that the model goes on with. Without a terminal and without --prompt, it is what standard input says.

What is not given is as the model's generation_config.json has it.

Exit codes: 0 done; 2 refused (the message says what to change); 130 interrupted; 143 terminated.
"""

DtypeName = Literal["bfloat16", "float16", "float32"]

_of_model = partial(typer.Option, rich_help_panel="Model")
_of_prompts = partial(typer.Option, rich_help_panel="Prompts")
_of_answers = partial(typer.Option, rich_help_panel="Generation (transformers' GenerationConfig)", show_default=False)


def generate(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A folder with a safetensors checkpoint, or a hub id.",
            show_default="the base model that --adapter names",
        ),
    ] = None,
    *,
    prompt: Annotated[list[str] | None, _of_prompts(help="What to answer. Repeatable.", show_default=False)] = None,
    system: Annotated[str | None, _of_prompts(help="The system's message, in a chat template.")] = None,
    raw: Annotated[bool, _of_prompts("--raw", help="Go on with the text of a prompt; no chat template.")] = False,
    as_json: Annotated[bool, _of_prompts("--json", help="Print an object a prompt: prompt, answer, tokens.")] = False,
    adapter: Annotated[
        Path | None, _of_model(help="Folder of an adapter in PEFT's format.", metavar="DIR", show_default=False)
    ] = None,
    model_revision: Annotated[
        str | None, _of_model(help="Branch, tag or commit of a hub id.", show_default=False)
    ] = None,
    quantize: Annotated[bool, _of_model(help="Hold linear weights in 4 bits, as they were in training.")] = True,
    bnb_4bit_quant_type: Annotated[QuantType, _of_model(help="The 4-bit data type.")] = "nf4",
    experts: Annotated[Experts, _of_model(help=EXPERTS_HELP)] = "4bit",
    dtype: Annotated[DtypeName, _of_model(help="Of what is not quantized, and in which it computes.")] = "bfloat16",
    max_new_tokens: Annotated[int, _of_answers(min=1, show_default=True, help="At most so many.")] = 256,
    min_new_tokens: Annotated[int | None, _of_answers(min=0, help="At least so many.")] = None,
    do_sample: Annotated[bool | None, _of_answers(help="Draw tokens, or take the likeliest.")] = None,
    temperature: Annotated[float | None, _of_answers(help="Of what is drawn; implies --do-sample.")] = None,
    top_k: Annotated[int | None, _of_answers(min=1, help="Draw among so many; implies --do-sample.")] = None,
    top_p: Annotated[
        float | None, _of_answers(min=0, max=1, help="Draw among the likeliest of this mass; implies --do-sample.")
    ] = None,
    min_p: Annotated[
        float | None, _of_answers(min=0, max=1, help="Draw none below this part of the likeliest; implies --do-sample.")
    ] = None,
    repetition_penalty: Annotated[float | None, _of_answers(help="Above 1: what was said is less likely.")] = None,
    no_repeat_ngram_size: Annotated[int | None, _of_answers(min=1, help="Say no so many tokens twice.")] = None,
    stop_strings: Annotated[list[str] | None, _of_answers(help="End an answer with this. Repeatable.")] = None,
    seed: Annotated[int, _of_answers(show_default=True, help="Of what is drawn, for each prompt anew.")] = 0,
) -> None:
    """Generate text with MODEL, in 4 bits, and with an adapter."""
    from surgery.generate.generator import Generator, find_base

    options = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "stop_strings": stop_strings or None,
    }
    base = find_base(model, revision=model_revision, adapter=adapter)
    prompts = prompt or _from_stdin()
    with Generator.load(
        base,
        adapter,
        quant_type=bnb_4bit_quant_type if quantize else None,
        experts=experts == "4bit",
        dtype=dtype,
        options={name: value for name, value in options.items() if value is not None},
        seed=seed,
        raw=raw,
    ) as generator:
        first = [] if system is None else [{"role": "system", "content": system}]
        if prompts is None:
            _converse(generator, first)
        for number, text in enumerate(prompts or ()):
            _answer(generator, [*first, {"role": "user", "content": text}], as_json=as_json, apart=number > 0)


def _from_stdin() -> list[str] | None:
    """Read standard input, as one prompt; None for a terminal, at which somebody is to be asked."""
    return None if sys.stdin.isatty() else [sys.stdin.read()]


def _answer(generator: Generator, messages: list[Message], *, as_json: bool, apart: bool) -> None:
    """Print the answer to one prompt, while it is made, or as JSON; with `apart`, below an empty line."""
    if as_json:
        answer = generator.answer(messages)
        found = {"prompt": messages[-1]["content"], "answer": answer.text, "tokens": answer.tokens}
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    if apart:
        typer.echo()
    generator.answer(messages, write=_write)
    typer.echo()


def _converse(generator: Generator, first: list[Message]) -> None:
    """Answer what is typed, with all that was said before, until the end of the input."""
    messages = list(first)
    for text in _typed():
        if text == "/reset":
            messages = list(first)
            continue
        # Text that is gone on with has no turns to remember.
        messages = [*(messages if generator.chats else ()), {"role": "user", "content": text}]
        answer = generator.answer(messages, write=_write)
        typer.echo()
        messages.append({"role": "assistant", "content": answer.text})


def _typed() -> Iterator[str]:
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can then be edited, and recalled
    typer.echo("Type a message; /reset forgets the conversation, Ctrl-D ends it.", err=True)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            typer.echo(err=True)
            return
        if text:
            yield text


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
