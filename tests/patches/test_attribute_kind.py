from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import patches
from tests.helpers.declare import LAYERS, declare
from tests.helpers.fake_upstream import layers
from tests.helpers.snapshot import Snapshot

pytestmark = pytest.mark.usefixtures("unchanged")


def reading(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    assert (args, kwargs) == ((), {})
    return "read", wrapped()


def attribute(name: str, owner: str = f"{LAYERS}:Holder", **fields: Any) -> patches.Patch:
    return declare("attribute", f"{owner}.{name}", kind="attribute", **{"wrapper": reading, **fields})


class TestLookAlike:
    def test_reads_are_wrapped_wherever_the_value_is(self, unchanged: Snapshot) -> None:
        hidden, stored = layers.Holder("hidden"), layers.Holder("hidden")
        stored.weight = "stored"
        with patches.transaction(attribute("weight"), reason="a test"):
            assert (hidden.weight, stored.weight) == (("read", "hidden"), ("read", "stored"))
        assert (hidden.weight, stored.weight) == ("hidden", "stored")
        assert unchanged.differences() == []

    def test_uncovered_instances_behave_as_stock(self) -> None:
        covered, other = layers.Holder(1), layers.Holder(2)
        with patches.transaction(patches.on(attribute("weight"), [covered]), reason="a test"):
            assert (covered.weight, other.weight) == (("read", 1), 2)
            other.weight = 3
            assert (other.weight, vars(other)["weight"]) == (3, 3)
            del other.weight
            assert other.weight == 2
            with pytest.raises(AttributeError, match="has no attribute 'weight'"):
                del other.weight

    def test_an_absent_attribute_is_absent_with_the_message_of_the_class(self) -> None:
        with patches.transaction(attribute("absent"), reason="a test"):
            assert not hasattr(layers.Holder(1), "absent")
            assert getattr(layers.Holder(1), "absent", "default") == "default"
            with pytest.raises(AttributeError, match="stock: no absent"):
                _ = layers.Holder(1).absent

    def test_without_getattr_the_message_is_pythons(self) -> None:
        base = layers.Base()
        with pytest.raises(AttributeError) as stock:
            _ = base.absent
        patch = attribute("absent", f"{LAYERS}:Base")
        with patches.transaction(patch, reason="a test"), pytest.raises(AttributeError) as patched:
            _ = base.absent
        assert str(patched.value) == str(stock.value)

    def test_a_default_on_the_class_or_a_base_is_read(self) -> None:
        for owner in (layers.Holder, layers.Leaf):
            patch = attribute("scale", f"{LAYERS}:{owner.__name__}")
            with patches.transaction(patch, reason="a test"):
                leaf = layers.Leaf(1)
                assert leaf.scale == ("read", 1)
                leaf.scale = 5
                assert leaf.scale == ("read", 5)
                del leaf.scale
                assert leaf.scale == ("read", 1)

    def test_a_method_that_instances_shadow_is_bound(self) -> None:
        with patches.transaction(attribute("forward", f"{LAYERS}:Base"), reason="a test"):
            tag, method = layers.Base().forward
        assert (tag, method(1)) == ("read", ("Base", 1))

    def test_a_wrapper_may_give_a_value_that_was_not_stored(self) -> None:
        with patches.transaction(attribute("absent", wrapper=lambda w, i, a, k: "made up"), reason="a test"):
            assert layers.Holder(1).absent == "made up"

    def test_a_mistake_in_the_wrapper_is_not_taken_for_an_absent_attribute(self) -> None:
        def mistaken(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
            return wrapped().no_such_thing

        patch = attribute("weight", wrapper=mistaken)
        with (
            patches.transaction(patch, reason="a test"),
            pytest.raises(patches.WrapperError, match="no_such_thing"),
        ):
            hasattr(layers.Holder(1), "weight")

    def test_patches_of_one_attribute_nest(self) -> None:
        second = declare("second", f"{LAYERS}:Holder.weight", kind="attribute")
        with patches.transaction(attribute("weight"), second, reason="a test"):
            assert layers.Holder(1).weight == ("second", ("read", 1))

    def test_another_kind_at_the_same_place_is_refused(self) -> None:
        other = declare("other", f"{LAYERS}:Holder.weight", kind="property")
        with (
            patches.transaction(attribute("weight"), reason="a test"),
            pytest.raises(patches.IncompatibleError, match="its kind is 'attribute'"),
        ):
            patches.transaction(other, reason="a test").__enter__()

    def test_copies_and_pickles_of_covered_instances_are_stock(self) -> None:
        covered = layers.Holder(1)
        with patches.transaction(patches.on(attribute("weight"), [covered]), reason="a test"):
            for copied in (copy.deepcopy(covered), pickle.loads(pickle.dumps(covered))):
                assert copied.weight == 1
                assert vars(copied) == vars(covered)


class Linear(nn.Linear):
    """A class of its own, so that `nn.Linear` is not touched."""


@pytest.fixture
def covered() -> Iterator[Linear]:
    """A module whose `weight` reads as negated. Any other of its class is stock."""

    def negated(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        stored = wrapped()
        return None if stored is None else -stored

    module = Linear(2, 2)
    taken = Snapshot(Linear, nn.Linear, nn.Module)
    patch = attribute("weight", f"{__name__}:Linear", wrapper=negated)
    with patches.transaction(patches.on(patch, [module]), reason="a test"):
        yield module
    assert taken.differences() == []


class TestModule:
    def test_parameters_read_through_the_wrapper_and_stay_parameters(self, covered: Linear) -> None:
        stock = Linear(2, 2)
        assert torch.equal(covered.weight, -covered._parameters["weight"])
        assert stock.weight is stock._parameters["weight"]
        assert [name for name, _ in covered.named_parameters()] == ["weight", "bias"]
        assert torch.equal(covered(torch.eye(2)), -covered._parameters["weight"].t() + covered.bias)

    def test_modules_of_the_class_can_be_made_while_the_patch_is_active(self, covered: Linear) -> None:
        assert set(Linear(2, 2)._parameters) == {"weight", "bias"}

    def test_state_dicts_save_and_load_what_is_stored(self, covered: Linear) -> None:
        saved = covered.state_dict()
        assert torch.equal(saved["weight"], covered._parameters["weight"])
        stock = Linear(2, 2)
        stock.load_state_dict(saved)
        assert torch.equal(stock.weight, saved["weight"])
        covered.load_state_dict({name: torch.ones_like(value) for name, value in saved.items()})
        assert torch.equal(covered.weight, -torch.ones(2, 2))

    @pytest.mark.parametrize("which", ["covered", "stock"])
    def test_assignment_and_deletion_act_as_stock(self, covered: Linear, which: str) -> None:
        module, sign = (covered, -1) if which == "covered" else (Linear(2, 2), 1)
        replacement = nn.Parameter(torch.ones(2, 2))
        module.weight = replacement
        assert module._parameters["weight"] is replacement
        assert "weight" not in vars(module)
        with pytest.raises(TypeError, match="cannot assign"):
            module.weight = torch.zeros(2, 2)
        del module.weight
        assert "weight" not in module._parameters
        assert not hasattr(module, "weight")
        with pytest.raises(AttributeError):
            del module.weight
        # As FSDP1 does: the parameter is gone, and a plain tensor is stored under its name in `__dict__`.
        plain = torch.full((2, 2), 3.0)
        module.weight = plain
        assert vars(module)["weight"] is plain
        assert torch.equal(module.weight, sign * plain)
        with pytest.raises(KeyError, match="already exists"):
            module.register_parameter("weight", replacement)
        del module.weight
        module.register_parameter("weight", replacement)
        assert torch.equal(module.weight, sign * replacement)
        module.weight = None
        assert module.weight is None
        assert "weight" in module._parameters

    def test_a_buffer_and_a_submodule_of_that_name_are_found(self, covered: Linear) -> None:
        stock = Linear(2, 2)
        del stock.weight
        stock.register_buffer("weight", torch.ones(1))
        assert stock.weight is stock._buffers["weight"]
        del stock.weight
        stock.weight = nn.Identity()
        assert stock.weight is stock._modules["weight"]

    def test_copies_pickles_and_moves(self, covered: Linear) -> None:
        copied = copy.deepcopy(covered)
        assert torch.equal(copied.weight, covered._parameters["weight"])
        assert torch.equal(pickle.loads(pickle.dumps(covered)).weight, covered._parameters["weight"])
        covered.to(torch.float64)
        assert covered.weight.dtype == torch.float64
        assert covered.to("meta").weight.is_meta

    def test_an_absent_attribute_has_the_message_of_modules(self, covered: Linear) -> None:
        class Bare(Linear):
            def __init__(self) -> None:
                nn.Module.__init__(self)

        with pytest.raises(AttributeError, match="'Bare' object has no attribute 'weight'"):
            _ = Bare().weight

    def test_gradients_flow_through_what_is_read(self, covered: Linear) -> None:
        covered(torch.ones(1, 2)).sum().backward()
        assert torch.equal(covered._parameters["weight"].grad, -torch.ones(2, 2))
