"""Run a training script unchanged, and write what it did: one JSON object a line, a file a rank.

    torchrun --nproc-per-node 2 tools/trials/observed.py [--low-memory] FOLDER SCRIPT ARGUMENTS...

`--low-memory` runs `surgery run SCRIPT ARGUMENTS...` instead of the script, and afterwards looks whether everything
that patches touched is again the object that it was. The events: `from_pretrained`, `prepare` and `train_begin` with
the memory of the process, each `loss` that goes backward, each line `log` of Trainer, `done`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

_BEGAN = time.monotonic()


def main() -> None:
    """Observe, run, and say what is left."""
    low_memory = sys.argv[1] == "--low-memory"
    folder, script, *arguments = sys.argv[1 + low_memory :]
    rank = os.environ.get("RANK", "0")
    record = functools.partial(_record, Path(folder) / f"rank{rank}.jsonl")
    observe(record)
    before = touched() if low_memory else {}
    code = _exit_code(functools.partial(_run, script, arguments, low_memory=low_memory))
    gc.collect()
    left = [name for name, (owner, attribute, held) in before.items() if _held(owner, attribute) is not held]
    record("done", touched=len(before), left=left, code=code, **memory())
    sys.exit(code)


def _run(script: str, arguments: list[str], *, low_memory: bool) -> None:
    """Do what `python script arguments` does, or `python -m surgery run script arguments`."""
    if low_memory:
        sys.argv = ["surgery", "run", script, *arguments]
        runpy.run_module("surgery", run_name="__main__", alter_sys=True)
        return
    sys.path.insert(0, str(Path(script).resolve().parent))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def observe(record: Callable[..., None]) -> None:
    """Report from the functions that every such script comes through."""
    from accelerate import Accelerator
    from transformers import PreTrainedModel
    from transformers.trainer_callback import CallbackHandler

    def loaded(result: Any, seconds: float) -> None:
        model = result[0] if isinstance(result, tuple) else result
        record("from_pretrained", seconds=seconds, **held(model), **memory())

    def prepared(result: Any, seconds: float) -> None:
        record("prepare", seconds=seconds, parameters=kinds(result), **memory())

    _around(PreTrainedModel, "from_pretrained", lambda _: record("load", **memory()), loaded)
    _around(Accelerator, "prepare", after=prepared)
    _around(Accelerator, "backward", lambda args: record("loss", value=float(args[1].detach())))
    _around(CallbackHandler, "on_train_begin", lambda _: record("train_begin", **memory()))
    _around(CallbackHandler, "on_log", lambda args: record("log", logs=args[4]))


def held(model: Any) -> dict[str, Any]:
    """Bytes that the parameters of `model` take in memory, and how many parameters there are by class."""
    classes: dict[str, int] = {}
    storages: dict[int, int] = {}
    for parameter in model.parameters():
        classes[type(parameter).__name__] = classes.get(type(parameter).__name__, 0) + 1
        if not parameter.is_meta:
            storage = parameter.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return {"parameter_bytes": sum(storages.values()), "classes": classes}


def kinds(prepared: Any) -> dict[str, int]:
    """Number of parameters by dtype and by whether they are trained, of the modules among what was prepared."""
    found: dict[str, int] = {}
    for module in prepared if isinstance(prepared, tuple | list) else (prepared,):
        for parameter in module.parameters() if isinstance(module, nn.Module) else ():
            kind = f"{parameter.dtype} {'trained' if parameter.requires_grad else 'frozen'}"
            found[kind] = found.get(kind, 0) + 1
    return found


def memory() -> dict[str, int]:
    """Resident bytes of this process: now, without pages of files, and the most since it was started."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    return {"resident": found["VmRSS"], "anonymous": found["RssAnon"], "peak": found["VmHWM"]}


def touched() -> dict[str, tuple[Any, str, Any]]:
    """Target of each patch there is -> its owner, its attribute, and the object there now (None if inherited)."""
    import model_surgery_patches as patches

    places = {}
    for patch_id in patches.ids():
        for target in patches.get(patch_id).targets:
            module, path = str(target).split(":")
            owner, _, attribute = path.rpartition(".")
            with contextlib.suppress(ImportError, AttributeError):
                importlib.import_module(module)
                place = pkgutil.resolve_name(f"{module}:{owner}" if owner else module)
                places[str(target)] = (place, attribute, _held(place, attribute))
    return places


def _held(owner: Any, attribute: str) -> Any:
    return vars(owner).get(attribute)


def _record(file: Path, event: str, **values: Any) -> None:
    line = {"event": event, "at": round(time.monotonic() - _BEGAN, 2), **values}
    with file.open("a") as stream:
        stream.write(json.dumps(line, default=str) + "\n")


def _around(
    owner: Any,
    name: str,
    before: Callable[[tuple[Any, ...]], None] = lambda _: None,
    after: Callable[[Any, float], None] = lambda _, __: None,
) -> None:
    original = vars(owner)[name]
    function = original.__func__ if isinstance(original, classmethod) else original

    @functools.wraps(function)
    def observed(*args: Any, **kwargs: Any) -> Any:
        before(args)
        began = time.monotonic()
        result = function(*args, **kwargs)
        after(result, time.monotonic() - began)
        return result

    setattr(owner, name, classmethod(observed) if isinstance(original, classmethod) else observed)


def _exit_code(run: Callable[[], Any]) -> int:
    try:
        run()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


if __name__ == "__main__":
    main()
