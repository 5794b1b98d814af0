"""`bitsandbytes.quant-state-to-noop`. The installed PEFT has no trigger any more; the probe is tried on one
that has."""

from __future__ import annotations

from typing import Any

from bitsandbytes.functional import QuantState

import patches
from patches.builtin.bitsandbytes.quant_state_to_noop import (
    peft_sends_quant_state_to_meta,
    sends_quant_state_to_meta,
)

from .four_bit import on_meta, quantized, unchanged

ID = "bitsandbytes.quant-state-to-noop"


def rebuild_as_peft_did(model: Any) -> None:
    """What PEFT did to a layer from 0.7.0 to 0.11.1: moved all of it to where its weight is."""
    model.proj.to(model.proj.weight.device)


def test_probe_sees_the_trigger_and_its_absence() -> None:
    assert sends_quant_state_to_meta(rebuild_as_peft_did)
    assert not sends_quant_state_to_meta(lambda model: None)


def test_obsolete_with_the_installed_peft_so_skipped() -> None:
    assert not peft_sends_quant_state_to_meta()
    with unchanged(QuantState), patches.transaction(ID, reason="test") as tx:
        assert QuantState.to is vars(QuantState)["to"]
        assert str(tx.verdicts[ID]) == "obsolete"
        assert [receipt.id for receipt in tx.skipped] == [ID]


def test_given_quant_states_stay_while_others_move() -> None:
    covered, stock = on_meta(quantized()), on_meta(quantized())
    item = patches.on(ID, [covered.quant_state])
    with unchanged(QuantState), patches.transaction(item, reason="test", force=True):
        covered.to(covered.weight.device)
        stock.to(stock.weight.device)
    assert not covered.quant_state.absmax.is_meta
    assert not covered.quant_state.state2.absmax.is_meta
    assert stock.quant_state.absmax.is_meta
    covered.quant_state.to("meta")
    assert covered.quant_state.absmax.is_meta
