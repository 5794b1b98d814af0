"""The command line: its commands, and expected errors as messages and exit codes."""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, Any, ParamSpec

import typer
from typer.core import TyperCommand

from model_surgery_patches import PatchError
from surgery.doctor.command import EPILOG as DOCTOR_EPILOG
from surgery.doctor.command import doctor
from surgery.errors import SurgeryError
from surgery.finetune.command import SETTINGS, dpo, finetune
from surgery.generate.command import EPILOG as GENERATE_EPILOG
from surgery.generate.command import generate
from surgery.planning.command import EPILOG as PLAN_EPILOG
from surgery.planning.command import plan
from surgery.run import EPILOG as RUN_EPILOG
from surgery.run import SCRIPT, run
from surgery.tracing.command import EPILOG as TRACE_EPILOG
from surgery.tracing.command import trace
from surgery.writing.command import CONVERT as CONVERT_EPILOG
from surgery.writing.command import DEQUANTIZE as DEQUANTIZE_EPILOG
from surgery.writing.command import MERGE as MERGE_EPILOG
from surgery.writing.command import QUANTIZE as QUANTIZE_EPILOG
from surgery.writing.command import convert, dequantize, merge, quantize

__all__ = ["app", "main"]

REFUSED = 2
INTERRUPTED = 130
TERMINATED = 143

#: Names of options as TRL and transformers give them, with `_` or `-` in them, as there.
SPELLING: dict[str, Any] = {"token_normalize_func": lambda name: name.replace("_", "-")}

P = ParamSpec("P")

app = typer.Typer(
    name="surgery",
    help="Fine-tune models in 4 bits, sharded by FSDP, where each rank reads its own share.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(*, wanted: bool) -> None:
    if wanted:
        typer.echo(f"surgery {version('model-surgery')}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fine-tune models in 4 bits, sharded by FSDP, where each rank reads its own share."""


class _Command(TyperCommand):
    """A command whose help is plain text, in panels: the tables of rich cut long names of options off."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            title = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if record is not None:
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or title, []).append(record)
        for title, records in panels.items():
            with formatter.section(title):
                formatter.write_dl(records)


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, as torchrun sends it to the ranks that are left; it cleans up as Ctrl-C does."""


@contextmanager
def _heeding_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one shall not stop the cleaning up
    raise TerminatedError


def reports_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Wrap `command`: expected errors go to stderr (exit code 2), Ctrl-C (130) and SIGTERM (143) are quiet.

    Anything else is a bug, here or upstream, and keeps its traceback.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with _heeding_sigterm():
                command(*args, **kwargs)
        except (SurgeryError, PatchError) as error:
            _say(f"error: {_message(error)}")
            raise typer.Exit(REFUSED) from error
        except TerminatedError as error:
            _say("terminated; every patch is undone")
            raise typer.Exit(TERMINATED) from error
        except KeyboardInterrupt as error:
            _say("interrupted; every patch is undone")
            raise typer.Exit(INTERRUPTED) from error

    return run


def _message(error: BaseException) -> str:
    """The message, and under it those of its causes that it does not already contain."""
    lines = [str(error)]
    cause = error.__cause__
    while cause is not None:
        # Of what the system says, the reason alone counts: the message has the path in its own words.
        said = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
        if said not in "\n".join(lines):
            lines.append(f"  because: {type(cause).__name__}: {cause}")
        cause = cause.__cause__
    return "\n".join(lines)


def _say(message: str) -> None:
    """Print for all from rank 0; another rank prints one line, in case that it alone has failed."""
    rank = os.environ.get("RANK", "0")
    text = message if rank == "0" else f"rank {rank}: {message.splitlines()[0]}"
    typer.echo(text, err=True)


app.command(name="finetune", context_settings=SETTINGS)(reports_errors(finetune))
app.command(name="dpo", context_settings=SETTINGS)(reports_errors(dpo))
app.command(name="convert", cls=_Command, epilog=CONVERT_EPILOG)(reports_errors(convert))
app.command(name="dequantize", cls=_Command, epilog=DEQUANTIZE_EPILOG)(reports_errors(dequantize))
app.command(name="doctor", cls=_Command, epilog=DOCTOR_EPILOG, context_settings=SCRIPT)(reports_errors(doctor))
app.command(name="generate", cls=_Command, epilog=GENERATE_EPILOG, context_settings=SPELLING)(reports_errors(generate))
app.command(name="merge", cls=_Command, epilog=MERGE_EPILOG, context_settings=SPELLING)(reports_errors(merge))
app.command(name="plan", cls=_Command, epilog=PLAN_EPILOG, context_settings=SPELLING)(reports_errors(plan))
app.command(name="quantize", cls=_Command, epilog=QUANTIZE_EPILOG)(reports_errors(quantize))
app.command(name="run", cls=_Command, epilog=RUN_EPILOG, context_settings=SCRIPT)(reports_errors(run))
app.command(name="trace", cls=_Command, epilog=TRACE_EPILOG)(reports_errors(trace))


#: Libraries whose remarks are for those who call them, in their code: here nobody does but this command.
LIBRARIES = r"(accelerate|bitsandbytes|datasets|huggingface_hub|peft|torch|torchao|transformers|trl)(\.|$)"

#: Switches of libraries for what they log, and for their bars.
QUIET = {
    **dict.fromkeys(("DATASETS_VERBOSITY", "HF_HUB_VERBOSITY", "TRANSFORMERS_VERBOSITY"), "error"),
    **dict.fromkeys(("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"), "1"),
}


def _quiet_libraries() -> None:
    """Let libraries speak once: on rank 0, and not of their own deprecations. Options that are given to them count."""
    # It misses a package for the layout into which it repacks weights on such a CPU, which ours never are.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    is_first = os.environ.get("RANK", "0") == "0"
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning if is_first else Warning, module=LIBRARIES)
    if is_first:
        return
    logging.getLogger("torchao").setLevel(logging.ERROR)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def main() -> None:
    """The console script."""
    if sys.argv[1:2] not in (["doctor"], ["run"]):  # where somebody's script speaks, unchanged
        _quiet_libraries()
    app()
