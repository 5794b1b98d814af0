from __future__ import annotations

import patches
from surgery.recipe import BUILD_PATCHES, FSDP2_PATCHES, RESIDENT_PATCHES


def test_the_bundles_hold_what_the_recipe_applies() -> None:
    assert set(BUILD_PATCHES) <= set(patches.select("qlora-build"))
    assert patches.select("qlora-resident") == [*RESIDENT_PATCHES, *FSDP2_PATCHES]
    saving = {"torch.fsdp1-sync-on-cpu", "peft.adapter-keys-under-wrappers"}
    assert {*BUILD_PATCHES, *RESIDENT_PATCHES, *FSDP2_PATCHES, *saving} <= set(patches.select("qlora-low-memory"))
