"""`trl.fill-reference`: a bound reference model is filled with each rank's shard, as the one that is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import model_surgery_patches as patches
from surgery.bound import BOUND, bound_in

__all__ = ["fill_reference"]

ID = "trl.fill-reference"


class _ShardedByTRLError(Exception):
    pass


def reference_is_sharded_by_trl() -> bool:
    """Whether TRL reads what accelerate's plugin says of sharding, to do it by itself."""
    from types import SimpleNamespace

    from trl.models import utils

    class Plugin:
        fsdp_version = 2
        ignored_modules = None

        @property
        def reshard_after_forward(self) -> None:
            raise _ShardedByTRLError

    accelerator: Any = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=Plugin()), device=None)
    try:
        utils.prepare_fsdp(nn.Linear(1, 1, device="meta"), accelerator)
    except _ShardedByTRLError:
        return True
    return False


def check_asks_accelerate() -> None:
    """Raise RuntimeError if TRL does not leave a bound model to accelerate."""
    from types import SimpleNamespace

    from trl.models import utils

    model, asked = nn.Linear(1, 1, device="meta"), list[nn.Module]()
    vars(model)[BOUND] = object()

    def prepare(given: nn.Module, **_kwargs: Any) -> nn.Module:
        asked.append(given)
        accelerator._models.append(given)
        return given

    accelerator: Any = SimpleNamespace(is_fsdp2=False, prepare_model=prepare, _models=[])
    utils.prepare_fsdp(model, accelerator)
    if asked != [model] or model.training or accelerator._models:
        raise RuntimeError("expected accelerate to prepare a bound model for evaluation, found another way")


@patches.register(
    ID,
    target="trl.models.utils:prepare_fsdp",
    aliases="rewrite",  # trainers import it by name
    reason="TRL shards a reference model by itself, as one group, and not by accelerate, which would fill it",
    upstream="https://github.com/huggingface/trl/blob/v1.16.0/trl/models/utils.py",
    requires={"trl": ">=1.15,<1.17"},
    signature="(model, accelerator)",
    fingerprint="f47819d25638f1b4",
    subject=lambda _instance, args, kwargs: args[0] if args else kwargs["model"],
    on_unknown="skip",
    on_drift="skip",
    probe=reference_is_sharded_by_trl,
    verify=check_asks_accelerate,
)
def fill_reference(
    wrapped: Callable[..., nn.Module], _instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> nn.Module:
    """Have accelerate prepare a bound model, which fills it; TRL leaves sharded models as they are."""
    given = dict(zip(("model", "accelerator"), args, strict=False)) | kwargs
    model, accelerator = given["model"], given["accelerator"]
    if bound_in(model) is None:
        patches.passed(ID)
        return wrapped(**given)
    from accelerate import accelerator as module

    prepared: nn.Module
    if accelerator.is_fsdp2:
        prepared = module.fsdp2_prepare_model(accelerator, model)
    else:
        prepared = accelerator.prepare_model(model, evaluation_mode=True)
        accelerator._models.remove(prepared)  # it is not to be saved with the state
    return prepared.eval()
