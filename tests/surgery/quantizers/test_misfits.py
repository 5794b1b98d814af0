"""One process, which nothing has to be divided for, refuses a format of other sizes as several ranks do."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.misfits import SAYS, refused_misfits
from tests.surgery.lifetime.behaviour import build, run


def test_sizes_that_are_not_those_promised_are_refused(tiny: Path) -> None:
    said = refused_misfits(tiny)
    for misfit, texts in SAYS.items():
        for text in (f"QuantizerError: {misfit.__name__}: expected", *texts):
            assert text in said[misfit.__name__]
    with build(tiny) as model:
        assert run(model).isfinite().all()
