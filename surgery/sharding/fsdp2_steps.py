"""Steps of FSDP2: its streams, and what its groups of parameters remember from one step to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from surgery.sharding.steps import Steps

__all__ = ["Fsdp2Steps"]

#: The streams of FSDP2's communication context.
STREAMS = ("all_gather_copy_in_stream", "all_gather_stream", "reduce_scatter_stream", "all_reduce_stream")

#: What a group of parameters, and the communication context, remember of a step that is under way.
OF_GROUP = ("_all_gather_result", "_post_reduce_event", "_all_reduce_state", "_reshard_after_forward_event")
OF_CONTEXT = ("all_gather_state", "reduce_scatter_state")
LISTS_OF_CONTEXT = ("post_forward_order", "reduce_scatter_states", "_last_post_reduce_events")


class Fsdp2Steps(Steps):
    """The steps of a model that `fully_shard` was applied to, once its first forward has run."""

    sets_gradients = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        sharded = [each for each in module.modules() if isinstance(each, FSDPModule)]
        self._states = list({id(state): state for state in (_state(each) for each in sharded)}.values())
        self._groups = [group for state in self._states for group in _groups(state)]
        self._parameters = list(chain.from_iterable(group.fsdp_params for group in self._groups))

    @property
    def _context(self) -> Any:
        return self._states[0]._comm_ctx

    def streams(self) -> Sequence[Any]:
        """Those of all-gather, reduce-scatter and all-reduce.

        A backward begins its first all-gather on streams that have not waited for anything in it.
        """
        return [getattr(self._context, name) for name in STREAMS if hasattr(self._context, name)]

    def is_regular(self) -> bool:
        """Whether gradients are reduced, and none wait unreduced from an earlier step."""
        return (
            all(_reduces(group) for group in self._groups)
            and all(state._state_ctx.is_last_backward for state in self._states)
            and not any(map(_waits, self._parameters))
        )

    def settle(self) -> None:
        """Shard every group again."""
        for group in self._groups:
            if not group.is_sharded:
                group.reshard()

    def renew(self) -> None:
        """Have the next forward make gathered parameters anew."""
        for parameter in self._parameters:
            vars(parameter).pop("_unsharded_param", None)

    def reset(self) -> None:
        """Forget the step that is under way, and shard every group."""
        for group in self._groups:
            vars(group).update(dict.fromkeys(name for name in OF_GROUP if hasattr(group, name)))
            group._post_forward_indices.clear()
            group._training_state = TrainingState.IDLE
            group._to_sharded()
        for state in self._states:
            state._training_state = TrainingState.IDLE
            state._state_ctx.iter_forward_root = None
            state._state_ctx.post_backward_final_callback_queued = False
            getattr(state, "_modules_to_run_forward", set()).clear()
        context = vars(self._context)
        context.update(dict.fromkeys(name for name in OF_CONTEXT if name in context))
        for name in LISTS_OF_CONTEXT:
            context.get(name, []).clear()


def _state(module: FSDPModule) -> Any:
    return module._get_fsdp_state()


def _groups(state: Any) -> Iterator[Any]:
    several = getattr(state, "_fsdp_param_groups", None)  # since torch 2.12; one, or none, before
    if several is None:
        several = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    yield from several


def _reduces(group: Any) -> bool:
    waits = getattr(group, "_partial_reduce_output", None) is not None
    return bool(group.reduce_grads and group.all_reduce_grads and group.reshard_after_backward and not waits)


def _waits(parameter: Any) -> bool:
    """Whether a gradient waits to be reduced: in the dtype of reduction, or as autograd has left it."""
    gathered = vars(parameter).get("_unsharded_param")
    return parameter.unsharded_accumulated_grad is not None or (gathered is not None and gathered.grad is not None)
