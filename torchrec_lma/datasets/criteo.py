"""A reader of Criteo's click logs."""

import binascii
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from torchrec_lma.datasets.listing import list_files
from torchrec_lma.datasets.rows import RowDataset, Unit
from torchrec_lma.datasets.schema import Path, Schema, Split

CSV_BLOCK_BYTES = 8 << 20
HEAD_BYTES = 1 << 16  # more than a line has
HEX_DIGITS = 16  # of a 64-bit id


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
        needs_label: without it labels are not read and may be left out, as in the Kaggle log's test.txt: files of 39
            fields then begin with I1.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a path is given twice; a file is empty or its compressed data ends early; a line has another number
            of fields, or one that is no integer or hexadecimal number, naming file, line and column.
    """

    LABEL = "label"
    NUMERIC = tuple(f"I{i}" for i in range(1, 14))
    CATEGORICAL = tuple(f"C{i}" for i in range(1, 27))
    FIELDS = (LABEL, *NUMERIC, *CATEGORICAL)

    def __init__(
        self,
        paths: Path | Sequence[Path],
        split: Split = Split(),  # noqa: B008 (frozen)
        needs_label: bool = True,
    ) -> None:
        listed = [list_files(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
        self.files = [path for _, found in listed for path in found]
        self._filesystems = {path: filesystem for filesystem, found in listed for path in found}
        if len(self._filesystems) < len(self.files):
            raise ValueError(f"{paths} has a file twice: give each once")
        super().__init__(paths, Schema(self.LABEL if needs_label else None, self.CATEGORICAL, self.NUMERIC), split)

    def _open(self) -> list[Unit]:
        types = [pa.int64()] * len(self.FIELDS)
        self._check_columns("Criteo's format", pa.schema(list(zip(self.FIELDS, types, strict=True))))
        self._fields = {path: self._fields_of(path) for path in self.files}
        last = self.FIELDS[-1:]
        return [Unit(path, sum(batch.num_rows for batch in self._read_text(path, last))) for path in self.files]

    def _fields_of(self, path: str) -> tuple[str, ...]:
        """Those that the lines of a file have, by the first one."""
        with self._reading(path), self._filesystems[path].open_input_stream(path) as stream:
            head = stream.read(HEAD_BYTES)
        tabs = head.split(b"\n", 1)[0].count(b"\t")
        return self.FIELDS[1:] if self.schema.label is None and tabs == len(self.FIELDS) - 2 else self.FIELDS

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
        fields = self._fields[path]
        with self._reading(path), self._filesystems[path].open_input_stream(path) as stream:
            yield from pyarrow.csv.open_csv(
                stream,  # decompresses by the name's ending
                # one thread: errors then tell the line
                pyarrow.csv.ReadOptions(column_names=fields, block_size=CSV_BLOCK_BYTES, use_threads=False),
                pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
                pyarrow.csv.ConvertOptions(
                    column_types={name: pa.string() if name in self.CATEGORICAL else pa.int64() for name in fields},
                    null_values=[""],
                    strings_can_be_null=True,
                    include_columns=list(columns),
                ),
            )

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            fields = self._fields[path] if path in getattr(self, "_fields", {}) else self.FIELDS
            message = re.sub(r"CSV column #(\d+)", lambda found: f"column {fields[int(found[1])]!r}", str(error))
            message = re.sub(r"Row #(\d+)", r"line \1", message)
            if "got 39" in message:
                message += "; lines without a label can be predicted, not trained on"
            raise ValueError(f"{path} is not Criteo's {len(fields)} tab-separated fields: {message}") from error


def _hexadecimal(array: pa.Array, column: str, row: int) -> pa.Array:
    """Hexadecimal strings -> int64 [rows], null where null. `row`: position in the file of the first, for the error."""
    try:
        digits = pc.utf8_lpad(array.fill_null("0"), HEX_DIGITS, "0").cast(pa.binary()).cast(pa.binary(HEX_DIGITS))
        data = binascii.unhexlify(memoryview(digits.buffers()[1])[: HEX_DIGITS * len(digits)])  # refuses all but hex
    except (pa.ArrowInvalid, binascii.Error) as error:
        valid = re.compile(f"[0-9a-fA-F]{{1,{HEX_DIGITS}}}").fullmatch
        bad, value = next((i, v) for i, v in enumerate(array.to_pylist()) if v is not None and not valid(v))
        raise ValueError(
            f"{column}, line {row + bad + 1}: {value!r} is not a hexadecimal number of at most {HEX_DIGITS} digits"
        ) from error
    return pa.array(np.frombuffer(data, ">i8").astype(np.int64), mask=array.is_null().to_numpy(zero_copy_only=False))
