from __future__ import annotations

from importlib import metadata

from patches import versions


def test_a_package_belongs_to_the_distributions_that_python_finds_for_it() -> None:
    expected = metadata.packages_distributions()
    assert {"patches", "torch", "bitsandbytes", "yaml"} <= expected.keys()  # yaml is not what its distribution is named
    found = {package: set(versions.distributions_of(package)) for package in expected}
    assert found == {package: set(names) for package, names in expected.items()}


def test_what_is_pythons_own_belongs_to_none() -> None:
    assert versions.distributions_of("json") == ()
    assert versions.owner_of("json.decoder") == "json.decoder"
