from __future__ import annotations

import json

import pytest

import patches
from tests.helpers.declare import FUNCTIONS, LAYERS, declare
from tests.helpers.fake_upstream import layers

pytestmark = pytest.mark.usefixtures("unchanged")


def test_rows_say_what_where_since_when_by_whom_and_why() -> None:
    instances = [layers.Base() for _ in range(14)]
    scoped = patches.on(declare("b", f"{LAYERS}:Base.forward"), instances)
    with patches.transaction(declare("a", f"{FUNCTIONS}:scale"), scoped, reason="a test") as tx:
        first, second = patches.audit()
    assert (first.id, first.target, first.state) == ("fake.a", f"{FUNCTIONS}:scale", "active")
    assert (first.scope, second.scope) == ("process", "14 instances")
    assert (first.reason, first.verdict) == ("a test", "needed")
    assert first.since == tx.receipts[0].since.isoformat(timespec="seconds")
    file, line = first.by.rsplit(":", 1)
    assert file == __file__
    assert line.isdecimal()


def test_an_audit_is_a_sequence_and_does_not_change_later() -> None:
    with patches.transaction(declare("a", f"{FUNCTIONS}:scale"), reason="a test"):
        audit = patches.audit()
    assert len(audit) == 1
    assert audit[0] is audit[-1]
    assert audit[:1] == tuple(audit)
    assert audit[0].state == "active"
    assert len(patches.audit()) == 0


def test_the_table_is_aligned() -> None:
    with patches.transaction(declare("a", f"{FUNCTIONS}:scale"), reason="two\nlines"):
        header, row = str(patches.audit()).split("\n")
    for name, cell in (
        ("target", FUNCTIONS),
        ("state", "active"),
        ("reason", "two lines"),
        ("verdict", "needed"),
    ):
        assert row[header.index(name) :].startswith(cell)
    assert str(patches.audit()) == "no patch is active"


def test_json_has_every_field() -> None:
    with patches.transaction(declare("a", f"{FUNCTIONS}:scale"), reason="a test"):
        (row,) = json.loads(patches.audit().to_json())
    assert row["id"] == "fake.a"
    assert row["state"] == "active"
    assert row["owner"]
    assert set(row) == {
        "id", "target", "state", "scope", "since", "by", "reason", "verdict", "owner", "note", "calls",
        "passed", "aliases",
    }  # fmt: skip


def test_history_is_shown_when_asked_for() -> None:
    used, skipped = (
        declare("used", f"{FUNCTIONS}:scale"),
        declare("idle", f"{FUNCTIONS}:scale", probe=lambda: False),
    )
    with patches.transaction(used, skipped, reason="a test"):
        pass
    history = {row.id: row.state for row in list(patches.audit(include_reverted=True))[-2:]}
    assert history == {"fake.used": "reverted", "fake.idle": "skipped"}
    assert len(patches.audit()) == 0
