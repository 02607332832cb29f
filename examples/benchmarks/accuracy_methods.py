"""The methods of accuracy.py: each makes an embedding collection that fits in a number of bytes.

A rival is a plain EmbeddingBagCollection behind a relabelling of ids, computed once from the counts of the training
rows. Full size is that of FP32 tables of the dim; a budget is full size over compression, in bytes of weights and of
whatever says which id has which row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accuracy_data import Data
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_lma import AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection
from torchrec_lma.allocation.sources import ContextMinHash, RowsMinHash, Source


@dataclass(frozen=True)
class Method:
    """What is trained.

    Attributes:
        columns: of `ids`.
        ids: int64 [rows, columns], what the collection is fed with.
        make: a new collection on the CPU.
        bytes: of weights and of what says which id has which row.
    """

    columns: tuple[str, ...]
    ids: np.ndarray
    make: Callable[[], EmbeddingBagCollectionInterface]
    bytes: int


class NotPossible(Exception):
    """A method cannot be had at a compression."""


class QuotientRemainder(EmbeddingBagCollectionInterface):
    """Shi et al., arXiv 1909.02107: an id's embedding is the product of that of its quotient and of its remainder."""

    def __init__(self, columns: Sequence[str], tables: list[EmbeddingBagConfig], both: set[str]) -> None:
        super().__init__()
        self.inner = EmbeddingBagCollection(tables=tables)
        self._columns, self._both = list(columns), both
        self._tables = [table for table in tables if table.feature_names[0] in self._columns]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        pooled = self.inner(features).to_dict()
        values = [pooled[c] * pooled[f"{c}_quotient"] if c in self._both else pooled[c] for c in self._columns]
        return KeyedTensor(self._columns, [value.size(1) for value in values], torch.cat(values, 1))

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._tables

    def is_weighted(self) -> bool:
        return False


class Budget:
    """Bytes for tables of a data set, and what those hold.

    Args:
        data: whose columns are the tables, one each.
        dim: of full tables.
        compression: full bytes over budget.
    """

    def __init__(self, data: Data, dim: int, compression: float) -> None:
        self.data, self.dim, self.compression = data, dim, compression
        self.full = sum(data.sizes) * dim * 4
        self.bytes = int(self.full / compression)

    def tables(self, sizes: Sequence[int], dim: int, data_type: DataType, suffix: str = "") -> list[EmbeddingBagConfig]:
        # All kinds of tables start alike. TorchRec's default, +-1/sqrt(rows), would start small tables at +-1.
        bound = (len(self.data.sizes) / sum(self.data.sizes)) ** 0.5
        return [
            EmbeddingBagConfig(
                name=f"t_{column}{suffix}",
                embedding_dim=dim,
                num_embeddings=size,
                feature_names=[f"{column}{suffix}"],
                pooling=PoolingType.SUM,
                data_type=data_type,
                weight_init_min=-bound,
                weight_init_max=bound,
            )
            for column, size in zip(self.data.columns, sizes)
            if size > 0
        ]

    def plain(
        self, dim: int, data_type: DataType, relabel: Sequence[np.ndarray] | None = None, more: int = 0
    ) -> Method:
        """A plain collection; `relabel` [size] of each column gives ids new ones, `more` bytes are kept for it."""
        ids, sizes = self.data.ids, list(self.data.sizes)
        if relabel is not None:
            ids = np.stack([new[ids[:, i]] for i, new in enumerate(relabel)], 1)
            sizes = [int(new.max()) + 1 for new in relabel]
        tables = self.tables(sizes, dim, data_type)
        used = sum(sizes) * dim * (4 if data_type == DataType.FP32 else 2)
        return Method(self.data.columns, ids, lambda: EmbeddingBagCollection(tables=tables), used)

    def lma(
        self, config: LMAConfig, dim: int, source: Source | None = None, shared_fraction: float | None = None
    ) -> Method:
        tables = self.tables(self.data.sizes, dim, DataType.FP32)
        builder = AllocationBuilder(tables, config, source, shared_fraction)
        train = self.data.ids[: self.data.ends[0]]
        if source is None:
            for i, table in enumerate(tables):
                (seen,) = self.data.counts[i].nonzero()
                builder.add_counts(table.name, seen, self.data.counts[i][seen])
        else:
            for start in range(0, len(train), 8192):
                builder.update(as_features(self.data.columns, train[start : start + 8192]))
        allocation = builder.build()
        report = LMAEmbeddingBagCollection(tables, allocation, device=torch.device("meta")).memory_report()
        return Method(
            self.data.columns,
            self.data.ids,
            lambda: LMAEmbeddingBagCollection(tables, allocation),
            report.weight_bytes + report.allocation_bytes,
        )


def as_features(columns: Sequence[str], ids: np.ndarray) -> KeyedJaggedTensor:
    """The rows int64 [rows, columns] as bags of one id each."""
    values = torch.from_numpy(np.ascontiguousarray(ids.T)).view(-1)
    return KeyedJaggedTensor(list(columns), values, lengths=torch.ones(values.numel(), dtype=torch.int32))


def full(budget: Budget, seed: int) -> Method:
    return budget.plain(budget.dim, DataType.FP32)


def smaller_dim_fp32(budget: Budget, seed: int) -> Method:
    dim = budget.dim / budget.compression
    if dim < 4 or dim % 4:
        raise NotPossible(f"fused kernels have no FP32 rows of {dim:g} columns")
    return budget.plain(int(dim), DataType.FP32)


def smaller_dim_fp16(budget: Budget, seed: int) -> Method:
    dim = 2 * budget.dim / budget.compression
    if dim in (1, 2):  # what fused kernels do not take, levels of 1 or 2 columns do: everybody owns one
        config = LMAConfig(memory_bytes=4 * budget.full, widths=(int(dim),), skew=0, seed=seed)
        return budget.lma(config, int(dim))
    if dim < 4 or dim % 4:
        raise NotPossible(f"there are no FP16 rows of {dim:g} columns")
    return budget.plain(int(dim), DataType.FP16)


def hashing_trick(budget: Budget, seed: int) -> Method:
    """Tables of more rows than a cap are hashed to that many (`--max-ind-range` of the DLRM reference)."""
    cap = _largest_cap(budget, lambda cap: sum(min(size, cap) for size in budget.data.sizes))
    relabel = []
    for i, size in enumerate(budget.data.sizes):
        ids = np.arange(size)
        relabel.append(ids if size <= cap else _hashed(ids, cap, seed, i))
    return budget.plain(budget.dim, DataType.FP16, relabel)


def quotient_remainder(budget: Budget, seed: int) -> Method:
    """Tables of more rows than a cap are two tables of as many rows together."""

    def rows(size: int, cap: int) -> tuple[int, int]:  # of the remainders, of the quotients
        if size <= cap:
            return size, 0
        remainders = max((round(cap + max(0, cap * cap - 4 * size) ** 0.5) + 1) // 2, round(size**0.5))
        return remainders, -(-size // remainders)

    sizes = budget.data.sizes
    cap = _largest_cap(budget, lambda cap: sum(sum(rows(size, cap)) for size in sizes))
    remainders, quotients = zip(*(rows(size, cap) for size in sizes))
    both = {column for column, q in zip(budget.data.columns, quotients) if q}
    order = [np.random.default_rng((seed, i)).permutation(size) for i, size in enumerate(sizes)]
    shuffled = np.stack([order[i][budget.data.ids[:, i]] for i in range(len(sizes))], 1)
    ids = np.concatenate([shuffled % remainders, (shuffled // remainders)[:, [q > 0 for q in quotients]]], 1)
    columns = (*budget.data.columns, *(f"{c}_quotient" for c in budget.data.columns if c in both))
    tables = budget.tables(remainders, budget.dim, DataType.FP16)
    # Products start as other tables do.
    quotient_tables = budget.tables(quotients, budget.dim, DataType.FP16, "_quotient")
    for table in quotient_tables:
        table.weight_init_min, table.weight_init_max = 0.5, 1.5
    used = (sum(remainders) + sum(quotients)) * budget.dim * 2
    make = lambda: QuotientRemainder(budget.data.columns, tables + quotient_tables, both)  # noqa: E731
    return Method(columns, ids, make, used)


def hot_and_hashed(budget: Budget, seed: int) -> Method:
    """The usual rule of the industry: the most frequent ids of all tables own a row of 7/8 of the budget, those of a
    table that are left share their part of the rest. Which those are is seen from the id: the frequent come first."""
    sizes = budget.data.sizes
    rows = budget.bytes // (budget.dim * 2)
    counts = np.concatenate(budget.data.counts)
    column = np.repeat(np.arange(len(sizes)), sizes)
    own = np.zeros(counts.size, bool)
    own[np.argsort(-counts, kind="stable")[: max(0, rows * 7 // 8)]] = True
    left = np.bincount(column[~own], minlength=len(sizes))
    to_share = rows - rows * 7 // 8 - np.count_nonzero(left)  # beyond a row for each table
    if to_share < 0:
        raise NotPossible("a hashed row for each table alone takes more than there is")
    relabel, start = [], 0
    for i, size in enumerate(sizes):
        of_column = own[start : start + size]
        share = 1 + int(to_share * left[i] / max(1, left.sum()))
        new = np.where(of_column, np.cumsum(of_column) - 1, of_column.sum() + _hashed(np.arange(size), share, seed, i))
        relabel.append(new)
        start += size
    return budget.plain(budget.dim, DataType.FP16, relabel)


def lma(source: Source | None = None, **settings: Any) -> Callable[[Budget, int], Method]:
    def make(budget: Budget, seed: int) -> Method:
        config = LMAConfig(compression=budget.compression, seed=seed, **settings)
        return budget.lma(config, budget.dim, source)

    return make


def fine_pieces(source: Source | None) -> Callable[[Budget, int], Method]:
    """Levels of 4 columns on which nobody owns a row: the paper's form with a source, without one the first rule of
    this library, and that of compositional hashing in general."""

    def make(budget: Budget, seed: int) -> Method:
        config = LMAConfig(compression=budget.compression, widths=(4,) * (budget.dim // 4), seed=seed)
        return budget.lma(config, budget.dim, source, shared_fraction=1)

    return make


METHODS: dict[str, Callable[[Budget, int], Method]] = {
    "full": full,
    "dim FP32": smaller_dim_fp32,
    "dim FP16": smaller_dim_fp16,
    "hashing": hashing_trick,
    "quotient-remainder": quotient_remainder,
    "hot and hashed": hot_and_hashed,
    "pieces": fine_pieces(None),
    "paper": fine_pieces(RowsMinHash(power=2, max_rows=125_000)),
    "LMA": lma(),
    "LMA rows-minhash": lma(RowsMinHash()),
    "LMA context-minhash": lma(ContextMinHash()),
}


def find_method(name: str) -> Callable[[Budget, int], Method]:
    """One of METHODS, or LMA with settings of LMAConfig, such as "LMA widths=4,60 skew=0.5"."""
    if name in METHODS:
        return METHODS[name]
    first, *settings = name.split()
    if first != "LMA" or not all("=" in setting for setting in settings):
        raise ValueError(f"no method {name!r}: give some of {list(METHODS)}, or LMA with settings of LMAConfig")
    parsed: dict[str, Any] = {}
    for key, _, value in (setting.partition("=") for setting in settings):
        if key == "widths":
            parsed[key] = tuple(int(width) for width in value.split(","))
        else:
            parsed[key] = value if key == "data_type" else float(value)
    return lma(**parsed)


def _largest_cap(budget: Budget, rows: Callable[[int], int]) -> int:
    """The most rows of a table with which all of them fit. Raises NotPossible."""
    most = budget.bytes // (budget.dim * 2)
    if rows(1) > most:
        raise NotPossible(f"a row for each table takes more than {budget.bytes} bytes")
    low, high = 1, max(budget.data.sizes)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if rows(middle) <= most else (low, middle - 1)
    return low


def _hashed(ids: np.ndarray, rows: int, seed: int, column: int) -> np.ndarray:
    """int64 [n], a row for each id; drawn, since ids are a vocabulary."""
    return np.random.default_rng((seed, column)).integers(0, rows, ids.size)
