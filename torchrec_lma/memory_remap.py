"""The remap of one memory: from ids to rows of its levels."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

# Registers torch.ops.fbgemm.*
import fbgemm_gpu  # noqa: F401  isort: skip

from torchrec_lma.allocation.artifact import MemoryAllocation
from torchrec_lma.allocation.bitmap import RankBitmap
from torchrec_lma.allocation.index import IdIndex
from torchrec_lma.allocation.layout import MAX_ROWS
from torchrec_lma.features import Slot
from torchrec_lma.hashing import level_multiplier, mix64, salt, table_salt, to_row
from torchrec_lma.owners import owners_of_levels


class MemoryRemap(nn.Module):
    """Rows of the levels of one memory.

    On each level an id has its own row, or a shared one, or none. Own rows: on level 0 the rank of the id among those
    that own one (of a bitmap or ranges of the vocabularies, or an index of raw ids), on level k the rank of its row of
    level k - 1 among those that own one, so an own row costs a bit or two an id and level (nothing where vocabularies
    are sorted by frequency), and each level looks at fewer ids than the one before. Shared rows, where the level has
    some, are a hash of the id, or of its signature value k mod K, so that ids which agree on it share the row (arXiv
    2103.06124, section 4.2). If they are no more than the tables, as where every id that was seen owns a row, each is
    for the other ids of a table. Where all ids of the vocabularies own a row of level 0, and none is shared, an id
    outside of its vocabulary is taken for id 0, as FBGEMM's bounds check does.

    Args:
        memory: its allocation.
        slots: the features of the memory's tables.
        num_embeddings: of each table, by name.
        seed: of the hashes.
    """

    # Final, so that TorchScript drops the branches that a memory does not use.
    raw_ids: Final[bool]
    has_signatures: Final[bool]
    outside_is_0: Final[bool]
    nobody_is_absent: Final[bool]  # on level 0
    first: Tensor
    sizes: Tensor
    salts: Tensor
    rows_of_slots: Tensor
    signatures: Tensor

    def __init__(
        self, memory: MemoryAllocation, slots: Sequence[Slot], num_embeddings: dict[str, int], seed: int
    ) -> None:
        super().__init__()
        self.raw_ids = memory.raw_ids
        self.own_rows = [level.own_rows for level in memory.levels]
        self.shared_rows = [level.shared_rows for level in memory.levels]
        self.packs = [level.pack for level in memory.levels]
        self.multipliers = [level_multiplier(seed, k) for k in range(len(memory.levels))]
        self.signature_salt = salt("signature", seed)

        tensors = memory.tensors
        sizes = [num_embeddings[table] for table in memory.tables]
        positions = sum(sizes)
        self.positions_fit_int32 = positions <= MAX_ROWS
        all_own, none_shared = self.own_rows[0] == positions and not self.raw_ids, self.shared_rows[0] == 0
        self.outside_is_0 = all_own and none_shared
        self.nobody_is_absent = (all_own or not none_shared) and self.packs[0] == 1
        self.owners = nn.ModuleList(owners_of_levels(memory, slots, positions))
        self.has_signatures = "signatures" in tensors
        if self.has_signatures:
            self.register_buffer("signatures", tensors["signatures"])  # int32 [S, K]
            if memory.raw_ids:
                self.signed: IdIndex | RankBitmap = IdIndex(tensors["signed.low"], tensors["signed.starts"])
            else:
                self.signed = RankBitmap(tensors["signed.words"])

        few = 0 if self.has_signatures else len(memory.tables)
        self.shared_by_table = [0 < rows <= few for rows in self.shared_rows]
        numbers = torch.tensor([memory.tables.index(slot.table) for slot in slots])
        rows_of_slots = [level.own_rows + numbers % max(1, level.shared_rows) for level in memory.levels]
        self.register_buffer("rows_of_slots", torch.stack(rows_of_slots).to(torch.int32), persistent=False)
        starts = dict(zip(memory.tables, torch.tensor([0, *sizes]).cumsum(0).tolist()))
        for name, values in (
            ("first", [starts[slot.table] for slot in slots]),  # position of id 0 of the slot's table
            ("sizes", [num_embeddings[slot.table] for slot in slots]),
            ("salts", [table_salt(seed, slot.table) for slot in slots]),
        ):
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)

    def forward(
        self, ids: Tensor, slot: Tensor, offsets: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """
        Args:
            ids: int64 [L], the bags of slot 0, then of slot 1, ...
            slot: int32 [L], the slot of each id.
            offsets: int64 [bags + 1], where the bags begin.
            weights: float [L] per-sample weights, or None.
        Returns:
            rows int32 [M], lengths int32 [tables * bags] and weights [M] of the ids that have a row, table by table: of
            each level that has rows, of each place in a table row of a packed level.
            int64 [], how many ids are outside of their vocabulary.
        """
        of_tables, outside = self.rows(ids, slot)
        all_rows: list[Tensor] = []
        all_lengths: list[Tensor] = []
        all_weights: list[Tensor] = []
        if self.nobody_is_absent:
            all_rows.append(of_tables.pop(0))
            all_lengths.append((offsets[1:] - offsets[:-1]).to(torch.int32))
            if weights is not None:
                all_weights.append(weights)
        if len(of_tables) > 0:
            rows, lengths, kept = with_rows(of_tables, offsets)
            all_rows.append(rows)
            all_lengths.append(lengths)
            if weights is not None:
                all_weights.append(weights.index_select(0, kept))
        return cat(all_rows), cat(all_lengths), cat(all_weights) if weights is not None else None, outside

    def rows(self, ids: Tensor, slot: Tensor) -> tuple[list[Tensor], Tensor]:
        """
        Args:
            ids: int64 [L].
            slot: int32 [L], the slot of each.
        Returns:
            Of each level that has rows, of each place in a table row of a packed level: int32 [L], table rows, or
            negative where an id has none there.
            int64 [], how many ids are outside of their vocabulary.
        """
        if self.raw_ids:
            position = mix64(ids ^ self.salts.index_select(0, slot))
            outside = torch.zeros([], dtype=torch.int64, device=ids.device)
        else:
            inside = (ids >= 0) & (ids < self.sizes.index_select(0, slot))
            if self.outside_is_0:
                ids = torch.where(inside, ids, 0)
            position = ids + self.first.index_select(0, slot)
            if not self.outside_is_0:
                position = torch.where(inside, position, -1)
            if self.positions_fit_int32:  # half the bytes, twice the speed
                position = position.to(torch.int32)
            outside = (~inside).sum()
        of_tables: list[Tensor] = []
        own = position
        for k, owners in enumerate(self.owners):
            own = owners(own, slot)
            if self.own_rows[k] + self.shared_rows[k] > 0:
                rows = own
                if self.shared_by_table[k]:
                    rows = with_rows_of_slots(own, slot, self.rows_of_slots[k])
                elif self.shared_rows[k] > 0:
                    missing = places(own < 0)
                    rows = own.index_copy(0, missing, self._shared(k, ids, slot, position, missing))
                pack = self.packs[k]
                if pack == 1:
                    of_tables.append(rows)
                else:
                    place, rows = rows % pack, rows.div(pack, rounding_mode="floor")
                    for at in range(pack):
                        of_tables.append(torch.where(place == at, rows, -1))
        return of_tables, outside

    def _shared(self, k: int, ids: Tensor, slot: Tensor, position: Tensor, missing: Tensor) -> Tensor:
        """int32 [M], the shared rows on level k of those of the ids that are at these places, int64 [M]."""
        place = position.index_select(0, missing)
        if self.raw_ids:
            keys = place
        else:
            keys = mix64(ids.index_select(0, missing) ^ self.salts.index_select(0, slot.index_select(0, missing)))
        if self.has_signatures:
            found = self.signed.find(place)
            values = self.signatures[:, k % self.signatures.size(1)].index_select(0, found.clamp(min=0))
            by_value = mix64(values.to(torch.int64) ^ self.signature_salt)
            keys = torch.where(found >= 0, by_value, keys)
        return (to_row(keys, self.multipliers[k], self.shared_rows[k]) + self.own_rows[k]).to(torch.int32)


def with_rows(of_tables: list[Tensor], offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves out ids that have no row.

    Args:
        of_tables: of each int32 [L], rows, or negative where an id has none.
        offsets: int64 [bags + 1], where the bags begin.
    Returns:
        Rows int32 [M], lengths int32 [tables * bags], and int64 [M], which of the L ids each is.
    """
    rows = cat(of_tables)
    present = rows >= 0
    kept = places(present)
    n_tables = len(of_tables)
    n = of_tables[0].size(0)
    starts = torch.arange(n_tables, device=rows.device).unsqueeze(1) * n
    before = count_before(present).index_select(0, (offsets + starts).flatten()).view(n_tables, -1)
    lengths = (before[:, 1:] - before[:, :-1]).flatten()
    return rows.index_select(0, kept), lengths, kept if n_tables == 1 else kept % n


@torch.fx.wrap
def places(chosen: Tensor) -> Tensor:
    """int64 [m], where bool [n] is true."""
    if not torch.jit.is_scripting() and not torch.compiler.is_compiling():
        if chosen.device.type == "cpu":  # torch's takes up to ten times as long where neither value is rare
            return torch.from_numpy(chosen.numpy().nonzero()[0])
    return chosen.nonzero().squeeze(1)


@torch.fx.wrap
def with_rows_of_slots(own: Tensor, slot: Tensor, rows: Tensor) -> Tensor:
    """int32 [L], the own rows, and where there is none that of the slot, int32 [slots]."""
    if own.is_cpu and (torch.jit.is_scripting() or not torch.compiler.is_compiling()):  # few are missing
        missing = places(own < 0)
        return own.index_copy(0, missing, rows.index_select(0, slot.index_select(0, missing)))
    return torch.where(own < 0, rows.index_select(0, slot), own)  # without waiting for the device


def complete_cumsum(values: Tensor) -> Tensor:
    """int64 [n + 1], the sum of the values before each place, and of all."""
    return torch.ops.fbgemm.asynchronous_complete_cumsum(values.to(torch.int64))


def count_before(chosen: Tensor) -> Tensor:
    """int32 [n + 1], how many are chosen before each place, and in all; from bool [n]."""
    return torch.ops.fbgemm.asynchronous_complete_cumsum(chosen.to(torch.int32))


def cat(parts: list[Tensor]) -> Tensor:
    """All of them, one alone not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
