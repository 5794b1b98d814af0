"""Diagnosis: what stock libraries would do with the settings of a job, and the line that changes it. No GPU needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from packaging.version import Version

from surgery.doctor.settings import Settings
from surgery.planning.advice import advise
from surgery.planning.plan import MemoryPlan
from surgery.planning.verdict import OUTSIDE_ALLOCATOR, fits_gpu
from surgery.telemetry.numbers import say_size

__all__ = ["Finding", "Job", "diagnose"]

WIDTHS = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that stock libraries would do wrong, or a rank would run out of memory for.

    because: the settings that lead to it, with their sources. line: to be added. remedied: what remedies it already.
    """

    id: str
    what: str
    because: str
    line: str
    remedied: str = ""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training job: its settings, the host and the versions that it would run with.

    world_size: number of ranks. is_assumed: whether nothing says so. device: that they compute on. is_here: whether
    this host has such a device, so that verdicts are of what it does. gpu_memory: bytes of each GPU, if known. script:
    what a user types for it. verdicts: of patches, by id. applied: ids of patches that would be applied already.
    bundle: ids of the patches of `surgery.low_memory`. low_memory: where the job uses that, or "". plan, whole: memory
    plans of this job, and of one rank that holds the whole model, if they can be made.
    """

    settings: Settings
    world_size: int
    device: Literal["cuda", "cpu"]
    is_here: bool = True
    is_assumed: bool = False
    script: str = "SCRIPT"
    versions: Mapping[str, str]
    verdicts: Mapping[str, str]
    applied: Collection[str] = ()
    bundle: Collection[str] = ()
    low_memory: str = ""
    gpu_memory: int | None = None
    plan: MemoryPlan | None = field(default=None, repr=False)
    whole: MemoryPlan | None = field(default=None, repr=False)

    @property
    def fsdp(self) -> int:
        """The version of FSDP by which stock would shard; 0 if it would not, whatever is asked for."""
        taken = self.device == "cuda" or "accelerate.fsdp-on-cpu" in self.applied
        return self.settings.fsdp_version if taken and self.world_size > 1 else 0

    def started_by(self, *options: str) -> str:
        """The command that runs the job, unchanged, in `surgery.low_memory()`."""
        launcher = f"torchrun --nproc-per-node {self.world_size} -m " if self.world_size > 1 else ""
        return " ".join((f"{launcher}surgery run", *options, self.script))

    @property
    def low_memory_line(self) -> str:
        """The line to add where `surgery.low_memory()` is a remedy."""
        instead = f"or, changing nothing, start it by: {self.started_by()}"
        return f"with surgery.low_memory(): around what loads the model; {instead}"

    @property
    def untrusted(self) -> list[str]:
        """Patches of `surgery.low_memory` that are not known to work here, so that none of them would be applied."""
        return [patch for patch in self.bundle if self.verdicts.get(patch) not in {"needed", "obsolete"}]

    def is_needed(self, patch: str) -> bool:
        """Whether the defect that `patch` mends is present in the installed versions, on this host."""
        return self.verdicts.get(patch) == "needed"

    def has(self, distribution: str, least: str, below: str = "9999") -> bool:
        """Whether that is installed, in a version from `least` on and before `below`."""
        version = self.versions.get(distribution)
        return version is not None and Version(least) <= Version(version) < Version(below)

    def finding(self, id_: str, what: str, *because: str, patch: str = "") -> Finding:
        """A finding that `surgery.low_memory()` remedies; or else `patch`, if one is named."""
        if patch:
            line = f"PATCHES_APPLY={patch} to the environment, or start it by: {self.started_by(f'--apply {patch}')}"
            remedied = patch if patch in self.applied else ""
            return Finding(id=id_, what=what, because=self.settings.say(*because), line=line, remedied=remedied)
        remedied = "" if self.untrusted else self.low_memory
        line = self.low_memory_line
        return Finding(id=id_, what=what, because=self.settings.say(*because), line=line, remedied=remedied)


def diagnose(job: Job) -> list[Finding]:
    """Everything that applies to this job, what is worst first."""
    return [finding for look in LOOKS for finding in look(job)]


def _bundle(job: Job) -> Iterator[Finding]:
    if job.untrusted:
        told = ", ".join(f"{patch} is {job.verdicts.get(patch)}" for patch in job.untrusted)
        what = f"surgery.low_memory() would change nothing here: {told}"
        line = "the versions that `patches check low-memory` asks for"
        yield Finding(id="low-memory-does-not-apply", what=what, because="", line=line)


def _fsdp_on_cpu(job: Job) -> Iterator[Finding]:
    asked = job.settings.fsdp_version
    if not asked or job.device == "cuda" or job.world_size == 1:
        return
    because = ("fsdp", "fsdp.version", "use_cpu")
    if asked == 1:
        what = "FSDP1 does not run without an accelerator: accelerate fails, or takes it for DDP and says nothing"
        line = "fsdp_version 2, and to the environment PATCHES_APPLY=accelerate.fsdp-on-cpu"
        yield Finding(id="fsdp1-on-cpu", what=what, because=job.settings.say(*because), line=line)
    elif "accelerate.fsdp-on-cpu" in job.applied or job.is_needed("accelerate.fsdp-on-cpu"):
        what = "accelerate takes FSDP for DDP on ranks without an accelerator, and says nothing: nothing is sharded"
        yield job.finding("fsdp-taken-for-ddp", what, *because, patch="accelerate.fsdp-on-cpu")


def _corruption(job: Job) -> Iterator[Finding]:
    """A group of parameters of one 16-bit dtype is copied as numbers; one of several dtypes is not."""
    storage, dtype = job.settings.storage, job.settings.word("dtype")
    is_copied = storage in {"bfloat16", "float16"} and dtype in {"", "auto", storage}
    mended = job.is_here and job.verdicts.get("torch.fsdp2-bit-exact-gather") == "obsolete"
    if job.fsdp == 2 and job.device == "cuda" and is_copied and not mended:
        what = (
            f"FSDP2 gathers 4-bit weights packed as {storage} as numbers, and rewrites every NaN among them: about one "
            "packed word in a thousand is not what was quantized, silently, on every rank"
        )
        yield job.finding("silent-corruption", what, "fsdp", "fsdp.version", "bnb_4bit_quant_storage", "dtype")


def _cast(job: Job) -> Iterator[Finding]:
    """Mixed precision of FSDP casts packed weights, as if they were numbers."""
    storage, precision = job.settings.storage, job.settings.precision
    if not job.fsdp or not precision or storage in {"", "uint8", precision}:
        return
    same = WIDTHS.get(storage) == WIDTHS[precision]
    effect = "without an error: every 4-bit weight is garbage" if same else "which fails, since the sizes differ"
    what = f"mixed precision in {precision} casts 4-bit weights packed as {storage}, {effect}"
    yield _of_storage(job, "packed-weights-cast", what, precision, "bf16", "fp16", "mixed_precision")


def _of_storage(job: Job, id_: str, what: str, storage: str, *because: str) -> Finding:
    """A finding that another storage remedies; of a packed model that is `surgery.low_memory`'s, a view."""
    if job.settings.is_packed:
        return job.finding(id_, what, *because, "bnb_4bit_quant_storage")
    line = f"bnb_4bit_quant_storage=torch.{storage} in BitsAndBytesConfig(...)"
    return Finding(id=id_, what=what, because=job.settings.say(*because, "bnb_4bit_quant_storage"), line=line)


def _uint8(job: Job) -> Iterator[Finding]:
    if job.settings.storage != "uint8" or not job.fsdp:
        return
    because = ("fsdp", "fsdp.version", "load_in_4bit", "bnb_4bit_quant_storage")
    if job.fsdp == 1:
        what = "FSDP1 cannot flatten 4-bit weights packed as uint8, bitsandbytes' default, and fails"
        storage = job.settings.precision or "bfloat16"
        yield _of_storage(job, "storage-cannot-be-flattened", what, storage, *because[:-1])
        return
    what = "accelerate leaves 4-bit weights packed as uint8, bitsandbytes' default, out of FSDP2: every rank keeps all"
    finding = job.finding("replicated-weights", what, *because)
    if job.has("torch", "2.13") or job.settings.is_packed:
        yield finding
    else:  # FSDP2 cannot shard integers before
        line = f"bnb_4bit_quant_storage=torch.bfloat16 in BitsAndBytesConfig(...), and {job.low_memory_line}"
        yield Finding(id=finding.id, what=what, because=finding.because, line=line)


def _empty_adapter(job: Job) -> Iterator[Finding]:
    is_wrapped = job.fsdp == 1 or (job.fsdp == 2 and job.settings.is_on("fsdp.activation_checkpointing"))
    is_adapted = job.settings.is_on("use_peft") or job.settings.is_on("load_in_4bit")
    if is_wrapped and is_adapted and job.has("peft", "0.21.0", "0.21.3"):
        what = f"peft {job.versions['peft']} saves an adapter of wrapped layers without any weights, silently"
        because = ("fsdp", "fsdp.version", "fsdp.activation_checkpointing", "use_peft")
        yield job.finding("empty-adapter", what, *because, patch="peft.adapter-keys-under-wrappers")


def _repacking(job: Job) -> Iterator[Finding]:
    evaluates = job.settings.is_on("eval_strategy")
    if not evaluates or job.device != "cpu" or not job.settings.storage:
        return
    if not job.is_needed("bitsandbytes.keep-packing"):  # a CPU without AVX512-BF16
        return
    effect = "and everything computed from then on is wrong" if job.fsdp else "and not exactly back"
    what = f"the first evaluation on this CPU repacks 4-bit weights in place, with a loss, {effect}"
    yield job.finding("evaluation-repacks", what, "eval_strategy", "use_cpu", "load_in_4bit")


def _reads(job: Job) -> Iterator[Finding]:
    """Tell those who load 4 bits; and of the others, those who asked for more, and get it no longer."""
    asked = job.settings.is_on("load_in_4bit") or job.settings.is_on("fsdp.cpu_ram_efficient_loading")
    if job.world_size == 1 or not job.settings.fsdp_version or not asked or not job.has("transformers", "5"):
        return
    size = "" if job.whole is None else f", {say_size(job.whole.of_rank(0).bytes_read)} each"
    efficient = job.settings.is_on("fsdp.cpu_ram_efficient_loading")
    what = f"each of {job.world_size} ranks reads{' and holds' if job.fsdp else ''} the whole checkpoint{size}"
    what += ": transformers 5 heeds cpu_ram_efficient_loading no longer" if efficient else ""
    because = ("world_size", "fsdp", "fsdp.cpu_ram_efficient_loading", "load_in_4bit")
    yield job.finding("every-rank-reads-everything", what, *because)


def _memory(job: Job) -> Iterator[Finding]:
    if job.gpu_memory is None or job.plan is None or job.whole is None or job.device == "cpu":
        return
    memory = say_size(job.gpu_memory)
    if not fits_gpu(job.plan, job.gpu_memory):
        peak = say_size(job.plan.device_peak)
        advice = advise(job.plan, job.gpu_memory - OUTSIDE_ALLOCATOR)
        line = "GPUs with more memory, or a smaller model" if advice is None else " ".join(advice.options)
        what = f"a training step is planned to need {peak} of a GPU of {memory}, however the model is loaded"
        because = job.settings.say("model", "world_size", "per_device_train_batch_size", "max_length")
        yield Finding(id="out-of-memory", what=what, because=because, line=f"as surgery plan calls it: {line}")
    elif not fits_gpu(job.whole, job.gpu_memory):
        held = say_size(job.whole.device_peak)
        what = f"every rank loads the whole model to its GPU before it is sharded: {held} of {memory}, out of memory"
        yield job.finding("out-of-memory-while-loading", what, "model", "fsdp", "load_in_4bit")


LOOKS: tuple[Callable[[Job], Iterator[Finding]], ...] = (
    _bundle,
    _fsdp_on_cpu,
    _corruption,
    _cast,
    _uint8,
    _empty_adapter,
    _repacking,
    _memory,
    _reads,
)
