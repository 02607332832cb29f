"""Ids are similar whose vectors point the same way: content, or the embeddings of a previous model."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchrec_lma.allocation.sources.base import LARGEST, Source
from torchrec_lma.config import check_int
from torchrec_lma.hashing import mix64, salt


@dataclass(frozen=True)
class SimHash(Source):
    """Signs of random projections of vectors: ids are similar whose vectors point the same way.

    One value is `bits` signs of projections on random normal directions, so two ids at angle theta agree on it with
    probability (1 - theta / pi) ** bits (Charikar, STOC 2002). Vectors come from `AllocationBuilder.from_vectors`:
    embeddings of content, or of a previous model. Center them if they have a direction in common.

    Args:
        bits: signs in each value, 1 to 32; more share only between closer ids, as `power` does for MinHash.
        num_values: K, as in RowsMinHash.
        within_table: share only between ids of the same table: vectors of different tables are seldom in one space.
            With False, tables with vectors of one length share; vectors of other lengths never agree.
    """

    NAME: ClassVar[str] = "simhash"
    bits: int = 8
    num_values: int = 4
    within_table: bool = True

    def __post_init__(self) -> None:
        check_int("bits", self.bits, minimum=1)
        if self.bits > 32:
            raise ValueError(f"bits must be at most 32, got {self.bits}; a value stores no more")
        check_int("num_values", self.num_values, minimum=1)
        if not isinstance(self.within_table, bool):
            raise TypeError(f"within_table must be True or False, got {self.within_table!r}")

    def signatures(self, vectors: Tensor, seed: int) -> Tensor:
        """The signatures of vectors; each depends on its own vector only.

        Args:
            vectors: float [S, d], finite, none of them zero.
            seed: of the directions.
        Returns:
            int32 [S, num_values].
        """
        length = vectors.size(1)
        salts = [salt("simhash", seed, length, self.bits, k) for k in range(self.num_values)]
        # Of each value by itself, so that tables with another K have the first values in common.
        generators = [torch.Generator().manual_seed(each & LARGEST) for each in salts]
        directions = torch.cat(
            [torch.randn(length, self.bits, generator=generator, dtype=torch.float64) for generator in generators],
            dim=1,
        )  # (d, K * bits)
        values = []
        for part in vectors.split(1 << 16):
            # In float64, so that a sign does not depend on how the sum is ordered, but for one in about 1e13.
            signs = (part.to(torch.float64) @ directions >= 0).view(-1, self.num_values, self.bits)  # (S, K, bits)
            packed = (signs.to(torch.int64) << torch.arange(self.bits)).sum(2)  # (S, K)
            values.append((mix64(packed ^ torch.tensor(salts)) >> 32).to(torch.int32))
        return torch.cat(values)
