"""The pages of `docs/use/`: scripts are run as their commands say, on two CPU ranks with a tiny model."""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import shlex
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.docs.test_docs import ROOT, blocks
from tests.helpers.ranks import PRELOAD
from tests.helpers.tiny_tokenizer import save_with_tokenizer

RUN = ("trainer", "trl", "accelerate", "pytorch")
NOT_RUN = ("axolotl", "llama-factory", "verl")
COMMAND = re.compile(r"\$ torchrun --nproc-per-node 2 (?P<script>\S+) meta-llama/Llama-3.1-8B (?P<arguments>.+)")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.mark.distributed
@pytest.mark.parametrize("page", RUN)
def test_the_commands_of_a_page_train(page: str, model: Path, tmp_path: Path) -> None:
    losses = []
    for number, (script, arguments) in enumerate(commands(page, tmp_path)):
        output, *rest = arguments
        output = str(tmp_path / f"{output}_{number}")
        losses.append(torchrun(script, [str(model), output, *rest], log=tmp_path / f"log_{number}"))
        adapter = load_file(f"{output}/adapter_model.safetensors")
        assert len(adapter) == 2 * 2 * 7
        assert all(weight.any() for name, weight in adapter.items() if "lora_B" in name)
    assert losses
    assert all(found == losses[0] for found in losses[1:]) or page == "trl"  # of two objectives


def commands(page: str, folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Script and arguments of each command on a page; its scripts are written to `folder`."""
    found = list(blocks(f"use/{page}.md"))
    for block in found:
        if block.file is not None:
            (folder / block.file).write_text(block.text)
    scripts = "".join(block.text for block in found if block.file is not None)
    for block in found:
        if block.language == "python":
            assert block.text in scripts, f"{page}, line {block.line}"
        for line in block.text.splitlines() if block.language == "console" else ():
            command = COMMAND.fullmatch(line)
            assert command is not None, line
            yield folder / command["script"], shlex.split(command["arguments"])


def torchrun(script: Path, arguments: list[str], log: Path) -> list[str]:
    """Run a script on two ranks, which are forked from a process that has imported the libraries; the losses it prints.

    By torchrun each rank would import them again, for most of the time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(rank, port, script, arguments, log)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    said = [Path(f"{log}_{rank}").read_text() for rank in range(2)]
    assert [process.exitcode for process in ranks] == [0, 0], "\n".join(said)
    return re.findall(r"^loss [\d.]+$", said[0], re.MULTILINE)


def _rank(rank: int, port: int, script: Path, arguments: list[str], log: Path) -> None:
    """As if by `PATCHES_APPLY=accelerate.fsdp-on-cpu ACCELERATE_USE_CPU=true torchrun`."""
    import patches

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"ACCELERATE_USE_CPU": "true"}
    sys.argv = [str(script), *arguments]
    with Path(f"{log}_{rank}").open("w") as file, redirect_stdout(file):
        try:
            with patches.transaction("accelerate.fsdp-on-cpu", reason="there is no GPU"):
                alive = runpy.run_path(str(script), run_name="__main__")
            rows = {row.id for row in patches.audit()}
            assert {"accelerate.fill-sharded", "bitsandbytes.keep-packing"} <= rows, "it was not bound, or not filled"
            del alive
        except BaseException:  # noqa: BLE001  # brought back to the test, whatever it is
            traceback.print_exc(file=file)
            file.flush()
            os._exit(1)


@pytest.mark.parametrize("page", NOT_RUN)
def test_a_page_that_is_not_run_says_so(page: str) -> None:
    assert "not run in CI" in (ROOT / "docs" / "use" / f"{page}.md").read_text()
    for block in blocks(f"use/{page}.md"):
        if block.language == "yaml":
            read: Any = yaml.safe_load(block.text)
            assert isinstance(read, dict)
