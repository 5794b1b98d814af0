"""Captured calls, with recordings that are played by running the model again: the tests have no GPU to replay on."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_unflatten
from torch.utils.checkpoint import checkpoint

import surgery
from surgery.sharding.steps import Steps
from surgery.step import graphs, recording
from surgery.step.graphs import Calls, capture
from surgery.step.recording import CannotRecordError, Recording, _aliases, check_reaches, hand_over, is_recordable


class Net(nn.Module):
    """Two layers, of which one is frozen; returns a loss, what it is made of, and a remark."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4).requires_grad_(False)
        self.second = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, *, scale: Any = 1.0, attention_mask: Any = None, **_: Any) -> dict[str, Any]:
        logits = self.second(torch.tanh(self.first(x)))
        if attention_mask is not None:
            logits = logits * attention_mask.any(-1, keepdim=True)
        return {"loss": logits.square().mean() * scale, "logits": logits, "largest": logits.detach().max(), "of": "net"}


class Played(NamedTuple):
    """In the place of a CUDA graph."""

    replay: Callable[[], None]


class Running:
    """In the place of a recorder: its graphs run the model, and write where they have written first."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(
        self, model: nn.Module, steps: Steps, leaves: Sequence[Any], structure: TreeSpec, started: frozenset[int]
    ) -> Recording:
        self.recorded += 1
        made = Recording(model, steps, leaves, structure)
        args, kwargs = tree_unflatten(made.arguments, structure)
        run: dict[str, Any] = {}

        def forward() -> None:
            places = made.outputs
            with torch.enable_grad(), _aliases(model, made.trained) as run["leaves"]:
                run["ends"] = made.keep_result(cast("Any", model)._call_impl(*args, **kwargs))
            for place, new in zip(places, made.outputs, strict=bool(places)):
                place.data.copy_(new)
            made.outputs = places or made.outputs

        def found() -> list[torch.Tensor | None]:
            ends, starts = [run["ends"][number] for number in made.starts], list(made.starts.values())
            check_reaches(ends)
            return list(torch.autograd.grad(ends, run["leaves"], starts, allow_unused=True))

        def backward() -> None:
            for place, new in zip(made.gradients, found(), strict=True):
                if place is not None and new is not None:
                    place.copy_(new)

        forward()
        made.starts = {number: torch.zeros_like(run["ends"][number]) for number in sorted(started)}
        made.keep_gradients(found())
        made.forward, made.backward = Played(forward), Played(backward)
        return made


@pytest.fixture
def recorder() -> Running:
    return Running()


@pytest.fixture
def net(recorder: Running) -> Any:
    """A net whose third call of a kind is replayed; `net.plain` has the same weights and is not captured."""
    torch.manual_seed(0)
    net: Any = Net()
    plain = copy.deepcopy(net)
    net._compiled_call_impl = Calls(net, warmup=2, limit=2, record=recorder)
    object.__setattr__(net, "plain", plain)
    return net


def x(number: int, rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(number))


def warm(net: Any, rows: int = 5, **kwargs: Any) -> None:
    for number in range(2):
        net(x(number, rows), **kwargs)["loss"].backward()
    net.zero_grad()


def replayed(out: dict[str, Any]) -> bool:
    return type(out["loss"].grad_fn).__name__ == "ReplayBackward"


def gradients(net: nn.Module) -> list[torch.Tensor | None]:
    return [parameter.grad for parameter in net.parameters()]


def check_same(net: Any) -> None:
    for ours, theirs in zip(gradients(net), gradients(net.plain), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_replay_returns_what_the_model_does_and_differentiates_as_it_does(net: Any, recorder: Running) -> None:
    warm(net)
    for number in (7, 8):
        out, plain = net(x(number)), net.plain(x(number))
        assert replayed(out)
        assert out["of"] == "net"
        assert not out["largest"].requires_grad
        for name in ("loss", "logits", "largest"):
            assert torch.equal(out[name], plain[name])
        out["loss"].backward()
        plain["loss"].backward()
        check_same(net)  # added up, from the second on
    assert recorder.recorded == 1


def test_an_optimizer_trains_it_like_any_model(net: Any) -> None:
    models = (net, net.plain)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in models]
    for number in range(6):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            loss = model(x(number))["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=number % 2 == 0)
            losses.append(float(loss.detach()))
        assert losses[0] == losses[1]
        assert all(map(torch.equal, net.state_dict().values(), net.plain.state_dict().values()))


def test_outputs_of_one_step_outlive_the_next(net: Any) -> None:
    warm(net)
    out = net(x(7))
    out["loss"].backward()
    net(x(8))["loss"].backward()
    assert torch.equal(out["logits"], net.plain(x(7))["logits"])


def test_evaluation_and_other_kinds_of_calls_run_as_ever(net: Any, recorder: Running) -> None:
    warm(net)
    with torch.no_grad():
        net(x(7))
    net.eval()
    assert not replayed(net(x(7)))
    net.train()
    assert not replayed(net(x(7, rows=6)))  # not recorded yet
    assert not replayed(net(x(7).requires_grad_()))
    assert not replayed(net(x(7), remark=object()))
    assert recorder.recorded == 0
    assert replayed(net(x(7)))


def test_each_kind_has_a_recording_up_to_a_limit(net: Any, recorder: Running, caplog: pytest.LogCaptureFixture) -> None:
    warm(net)
    warm(net, scale=2.0)
    warm(net, rows=6)  # a third kind
    for given in ({}, {"scale": 2.0}):
        out = net(x(7), **given)
        assert replayed(out)
        assert torch.equal(out["loss"], net.plain(x(7), **given)["loss"])
        out["loss"].backward()
    assert not replayed(net(x(7, rows=6)))
    assert recorder.recorded == 2
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("surgery: calls of more than 2 shapes run without CUDA graphs: pad batches to a multiple")
    assert graphs.tally(net) == "2 shapes recorded, 0 that cannot be; 2 calls replayed, 7 run as without"
    assert graphs.tally(net.plain) == ""


def test_a_mask_of_ones_is_none(net: Any) -> None:
    warm(net, attention_mask=torch.ones(5, 4))
    out = net(x(7), attention_mask=None)
    assert replayed(out)
    out["loss"].backward()
    half = torch.tensor([[1.0] * 4, [0.0] * 4]).repeat(3, 1)[:5]
    out = net(x(7), attention_mask=half)
    assert not replayed(out)
    assert torch.equal(out["loss"], net.plain(x(7), attention_mask=half)["loss"])


def test_a_forward_before_the_last_ones_backward_is_not_replayed(net: Any) -> None:
    warm(net)
    first, second = net(x(7)), net(x(8))
    assert (replayed(first), replayed(second)) == (True, False)
    (first["loss"] + second["loss"]).backward()
    (net.plain(x(7))["loss"] + net.plain(x(8))["loss"]).backward()
    check_same(net)
    dropped = net(x(9))
    assert replayed(dropped)
    del dropped  # its backward cannot come any more
    assert replayed(net(x(9)))


def test_a_second_backward_is_refused(net: Any) -> None:
    warm(net)
    loss = net(x(7))["loss"]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated a second time"):
        loss.backward()


def test_backward_begins_where_it_did_before(net: Any) -> None:
    for number in range(2):
        out = net(x(number))
        (out["loss"] + out["logits"].sum()).backward()
    net.zero_grad()
    out, plain = net(x(7)), net.plain(x(7))
    (out["loss"] + 2 * out["logits"].sum()).backward()
    (plain["loss"] + 2 * plain["logits"].sum()).backward()
    check_same(net)
    for model in (net, net.plain):
        model.zero_grad()
        model(x(8))["loss"].backward()  # one of the two is zero
    check_same(net)


def test_backward_from_what_it_never_began_from_is_refused(net: Any) -> None:
    warm(net)
    with pytest.raises(RuntimeError, match=r"output 1 .* from \[0\]"):
        net(x(7))["logits"].sum().backward()


def test_a_model_that_is_never_differentiated_is_not_recorded(net: Any, recorder: Running) -> None:
    for number in range(4):
        net(x(number))
    assert recorder.recorded == 0


def test_moved_weights_are_recorded_again(net: Any, recorder: Running) -> None:
    warm(net)
    net(x(7))["loss"].backward()
    net.first.weight.data = net.first.weight.data * 2
    net.plain.first.weight.data.mul_(2)
    out = net(x(7))
    assert not replayed(out)
    assert torch.equal(out["loss"], net.plain(x(7))["loss"])
    out["loss"].backward()
    warm(net)
    assert torch.equal(net(x(8))["loss"], net.plain(x(8))["loss"])
    assert recorder.recorded == 2


def test_random_numbers_that_lost_their_state_are_recorded_again(
    net: Any, recorder: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm(net)
    net(x(7))["loss"].backward()
    monkeypatch.setattr(recording, "_given_up", Counter({None: 1}))  # a capture has failed on this device
    out = net(x(8))
    assert not replayed(out)
    out["loss"].backward()
    warm(net)
    assert replayed(net(x(7)))
    assert recorder.recorded == 2


def test_calls_before_a_recording_know_that_it_comes(net: Any) -> None:
    known: list[bool] = []
    net.register_forward_pre_hook(lambda *_: known.append(is_recordable()))
    warm(net)
    warm(net, scale=2.0)
    net(x(7), remark=object())["loss"].backward()  # never recorded
    net(x(7, rows=6))["loss"].backward()  # too many
    net.eval()(x(7))
    assert known == [True] * 4 + [False] * 3
    assert not is_recordable()


def test_what_cannot_be_recorded_runs_as_ever_and_says_why_once(net: Any, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_args: object) -> Recording:
        raise CannotRecordError("it returns a DynamicCache")

    net._compiled_call_impl._record = refuse
    warm(net)
    for number in (7, 8):
        out = net(x(number))
        assert not replayed(out)
        assert torch.equal(out["loss"], net.plain(x(number))["loss"])
    assert [record.message for record in caplog.records] == [
        "surgery: calls of this shape run without CUDA graphs: CannotRecordError: it returns a DynamicCache"
    ]


def test_reentrant_checkpoints_are_refused_since_their_gradients_would_be_missed() -> None:
    net, start = Net(), x(1).requires_grad_()
    check_reaches([checkpoint(net, start, use_reentrant=False)["loss"] * 2])
    with pytest.raises(CannotRecordError, match="use_reentrant=False"):
        check_reaches([checkpoint(lambda x: net(x)["loss"], start, use_reentrant=True) * 2])


def test_an_output_that_is_no_tensor_is_named(net: Any) -> None:
    made = Recording(net, Steps(net), [], tree_unflatten)  # type: ignore[arg-type]  # not read
    with pytest.raises(CannotRecordError, match="returns a object"):
        made.keep_result({"cache": object()})


def test_gradients_are_handed_over_as_backward_would_add_them() -> None:
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(4)]
    written: list[torch.Tensor | None] = [torch.full((3,), float(n)) for n in range(1, 4)]
    own = [torch.empty(3) if n < 3 else None for n in range(4)]
    parameters[1].grad = torch.full((3,), 10.0)
    hand_over(parameters, [*written, None], own)
    assert [None if p.grad is None else float(p.grad[0]) for p in parameters] == [1, 12, 3, None]
    hand_over(parameters, [*written, None], own)  # accumulation
    assert [None if p.grad is None else float(p.grad[0]) for p in parameters] == [2, 14, 6, None]
    for parameter in parameters:
        parameter.grad = None
    hand_over(parameters, [*written, None], own)
    assert [None if p.grad is None else float(p.grad[0]) for p in parameters] == [1, 2, 3, None]
    assert parameters[0].grad is own[0]
    assert [float(each[0]) for each in written if each is not None] == [1, 2, 3]


def test_a_model_on_the_cpu_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    assert capture(net) is net
    assert net._compiled_call_impl is None
    assert [record.message for record in caplog.records] == [
        "surgery: steps run without CUDA graphs: parameters are on cpu"
    ]


def test_capture_is_undone_by_release_and_not_copied(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_refused", lambda _model: None)
    surgery.release(net)  # of nothing
    net = Net()
    outer = nn.Sequential(net)
    capture(net)
    assert isinstance(net._compiled_call_impl, Calls)
    assert copy.deepcopy(net)._compiled_call_impl is None
    assert pickle.loads(pickle.dumps(net))._compiled_call_impl is None
    with pytest.raises(surgery.ConfigError, match="compiled or captured already"):
        capture(net)
    surgery.release(outer)
    assert "_compiled_call_impl" not in vars(net)
    capture(net)
    alive = weakref.ref(net)
    del net, outer
    gc.collect()
    assert alive() is None


def test_warmup_is_one_or_more() -> None:
    with pytest.raises(surgery.ConfigError, match="warmup"):
        capture(Net(), warmup=0)
