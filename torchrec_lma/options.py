"""Command-line options for data, tables and allocations; `torchrec-lma` and the DLRM example take the same ones."""

import argparse
import math
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig

from torchrec_lma.allocation import Allocation, AllocationBuilder, ContextMinHash, RowsMinHash, Source
from torchrec_lma.config import WEIGHT_TYPES, LMAConfig
from torchrec_lma.datasets import (
    CriteoDataset,
    NumpyDataset,
    ParquetDataset,
    RowDataset,
    Schema,
    Split,
    Vocabulary,
    movielens,
)

MOVIELENS = "movielens-100k"
SOURCES: dict[str, Source | None] = {
    "none": None,
    RowsMinHash.NAME: RowsMinHash(),
    ContextMinHash.NAME: ContextMinHash(),
}


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def positive_number(text: str) -> float:
    """An argument that is a finite number above 0."""
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} must be a finite number above 0")
    return value


def add_data_options(
    parser: argparse.ArgumentParser, default: str | None = MOVIELENS, needs_label: bool = True
) -> None:
    group = parser.add_argument_group("data (docs/data.md)")
    group.add_argument(
        "--data",
        default=default,
        metavar="WHAT",
        help=f"A parquet file, a folder of them, which are read in the natural order of their names, or a quoted "
        f"pattern such as 'clicks/day_*'; or {MOVIELENS}, which pip fetches once (default: {default or 'no data'}).",
    )
    group.add_argument(
        "--format",
        choices=("parquet", "criteo", "npy"),
        default="parquet",
        help="What --data holds: parquet files, Criteo's TSV files, or a folder of one COLUMN.npy for each column "
        "(default: %(default)s).",
    )
    unused = "" if needs_label else " It is not read here."
    group.add_argument("--label", metavar="COLUMN", help=f"The column of 0 and 1 to predict.{unused}")
    group.add_argument("--categorical", nargs="+", default=[], metavar="COLUMN", help="The columns of ids.")
    group.add_argument("--numeric", nargs="+", default=[], metavar="COLUMN", help="The columns of numbers.")
    group.add_argument(
        "--split",
        metavar="HOW",
        help="Which tenth of the rows is for validation and which for the test: time:COLUMN takes the last ones by "
        "that column, time the last ones in the order of the data, hash draws them at random (default: hash).",
    )


def open_dataset(args: argparse.Namespace, needs_label: bool = True) -> RowDataset:
    """The dataset of `add_data_options`; unless it `needs_label`, labels need not be there and are NaN in its batches.

    Says on stderr which files are read, in which order. Raises ValueError or FileNotFoundError naming what is wrong.
    """
    how = args.split or "hash"
    by, _, column = how.partition(":")
    if by not in ("time", "hash"):
        raise ValueError(f"--split {how!r} is unknown; give time:COLUMN, time or hash")
    split = Split(by, (column,) if column else ())
    if args.data == MOVIELENS:
        schema = movielens.SCHEMA if needs_label else replace(movielens.SCHEMA, label=None)
        return ParquetDataset(movielens.prepare(), schema, split)
    if args.format == "criteo":
        return _said(CriteoDataset(args.data, split, needs_label))
    if (needs_label and not args.label) or not args.categorical:
        needed = "--label COLUMN and --categorical COLUMN ..." if needs_label else "--categorical COLUMN ..."
        raise ValueError(f"--data {args.data} is {args.format}, which needs {needed}")
    schema = Schema(args.label if needs_label else None, tuple(args.categorical), tuple(args.numeric))
    return _said((NumpyDataset if args.format == "npy" else ParquetDataset)(args.data, schema, split))


def _said(dataset: RowDataset) -> RowDataset:
    """The dataset, after its files are said where there are several."""
    names = [os.path.basename(path) for path in dataset.files]
    if len(set(names)) < len(names):  # day=1/part-0, day=2/part-0
        common = len(os.path.commonpath(dataset.files)) + 1
        names = [path[common:] for path in dataset.files]
    if len(names) > 1 and os.environ.get("RANK", "0") == "0":
        shown = names if len(names) <= 12 else [*names[:6], "...", *names[-5:]]
        print(f"data: {len(names)} files in this order: {', '.join(shown)}", file=sys.stderr, flush=True)
    return dataset


def add_table_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tables")
    group.add_argument(
        "--dim", type=positive, default=32, help="The embedding_dim of every table (default: %(default)s)."
    )
    group.add_argument(
        "--num-embeddings",
        type=positive,
        metavar="ROWS",
        help="Rows of each full table, against which compression is measured. Ids are then taken as they are: full "
        "tables take them modulo ROWS, LMA tables raw. Without it the distinct ids of the training rows are a "
        "vocabulary, which takes another pass over them.",
    )
    group.add_argument(
        "--data-type",
        choices=[data_type.name for data_type in WEIGHT_TYPES],
        help="The type of the weights (default: FP32 for full tables, FP16 for LMA tables, which stand for full tables "
        "of FP32).",
    )


def make_vocabulary(args: argparse.Namespace, dataset: RowDataset) -> Vocabulary | None:
    """Rows for the ids of the training rows, in one pass over them; None where tables take ids as they are.

    What it gives for an id of another row, 0, is no id of the training rows: full and LMA tables know it as little.
    """
    if args.num_embeddings is not None or args.raw_ids:
        return None
    return Vocabulary(dataset.distinct_ids())


def count_embeddings(args: argparse.Namespace, dataset: RowDataset) -> dict[str, int]:
    """Rows of each column's full table: --num-embeddings, or as many as the vocabulary of the training rows gives."""
    if args.num_embeddings is not None:
        return dict.fromkeys(dataset.schema.categorical, args.num_embeddings)
    return {column: ids + 1 for column, ids in dataset.cardinalities().items()}


def table_names(columns: Iterable[str]) -> dict[str, str]:
    """Of each column `t_<column>`, what torch does not take in a module's name replaced by underscores."""
    names = {column: "t_" + re.sub(r"\W", "_", column) for column in columns}
    for column, name in names.items():
        alike = [other for other, of_other in names.items() if of_other == name]
        if len(alike) > 1:
            raise ValueError(f"columns {alike} would both have a table {name!r}: rename one, {column!r} say")
    return names


def make_tables(args: argparse.Namespace, num_embeddings: dict[str, int]) -> list[EmbeddingBagConfig]:
    """One table for each categorical column, see `table_names`. Raises ValueError if one would have no row."""
    names = table_names(num_embeddings)
    empty = [column for column, rows in num_embeddings.items() if rows < 1]
    if empty:
        raise ValueError(
            f"the tables of columns {', '.join(empty)} would have no row; give --num-embeddings of at least 1"
        )
    # LMA tables stand for full tables of FP32, whatever their own weights are.
    data_type = args.data_type if getattr(args, "table", "lma") == "full" and args.data_type is not None else "FP32"
    # TorchRec's default, +-1/sqrt(rows) of each table by itself, starts all columns of a table of 3 rows at +-0.58. On
    # MovieLens that costs full tables 0.003 of AUC. All tables start alike here.
    bound = (len(num_embeddings) / sum(num_embeddings.values())) ** 0.5
    return [
        EmbeddingBagConfig(
            name=names[column],
            num_embeddings=rows,
            embedding_dim=args.dim,
            feature_names=[column],
            data_type=DataType[data_type],
            weight_init_min=-bound,
            weight_init_max=bound,
        )
        for column, rows in num_embeddings.items()
    ]


def add_lma_options(parser: argparse.ArgumentParser) -> Any:
    """Returns their group."""
    group = parser.add_argument_group("allocation (docs/allocations.md)")
    budget = group.add_mutually_exclusive_group()
    budget.add_argument(
        "--compression", type=float, metavar="FACTOR", help="Size of the full tables over the budget (default: 16)."
    )
    budget.add_argument("--memory-bytes", type=positive, metavar="BYTES", help="The budget itself.")
    group.add_argument(
        "--source",
        choices=SOURCES,
        default="none",
        help="Which ids without a row of their own share one: any, those that are in the same rows of the data, or "
        "those that occur beside the same ids (default: %(default)s).",
    )
    group.add_argument(
        "--raw-ids",
        action="store_true",
        help="Take any 64-bit ids, without a vocabulary: for ids that come and go.",
    )
    return group


def make_config(args: argparse.Namespace) -> LMAConfig:
    compression = args.compression
    if compression is None and args.memory_bytes is None:
        compression = 16
    raw_ids = args.raw_ids or args.num_embeddings is not None
    return LMAConfig(compression, args.memory_bytes, data_type=args.data_type, raw_ids=raw_ids)


def make_builder(args: argparse.Namespace, tables: list[EmbeddingBagConfig]) -> AllocationBuilder:
    return AllocationBuilder(tables, make_config(args), SOURCES[args.source])


def vocabulary_path(allocation: Path) -> Path:
    """Where the vocabulary of an allocation is."""
    return allocation.with_suffix(".vocabulary.safetensors")


def save_allocation(
    path: Path, allocation: Allocation, dataset: RowDataset, vocabulary: Vocabulary | None
) -> Allocation:
    """Writes an allocation, and beside it the vocabulary whose rows it allocates; returns it as it was written."""
    notes: dict[str, Any] = {"id_types": dataset.id_types}
    if vocabulary is not None:
        vocabulary.save(vocabulary_path(path))
        notes["vocabulary"] = vocabulary.fingerprint
    allocation = replace(allocation, provenance=allocation.provenance | notes)
    allocation.save(path)
    return allocation


def load_allocation(path: Path, dataset: RowDataset) -> tuple[Allocation, Vocabulary | None]:
    """An allocation for other rows of the same columns, and the vocabulary that it was made with, if it has one.

    Raises ValueError or FileNotFoundError where the columns are not those, or the vocabulary is not the one.
    """
    allocation = Allocation.load(path)
    names = table_names(dataset.schema.categorical)
    if {*names.values()} != {table.name for table in allocation.tables}:
        raise ValueError(
            f"{path} was made for tables {sorted(table.name for table in allocation.tables)}, the columns here give "
            f"{sorted(names.values())}: give the columns that it was made from"
        )
    check_id_types(allocation.provenance.get("id_types", {}), dataset.id_types, path)
    return allocation, load_vocabulary(path, allocation)


def load_vocabulary(path: Path, allocation: Allocation) -> Vocabulary | None:
    """The vocabulary whose rows an allocation allocates; None if it is of ids as they are, or does not say.

    Args:
        path: that it was read from.
    Raises:
        ValueError, FileNotFoundError: the vocabulary is another one, or not there.
    """
    expected = allocation.provenance.get("vocabulary")
    if expected is None:
        return None
    beside = vocabulary_path(path)
    if not beside.is_file():
        raise FileNotFoundError(f"{path} needs {beside}, which was written with it: keep the two together")
    vocabulary = Vocabulary.load(beside)
    if vocabulary.fingerprint != expected:
        raise ValueError(f"{beside} is not the vocabulary that {path} was made with: build them again")
    return vocabulary


def check_id_types(then: dict[str, str], now: dict[str, str], where: object) -> None:
    """Raises ValueError where a column holds other ids than it did."""
    for column, id_type in then.items():
        if now.get(column, id_type) != id_type:
            raise ValueError(
                f"column {column!r} had {id_type} in the data of {where} and has {now[column]} now, in which equal ids "
                "are not equal: give it in the type that it had"
            )
