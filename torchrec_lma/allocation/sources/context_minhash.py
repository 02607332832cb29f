"""Ids are similar that the same ids of other fields stand beside."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchrec_lma.allocation.sample import Rows
from torchrec_lma.allocation.sources.base import LARGEST, RowsSource, smallest, uniform
from torchrec_lma.hashing import mix64

_PAIRS = 1 << 20  # pairs of an id and a context that are held at once, unless one id has more


@dataclass(frozen=True)
class ContextMinHash(RowsSource):
    """MinHash over the set of other fields' ids that an id occurs with: items are similar by their users.

    J is the Jaccard similarity of two ids' contexts, the sets of ids of other tables in the sampled rows with the id.
    Unlike their rows, the contexts of two values of one field can overlap. An id without any context shares with none.

    Args:
        power, num_values, min_support, max_rows, within_table: as in RowsMinHash.
        weighted: context x of an id weighs as often as they occur together, and J is the weighted Jaccard similarity
            sum_x min(a_x, b_x) / sum_x max(a_x, b_x), sampled by Ioffe's consistent weighted sampling (ICDM 2010).
            Costs a sort of the pairs of ids for each table of the context: name `fields`.
        fields: names of the tables whose ids are the context; () takes all. The id's own table never is part of it.
    """

    NAME: ClassVar[str] = "context-minhash"
    SALT: ClassVar[str] = "context-minhash"
    fields: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.fields, str):
            raise TypeError(f"fields={self.fields!r} must be a sequence of table names: write ({self.fields!r},)")
        object.__setattr__(self, "fields", tuple(self.fields))

    def check_fields(self, tables: Sequence[str], table: str | None = None) -> None:
        """Raises ValueError if a field is not among the tables, or if none of them can be the context of `table`."""
        unknown = sorted(set(self.fields) - set(tables))
        if unknown:
            raise ValueError(f"fields {unknown} of {self.NAME} are not tables; choose from {list(tables)}")
        if set(self.fields or tables) == {table}:
            raise ValueError(
                f"the ids of table {table!r} would have no context and share nothing: fields={self.fields} of "
                f"{self.NAME} leave no table but its own, whose ids never are context. Name another table in fields, "
                "or give this one another source or none"
            )

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "fields": list(self.fields)}

    def _sampled(
        self, rows: Rows, item: Tensor, item_keys: Tensor, salts: Sequence[int], tables: Sequence[str]
    ) -> Sequence[Tensor]:
        context = [index for index, name in enumerate(tables) if not self.fields or name in self.fields]
        sampled = self._by_weight if self.weighted else self._by_set
        elements = sampled(rows, item, item_keys.numel(), salts, context)
        return [torch.where(first == LARGEST, item_keys, first) for first in elements]

    def _by_set(
        self, rows: Rows, item: Tensor, n_items: int, salts: Sequence[int], context: list[int]
    ) -> Sequence[Tensor]:
        """One pass over the keys for each salt: an id's smallest context is the smallest of its rows' smallest."""
        row, n_rows = rows.row_of_key(), rows.hash.numel()
        in_context = torch.isin(rows.tables, torch.tensor(context, dtype=rows.tables.dtype))
        keys, table, row_of_context = rows.keys[in_context], rows.tables[in_context], row[in_context]
        chosen = item >= 0
        item, item_table, row = item[chosen], rows.tables[chosen], row[chosen]
        sampled = []
        for salt in salts:
            permuted = mix64(keys ^ salt)
            first = smallest(permuted, row_of_context, n_rows)  # (R)
            is_first = permuted == first[row_of_context]
            first_table = torch.full((n_rows,), -1, dtype=table.dtype)
            first_table[row_of_context[is_first]] = table[is_first]
            # For ids of that very table: the smallest of the row's other tables.
            other = first_table[row_of_context] != table
            second = smallest(permuted[other], row_of_context[other], n_rows)
            of_key = torch.where(first_table[row] == item_table, second[row], first[row])
            sampled.append(smallest(of_key, item, n_items))
        return sampled

    def _by_weight(
        self, rows: Rows, item: Tensor, n_items: int, salts: Sequence[int], context: list[int]
    ) -> Sequence[Tensor]:
        """Of each table of the context the pairs (id, context), which are different pairs from those of other tables,
        for as many ids at a time as have `_PAIRS`: an id's sample is of its own pairs only."""
        row, n_rows = rows.row_of_key(), max(rows.hash.numel(), 1)
        best = torch.full((len(salts), n_items), torch.inf, dtype=torch.float64)
        sampled = torch.full((len(salts), n_items), LARGEST)
        for index in context:
            in_context = rows.tables == index
            keys, context_of_key = torch.unique(rows.keys[in_context], return_inverse=True)
            per_row = torch.bincount(row[in_context], minlength=n_rows)
            chosen = (item >= 0) & ~in_context
            # In a bag or in two features an id may stand in one row twice; it meets the row's context once.
            of_item = torch.unique(item[chosen] * n_rows + row[chosen])  # (A), in order of ids
            of_item, of_row = of_item // n_rows, of_item % n_rows
            n_pairs = torch.zeros(n_items, dtype=torch.int64).index_add_(0, of_item, per_row[of_row])
            for start, end in _blocks(n_pairs, _PAIRS):
                span = slice(*torch.searchsorted(of_item, torch.tensor([start, end])).tolist())
                pair_item, pair_context, weight = _pairs(
                    rows, of_item[span] - start, of_row[span], context_of_key, per_row, keys.numel()
                )
                for n, salt in enumerate(salts):
                    order, element = _consistent_weighted_sample(keys[pair_context], weight, salt)
                    least = torch.full((end - start,), torch.inf, dtype=torch.float64)
                    least.scatter_reduce_(0, pair_item, order, "amin")
                    is_least = order == least[pair_item]
                    first = smallest(element[is_least], pair_item[is_least], end - start)
                    sampled[n, start:end] = torch.where(least < best[n, start:end], first, sampled[n, start:end])
                    best[n, start:end] = torch.minimum(least, best[n, start:end])
        return list(sampled)


def _blocks(sizes: Tensor, most: int) -> Iterator[tuple[int, int]]:
    """Ranges [start, end) that cover `sizes`, int64 [n], in order, each of a sum of at most `most` or of one entry."""
    ends = sizes.cumsum(0)
    start = 0
    while start < sizes.numel():
        before = int(ends[start - 1]) if start else 0
        end = max(int(torch.searchsorted(ends, before + most, right=True)), start + 1)
        yield start, end
        start = end


def _pairs(
    rows: Rows, item: Tensor, row: Tensor, context_of_key: Tensor, per_row: Tensor, n_contexts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct pairs (id, context) that stand in a common row.

    Args:
        rows: the R sampled rows; a row weighs its count.
        item, row: int64 [A], ids and the rows they are in.
        context_of_key: int64 [B], which context each key of the context's table is, in order of rows.
        per_row: int64 [R], how many of these keys each row has.
        n_contexts: distinct contexts.
    Returns:
        item int64 [P], context int64 [P] and weight float64 [P] of each pair.
    """
    n = per_row[row]
    first = (per_row.cumsum(0) - per_row)[row]
    position = torch.repeat_interleave(first - (n.cumsum(0) - n), n) + torch.arange(int(n.sum()))
    pair = torch.repeat_interleave(item, n) * max(n_contexts, 1) + context_of_key[position]
    pair, which = torch.unique(pair, return_inverse=True)
    weight = torch.zeros(pair.numel(), dtype=torch.int64)
    weight.index_add_(0, which, rows.count[torch.repeat_interleave(row, n)])
    return pair // max(n_contexts, 1), pair % max(n_contexts, 1), weight.to(torch.float64)


def _consistent_weighted_sample(keys: Tensor, weights: Tensor, salt: int) -> tuple[Tensor, Tensor]:
    """Ioffe's improved consistent weighted sampling (ICDM 2010, algorithm 1), all elements at once.

    Args:
        keys: int64 [P], elements.
        weights: float64 [P], > 0.
        salt: of the hash function.
    Returns:
        float64 [P], of which a set samples the smallest; int64 [P], the sample (element, t) that it then has, hashed.
        Two sets have the same sample with probability sum min(weights) / sum max(weights).
    """
    u = [uniform(mix64(mix64(keys ^ salt) + n)) for n in range(5)]
    r = -(u[0] * u[1]).log()  # Gamma(2, 1)
    c = -(u[2] * u[3]).log()
    t = (weights.log() / r + u[4]).floor()
    return c.log() - r * (t - u[4] + 1), mix64(mix64(keys ^ salt) ^ mix64(t.to(torch.int64)))
