"""Which columns of a table are used, and how its rows are divided."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from torchrec_lma.datasets.columns import as_times, encode_ids

SPLITS = ("train", "validation", "test")

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

    def keys(self, positions: np.ndarray, columns: Sequence[pa.Array]) -> np.ndarray:
        """What decides the split of each row, [rows]: its time (int64 or float64), or a hash (uint64).

        `positions`: int64 [rows], where in the data the rows are. `columns`: theirs of `self.columns`.
        """
        if self.by == "time":
            return as_times(columns[0]) if columns else positions
        key = np.zeros(len(positions), np.uint64) if columns else positions.view(np.uint64)
        for ids in map(encode_ids, columns):
            if not pa.types.is_int64(ids.type):
                raise ValueError("a column of lists cannot split: name columns with one value a row")
            key = pd.util.hash_array(key ^ ids.fill_null(0).to_numpy().view(np.uint64))
        seed = pd.util.hash_array(np.array([self.seed], np.int64).view(np.uint64))
        return pd.util.hash_array(pd.util.hash_array(key) ^ seed)

    def bounds(self, keys: Sequence[np.ndarray], num_rows: int) -> np.ndarray:
        """The keys that start "validation" and "test", [2]. `keys`: of all rows; only a time column needs them."""
        later = np.array([self.validation_fraction + self.test_fraction, self.test_fraction])
        if self.by == "hash":
            return np.array([min(int((1 - fraction) * 2.0**64), 2**64 - 1) for fraction in later], np.uint64)
        first = num_rows - np.clip(np.round(later * num_rows).astype(np.int64), 1, num_rows)
        return np.partition(np.concatenate(keys), first)[first] if self.columns and num_rows else first


def part(bounds: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Which of SPLITS each row is in, int64 [rows]."""
    return (keys >= bounds[0]).astype(np.int64) + (keys >= bounds[1])
