"""Readers that stream tables of clicks from disk as TorchRec batches: any parquet, and Criteo's TSV.

    schema = Schema(label="is_click", categorical=("user_id", "video_id"), numeric=("duration_ms",))
    dataset = ParquetDataset("clicks/", schema, Split("time", ("time_ms",)))
    for batch in dataset.batches("train", batch_size=4096, rank=rank, world_size=world_size, shuffle_seed=0):
        ...

The flow of one row: a *unit* (a parquet row group, a TSV file) is read in chunks as it is stored; the rows of the
asked split and of the rank's share are kept; `encode_ids` and `encode_numeric` turn their columns into ids and floats;
shuffling and batching are `take` and `slice` of Arrow batches; `_to_batch` hands the buffers over to torch. No step
loops over rows or ids in Python, and memory is bounded by `shuffle_rows`, not by the data.

Serving must encode requests as training did: `encode_ids` and `encode_numeric` are the two functions to call.
"""

import binascii
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.fs
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma.features import to_int64

SPLITS = ("train", "validation", "test")
READ_ROWS = 1 << 16  # rows decoded at a time
PARQUET_BUFFER_BYTES = 1 << 20  # of one column
CSV_BLOCK_BYTES = 8 << 20
HEX_DIGITS = 16  # of a 64-bit id
STRING_KINDS = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
)
NUMBER_KINDS = (
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_boolean,
    pa.types.is_null,
)

Path = str | os.PathLike[str]


def _names(field: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"{field}={names!r} must be a sequence of column names: write {field}=({names!r},)")
    return tuple(names)


@dataclass(frozen=True)
class Schema:
    """Which columns of a table a model uses.

    Args:
        label: column of 0 and 1; None for rows to be predicted, whose labels are then NaN.
        categorical: columns of ids, the keys of the batches' `KeyedJaggedTensor`. At least one.
        numeric: columns of numbers, the columns of the batches' `dense_features`.

    Raises:
        TypeError: `categorical` or `numeric` is one string instead of a sequence of names.
        ValueError: a column is named twice, or `categorical` is empty.
    """

    label: str | None
    categorical: tuple[str, ...]
    numeric: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("categorical", "numeric"):
            object.__setattr__(self, field, _names(field, getattr(self, field)))
        if not self.categorical:
            raise ValueError("categorical is empty: name at least one column of ids")
        repeated = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if repeated:
            raise ValueError(f"columns named more than once: {repeated}; a column has one role, so name each once")

    @property
    def columns(self) -> tuple[str, ...]:
        label = () if self.label is None else (self.label,)
        return (*label, *self.categorical, *self.numeric)


@dataclass(frozen=True)
class Split:
    """How rows are divided into "train", "validation" and "test". Every row is in exactly one of them.

    Args:
        by: "time": the last `test_fraction` of the rows are the test, the `validation_fraction` before them validation.
            Rows of equal time stay together, in the later split of the two. "hash": a hash of the row decides.
        columns: of "time", the one column that orders the rows (integer, float, date or timestamp); of "hash", the
            columns hashed, so that e.g. all rows of a user fall in one split. Empty: the row's position in the data,
            files taken in order.
        validation_fraction: in [0, 1).
        test_fraction: in (0, 1).
        seed: of "hash": another seed, another division.

    Raises:
        TypeError: `columns` is one string instead of a sequence of names.
        ValueError: a fraction is out of range, `by` is unknown, or "time" has several columns.
    """

    by: str = "hash"
    columns: tuple[str, ...] = ()
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", _names("columns", self.columns))
        if self.by not in ("time", "hash"):
            raise ValueError(f"by={self.by!r} must be 'time' or 'hash'")
        if self.by == "time" and len(self.columns) > 1:
            raise ValueError(f"columns={self.columns} of a split by time: one column gives the time, name only that")
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction={self.test_fraction} must be above 0 and below 1")
        if not 0 <= self.validation_fraction < 1 - self.test_fraction:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} must be at least 0 and leave rows to train on: "
                f"with test_fraction={self.test_fraction} it must be below {1 - self.test_fraction}"
            )

    def _keys(self, positions: np.ndarray, columns: Sequence[pa.Array]) -> np.ndarray:
        """What decides the split of each row, [rows]: its time (int64 or float64), or a hash (uint64).

        `positions`: int64 [rows], where in the data the rows are. `columns`: theirs of `self.columns`.
        """
        if self.by == "time":
            return _as_times(columns[0]) if columns else positions
        key = np.zeros(len(positions), np.uint64) if columns else positions.view(np.uint64)
        for ids in map(encode_ids, columns):
            if not pa.types.is_int64(ids.type):
                raise ValueError("a column of lists cannot split: name columns with one value a row")
            key = pd.util.hash_array(key ^ ids.fill_null(0).to_numpy().view(np.uint64))
        seed = pd.util.hash_array(np.array([self.seed], np.int64).view(np.uint64))
        return pd.util.hash_array(pd.util.hash_array(key) ^ seed)

    def _bounds(self, keys: Sequence[np.ndarray], num_rows: int) -> np.ndarray:
        """The keys that start "validation" and "test", [2]. `keys`: of all rows; only a time column needs them."""
        later = np.array([self.validation_fraction + self.test_fraction, self.test_fraction])
        if self.by == "hash":
            return np.array([min(int((1 - fraction) * 2.0**64), 2**64 - 1) for fraction in later], np.uint64)
        first = num_rows - np.clip(np.round(later * num_rows).astype(np.int64), 1, num_rows)
        return np.partition(np.concatenate(keys), first)[first] if self.columns and num_rows else first


def encode_ids(array: pa.Array) -> pa.Array:
    """The ids of one categorical column: `int64 [rows]`, null where missing, or `large_list<int64> [rows]` of bags.

    * integers and booleans are their own ids, negative ones included; uint64 keeps its 64 bits;
    * floats must hold integers (a nullable integer column that became float); NaN is missing;
    * strings and bytes are hashed to 64 bits by `pandas.util.hash_array` with its default key, the bits read as int64.
      The hash is the same on every machine and in every process; two of n strings collide with probability n^2 / 2^65.
      The empty string is a value like any other;
    * lists are bags of several ids, missing elements dropped; a missing list is an empty bag;
    * dictionary-encoded columns are what their values are.

    Raises:
        ValueError: the column has another type, or a float is not an integer of at most 2^53.
    """
    kind = array.type
    if pa.types.is_integer(kind):
        return array.view(pa.int64()) if pa.types.is_uint64(kind) else array.cast(pa.int64())
    if pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return array.cast(pa.int64())
    if pa.types.is_dictionary(kind):
        return encode_ids(array.dictionary).take(array.indices)
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        return encode_ids(array.cast(pa.large_binary()))
    if any(is_kind(kind) for is_kind in STRING_KINDS):
        encoded = array.dictionary_encode()  # hash each distinct string once
        strings = encoded.dictionary.to_numpy(zero_copy_only=False)  # [distinct] of str or bytes
        return pa.array(pd.util.hash_array(strings, categorize=False).view(np.int64)).take(encoded.indices)
    if pa.types.is_floating(kind):
        values = array.cast(pa.float64()).to_numpy(zero_copy_only=False)  # missing -> NaN
        missing = np.isnan(values)
        bad = values[~missing & ~((values == np.trunc(values)) & (np.abs(values) <= 2**53))]
        if bad.size:
            raise ValueError(f"float {bad[0]} is no id: round or bin it to integers, or use the column as numeric")
        return pa.array(np.where(missing, 0, values).astype(np.int64), mask=missing)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        ids = encode_ids(array.flatten())  # skips the elements of missing lists
        if pa.types.is_large_list(ids.type):
            raise ValueError(f"{kind} is a list of lists: flatten it to one list of ids a row")
        lengths = pc.list_value_length(array).fill_null(0).to_numpy()
        kept = np.repeat(np.arange(len(array)), lengths)[ids.is_valid().to_numpy(zero_copy_only=False)]
        offsets = np.zeros(len(array) + 1, np.int64)
        np.cumsum(np.bincount(kept, minlength=len(array)), out=offsets[1:])
        return pa.LargeListArray.from_arrays(pa.array(offsets), ids.drop_null())
    raise ValueError(f"type {kind} cannot hold ids: convert the column to integers, strings, or a list of either")


def encode_numeric(array: pa.Array) -> pa.Array:
    """The values of one numeric column, `float32 [rows]`: sign(x) * log1p(|x|), and 0 where missing, NaN or infinite.

    Raises:
        ValueError: the column holds no numbers.
    """
    values = _as_float64(array)
    values[~np.isfinite(values)] = 0
    return pa.array((np.sign(values) * np.log1p(np.abs(values))).astype(np.float32))


def _as_float64(array: pa.Array) -> np.ndarray:
    """float64 [rows], NaN where missing."""
    array = array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
    kind = array.type
    if not any(is_kind(kind) for is_kind in NUMBER_KINDS):
        raise ValueError(f"type {kind} holds no numbers: convert the column to integers or floats")
    return np.array(array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))


def _as_labels(array: pa.Array, rows: np.ndarray) -> pa.Array:
    """float32 [rows] of 0 and 1. `rows`: int64, the position in the file of each, for the error."""
    values = _as_float64(array)
    bad = np.flatnonzero((values != 0) & (values != 1))
    if bad.size:
        raise ValueError(
            f"row {rows[bad[0]]} (counting from 0) holds {array[bad[0]].as_py()!r}: a label is 0 or 1, "
            "clean or drop the row"
        )
    return pa.array(values.astype(np.float32))


def _as_times(array: pa.Array) -> np.ndarray:
    """int64 or float64 [rows]; dates and timestamps in nanoseconds."""
    if array.null_count:
        raise ValueError(f"{array.null_count} rows have no time to split by: drop or fill them")
    values = array.to_numpy(zero_copy_only=False)
    if values.dtype.kind == "M":
        return values.astype("datetime64[ns]").view(np.int64)
    if values.dtype.kind not in "iuf" or np.isnan(values).any():
        raise ValueError(f"type {array.type} or a NaN in it gives no order: use numbers, dates or timestamps")
    return values


def _part(bounds: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Which of SPLITS each row is in, int64 [rows]."""
    return (keys >= bounds[0]).astype(np.int64) + (keys >= bounds[1])


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

    def __init__(self, path: object, schema: Schema, split: Split) -> None:
        self.schema = schema
        self.split = split
        self.path = path
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
            first_batch: go on from this batch of the pass, counting from 0, as if those before had been read; of these
                only the ones that share a shuffled window with it are.

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
        rows = self.num_rows(split)
        start, stop = rows * rank // world_size, rows * (rank + 1) // world_size
        stop = min(stop, start + num_batches * batch_size)
        window_rows = max(1, (READ_ROWS if shuffle_seed is None else shuffle_rows) // batch_size) * batch_size

        def generate() -> Iterator[Batch]:
            random = np.random.default_rng([shuffle_seed, epoch, rank]) if shuffle_seed is not None else None
            windows, first = divmod(first_batch * batch_size, window_rows)  # to skip, and row to start at in the next
            if random is not None:
                for _ in range(windows):
                    random.permutation(window_rows)  # drawn all the same: the next ones follow from it
            for window in _rechunk(self._encoded(split, start + windows * window_rows, stop), window_rows):
                if random is not None:
                    window = window.take(pa.array(random.permutation(window.num_rows)))
                for offset in range(first, window.num_rows, batch_size):
                    yield self._to_batch(window.slice(offset, batch_size))
                first = 0
            with_rows = -(-(stop - start) // batch_size)
            for _ in range(num_batches - max(with_rows, first_batch)):
                yield self._to_batch(self._no_rows())

        return generate()

    def distinct_ids(self, split: str = "train", rank: int = 0, world_size: int = 1) -> dict[str, np.ndarray]:
        """The ids of each categorical column in `split`, int64 [distinct], ascending. One pass, 8 bytes a distinct id.

        Args:
            rank, world_size: which of how many shares to read, as in `batches`.
        Raises:
            ValueError: as `batches`.
        """
        known = {name: np.empty(0, np.int64) for name in self.schema.categorical}
        new: dict[str, list[np.ndarray]] = {name: [] for name in known}
        rows = self.num_rows(split)
        for batch in self._encoded(split, rows * rank // world_size, rows * (rank + 1) // world_size):
            for name, pending in new.items():
                pending.append(pd.unique(_values(batch.column(name))))
                if sum(map(len, pending)) > max(READ_ROWS, len(known[name])):  # seldom enough: O(n log n) in all
                    known[name] = np.unique(np.concatenate([known[name], *pending]))
                    pending.clear()
        return {name: np.unique(np.concatenate([known[name], *pending])) for name, pending in new.items()}

    def cardinalities(self, split: str = "train") -> dict[str, int]:
        """The number of distinct ids of each categorical column in `split`; see `distinct_ids`."""
        return {name: len(ids) for name, ids in self.distinct_ids(split).items()}

    def _check_columns(self, path: str, available: Sequence[str]) -> None:
        for name in (*self.schema.columns, *self.split.columns):
            if name not in available:
                raise ValueError(f"{path} has no column {name!r}, it has {', '.join(available)}: correct the name")

    def _rows_per_unit(self, split: str) -> np.ndarray:
        """int64 [units]"""
        if split == "all":
            return np.diff(self._starts)
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}: choose one of {', '.join(SPLITS)}, all")
        return self._division[1][SPLITS.index(split)]

    @cached_property
    def _division(self) -> tuple[np.ndarray, np.ndarray]:
        """`Split._bounds`, and how many rows each of SPLITS has in each unit, int64 [3, units]; reads what splits."""
        units = range(len(self._units))
        # The quantiles of a time column need all its values: 8 bytes a row while this runs.
        held = [list(self._unit_keys(i)) for i in units] if self.split.by == "time" and self.split.columns else []
        bounds = self.split._bounds([keys for chunks in held for keys in chunks], int(self._starts[-1]))
        counts = np.zeros((len(SPLITS), len(units)), np.int64)
        for i in units:
            for keys in held[i] if held else self._unit_keys(i):
                counts[:, i] += np.bincount(_part(bounds, keys), minlength=len(SPLITS))
        return bounds, counts

    def _unit_keys(self, index: int) -> Iterator[np.ndarray]:
        """`Split._keys` of a unit's rows in order; nothing is read where the position alone decides."""
        start, end = int(self._starts[index]), int(self._starts[index + 1])
        if not self.split.columns:
            for first in range(start, end, READ_ROWS):
                yield self.split._keys(np.arange(first, min(first + READ_ROWS, end)), ())
            return
        for batch in self._read(self._units[index], self.split.columns):
            yield self._batch_keys(index, start, batch)
            start += batch.num_rows

    def _batch_keys(self, index: int, start: int, batch: pa.RecordBatch) -> np.ndarray:
        """`Split._keys` of the rows that `batch` has from position `start` of the data on."""
        with _naming(self._units[index].path, *self.split.columns):
            columns = [batch.column(name) for name in self.split.columns]
            return self.split._keys(np.arange(start, start + batch.num_rows), columns)

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
                    part = _part(self._division[0], self._batch_keys(index, position, batch))
                    rows = np.flatnonzero(part == SPLITS.index(split))
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
                    encoded[name] = _as_labels(batch.column(name), rows)
                else:
                    encode = encode_ids if name in self.schema.categorical else encode_numeric
                    encoded[name] = encode(batch.column(name))
        return pa.RecordBatch.from_pydict(encoded)

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
        return pa.RecordBatch.from_pydict({name: pa.array([], kind) for name, kind in types.items()})


class ParquetDataset(RowDataset):
    """A parquet file, or all `*.parquet` files under a directory (in order of their paths), as TorchRec batches.

    Row groups are the unit of reading: a rank opens only those that hold its share. Columns may be of different types
    in different files as long as `encode_ids` and `encode_numeric` take them.

    Args:
        path: file or directory, local or a URI of a filesystem that pyarrow knows, such as s3://bucket/clicks.
        schema: the columns to use.
        split: see `Split`.

    Raises:
        FileNotFoundError: `path` does not exist, or is a directory without parquet files.
        ValueError: a file is no complete parquet, or lacks a column.
    """

    def __init__(self, path: Path, schema: Schema, split: Split = Split()) -> None:
        self._filesystem, self._files = _list_files(path, ".parquet")
        super().__init__(path, schema, split)

    def _open(self) -> list[Unit]:
        units = []
        for path in self._files:
            with self._reading(path), pq.ParquetFile(path, filesystem=self._filesystem) as file:
                names, metadata = file.schema_arrow.names, file.metadata
            self._check_columns(path, names)
            first = 0
            for group in range(metadata.num_row_groups):
                units.append(Unit(path, metadata.row_group(group).num_rows, first, group))
                first += units[-1].num_rows
        return units

    def _read(self, unit: Unit, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        options = {"buffer_size": PARQUET_BUFFER_BYTES, "pre_buffer": False}  # else a row group's bytes are held whole
        with self._reading(unit.path), pq.ParquetFile(unit.path, filesystem=self._filesystem, **options) as file:
            yield from file.iter_batches(READ_ROWS, row_groups=[unit.row_group], columns=list(columns))

    @staticmethod
    @contextmanager
    def _reading(path: str) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is truncated or no parquet file ({error}): write it again") from error


class CriteoDataset(RowDataset):
    """Criteo's click logs as TorchRec batches.

    Lines without a header, of tab-separated fields: the label, integers I1..I13, hexadecimal hashes C1..C26. An empty
    field is missing. The hashes are the ids, `int(field, 16)` with the bits of 16 digits read as int64, so there is no
    pass that builds a vocabulary. Names ending in .gz, .bz2 or .zst are decompressed while reading.

    Text has no index: construction reads the files once to count their rows, and a rank parses a file up to the end of
    its share. For many ranks or epochs convert the files to parquet once, with C1..C26 as integers.

    Args:
        paths: one file or several, in the order of their rows, as in `ParquetDataset`.
        split: see `Split`. The Kaggle log is in order of time: `Split("time")` takes its end as the test.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a file is empty or its compressed data ends early; a line has another number of fields, or one that
            is no integer or hexadecimal number, naming file, line and column.
    """

    LABEL = "label"
    NUMERIC = tuple(f"I{i}" for i in range(1, 14))
    CATEGORICAL = tuple(f"C{i}" for i in range(1, 27))
    FIELDS = (LABEL, *NUMERIC, *CATEGORICAL)

    def __init__(self, paths: Path | Sequence[Path], split: Split = Split()) -> None:
        listed = [_list_files(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
        self._filesystems = {path: filesystem for filesystem, found in listed for path in found}
        super().__init__(paths, Schema(self.LABEL, self.CATEGORICAL, self.NUMERIC), split)

    def _open(self) -> list[Unit]:
        self._check_columns("Criteo's format", self.FIELDS)
        return [
            Unit(path, sum(batch.num_rows for batch in self._read_text(path, (self.LABEL,))))
            for path in self._filesystems
        ]

    def _read(self, unit: Unit, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        row = 0
        for batch in self._read_text(unit.path, columns):
            decoded = {name: batch.column(name) for name in columns}
            for name in self.CATEGORICAL:
                if name in decoded:
                    decoded[name] = _hexadecimal(decoded[name], f"{unit.path}: column {name!r}", row)
            yield pa.RecordBatch.from_pydict(decoded)
            row += batch.num_rows

    def _read_text(self, path: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """`columns` of the file: label and I1..I13 int64, C1..C26 as the strings they are."""
        try:
            with self._filesystems[path].open_input_stream(path) as stream:  # decompresses by the name's ending
                yield from pyarrow.csv.open_csv(
                    stream,
                    # one thread: errors then tell the line
                    pyarrow.csv.ReadOptions(column_names=self.FIELDS, block_size=CSV_BLOCK_BYTES, use_threads=False),
                    pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
                    pyarrow.csv.ConvertOptions(
                        column_types={
                            name: pa.string() if name in self.CATEGORICAL else pa.int64() for name in self.FIELDS
                        },
                        null_values=[""],
                        strings_can_be_null=True,
                        include_columns=list(columns),
                    ),
                )
        except (pa.ArrowException, OSError) as error:
            message = re.sub(r"CSV column #(\d+)", lambda found: f"column {self.FIELDS[int(found[1])]!r}", str(error))
            message = re.sub(r"Row #(\d+)", r"line \1", message)
            raise ValueError(f"{path} is not Criteo's {len(self.FIELDS)} tab-separated fields: {message}") from error


class Vocabulary:
    """Dense rows for raw ids: the distinct ids of each feature become 1..n in ascending order, any other id 0.

    Full (uncompressed) tables need it, with `num_embeddings=vocabulary.num_embeddings[feature]`. LMA needs none: its
    tables take raw ids as they are.

    Args:
        ids: for each feature int64 [n], in any order, such as `dataset.distinct_ids("train")`.

    Example:
        vocabulary = Vocabulary(dataset.distinct_ids("train"))
        batch.sparse_features = vocabulary(batch.sparse_features)
    """

    def __init__(self, ids: Mapping[str, np.ndarray]) -> None:
        self.ids = {feature: torch.from_numpy(np.unique(values)) for feature, values in ids.items()}
        self.num_embeddings = {feature: len(known) + 1 for feature, known in self.ids.items()}

    def __call__(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Raw ids -> rows: a new KeyedJaggedTensor of the same keys, lengths and weights; values int64 [ids].

        Raises:
            ValueError: a key has no vocabulary.
        """
        unknown = [key for key in features.keys() if key not in self.ids]
        if unknown:
            raise ValueError(f"no vocabulary for {unknown}, only for {list(self.ids)}: give the ids of every feature")
        ends = features.offset_per_key()
        rows = [
            self._rows(key, features.values()[start:end])
            for key, start, end in zip(features.keys(), ends[:-1], ends[1:], strict=True)
        ]
        return KeyedJaggedTensor(
            keys=features.keys(),
            values=torch.cat(rows),
            weights=features.weights_or_none(),
            lengths=features.lengths(),
        )

    def save(self, path: Path) -> None:
        """Writes the ids of each feature as one safetensors file."""
        save_file(self.ids, path)

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """Reads what `save` wrote."""
        return cls({feature: ids.numpy() for feature, ids in load_file(path).items()})

    def _rows(self, feature: str, values: torch.Tensor) -> torch.Tensor:
        known = self.ids[feature].to(values.device)
        values = to_int64(values, f"feature {feature!r}")
        if not len(known):
            return torch.zeros_like(values)
        found = torch.searchsorted(known, values).clamp(max=len(known) - 1)
        return torch.where(known[found] == values, found + 1, 0)


def _hexadecimal(array: pa.Array, column: str, row: int) -> pa.Array:
    """Hexadecimal strings -> int64 [rows], null where null. `row`: position in the file of the first, for the error."""
    try:
        digits = pc.utf8_lpad(array.fill_null("0"), HEX_DIGITS, "0").cast(pa.binary()).cast(pa.binary(HEX_DIGITS))
        data = binascii.unhexlify(memoryview(digits.buffers()[1])[: HEX_DIGITS * len(digits)])  # refuses all but hex
    except (pa.ArrowInvalid, binascii.Error) as error:
        valid = re.compile(f"[0-9a-fA-F]{{1,{HEX_DIGITS}}}").fullmatch
        bad, value = next((i, v) for i, v in enumerate(array.to_pylist()) if v is not None and not valid(v))
        raise ValueError(
            f"{column}, line {row + bad + 1}: {value!r} is no hexadecimal number of at most {HEX_DIGITS} digits"
        ) from error
    return pa.array(np.frombuffer(data, ">i8").astype(np.int64), mask=array.is_null().to_numpy(zero_copy_only=False))


def _list_files(path: Path, suffix: str = "") -> tuple[pyarrow.fs.FileSystem, list[str]]:
    """The filesystem of `path`, and there the file that it is or those that a directory holds, hidden ones left out."""
    text = os.fspath(path)
    filesystem, root = pyarrow.fs.FileSystem.from_uri(
        text if "://" in text else os.path.abspath(os.path.expanduser(text))
    )
    kind = filesystem.get_file_info(root).type
    if kind == pyarrow.fs.FileType.NotFound:
        raise FileNotFoundError(f"{text} does not exist: give the path of a file or a directory of files")
    if kind == pyarrow.fs.FileType.File:
        return filesystem, [root]
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
    files = sorted(info.path for info in found if info.is_file and info.base_name.endswith(suffix))
    files = [file for file in files if not file.rsplit("/", 1)[-1].startswith((".", "_"))]
    if not files:
        raise FileNotFoundError(f"{text} holds no *{suffix} file")
    return filesystem, files


@contextmanager
def _naming(path: str, *columns: str) -> Iterator[None]:
    """Says in a ValueError which file and columns it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: column {', '.join(map(repr, columns))}: {error}") from error


def _rechunk(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of `rows`; the last may be smaller."""
    held: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        held.append(batch)
        size += batch.num_rows
        if size >= rows:
            joined = pa.concat_batches(held)
            full = size - size % rows
            for start in range(0, full, rows):
                yield joined.slice(start, rows)
            held, size = [joined.slice(full)], size - full
    if size:
        yield pa.concat_batches(held)


def _values(column: pa.Array) -> np.ndarray:
    """All ids of a column that `encode_ids` made, int64 [ids]."""
    return (column.drop_null() if pa.types.is_int64(column.type) else column.flatten()).to_numpy()


def _lengths(column: pa.Array) -> np.ndarray:
    """How many ids each row of such a column has, [rows]."""
    if not pa.types.is_int64(column.type):
        return column.value_lengths().to_numpy()
    return column.is_valid().to_numpy(zero_copy_only=False)
