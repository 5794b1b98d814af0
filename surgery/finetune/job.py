"""Run a job: check everything, bind the model, let TRL train it, save the adapter, and undo every patch."""

from __future__ import annotations

import functools
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
import transformers
import trl
from packaging.version import Version
from peft import PeftModel
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
)
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOTrainer, SFTTrainer, get_peft_config, get_quantization_config
from trl.chat_template_utils import get_training_chat_template

import model_surgery_patches as patches
import surgery
from surgery import release, reserve, save_adapter, trace
from surgery.adapters.metadata import versions
from surgery.adapters.saved import SavedAdapter
from surgery.checkpoint import Checkpoint
from surgery.comm.collectives import gather_objects
from surgery.comm.comparison import facts_of, same_on_every_rank
from surgery.comm.environment import launched_world_size
from surgery.comm.failures import collective, everyone
from surgery.comm.heartbeat import beating, wait_for_the_others
from surgery.comm.ranks import Ranks, current_ranks, store_holder
from surgery.config import Quant
from surgery.errors import ConfigError
from surgery.finetune.callbacks import Attesting, Capturing, Compiling, Phases, Progress, say
from surgery.finetune.data import Data, check_tokens, read_data
from surgery.finetune.foresight import foresee
from surgery.finetune.options import FLASH
from surgery.finetune.parser import Request
from surgery.finetune.summary import Evaluation, Summary, card_sections, patch_rows, write_summary
from surgery.model.consistency import source_facts
from surgery.planning.arguments import offloads_shards, parse_mesh, require_recordable
from surgery.planning.plan import MemoryPlan
from surgery.planning.verdict import check_fits, free_memory, predictions
from surgery.step.kernels import chosen_kernels
from surgery.telemetry.report import Report
from surgery.tracing.folder import PAGE, start_afresh
from surgery.writing.cache import packed_in

__all__ = ["plan_alone", "run"]

#: The first release of TRL whose loss can be recorded.
TRL_OF_GRAPHS = Version("1.16")


def run(request: Request, *, console: Console | None = None) -> Summary:
    """Fine-tune as `request` says; to be called on all ranks alike.

    Rank 0 shows progress on `console` (default: stdout), and keeps the output folder from other jobs. On return, and on
    any exception, `KeyboardInterrupt` included, the patches that the job applied are undone; the adapter in the output
    folder is replaced only if training has finished.

    Raises:
        DataError, ConfigError, CheckpointError: before any weight is read.
        AdapterError: the adapter cannot be saved; what was there is as it was.
        PassError, PeerError: the model could not be filled, here or on another rank.
        TrainingError: the loss is not finite.
        AttestationError: 4-bit weights are not what was quantized; nothing is saved.
    """
    console = console or Console()
    earlier = len(patches.audit(include_reverted=True))
    is_guest = dist.is_initialized()
    training = request.training(**_decided(request))
    if _world_size() == 1:
        training._n_gpu = min(training.n_gpu, 1)  # or Trainer takes all GPUs by DataParallel, which TRL refuses
    ranks = current_ranks(launched_world_size())
    with (
        _together(ranks, is_guest=is_guest),
        # First of all: what is found out after training is found out too late.
        reserve(request.output, overwrite=request.options.overwrite or _may_resume(request), device=training.device),
    ):
        job = _prepare(request, training, ranks, console if ranks.rank == 0 else None)
        untraced = nullcontext(Report(show_progress=ranks.rank == 0, device=training.device))
        folder = request.options.trace
        with untraced if folder is None else trace(folder, device=training.device) as report:
            summary = job.run(report)
        summary = replace(summary, patches=patch_rows(since=earlier))
        if job.console is not None:
            write_summary(summary, request.output / "summary.json")
            say(job.console, f"\n{summary.text()}")
            if folder is not None:
                say(job.console, f"Trace: {Path(folder) / PAGE}")
    return summary


def plan_alone(request: Request) -> tuple[MemoryPlan, int | None]:
    """The memory plan of the job, for as many ranks as there are, and the bytes of a GPU if there is one.

    No process group is made.
    """
    is_gpu, decided = not _on_cpu(request), _decided(request)
    made = _foreseen(
        request,
        world_size=_world_size(),
        device="cuda" if is_gpu else "cpu",
        recomputes=decided[_checkpointing(request)],
        fsdp_config=decided.get("fsdp_config", {}),
    )
    if made is None:
        raise ConfigError("expected a model in 4 bits to plan, found --load-in-4bit false: leave out --plan only")
    return made, torch.cuda.mem_get_info()[1] if is_gpu else None


def _world_size() -> int:
    return launched_world_size() or 1


def _on_cpu(request: Request) -> bool:
    asked = request.values["use_cpu"]
    return not torch.accelerator.is_available() if asked is None else bool(asked)


@contextmanager
def _patched(request: Request) -> Iterator[None]:
    """A block in which accelerate shards on CPUs, where that is asked for, and every checkpoint has a whole adapter."""
    ids = ["peft.adapter-keys-under-wrappers"]
    if _on_cpu(request) and _is_sharded(request):
        ids.append("accelerate.fsdp-on-cpu")
    block = surgery.low_memory(experts=_experts(request), kernels=request.options.kernels)
    with patches.transaction(*ids, reason="surgery finetune"), block:
        yield


def _experts(request: Request) -> Any:
    """The 4-bit type of fused experts, that of the rest; None for 16 bits."""
    is_4bit = request.model.load_in_4bit and request.options.experts == "4bit"
    return request.model.bnb_4bit_quant_type if is_4bit else None


def _is_sharded(request: Request) -> bool:
    return _world_size() > 1 and request.options.fsdp != "none"


def _decided(request: Request) -> dict[str, Any]:
    """TRL's options that follow from ours and from this host; raises `ConfigError` for some that cannot be."""
    values = request.values
    if values["deepspeed"]:
        raise ConfigError("--deepspeed shards in another way than this command does: leave it out")
    if values["trust_remote_code"]:
        raise ConfigError("--trust-remote-code: code that a checkpoint brings along is not run here; leave it out")
    if request.options.early_stopping_patience is not None and not values["load_best_model_at_end"]:
        raise ConfigError("--early-stopping-patience looks for the best model: add --load-best-model-at-end")
    if request.options.compile:
        _check_compiled(request)
    found: dict[str, Any] = {"use_cpu": _on_cpu(request), "disable_tqdm": values["disable_tqdm"] is not False}
    found["resume_from_checkpoint"] = None  # which `train` is told
    # A checkpoint knows what was before training.
    found["eval_on_start"] = values["eval_on_start"] or (request.options.has_evaluation and not _may_resume(request))
    if found["use_cpu"]:
        found["dataloader_pin_memory"] = False
    if not request.preferences:
        attention = values["attn_implementation"] or ""
        found["packing"] = attention.startswith(FLASH) if values["packing"] is None else values["packing"]
        found["assistant_only_loss"] = bool(values["assistant_only_loss"])
    return found | _sharding(request) | (_for_graphs(request) if request.options.cuda_graphs else {})


def _for_graphs(request: Request) -> dict[str, Any]:
    """TRL's options with which few shapes of batches come, and every micro-batch reduces its gradients."""
    require_recordable(on_cpu=_on_cpu(request), fsdp=request.options.fsdp if _is_sharded(request) else "none")
    if Version(trl.__version__) < TRL_OF_GRAPHS:
        raise ConfigError(
            f"--cuda-graphs needs trl {TRL_OF_GRAPHS}, found {trl.__version__}: earlier ones have the host read labels"
        )
    asked = request.values["pad_to_multiple_of"]
    found: dict[str, Any] = {"pad_to_multiple_of": 64 if asked in (None, "auto") else asked}
    if not _is_sharded(request):
        return found
    given = _object(request, "accelerator_config")
    # Steps that leave gradients unreduced cannot be replayed; those of adapters are small.
    accumulation = {"sync_each_batch": True, **(given.get("gradient_accumulation_kwargs") or {})}
    return found | {"accelerator_config": {**given, "gradient_accumulation_kwargs": accumulation}}


def _check_compiled(request: Request) -> None:
    if request.values["torch_compile"]:
        raise ConfigError("--torch-compile compiles the whole model, --compile its blocks: leave one out")
    if request.options.attest:
        raise ConfigError(
            "--attest looks at layers as they run, which compiled blocks do not show: leave out --compile"
        )
    if _is_sharded(request) and request.options.fsdp == "1":
        raise ConfigError("--compile takes blocks that are sharded as a whole, and --fsdp 1 cuts them up: use --fsdp 2")


def _sharding(request: Request) -> dict[str, Any]:
    """TRL's options of sharding and of recomputed activations."""
    values, world, mesh = request.values, _world_size(), parse_mesh(request.options.mesh)
    if mesh is not None and mesh[0] * mesh[1] != world:
        raise ConfigError(f"expected --mesh of {world} ranks in all, found {request.options.mesh}")
    name = _checkpointing(request)
    checkpointing = values["gradient_checkpointing"] if values[name] is None else values[name]
    if request.options.activation_offloading:
        if not checkpointing:
            raise ConfigError(
                "--activation-offloading moves the inputs of blocks that are recomputed: leave "
                "--gradient-checkpointing on"
            )
        checkpointing = False  # of Trainer and of FSDP: the blocks are wrapped here
    found: dict[str, Any] = {"activation_offloading": False}
    if not _is_sharded(request):
        return found | {"fsdp": None, name: checkpointing}
    if _on_cpu(request) and request.options.fsdp == "1":
        raise ConfigError("--fsdp 1 needs GPUs, since accelerate refuses it on CPUs: use --fsdp 2")
    config = _fsdp_config(request)
    # FSDP's own gathers each block once less in backward; but it draws other numbers when it recomputes.
    is_fsdps = checkpointing and not _drops_out(request) and config.setdefault("activation_checkpointing", True)
    if request.options.activation_offloading:
        config["activation_checkpointing"] = False
    found |= {"fsdp": True, "fsdp_config": config, name: checkpointing and not is_fsdps}
    if mesh is not None:
        from accelerate.parallelism_config import ParallelismConfig

        found["parallelism_config"] = ParallelismConfig(dp_replicate_size=mesh[0], dp_shard_size=mesh[1])
    return found


def _checkpointing(request: Request) -> str:
    """The option of transformers that recomputes activations: `gradient_checkpointing` until 5.22."""
    new = "activation_checkpointing"
    return new if new in request.values else "gradient_checkpointing"


def _drops_out(request: Request) -> bool:
    """Whether anything in the model or its adapters drops out; a configuration that cannot be read is refused later."""
    if request.model.lora_dropout:
        return True
    try:
        name, revision = request.name, request.model.model_revision
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError):
        return True
    values = config.to_dict() | config.get_text_config().to_dict()
    return any(value for name, value in values.items() if name.endswith(("dropout", "pdrop", "dropout_rate")))


def _fsdp_config(request: Request) -> dict[str, Any]:
    """The `fsdp_config` that was asked for, as JSON or a file of it, over what low-memory loading wants."""
    given = _object(request, "fsdp_config")
    wanted = {
        "version": int(request.options.fsdp),
        "cpu_ram_efficient_loading": "true",
        "state_dict_type": "FULL_STATE_DICT",
    }
    return {**wanted, **{name.removeprefix("fsdp_"): value for name, value in given.items()}}


def _object(request: Request, name: str) -> dict[str, Any]:
    """The option `name`, given as JSON or as a file of it."""
    given: Any = request.values[name] or {}
    try:
        if isinstance(given, str):
            given = json.loads(given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--{name.replace('_', '-')}: expected a JSON object, or a file of one: {error}") from error
    return dict(given)


def _resume_from(request: Request) -> str | None:
    """The folder of the checkpoint to go on from, or None."""
    asked = request.values["resume_from_checkpoint"]
    if not _may_resume(request):
        return None
    found = asked if asked != "true" else get_last_checkpoint(request.output) if request.output.is_dir() else None
    if found is None or not (Path(found) / "trainer_state.json").is_file():
        raise ConfigError(
            f"expected a checkpoint in {request.output if found is None else found} to resume from, found none; leave "
            "out --resume-from-checkpoint to begin anew"
        )
    return str(found)


def _may_resume(request: Request) -> bool:
    return request.values["resume_from_checkpoint"] not in (None, "false")


@contextmanager
def _together(ranks: Ranks, *, is_guest: bool) -> Iterator[None]:
    """A block that ranks leave without hanging when one has failed; then the process group is left, unless a guest's.

    It is aborted if the block raises, since peers may wait in a collective that this rank will never join.
    """
    try:
        with beating(ranks), collective(ranks):
            yield
    except BaseException as error:
        if not is_guest and ranks.world_size > 1:
            _abort()
        if ranks.world_size > 1 and ranks.rank == store_holder(ranks.store):
            wait_for_the_others(ranks, ended=getattr(error, "rank", None))
        raise
    if not is_guest and dist.is_initialized():
        dist.destroy_process_group()


def _abort() -> None:
    # Destroying an NCCL group waits for the kernels in flight, and those wait for a rank that is gone.
    if torch.cuda.is_available():
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def _prepare(request: Request, training: Any, ranks: Ranks, console: Console | None) -> _Job:
    """Everything but the model; if one rank cannot have it, or has other options or data, all raise."""
    device = training.device
    facts = {"options": facts_of(request.values), "checkpoint": source_facts(request.name)}
    same_on_every_rank(ranks, "options", facts, device=device)
    _quieten(is_main=ranks.rank == 0)
    with everyone(ranks, device=device):
        chosen_kernels(request.options.kernels, device=device)
        chosen_kernels("liger" if training.use_liger_kernel else None, device=device)
        if request.options.trace is not None:
            start_afresh(Path(request.options.trace), rank=ranks.rank, world_size=ranks.world_size)
        resume = _resume_from(request)
        _refuse_stale(request, resume)
        # Before the tokenizer and the configuration, which may have to be downloaded.
        data = read_data(
            request.options,
            preferences=request.preferences,
            seed=training.seed,
            text=request.values.get("dataset_text_field", "text"),
        )
        if request.options.adapter is not None:
            SavedAdapter.open(request.options.adapter)  # also where nothing is planned
        planned = _planned(request, training, ranks)
        tokenizer = _tokenizer(request)
    same_on_every_rank(ranks, "data", {"data": data.facts()}, device=device)
    if planned is not None and device.type == "cuda":
        check_fits(planned, min(gather_objects(free_memory(device))))
    return _Job(request, training, ranks, data, tokenizer, resume, planned, console)


def _planned(request: Request, training: Any, ranks: Ranks) -> MemoryPlan | None:
    if request.options.plan == "off":
        return None
    return _foreseen(
        request,
        world_size=ranks.world_size,
        device="cuda" if training.device.type == "cuda" else "cpu",
        recomputes=training.gradient_checkpointing,
        fsdp_config=training.fsdp_config or {},
    )


def _foreseen(
    request: Request, *, world_size: int, device: str, recomputes: bool, fsdp_config: Mapping[str, Any]
) -> MemoryPlan | None:
    """The plan; None where nothing is planned. recomputes: whether Trainer has blocks recomputed."""
    by_others = fsdp_config.get("activation_checkpointing") or request.options.activation_offloading
    return foresee(
        request,
        world_size=world_size,
        device=device,
        checkpointing=bool(recomputes or by_others),
        cpu_offload=offloads_shards(fsdp_config),
    )


def _refuse_stale(request: Request, resume: str | None) -> None:
    """Raise `ConfigError` if checkpoints of an earlier run would be taken for those of this one."""
    stale = sorted(each.name for each in request.output.glob("checkpoint-*"))
    if stale and resume is None and not request.options.overwrite:
        raise ConfigError(
            f"{request.output} has checkpoints of an earlier run ({', '.join(stale[:3])}): add "
            "--resume-from-checkpoint to go on from the newest, --overwrite to remove them, or choose another output"
        )


def _tokenizer(request: Request) -> Any:
    """The tokenizer of the model; raises `ConfigError` if it has none, or one that is code of its own."""
    name = request.name
    try:
        # Left unsaid, transformers asks at the terminal whether to run the checkpoint's own code.
        return AutoTokenizer.from_pretrained(name, revision=request.model.model_revision, trust_remote_code=False)
    # What a missing or broken tokenizer raises depends on its class: OSError, ValueError, ImportError ...
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"the tokenizer of {name} is code that the checkpoint brings along, which is not run; use a checkpoint "
                "with a tokenizer that transformers has, or save this one as a tokenizer.json"
            ) from None
        raise ConfigError(
            f"{name} has no tokenizer that transformers can load ({type(error).__name__}: {error}); put tokenizer.json "
            "and tokenizer_config.json beside the weights"
        ) from error


def _quieten(*, is_main: bool) -> None:
    """Leave progress bars to rank 0 and to terminals, and notices of libraries to rank 0."""
    if not is_main or not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    if not is_main:
        transformers.utils.logging.set_verbosity_error()


def _suit_loss(model: Any, router_loss: float | None) -> None:
    """Name the decoder of Llama 4, whose class names another, to TRL's loss; raise `ConfigError` where that fails."""
    if model.base_model is model and hasattr(model, "model"):
        model.base_model_prefix = "model"
    config = model.config.get_text_config()
    wanted = getattr(config, "router_aux_loss_coef", 0) if router_loss is None else router_loss
    if wanted and hasattr(config, "output_router_logits") and not hasattr(config, "num_experts"):
        raise ConfigError(
            f"TRL cannot balance the experts of {type(model).__name__}, whose configuration has no num_experts: add "
            "--router-aux-loss-coef 0"
        )


@dataclass(frozen=True)
class _Job:
    """A prepared job. resume: the folder of a checkpoint. console: rank 0's."""

    request: Request
    training: Any
    ranks: Ranks
    data: Data
    tokenizer: Any
    resume: str | None
    planned: MemoryPlan | None
    console: Console | None

    def run(self, report: Report) -> Summary:
        """Build, train and save; the patches of the model are undone, whatever happens. The summary lacks them."""
        phases, attesting = Phases(report), Attesting() if self.request.options.attest else None
        phases.begin("bind")
        if self.planned is not None:
            host, on_device = predictions(self.planned, self.ranks.rank)["train"]
            report.predict("train", host=host, device=on_device)
        with _patched(self.request):
            model, trainer = self._model(), None
            try:
                trainer = self._trainer(model, phases, attesting)
                start = time.monotonic()
                trainer.train(resume_from_checkpoint=self.resume)
                seconds = time.monotonic() - start
                if self.data.evaluation is not None and not _is_evaluated(trainer):
                    phases.begin("evaluate")
                    trainer.evaluate()
                if attesting is not None:
                    attesting.at_rest("end", trainer.model)
                phases.begin("save")
                summary = self._summary(trainer, attesting, seconds)
                save_adapter(trainer.model, self.request.output, training=card_sections(summary, self.data.facts()))
                if self.training.push_to_hub:
                    trainer.push_to_hub()
            finally:
                phases.end()
                release(model if trainer is None else trainer.model_wrapped)  # FSDP1 is around it by then
        return replace(summary, memory=tuple(gather_objects(report.as_dict())))

    def _model(self) -> Any:
        request, further = self.request, dict(self.training.model_init_kwargs or {})
        self.training.model_init_kwargs = None  # TRL warns where it is not the one who uses them
        wanted: dict[str, Any] = {
            "revision": request.model.model_revision,
            "dtype": request.model.dtype,
            "attn_implementation": request.model.attn_implementation,
        }
        name = _absolute(request.name)
        folder: str | Path = name
        if request.options.packed_cache is not None:
            folder, wanted["revision"] = self._packed(request.options.packed_cache), "main"
        config = AutoConfig.from_pretrained(folder, revision=wanted["revision"], trust_remote_code=False)
        if not hasattr(config, "quantization_config"):  # what is packed already says how
            wanted["quantization_config"] = get_quantization_config(request.model)
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **{**wanted, **further})
        except (ImportError, ValueError) as error:
            asked = request.model.attn_implementation
            if asked is None:
                raise
            raise ConfigError(f"{name} cannot be loaded with --attn-implementation {asked:.80}: {error}") from error
        model.name_or_path = model.config._name_or_path = name  # the base model of adapters, wherever its weights are
        _suit_loss(model, self.training.router_aux_loss_coef)
        return model

    def _packed(self, cache: str) -> Path:
        """The folder of the model's weights in the cache; quantizes them first where it has none."""
        options = self.request.model
        quant = Quant(
            options.bnb_4bit_quant_type,  # type: ignore[arg-type]  # a choice of TRL's
            double_quant=options.use_bnb_nested_quant,
            experts=self.request.options.experts == "4bit",
        )
        dtype = None if options.dtype in (None, "auto") else getattr(torch, options.dtype)
        revision = None if options.model_revision == "main" else options.model_revision
        opened = Checkpoint.open(self.request.name, revision=revision)
        packed, _ = packed_in(
            cache, opened, quant=quant if options.load_in_4bit else None, dtype=dtype, device=self.training.device
        )
        return packed.index.files[0].parent

    def _trainer(self, model: Any, phases: Phases, attesting: Attesting | None) -> Any:
        """TRL's trainer. Raises `ConfigError` for options and data that it refuses."""
        self._announce()
        if self.resume is None and self.console is not None:
            for stale in self.request.output.glob("checkpoint-*"):
                shutil.rmtree(stale)
        kind = DPOTrainer if self.request.preferences else SFTTrainer
        train, evaluation = self._samples()
        phases.begin("prepare")
        adapter = self.request.options.adapter
        if adapter is not None:
            model = surgery.load_adapter(model, adapter, trainable=True)
        try:
            trainer = kind(
                model=model,
                args=self.training,
                train_dataset=train,
                eval_dataset=evaluation,
                processing_class=self.tokenizer,
                peft_config=get_peft_config(self.request.model) if adapter is None else None,
                callbacks=[phases, Progress(self.console), *self._callbacks(attesting)],
            )
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{kind.__name__} refuses this job: {error}") from error
        vocabulary = model.config.get_text_config().vocab_size
        check_tokens(trainer.train_dataset, vocabulary, self.request.options.data)
        check_tokens(trainer.eval_dataset, vocabulary, self.request.options.eval_data or self.request.options.data)
        trainer.remove_callback(PrinterCallback)
        if self.request.options.cuda_graphs:
            trainer.add_callback(Capturing(trainer, self.console))
        self._complete(trainer)
        return trainer

    def _complete(self, trainer: Any) -> None:
        """Change the model of `trainer`, adapters included, before it is sharded or moved."""
        if self.request.options.activation_offloading:
            surgery.checkpoint_activations(trainer.model, offload=True)
        if isinstance(trainer.model, PeftModel):
            # Or PEFT makes float32 of adapters whenever Trainer reads a checkpoint, to go on from or as the best one.
            load = functools.partial(trainer.model.load_adapter, autocast_adapter_dtype=False)
            vars(trainer.model)["load_adapter"] = load

    def _callbacks(self, attesting: Attesting | None) -> Iterator[TrainerCallback]:
        """Those that were asked for."""
        if attesting is not None:
            yield attesting
        if self.request.options.early_stopping_patience is not None:
            yield EarlyStoppingCallback(self.request.options.early_stopping_patience)
        if self.request.options.compile:
            yield Compiling()

    def _samples(self) -> tuple[Any, Any]:
        """The data as TRL takes it, with the loss on what the assistant says alone, where that can be told."""
        data = self.data
        if data.shape != ("messages",) or self.request.values.get("assistant_only_loss") is not None:
            return data.train, data.evaluation
        try:
            get_training_chat_template(self.tokenizer)
        except ValueError:
            if data.is_one_turn:
                return data.as_completions()
            self._say("Every turn is learnt: TRL does not know this chat template, which marks no assistant turns")
        else:
            self.training.assistant_only_loss = True
        return data.train, data.evaluation

    def _announce(self) -> None:
        counts, training = self.data.counts(), self.training
        batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * self.ranks.world_size
        self._say(
            f"Samples: {counts['train'] or 'streamed'} to train on, {counts['evaluation']} to evaluate on, {batch} a "
            f"step; ranks: {self.ranks.world_size}, on {training.device.type}"
        )
        if self.data.unused:
            self._say(f"Not read: {', '.join(self.data.unused)}")
        for source in filter(None, (self.request.options.adapter, self.resume)):
            self._say(f"Going on from {source}")

    def _say(self, text: str) -> None:
        if self.console is not None:
            say(self.console, text)

    def _summary(self, trainer: Any, attesting: Attesting | None, seconds: float) -> Summary:
        """The summary so far, without memory and patches."""
        history: list[Mapping[str, Any]] = trainer.state.log_history
        return Summary(
            config=self.request.values,
            device=str(self.training.device),
            world_size=self.ranks.world_size,
            sharding=self._sharding(),
            samples=self.data.counts(),
            steps=trainer.state.global_step,
            resumed_after=int(Path(self.resume).name.rpartition("-")[2]) if self.resume else 0,
            seconds=seconds,
            losses={each["step"]: each["loss"] for each in history if "loss" in each},
            evaluations=[
                Evaluation(step=each["step"], loss=each["eval_loss"]) for each in history if "eval_loss" in each
            ],
            memory=(),
            patches=(),
            versions=versions(),
            attestation=None if attesting is None else attesting.result(),
        )

    def _sharding(self) -> str | None:
        if self.ranks.world_size == 1:
            return None
        return "DDP" if self.request.options.fsdp == "none" else f"FSDP{self.request.options.fsdp}"


def _absolute(name: str) -> str:
    """A folder by its absolute path, since adapters name it; a hub id as it is."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def _is_evaluated(trainer: Any) -> bool:
    step = trainer.state.global_step
    return any("eval_loss" in each and each["step"] == step for each in trainer.state.log_history)
