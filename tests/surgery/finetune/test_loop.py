"""The loop in one process: what accumulates, what is measured, what stops it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from surgery.finetune.batches import GlobalBatch, Schedule, collate, share
from surgery.finetune.encode import Sample
from surgery.finetune.loop import StepMetrics, Trainer, TrainingError, build_optimizer
from surgery.sharding.base import strategy_of

CPU = torch.device("cpu")


@dataclass
class Output:
    """FSDP finds the tensors of an output in dataclasses, as in those of transformers."""

    logits: torch.Tensor


class TinyLM(nn.Module):
    """Embeds, mixes each position with the mean of those before it, and predicts: causal, and without dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.calls: list[dict[str, Any]] = []

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Output:
        self.calls.append({"training": self.training, "autocast": torch.is_autocast_enabled("cpu"), **options})
        hidden = self.embed(input_ids)
        counts = torch.arange(1, hidden.shape[1] + 1).view(1, -1, 1)
        return Output(logits=self.head(hidden + hidden.cumsum(1) / counts))


def sample(*ids: int, learnt: list[int] | None = None) -> Sample:
    return Sample(ids=array("i", ids), learnt=array("b", learnt or [1] * len(ids)))


SAMPLES = [
    sample(1, 2, 3),
    sample(4, 5, 6, 7, 8, learnt=[0, 0, 0, 1, 1]),
    sample(9, 8),
    sample(3, 1, 4, 1, 5, 9, 2, 6, learnt=[0, 1, 1, 1, 1, 0, 0, 1]),
]


def trainer(model: nn.Module, *, lr: float = 0.1, steps: int = 10, **options: Any) -> Trainer:
    strategy = strategy_of(model, CPU)
    return Trainer(
        model=model,
        optimizer=build_optimizer(model, "sgd", lr=lr),
        strategy=strategy,
        schedule=Schedule(name="linear", peak=lr, steps=steps),
        scaler=strategy.grad_scaler(enabled=False),
        device=CPU,
        **options,
    )


def whole(batch_size: int, samples: list[Sample] = SAMPLES) -> GlobalBatch:
    return share(samples, range(len(samples)), batch_size=batch_size, world=1, rank=0, pad=0)


def test_accumulated_micro_batches_are_one_batch() -> None:
    results: dict[int, tuple[StepMetrics, dict[str, torch.Tensor]]] = {}
    for batch_size in (1, 3, 4):
        model = TinyLM()
        (metrics,) = trainer(model).train([whole(batch_size)])
        results[batch_size] = metrics, model.state_dict()
    expected, weights = results[4]
    for metrics, found in (results[1], results[3]):
        assert metrics.loss == pytest.approx(expected.loss, rel=1e-6)
        assert metrics.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
        torch.testing.assert_close(found, weights, rtol=1e-6, atol=1e-7)


def test_step_is_that_of_the_mean_over_tokens() -> None:
    model, reference = TinyLM(), TinyLM()
    batch = collate(SAMPLES, pad=0)
    logits = reference(batch.ids).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
    loss.backward()
    (metrics,) = trainer(model, lr=0.5).train([whole(1)])
    assert metrics.loss == pytest.approx(loss.item(), rel=1e-6)
    for parameter, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert expected.grad is not None
        torch.testing.assert_close(parameter, expected - 0.5 * expected.grad, rtol=1e-5, atol=1e-7)


def test_metrics_count_steps_tokens_and_rates() -> None:
    metrics = list(trainer(TinyLM(), lr=1.0, steps=2).train([whole(2), whole(2)]))
    assert [m.step for m in metrics] == [1, 2]
    assert [m.lr for m in metrics] == [1.0, 0.5]
    assert {m.tokens for m in metrics} == {3 + 5 + 2 + 8}
    assert metrics[1].loss < metrics[0].loss


def test_clipping_bounds_the_step_and_reports_the_norm_before() -> None:
    free, clipped = TinyLM(), TinyLM()
    before = torch.cat([p.detach().flatten().clone() for p in clipped.parameters()])
    (unclipped_metrics,) = trainer(free, lr=1.0).train([whole(4)])
    (metrics,) = trainer(clipped, lr=1.0, max_norm=0.01).train([whole(4)])
    assert metrics.grad_norm == pytest.approx(unclipped_metrics.grad_norm)
    moved = torch.cat([p.detach().flatten() for p in clipped.parameters()]) - before
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_loss_that_is_not_finite_stops_before_the_step() -> None:
    model = TinyLM()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    before = model.embed.weight.detach().clone()
    with pytest.raises(TrainingError, match="the loss of step 1 is nan") as caught:
        list(trainer(model).train([whole(4)]))
    assert caught.value.step == 1
    assert torch.equal(model.embed.weight, before)


def test_evaluation_is_the_mean_over_tokens_and_changes_nothing() -> None:
    model = TinyLM().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (reference,) = trainer(TinyLM()).train([whole(4)])
    loss = trainer(model).evaluate([whole(1, SAMPLES[:1]), whole(2, SAMPLES[1:])])
    assert loss == pytest.approx(reference.loss, rel=1e-6)
    assert {call["training"] for call in model.calls} == {False}
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_model_is_called_without_a_cache_and_under_autocast_if_asked() -> None:
    model = TinyLM()
    list(trainer(model, autocast=torch.bfloat16).train([whole(1)]))
    assert {call["use_cache"] for call in model.calls} == {False}
    assert {call["autocast"] for call in model.calls} == {True}
    assert {call["attention_mask"] for call in model.calls} == {None}


def test_padding_changes_nothing() -> None:
    padded, alone = TinyLM(), TinyLM()
    (together,) = trainer(padded).train([whole(4)])
    (apart,) = trainer(alone).train([whole(1)])
    assert padded.calls[0]["attention_mask"] is not None
    assert together.loss == pytest.approx(apart.loss, rel=1e-6)


def test_scaler_gives_the_same_step() -> None:
    plain, scaled = TinyLM(), TinyLM()
    list(trainer(plain).train([whole(2)]))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    base = trainer(scaled)
    with_scaler = Trainer(**{**vars(base), "scaler": scaler})
    (metrics,) = with_scaler.train([whole(2)])
    torch.testing.assert_close(scaled.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-7)
    assert metrics.grad_norm < 100
