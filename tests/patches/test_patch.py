from __future__ import annotations

from typing import Any

import pytest

import patches
from tests.helpers.declare import FUNCTIONS, declare, tagging


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", "nodot"),
        ("id", "Upper.case"),
        ("id", "a.b c"),
        ("target", "module.without.colon"),
        ("target", "module:"),
        ("reason", "  "),
        ("kind", "getter"),
        ("wrapper", "not callable"),
        ("wrapper", lambda wrapped: wrapped),
        ("needs", "a.b"),
        ("after", ("fake.tag",)),
        ("requires", {"torch": "about 2"}),
    ],
)
def test_a_wrong_field_is_named(field: str, value: Any) -> None:
    fields = {"id": "fake.tag", "target": f"{FUNCTIONS}:scale", "wrapper": tagging("tag"), "reason": "a test"}
    with pytest.raises(patches.DefinitionError, match=field) as caught:
        patches.Patch(**{**fields, field: value})
    assert caught.value.field == field


def test_what_a_patch_is_given_cannot_change_it_later() -> None:
    requires = {"wrapt": ">=1"}
    patch = declare("a", f"{FUNCTIONS}:scale", requires=requires, needs=["fake.b"])
    requires["wrapt"] = "<1"
    assert patch.requires == {"wrapt": ">=1"}
    assert patch.needs == ("fake.b",)
    with pytest.raises(TypeError):
        patch.requires["wrapt"] = "<1"  # type: ignore[index]


def test_patches_compare_by_identity() -> None:
    assert declare("a", f"{FUNCTIONS}:scale") != declare("a", f"{FUNCTIONS}:scale")
