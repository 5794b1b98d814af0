"""The pipeline: passes in order, those over batches one batch at a time, and no rank left waiting where one fails."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from surgery.comm.failures import everyone
from surgery.passes.base import Batch, BatchPass, Naming, Pass
from surgery.passes.exchange import Exchange
from surgery.passes.loading import Loading

__all__ = ["Pipeline"]


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Passes in order, and what they share while a model is filled.

    All batch passes finish one batch before the next begins. But at `exchange` ranks meet: it and those behind it are
    one batch later than those before, so that a rank that is ahead need not wait.
    """

    passes: Sequence[Pass]
    loading: Loading

    def run(self, model: nn.Module) -> nn.Module:
        """`model` after all passes. A failure is a `PassError` that names the pass and the FQN."""
        for is_collective, group in itertools.groupby(self.passes, lambda step: step.is_collective):
            with contextlib.nullcontext() if is_collective else self._together():
                for over_batches, found in itertools.groupby(group, lambda step: isinstance(step, BatchPass)):
                    run = self._run_batches if over_batches else self._run_each
                    model = run(model, tuple(found))
        return model

    def _together(self) -> contextlib.AbstractContextManager[None]:
        return everyone(self.loading.ranks, device=self.loading.setting.device)

    def _run_each(self, model: nn.Module, steps: Sequence[Pass]) -> nn.Module:
        for step in steps:
            if not step.is_collective:
                self.loading.ranks.raise_peer_failure()
            with self.loading.report.phase(step.name), Naming(step.name, "the model"):
                changed: object = step.run(model)
                if not isinstance(changed, nn.Module):
                    raise TypeError(f"run must return the model, or what replaces it; found {changed!r:.80}")
                model = changed
        return model

    def _run_batches(self, model: nn.Module, steps: Sequence[Pass]) -> nn.Module:
        """Run batch passes in a thread, so that an interrupt of this one ends the loading of weights."""
        self.loading.in_background(lambda: self._visit(*_split(steps))).wait()
        self.loading.settle()
        return model

    def _visit(self, ahead: Sequence[BatchPass], behind: Sequence[BatchPass]) -> None:
        report, waiting = self.loading.report, None
        with report.phase("+".join(step.name for step in (*ahead, *behind))):
            for batch in report.track(
                self.loading.batches, names=lambda batch: [target.module_fqn for target in batch.targets]
            ):
                with _keeping_a_promise(behind, waiting):
                    self.loading.ranks.raise_peer_failure()
                    _run(ahead, batch)
                _run(behind, waiting)
                waiting = None
                if behind:
                    self.loading.ranks.arrive(str(batch.number), stop=self.loading.stop)
                    waiting = batch
            _run(behind, waiting)
            self.loading.raise_failure()


def _split(steps: Sequence[Pass]) -> tuple[Sequence[BatchPass], Sequence[BatchPass]]:
    """The passes before `exchange`, and from it on."""
    passes = [step for step in steps if isinstance(step, BatchPass)]
    first = next((number for number, step in enumerate(passes) if isinstance(step, Exchange)), len(passes))
    return passes[:first], passes[first:]


def _run(steps: Sequence[BatchPass], batch: Batch | None) -> None:
    """Run all `steps` on `batch`, if there is one."""
    for step in steps if batch is not None else ():
        assert batch is not None
        with Naming(step.name, batch.fqn):
            step.run_batch(batch)


@contextlib.contextmanager
def _keeping_a_promise(behind: Sequence[BatchPass], waiting: Batch | None) -> Iterator[None]:
    """A block after whose failure this rank still takes part in the batch `waiting`, if the others do.

    It has arrived there, so that they may have begun; then the failure goes on its way.
    """
    try:
        yield
    except Exception:
        with contextlib.suppress(Exception):
            _run(behind, waiting)
        raise
