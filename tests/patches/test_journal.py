from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import patches
from patches.cli import app
from patches.journal import read_journals
from tests.helpers.declare import FUNCTIONS, LAYERS, declare
from tests.helpers.fake_upstream import layers

WORKER = f"""
import os, sys
import patches
from tests.helpers.declare import declare
chosen = [declare(tag, "{FUNCTIONS}:" + name) for tag, name in (argument.split("=") for argument in sys.argv[1:])]
with patches.transaction(*chosen, reason="work") as tx:
    tx.commit()
"""


def run_worker(folder: Path, *arguments: str, program: str = WORKER, **environment: str) -> None:
    subprocess.run(
        [sys.executable, "-c", program, *arguments],
        check=True,
        timeout=60,
        env={**os.environ, "PATCHES_JOURNAL": str(folder), **environment},
    )


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def audit(folder: Path, *arguments: str) -> tuple[int, str]:
    ran = CliRunner().invoke(app, ["audit", "--journal", str(folder), *arguments])
    return ran.exit_code, ran.stdout


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "not" / "there" / "yet"
    monkeypatch.setenv("PATCHES_JOURNAL", str(folder))
    return folder


def test_every_change_of_state_is_a_line(journal: Path) -> None:
    assert not journal.exists()
    with patches.transaction(declare("noted", f"{FUNCTIONS}:scale"), reason="a test"):
        patches.disable("fake.noted")
    (file,) = journal.iterdir()
    assert file.name.endswith(f"-{os.getpid()}.jsonl")
    written = lines(file)
    assert [line["state"] for line in written] == ["active", "disabled", "reverted"]
    assert {(line["id"], line["reason"], line["scope"]) for line in written} == {("fake.noted", "a test", "process")}
    assert len({line["session"] for line in written}) == 1


def test_without_the_variable_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PATCHES_JOURNAL", raising=False)
    monkeypatch.chdir(tmp_path)
    with patches.transaction(declare("silent", f"{FUNCTIONS}:scale"), reason="a test"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    journal = patches.journal.Journal(list)
    monkeypatch.setenv("PATCHES_JOURNAL", str(tmp_path / "file" / "folder"))
    with caplog.at_level(logging.WARNING):
        journal.write({})
        journal.write({})
    assert [record.name for record in caplog.records] == ["patches.journal"]
    assert "not in the journal" in caplog.text


class Unwritable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


CIRCLE: dict[str, Any] = {}
CIRCLE["itself"] = CIRCLE


@pytest.mark.parametrize("line", [{"value": Unwritable()}, CIRCLE, {("a", "key"): 1}], ids=["value", "circle", "key"])
def test_a_line_that_cannot_be_written_stops_nothing(
    journal: Path, line: dict[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    writer = patches.journal.Journal(list)
    writer.write(line)
    writer.write(line)
    assert caplog.text.count("not in the journal") == 1


@pytest.mark.parametrize("name", ["a\udcffname", "x" * 300, "."], ids=["surrogate", "long", "deleted"])
def test_an_odd_folder_fails_no_patch(name: str, tmp_path: Path) -> None:
    program = (
        "import os, patches, tempfile\n"
        "from tests.helpers.declare import declare\n"
        "with tempfile.TemporaryDirectory() as gone: os.chdir(gone)\n"
        f"with patches.transaction(declare('a', '{FUNCTIONS}:scale', reason='\\udcff'), reason='\\udcff \\0'): pass\n"
    )
    folder = str(tmp_path / name) if name != "." else name
    environment = {**os.environ, "PATCHES_JOURNAL": folder}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count(b"not in the journal") == ("udcff" not in ascii(name))


def test_a_rank_that_is_no_number_is_left_out(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "\N{SUPERSCRIPT TWO}")
    with patches.transaction(declare("ranked", f"{FUNCTIONS}:scale"), reason="a test"):
        pass
    (file,) = journal.iterdir()
    assert "rank" not in lines(file)[0]


def test_each_process_writes_its_own_counts_when_it_ends(tmp_path: Path) -> None:
    program = f"""
import multiprocessing, patches
from tests.helpers.fake_upstream import functions
@patches.register("fake.counted", target="{FUNCTIONS}:scale", reason="a test")
def counted(wrapped, instance, args, kwargs):
    return patches.passed("fake.counted") if args == (1,) else wrapped(*args, **kwargs)
def child():
    functions.scale(1)
    functions.scale(2)
with patches.transaction("fake.counted") as tx:
    tx.commit()
for number in range(5):
    functions.scale(number)
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
"""
    run_worker(tmp_path, program=program, PATCHES_COUNT="1")
    code, text = audit(tmp_path)
    assert "active (process), 5 calls, 1 passed" in text
    assert "active (process), 2 calls, 1 passed" in text
    assert code == 0  # equal processes need not have equally many calls
    facts = json.loads(audit(tmp_path, "--json")[1])
    found = [(one["calls"], one["passed"]) for process in facts["processes"] for one in process["applications"]]
    assert sorted(found) == [(2, 1), (5, 1)]


def test_a_killed_process_has_no_counts_rather_than_wrong_ones(tmp_path: Path) -> None:
    program = f"{WORKER}\nimport signal\nlib = __import__(chosen[0].target.partition(':')[0], fromlist=['scale'])\n"
    run_worker(tmp_path, "a=scale", program=f"{program}lib.scale(1.0)", PATCHES_COUNT="1")
    killed = f"{program}lib.scale(1.0)\nos.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(subprocess.CalledProcessError):
        run_worker(tmp_path, "a=scale", program=killed, PATCHES_COUNT="1")
    found = [one.calls for process in read_journals(tmp_path) for one in process.applications]
    assert sorted(found, key=str) == [1, None]


LATE = """
import sys, warnings
import patches
warnings.simplefilter("ignore")
patches.register(patches.Patch(id="late.wave", target=("wave:gone", "wave:open"), reason="x", wrapper=print))
patches.register(patches.Patch(id="late.gone", target="wave:gone", reason="x", wrapper=print))
with patches.transaction(*sys.argv[1:], deferred=True) as tx:
    tx.commit()
"""


def test_a_patch_that_waits_is_in_the_row_of_the_target_that_others_have(tmp_path: Path) -> None:
    run_worker(tmp_path, "late.wave", program=LATE)
    run_worker(tmp_path, "late.wave", program=f"{LATE}\nimport wave")
    code, text = audit(tmp_path)
    assert code == 0
    (row,) = text.splitlines()[1:]
    assert row.startswith("late.wave  wave:open ")
    assert "pending (process)" in row
    assert "active (process)" in row


def test_a_patch_that_failed_is_told_once_with_the_reason(tmp_path: Path) -> None:
    for _ in range(2):
        run_worker(tmp_path, "late.gone", program=f"{LATE}\nimport wave")
    code, text = audit(tmp_path)
    assert code == 1  # though the processes do not differ
    assert text.count("late.gone failed: IncompatibleError: 'late.gone' cannot be applied") == 1


def test_a_forked_child_has_a_file_of_its_own_with_what_it_inherited(tmp_path: Path) -> None:
    program = WORKER + (
        "child = os.fork()\nif child == 0:\n    patches.revert('fake.a')\n    os._exit(0)\nos.waitpid(child, 0)\n"
    )
    run_worker(tmp_path, "a=scale", "b=describe", program=program)
    files = sorted(tmp_path.iterdir(), key=lambda file: len(lines(file)))
    assert [[(line["id"], line["state"]) for line in lines(file)] for file in files] == [
        [("fake.a", "active"), ("fake.b", "active")],
        [("fake.a", "active"), ("fake.b", "active"), ("fake.a", "reverted")],
    ]
    code, text = audit(tmp_path)
    assert code == 1
    assert "fake.a differs" in text
    assert "fake.b differs" not in text


def test_processes_that_patch_the_same_are_alike(tmp_path: Path) -> None:
    run_worker(tmp_path, "a=scale", "b=describe", RANK="0", WORLD_SIZE="2")
    run_worker(tmp_path, "b=describe", "a=scale", RANK="1", WORLD_SIZE="2")
    code, text = audit(tmp_path)
    assert code == 0
    header, *rows = text.splitlines()
    assert header.index("rank 0") < header.index("rank 1")
    assert [row.split()[0] for row in rows] == ["fake.a", "fake.b"]
    assert all(row.count("active (process)") == 2 for row in rows)


def test_processes_that_differ_are_named(tmp_path: Path) -> None:
    run_worker(tmp_path, "a=scale", "b=describe", RANK="0", WORLD_SIZE="2")
    run_worker(tmp_path, "a=scale", RANK="1", WORLD_SIZE="2")
    code, text = audit(tmp_path)
    assert code == 1
    (difference,) = [line for line in text.splitlines() if "differs" in line]
    assert difference.startswith("fake.b differs: active, process, needed")
    assert "not active in rank 1" in difference
    code, text = audit(tmp_path, "--json")
    assert code == 1
    facts = json.loads(text)
    assert [process["rank"] for process in facts["processes"]] == [0, 1]
    assert [difference["id"] for difference in facts["differences"]] == ["fake.b"]


def test_a_rank_that_wrote_nothing_is_missed(tmp_path: Path) -> None:
    run_worker(tmp_path, "a=scale", RANK="0", WORLD_SIZE="2")
    code, text = audit(tmp_path)
    assert code == 1
    assert "no journal in rank 1" in text


def test_how_many_instances_there_are_is_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch = declare("some", f"{LAYERS}:Base.forward")
    for host, count in (("one", 1), ("two", 2)):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        monkeypatch.setenv("PATCHES_JOURNAL", str(tmp_path))
        instances = [layers.Base() for _ in range(count)]
        with patches.transaction(patch, reason="a test", on=instances):
            monkeypatch.delenv("PATCHES_JOURNAL")
    code, text = audit(tmp_path)
    assert "active (instances)" in text
    assert code == 0


def test_of_two_processes_with_one_id_the_last_counts(tmp_path: Path) -> None:
    run_worker(tmp_path, "old=scale")
    (file,) = tmp_path.iterdir()
    old = lines(file)[0]
    with file.open("a") as appended:
        appended.write(json.dumps({**old, "session": "later", "id": "fake.new"}) + "\n")
    text = audit(tmp_path)[1]
    assert "fake.new" in text
    assert "fake.old" not in text


def test_a_line_cut_short_is_left_out_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    run_worker(tmp_path, "a=scale")
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    file.write_text(whole + whole[:40])
    assert "fake.a" in audit(tmp_path)[1]
    file.write_text(whole[:40] + "\n" + whole)
    with pytest.raises(patches.JournalError, match=r"jsonl:1 is not a line of a journal"):
        patches.read_journals(tmp_path)


def test_a_folder_without_a_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(patches.JournalError, match="PATCHES_JOURNAL="):
        patches.read_journals(tmp_path)
