"""How many ids own a row of each level: an id earns columns by how often it occurs, scaled to the budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from torchrec_lma.allocation.bitmap import bitmap_bytes
from torchrec_lma.allocation.index import index_bytes


@dataclass(frozen=True)
class Costs:
    """Bytes of the levels of a memory in which the first `own[k]` ids, most frequent first, own a row of level k.

    Attributes:
        widths: columns of each level.
        value_bytes: of a weight.
        positions: ids of all vocabularies; None for raw ids, whose owners are found in an index.
    """

    widths: Sequence[int]
    value_bytes: int
    positions: int | None

    def __call__(self, own: Sequence[int]) -> int:
        total = sum(rows * width for rows, width in zip(own, self.widths)) * self.value_bytes
        before = self.positions
        for rows in own:
            if before is None:
                total += index_bytes(rows)
            elif 0 < rows < before:
                total += bitmap_bytes(before)
            before = rows
        return total


def choose_owners(counts: np.ndarray, widths: Sequence[int], skew: float, budget: int, costs: Costs) -> list[int]:
    """For each level how many ids own a row of it, the most frequent first.

    An id that occurs n times owns the levels whose widths add up to at most c * n ** skew, with the largest c that the
    budget allows; what then is left goes to ids at the edge, first level first.

    Args:
        counts: int64 [V], descending, >= 1.
        widths: of the levels.
        skew: see LMAConfig.
        budget: bytes, of which `costs` says how many are used.
    Returns:
        Not ascending, each at most V.
    """
    earned = counts.astype(np.float64) ** skew  # descending
    ends = np.cumsum(widths)

    def owners(c: float) -> list[int]:
        return [int(np.searchsorted(-earned, -end / c, side="right")) for end in ends]

    if costs(whole := [counts.size] * len(widths)) <= budget or counts.size == 0:
        return whole
    low, high = np.log(widths[0] / earned[0]) - 1, np.log(ends[-1] / earned[-1]) + 1
    for _ in range(60):  # to the last bit of where a count crosses a level
        middle = (low + high) / 2
        low, high = (middle, high) if costs(owners(np.exp(middle))) <= budget else (low, middle)
    own, most = owners(np.exp(low)), owners(np.exp(high))
    for k in range(len(own)):
        at_most = min(most[k], own[k - 1] if k else counts.size)
        own[k] = _largest(own[k], at_most, lambda rows, k=k: costs([*own[:k], rows, *own[k + 1 :]]) <= budget)
    return own


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number in [low, high] that fits; `low` is known to, or is all there is."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
