"""Applying and undoing, however often, keeps nothing."""

from __future__ import annotations

import json
import subprocess
import sys


def test_memory_is_flat_over_thousands_of_cycles() -> None:
    command = [sys.executable, "tools/trial_memory.py", "--cycles", "2000", "--trace", "--json"]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    grown = json.loads(ran.stdout)["grown_mib"]
    assert len(grown) == 10
    assert max(grown) < 1
