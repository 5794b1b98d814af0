"""Scripts that are run as `__main__`, and looked at: as `python script.py` would run them, and with what acted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from surgery.cli import app
from tests.helpers.models import save_tiny

SCRIPT = """
import atexit, pickle, sys
class Own: pass
print(__name__, __file__, __spec__ is None, sys.argv, sys.path[0], pickle.loads(pickle.dumps(Own())).__class__ is Own)
atexit.register(lambda: print("at exit", Own.__name__))
def fail(): return 1 / 0
if "message" in sys.argv: sys.exit("a message")
if "three" in sys.argv: sys.exit(3)
if "chain" in sys.argv:
    try: fail()
    except ZeroDivisionError as error: raise ValueError("chained") from error
if "interrupt" in sys.argv: raise KeyboardInterrupt
"""

DRIVER = """
import sys
from surgery.run import run_as_main
before = sys.modules["__main__"]
code = run_as_main(sys.argv[1:])
assert sys.modules["__main__"] is before
assert "torch" not in sys.modules
raise SystemExit(code)
"""

TRAIN = """
import sys
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization_config=quant, dtype=torch.bfloat16)
print("read:", sum(p.nbytes for p in model.parameters() if not p.is_meta))
model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
model, optimizer = Accelerator(cpu=True).prepare(model, optimizer)
tokens = torch.arange(16).reshape(2, 8)
model(input_ids=tokens, labels=tokens).loss.backward()
optimizer.step()
"""

#: Sets what libraries read when they are imported, and begins with one that imports the others.
BIND = """
import os, sys
from importlib.util import find_spec
assert "torch" not in sys.modules
assert find_spec("transformers").origin.endswith("__init__.py")
os.environ["HF_ENDPOINT"] = "http://mirror.invalid"
import peft
from huggingface_hub.constants import ENDPOINT
from transformers import AutoModelForCausalLM
assert peft.__spec__.loader is peft.__loader__
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(ENDPOINT, {p.device.type for p in model.parameters()})
sys.exit(5)
"""


def python(*arguments: object, cwd: Path) -> Any:
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize(
    "words",
    [("script.py", "a", "--b"), ("script.py", "message"), ("script.py", "three"), ("script.py", "chain"), ("bad.py",)],
)
def test_a_script_does_as_it_would_alone(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "bad.py").write_text("def (")
    (tmp_path / "driver.py").write_text(DRIVER)
    alone, ours = python(*words, cwd=tmp_path), python("driver.py", *words, cwd=tmp_path)
    assert (ours.returncode, ours.stdout, ours.stderr) == (alone.returncode, alone.stdout, alone.stderr)


def test_a_module_does_too_and_an_interrupt_ends_it(tmp_path: Path) -> None:
    package = tmp_path / "own"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "script.py").write_text(SCRIPT)
    (tmp_path / "driver.py").write_text(DRIVER)
    alone, ours = (python(*before, "-m", "own.script", "a", cwd=tmp_path) for before in ((), ("driver.py",)))
    assert (ours.returncode, ours.stdout) == (0, alone.stdout)
    ended = python("driver.py", package / "script.py", "interrupt", cwd=tmp_path)
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (130, "KeyboardInterrupt")
    assert "run.py" not in ended.stderr


def test_nothing_is_imported_before_the_script_does(tmp_path: Path) -> None:
    script, model = tmp_path / "bind.py", save_tiny(tmp_path / "model")
    script.write_text(BIND)
    done = python("-m", "surgery", "run", "--apply", "accelerate.fsdp-on-cpu", script, model, cwd=tmp_path)
    assert done.stdout == "http://mirror.invalid {'meta'}\n", done.stderr
    assert done.returncode == 5


def test_a_script_that_runs_is_looked_at(tmp_path: Path) -> None:
    script, model = tmp_path / "train.py", save_tiny(tmp_path / "model")
    script.write_text(TRAIN)
    done = python("-m", "surgery", "doctor", "--json", script, "--model", model, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "read: 0\n" in done.stderr
    told = json.loads(done.stdout)
    assert told["healthy"]
    assert (told["settings"]["model"]["value"], told["findings"]) == (str(model), [])
    acted = {each["id"]: each for each in told["run"]["acted"]}
    assert {each["state"] for each in acted.values()} == {"reverted"}
    counts = [acted[each]["acted"] for each in ("transformers.bind-at-load", "accelerate.fill-replicated")]
    assert counts == [1, 1]
    assert all(0 <= each["passed"] <= each["calls"] for each in acted.values())
    assert acted["accelerate.fill-sharded"]["calls"] == 0
    step = told["run"]["first_step"]
    assert step["mesh"] == {}
    assert 0 < step["host_peak"] < 10 * told["plan"]["ranks"][0]["train"]["host_peak"]
    assert {each["verdict"] for each in told["patches"]} <= {"needed", "obsolete"}


def test_settings_alone_are_diagnosed() -> None:
    words = ("--fsdp", "--load_in_4bit", "--bnb_4bit_quant_storage=bfloat16")
    told = CliRunner().invoke(app, ["doctor", "--device", "cuda", "--world", "2", "--", *words])
    assert told.exit_code == 1, told.output
    text = re.sub(r"\s+", " ", told.stdout)
    assert "silent-corruption: FSDP2 gathers 4-bit weights packed as bfloat16" in text
    assert "torchrun --nproc-per-node 2 -m surgery run SCRIPT" in text


def test_what_is_neither_a_script_nor_an_option_is_refused(tmp_path: Path) -> None:
    for words, found in (("--aply", "'--aply', an option"), ("-m", "-m alone"), (str(tmp_path), repr(str(tmp_path)))):
        refused = CliRunner().invoke(app, ["run", words])
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert found in refused.stderr
