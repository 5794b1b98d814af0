"""Guards: how torch.compile remembers whether a patch covers an object that is met in a traced region.

Dynamo guards the identity of an object whose `id` is taken, so that each of many equal blocks of a model would be
compiled by itself. Only whether the object is covered matters. To guard just that takes `comptime`, which torch has for
such things, and internals of Dynamo behind it; an object of which these know nothing is guarded by its identity.
"""

from __future__ import annotations

from functools import partial
from typing import Any

__all__ = ["is_covered"]


def is_covered(link: Any, subject: object) -> bool:
    """`link.has(subject)`; to be called where torch.compile traces, and only there."""
    from torch._dynamo.comptime import comptime

    found: bool | None = None
    comptime(_find)
    return link.has(subject) if found is None else found


def _find(context: Any) -> None:
    """Set `found` in the traced frame of `is_covered`, and guard it."""
    from torch._dynamo.guards import install_guard
    from torch._dynamo.variables import ConstantVariable, UserDefinedObjectVariable

    frame = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    link, subject = (frame.symbolic_locals[name].realize() for name in ("link", "subject"))
    if not isinstance(subject, UserDefinedObjectVariable) or subject.source is None:
        return
    found = link.value.has(subject.value)
    install_guard(subject.source.make_guard(partial(_guard, link.value, found)))
    frame.symbolic_locals["found"] = ConstantVariable.create(found)


def _guard(link: Any, found: bool, builder: Any, guard: Any) -> None:  # noqa: FBT001 - torch calls it
    manager = builder.get_guard_manager(guard)
    text = [f"{guard.name} is {'' if found else 'not '}covered by {link.patch.id}"]
    if any(leaf.verbose_code_parts() == text for leaf in manager.get_leaf_guards()):
        return  # met more than once
    check = partial(_is_as_found, link, found)
    try:
        manager.add_lambda_guard(check, text, guard.user_stack)
    except TypeError:  # torch before 2.11
        manager.add_lambda_guard(check, text)


def _is_as_found(link: Any, found: bool, subject: object) -> bool:  # noqa: FBT001 - torch calls it
    return link.has(subject) is found
