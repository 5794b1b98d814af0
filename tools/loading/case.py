"""Input and result of every way of loading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from loading.options import Options
from loading.world import World
from surgery.telemetry.report import Report

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["LEARNING_RATE", "MAX_NORM", "SEED", "Case", "Trainee"]

LEARNING_RATE = 1e-4
MAX_NORM = 1.0
SEED = 0
LORA_RANK = 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """Input of one turn of one way on this rank; its phases are recorded in `report`."""

    options: Options
    world: World
    report: Report

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.world.device

    def lora(self) -> LoraConfig:
        """LoRA config with adapters on all linear layers."""
        from peft import LoraConfig

        return LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")

    def tokens(self, vocabulary: int) -> torch.Tensor:
        """This rank's sequence, `(1, length)` int64 on the device, equal in all steps and ways."""
        generator = torch.Generator().manual_seed(SEED + self.world.rank)
        return torch.randint(3, vocabulary, (1, self.options.length), generator=generator).to(self.device)


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A model that is ready to train, with its optimizer.

    step: take one step on the same batch and return its loss. close: release everything that would outlive the model.
    """

    step: Callable[[], float]
    close: Callable[[], None]
