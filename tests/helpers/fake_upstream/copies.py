"""Copies of targets, as other modules of a library make them."""

from __future__ import annotations

from typing import ClassVar

from .functions import scale
from .layers import Base

resize = scale
add = Base.add
run = Base.forward
BY_NAME = {"scale": scale}
IN_ORDER = [scale]


class Taker:
    take = Base.forward
    TABLE: ClassVar = {"too": scale}  # two levels deep, where nobody looks
