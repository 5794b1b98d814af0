from __future__ import annotations

import pytest

from tools.trace_files import traced

#: Files that somebody opens who wants to understand what becomes of a weight.
MOST = 17


@pytest.mark.distributed
def test_the_way_of_a_weight_is_short() -> None:
    ran, way = traced()
    assert len(way) <= MOST, way
    assert {f"passes/{name}.py" for name in ("read", "quantize", "exchange", "record", "relocate", "install")} <= set(
        way
    )
    assert set(way) < set(ran)
