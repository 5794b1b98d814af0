from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import patches
from patches.registry import Registry
from tests.helpers.declare import FUNCTIONS, declare, tagging

SCALE = f"{FUNCTIONS}:scale"


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name=name, value=value, group="patches.registry")


def test_the_decorator_returns_the_function_and_registers_it() -> None:
    registry = Registry()

    def double(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return 2 * wrapped(*args, **kwargs)

    assert registry.register("fake.double", target=SCALE, reason="a test", tags=("x",))(double) is double
    patch = registry.get("fake.double")
    assert (patch.wrapper, patch.target, patch.tags) == (double, SCALE, ("x",))


def test_a_patch_is_registered_as_it_is() -> None:
    registry = Registry()
    patch = declare("a", SCALE)
    assert registry.register(patch) is patch
    assert registry.get("fake.a") is patch


def test_two_claimants_are_both_named() -> None:
    registry = Registry()
    registry.register(declare("a", SCALE, wrapper=tagging("a")))

    def other(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return wrapped(*args, **kwargs)

    with pytest.raises(patches.DuplicatePatchError, match="claimed twice") as caught:
        registry.register("fake.a", target=SCALE, reason="a test")(other)
    first, second = caught.value.claimants
    assert "tagging" in first
    assert "test_two_claimants_are_both_named" in second


def test_a_module_may_declare_its_own_patch_again() -> None:
    registry = Registry()
    registry.register(declare("a", SCALE))
    again = registry.register(declare("a", SCALE))
    assert registry.get("fake.a") is again


def test_the_id_of_a_builtin_patch_is_taken_before_it_is_imported() -> None:
    registry = Registry(builtin={"fake.a": "some.module"})
    with pytest.raises(patches.DuplicatePatchError, match=r"some\.module"):
        registry.register(declare("a", SCALE))


def test_an_unknown_id_gets_a_suggestion() -> None:
    registry = Registry(builtin={"fake.keep-packing": "some.module"})
    with pytest.raises(patches.UnknownPatchError, match=r"did you mean fake\.keep-packing") as caught:
        registry.get("fake.keep-paking")
    assert caught.value.suggestions == ("fake.keep-packing",)


def test_a_builtin_module_that_does_not_register_its_id_is_named() -> None:
    with pytest.raises(patches.UnknownPatchError, match=r"json was to register 'fake\.a'"):
        Registry(builtin={"fake.a": "json"}).get("fake.a")


OFFERED, QUIET = declare("offered", SCALE), declare("quiet", SCALE)


def test_an_entry_point_is_loaded_when_asked_for() -> None:
    offer = point("fake.offered", f"{__name__}:OFFERED")
    registry = Registry(find_entry_points=lambda: [offer, point("fake.other", "no_such_module")])
    assert registry.ids() == ["fake.offered", "fake.other"]
    assert registry.get("fake.offered") is OFFERED
    assert registry.get("fake.offered") is OFFERED


def test_what_is_installed_is_looked_for_again_where_an_id_is_new() -> None:
    installed = [point("fake.offered", f"{__name__}:OFFERED"), point("fake.quiet", f"{__name__}:QUIET")]
    find = mock.Mock(side_effect=[installed[:1], installed])
    registry = Registry(find_entry_points=find)
    assert registry.get("fake.offered") is OFFERED
    assert registry.get("fake.quiet") is QUIET
    assert find.call_count == 2
    find = mock.Mock(return_value=installed)
    registry = Registry(find_entry_points=find)
    assert (registry.get("fake.offered"), registry.get("fake.quiet")) == (OFFERED, QUIET)
    assert find.call_count == 1


def test_two_entry_points_with_one_id_are_refused_naming_both() -> None:
    offers = [point("fake.offered", "one:patch"), point("fake.offered", "two:patch")]
    with pytest.raises(patches.DuplicatePatchError, match=r"one:patch.*two:patch"):
        Registry(find_entry_points=lambda: offers).get("fake.offered")


def test_an_entry_point_that_leads_to_another_patch_is_refused() -> None:
    offer = point("fake.other", f"{__name__}:OFFERED")
    with pytest.raises(patches.UnknownPatchError, match=r"was to register 'fake\.other'"):
        Registry(find_entry_points=lambda: [offer]).get("fake.other")


def test_an_installed_distribution_is_found_and_named(tmp_path: Path) -> None:
    info = tmp_path / "third_party-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text("[patches.registry]\nthird.shout = third_party_patches\n")
    (tmp_path / "third_party_patches.py").write_text(
        "import patches\n"
        "@patches.register('third.shout', target='textwrap:indent', reason='a test')\n"
        "def shout(wrapped, instance, args, kwargs):\n"
        "    return wrapped(*args, **kwargs).upper()\n"
    )
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import patches, textwrap\n"
        "assert 'third.shout' in patches.ids()\n"
        "assert 'third_party_patches' not in sys.modules\n"
        "from patches.registry import REGISTRY\n"
        "assert REGISTRY.source('third.shout') == 'third-party 1.5 (third_party_patches)'\n"
        "with patches.transaction('third.shout', reason='a test'):\n"
        "    assert textwrap.indent('a', ' ') == ' A'\n"
        "assert textwrap.indent('a', ' ') == ' a'\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)


def test_every_builtin_patch_has_its_file() -> None:
    from patches.builtin import BUILTIN

    root = Path(patches.__file__).parent.parent
    missing = [module for module in BUILTIN.values() if not (root / f"{module.replace('.', '/')}.py").is_file()]
    assert missing == []


HEAVY = ("torch", "bitsandbytes", "peft", "typer", "rich", "packaging", "importlib.metadata")


def test_importing_the_package_imports_no_library_that_is_patched() -> None:
    program = (
        "import sys, wrapt; before = {*sys.modules}; import patches;"
        f"print({{*{HEAVY}}} & ({{*sys.modules}} - before))"
    )
    ran = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    assert ran.stdout.strip() == "set()"
