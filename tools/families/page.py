"""The results page."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Final

from families.outcome import VERDICTS, Outcome

__all__ = ["page"]

LIBRARIES: Final = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")

HEAD: Final = """# Model families

`tools/family_sweep.py` takes every causal language model that the installed transformers knows, makes a small random
checkpoint of it, and loads that twice: with `AutoModelForCausalLM`, `BitsAndBytesConfig` and `get_peft_model`, and with
`surgery.qlora`. Compared are, bit for bit in one process: every parameter (packed 4-bit weights among them), every
buffer, their dtypes, the quantization state, the logits, the losses of two training steps with PEFT's default adapters
(`target_modules="all-linear"`), and the logits of a stock model with the adapter that was saved here.

What has a word in the column experts has fused experts, which stock leaves in 16 bits, as all of the above is compared.
In 4 bits, as they are here by default, the packed bytes of every expert are those of `quantize_4bit`, and the logits,
bit for bit, those of a stock model that has the values of these bytes in its experts; or they are refused, and stay in
16 bits with `experts=False`.

What has a word in the column FSDP2 was trained on two ranks too: in float32 its losses are those of one process within
1e-5, and in bfloat16 a stock model with the adapter that was saved has its logits, bit for bit; or FSDP2 is refused.

```console
$ python tools/family_sweep.py --output docs/models.md
$ python tools/family_sweep.py --families llama qwen3_moe --ranks all
```
"""


def page(found: Sequence[Outcome]) -> str:
    """Render the page in Markdown: the versions, the number of families by verdict, and a row for each family."""
    return "\n".join([HEAD, *_versions(), *_counts(found), *_rows(found)]) + "\n"


def _versions() -> Iterator[str]:
    installed = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    yield f"On a CPU with {installed}, Python {platform.python_version()}.\n"


def _counts(found: Sequence[Outcome]) -> Iterator[str]:
    counts = Counter(outcome.verdict for outcome in found)
    yield "| verdict | families | meaning |\n| --- | --- | --- |"
    yield from (f"| {verdict} | {counts[verdict]} | {meaning} |" for verdict, meaning in VERDICTS.items())
    yield ""


def _rows(found: Sequence[Outcome]) -> Iterator[str]:
    yield "| family | verdict | 4-bit layers | adapter tensors | experts | FSDP2 | why |\n" + "| --- " * 7 + "|"
    for outcome in sorted(found, key=lambda outcome: outcome.family):
        sizes = [str(size) if size else "" for size in (outcome.quantized, outcome.adapters)]
        cells = [f"`{outcome.family}`", outcome.verdict, *sizes, outcome.experts, outcome.sharded, _plain(outcome.why)]
        yield f"| {' | '.join(cells)} |"


def _plain(why: str) -> str:
    """Escape `why` for a table cell."""
    return why.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
