"""The ids of training rows, how often each occurs and beside whom."""

from collections.abc import Iterable, Mapping
from typing import Any

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
    RAM is bounded by `max_rows`.

    Args:
        batches: of rows; features that feed no table are left out.
        table_of_feature: the table that each feature feeds.
        seed: of the allocation.
        max_rows: distinct rows to keep; None keeps all.
    Raises:
        ValueError: no row with an id.

    Attributes, for V distinct ids of N occurrences in R rows:
        tables: names, in the order of their index.
        table: int64 [V], index of the id's table.
        ids: int64 [V].
        count: int64 [V], occurrences.
        rows_seen, rows_sampled: rows in the batches, and R.
        is_sample: whether rows of the batches were left out, so that there may be more ids and occurrences.
        item: int64 [N], which id each occurrence is, in order of rows.
        row_count: int64 [R], how often the row was seen.
        row_starts: int64 [R + 1], where in `item` each row begins.
    """

    def __init__(
        self,
        batches: Iterable[KeyedJaggedTensor],
        table_of_feature: Mapping[str, str],
        seed: int,
        max_rows: int | None = MAX_ROWS,
    ) -> None:
        self.tables = list(dict.fromkeys(table_of_feature.values()))
        salts = torch.tensor([table_salt(seed, table) for table in self.tables])
        sample = RowSample(max_rows)
        for features in batches:
            keys, tables, rows = [], [], []
            for feature, jagged in features.to_dict().items():
                if feature in table_of_feature:
                    table = self.tables.index(table_of_feature[feature])
                    ids = jagged.values().to(torch.int64)
                    keys.append(mix64(ids ^ salts[table]))
                    tables.append(torch.full_like(ids, table, dtype=torch.int16))
                    lengths = jagged.lengths().to(torch.int64)
                    rows.append(torch.repeat_interleave(torch.arange(lengths.numel()), lengths))
            sample.add(torch.cat(keys), torch.cat(tables), torch.cat(rows), features.stride())
        sampled = sample.rows()
        if sampled.hash.numel() == 0:
            raise ValueError(f"the data has no row with an id in any of the tables {self.tables}")
        self.rows_seen, self.rows_sampled = sample.rows_seen, sampled.hash.numel()
        self.is_sample = int(sampled.count.sum()) < self.rows_seen
        found, self.item = torch.unique(sampled.keys, return_inverse=True)
        self._row = sampled.row_of_key()
        self.table = torch.zeros_like(found).scatter_(0, self.item, sampled.tables.to(torch.int64))
        self.ids = unmix64(found) ^ salts[self.table]
        self.count = torch.zeros_like(found).index_add_(0, self.item, sampled.count[self._row])
        self.row_count = sampled.count
        self.row_starts = pad(sampled.lengths.cumsum(0), (1, 0))
        # Occurrences grouped by id, and where each id's begin.
        self._occurrences = torch.sort(self.item, stable=True).indices
        self._starts = pad(torch.bincount(self.item, minlength=found.numel()).cumsum(0), (1, 0))

    def of_table(self, table: str) -> Tensor:
        """int64, which of the V ids are of a table."""
        return (self.table == self.tables.index(table)).nonzero().squeeze(1)

    def rows_of(self, item: int) -> Tensor:
        """int64, the rows that an id stands in, each once, ascending."""
        start, end = self._starts[item : item + 2].tolist()
        return self._row[self._occurrences[start:end]].unique()

    def in_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The occurrences of some rows: which id, int64 [n], and of which row, int64 [n]."""
        first, n = self.row_starts[rows], self.row_starts.diff()[rows]
        position = torch.repeat_interleave(first - (n.cumsum(0) - n), n) + torch.arange(int(n.sum()))
        return self.item[position], torch.repeat_interleave(rows, n)


class Similarity:
    """The similarity whose MinHash a source takes: sum of min over sum of max of two ids' weighted sets (Jaccard).

    Args:
        observed: the ids, of at least as many rows as the source takes.
        source: the source's record in the allocation's provenance. Sets are of its own first `max_rows` rows.
    """

    def __init__(self, observed: ObservedIds, source: Mapping[str, Any]) -> None:
        self.observed = observed
        self._of_rows = source["name"] == "rows-minhash"
        self._weighted = source.get("weighted", False)
        self._max_rows = source.get("max_rows")
        fields = source.get("fields") or observed.tables
        self._context = torch.tensor([observed.tables.index(name) for name in fields if name in observed.tables])

    @staticmethod
    def known(source: Mapping[str, Any] | None) -> bool:
        """Whether the data tell how similar ids are; for SimHash the vectors would be needed."""
        return source is not None and source["name"] in ("rows-minhash", "context-minhash")

    def set_of(self, item: int) -> tuple[Tensor, Tensor]:
        """The set of an id: rows, or ids of other tables, int64 [n] ascending, and their weights, int64 [n]."""
        rows = self._rows(item)
        if self._of_rows:
            elements, weights = rows, self.observed.row_count[rows]
        else:
            beside, row = self.observed.in_rows(rows)
            table = self.observed.table[beside]
            kept = torch.isin(table, self._context) & (table != self.observed.table[item])
            elements, which = torch.unique(beside[kept], return_inverse=True)
            weights = torch.zeros_like(elements).index_add_(0, which, self.observed.row_count[row[kept]])
        return elements, weights if self._weighted else torch.ones_like(weights)

    def __call__(self, first: int, second: int) -> float:
        (elements, weights), (others, other_weights) = self.set_of(first), self.set_of(second)
        both, which = torch.unique(torch.cat([elements, others]), return_inverse=True)
        sums = torch.zeros(2, both.numel(), dtype=torch.int64)
        sums[0, which[: elements.numel()]] = weights
        sums[1, which[elements.numel() :]] = other_weights
        return float(sums.amin(0).sum() / max(1, int(sums.amax(0).sum())))

    def beside(self, item: int, random: torch.Generator) -> Tensor:
        """int64, ids that have an element in common with an id's set: those of a few rows, drawn at random."""
        rows = self._drawn(self._rows(item), random)
        if not self._of_rows:
            elements = self._drawn(self.set_of(item)[0], random)
            rows = torch.cat([rows[:0], *(self._drawn(self._rows(int(element)), random) for element in elements)])
        return self.observed.in_rows(rows.unique())[0].unique()

    def _rows(self, item: int) -> Tensor:
        rows = self.observed.rows_of(item)
        # Rows are in the order of their hashes, as in the builder's sample.
        return rows if self._max_rows is None else rows[rows < self._max_rows]

    @staticmethod
    def _drawn(values: Tensor, random: torch.Generator, n: int = 4) -> Tensor:
        return values[torch.randperm(values.numel(), generator=random)[:n]]
