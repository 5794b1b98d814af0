"""`axolotl.stock-*`: axolotl leaves accelerate's and PyTorch's FSDP2 as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import model_surgery_patches as patches

__all__ = ["STOCK_FSDP2"]

_SOURCE = "https://github.com/axolotl-ai-cloud/axolotl/blob/v0.19.0/src/axolotl/monkeypatch"
_FSDP2, _QLORA = "axolotl.monkeypatch.accelerate.fsdp2", "axolotl.monkeypatch.fsdp2_qlora"

#: Id -> module, function, its fingerprint, and what it would assign.
_FUNCTIONS = {
    "axolotl.stock-prepare": (
        _FSDP2, "patch_accelerate_fsdp2", "44d2c03242d6f33f", "accelerate.accelerator.fsdp2_prepare_model"
    ),
    "axolotl.stock-sharded-param": (
        _QLORA, "apply_init_sharded_param_patch", "07f0e24be40dd35f", "FSDPParam._init_sharded_param"
    ),
    "axolotl.stock-unsharded-param": (
        _QLORA, "apply_init_unsharded_param_patch", "06b2a57f22af4884", "FSDPParam.init_unsharded_param"
    ),
    "axolotl.stock-dtype-attrs": (
        _QLORA, "apply_init_dtype_attrs_patch", "5fe515643b39cc4a", "FSDPParam.init_dtype_attrs"
    ),
}  # fmt: skip


def _assigns(module: str, function: str, assigned: str) -> bool:
    """Whether the function assigns what it is said to, by its source: it keeps no record to undo that."""
    import importlib
    import inspect

    return f" {assigned} = " in inspect.getsource(getattr(importlib.import_module(module), function))


def _live() -> list[Any]:
    from accelerate import accelerator
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    names = ("_init_sharded_param", "init_unsharded_param", "init_dtype_attrs")
    return [accelerator.fsdp2_prepare_model, *(vars(FSDPParam)[name] for name in names)]


def _check_assigns_nothing(module: str, function: str) -> None:
    """Raise RuntimeError if the function still assigns something."""
    import importlib

    before = _live()
    getattr(importlib.import_module(module), function)()
    if any(now is not then for now, then in zip(_live(), before, strict=True)):
        raise RuntimeError(f"expected {module}.{function} to do nothing, found that it has replaced a method")


def _do_nothing(
    _wrapped: Callable[[], None], _instance: object, _args: tuple[Any, ...], _kwargs: dict[str, Any]
) -> None:
    """Leave the library as it is."""


for _id, (_module, _function, _fingerprint, _assigned) in _FUNCTIONS.items():
    patches.register(
        _id,
        target=f"{_module}:{_function}",
        reason=f"axolotl would replace {_assigned}, which then takes no model that is filled while it is sharded",
        upstream=f"{_SOURCE}/{_module.removeprefix('axolotl.monkeypatch.').replace('.', '/')}.py",
        requires={"axolotl": ">=0.19,<0.20"},
        signature="()",
        fingerprint=_fingerprint,
        on_unknown="skip",
        on_drift="skip",
        probe=functools.partial(_assigns, _module, _function, _assigned),
        verify=functools.partial(_check_assigns_nothing, _module, _function),
    )(_do_nothing)

STOCK_FSDP2 = patches.bundle("axolotl-stock-fsdp2", tuple(_FUNCTIONS), atomic=True)
