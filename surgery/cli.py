"""The command line: its commands, and expected errors as messages and exit codes."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec

import typer

from model_surgery_patches import PatchError
from surgery.doctor.command import EPILOG as DOCTOR_EPILOG
from surgery.doctor.command import doctor
from surgery.errors import SurgeryError
from surgery.finetune.command import EPILOG as FINETUNE_EPILOG
from surgery.finetune.command import finetune
from surgery.planning.command import EPILOG as PLAN_EPILOG
from surgery.planning.command import plan
from surgery.run import EPILOG as RUN_EPILOG
from surgery.run import SCRIPT, run
from surgery.tracing.command import EPILOG as TRACE_EPILOG
from surgery.tracing.command import trace

__all__ = ["app", "main"]

REFUSED = 2
INTERRUPTED = 130
TERMINATED = 143

P = ParamSpec("P")

app = typer.Typer(
    name="surgery",
    help="Build, quantize, adapt and shard models one layer at a time.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Build, quantize, adapt and shard models one layer at a time."""
    # A Typer app with a single command and no callback would take that command's place.


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
        if str(cause) not in "\n".join(lines):
            lines.append(f"  because: {type(cause).__name__}: {cause}")
        cause = cause.__cause__
    return "\n".join(lines)


def _say(message: str) -> None:
    """Print for all from rank 0; another rank prints one line, in case that it alone has failed."""
    rank = os.environ.get("RANK", "0")
    text = message if rank == "0" else f"rank {rank}: {message.splitlines()[0]}"
    typer.echo(text, err=True)


app.command(name="doctor", epilog=DOCTOR_EPILOG, context_settings=SCRIPT)(reports_errors(doctor))
app.command(name="finetune", epilog=FINETUNE_EPILOG)(reports_errors(finetune))
app.command(name="plan", epilog=PLAN_EPILOG)(reports_errors(plan))
app.command(name="run", epilog=RUN_EPILOG, context_settings=SCRIPT)(reports_errors(run))
app.command(name="trace", epilog=TRACE_EPILOG)(reports_errors(trace))


def main() -> None:
    """The console script."""
    app()
