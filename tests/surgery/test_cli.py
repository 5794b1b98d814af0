"""The command line: messages and exit codes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from patches.errors import PatchError
from surgery.cli import app, reports_errors
from surgery.errors import ConfigError, SurgeryError
from tests.helpers.models import save_tiny
from tests.helpers.tiny_tokenizer import VOCABULARY, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("checkpoint"), vocab_size=VOCABULARY)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "the cat", "completion": " sat on the mat"}\n' * 4)
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["finetune", *map(str, arguments)])


def refused(*arguments: object) -> str:
    """What stderr says, on one line, of arguments that must be refused."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    return re.sub(r"\s+", " ", result.stderr)


def test_help_shows_every_option_in_a_panel_and_examples() -> None:
    result = CliRunner().invoke(app, ["finetune", "--help"], terminal_width=200, env={"COLUMNS": "200"})
    assert result.exit_code == 0
    command = get_command(app).commands["finetune"]  # type: ignore[attr-defined]
    for parameter in command.params:
        assert parameter.opts[0].removeprefix("--") in result.stdout
        assert parameter.name == "model" or parameter.help
    for text in ("torchrun --nproc-per-node 2 -m surgery finetune", '{"prompt", "completion"}', "Exit codes"):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [("{", "train.jsonl:2: not JSON"), ('{"txt": 1}', "train.jsonl:2: expected the keys")],
)
def test_bad_line_of_data(data: Path, line: str, expected: str) -> None:
    data.write_text(f'{{"text": "a"}}\n{line}\n')
    assert expected in refused("no-such-model", "--data", data)


def test_data_that_is_missing_or_empty(tmp_path: Path) -> None:
    assert "missing.jsonl: cannot be read: No such file" in refused("m", "--data", tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").touch()
    assert "found an empty file" in refused("m", "--data", tmp_path / "empty.jsonl")


def test_checkpoint_that_is_missing(data: Path, tmp_path: Path) -> None:
    assert f"no checkpoint at {tmp_path / 'none'}" in refused(tmp_path / "none", "--data", data)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--mesh", "2,4"], "--mesh as REPLICATExSHARD, such as 2x4, found '2,4'"),
        (["--fsdp", "1", "--sharding", "hybrid-shard", "--mesh", "2x1"], "shard dimension of 1"),
        (["--fsdp", "1", "--mesh", "2x1"], "shard dimension of 1"),
        (["--fsdp", "1", "--sharding", "hybrid-shard"], "needs mesh"),
        (["--fsdp", "1", "--sharding", "full-shard", "--mesh", "2x2"], "mesh is for strategy hybrid-shard"),
        (["--fsdp", "1", "--use-orig-params"], "more than one rank for FSDP1"),
        (["--fsdp", "1", "--reshard-after-forward"], "--reshard-after-forward is FSDP2's: with --fsdp 1, leave it out"),
        (["--fsdp", "1", "--no-reshard-after-forward"], "use --sharding shard-grad-op"),
        (["--fsdp", "3"], "'3' is not one of '1', '2'"),
        (["--no-reshard-after-forward"], "more than one rank for FSDP2"),
        (["--mesh", "0x2"], "two positive integers"),
        (["--sharding", "full-shard"], "--sharding full-shard is FSDP1's: with --fsdp 2, leave it out"),
        (["--sharding", "shard-grad-op"], "use --no-reshard-after-forward; or use --fsdp 1"),
        (["--sharding", "hybrid-shard", "--mesh", "2x2"], "--mesh alone makes FSDP2 hybrid"),
        (["--sharding", "no-shard"], "use --mesh Nx1 on N ranks"),
        (["--use-orig-params"], "--use-orig-params is FSDP1's: with --fsdp 2, leave it out"),
        (["--no-use-orig-params"], "--no-use-orig-params is FSDP1's: with --fsdp 2, leave it out"),
        (["--blocksize", "100"], "blocksize must be one of"),
        (["--precision", "int8"], "'int8'"),
        (["--timeout", "0"], "--timeout as minutes"),
        (["--log", "mlflow"], "found 'mlflow'"),
        (["--eval-fraction", "0.1", "--eval-data", "e.jsonl"], "found both"),
        (["--eval-every", "5"], "needs an evaluation file"),
        (["--activation-offload"], "needs activation checkpointing"),
        (["--mesh", "1" * 5000 + "x2"], "expected --mesh as REPLICATExSHARD"),
        (["--mesh", "²x2"], "expected --mesh as REPLICATExSHARD"),
        (["--max-steps", "1" * 5000], "Invalid value for '--max-steps'"),
        (["--max-steps", "1" * 4000], "max_steps to be 1e+15 or less"),
        (["--batch-size", "1" * 400], "batch_size to be 1e+15 or less"),
        (["--seed", "1" * 30], "seed to be 9.22337e+18 or less"),
        (["--lora-alpha", "1" * 1000], "lora_alpha to be 1e+15 or less"),
        (["--max-length", "1" * 600], "the maximum length to be 1e+15 or less"),
        (["--lr", "1" * 5000, "--max-steps", "1"], "learning rate to be 1e+30 or less"),
        (["--weight-decay", "inf"], "weight_decay to be 1e+15 or less"),
        (["--lora-r", "0"], "LoRA rank to be 1 or more"),
        (["--lr", "-1", "--max-steps", "1"], "learning rate above 0"),
        (["--warmup-steps", "9", "--max-steps", "3"], "between 0 and 3 warmup steps"),
        (["--max-length", "2"], "none of the 4 samples has a token to learn within the first 2 tokens"),
        (["--eval-fraction", "0.9"], "leaves none to train on"),
        (["--lora-init", "pissa"], "pissa"),
        (["--target-modules", "nowhere"], "'nowhere' matches no module"),
        (["--target-modules", "q_proj,nowhere"], "'nowhere' matches no module"),
    ],
)
def test_options_that_cannot_work(  # noqa: PLR0917  # fixtures
    checkpoint: Path, data: Path, tmp_path: Path, reads: list[str], options: list[str], expected: str
) -> None:
    assert expected in refused(checkpoint, "--data", data, "--output", tmp_path / "out", *options)
    assert reads == [], "refused only after weights were read"
    assert not (tmp_path / "out" / "summary.json").exists()


def test_output_that_has_an_adapter(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    assert "already has an adapter" in refused(checkpoint, "--data", data, "--output", tmp_path)


def test_output_that_cannot_be_made(checkpoint: Path, data: Path) -> None:
    assert "cannot be written: Not a directory" in refused(checkpoint, "--data", data, "--output", data / "out")


def test_metrics_that_cannot_be_written(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    message = refused(checkpoint, "--data", data, "--output", tmp_path, "--metrics", data / "m.jsonl")
    assert "the metrics file" in message


def test_checkpoint_without_a_tokenizer(data: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "bare")
    assert "has no tokenizer that transformers can load" in refused(folder, "--data", data)


def test_messages_for_a_tokenizer_without_a_template(tmp_path: Path, data: Path) -> None:
    folder = save_tiny(tmp_path / "plain", vocab_size=VOCABULARY)
    tiny_tokenizer(chat_template=None).save_pretrained(folder)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data.write_text(json.dumps({"messages": turns}))
    assert "no chat template" in refused(folder, "--data", data)


def raised(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error from OSError("the disk is full")

    return reports_errors(command)


@pytest.mark.parametrize("error", [ConfigError("no"), SurgeryError("no"), PatchError("no")])
def test_expected_errors_are_messages(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught:
        raised(error)()
    assert caught.value.exit_code == 2
    assert capsys.readouterr().err == "error: no\n  because: OSError: the disk is full\n"


def test_cause_that_the_message_already_tells_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        raised(ConfigError("cannot write: the disk is full"))()
    assert capsys.readouterr().err == "error: cannot write: the disk is full\n"


def test_other_ranks_say_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(typer.Exit):
        raised(ConfigError("no\nlonger"))()
    assert capsys.readouterr().err == "rank 3: error: no\n"


def test_interrupt_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught:
        raised(KeyboardInterrupt())()
    assert caught.value.exit_code == 130
    assert "interrupted" in capsys.readouterr().err


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        raised(ZeroDivisionError())()
