"""How many ids own a row of each level, and which: an id earns columns by how often it occurs, scaled to the budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from torchrec_lma.allocation.bitmap import bitmap_bytes, build_bitmap
from torchrec_lma.allocation.index import build_index, index_bytes
from torchrec_lma.allocation.layout import (
    MAX_ROWS,
    Level,
    MemoryLayout,
    check_rows,
    default_widths,
    first_widths,
    kernel_takes,
    shared_levels,
)

SHARED_FRACTION = 0.125  # of the bytes of rows, where not all ids own one
RANGE_BYTES = 16  # int64 [2]


@dataclass(frozen=True)
class Costs:
    """Bytes of the levels of a memory in which the first `own[k]` ids, most frequent first, own a row of level k.

    Attributes:
        widths: columns of each level.
        value_bytes: of a weight.
        positions: ids of all vocabularies; None for raw ids, whose owners are found in an index.
        ranges: of ids sorted by frequency, how many tables: a level needs a range of each. None where they are not.
        shared_rows: of the first level.
        everybody: whether all ids of the vocabularies own a row of the first level, seen or not.
    """

    widths: Sequence[int]
    value_bytes: int
    positions: int | None
    ranges: int | None = None
    shared_rows: int = 0
    everybody: bool = False

    def __call__(self, own: Sequence[int]) -> int:
        if self.everybody and self.positions is not None:
            own = [self.positions, *own[1:]]
        shared = [self.shared_rows, *([0] * (len(own) - 1))]
        levels = [Level(*level) for level in zip(self.widths, own, shared)]
        total = sum(level.table_rows * level.table_width for level in levels) * self.value_bytes
        before = self.positions
        for rows in own:
            if before is None:
                total += index_bytes(rows)
            elif 0 < rows < before:
                total += bitmap_bytes(before) if self.ranges is None else RANGE_BYTES * self.ranges
            before = rows
        return total


def choose_levels(
    layout: MemoryLayout,
    counts: np.ndarray,
    exact: bool,
    positions: int | None,
    ranges: int | None,
    budget: int,
    skew: float,
    shared_fraction: float | None,
    signature_bytes: int,
) -> tuple[tuple[Level, ...], int]:
    """The levels of a memory, and the bytes that are kept for signatures.

    Args:
        layout: of the memory; without widths they are chosen.
        counts: int64 [V], of the ids that were seen, descending, >= 1.
        exact: whether no others were.
        positions, ranges: see Costs.
        budget: bytes for rows and allocation.
        skew: see LMAConfig.
        shared_fraction: see AllocationBuilder.
        signature_bytes: kept for signatures if some ids share.
    Raises:
        ValueError: not one row fits, or a level has too many.
    """
    if shared_fraction == 1 or counts.size == 0:
        return shared_levels(layout, budget - signature_bytes), signature_bytes

    def share(widths: Sequence[int], everybody: bool) -> _Shares:
        costs = Costs(widths, layout.value_bytes, positions, ranges, everybody=everybody)
        return _share_budget(layout, counts, exact, costs, budget, skew, shared_fraction, signature_bytes)

    # Those of a vocabulary that were not seen may come, and beyond the sample most have been. So they own a row, too,
    # unless the others would own twice the columns without them.
    may_all = shared_fraction is None and positions is not None and positions <= MAX_ROWS
    everybody = False
    if layout.widths is not None:
        widths = layout.widths
        if may_all and (not exact or (positions or 0) <= 2 * counts.size):
            everybody = share(widths, True).all_own
    else:
        # The widest first level of which all ids own a row: two levels where one does would be a look-up more for the
        # same columns.
        earned = counts.astype(np.float64) ** skew
        of_the_rarest = budget / layout.value_bytes * earned[-1] / earned.sum()
        candidates = [default_widths(layout.dim, first) for first in first_widths(layout.dim, of_the_rarest)]
        of_seen = next((widths for widths in candidates if share(widths, False).all_own), None)
        of_all = next((widths for widths in candidates if share(widths, True).all_own), None) if may_all else None
        everybody = of_all is not None and (of_seen is None or of_seen[0] < 2 * of_all[0])
        widths = (of_all if everybody else of_seen) or default_widths(layout.dim, 1)
    while True:
        shares = share(widths, everybody)
        own = [positions, *shares.own[1:]] if everybody and positions is not None else shares.own
        alike = [k for k in range(len(own) - 1) if own[k] == own[k + 1] and kernel_takes(widths[k] + widths[k + 1])]
        if layout.widths is not None or not alike:
            break
        # The same ids own two levels: as one they take one look-up.
        k = alike[0]
        widths = (*widths[:k], widths[k] + widths[k + 1], *widths[k + 2 :])
    shared_rows = shares.shared_rows
    of_all_columns = Costs(widths, layout.value_bytes, positions)
    if (
        positions is not None
        and may_all
        and own[-1] == counts.size
        and of_all_columns([positions] * len(own)) <= budget
    ):
        own, shared_rows = [positions] * len(own), 0  # more than those who were seen can use
    if not any(own):  # telling owners from others would take more than there is
        return shared_levels(layout, budget - signature_bytes), signature_bytes
    shared = [shared_rows, *([0] * (len(widths) - 1))]
    check_rows(layout, own[0] + shared_rows)
    return tuple(Level(width, n, s) for width, n, s in zip(widths, own, shared)), shares.kept


@dataclass(frozen=True)
class _Shares:
    """How a budget is spent.

    Attributes:
        own: how many of the ids that were seen own a row of each level.
        shared_rows: of the first level.
        kept: bytes for signatures.
        all_own: whether all ids that were seen own a row of the first level.
    """

    own: list[int]
    shared_rows: int
    kept: int
    all_own: bool


def _share_budget(
    layout: MemoryLayout,
    counts: np.ndarray,
    exact: bool,
    costs: Costs,
    budget: int,
    skew: float,
    shared_fraction: float | None,
    signature_bytes: int,
) -> _Shares:
    """How a budget is spent on levels of given widths: see `choose_levels`."""
    widths = costs.widths
    row_bytes = widths[0] * layout.value_bytes

    def choose(shared_rows: int, kept: int) -> list[int]:
        return choose_owners(counts, widths, skew, budget - kept, replace(costs, shared_rows=shared_rows))

    # Where all ids own a row, nothing is left to be signed, and shared rows are for those that come later.
    few = min(len(layout.tables), max(0, budget // row_bytes))
    if costs.everybody:
        for shared_rows in (few, 0):  # or are of no vocabulary
            own = [counts.size, *choose(shared_rows, 0)[1:]]
            if fits := replace(costs, shared_rows=shared_rows)(own) <= budget:
                break
        return _Shares(own, shared_rows, 0, all_own=fits)
    if shared_fraction is None and exact and (own := choose(few, 0))[0] == counts.size:
        return _Shares(own, few, 0, all_own=True)
    fraction = SHARED_FRACTION if shared_fraction is None else shared_fraction
    shared_rows = max(1, int(fraction * (budget - signature_bytes) / row_bytes))
    own = choose(shared_rows, signature_bytes)
    if shared_fraction is None:
        # No more rows than there are ids to share them, who are fewer the fewer rows there are.
        while exact and (enough := max(few, counts.size - own[0])) < shared_rows:
            shared_rows = enough
            own = choose(shared_rows, signature_bytes)
    known = exact or costs.positions is None
    return _Shares(own, shared_rows, signature_bytes, all_own=known and own[0] == counts.size)


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
        Not ascending, each at most V; none where the budget is below 0.
    """
    if costs(everything := [counts.size] * len(widths)) <= budget or counts.size == 0:
        return everything
    earned = counts.astype(np.float64) ** skew  # descending
    ascending = -earned
    ends = np.cumsum(widths)

    def owners(c: float) -> list[int]:
        return [int(np.searchsorted(ascending, -end / c, side="right")) for end in ends]

    low, high = np.log(widths[0] / earned[0]) - 1, np.log(ends[-1] / earned[-1]) + 1
    for _ in range(60):  # to the last bit of where a count crosses a level
        middle = (low + high) / 2
        low, high = (middle, high) if costs(owners(np.exp(middle))) <= budget else (low, middle)
    own, most = owners(np.exp(low)), owners(np.exp(high))
    for k in range(len(own)):

        def fits(rows: int, k: int = k) -> bool:
            return costs([*own[:k], rows, *own[k + 1 :]]) <= budget

        own[k] = _largest(own[k], min(most[k], own[k - 1] if k else counts.size), fits)
    return own


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number in [low, high] that fits; `low` is known to, or is all there is."""
    if fits(high):  # as it may where fewer do not: a level that all own needs no bitmap
        return high
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def place_owners(
    levels: Sequence[Level],
    keys: Tensor,
    positions: Tensor | None,
    n_positions: int | None,
) -> tuple[tuple[Level, ...], dict[str, Tensor], Tensor]:
    """The tensors that find own rows.

    Args:
        levels: of the memory; the first `own_rows` ids own a row of a level.
        keys: int64 [V], mixed keys of ids, most frequent first.
        positions: int64 [V], where they are among the `n_positions` ids of all vocabularies; None for raw ids.
    Returns:
        The levels, with a row less where the index cannot tell an id's key from another owner's: it then has that
        one's. The tensors, as MemoryAllocation describes them. bool [V], which ids own a row of the first level.
    """
    n_owners = min(levels[0].own_rows, keys.numel())
    owns = torch.zeros(keys.numel(), dtype=torch.bool)
    owns[:n_owners] = True
    tensors: dict[str, Tensor] = {}
    if n_owners == 0:
        return tuple(levels), tensors, owns
    if positions is None:
        low, starts, order = build_index(keys[:n_owners])
        tensors |= {"owners.0.low": low, "owners.0.starts": starts}
        owns[:n_owners] = False
        owns[order] = True
        levels = [replace(level, own_rows=int(owns[: level.own_rows].sum())) for level in levels]
        row = torch.empty_like(keys)
        row[order] = torch.arange(order.numel())
        row = row[owns]  # own row on level 0 of each owner, most frequent first
    else:
        assert n_positions is not None
        row = positions[:n_owners]
        if levels[0].own_rows < n_positions:
            tensors["owners.0.words"] = build_bitmap(row, n_positions)
            row = _ranks(row)
    before = levels[0].own_rows
    for k, level in enumerate(levels[1:], start=1):
        if 0 < level.own_rows < before:
            row = row[: level.own_rows]
            tensors[f"owners.{k}.words"] = build_bitmap(row, before)
            row = _ranks(row)
        before = level.own_rows
    return tuple(levels), tensors, owns


def first_positions(positions: Tensor, table: Tensor, n_tables: int) -> Tensor | None:
    """Whether ids are sorted by frequency.

    Args:
        positions: int64 [V], places among the ids of all vocabularies, most frequent first.
        table: int64 [V], number of the table of each.
        n_tables: how many there are.
    Returns:
        int64 [n_tables], the position of the most frequent id of each table (0 where there is none), if those of each
        table are n, n + 1, n + 2, ...; else None.
    """
    by_table = torch.sort(table, stable=True)
    positions, table = positions[by_table.indices], by_table.values
    same = table[1:] == table[:-1]
    if not bool((positions[1:] - positions[:-1])[same].eq(1).all()):
        return None
    first = torch.ones_like(table, dtype=torch.bool)
    first[1:] = ~same
    return torch.zeros(n_tables, dtype=torch.int64).index_copy_(0, table[first], positions[first])


def ranges_of(levels: Sequence[Level], first: Tensor, table: Tensor, n_positions: int) -> dict[str, Tensor]:
    """The owners of levels as ranges, one for each table, as MemoryAllocation describes them.

    Args:
        levels: of the memory; the first `own_rows` ids own a row of a level.
        first: see `first_positions`.
        table: int64 [V], number of the table of each id, most frequent first.
        n_positions: ids of all vocabularies.
    """
    tensors = {}
    before = n_positions
    for k, level in enumerate(levels):
        if 0 < level.own_rows < before:
            members = torch.bincount(table[: level.own_rows], minlength=first.numel())
            tensors[f"owners.{k}.ranges"] = torch.stack([first, first + members], 1)
            first = members.cumsum(0) - members  # in the rows of this level, where the next one looks
        before = level.own_rows
    return tensors


def _ranks(values: Tensor) -> Tensor:
    """int64 [n], how many of the distinct values are smaller than each."""
    ranks = torch.empty_like(values)
    ranks[torch.sort(values).indices] = torch.arange(values.numel())
    return ranks
