"""Semantic sources: what makes two ids similar, as a locality-sensitive hash of each id."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from torchrec_lma.allocation.sample import Rows
from torchrec_lma.config import _check_int
from torchrec_lma.hashing import mix64, salt


@dataclass(frozen=True)
class RowsMinHash:
    """The paper's source: MinHash over the set of training rows that contain an id (arXiv 2103.06124, section 5).

    Two ids agree on a signature value with probability J ** power, where J is the Jaccard similarity of their row sets
    (Broder, 1997). Values of one single-valued field never share a row, so this similarity acts across fields.

    Args:
        power: independent MinHashes folded into each stored value; a higher power shares only between closer ids.
        num_values: K, 32-bit values stored per id. Chunks reuse them in turn, each with a salt of its own.
        min_support: ids in fewer sampled rows than this get no signature and are hashed.
        max_rows: sampled rows are the distinct rows with the smallest hashes, at most this many; None keeps all.
        within_table: share by signature only between ids of the same table.
    """

    power: int = 2
    num_values: int = 4
    min_support: int = 2
    max_rows: int | None = 1 << 20
    within_table: bool = False

    def __post_init__(self) -> None:
        for name in ("power", "num_values", "min_support"):
            _check_int(name, getattr(self, name), minimum=1)
        if self.max_rows is not None:
            _check_int("max_rows", self.max_rows, minimum=1)

    def to_dict(self) -> dict[str, Any]:
        return {"name": "rows-minhash", **asdict(self)}

    def signatures(self, rows: Rows, item: Tensor, n_items: int, num_values: int, seed: int) -> Tensor:
        """The signatures of chosen ids.

        Args:
            rows: the sampled rows, N keys in R rows.
            item: int64 [N], which chosen id each key is, -1 for the others.
            n_items: how many ids were chosen, S; each occurs in at least one row.
            num_values: values wanted, the first of the `num_values` that this source has.
            seed: of the hash functions.
        Returns:
            int32 [S, num_values].
        """
        chosen = item >= 0
        item, row = item[chosen], rows.row_of_key()[chosen]
        values = []
        for k in range(num_values):
            value = torch.zeros(n_items, dtype=torch.int64)
            for p in range(self.power):
                permuted = mix64(rows.hash ^ salt("minhash", seed, k, p))  # (R), a random order of the rows
                smallest = torch.full((n_items,), torch.iinfo(torch.int64).max)
                smallest.scatter_reduce_(0, item, permuted[row], "amin")
                value = mix64(value ^ smallest)
            values.append((value >> 32).to(torch.int32))
        return torch.stack(values, dim=1)
