"""The inputs of every model, and the loss of its outputs."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from families.shrink import VOCAB

__all__ = ["logits_of", "loss_of", "train"]

#: (4, 16): two rows for each of two ranks. Small ids are avoided, since they are special tokens.
IDS: Final = torch.randint(8, VOCAB - 20, (4, 16), generator=torch.Generator().manual_seed(3))

LEARNING_RATE: Final = 0.5


def logits_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Float32 logits, `(batch, length, vocabulary)`, in training mode, since bitsandbytes repacks in evaluation."""
    torch.manual_seed(1)
    logits: torch.Tensor = model(input_ids=ids).logits
    return logits.float()


def loss_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Mean loss of the next token."""
    logits = logits_of(model, ids)[:, :-1]
    targets = ids[:, -logits.shape[1] :]
    return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def train(model: Any, ids: torch.Tensor = IDS) -> list[float]:
    """Take two steps of plain gradient descent on `ids`; returns their losses."""
    losses = []
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for _ in range(2):
        loss = loss_of(model, ids)
        loss.backward()  # type: ignore[no-untyped-call]  # no annotation upstream
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in trainable:
                if parameter.grad is not None:
                    parameter.sub_(LEARNING_RATE * parameter.grad)
                parameter.grad = None
    return losses
