"""What every rank would look up first, for the fork server: all patches, and the conversions of transformers."""

from __future__ import annotations

import transformers.models.llama.modeling_llama  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import patches
import surgery.recipe  # noqa: F401

for patch_id in patches.ids():
    patches.get(patch_id)
get_checkpoint_conversion_mapping("llama")
