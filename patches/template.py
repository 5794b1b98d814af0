"""Templates of a new patch and its tests, which pass before anything is filled in."""

from __future__ import annotations

from string import Template
from typing import Final

__all__ = ["PATCH", "TESTS"]

PATCH: Final = Template('''\
"""`$id`: $reason"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import patches

__all__ = ["$function"]


def defect_is_there() -> bool:
    """Whether the installed release has the defect.

    Replace the body: use the library in the way that triggers the defect, and return whether it occurs. Keep it
    quick, and leave nothing behind. If this returns False the patch is `obsolete`, and a transaction skips it.
    """
    return True


def check_effect() -> None:
    """Raise RuntimeError if the wrapper does not have its effect. Runs after the patch is applied.

    Replace the condition by a check of what the patch fixes.
    """
    found = $function(lambda: "stock", None, (), {})
    if found != "stock":
        raise RuntimeError(f"expected what the stock code returns, got {found!r}")


@patches.register(
    "$id",
    target="$target",
    reason="$reason",
    upstream="",  # the link to the report, or to the source that shows the defect
$known    probe=defect_is_there,
    verify=check_effect,
)
def $function(
    wrapped: Callable[..., Any],
    instance: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Replacement for `$target`.

    `wrapped` is the stock code, bound; `instance` is None for functions and static methods.
    """
    return wrapped(*args, **kwargs)
''')

TESTS: Final = Template('''\
"""`$id`: whether it is needed, its effect, and its complete removal."""

from __future__ import annotations

import pkgutil

import patches

from $module import $function

ID = "$id"
OWNER = pkgutil.resolve_name("$owner")


def test_the_installed_release_needs_it() -> None:
    assert str(patches.verdict(ID)) == "needed"


def test_it_has_its_effect_and_nothing_is_left_of_it() -> None:
    before = vars(OWNER).get("$attribute")
    with patches.transaction(ID, reason="a test") as transaction:
        assert [receipt.patch.wrapper for receipt in transaction.receipts] == [$function]
        assert vars(OWNER)["$attribute"] is not before
        # Call the library here, and assert that the defect is gone.
    assert vars(OWNER).get("$attribute") is before
''')
