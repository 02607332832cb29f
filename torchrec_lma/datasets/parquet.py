"""A reader of parquet files."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from torchrec_lma.datasets.listing import columns_of_folders, list_files
from torchrec_lma.datasets.rows import READ_ROWS, RowDataset, Unit
from torchrec_lma.datasets.schema import Path, Schema, Split

ENDINGS = (".parquet", ".parq", ".pq")
BUFFER_BYTES = 1 << 20  # of one column


class ParquetDataset(RowDataset):
    """Parquet files as TorchRec batches.

    Row groups are the unit of reading: a rank opens only those that hold its share. Columns may be of different types
    in different files as long as they are the same ids, such as int32 and a nullable column that became float, or one
    id a row and lists. A column that no file has is looked for in the names of folders, as in `day=2/a.parquet`.

    Args:
        path: file, directory, or pattern such as clicks/day_*.parquet, local or a URI of a filesystem that pyarrow
            knows, such as s3://bucket/clicks. See `list_files` for what of a directory is read, and in which order.
        schema: the columns to use.
        split: see `Split`.

    Raises:
        FileNotFoundError: `path` does not exist, or is a directory without parquet files.
        ValueError: a file is no complete parquet, lacks a column, or has one of other ids than the files before.
    """

    def __init__(self, path: Path, schema: Schema, split: Split = Split()) -> None:  # noqa: B008 (frozen)
        self._filesystem, self.files = list_files(path, ENDINGS)
        super().__init__(path, schema, split)

    def _open(self) -> list[Unit]:
        units = []
        self._of_folders = self._folder_columns()
        for path in self.files:
            with self._reading(path), pq.ParquetFile(path, filesystem=self._filesystem) as file:
                schema, metadata = file.schema_arrow, file.metadata
            for name, value in self._of_folders[path].items():
                if name not in schema.names:
                    schema = schema.append(pa.field(name, value.type))
            self._check_columns(path, schema)
            first = 0
            for group in range(metadata.num_row_groups):
                units.append(Unit(path, metadata.row_group(group).num_rows, first, group))
                first += units[-1].num_rows
        return units

    def _folder_columns(self) -> dict[str, dict[str, pa.Scalar]]:
        """Of each file the columns in the names of its folders: integers where all files' are, else strings."""
        texts = {path: columns_of_folders(path) for path in self.files}
        types = {}
        for name in {name for of_file in texts.values() for name in of_file}:
            values = pa.array([of_file.get(name) for of_file in texts.values()], pa.string())
            try:
                types[name] = values.cast(pa.int64()).type
            except pa.ArrowInvalid:
                types[name] = values.type
        return {
            path: {name: pa.scalar(text, pa.string()).cast(types[name]) for name, text in of_file.items()}
            for path, of_file in texts.items()
        }

    def _read(self, unit: Unit, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        options = {"buffer_size": BUFFER_BYTES, "pre_buffer": False}  # else a row group's bytes are held whole
        with self._reading(unit.path), pq.ParquetFile(unit.path, filesystem=self._filesystem, **options) as file:
            stored = [name for name in columns if name in file.schema_arrow.names]
            if stored:
                batches = file.iter_batches(READ_ROWS, row_groups=[unit.row_group], columns=stored)
            else:  # folders have them all
                starts = range(0, unit.num_rows, READ_ROWS)
                batches = (
                    pa.RecordBatch.from_pydict({"": pa.nulls(min(READ_ROWS, unit.num_rows - start))})
                    for start in starts
                )
            for batch in batches:
                of_folders = {
                    name: pa.repeat(self._of_folders[unit.path][name], batch.num_rows)
                    for name in columns
                    if name not in stored
                }
                yield pa.RecordBatch.from_pydict({name: batch.column(name) for name in stored} | of_folders)

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            hint = "write it again"
            if _is_text(self._filesystem, path):
                hint = "it is text: write a CSV as parquet first, as pandas.read_csv(path).to_parquet(other) does"
            raise ValueError(f"{path} is truncated or no parquet file ({error}): {hint}") from error


def _is_text(filesystem: pyarrow.fs.FileSystem, path: str) -> bool:
    """Whether a file begins as text does."""
    try:
        with filesystem.open_input_file(path) as file:
            head = file.read(1000)
    except OSError:
        return False
    return bool(head) and not re.search(rb"[\x00-\x08\x0e-\x1f]", head) and head[:4] != b"PAR1"
