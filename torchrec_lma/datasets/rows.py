"""Readers that stream tables of clicks from disk as TorchRec batches: any parquet, and Criteo's TSV.

    schema = Schema(label="is_click", categorical=("user_id", "video_id"), numeric=("duration_ms",))
    dataset = ParquetDataset("clicks/", schema, Split("time", ("time_ms",)))
    for batch in dataset.batches("train", batch_size=4096, rank=rank, world_size=world_size, shuffle_seed=0):
        ...

The flow of one row: a *unit* (a parquet row group, a TSV file) is read in chunks as it is stored; the rows of the
asked split and of the rank's share are kept; `encode_ids` and `encode_numeric` turn their columns into ids and floats;
shuffling (windows.py) and batching are `take` and `slice` of Arrow batches; `_to_batch` gives the buffers to torch.
No step loops over rows or ids in Python, and RAM is bounded by `shuffle_rows`, not by the data.

Serving must encode requests as training did: `encode_ids` and `encode_numeric` are the two functions to call.
"""

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma.datasets.columns import (
    as_labels,
    encode_ids,
    encode_numeric,
    id_type,
    string_like_a_list,
    time_type,
)
from torchrec_lma.datasets.schema import SPLITS, Schema, Split, part
from torchrec_lma.datasets.windows import shuffled

READ_ROWS = 1 << 16  # rows decoded at a time


@dataclass(frozen=True)
class Unit:
    """What a reader opens as one piece: a row group of a parquet file, or a TSV file."""

    path: str
    num_rows: int
    file_row: int = 0  # position in the file of the first row
    row_group: int = 0


class RowDataset(ABC):
    """Rows of one label, ids and numbers, streamed from disk as TorchRec batches.

    Args:
        schema: the columns to use.
        split: how "train", "validation" and "test" are divided; the split "all" has every row whatever it says.

    Rank r of w reads the r-th of w equal contiguous shares of a split, so ranks do not read each other's row groups.
    """

    files: Sequence[str] = ()  # that the rows come from, in order, where it was chosen

    def __init__(self, path: object, schema: Schema, split: Split) -> None:
        self.schema = schema
        self.split = split
        self.path = path
        self._types: dict[tuple[str, str], tuple[str, str]] = {}  # (column, role): its type there, and the first file
        self._searched_for_lists: set[str] = set()
        self._units = self._open()
        # Position in the data of each unit's first row, and of the end: int64 [units + 1].
        self._starts = np.cumsum([0, *(unit.num_rows for unit in self._units)])

    @abstractmethod
    def _open(self) -> list[Unit]:
        """The data's units in order; raises where a file or a column is missing."""

    @abstractmethod
    def _read(self, unit: Unit, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The unit's rows in order, as stored."""

    def num_rows(self, split: str = "train") -> int:
        """The number of rows of `split`.

        Raises:
            ValueError: there is no such split, or it has no rows.
        """
        rows = int(self._rows_per_unit(split).sum())
        if not rows:
            raise ValueError(
                f"split {split!r} has no rows: {self.split} of {self._starts[-1]} rows in {self.path}; "
                "change the fractions, or the columns that split"
            )
        return rows

    def num_batches(self, split: str, batch_size: int, world_size: int = 1, drop_last: bool = False) -> int:
        """How many batches `batches` yields on every rank.

        Raises:
            ValueError: as `num_rows`; or with `drop_last` nothing is left.
        """
        rows = self.num_rows(split)
        if not drop_last:
            return -(-rows // (world_size * batch_size))
        if rows < world_size * batch_size:
            raise ValueError(
                f"drop_last leaves nothing of split {split!r}: its {rows} rows are less than one batch of {batch_size} "
                f"on each of {world_size} ranks; use a smaller batch_size"
            )
        return rows // world_size // batch_size

    def batches(
        self,
        split: str = "train",
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle_seed: int | None = None,
        epoch: int = 0,
        shuffle_rows: int = 1 << 18,
        drop_last: bool = False,
        first_batch: int = 0,
    ) -> Iterator[Batch]:
        """One pass over `split`, the same number of batches on every rank.

        Yields batches of B rows: `dense_features` float32 [B, numeric], `labels` float32 [B], and `sparse_features`
        with the categorical columns as keys, values int64 [ids] and lengths int32 [categorical * B]. B is
        `batch_size`; without `drop_last`, a rank's last batch may be smaller and even have 0 rows.

        Args:
            split: "train", "validation", "test" or "all".
            batch_size: rows of one batch on one rank.
            rank, world_size: which of how many shares to read.
            shuffle_seed: None keeps the stored order. Else the rows of each window of `shuffle_rows` are permuted, the
                same way for the same (shuffle_seed, epoch, rank, world_size, batch_size, shuffle_rows).
            drop_last: leave out the rows that do not fill a batch on every rank.
            first_batch: start at this batch of the pass, counting from 0, as if those before had been read, which only
                those are that share a shuffled window with it.

        Raises:
            ValueError: as `num_batches`; an argument is out of range; while iterating, a label is not 0 or 1, or a
                column cannot be encoded, naming file, column and value.
        """
        for name, value in (("batch_size", batch_size), ("world_size", world_size), ("shuffle_rows", shuffle_rows)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must be at least 0 and below world_size={world_size}")
        num_batches = self.num_batches(split, batch_size, world_size, drop_last)
        if not 0 <= first_batch <= num_batches:
            raise ValueError(f"first_batch={first_batch} must be at least 0 and at most the {num_batches} of the pass")
        start, stop = self._share(split, rank, world_size)
        stop = min(stop, start + num_batches * batch_size)
        window_rows = max(1, (READ_ROWS if shuffle_seed is None else shuffle_rows) // batch_size) * batch_size
        windows, skipped = divmod(first_batch * batch_size, window_rows)
        random = np.random.default_rng([shuffle_seed, epoch, rank]) if shuffle_seed is not None else None
        if random is not None:
            for _ in range(windows):
                random.permutation(window_rows)  # drawn all the same: the next ones follow from it
        rows = shuffled(self._encoded(split, start + windows * window_rows, stop), window_rows, random)
        empty = num_batches - max(-(-(stop - start) // batch_size), first_batch)
        return self._cut(rows, batch_size, skipped, empty)

    def _cut(self, windows: Iterable[pa.RecordBatch], batch_size: int, skipped: int, empty: int) -> Iterator[Batch]:
        """Windows in batches, without the first `skipped` rows; then `empty` batches of no rows."""
        for window in windows:
            for offset in range(skipped, window.num_rows, batch_size):
                yield self._to_batch(window.slice(offset, batch_size))
            skipped = 0
        for _ in range(empty):
            yield self._to_batch(self._no_rows())

    def _share(self, split: str, rank: int, world_size: int) -> tuple[int, int]:
        """The rows [start, stop) of a split that a rank reads."""
        rows = self.num_rows(split)
        return rows * rank // world_size, rows * (rank + 1) // world_size

    def distinct_ids(self, split: str = "train", rank: int = 0, world_size: int = 1) -> dict[str, np.ndarray]:
        """The ids of each categorical column in `split`, int64 [distinct], ascending. One pass, 8 bytes a distinct id.

        Args:
            rank, world_size: which of how many shares to read, as in `batches`.
        Raises:
            ValueError: as `batches`.
        """
        known = {name: np.empty(0, np.int64) for name in self.schema.categorical}
        new: dict[str, list[np.ndarray]] = {name: [] for name in known}
        for batch in self._encoded(split, *self._share(split, rank, world_size)):
            for name, pending in new.items():
                pending.append(pd.unique(_values(batch.column(name))))
                if sum(map(len, pending)) > max(READ_ROWS, len(known[name])):  # seldom enough: O(n log n) in all
                    known[name] = np.unique(np.concatenate([known[name], *pending]))
                    pending.clear()
        return {name: np.unique(np.concatenate([known[name], *pending])) for name, pending in new.items()}

    def cardinalities(self, split: str = "train") -> dict[str, int]:
        """The number of distinct ids of each categorical column in `split`; see `distinct_ids`."""
        return {name: len(ids) for name, ids in self.distinct_ids(split).items()}

    @property
    def id_types(self) -> dict[str, str]:
        """What the categorical columns hold: "integers" or "strings", which are other ids; not of empty columns."""
        ids = [(name, "ids") for name in self.schema.categorical]
        return {name: self._types[name, role][0] for name, role in ids if (name, role) in self._types}

    def _check_columns(self, path: str, stored: pa.Schema) -> None:
        """Raises ValueError where a file lacks a column, has one twice, or one of another type than files before."""
        for name in dict.fromkeys((*self.schema.columns, *self.split.columns)):
            if stored.names.count(name) > 1:
                raise ValueError(
                    f"{path} has {stored.names.count(name)} columns {name!r}: rename all but the right one"
                )
            if name not in stored.names:
                raise ValueError(f"{path} has no column {name!r}, it has {', '.join(stored.names)}: correct the name")
            of_column = stored.field(name).type
            roles = {"ids": id_type(of_column)} if name in self.schema.categorical else {}
            if name in self.split.columns:
                roles |= {"times": time_type(of_column)} if self.split.by == "time" else {"ids": id_type(of_column)}
            for role, found in roles.items():
                if found is None:  # the file has no value of it
                    continue
                known, first = self._types.setdefault((name, role), (found, path))
                if known != found:
                    raise ValueError(
                        f"column {name!r} has {known} in {first} and {found} in {path}, in which equal {role} are not "
                        "equal: write it in one type"
                    )

    def _rows_per_unit(self, split: str) -> np.ndarray:
        """int64 [units]"""
        if split == "all":
            return np.diff(self._starts)
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}: choose one of {', '.join(SPLITS)}, all")
        return self._division[1][SPLITS.index(split)]

    @cached_property
    def _division(self) -> tuple[np.ndarray, np.ndarray]:
        """`Split.bounds`, and how many rows each of SPLITS has in each unit, int64 [3, units]; reads what splits."""
        units = range(len(self._units))
        # The quantiles of a time column need all its values: 8 bytes a row while this runs.
        held = [list(self._unit_keys(i)) for i in units] if self.split.by == "time" and self.split.columns else []
        bounds = self.split.bounds([keys for chunks in held for keys in chunks], int(self._starts[-1]))
        counts = np.zeros((len(SPLITS), len(units)), np.int64)
        for i in units:
            for keys in held[i] if held else self._unit_keys(i):
                counts[:, i] += np.bincount(part(bounds, keys), minlength=len(SPLITS))
        return bounds, counts

    def _unit_keys(self, index: int) -> Iterator[np.ndarray]:
        """`Split.keys` of a unit's rows in order; nothing is read where the position alone decides."""
        start, end = int(self._starts[index]), int(self._starts[index + 1])
        if not self.split.columns:
            for first in range(start, end, READ_ROWS):
                yield self.split.keys(np.arange(first, min(first + READ_ROWS, end)), ())
            return
        for batch in self._read(self._units[index], self.split.columns):
            yield self._batch_keys(index, start, batch)
            start += batch.num_rows

    def _batch_keys(self, index: int, start: int, batch: pa.RecordBatch) -> np.ndarray:
        """`Split.keys` of the rows that `batch` has from position `start` of the data on."""
        with _naming(self._units[index].path, *self.split.columns):
            columns = [batch.column(name) for name in self.split.columns]
            return self.split.keys(np.arange(start, start + batch.num_rows), columns)

    def _encoded(self, split: str, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """Rows [start, stop) of the split: label and numeric columns float32, categorical as `encode_ids` gives."""
        counts = self._rows_per_unit(split)
        before = np.cumsum(counts) - counts  # rows of the split in the units before
        names = dict.fromkeys((*self.schema.columns, *(self.split.columns if split != "all" else ())))
        for index in np.flatnonzero((before < stop) & (before + counts > start)).tolist():
            unit, seen = self._units[index], int(before[index])
            file_row, position = unit.file_row, int(self._starts[index])
            for batch in self._read(unit, tuple(names)):
                if split == "all":
                    rows = np.arange(batch.num_rows)
                else:
                    in_split = part(self._division[0], self._batch_keys(index, position, batch))
                    rows = np.flatnonzero(in_split == SPLITS.index(split))
                kept = rows[max(start - seen, 0) : max(stop - seen, 0)]
                if len(kept):
                    whole = len(kept) == batch.num_rows
                    yield self._encode(unit.path, file_row + kept, batch if whole else batch.take(pa.array(kept)))
                seen += len(rows)
                file_row += batch.num_rows
                position += batch.num_rows
                if seen >= stop:
                    return

    def _encode(self, path: str, rows: np.ndarray, batch: pa.RecordBatch) -> pa.RecordBatch:
        """`batch` as stored -> as `_encoded` yields it. `rows`: int64, its rows' positions in the file."""
        encoded = {}
        for name in self.schema.columns:
            with _naming(path, name):
                if name == self.schema.label:
                    encoded[name] = as_labels(batch.column(name), rows)
                else:
                    encode = encode_ids if name in self.schema.categorical else encode_numeric
                    encoded[name] = encode(batch.column(name))
                    if encode is encode_ids:
                        self._search_for_lists(path, name, batch.column(name))
        return pa.RecordBatch.from_pydict(encoded)

    def _search_for_lists(self, path: str, name: str, column: pa.Array) -> None:
        """Warns of strings that seem to be lists, at the first rows of a column that has values."""
        if name in self._searched_for_lists or column.null_count == len(column):
            return
        self._searched_for_lists.add(name)
        found = string_like_a_list(column)
        if found is not None and os.environ.get("RANK", "0") == "0":
            warnings.warn(
                f"{path}: column {name!r} has strings such as {found!r}, each of which is one id; if they are lists, "
                "write a column of lists (pandas: frame[name].str.split('|'))",
                UserWarning,
                stacklevel=2,
            )

    def _to_batch(self, rows: pa.RecordBatch) -> Batch:
        """Rows of `_encoded` -> torch tensors."""
        ids = [rows.column(name) for name in self.schema.categorical]
        dense = np.empty((rows.num_rows, len(self.schema.numeric)), np.float32)
        for i, name in enumerate(self.schema.numeric):
            dense[:, i] = rows.column(name).to_numpy()
        label = self.schema.label
        labels = np.full(rows.num_rows, np.nan, np.float32) if label is None else rows.column(label).to_numpy().copy()
        return Batch(
            dense_features=torch.from_numpy(dense),
            sparse_features=KeyedJaggedTensor(
                keys=list(self.schema.categorical),
                values=torch.from_numpy(np.concatenate([_values(column) for column in ids])),
                lengths=torch.from_numpy(np.concatenate([_lengths(column) for column in ids], dtype=np.int32)),
            ),
            labels=torch.from_numpy(labels),
        )

    def _no_rows(self) -> pa.RecordBatch:
        """`_encoded`'s columns with 0 rows."""
        types = {name: pa.int64() if name in self.schema.categorical else pa.float32() for name in self.schema.columns}
        return pa.RecordBatch.from_pydict({name: pa.array([], arrow_type) for name, arrow_type in types.items()})


@contextmanager
def _naming(path: str, *columns: str) -> Iterator[None]:
    """Says in a ValueError which file and columns it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: column {', '.join(map(repr, columns))}: {error}") from error


def _values(column: pa.Array) -> np.ndarray:
    """All ids of a column that `encode_ids` made, int64 [ids]."""
    return (column.drop_null() if pa.types.is_int64(column.type) else column.flatten()).to_numpy()


def _lengths(column: pa.Array) -> np.ndarray:
    """How many ids each row of such a column has, [rows]."""
    if not pa.types.is_int64(column.type):
        return column.value_lengths().to_numpy()
    return column.is_valid().to_numpy(zero_copy_only=False)
