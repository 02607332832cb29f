"""Ids are similar that stand in the same training rows: the paper's source."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchrec_lma.allocation.sample import Rows
from torchrec_lma.allocation.sources.base import RowsSource, smallest, uniform
from torchrec_lma.hashing import mix64


@dataclass(frozen=True)
class RowsMinHash(RowsSource):
    """The paper's source: MinHash over the set of training rows that contain an id (arXiv 2103.06124, section 5).

    Two ids agree on a signature value with probability J ** power, where J is the Jaccard similarity of their row sets
    (Broder, 1997). Values of one single-valued field never share a row, so this similarity acts across fields.

    Args:
        power: independent MinHashes folded into each stored value; a higher power shares only between closer ids.
        num_values: K, 32-bit values stored per id. Level k takes value k modulo K, with a salt of its own.
        min_support: ids in fewer sampled rows than this get no signature and are hashed.
        max_rows: sampled rows are the distinct rows with the smallest hashes, at most this many; None keeps all.
        within_table: share by signature only between ids of the same table.
        weighted: a row that was seen c times weighs c, so J is the Jaccard similarity of the sets of occurrences; else
            equal rows are one. Rows are ordered by -log(u) / c for uniform u (Chum, Philbin, Zisserman, BMVC 2008),
            exact for weights that belong to the row.
    """

    NAME: ClassVar[str] = "rows-minhash"
    SALT: ClassVar[str] = "minhash"

    def _sampled(
        self, rows: Rows, item: Tensor, item_keys: Tensor, salts: Sequence[int], tables: Sequence[str]
    ) -> Sequence[Tensor]:
        chosen = item >= 0
        item, row = item[chosen], rows.row_of_key()[chosen]
        sampled = []
        for salt in salts:
            permuted = mix64(rows.hash ^ salt)  # (R), a random order of the rows
            if not self.weighted:
                sampled.append(smallest(permuted[row], item, item_keys.numel()))
                continue
            by_weight = torch.sort(-uniform(permuted).log() / rows.count).indices
            rank = torch.empty_like(by_weight)
            rank[by_weight] = torch.arange(by_weight.numel())
            sampled.append(permuted[by_weight[smallest(rank[row], item, item_keys.numel())]])
        return sampled
