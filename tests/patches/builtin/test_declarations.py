"""What every built-in patch owes its reader, and what importing one may not do."""

from __future__ import annotations

import subprocess
import sys

import pytest

import patches
from patches.builtin import BUILTIN


@pytest.mark.parametrize("patch_id", BUILTIN)
def test_each_has_a_window_a_probe_a_verification_and_a_link(patch_id: str) -> None:
    patch = patches.get(patch_id)
    assert patch.requires
    assert patch.probe is not None
    assert patch.verify is not None
    assert patch.upstream
    assert all(link.startswith("https://github.com/") for link in patch.upstream.split(" "))
    assert patch.wrapper.__doc__


def test_declaring_them_imports_no_upstream_library() -> None:
    code = (
        "import sys, patches\n"
        "from patches.builtin import BUILTIN\n"
        "for id in BUILTIN: patches.get(id)\n"
        "print(*{'torch', 'bitsandbytes', 'peft', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_gather_cites_the_cause_and_what_it_does() -> None:
    links = patches.get("torch.fsdp2-bit-exact-gather").upstream.split(" ")
    assert [link.partition("https://github.com/")[2] for link in links] == [
        "pytorch/pytorch/issues/159333",
        "bitsandbytes-foundation/bitsandbytes/issues/1945",
    ]
