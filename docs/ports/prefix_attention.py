"""verl's `prefix_grouper` argument of every attention, as declarations. See `prefix_attention.md`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import patches

if TYPE_CHECKING:  # a process that starts with these patches imports this module before it needs torch
    import torch
    from reference import PrefixGrouper

SEEN = {"transformers": ">=5.24,<5.40"}
TABLE = "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS"
TARGETS = {
    "flash-attention-2": f"{TABLE}[flash_attention_2]",
    "flash-attention-3": f"{TABLE}[flash_attention_3]",
    "flex-attention": f"{TABLE}[flex_attention]",
    "sdpa": f"{TABLE}[sdpa]",
    # No entry of the table: each model has a function of its own, which it names as the default.
    "llama-eager": "transformers.models.llama.modeling_llama:eager_attention_forward",
}


def share_prefix(
    wrapped: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    _instance: None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend by groups where the call has a `prefix_grouper`; everything else takes the stock way."""
    grouper: PrefixGrouper | None = kwargs.pop("prefix_grouper", None)
    if grouper is None:
        return wrapped(*args, **kwargs)
    module, query, key, value, _mask = args

    def attend(*states_and_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        return wrapped(module, *states_and_mask, **options)[0]

    return grouper.forward(attend, query, key, value, **kwargs), None


for name, target in TARGETS.items():
    patches.register(
        f"verl.prefix-{name}",
        target=target,
        reason="continuations of one prompt attend to it once for each of them",
        upstream="https://github.com/volcengine/verl/pull/4368",
        requires=SEEN,
    )(share_prefix)

*entries, eager = (f"verl.prefix-{name}" for name in TARGETS)
patches.bundle("verl-prefix-table", entries, atomic=True)
patches.bundle("verl-prefix", ("verl-prefix-table", eager))
