"""Who owns a row of a level: from positions to own rows, one class for each way to say it.

Positions are int32 or int64 [L]: on level 0 of vocabularies places among the ids of all of them, -1 for what is
outside; on level 0 of raw ids mixed keys; on the levels after it own rows of the level before, or -1. `slot` is the
slot of each, int32 [L]. Own rows are int32 [L], -1 where there is none. Everything scripts, and traces under torch.fx.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchrec_lma.allocation.artifact import MemoryAllocation
from torchrec_lma.allocation.bitmap import RankBitmap
from torchrec_lma.allocation.index import IdIndex
from torchrec_lma.allocation.layout import MAX_ROWS
from torchrec_lma.features import Slot


class AllOwn(nn.Module):
    """Every position is an owner, and its own row, int32."""

    def forward(self, positions: Tensor, slot: Tensor) -> Tensor:
        return positions.to(torch.int32)


class NoneOwns(nn.Module):
    """No position has an own row: int32, -1."""

    def forward(self, positions: Tensor, slot: Tensor) -> Tensor:
        return torch.full_like(positions, -1, dtype=torch.int32)


class BitmapOwners(RankBitmap):
    """Members of a set of positions are owners: int32, their rank, or -1."""

    def forward(self, positions: Tensor, slot: Tensor) -> Tensor:
        return self.find(positions)


class IndexOwners(IdIndex):
    """Raw ids whose keys are in an index are owners: int32, where, or -1."""

    def forward(self, positions: Tensor, slot: Tensor) -> Tensor:
        return self.find(positions)


class RangeOwners(nn.Module):
    """Positions in the range of their table are owners: int32, how many owners are before them, or -1.

    Args:
        ranges: int64 [tables, 2], where that of each table begins and ends.
        tables: of each slot, its table's number.
    """

    first: Tensor
    end: Tensor
    shift: Tensor

    def __init__(self, ranges: Tensor, tables: list[int]) -> None:
        super().__init__()
        self.register_buffer("ranges", ranges)
        first, end = ranges[tables].unbind(1)
        lengths = ranges[:, 1] - ranges[:, 0]
        before = (lengths.cumsum(0) - lengths)[tables]
        # Positions are compared in int32 where they fit.
        dtype = torch.int32 if int(ranges.max()) <= MAX_ROWS else torch.int64
        for name, values in (("first", first), ("end", end), ("shift", before - first)):
            self.register_buffer(name, values.to(dtype).contiguous(), persistent=False)  # [slots]

    def forward(self, positions: Tensor, slot: Tensor) -> Tensor:
        inside = (positions >= self.first.index_select(0, slot)) & (positions < self.end.index_select(0, slot))
        return torch.where(inside, positions + self.shift.index_select(0, slot), -1).to(torch.int32)


def owners_of_levels(memory: MemoryAllocation, slots: Sequence[Slot], n_positions: int) -> list[nn.Module]:
    """Those of each level of a memory, whose vocabularies have so many ids together."""
    owners: list[nn.Module] = []
    for k, level in enumerate(memory.levels):
        of_level = {
            name.removeprefix(f"owners.{k}."): t for name, t in memory.tensors.items() if f"owners.{k}." in name
        }
        if "words" in of_level:
            owners.append(BitmapOwners(of_level["words"]))
        elif "ranges" in of_level:
            owners.append(RangeOwners(of_level["ranges"], [memory.tables.index(slot.table) for slot in slots]))
        elif "low" in of_level:
            owners.append(IndexOwners(of_level["low"], of_level["starts"]))
        else:
            owners.append(AllOwn() if level.own_rows == n_positions else NoneOwns())
        n_positions = level.own_rows
    return owners
