"""Check `surgery.capture` on the GPU at hand, or on several ranks with FSDP2; prints a JSON line for each part.

    PYTHONPATH=. python tools/gpu_graphs.py
    PYTHONPATH=. torchrun --nproc-per-node 2 tools/gpu_graphs.py
    PYTHONPATH=. python tools/gpu_graphs.py CHECKPOINT --steps 12 --fused

Without a checkpoint it makes a Llama of 8 blocks with the sizes of an 8B model. A part that fails is printed with its
traceback, and the next one runs. Results are exact comparisons: eager steps and captured ones from the same seed, with
deterministic kernels, without cuDNN's attention, whose backward is not. Seconds are measured with the usual kernels. On
a CPU, where nothing is captured, a tiny model runs eagerly through every part.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products ask for

import torch
import torch.distributed as dist
from peft import LoraConfig

import surgery
from checkpoints.folder import build, is_complete
from checkpoints.llama import SHAPES
from checkpoints.synthetic import SyntheticCheckpoint
from loading.profiling import kernels

WARMUP = 3
GIB = 1 << 30


@dataclass(kw_only=True)
class Session:
    """The command line, and where this rank runs; `notes` are lines that surgery has logged since they were read."""

    options: argparse.Namespace
    device: torch.device
    rank: int = 0
    ranks: int = 1
    folder: str = ""
    notes: list[str] = field(default_factory=list)

    def say(self, part: str, **found: Any) -> None:
        """Print a line, with what was logged."""
        found = {"part": part, "rank": self.rank, **found}
        if self.notes:
            found["logged"] = self.notes.copy()
            self.notes.clear()
        print(json.dumps(found, default=str), flush=True)

    def attempt(self, part: str, function: Callable[[], dict[str, Any]]) -> None:
        """Say what `function` finds, or how it fails."""
        try:
            self.say(part, **function())
        except Exception as error:  # noqa: BLE001  # whatever it is, the other parts are of use
            self.say(part, error=f"{type(error).__name__}: {error}"[:2000], traceback=traceback.format_exc())


class Notes(logging.Handler):
    """Keeps what surgery logs, with the traceback that comes with it."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__()
        self.notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one line."""
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + "".join(traceback.format_exception(*record.exc_info))
        self.notes.append(text[-6000:])


def main() -> None:
    """Run every part."""
    session = begin()
    on_cuda = session.device.type == "cuda"
    session.say("environment", torch=torch.__version__, device=torch.cuda.get_device_name() if on_cuda else "cpu")
    session.attempt("checkpoint", lambda: make(session))
    torch.use_deterministic_algorithms(True)  # not warn_only: flash attention would stay as it is
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.enable_cudnn_sdp(enabled=False)
    runs: dict[str, Any] = {}
    for name in ("eager", "eager again", "captured"):
        session.attempt(f"losses, {name}", partial(losses, session, name, runs))
    session.attempt("exact", lambda: compare(runs))
    try_parts(session)
    session.attempt("dropout", lambda: dropout(session))
    session.attempt("checkpointing", lambda: checkpointing(session))
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(enabled=True)
    session.attempt("seconds", lambda: seconds(session))
    if dist.is_initialized():
        dist.destroy_process_group()


def try_parts(session: Session) -> None:
    """Do with a captured model what loops do."""
    model, _ = built(session)
    surgery.capture(model, warmup=WARMUP)
    session.attempt("warm up", lambda: warm_up(session, model))
    parts: dict[str, Callable[[Session, Any], dict[str, Any]]] = {
        "gradients": gradients,
        "accumulation": accumulation,
        "zero_grad in place": zero_in_place,
        "evaluation between": evaluation,
        "two forwards, one backward": two_forwards,
        "backward twice": backward_twice,
        "outputs are kept": outputs_kept,
        "full attention mask": full_mask,
        "padded attention mask": padded_mask,
        "autocast around": autocast,
        "scaled loss and clipping": clipping,
        "no_sync": no_sync,
        "what waits for the GPU": waits,
        "gradients after a failed capture": gradients,
        "moved weights": moved,
    }
    for part, function in parts.items():
        session.attempt(part, partial(function, session, model))
    session.attempt("release", lambda: released(model))


def begin() -> Session:
    """Read the command line; join the other ranks, if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--fused", action="store_true", help="with fused 4-bit LoRA layers")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gpu-graphs")
    options = parser.parse_args()
    on_cuda = torch.cuda.is_available()
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    else:
        options.tokens = min(options.tokens, 32)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if on_cuda else "gloo")
    session = Session(
        options=options, device=device, rank=rank, ranks=dist.get_world_size() if dist.is_initialized() else 1
    )
    logger = logging.getLogger("surgery")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(Notes(session.notes))
    return session


def make(session: Session) -> dict[str, Any]:
    """Make the checkpoint, on rank 0, unless it is there or one was given."""
    session.folder = session.options.checkpoint or ""
    if not session.folder:
        on_cuda = session.device.type == "cuda"
        layers = session.options.layers if on_cuda else 2
        shape = replace(SHAPES["llama-8b" if on_cuda else "llama-tiny"], layers=layers)
        folder = session.options.work / f"llama-{layers}-{session.device.type}"
        synthetic = SyntheticCheckpoint(shape=shape, device=torch.device(session.device.type))
        if session.rank == 0 and not is_complete(folder, synthetic.recipe()):
            with build(folder, synthetic.recipe(), force=True) as draft:
                list(synthetic.write(draft, processes=1))
        session.folder = str(folder)
    if dist.is_initialized():
        dist.barrier()
    return {"folder": session.folder}


def built(session: Session, **lora: Any) -> tuple[Any, torch.optim.Optimizer]:
    """The model of the seed, in training mode, with its optimizer."""
    gc.collect()
    if session.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    model: Any = surgery.qlora(
        session.folder,
        lora=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", **lora),
        shard=surgery.FSDP2() if dist.is_initialized() else None,
        device=session.device,
        kernels=("fused",) if session.options.fused else (),
    )
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained:  # B begins as zeros, and A has no gradient then
            local = getattr(parameter, "_local_tensor", parameter)
            local.add_(torch.randn(local.shape, generator=generator).to(local) * 1e-3)
    return model, torch.optim.AdamW(trained, lr=1e-3, fused=session.device.type == "cuda")


def batch(session: Session, number: int, tokens: int | None = None) -> dict[str, torch.Tensor]:
    """Tokens of this rank, which follow from `number`."""
    generator = torch.Generator().manual_seed(1000 * number + session.rank)
    ids = torch.randint(0, 200, (1, tokens or session.options.tokens), generator=generator).to(session.device)
    return {"input_ids": ids, "labels": ids.clone()}


def grads(model: Any) -> list[torch.Tensor]:
    """Copies of the gradients of this rank, and none any more."""
    there = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    found = [getattr(gradient, "_local_tensor", gradient).clone() for gradient in there]
    model.zero_grad(set_to_none=True)
    return found


def differing(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> dict[str, Any]:
    """Count tensors that differ at all, and find the largest difference relative to the largest value."""
    pairs = list(zip(ours, theirs, strict=True))
    wrong = [pair for pair in pairs if not torch.equal(*pair)]
    worst = max((float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in wrong), default=0.0)
    zeros = sum(not bool(mine.any()) for mine in ours)
    return {"equal": not wrong, "tensors": len(pairs), "differ": len(wrong), "worst": worst, "all zero": zeros}


def eager(model: Any, given: dict[str, torch.Tensor]) -> Any:
    """The model's outputs, past what `capture` has installed."""
    return model._call_impl(**given)


def calls_of(model: Any) -> dict[str, Any]:
    """Count the kinds of calls that `capture` knows, those recorded, and those refused."""
    calls = model._compiled_call_impl
    kinds = list(getattr(calls, "_kinds", {}).values())
    recorded, refused = sum(kind.recording is not None for kind in kinds), sum(kind.refused for kind in kinds)
    return {"kinds": len(kinds), "recorded": recorded, "refused": refused}


def losses(session: Session, name: str, runs: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps as everybody does."""
    model, optimizer = built(session)
    if name == "captured":
        surgery.capture(model, warmup=WARMUP)
    found, kept = [], []
    for number in range(session.options.steps):
        out = model(**batch(session, number))
        out.loss.backward()
        if number == WARMUP:  # the first that is replayed
            mine = [p.grad for p in model.parameters() if p.grad is not None]
            kept = [getattr(gradient, "_local_tensor", gradient).clone() for gradient in mine]
        optimizer.step()
        optimizer.zero_grad()
        found.append(out.loss.detach())
    runs[name] = ([float(loss) for loss in found], kept)
    state = calls_of(model)
    peak = torch.cuda.max_memory_allocated() / GIB if session.device.type == "cuda" else 0
    surgery.release(model)
    return {"losses": runs[name][0], "peak GiB": round(peak, 3), **state}


def compare(runs: dict[str, Any]) -> dict[str, Any]:
    """Captured against eager, and eager against itself."""
    found: dict[str, Any] = {}
    for name in ("eager again", "captured"):
        found[name] = {"losses equal": runs[name][0] == runs["eager"][0], **differing(runs[name][1], runs["eager"][1])}
    return found


def warm_up(session: Session, model: Any) -> dict[str, Any]:
    """Have the calls of the usual shape recorded."""
    for number in range(WARMUP + 1):
        model(**batch(session, number)).loss.backward()
    grads(model)
    return calls_of(model)


def gradients(session: Session, model: Any) -> dict[str, Any]:
    """One batch, each way."""
    given = batch(session, 50)
    out = eager(model, given)
    out.loss.backward()
    theirs, loss = grads(model), float(out.loss)
    out = model(**given)
    out.loss.backward()
    return {"loss equal": float(out.loss) == loss, "replayed": is_replayed(out), **differing(grads(model), theirs)}


def is_replayed(out: Any) -> bool:
    """Whether a loss comes from a replay."""
    return type(out.loss.grad_fn).__name__ == "ReplayBackward"


def accumulation(session: Session, model: Any) -> dict[str, Any]:
    """Three batches into one gradient."""
    given = [batch(session, number) for number in (60, 61, 62)]
    for each in given:
        eager(model, each).loss.backward()
    theirs = grads(model)
    for each in given:
        model(**each).loss.backward()
    return differing(grads(model), theirs)


def zero_in_place(session: Session, model: Any) -> dict[str, Any]:
    """Gradients that are filled with zeros, not dropped, and then scaled in place."""
    given = batch(session, 63)
    eager(model, given).loss.backward()
    theirs = grads(model)
    model(**batch(session, 64)).loss.backward()
    model.zero_grad(set_to_none=False)
    model(**given).loss.backward()
    first = differing(grads(model), theirs)
    model(**given).loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(0.5)
    model.zero_grad(set_to_none=True)
    model(**given).loss.backward()
    return {"in place": first, "after scaling": differing(grads(model), theirs)}


def evaluation(session: Session, model: Any) -> dict[str, Any]:
    """An evaluation after a step, and then another step."""
    given = batch(session, 65)
    model(**given).loss.backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer.step()
    model.zero_grad()
    model.eval()
    with torch.no_grad():
        found, again = float(model(**given).loss), float(eager(model, given).loss)
    model.train()
    out = model(**given)
    out.loss.backward()
    ours = grads(model)
    eager(model, given).loss.backward()
    return {"eval equal": found == again, "replayed": is_replayed(out), **differing(ours, grads(model))}


def two_forwards(session: Session, model: Any) -> dict[str, Any]:
    """Losses of two calls that are added before backward."""
    first, second = batch(session, 66), batch(session, 67)
    (eager(model, first).loss + eager(model, second).loss).backward()
    theirs = grads(model)
    one, two = model(**first), model(**second)
    replayed = [is_replayed(one), is_replayed(two)]
    (one.loss + two.loss).backward()
    return {"replayed": replayed, **differing(grads(model), theirs)}


def backward_twice(session: Session, model: Any) -> dict[str, Any]:
    """A second backward through one forward is refused."""
    out = model(**batch(session, 68))
    out.loss.backward(retain_graph=True)
    try:
        out.loss.backward()
    except RuntimeError as error:
        return {"refused": str(error)}
    finally:
        grads(model)
    return {"refused": None}


def outputs_kept(session: Session, model: Any) -> dict[str, Any]:
    """Outputs of one step are not overwritten by the next."""
    out = model(**batch(session, 69))
    out.loss.backward()
    loss, logits = float(out.loss), out.logits.detach().clone()
    model(**batch(session, 70)).loss.backward()
    grads(model)
    return {"loss kept": float(out.loss) == loss, "logits kept": torch.equal(out.logits.detach(), logits)}


def each_way(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Have calls of another kind recorded, and compare one with an eager one."""
    for _ in range(WARMUP):
        model(**given).loss.backward()
    grads(model)
    eager(model, given).loss.backward()
    theirs = grads(model)
    out = model(**given)
    out.loss.backward()
    return {"replayed": is_replayed(out), **calls_of(model), **differing(grads(model), theirs)}


def full_mask(session: Session, model: Any) -> dict[str, Any]:
    """A mask of ones."""
    given = batch(session, 71)
    return each_way(model, {**given, "attention_mask": torch.ones_like(given["input_ids"])})


def padded_mask(session: Session, model: Any) -> dict[str, Any]:
    """A mask that hides the last tokens."""
    given = batch(session, 72)
    mask = torch.ones_like(given["input_ids"])
    mask[:, -7:] = 0
    return each_way(model, {**given, "attention_mask": mask})


def autocast(session: Session, model: Any) -> dict[str, Any]:
    """Autocast around the call, as in a loop of one's own."""
    with torch.autocast(session.device.type, torch.bfloat16):
        return each_way(model, batch(session, 73))


def clipping(session: Session, model: Any) -> dict[str, Any]:
    """A scaled loss, and gradients that are clipped in place, twice."""
    given, found = batch(session, 74), []
    for call in (eager, eager, lambda model, given: model(**given), lambda model, given: model(**given)):
        (call(model, given).loss * 8).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.1)
        found.append(grads(model))
    return {"first": differing(found[2], found[0]), "second": differing(found[3], found[0])}


def no_sync(session: Session, model: Any) -> dict[str, Any]:
    """Two micro-batches, of which the first does not reduce its gradients."""
    if not dist.is_initialized():
        return {"skipped": "one rank"}
    given = [batch(session, 75), batch(session, 76)]
    found = []
    for call in (eager, lambda model, given: model(**given)):
        for number, each in enumerate(given):
            model.set_requires_gradient_sync(number == 1)
            call(model, each).loss.backward()
        found.append(grads(model))
    return {**differing(found[1], found[0]), "then": gradients(session, model)}


def waits(session: Session, model: Any) -> dict[str, Any]:
    """A forward that reads a value from the GPU: the log says why, and the step is right all the same."""
    inner = next(module for module in model.modules() if type(module).__name__.endswith("DecoderLayer"))
    seen = []
    handle = inner.register_forward_hook(lambda _module, _args, out: seen.append(float(_first(out).flatten()[0])))
    try:
        found = each_way(model, batch(session, 77, session.options.tokens // 2))
    finally:
        handle.remove()
    drawn = torch.nn.functional.dropout(torch.ones(1000, device=session.device), 0.5)
    return {**found, "values read": len(seen), "kept by dropout": float(drawn.count_nonzero())}


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def moved(session: Session, model: Any) -> dict[str, Any]:
    """A trained parameter whose memory is another one's, as after a move to the CPU and back."""
    if dist.is_initialized():
        return {"skipped": "FSDP2 keeps its shards in place"}
    before = calls_of(model)
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.data = parameter.data.clone()
    out = model(**batch(session, 78))
    out.loss.backward()
    grads(model)
    return {"before": before, "replayed": is_replayed(out), "after": calls_of(model)}


def released(model: Any) -> dict[str, Any]:
    """Nothing is left on the model."""
    surgery.release(model)
    return {"left": model._compiled_call_impl is not None}


def dropout(session: Session) -> dict[str, Any]:
    """Dropout draws anew in each replay, and the loss falls."""
    model, optimizer = built(session, lora_dropout=0.5)
    surgery.capture(model, warmup=WARMUP)
    given, found = batch(session, 80), []
    for _ in range(WARMUP):
        model(**given).loss.backward()
    grads(model)
    for _ in range(3):
        out = model(**given)
        found.append(float(out.loss))
        out.loss.backward()
        grads(model)
    for _ in range(10):
        out = model(**given)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = calls_of(model)
    surgery.release(model)
    return {"losses": found, "anew": len(set(found)) == len(found), "after ten steps": float(out.loss), **state}


def checkpointing(session: Session) -> dict[str, Any]:
    """Recomputation in backward."""
    model, _ = built(session)
    surgery.checkpoint_activations(model)
    surgery.capture(model, warmup=WARMUP)
    found = each_way(model, batch(session, 81))
    surgery.release(model)
    return found


def seconds(session: Session) -> dict[str, Any]:
    """Mean seconds of 20 steps, and what the GPU is busy with in one more, each way."""
    on_cuda = session.device.type == "cuda"
    times = 20 if on_cuda else 2
    found: dict[str, Any] = {}
    for name in ("eager", "captured"):
        model, optimizer = built(session)
        if name == "captured":
            surgery.capture(model, warmup=WARMUP)
        given = batch(session, 90)

        def step(model: Any = model, optimizer: Any = optimizer, given: Any = given) -> None:
            model(**given).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(WARMUP + 2):
            step()
        synchronize(session)
        start = time.perf_counter()
        for _ in range(times):
            step()
        synchronize(session)
        found[name] = {"seconds": round((time.perf_counter() - start) / times, 5), **calls_of(model)}
        if on_cuda:
            found[name] |= asdict(kernels(step, synchronize=partial(synchronize, session)))
            found[name]["allocated GiB"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
            found[name]["reserved GiB"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
        surgery.release(model)
        del model, optimizer, step
    found["ratio"] = round(found["captured"]["seconds"] / found["eager"]["seconds"], 3)
    return found


def synchronize(session: Session) -> None:
    """Wait for the GPU."""
    if session.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
