"""A reader of NumPy columns: a directory with one `<column>.npy` for each column."""

import os
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from torchrec_lma.datasets.rows import READ_ROWS, RowDataset, Unit
from torchrec_lma.datasets.schema import Path, Schema, Split


class NumpyDataset(RowDataset):
    """A directory of `<column>.npy` files, memory-mapped, as TorchRec batches.

    Args:
        path: local directory. Each column of the schema and of the split is an array [rows] or [rows, 1], or for bags
            of n ids [rows, n], of a type that `encode_ids` and `encode_numeric` take.
        schema: the columns to use.
        split: see `Split`.

    Raises:
        FileNotFoundError: there is no such directory, or no file for a column.
        ValueError: a file is no whole .npy of at most two dimensions, holds values that Arrow does not take
            (Python objects, complex or byte-swapped numbers, ...), or has another number of rows than the others.
    """

    def __init__(self, path: Path, schema: Schema, split: Split = Split()) -> None:  # noqa: B008 (frozen)
        super().__init__(os.fspath(path), schema, split)

    def _open(self) -> list[Unit]:
        folder = str(self.path)
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{folder} is not a directory: give one that holds <column>.npy files")
        names = dict.fromkeys((*self.schema.columns, *self.split.columns))
        rows = {name: len(self._column(name)) for name in names}
        if len(set(rows.values())) > 1:
            raise ValueError(f"the columns in {folder} have different numbers of rows: {rows}; write them again")
        types = [(name, _to_arrow(self._column(name)[:1]).type) for name in names]
        self._check_columns(folder, pa.schema(types))
        return [Unit(folder, rows[self.schema.columns[0]])]

    def _read(self, unit: Unit, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        arrays = {name: self._column(name) for name in columns}
        for start in range(0, unit.num_rows, READ_ROWS):
            yield pa.RecordBatch.from_pydict(
                {name: _to_arrow(array[start : start + READ_ROWS]) for name, array in arrays.items()}
            )

    def _column(self, name: str) -> np.ndarray:
        path = os.path.join(str(self.path), f"{name}.npy")
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} does not exist: column {name!r} needs that file")
        try:
            array = np.load(path, mmap_mode="r")
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{path} is truncated or no .npy array of numbers or strings ({error})") from error
        while isinstance(array, np.ndarray) and array.ndim > 1 and array.shape[-1] == 1:
            array = array[..., 0]  # a column of a matrix
        if not isinstance(array, np.ndarray) or array.ndim not in (1, 2):
            raise ValueError(f"{path} has shape {getattr(array, 'shape', None)}: a column is [rows] or [rows, ids]")
        try:
            _to_arrow(array[:1])
        except pa.ArrowException as error:
            raise ValueError(
                f"{path} has dtype {array.dtype} and shape {array.shape}, which cannot be read ({error}): write native "
                "integers, floats or strings, at least one a row"
            ) from error
        return array


def _to_arrow(array: np.ndarray) -> pa.Array:
    """[rows] -> an array of values; [rows, n] -> an array of lists of n."""
    values = pa.array(np.asarray(array).reshape(-1))
    return values if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(values, array.shape[1])
