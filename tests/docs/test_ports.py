"""The ports in `docs/ports/`: their pages tell the truth, and what they patch computes the same."""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import pickle
import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import tqdm.std
from huggingface_hub.utils import enable_progress_bars
from huggingface_hub.utils import tqdm as hub_tqdm
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm as auto_tqdm
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.loss import loss_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import patches
from tests.helpers.models import tiny_config
from tests.helpers.snapshot import Snapshot

PORTS = Path(__file__).parents[2] / "docs" / "ports"
sys.path.append(str(PORTS))

import liger_llama  # noqa: E402 - beside its page
import prefix_attention  # noqa: E402, F401 - registers its patches
import reference  # noqa: E402
import tqdm_downloads  # noqa: E402

PAGES = sorted(page.stem for page in PORTS.glob("*.md"))
BLOCK = re.compile(r"(?P<run><!-- run -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LLAMA = patches.select("liger-llama")
OWNERS = (
    modeling_llama,
    *(value for value in vars(modeling_llama).values() if isinstance(value, type)),
    loss_utils,
    ALL_ATTENTION_FUNCTIONS._local_mapping,
    ALL_ATTENTION_FUNCTIONS._global_mapping,
    ThreadPoolExecutor,
    tqdm.std.tqdm,
    auto_tqdm,
)


@pytest.fixture(scope="module", autouse=True)
def _used() -> None:
    """Lets transformers and tqdm put onto their classes what they keep there."""
    bar(total=1).update()
    llama().generate(TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=2)


@pytest.fixture(autouse=True)
def _unchanged() -> Iterator[None]:
    """Fails a test that leaves anything of what the ports patch other than it was."""
    taken = Snapshot(*OWNERS)
    yield
    active, differences = patches.active(), taken.differences()
    taken.restore()
    patches.revert(*active)
    torch._dynamo.reset()
    assert active == []
    assert differences == []


# Pages ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_runs_prints_what_it_says(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PORTS)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    expected = None
    for block in BLOCK.finditer((PORTS / f"{page}.md").read_text()):
        if block["language"] == "text":
            assert without_times(block["text"]) == without_times(str(expected))
            expected = ""
        elif block["run"]:
            assert not expected, "the output of the block before is missing"
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(block["text"], "train.py", "exec"), namespace)
            expected = printed.getvalue()
        else:
            assert block["text"] in (PORTS / f"{page}.py").read_text()
    assert not expected


def without_times(text: str) -> str:
    return re.sub(r"\d{4}-\d\d-\d\dT[\d:]{8}\+00:00", "TIME", text)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_counts_the_lines_of_its_module(page: str) -> None:
    text = (PORTS / f"{page}.md").read_text()
    *parts, ported = (int(number) for number in re.findall(r"^\| [^|]+ \| (\d+) \|$", text, re.MULTILINE))
    assert ported == code_lines((PORTS / f"{page}.py").read_text())
    assert len(parts) == 1 or sum(parts[:-1]) == parts[-1]


def code_lines(source: str) -> int:
    """Lines that are neither blank, nor a comment, nor of a docstring."""
    lines = {number for number, line in enumerate(source.splitlines(), 1) if line.strip() and line.strip()[0] != "#"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


# Liger's Llama --------------------------------------------------------------------------------------------------------


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(**changes)).eval()


TOKENS = torch.arange(18).view(2, 9) * 5 % 96
COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def maybe(compiled: bool, model: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="eager", fullgraph=True) if compiled else model


@pytest.mark.parametrize(
    ("dtype", "compiled"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
def test_the_logits_are_the_same_and_every_patch_is_called(dtype: torch.dtype, compiled: bool) -> None:
    model = llama().to(dtype)
    stock = model(TOKENS).logits
    with patches.transaction("liger-llama", reason="a test", count_calls=True):
        patched = maybe(compiled, model)(TOKENS).logits
        calls = [row.calls for row in patches.audit()]
    torch.testing.assert_close(patched, stock, atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=1e-4)
    assert compiled or calls == [2, 2, 5, 2, 1]


@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize("selected", ["liger-llama", "liger.cross-entropy"])
def test_the_loss_and_its_gradients_are_the_same(selected: str, items: int | None) -> None:
    model = llama().train()
    labels = TOKENS.where(TOKENS > 10, -100)

    def step() -> tuple[Any, torch.Tensor]:
        model.zero_grad()
        out = model(TOKENS, labels=labels, num_items_in_batch=items)
        out.loss.backward()
        return out, model.lm_head.weight.grad.clone()

    stock, stock_gradient = step()
    with patches.transaction(selected, reason="a test"):
        patched, gradient = step()
    torch.testing.assert_close(patched.loss, stock.loss)
    torch.testing.assert_close(gradient, stock_gradient)
    assert (patched.logits is None) == (selected == "liger-llama")


@pytest.mark.parametrize("saved", [None, "norm", "lm_head"])
def test_an_adapted_model_is_patched_too(saved: str | None) -> None:
    config = LoraConfig(target_modules="all-linear", modules_to_save=saved and [saved])
    model = get_peft_model(llama(), config).train()
    stock = model(TOKENS, labels=TOKENS).loss
    with liger_llama.on_model(model):
        out = model(TOKENS, labels=TOKENS)
    assert out.logits is None
    torch.testing.assert_close(out.loss, stock)


def test_checkpointed_layers_are_recomputed_with_the_same_kernels() -> None:
    model = llama().train()
    model.activation_checkpointing_enable()
    with patches.transaction("liger-llama", on=list(model.modules()), reason="a test", count_calls=True):
        model(TOKENS, labels=TOKENS).loss.backward()
        assert [row.calls for row in patches.audit()] == [4, 4, 9, 4, 1]


def test_two_ways_to_compute_the_loss_are_refused() -> None:
    with pytest.raises(patches.ConflictError, match=r"liger.llama-loss"):
        patches.transaction("liger-llama", "liger.cross-entropy", reason="a test").__enter__()


def test_generation_is_the_same() -> None:
    model = llama()
    mask = torch.ones_like(TOKENS)
    stock = model.generate(TOKENS, attention_mask=mask, max_new_tokens=4, do_sample=False)
    with patches.transaction("liger-llama", reason="a test"):
        assert torch.equal(model.generate(TOKENS, attention_mask=mask, max_new_tokens=4, do_sample=False), stock)


@COMPILED
def test_one_model_is_patched_and_no_other(compiled: bool) -> None:
    mine, others = llama(), llama()
    stock = others(TOKENS).logits
    with patches.transaction("liger-llama", on=list(mine.modules()), reason="a test", count_calls=True):
        assert torch.equal(maybe(compiled, others)(TOKENS).logits, stock)
        assert [row.calls for row in patches.audit()] == [0] * 5
        patched = maybe(compiled, mine)(TOKENS).logits
        assert compiled or [row.calls for row in patches.audit()] == [2, 2, 5, 2, 1]
    torch.testing.assert_close(patched, stock, atol=1e-6, rtol=1e-4)
    assert not torch.equal(patched, stock)


def test_models_in_two_threads_are_not_mistaken_for_each_other() -> None:
    mine, others = llama(), llama()
    rotary = patches.get("liger.llama-rotary")
    seen: list[int] = []

    def spy(wrapped: Any, instance: None, args: Any, kwargs: Any) -> Any:
        seen.append(threading.get_ident())
        return wrapped(*args, **kwargs)

    spied = patches.Patch(
        id="liger.spy", target=rotary.target, wrapper=spy, subject=rotary.subject, needs=rotary.needs, reason="a test"
    )
    threads = [
        threading.Thread(target=lambda model=model: [model(TOKENS) for _ in range(20)]) for model in (mine, others)
    ]
    with patches.transaction(spied, on=list(mine.modules())):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == [threads[0].ident] * 40


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
@pytest.mark.parametrize("whole", [False, True], ids=["one model", "process"])
def test_a_patched_model_is_copied(copied: Callable[[Any], Any], whole: bool) -> None:
    model = llama()
    stock = model(TOKENS).logits
    with patches.transaction("liger-llama", reason="a test") if whole else liger_llama.on_model(model):
        twin = copied(model)
        assert [vars(module).keys() for module in twin.modules()] == [vars(module).keys() for module in model.modules()]
        torch.testing.assert_close(twin(TOKENS).logits, stock)
    assert torch.equal(twin(TOKENS).logits, stock)


def test_biases_of_the_mlp_are_kept() -> None:
    with patches.transaction("liger-llama", reason="a test"):
        assert llama(mlp_bias=True).model.layers[0].mlp.up_proj.bias is not None


def test_another_activation_takes_the_stock_way() -> None:
    model = llama(hidden_act="gelu")
    stock = model(TOKENS).logits
    with patches.transaction("liger.llama-swiglu", reason="a test"):
        assert torch.equal(model(TOKENS).logits, stock)


def test_replacing_the_class_as_the_original_does_breaks_pickling(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setattr(modeling_llama, "LlamaMLP", type("LigerSwiGLUMLP", (torch.nn.Module,), {}))
    with pytest.raises(pickle.PicklingError, match="not the same object"):
        pickle.dumps(model)


# verl's attention -----------------------------------------------------------------------------------------------------


@COMPILED
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_answers_are_as_each_alone(attention: str, compiled: bool) -> None:
    model = llama(attn_implementation=attention)
    prompt, *answers = torch.arange(16).split((5, 3, 8))
    grouper = reference.PrefixGrouper(5, (3, 8))
    packed = torch.cat((prompt, *answers))[None]
    with patches.transaction("verl-prefix", reason="a test"):
        forward = maybe(compiled, model)
        logits = forward(packed, position_ids=grouper.positions, prefix_grouper=grouper, use_cache=False).logits[0]
        torch.testing.assert_close(model(TOKENS).logits, llama(attn_implementation=attention)(TOKENS).logits)
    for answer, found in zip(answers, logits[5:].split((3, 8)), strict=True):
        torch.testing.assert_close(found, model(torch.cat((prompt, answer))[None]).logits[0, 5:])


def test_a_registration_in_the_class_counts_after_undoing() -> None:
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with patches.transaction("verl-prefix", reason="a test"):
        assert "sdpa" in ALL_ATTENTION_FUNCTIONS._local_mapping
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == {}
    AttentionInterface.register("sdpa", print)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is print
    AttentionInterface.register("sdpa", stock)


# Xinference's downloads -----------------------------------------------------------------------------------------------


def bar(**options: Any) -> Any:
    return auto_tqdm(file=io.StringIO(), mininterval=0, **options)


def test_progress_is_that_of_the_files() -> None:
    enable_progress_bars()  # which other tests may have turned off
    with tqdm_downloads.Download() as download:
        files = bar(total=2)
        assert download.progress == 0
        data = hub_tqdm(total=100, unit="B", file=io.StringIO(), mininterval=0)  # the hub's own subclass
        data.update(50)
        assert download.progress == 0.25
        data.update(50)
        assert download.progress == 0.5
        files.update()
        assert download.progress == 0.5
        bar(total=10, disable=True).update()
        assert download.progress == 0.5


def test_a_cancelled_download_raises_at_its_next_update_and_no_other_does() -> None:
    with tqdm_downloads.Download() as first:
        mine = bar(total=2)
        with tqdm_downloads.Download(KeyError) as second:
            theirs = bar(total=2)
            second.cancel()
            with pytest.raises(KeyError, match="Download cancelled"):
                theirs.update()
        mine.update()
        assert first.progress == 0.5
    theirs.update()  # its download has ended


def test_downloads_in_two_threads_keep_their_bars_apart() -> None:
    both = threading.Barrier(2)

    def run(total: int) -> float:
        with tqdm_downloads.Download() as download:
            both.wait()
            with ThreadPoolExecutor(1) as pool:
                pool.submit(lambda: bar(total=total).update()).result()
            both.wait()
            return download.progress

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, (2, 4))) == [0.5, 0.25]


def test_a_patch_of_the_base_reaches_the_subclass_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    with tqdm_downloads.Download():
        bar(total=1).update()
    seen: list[int] = []
    monkeypatch.setattr(tqdm.std.tqdm, "update", lambda self, n=1: seen.append(n))
    bar(total=1).update()
    assert seen == [1]
