"""Dependencies between packages, from the metadata of their distributions."""

from __future__ import annotations

from collections.abc import Sequence

from ..versions import distributions_of

__all__ = ["dependencies_first"]


def dependencies_first(packages: Sequence[str]) -> list[str]:
    """Sort packages so that each follows those that it requires; packages that require each other stay as given."""
    import graphlib

    names = {package: _names(package) for package in dict.fromkeys(packages)}
    required = {package: _required(distributions) for package, distributions in names.items()}
    graph = {
        package: [other for other in names if other != package and names[other] & required[package]]
        for package in names
    }
    try:
        return list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError:
        return list(names)


def _names(package: str) -> frozenset[str]:
    from packaging.utils import canonicalize_name

    return frozenset(canonicalize_name(name) for name in distributions_of(package))


def _required(distributions: frozenset[str]) -> frozenset[str]:
    from importlib import metadata

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for name in distributions for line in metadata.requires(name) or ()]
    requirements = [Requirement(line) for line in lines]
    # Extras only name packages that can be used together, often in both directions.
    return frozenset(canonicalize_name(one.name) for one in requirements if "extra" not in str(one.marker))
