"""The command `surgery run`: somebody's script, unchanged, inside `surgery.low_memory()`."""

from __future__ import annotations

import builtins
import gc
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module, util
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Annotated, Any, TypeAlias

import typer

from surgery.errors import ConfigError
from surgery.planning.arguments import QuantType
from surgery.step.kernels import KERNELS_HELP, chosen_kernels

__all__ = ["EPILOG", "SCRIPT", "Apply", "OfExperts", "OfKernels", "low_memory", "run", "run_as_main", "script_of"]

INTERRUPTED = 130

#: Packages before the first of which `surgery.low_memory()` begins: those that it changes, and those that import them.
LIBRARIES = frozenset({"accelerate", "peft", "transformers", "trl"})

#: What `sys.exit` takes.
ExitCode: TypeAlias = "int | str | None"

#: Settings of a command whose last arguments are a script and its own, which begins with no option of the command.
SCRIPT = {"allow_interspersed_args": False, "ignore_unknown_options": True}

EPILOG = """
Examples

Two ranks, each of which reads, quantizes and keeps its own part of the model:

  torchrun --nproc-per-node 2 -m surgery run sft.py --load_in_4bit --fsdp

The same by accelerate's launcher, and a module in place of a file:

  accelerate launch -m surgery run sft.py --load_in_4bit

  surgery run -m trl.scripts.sft --load_in_4bit

Fused experts in 4 bits too, which transformers would leave in 16:

\b
  torchrun --nproc-per-node 2 -m surgery run --experts nf4 \\
    sft.py --load_in_4bit

Without a GPU, where accelerate would take FSDP for DDP:

\b
  torchrun --nproc-per-node 2 -m surgery run --apply accelerate.fsdp-on-cpu \\
    sft.py --use_cpu

Exit codes: those of the script; 2 refused, before it began.
"""

Apply: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(metavar="IDS", help="Further patches to apply, separated by commas, as `patches list` names them."),
]


OfExperts: TypeAlias = Annotated[
    QuantType | None,
    typer.Option(help="4-bit type of fused experts.", show_default="16 bits, if SCRIPT says no other"),
]


OfKernels: TypeAlias = Annotated[
    str | None, typer.Option(metavar="NAMES", help=KERNELS_HELP, show_default="those of PEFT and transformers")
]


def run(
    command: Annotated[
        list[str],
        typer.Argument(metavar="SCRIPT ARGS...", help="`script.py ...` or `-m module ...`.", show_default=False),
    ],
    *,
    apply: Apply = None,
    experts: OfExperts = None,
    kernels: OfKernels = None,
) -> None:
    """Run SCRIPT, unchanged, inside `surgery.low_memory()`. Each rank reads what it keeps, and no more."""
    script_of(command)
    with low_memory(apply, experts, kernels):
        code = run_as_main(command)
    raise SystemExit(code)


def script_of(command: Sequence[str]) -> Path | None:
    """The file of the script that a command line names; None for a module. Raises `ConfigError` if it names neither."""
    first, *others = command
    if first == "-m" and others:
        return None
    path = Path(first)
    if first.startswith("-") or not path.is_file():
        what = (
            "-m alone"
            if first == "-m"
            else f"{first!r:.80}, " + ("an option that is not here" if first.startswith("-") else "which is no file")
        )
        raise ConfigError(
            f"expected the file of a script, or -m and a module, found {what}; options of this command come before it"
        )
    return path


@contextmanager
def low_memory(
    apply: Sequence[str] | None = None, experts: QuantType | None = None, kernels: str | None = None
) -> Iterator[None]:
    """`surgery.low_memory()`, from when the first of `LIBRARIES` is imported, and further patches of what they change.

    Nothing is imported before that, since libraries read the environment then, where a script may have set something.
    """
    import model_surgery_patches as patches
    import surgery

    chosen = chosen_kernels(kernels)
    ids = [word.strip() for words in apply or () for word in words.split(",") if word.strip()]
    options: dict[str, Any] = {"experts": experts, "kernels": chosen}
    with ExitStack() as stack:
        first = _BeforeFirst(LIBRARIES, lambda: stack.enter_context(surgery.low_memory(**options)))
        stack.callback(first.watch())
        stack.enter_context(patches.transaction(*ids, reason="--apply", deferred=True))
        yield


class _BeforeFirst(MetaPathFinder, Loader):
    """A finder that does something before the first of some packages is imported, by whoever imports it.

    To look for one of them is not to import it.
    """

    def __init__(self, names: Collection[str], act: Callable[[], object]) -> None:
        self._names = names
        self._act = act
        self._is_quiet = False

    def watch(self) -> Callable[[], None]:
        """Begin, or act at once if one is there; the returned function ends it."""
        if sys.modules.keys().isdisjoint(self._names):
            sys.meta_path.insert(0, self)
        else:
            self._act()
        return self._end

    def _end(self) -> None:
        self._is_quiet = True
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module as other finders find it, to be loaded by this."""
        if self._is_quiet or fullname not in self._names:
            return None
        self._is_quiet = True  # others may ask each other in turn
        try:
            found = util.find_spec(fullname)
        finally:
            self._is_quiet = False
        return None if found is None else ModuleSpec(fullname, self, origin=found.origin)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Act; then the module, which the import system takes for a new one."""
        self._end()
        self._act()
        module = import_module(spec.name)
        spec.loader_state = dict(vars(module))  # of which the import system replaces some
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Execute nothing: it has been. Leave it as it was then."""
        assert module.__spec__ is not None
        before = module.__spec__.loader_state
        for name in vars(module).keys() - before.keys():
            delattr(module, name)
        vars(module).update(before)


def run_as_main(command: Sequence[str]) -> ExitCode:
    """Run a script or a module as `__main__` of this process, as `python script.py ...` would; return its exit code.

    `sys.argv` and `sys.path[0]` are the script's, also afterwards: what it has registered to run at exit may use them.
    An exception goes to `sys.excepthook`, with the script's own frames. Nothing here refers to what the script has
    made afterwards, so that its models are collected.
    """
    before = sys.modules["__main__"]
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a rank that waits in a collective would not heed a handler
    try:
        _execute(command)
    except SystemExit as end:
        return end.code
    except BaseException as error:  # noqa: BLE001 - as at the end of Python
        sys.excepthook(type(error), error.with_traceback(_frames_of_script(error.__traceback__)), error.__traceback__)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    finally:
        sys.modules["__main__"] = before
        gc.collect()
    return None


def _execute(command: Sequence[str]) -> None:
    path = script_of(command)
    folder = str(Path.cwd() if path is None else path.resolve().parent)
    if not sys.flags.safe_path:
        sys.path[0] = folder
    if path is None:
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = list(command)
    module = ModuleType("__main__")
    vars(module)["__builtins__"] = builtins
    module.__file__ = os.path.abspath(path)  # noqa: PTH100 - which follows no link, as Python does not
    sys.modules["__main__"] = module
    # Not runpy: it would make argv[0] absolute too, and copies the globals, where pickle looks for their originals.
    exec(compile(path.read_bytes(), module.__file__, "exec", dont_inherit=True), vars(module))  # noqa: S102


def _frames_of_script(traceback: TracebackType | None) -> TracebackType | None:
    while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    return traceback
