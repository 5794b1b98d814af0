"""A base model in 4 bits with an adapter on it, that answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from surgery.adapters.metadata import Base
from surgery.checkpoint import Checkpoint
from surgery.checkpoint.header import read_header
from surgery.checkpoint.hub import can_be_hub_id, exists, find_cached
from surgery.comm.environment import launched_world_size
from surgery.errors import CheckpointError, ConfigError

__all__ = ["Answer", "Generator", "Message", "find_base"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

#: Options of sampling; whoever gives one wants to sample.
SAMPLING = frozenset({"temperature", "top_k", "top_p", "min_p"})

Message: TypeAlias = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The text that a model has said, and the number of its tokens."""

    text: str
    tokens: int


def find_base(model: str | None, *, revision: str | None = None, adapter: Path | None = None) -> Checkpoint:
    """Open the checkpoint `model`, or where that is None the one that `adapter` names; no weight is read.

    Raises `ConfigError` where `adapter` was trained on another model, or is no adapter of PEFT in safetensors.
    """
    ranks = launched_world_size() or 1
    if ranks > 1:
        raise ConfigError(f"expected one process, found {ranks} ranks: generation is not sharded; leave out torchrun")
    config = {} if adapter is None else _config_of(adapter)
    named = config.get("base_model_name_or_path") or None
    chosen = model or named
    if chosen is None:
        found = "no --adapter" if adapter is None else f"{adapter / CONFIG} without a base_model_name_or_path"
        raise ConfigError(f"expected MODEL, or an adapter that names its base model; found {found}")
    if named is not None and not _are_same(chosen, named):
        raise ConfigError(
            f"expected the base model of {adapter}, which is {named}, found {chosen}: leave out MODEL; or, if both are "
            f"the same, change base_model_name_or_path in {adapter}/{CONFIG}"
        )
    base = Checkpoint.open(chosen, revision=revision or (config.get("revision") if chosen == named else None))
    if adapter is not None:
        says = Base(name=named, revision=config.get("revision"))
        says.check_revision(Base.of(base), adapter / CONFIG)
        _refuse_other_shapes(base, adapter)
    return base


def _are_same(model: str, named: str) -> bool:
    """Whether two names are of one model; True for a folder that is not on this machine, which may have been it."""
    return bool(_places(model) & _places(named)) or not (can_be_hub_id(named) or exists(Path(named)))


def _places(name: str) -> set[str | Path]:
    """A name of a model, and the folders that it stands for, in the cache of the hub too."""
    folders = [Path(name) if exists(Path(name)) else None]
    folders.append(find_cached(name, revision=None) if can_be_hub_id(name) else None)
    return {name, *(folder.resolve() for folder in folders if folder is not None)}


def _config_of(adapter: Path) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            raise ConfigError(
                f"expected the folder of an adapter, found no {name} in {adapter}; one on the hub is fetched by "
                "`hf download ID --local-dir DIR`"
            )
    try:
        config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{adapter / CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"expected a JSON object in {adapter / CONFIG}, found {type(config).__name__}")
    return config


def _refuse_other_shapes(base: Checkpoint, adapter: Path) -> None:
    """Refuse LoRA matrices of other sizes than the weights of their names, as far as `base` has these names."""
    for entry in read_header(adapter / WEIGHTS).entries:
        name, _, leaf = entry.name.removeprefix("base_model.model.").partition(".lora_")
        weight = base.logical(f"{name}.weight") if f"{name}.weight" in base else None
        if weight is None or leaf not in ("A.weight", "B.weight") or len(weight.shape) != 2 or len(entry.shape) != 2:
            continue
        features = entry.shape[1] if leaf == "A.weight" else entry.shape[0]
        if features not in weight.shape:
            raise ConfigError(
                f"expected an adapter of {base.source}, in which {name} is {' x '.join(map(str, weight.shape))}, found "
                f"one for {features} features in {adapter}: give the model that it was trained on"
            )


@dataclass(kw_only=True, eq=False)
class Generator:
    """A loaded model that answers messages; see `load`.

    options: fields of `GenerationConfig` that are not as the model has them. chats: whether messages are rendered by a
    chat template; if not, the text of the last one is gone on with.
    """

    chats: bool
    options: Mapping[str, Any]
    seed: int
    _model: Any = field(repr=False)
    _tokenizer: Any = field(repr=False)

    @classmethod
    @contextmanager
    def load(
        cls,
        base: Checkpoint,
        adapter: Path | None,
        *,
        quant_type: Literal["nf4", "fp4"] | None,
        dtype: str,
        experts: bool = True,
        options: Mapping[str, Any],
        seed: int = 0,
        raw: bool = False,
    ) -> Iterator[Self]:
        """A generator for a block, at whose end every patch that its model needs is undone.

        quant_type: `nf4`, `fp4`, or None for weights in `dtype`. experts: fused ones too. options, seed: see the
        class. raw: no chat template.
        """
        import torch

        from surgery.comm.environment import compute_device
        from surgery.config import Quant
        from surgery.recipe import qlora

        _refuse_options(options)
        folder = adapter if adapter is not None and (adapter / "tokenizer_config.json").is_file() else base.path
        tokenizer = _tokenizer_of(folder)
        quant = None if quant_type is None else Quant(quant_type, experts=experts)
        with ExitStack() as stack:
            model: Any = qlora(base, quant=quant, dtype=getattr(torch, dtype), device=compute_device(None))
            stack.enter_context(model)
            if adapter is not None:
                model = _adapted(model, adapter)
            yield cls(
                chats=not raw and tokenizer.chat_template is not None,
                options={**({"do_sample": True} if SAMPLING & options.keys() else {}), **options},
                seed=seed,
                _model=model.eval(),
                _tokenizer=tokenizer,
            )

    def answer(self, messages: Sequence[Message], *, write: Callable[[str], None] | None = None) -> Answer:
        """Go on after `messages`; `write` is given the text in pieces, as they come.

        Raises `ConfigError` for messages that the chat template refuses, and options that transformers does.
        """
        import torch

        inputs = self._encode(messages).to(self._model.device)
        torch.manual_seed(self.seed)
        with torch.inference_mode():
            try:
                found = self._model.generate(
                    **inputs,
                    **self._padding(),
                    **self.options,
                    use_cache=True,
                    tokenizer=self._tokenizer,
                    streamer=None if write is None else _streamer(self._tokenizer, write),
                )
            except ValueError as error:
                raise ConfigError(f"transformers refuses to generate: {error}") from error
        said = found[0, inputs["input_ids"].shape[1] :]
        return Answer(text=self._tokenizer.decode(said, skip_special_tokens=True), tokens=len(said))

    def _encode(self, messages: Sequence[Message]) -> Any:
        if not self.chats:
            return self._tokenizer(messages[-1]["content"], return_tensors="pt", return_token_type_ids=False)
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except TemplateError as error:
            raise ConfigError(f"the chat template refuses these messages: {error}; try --raw") from error

    def _padding(self) -> dict[str, int]:
        """A token for padding, without which transformers says with every answer which one it takes."""
        config, ends = self._model.generation_config, self._tokenizer.eos_token_id
        return {} if config.pad_token_id is not None or ends is None else {"pad_token_id": ends}


def _refuse_options(options: Mapping[str, Any]) -> None:
    """Refuse, before a weight is read, what cannot be meant."""
    sampling = sorted(SAMPLING & options.keys())
    if options.get("do_sample") is False and sampling:
        raise ConfigError(f"expected --do-sample with {', '.join(sampling)}, found --no-do-sample; leave one out")
    for name in ("temperature", "repetition_penalty"):
        if options.get(name, 1) <= 0:
            raise ConfigError(f"expected {name} above 0, found {options[name]:g}; for the likeliest, --no-do-sample")


def _tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # Tokenizers raise what comes along: OSError, ValueError, TypeError, ImportError, Rust's bare Exception.
    except Exception as error:
        raise CheckpointError(
            f"{folder} has no tokenizer that transformers can load: {error}; put that of the model there", path=folder
        ) from error


def _adapted(model: Any, adapter: Path) -> Any:
    """`model` with the adapter, loaded by PEFT as anybody would. Raises `ConfigError` where not all of it is found."""
    import warnings

    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # The adapter would be left as it was drawn, or a part of it.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, adapter)
    except (ValueError, RuntimeError, UserWarning) as error:
        raise ConfigError(f"{adapter} does not fit its base model, says PEFT: {error}") from error


def _streamer(tokenizer: Any, write: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Text as it is complete, without the prompt."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: FBT001, FBT002  # upstream's
            del stream_end
            write(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
