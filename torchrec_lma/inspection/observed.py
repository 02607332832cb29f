"""The ids of training rows, and how similar they truly are."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma.allocation.sample import RowSample
from torchrec_lma.hashing import mix64, table_salt, unmix64

MAX_ROWS = 1 << 20
BLOCK_KEYS = 1 << 20


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


class Similarity:
    """The similarity whose MinHash a source takes: sum of min over sum of max of two ids' weighted sets (Jaccard).

    Args:
        observed: the ids, of at least as many rows as the source takes.
        source: the source's record in the allocation's provenance. Sets are of its own first `max_rows` rows, which
            are fewer than those observed where another table's source takes more.

    Attributes:
        keys: int64 [V], how many keys of rows are read to make each id's set.
    """

    def __init__(self, observed: ObservedIds, source: Mapping[str, Any]) -> None:
        self._observed = observed
        self._of_rows = source["name"] == "rows-minhash"
        self._weighted = source.get("weighted", False)
        self._within_table = source.get("within_table", False)
        self._max_rows = source.get("max_rows")
        fields: Sequence[str] = source.get("fields") or observed.tables
        self._context = torch.tensor([observed.tables.index(name) for name in fields if name in observed.tables])
        self.keys = self._support = observed.starts.diff()
        if not self._of_rows:
            per_row = observed.row_starts.diff()
            self.keys = torch.zeros_like(self._support).index_add_(0, observed.item, per_row[observed.row])

    @staticmethod
    def known(source: Mapping[str, Any] | None) -> bool:
        """Whether the data tell how similar ids are; for SimHash the vectors would be needed."""
        return source is not None and source["name"] in ("rows-minhash", "context-minhash")

    def __call__(self, item: int, others: Tensor) -> Tensor:
        """float64 [n] in [0, 1], of one of the observed ids and others, int64 [n]."""
        _, elements, weights = self._sets(torch.tensor([item]))
        similarity = torch.zeros(others.numel(), dtype=torch.float64)
        if not elements.numel():
            return similarity
        # Some ids at a time, so that the keys of their sets stay bounded.
        block_of = self.keys[others].cumsum(0) // BLOCK_KEYS
        sizes = torch.unique_consecutive(block_of, return_counts=True)[1].tolist()
        for block in torch.arange(others.numel()).split(sizes):
            which, found, theirs = self._sets(others[block])
            position = torch.searchsorted(elements, found).clamp(max=elements.numel() - 1)
            common = torch.where(elements[position] == found, torch.minimum(weights[position], theirs), 0)
            smaller = torch.zeros(block.numel(), dtype=torch.float64).index_add_(0, which, common)
            total = torch.zeros(block.numel(), dtype=torch.float64).index_add_(0, which, theirs)
            similarity[block] = smaller / (weights.sum() + total - smaller)
        return similarity

    def related(self, item: int, among: Tensor, max_keys: int) -> Tensor:
        """Ids whose sets can have an element in common with an id's: candidates for the most similar.

        Args:
            item: one of the V observed ids.
            among: bool [V], which ids are asked for.
            max_keys: how many keys of rows are read to find candidates, and then to measure them, at most.
        Returns:
            int64 [n], in the order of the most equal numbers of rows: sets of other sizes are less similar.
        """
        observed = self._observed
        elements = self._sets(torch.tensor([item]))[1]
        if self._of_rows:
            rows = elements[observed.row_starts.diff()[elements].cumsum(0) <= max_keys]
        else:
            # Those in few rows first: what most ids have in common tells little.
            elements = elements[torch.argsort(self.keys[elements], stable=True)]
            rows = self._rows(elements[self.keys[elements].cumsum(0) <= max_keys])[1].unique()
        found = observed.item[_ranges(observed.row_starts, rows)[1]].unique()
        found = found[among[found] & (found != item)]
        if self._within_table:
            found = found[observed.table[found] == observed.table[item]]
        ratio = (self._support[found] / self._support[item]).log().abs()
        found = found[torch.argsort(ratio, stable=True)]
        return found[self.keys[found].cumsum(0) <= max_keys]

    def _rows(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the items, int64 [N] ascending, and the distinct rows with it, int64 [N]."""
        observed = self._observed
        which, position = _ranges(observed.starts, items)
        row = observed.row[observed.occurrences[position]]
        if self._max_rows is not None:
            used = row < self._max_rows  # rows are in the order of their hashes, as in the builder's sample
            which, row = which[used], row[used]
        # An id may stand in one row twice.
        pair = torch.unique_consecutive(which * observed.rows_sampled + row)
        return pair // observed.rows_sampled, pair % observed.rows_sampled

    def _sets(self, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which of the items, int64 [N] ascending; elements of its set (rows, or other tables' ids), int64 [N]
        ascending for each; their weights, float64 [N]."""
        observed = self._observed
        which, row = self._rows(items)
        n_elements, element = observed.rows_sampled, row
        if not self._of_rows:
            of, position = _ranges(observed.row_starts, row)
            which, row, element, n_elements = which[of], row[of], observed.item[position], observed.ids.numel()
            table = observed.table[element]
            in_context = torch.isin(table, self._context) & (table != observed.table[items[which]])
            which, row, element = which[in_context], row[in_context], element[in_context]
        pair = which * n_elements + element
        if items.numel() * n_elements <= 16 * pair.numel():  # counting is faster than sorting
            weights = torch.bincount(pair, observed.row_count[row].double())
            pair = weights.nonzero().squeeze(1)
            weights = weights[pair]
        else:
            pair, inverse = torch.unique(pair, return_inverse=True)
            weights = torch.zeros(pair.numel(), dtype=torch.float64).index_add_(
                0, inverse, observed.row_count[row].double()
            )
        return pair // n_elements, pair % n_elements, weights if self._weighted else torch.ones_like(weights)


def _ranges(starts: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the groups, int64 [N] ascending, and the positions starts[group] .. starts[group + 1], int64 [N]."""
    lengths = starts[groups + 1] - starts[groups]
    which = torch.repeat_interleave(torch.arange(groups.numel()), lengths)
    return which, torch.arange(which.numel()) + (starts[groups] - (lengths.cumsum(0) - lengths))[which]
