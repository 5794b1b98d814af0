"""The result of an attestation, and the error with all differences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from surgery.errors import SurgeryError
from surgery.quantizers.digest import PAGE

__all__ = ["Attestation", "AttestationError", "Difference", "Where", "error_of", "union"]

Where: TypeAlias = Literal["at rest", "in forward", "quant_state"]

#: Lines of a message; the error has all differences.
LINES = 10

CAUSES: dict[Where, str] = {
    "at rest": "something wrote to the shards after they were quantized: other code, or failing memory",
    "in forward": (
        "the shards are gathered inexactly. FSDP2 does that on CUDA where nothing keeps it from copying packed weights "
        "as numbers: `patches check torch.fsdp2-bit-exact-gather` says whether it is needed here, and patches.audit() "
        "whether it is in force"
    ),
    "quant_state": "something changed quant_state, which every rank has for itself; a call of model.to() can",
}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One layer that is not what was quantized.

    ranks: where; if they are several, it is at least one of them, since they share the page.
    what: the name of the tensor or setting of quant_state, with what is wrong if that is not its pages.
    pages: pages that differ, `of_pages` in all. words: 16-bit words that differ from the shards, if that was counted.
    """

    layer: str
    where: Where
    ranks: tuple[int, ...]
    what: str = ""
    pages: int = 0
    of_pages: int = 0
    words: int | None = None
    of_words: int = 0


class AttestationError(SurgeryError):
    """4-bit weights that are not what was quantized; `differences` has layer, ranks and amount of each.

    Raised on all ranks alike. `differences` is empty if there was nothing to look at.
    """

    def __init__(self, message: str, *, differences: Sequence[Difference] = ()) -> None:
        super().__init__(message)
        self.differences = tuple(differences)


@dataclass(frozen=True, kw_only=True)
class Attestation:
    """All layers looked at are, bit for bit, what was quantized; the same on every rank.

    where: `at rest`, quant_state included, or `in forward`. nbytes: of their packed weights, whole.
    calls: of forward that were watched on this rank. seconds: of this rank.
    digest: a fingerprint of weights and quant_states as they were quantized, which depends neither on how they are
    sharded nor on how many ranks there are.
    """

    where: Where
    layers: tuple[str, ...]
    nbytes: int
    digest: str
    seconds: float
    calls: int = 0


def union(differences: Iterable[Difference]) -> list[Difference]:
    """Join differences that are alike but for their ranks, in order, for a message."""
    alike: dict[Difference, list[int]] = {}
    for each in differences:
        alike.setdefault(replace(each, ranks=()), []).extend(each.ranks)
    return [replace(each, ranks=tuple(sorted(set(ranks)))) for each, ranks in alike.items()]


def error_of(differences: Sequence[Difference], *, layers: int) -> AttestationError:
    """The error that says what was found among so many layers."""
    found = union(differences)
    names = {each.layer for each in found}
    lines = [f"{len(names)} of {layers} attested layers {'is' if len(names) == 1 else 'are'} not what was quantized:"]
    lines += [f"  {_line(each)}" for each in found[:LINES]]
    if len(found) > LINES:
        lines.append(f"  and {len(found) - LINES} more")
    lines += [f"{where}: {CAUSES[where]}" for where in dict.fromkeys(each.where for each in found)]
    return AttestationError("\n".join(lines), differences=differences)


def _line(each: Difference) -> str:
    ranks = f"rank{'s' if len(each.ranks) > 1 else ''} {', '.join(map(str, each.ranks))}"
    return f"{each.layer}, {each.where}, {ranks}: {_amount(each)}"


def _amount(each: Difference) -> str:
    pages = f"{each.pages:,} of {each.of_pages:,} pages of {PAGE // 1024} KiB"
    if each.words is not None:
        return f"{each.words:,} of {each.of_words:,} words of 16 bits, in {pages}"
    if not each.what:
        return pages
    return f"{each.what}, {pages}" if each.pages else each.what
