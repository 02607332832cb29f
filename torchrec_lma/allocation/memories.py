"""The allocation of one memory: which of the ids that were seen own rows, and the signatures of those that share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchrec_lma.allocation.artifact import MemoryAllocation, new_memory
from torchrec_lma.allocation.bitmap import bitmap_bytes, build_bitmap
from torchrec_lma.allocation.ids import Ids, by_frequency
from torchrec_lma.allocation.index import build_index
from torchrec_lma.allocation.layout import Level, MemoryLayout
from torchrec_lma.allocation.ownership import choose_levels, first_positions, place_owners, ranges_of
from torchrec_lma.allocation.sample import Rows
from torchrec_lma.allocation.sources import RowsSource, Source
from torchrec_lma.allocation.vectors import TableVectors
from torchrec_lma.config import LMAConfig
from torchrec_lma.hashing import mix64


@dataclass(frozen=True)
class Candidates:
    """The ids of the tables of a memory, most frequent first.

    Attributes:
        ids: those of a vocabulary that are inside it, or all raw ids.
        order: int64 [V], by frequency; the first `seen` have been seen.
        count: int64 [V], what is earned by; not in order.
        seen: how many.
        positions: int64 [V], places among the ids of all vocabularies; None for raw ids. Not in order.
        n_positions: ids of all vocabularies; None for raw ids.
        number: int64 [V], number of the table within the memory; not in order.
        first: of vocabularies sorted by frequency, see `first_positions`; else None.
    """

    ids: Ids
    order: Tensor
    count: Tensor
    seen: int
    positions: Tensor | None
    n_positions: int | None
    number: Tensor
    first: Tensor | None


@dataclass(frozen=True)
class MemoryBuilder:
    """Builds memories from counted ids and sampled rows.

    Attributes:
        config: of the allocation.
        salts: of each table by name, in order of the tables' numbers.
        sources: of each table by name.
        vectors: of tables with a SimHash by name.
        rows: sampled ones.
        exact: whether all ids that were seen are known, not only those of sampled rows.
        shared_fraction, signature_fraction: see AllocationBuilder.
    """

    config: LMAConfig
    salts: Mapping[str, int]
    sources: Mapping[str, Source | None]
    vectors: Mapping[str, TableVectors]
    rows: Rows
    exact: bool
    shared_fraction: float | None
    signature_fraction: float

    def build(
        self, layout: MemoryLayout, parts: Mapping[str, Ids], record: dict[str, dict[str, Any]]
    ) -> MemoryAllocation:
        """The memory of a layout, given the ids of all tables; adds what became of them to the tables' records."""
        of = self._candidates(layout, parts, record)
        seen = of.order[: of.seen]
        sharing, signature_bytes = of.order, layout.budget_bytes + 1
        for _ in range(2):  # again where those who share need fewer bytes for signatures than were kept for them
            wanted = self._signature_bytes(of, sharing, layout.budget_bytes)
            if wanted >= signature_bytes:
                break
            levels, signature_bytes = choose_levels(
                layout,
                of.count[seen].numpy(),
                self.exact,
                of.n_positions,
                None if of.first is None else len(layout.tables),
                layout.budget_bytes,
                self.config.skew,
                self.shared_fraction,
                wanted,
            )
            is_owner = torch.zeros_like(of.ids.eligible)
            is_owner[seen[: levels[0].own_rows]] = True
            sharing = of.order[~is_owner[of.order]]
        if of.first is not None and of.n_positions is not None:
            tensors = ranges_of(levels, of.first, of.number[seen], of.n_positions)
            owners = seen[: levels[0].own_rows]
        else:
            positions = None if of.positions is None else of.positions[seen]
            levels, tensors, owns = place_owners(levels, of.ids.keys[seen], positions, of.n_positions)
            owners = seen[owns]
        signed = self._sign(levels, of, sharing, signature_bytes, tensors)
        agreeing = signed[_agreeing(tensors["signatures"])] if signed.numel() else signed
        for table in layout.tables:
            occurrences = max(int(parts[table.name].count.sum()), 1)
            record[table.name] |= self._record(table.name, occurrences, levels, of, owners, signed, agreeing)
        return new_memory(layout, levels, tensors)

    def _candidates(
        self, layout: MemoryLayout, parts: Mapping[str, Ids], record: dict[str, dict[str, Any]]
    ) -> Candidates:
        numbers = [self._number(table.name) for table in layout.tables]
        ids = Ids.concatenate([parts[table.name] for table in layout.tables])
        within = torch.zeros(len(self.salts), dtype=torch.int64)
        within[numbers] = torch.arange(len(numbers))
        if layout.raw_ids:
            order = by_frequency(ids.count, ids.keys)
            return Candidates(ids, order, ids.count, int((ids.count > 0).sum()), None, None, within[ids.table], None)
        values = ids.values(torch.tensor(list(self.salts.values())))
        positions = ids.positions(values, dict(zip(numbers, (table.num_embeddings for table in layout.tables))))
        inside = positions >= 0
        for table, number in zip(layout.tables, numbers):
            record[table.name]["out_of_vocabulary"] = int((~inside & (ids.table == number)).sum())
        ids, values, positions = ids.select(inside), values[inside], positions[inside]
        of_table = within[ids.table]
        n_seen = int((ids.count > 0).sum())
        # Equally frequent ids in the order of their values, so that a vocabulary sorted by frequency stays in order.
        # Where id 0 stands for all that is unknown, it may come first however often it occurs.
        count = ids.with_id_0_leading(values)
        order = by_frequency(count, values)
        seen = order[:n_seen]
        first = first_positions(positions[seen], of_table[seen], len(numbers))
        if first is None:
            count = ids.count
            order = by_frequency(count, values)
        n_positions = sum(table.num_embeddings for table in layout.tables)
        return Candidates(ids, order, count, n_seen, positions, n_positions, of_table, first)

    def _number(self, table: str) -> int:
        return list(self.salts).index(table)

    def _source(self, number: int) -> Source | None:
        return self.sources[list(self.salts)[number]]

    def _record(
        self,
        table: str,
        occurrences: int,
        levels: Sequence[Level],
        of: Candidates,
        owners: Tensor,
        signed: Tensor,
        agreeing: Tensor,
    ) -> dict[str, Any]:
        """What became of a table's ids; those `agreeing` have a signature that agrees with another one."""
        here = of.ids.table == self._number(table)
        own_of_level = [owners[: level.own_rows][here[owners[: level.own_rows]]] for level in levels]
        return {
            "own": [own.numel() for own in own_of_level],
            # Of the occurrences of the table's ids: what a planner should know of a level.
            "present": [
                1.0
                if level.shared_rows or level.own_rows == of.n_positions
                else int(of.ids.count[own].sum()) / occurrences
                for level, own in zip(levels, own_of_level)
            ],
            "with_signature": int(here[signed].sum()),
            "sharing_by_signature": int(here[agreeing].sum()),
        }

    def _signature_bytes(self, of: Candidates, sharing: Tensor, budget: int) -> int:
        """What to keep for the signatures of some ids: their share of the budget, or what all of them would take.

        Nothing where the share is too small for the set of who has one.
        """
        eligible = sharing[of.ids.eligible[sharing]]
        if eligible.numel() == 0:
            return 0
        each = 4 * self._num_values(of.ids.table[eligible])
        share = int(self.signature_fraction * budget)
        if share < _set_bytes(1, of.n_positions) + each:
            return 0
        return min(share, _set_bytes(eligible.numel(), of.n_positions) + each * eligible.numel())

    def _num_values(self, tables: Tensor) -> int:
        """The largest K of the sources of some tables, given by number."""
        sources = [self._source(table) for table in tables.unique().tolist()]
        return max((source.num_values for source in sources if source), default=0)

    def _sign(
        self, levels: Sequence[Level], of: Candidates, sharing: Tensor, budget: int, tensors: dict[str, Tensor]
    ) -> Tensor:
        """Adds the signatures of ids that share rows, as many as fit, to `tensors`; returns who has one, in order."""
        eligible = sharing[of.ids.eligible[sharing]]
        num_values = min(self._num_values(of.ids.table[eligible]), sum(level.shared_rows > 0 for level in levels))
        each = 4 * num_values + (6 if of.n_positions is None else 0)
        left = max(0, budget - _set_bytes(0, of.n_positions))
        signed = eligible[: left // each if each else 0]
        if signed.numel() == 0:
            return signed
        if of.positions is None or of.n_positions is None:
            low, starts, order = build_index(of.ids.keys[signed])
            tensors |= {"signed.low": low, "signed.starts": starts}
        else:
            tensors["signed.words"] = build_bitmap(of.positions[signed], of.n_positions)
            order = torch.sort(of.positions[signed]).indices
        signed = signed[order]
        tensors["signatures"] = self._signatures(of.ids, signed, num_values)
        return signed

    def _signatures(self, ids: Ids, chosen: Tensor, num_values: int) -> Tensor:
        """int32 [S, num_values], the signatures of the chosen ids (places in `ids`, int64 [S])."""
        signatures = torch.empty(chosen.numel(), num_values, dtype=torch.int32)
        names = list(self.salts)
        groups: dict[Source, list[int]] = {}
        for table in ids.table[chosen].unique().tolist():
            source = self._source(table)
            assert source is not None
            groups.setdefault(source, []).append(table)
        for source, members in groups.items():
            in_group = torch.isin(ids.table[chosen], torch.tensor(members))
            keys, tables = ids.keys[chosen][in_group], ids.table[chosen][in_group]
            own_values = min(source.num_values, num_values)
            if isinstance(source, RowsSource):
                seen = self.rows.first(source.max_rows)
                item = torch.full_like(seen.keys, -1)
                for table in members:
                    of_table, in_table = (tables == table).nonzero().squeeze(1), seen.tables == table
                    item[in_table] = _find(keys[of_table], seen.keys[in_table], of_table)
                values = source.signatures(seen, item, keys, own_values, self.config.seed, names)
            else:
                values = torch.empty(keys.numel(), own_values, dtype=torch.int32)
                for table in members:
                    given = self.vectors[names[table]]
                    of_table = tables == table
                    values[of_table] = given.signatures[torch.searchsorted(given.keys, keys[of_table]), :own_values]
            if source.within_table:
                salts = torch.tensor(list(self.salts.values()))[tables]  # (S)
                values = (mix64(values ^ salts.unsqueeze(1)) >> 32).to(torch.int32)
            signatures[in_group] = values[:, torch.arange(num_values) % own_values]
        return signatures


def _set_bytes(n: int, n_positions: int | None) -> int:
    """At most: of an index of n raw ids, or of a bitmap of the ids of vocabularies."""
    return 6 * n + 12 if n_positions is None else bitmap_bytes(n_positions)


def _find(keys: Tensor, wanted: Tensor, positions: Tensor) -> Tensor:
    """For each wanted key int64 [N], the entry of `positions` where `keys` (in any order) has it, else -1."""
    if keys.numel() == 0:
        return torch.full_like(wanted, -1)
    ascending, order = torch.sort(keys)
    found = torch.searchsorted(ascending, wanted).clamp(max=keys.numel() - 1)
    return torch.where(ascending[found] == wanted, positions[order[found]], -1)


def _agreeing(signatures: Tensor) -> Tensor:
    """bool [S], which of the signatures, int32 [S, K], agree with another one in some value."""
    agreeing = torch.zeros(signatures.size(0), dtype=torch.bool)
    for values in signatures.unbind(1):
        _, which, count = torch.unique(values, return_inverse=True, return_counts=True)
        agreeing |= count[which] > 1
    return agreeing
