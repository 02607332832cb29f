"""Semantic sources: what makes two ids similar, each as a locality-sensitive hash of an id.

A source gives every chosen id K 32-bit values. Two ids agree on a value with the probability that its theorem states;
chunk j of their embeddings is shared exactly when they agree on value j mod K, or by chance (`MemoryAddressing`).

* `RowsMinHash`, `ContextMinHash`: MinHash of sets taken from the sampled training rows. One value folds `power`
  independent MinHashes, so ids of similarity J agree with probability J ** power.
* `SimHash`: signs of random projections of vectors that the caller has.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchrec_lma.allocation.sample import Rows
from torchrec_lma.config import check_int
from torchrec_lma.hashing import mix64, salt

_LARGEST = torch.iinfo(torch.int64).max
_PAIRS = 1 << 20  # pairs of an id and a context that are held at once, unless one id has more


class Source(ABC):
    """What every source has. Subclasses are frozen dataclasses, so that builders can compare and record them.

    Tables of one memory store as many values as the largest K among them, at most one for each chunk; a table of a
    smaller K repeats its values. Ids of different tables share by signature if their tables' sources have the same
    kind and power.

    Attributes:
        num_values: K, how many 32-bit values a signature has.
        within_table: share by signature only between ids of the same table.
    """

    NAME: ClassVar[str]
    num_values: int
    within_table: bool

    def to_dict(self) -> dict[str, Any]:
        """Name and settings as plain JSON values."""
        return {"name": self.NAME, **asdict(self)}  # type: ignore[call-overload]  # subclasses are dataclasses


@dataclass(frozen=True)
class RowsSource(Source):
    """A source that hashes sets taken from the sampled training rows. See RowsMinHash for the arguments."""

    SALT: ClassVar[str]
    power: int = 2
    num_values: int = 4
    min_support: int = 2
    max_rows: int | None = 1 << 20
    within_table: bool = False
    weighted: bool = False

    def __post_init__(self) -> None:
        for name in ("power", "num_values", "min_support"):
            check_int(name, getattr(self, name), minimum=1)
        if self.max_rows is not None:
            check_int("max_rows", self.max_rows, minimum=1)
        for name in ("within_table", "weighted"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def signatures(
        self, rows: Rows, item: Tensor, item_keys: Tensor, num_values: int, seed: int, tables: Sequence[str]
    ) -> Tensor:
        """The signatures of chosen ids.

        Args:
            rows: the sampled rows, N keys in R rows.
            item: int64 [N], which chosen id each key is, -1 for the others.
            item_keys: int64 [S], the mixed keys of the chosen ids; each occurs in at least one row.
            num_values: values wanted, the first of the `num_values` that this source has.
            seed: of the hash functions.
            tables: names of the tables, by the index in `rows.tables`.
        Returns:
            int32 [S, num_values].
        """
        salts = [salt(self.SALT, seed, k, p) for k in range(num_values) for p in range(self.power)]
        elements = iter(self._sampled(rows, item, item_keys, salts, tables))
        values = []
        for _ in range(num_values):
            value = torch.zeros_like(item_keys)
            for _ in range(self.power):
                value = mix64(value ^ next(elements))
            values.append((value >> 32).to(torch.int32))
        return torch.stack(values, dim=1)

    @abstractmethod
    def _sampled(
        self, rows: Rows, item: Tensor, item_keys: Tensor, salts: Sequence[int], tables: Sequence[str]
    ) -> Sequence[Tensor]:
        """For each salt int64 [S]: a hash of the one element of each id's set that comes first in that salt's order."""


@dataclass(frozen=True)
class RowsMinHash(RowsSource):
    """The paper's source: MinHash over the set of training rows that contain an id (arXiv 2103.06124, section 5).

    Two ids agree on a signature value with probability J ** power, where J is the Jaccard similarity of their row sets
    (Broder, 1997). Values of one single-valued field never share a row, so this similarity acts across fields.

    Args:
        power: independent MinHashes folded into each stored value; a higher power shares only between closer ids.
        num_values: K, 32-bit values stored per id. Chunks reuse them in turn, each with a salt of its own.
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
        for one in salts:
            permuted = mix64(rows.hash ^ one)  # (R), a random order of the rows
            if not self.weighted:
                sampled.append(_smallest(permuted[row], item, item_keys.numel()))
                continue
            by_weight = torch.sort(-_uniform(permuted).log() / rows.count).indices
            rank = torch.empty_like(by_weight)
            rank[by_weight] = torch.arange(by_weight.numel())
            sampled.append(permuted[by_weight[_smallest(rank[row], item, item_keys.numel())]])
        return sampled


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
            raise ValueError(f"fields {unknown} of {self.NAME} are no tables; choose from {list(tables)}")
        if set(self.fields or tables) == {table}:
            raise ValueError(
                f"the ids of table {table!r} would have no context and share nothing: fields={self.fields} of "
                f"{self.NAME} leave no table but its own, whose ids never are context. Name another table in fields "
                "(--context on the command line), or give this one another source or none (--source-of)"
            )

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "fields": list(self.fields)}

    def _sampled(
        self, rows: Rows, item: Tensor, item_keys: Tensor, salts: Sequence[int], tables: Sequence[str]
    ) -> Sequence[Tensor]:
        context = [index for index, name in enumerate(tables) if not self.fields or name in self.fields]
        sampled = self._by_weight if self.weighted else self._by_set
        elements = sampled(rows, item, item_keys.numel(), salts, context)
        return [torch.where(first == _LARGEST, item_keys, first) for first in elements]

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
        for one in salts:
            permuted = mix64(keys ^ one)
            first = _smallest(permuted, row_of_context, n_rows)  # (R)
            is_first = permuted == first[row_of_context]
            first_table = torch.full((n_rows,), -1, dtype=table.dtype)
            first_table[row_of_context[is_first]] = table[is_first]
            # For ids of that very table: the smallest of the row's other tables.
            other = first_table[row_of_context] != table
            second = _smallest(permuted[other], row_of_context[other], n_rows)
            of_key = torch.where(first_table[row] == item_table, second[row], first[row])
            sampled.append(_smallest(of_key, item, n_items))
        return sampled

    def _by_weight(
        self, rows: Rows, item: Tensor, n_items: int, salts: Sequence[int], context: list[int]
    ) -> Sequence[Tensor]:
        """Of each table of the context the pairs (id, context), which are different pairs from those of other tables,
        for as many ids at a time as have `_PAIRS`: an id's sample is of its own pairs only."""
        row, n_rows = rows.row_of_key(), max(rows.hash.numel(), 1)
        best = torch.full((len(salts), n_items), torch.inf, dtype=torch.float64)
        sampled = torch.full((len(salts), n_items), _LARGEST)
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
                block = slice(*torch.searchsorted(of_item, torch.tensor([start, end])).tolist())
                pair_item, pair_context, weight = _pairs(
                    rows, of_item[block] - start, of_row[block], context_of_key, per_row, keys.numel()
                )
                for n, one in enumerate(salts):
                    order, element = _consistent_weighted_sample(keys[pair_context], weight, one)
                    smallest = torch.full((end - start,), torch.inf, dtype=torch.float64)
                    smallest.scatter_reduce_(0, pair_item, order, "amin")
                    is_smallest = order == smallest[pair_item]
                    first = _smallest(element[is_smallest], pair_item[is_smallest], end - start)
                    sampled[n, start:end] = torch.where(smallest < best[n, start:end], first, sampled[n, start:end])
                    best[n, start:end] = torch.minimum(smallest, best[n, start:end])
        return list(sampled)


def _smallest(values: Tensor, group: Tensor, n_groups: int) -> Tensor:
    """int64 [n_groups], the smallest value of each group; the largest int64 where a group is empty."""
    return torch.full((n_groups,), _LARGEST).scatter_reduce_(0, group, values, "amin")


def _uniform(mixed: Tensor) -> Tensor:
    """float64 in (0, 1), from 52 bits of mixed keys."""
    return (((mixed >> 12) & 0xFFFFFFFFFFFFF).to(torch.float64) + 0.5) * 2.0**-52


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
    uniform = [_uniform(mix64(mix64(keys ^ salt) + n)) for n in range(5)]
    r = -(uniform[0] * uniform[1]).log()  # Gamma(2, 1)
    c = -(uniform[2] * uniform[3]).log()
    t = (weights.log() / r + uniform[4]).floor()
    return c.log() - r * (t - uniform[4] + 1), mix64(mix64(keys ^ salt) ^ mix64(t.to(torch.int64)))


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
        generators = [torch.Generator().manual_seed(one & _LARGEST) for one in salts]
        directions = torch.cat(
            [torch.randn(length, self.bits, generator=one, dtype=torch.float64) for one in generators], dim=1
        )  # (d, K * bits)
        values = []
        for block in vectors.split(1 << 16):
            # In float64, so that a sign does not depend on how the sum is ordered, but for one in about 1e13.
            signs = (block.to(torch.float64) @ directions >= 0).view(-1, self.num_values, self.bits)  # (S, K, bits)
            packed = (signs.to(torch.int64) << torch.arange(self.bits)).sum(2)  # (S, K)
            values.append((mix64(packed ^ torch.tensor(salts)) >> 32).to(torch.int32))
        return torch.cat(values)
