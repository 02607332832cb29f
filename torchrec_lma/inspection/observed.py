"""The ids of training rows, and how similar they truly are."""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma.allocation.sample import RowSample
from torchrec_lma.hashing import mix64, table_salt, unmix64

MAX_ROWS = 1 << 20


class ObservedIds:
    """The distinct ids of a sample of rows, how often each occurs, and the rows that it stands in.

    The sample is the builder's own (`RowSample`): with as many rows it holds the rows that signatures were made from.
    Memory is bounded by `max_rows`.

    Args:
        batches: of rows; features that feed no table are left out.
        table_of_feature: the table that each feature feeds.
        seed: of the allocation.
        max_rows: distinct rows to keep; None keeps all.
    Raises:
        ValueError: no row with an id.

    Attributes, for V distinct ids of N occurrences in R rows:
        tables: names, in the order of their index.
        salts: int64 [tables], their `table_salt`.
        table: int64 [V], index of the id's table.
        ids: int64 [V].
        count: int64 [V], occurrences.
        rows_seen, rows_sampled: rows in the batches, and R.
        is_sample: whether rows of the batches were left out, so that there may be more ids and occurrences.
        item, row: int64 [N], which id and which row each occurrence is, in order of rows.
        row_count: int64 [R], how often the row was seen.
        row_starts: int64 [R + 1], where in `item` each row begins.
        occurrences, starts: int64 [N] and [V + 1], positions in `item` grouped by id, and where each group begins.
    """

    def __init__(
        self,
        batches: Iterable[KeyedJaggedTensor],
        table_of_feature: Mapping[str, str],
        seed: int,
        max_rows: int | None = MAX_ROWS,
    ) -> None:
        self.seed = seed
        self.tables = list(dict.fromkeys(table_of_feature.values()))
        self.salts = torch.tensor([table_salt(seed, table) for table in self.tables])
        sample = RowSample(max_rows)
        for features in batches:
            self._add(sample, features, table_of_feature)
        rows = sample.rows()
        if rows.hash.numel() == 0:
            raise ValueError(f"the data has no row with an id in any of the tables {self.tables}")
        self.rows_seen, self.rows_sampled = sample.rows_seen, rows.hash.numel()
        keys, self.item = torch.unique(rows.keys, return_inverse=True)
        self.row = rows.row_of_key()
        self.table = torch.zeros_like(keys).scatter_(0, self.item, rows.tables.to(torch.int64))
        self.ids = unmix64(keys) ^ self.salts[self.table]
        self.count = torch.zeros_like(keys).index_add_(0, self.item, rows.count[self.row])
        self.row_count = rows.count
        self.is_sample = int(rows.count.sum()) < self.rows_seen
        self.row_starts = pad(rows.lengths.cumsum(0), (1, 0))
        self.occurrences = torch.sort(self.item, stable=True).indices
        self.starts = pad(torch.bincount(self.item, minlength=keys.numel()).cumsum(0), (1, 0))

    def _add(self, sample: RowSample, features: KeyedJaggedTensor, table_of_feature: Mapping[str, str]) -> None:
        keys, tables, rows = [], [], []
        for feature, jagged in features.to_dict().items():
            if feature in table_of_feature:
                table = self.tables.index(table_of_feature[feature])
                ids = jagged.values().to(torch.int64)
                keys.append(mix64(ids ^ self.salts[table]))
                tables.append(torch.full_like(ids, table, dtype=torch.int16))
                lengths = jagged.lengths().to(torch.int64)
                rows.append(torch.repeat_interleave(torch.arange(lengths.numel()), lengths))
        sample.add(torch.cat(keys), torch.cat(tables), torch.cat(rows), features.stride())

    def find(self, table: str, id: int) -> int | None:
        """Which of the V ids this is, or None if it was not observed."""
        found = ((self.ids == id) & (self.table == self.tables.index(table))).nonzero()
        return int(found[0]) if found.numel() else None

    def rows_of(self, item: int) -> Tensor:
        """int64, the distinct rows with an id, ascending."""
        positions = self.occurrences[self.starts[item] : self.starts[item + 1]]
        return torch.unique_consecutive(self.row[positions])


class Similarity:
    """The similarity whose MinHash a source takes: sum of min over sum of max of two ids' weighted sets (Jaccard).

    Args:
        observed: the ids.
        source: the source's record in the allocation's provenance.
    """

    def __init__(self, observed: ObservedIds, source: Mapping[str, Any]) -> None:
        self._observed = observed
        self._of_rows = source["name"] == "rows-minhash"
        self._weighted = source.get("weighted", False)
        fields: Sequence[str] = source.get("fields") or observed.tables
        self._context = torch.tensor([observed.tables.index(name) for name in fields if name in observed.tables])
        self._set = lru_cache(maxsize=4096)(self._make_set)

    @staticmethod
    def known(source: Mapping[str, Any] | None) -> bool:
        """Whether the data tell how similar ids are; for SimHash the vectors would be needed."""
        return source is not None and source["name"] in ("rows-minhash", "context-minhash")

    def __call__(self, a: int, b: int) -> float:
        """In [0, 1], of two of the observed ids."""
        (keys_a, weights_a), (keys_b, weights_b) = self._set(a), self._set(b)
        _, in_a, in_b = np.intersect1d(keys_a, keys_b, assume_unique=True, return_indices=True)
        smaller = float(np.minimum(weights_a[in_a], weights_b[in_b]).sum())
        either = float(weights_a.sum() + weights_b.sum()) - smaller
        return smaller / either if either else 0.0

    def _make_set(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """Elements (rows, or other tables' ids) and their weights."""
        observed = self._observed
        elements = rows = observed.rows_of(item)
        if not self._of_rows:
            starts, ends = observed.row_starts[rows], observed.row_starts[rows + 1]
            lengths = ends - starts
            last = lengths.cumsum(0)
            positions = torch.repeat_interleave(starts - (last - lengths), lengths) + torch.arange(int(lengths.sum()))
            elements = observed.item[positions]
            table = observed.table[elements]
            in_context = torch.isin(table, self._context) & (table != observed.table[item])
            elements, rows = elements[in_context], observed.row[positions][in_context]
        elements, which = torch.unique(elements, return_inverse=True)
        weights = torch.ones_like(elements)
        if self._weighted:
            weights = torch.zeros_like(elements).index_add_(0, which, observed.row_count[rows])
        return elements.numpy(), weights.numpy()
