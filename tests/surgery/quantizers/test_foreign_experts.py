"""Experts that transformers does not dispatch: which there are, and that they are refused by name."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig

import surgery
from surgery.quantizers.experts import Experts4bit, has_experts, left_out

#: Their classes, and the arguments that make them.
FOREIGN = {
    "dbrx.DbrxExpertGLU": lambda: (AutoConfig.for_model("dbrx").ffn_config,),
    "jetmoe.JetMoeParallelExperts": lambda: (2, 64, 64),
    "llama4.Llama4TextExperts": lambda: (AutoConfig.for_model("llama4_text"),),
    "longcat_flash.LongcatFlashExperts": lambda: (AutoConfig.for_model("longcat_flash"),),
    "step3p7.Step3p7Experts": lambda: (AutoConfig.for_model("step3p5"), 4),
}

#: Those that every token goes through stay in 16 bits, beside others that are packed.
SHARED = {"inkling.InklingSharedExperts"}


def test_no_other_class_is_named_for_experts_and_holds_parameters() -> None:
    found = set()
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        # Decorators, name and body of each class.
        for decorators, name, body in re.findall(
            r"^((?:@.*\n)*)class (\w*Expert\w*)\b.*\n((?:[ \t].*\n|\n)*)",
            file.read_text(encoding="utf-8"),
            re.MULTILINE,
        ):
            if "nn.Parameter(" in body and "use_experts_implementation" not in decorators:
                found.add(f"{file.parent.name}.{name}")
    assert found == FOREIGN.keys() | SHARED


@pytest.mark.parametrize("name", [*FOREIGN, *SHARED])
def test_they_are_refused_by_name_unless_they_are_shared(name: str) -> None:
    family, _, kind = name.partition(".")
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    with torch.device("meta"):
        arguments = FOREIGN[name]() if name in FOREIGN else (AutoConfig.for_model("inkling_text"),)
        experts = getattr(module, kind)(*arguments)
    quant = Experts4bit(surgery.Quant(), dtype=torch.bfloat16)
    assert has_experts(experts) == (name in FOREIGN)
    assert left_out(experts) == []
    assert not Experts4bit(surgery.Quant(experts=False), dtype=torch.bfloat16).takes(experts)
    if name in SHARED:
        assert not quant.takes(experts)
        return
    with pytest.raises(surgery.ConfigError, match=rf"^{kind} holds its experts .*--experts 16bit"):
        quant.takes(experts)
