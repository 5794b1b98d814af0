"""An adapter's base model is found from another working folder by plain PEFT; its tokenizer lies beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery.adapters.metadata import TOKENIZER_FILES, base_folder, config_to_save, read_tokenizer, render_card

COMMIT = "0123456789abcdef0123456789abcdef01234567"

SAVE = """
import sys, warnings, surgery
from peft import LoraConfig
warnings.simplefilter("error", UserWarning)
for name, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    with surgery.qlora(name, lora=lora, report=surgery.Report()) as model:
        surgery.save_adapter(model, folder)
"""

LOAD = """
import os, sys
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    print("LOADED", type(model).__name__, len(AutoTokenizer.from_pretrained(folder)))
"""


def python(code: str, *arguments: object, cwd: Path, hub: Path) -> str:
    environment = {**os.environ, "HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd, env=environment, check=False, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(400)
def test_base_is_found_from_another_folder(tiny: Path, tmp_path: Path) -> None:
    here, elsewhere, hub = tmp_path / "here", tmp_path / "elsewhere", tmp_path / "hub"
    repository = hub / "hub" / "models--team--tiny"
    shutil.copytree(tiny, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(tiny, here / "base")
    elsewhere.mkdir()

    python(SAVE, "base", "of-folder", "team/tiny", "of-hub", cwd=here, hub=hub)
    saved = {name: json.loads((here / name / "adapter_config.json").read_text()) for name in ("of-folder", "of-hub")}
    found = {name: (config["base_model_name_or_path"], config["revision"]) for name, config in saved.items()}
    assert found == {"of-folder": (str(here / "base"), None), "of-hub": ("team/tiny", COMMIT)}
    assert {config["task_type"] for config in saved.values()} == {"CAUSAL_LM"}
    for name in saved:
        assert read_tokenizer(here / name) == read_tokenizer(tiny)
    card = (here / "of-hub" / "README.md").read_text()
    assert card.startswith("---\nbase_model: team/tiny\nlibrary_name: peft\n")
    assert f"| revision | {COMMIT} |" in card
    assert "base_model:" not in (here / "of-folder" / "README.md").read_text()

    loaded = python(LOAD, here / "of-folder", here / "of-hub", cwd=elsewhere, hub=hub)
    assert loaded.count("LOADED PeftModelForCausalLM 280") == 2


class Plain(nn.Module):
    """No model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.first(x)


def test_task_of_another_model_is_left_open() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Plain(), LoraConfig(target_modules={"first"}))
    config: Any = config_to_save(model, "default")
    assert config.task_type is None
    assert config.auto_mapping == {"base_model_class": "Plain", "parent_library": __name__}
    assert (config.target_modules, config.inference_mode) == (["first"], True)
    assert not model.peft_config["default"].inference_mode
    assert base_folder(config) is None
    assert "pipeline_tag" not in render_card(config, {})


def test_adapter_that_was_added_later_has_the_same_base() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Plain(), LoraConfig(target_modules=["first"]))
    model.peft_config["default"].base_model_name_or_path = "team/tiny"
    model.peft_config["default"].revision = COMMIT
    model.add_adapter("second", LoraConfig(target_modules=["first"]))
    model.add_adapter("third", LoraConfig(target_modules=["first"], base_model_name_or_path="team/other"))
    saved = [config_to_save(model, name) for name in ("default", "second", "third")]
    found = [(config.base_model_name_or_path, config.revision) for config in saved]
    assert found == [("team/tiny", COMMIT), ("team/tiny", COMMIT), ("team/other", None)]


@pytest.mark.parametrize("name", ["/nowhere", "not an id!", "a/b/c", "../x", "team/never-downloaded", "", None])
def test_base_that_is_not_on_this_machine(name: str | None) -> None:
    from peft import LoraConfig

    assert base_folder(LoraConfig(base_model_name_or_path=name)) is None


def test_given_task_is_kept(tiny: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(target_modules=["q_proj"], task_type="FEATURE_EXTRACTION")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), lora)
    assert config_to_save(model, "default").task_type == "FEATURE_EXTRACTION"


def test_tokenizers_of_every_causal_lm_are_known() -> None:
    """As far as the libraries that they need are installed."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    classes = [TOKENIZER_MAPPING_NAMES.get(kind) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    files: set[str] = set()
    for name in sorted({name for name in classes if isinstance(name, str)}):
        with suppress(ImportError):
            files |= set(getattr(tokenizer_class_from_name(name), "vocab_files_names", {}).values())
    assert len(files) > 8
    assert files <= set(TOKENIZER_FILES)


def test_tokenizer_that_cannot_be_read_is_left_out_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a")
    (tmp_path / "tokenization_custom.py").write_text("raise SystemExit")
    assert read_tokenizer(tmp_path) == {"vocab.txt": b"a"}
    (tmp_path / "tokenizer.json").symlink_to("/proc/self/mem")  # a file that is there, and gives an I/O error
    with pytest.warns(UserWarning, match="tokenizer in .* cannot be read, and is left out"):
        assert read_tokenizer(tmp_path) == {}
