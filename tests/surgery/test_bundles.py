from __future__ import annotations

import patches
from surgery.quantizers.bnb import Bnb4bit
from surgery.sharding.fsdp1 import Fsdp1
from surgery.sharding.fsdp2 import Fsdp2


def test_the_bundles_hold_what_formats_and_strategies_ask_for() -> None:
    resident = patches.select(*Bnb4bit.resident_patches, *Fsdp1.resident_patches, *Fsdp2.resident_patches)
    building = {"torch.meta-param-replacement", "bitsandbytes.quant-state-to-noop"}
    assert patches.select("qlora-resident") == resident
    assert building == set(patches.select("qlora-build"))
    saving = {"torch.fsdp1-sync-on-cpu", "peft.adapter-keys-under-wrappers"}
    assert {*building, *resident, *saving} <= set(patches.select("qlora-low-memory"))
