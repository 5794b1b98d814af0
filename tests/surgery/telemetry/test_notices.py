"""Names of tensors in groups, and the line that says what happens to them."""

from __future__ import annotations

from surgery.telemetry.measurements import group_names, say


def test_names_that_differ_in_numbers_are_one_group() -> None:
    experts = [f"model.layers.{layer}.experts.{expert}.w1.weight" for layer in range(3) for expert in range(4)]
    assert group_names(["first.0.weight", *experts, "last.weight"]) == {
        "first.0.weight": 1,
        "model.layers.*.experts.*.w1.weight": 12,
        "last.weight": 1,
    }


def test_a_number_that_all_have_stays() -> None:
    assert group_names(["h.7.experts.0.w", "h.7.experts.1.w"]) == {"h.7.experts.*.w": 2}


def test_names_that_differ_otherwise_are_not_joined() -> None:
    assert group_names(["h.0.w1", "h.0.w2", "h.0", "h.x.w1"]) == {"h.0.w1": 1, "h.0.w2": 1, "h.0": 1, "h.x.w1": 1}
    assert group_names([]) == {}


def test_the_line_names_groups_with_counts() -> None:
    assert say("read_once_per_node", {"h.*.c_attn.weight": 1200, "head.weight": 1}) == (
        "1,201 tensors are merged, split, transposed or unpacked for the model, so read once per node, by one rank for "
        "the others: h.*.c_attn.weight (1,200), head.weight."
    )
    assert say("read_once_per_node", {"head.weight": 1}).startswith("1 tensor is merged")


def test_the_line_is_short_whatever_a_model_has() -> None:
    said = say("read_once_per_node", {f"part_{number}.*.weight": 2 for number in range(30)})
    assert said.endswith("part_6.*.weight (2), part_7.*.weight (2), 44 more.")
