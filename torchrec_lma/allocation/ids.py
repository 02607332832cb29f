"""The ids of tables with their counts, and their order by frequency."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from torchrec_lma.features import to_int64
from torchrec_lma.hashing import unmix64


@dataclass
class Ids:
    """The ids of some tables.

    Attributes:
        keys: int64 [V], mixed; ascending within a table.
        count: int64 [V], occurrences.
        table: int64 [V], number of the table.
        eligible: bool [V], whether the id may have a signature.
    """

    keys: Tensor
    count: Tensor
    table: Tensor
    eligible: Tensor

    @classmethod
    def concatenate(cls, parts: "Sequence[Ids]") -> "Ids":
        return cls(*(torch.cat([getattr(part, each.name) for part in parts]) for each in fields(cls)))

    def select(self, chosen: Tensor) -> "Ids":
        return Ids(*(getattr(self, each.name)[chosen] for each in fields(self)))

    def values(self, salts: Tensor) -> Tensor:
        """int64 [V], the ids themselves, given the salt of each table, int64 [tables]."""
        return unmix64(self.keys) ^ salts[self.table]

    def positions(self, values: Tensor, sizes: dict[int, int]) -> Tensor:
        """Places among the ids of several vocabularies, one table after another.

        Args:
            values: int64 [V], the ids themselves.
            sizes: of the vocabularies, by number of the table, in order.
        Returns:
            int64 [V], -1 for ids that are outside of theirs.
        """
        positions = torch.full_like(values, -1)
        first = 0
        for table, size in sizes.items():
            here = (self.table == table).nonzero().squeeze(1)
            of_table = values[here]
            inside = (of_table >= 0) & (of_table < size)
            positions[here[inside]] = of_table[inside] + first
            first += size
        return positions

    def with_id_0_leading(self, values: Tensor) -> Tensor:
        """int64 [V], counts, in which id 0 of a table, if it occurs, does so as often as the table's most frequent."""
        most = self.count.new_zeros(int(self.table.max()) + 1 if self.table.numel() else 0)
        most = most.scatter_reduce(0, self.table, self.count, "amax")
        return torch.where((values == 0) & (self.count > 0), most[self.table], self.count)


def by_frequency(count: Tensor, tie: Tensor) -> Tensor:
    """int64 [V], ids by descending count, those of equal count by `tie`, so that no input order matters."""
    order = torch.sort(tie, stable=True).indices
    return order[torch.sort(count[order], descending=True, stable=True).indices]


def as_ids(ids: Any, where: str) -> Tensor:
    """Ids in any form of array as int64 on the CPU. Raises ValueError or TypeError, naming `where` they are."""
    try:
        ids = torch.as_tensor(ids).cpu()
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} has ids that are not int64 ({error}); ids are integers in [-2**63, 2**63)"
        ) from error
    return to_int64(ids, where)
