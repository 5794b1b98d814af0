"""`transformers.wait-when-loaded`: a bound model refuses to be used from when `from_pretrained` is done with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import model_surgery_patches as patches
from surgery.bound import BOUND
from surgery.integrations.low_memory import carry
from surgery.integrations.transformers.bind_at_load import load_reads_everything, loaded_specimen
from surgery.model.skeleton import restore_buffers
from surgery.passes.lifetime import is_waiting, release, stop_waiting, wait

__all__ = ["wait_when_loaded"]

ID = "transformers.wait-when-loaded"


def check_waits() -> None:
    """Raise RuntimeError if a model that was bound may be used once it is loaded."""
    model = loaded_specimen(finalized=True)
    if not is_waiting(model):
        raise RuntimeError("expected a bound model to wait for its weights, found one that may be used")
    stop_waiting(model)
    release(model)


@patches.register(
    ID,
    target="transformers.modeling_utils:PreTrainedModel._finalize_model_loading",
    reason="transformers uses a model while it loads it; after that nobody may, until it is filled",
    upstream="https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/modeling_utils.py",
    requires={"transformers": ">=5.17,<5.25"},
    signature="(model, load_config, loading_info)",
    fingerprint="99f7e1f15f86e26c",
    needs=("transformers.bind-at-load",),
    on_unknown="skip",
    on_drift="skip",
    probe=load_reads_everything,
    verify=check_waits,
)
def wait_when_loaded(
    wrapped: Callable[..., Any], _instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Have a model that was bound refuse its use, and carry the patches that fill it."""
    info = wrapped(*args, **kwargs)
    model = args[0] if args else kwargs["model"]
    if BOUND not in vars(model):
        patches.passed(ID)
        return info
    restore_buffers(model)  # some have every rank but the first load to meta
    wait(model)
    carry(model)
    return info
