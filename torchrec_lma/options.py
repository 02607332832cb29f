"""Command-line options for data, tables and allocations; `torchrec-lma` and the DLRM example take the same ones."""

import argparse
from dataclasses import replace

from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType

from torchrec_lma.allocation import AllocationBuilder, ContextMinHash, RowsMinHash, Source
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


def add_data_options(
    parser: argparse.ArgumentParser, default: str | None = MOVIELENS, needs_label: bool = True
) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        default=default,
        metavar="WHAT",
        help=f"{MOVIELENS} (fetched with pip and cached), a parquet file or a directory of them, or with "
        f"--format criteo a TSV file, with --format npy a directory of COLUMN.npy (default: {default or 'no data'})",
    )
    group.add_argument(
        "--format", choices=("parquet", "criteo", "npy"), default="parquet", help="of --data when it is a path"
    )
    group.add_argument(
        "--label",
        metavar="COLUMN",
        help="parquet, npy: the 0/1 column to predict" + ("" if needs_label else ", which is not needed and not read"),
    )
    group.add_argument("--categorical", nargs="+", default=[], metavar="COLUMN", help="parquet, npy: columns of ids")
    group.add_argument("--numeric", nargs="+", default=[], metavar="COLUMN", help="parquet, npy: columns of numbers")
    group.add_argument(
        "--split",
        metavar="HOW",
        help="time:COLUMN puts the last rows by that column in the test, hash draws rows at random, time follows the "
        "order of the data (default: hash)",
    )
    group.add_argument("--validation-fraction", type=float, default=0.1, metavar="SHARE")
    group.add_argument("--test-fraction", type=float, default=0.1, metavar="SHARE")


def open_dataset(args: argparse.Namespace, needs_label: bool = True) -> RowDataset:
    """The dataset of `add_data_options`; unless it `needs_label`, labels are not read and are NaN in its batches.

    Raises ValueError or FileNotFoundError naming what is wrong.
    """
    dataset = _open_dataset(args, needs_label)
    if not needs_label:
        dataset.schema = replace(dataset.schema, label=None)
    return dataset


def _open_dataset(args: argparse.Namespace, needs_label: bool) -> RowDataset:
    how = args.split or "hash"
    kind, _, column = how.partition(":")
    if kind not in ("time", "hash"):
        raise ValueError(f"--split {how!r} is unknown; give time:COLUMN, time or hash")
    split = Split(kind, (column,) if column else (), args.validation_fraction, args.test_fraction)
    if args.data == MOVIELENS:
        return ParquetDataset(movielens.prepare(), movielens.SCHEMA, split)
    if args.format == "criteo":
        return CriteoDataset(args.data, split)
    if (needs_label and not args.label) or not args.categorical:
        needed = "--label COLUMN and --categorical COLUMN ..." if needs_label else "--categorical COLUMN ..."
        raise ValueError(f"--data {args.data} is {args.format}, which needs {needed}")
    kind_of_dataset = NumpyDataset if args.format == "npy" else ParquetDataset
    return kind_of_dataset(args.data, Schema(args.label, tuple(args.categorical), tuple(args.numeric)), split)


def add_table_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tables")
    group.add_argument("--dim", type=int, default=32, help="embedding_dim of every table (default: %(default)s)")
    group.add_argument(
        "--num-embeddings",
        type=int,
        metavar="ROWS",
        help="rows of each full table, which is what compression is measured against. Ids are then taken as they are: "
        "full tables take them modulo ROWS, LMA tables raw. Without it the distinct ids of the training rows are a "
        "vocabulary, which takes one more pass over them",
    )
    group.add_argument(
        "--data-type",
        choices=[data_type.name for data_type in WEIGHT_TYPES],
        help="of the weights (default: FP32 of full tables, FP16 of LMA tables, which stand for full ones of FP32)",
    )
    group.add_argument("--pooling", choices=("SUM", "MEAN"), default="SUM", help="of features with several ids a row")


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


def make_tables(args: argparse.Namespace, num_embeddings: dict[str, int]) -> list[EmbeddingBagConfig]:
    """One table for each categorical column, named `t_<column>`. Raises ValueError if one would have no row."""
    empty = [column for column, rows in num_embeddings.items() if rows < 1]
    if empty:
        raise ValueError(
            f"the tables of columns {', '.join(empty)} would have no row; give --num-embeddings of at least 1"
        )
    # LMA tables stand for full tables of FP32, whatever their own weights are.
    data_type = args.data_type if getattr(args, "table", "lma") == "full" and args.data_type is not None else "FP32"
    # TorchRec's default, +-1/sqrt(rows) of each table by itself, starts all columns of a table of 3 rows at +-0.58. On
    # MovieLens that costs 0.003 of AUC, full tables as LMA's whole ones. All kinds start alike here.
    bound = (len(num_embeddings) / sum(num_embeddings.values())) ** 0.5
    return [
        EmbeddingBagConfig(
            name=f"t_{column}",
            num_embeddings=rows,
            embedding_dim=args.dim,
            feature_names=[column],
            pooling=PoolingType[args.pooling],
            data_type=DataType[data_type],
            weight_init_min=-bound,
            weight_init_max=bound,
        )
        for column, rows in num_embeddings.items()
    ]


def add_lma_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("LMA")
    budget = group.add_mutually_exclusive_group()
    budget.add_argument("--compression", type=float, metavar="FACTOR", help="full size over budget (default: 16)")
    budget.add_argument("--memory-bytes", type=int, metavar="BYTES", help="the budget itself")
    group.add_argument(
        "--skew",
        type=float,
        default=LMAConfig.skew,
        help="0 gives all ids as many columns, more gives more to the frequent ones (default: %(default)s)",
    )
    group.add_argument(
        "--widths",
        type=int,
        nargs="+",
        metavar="COLUMNS",
        help="of the levels, which add up to --dim (default: chosen)",
    )
    group.add_argument(
        "--source",
        choices=SOURCES,
        default="none",
        help="which ids without a row of their own share one: any, those in the same rows, or those that the same ids "
        "stand beside (default: %(default)s)",
    )
    group.add_argument(
        "--raw-ids",
        action="store_true",
        help="take any 64-bit ids, without a vocabulary: for ids that come and go",
    )


def make_config(args: argparse.Namespace) -> LMAConfig:
    compression = args.compression
    if compression is None and args.memory_bytes is None:
        compression = 16
    return LMAConfig(
        compression,
        args.memory_bytes,
        tuple(args.widths) if args.widths else None,
        args.data_type,
        args.skew,
        raw_ids=args.raw_ids or args.num_embeddings is not None,
    )


def make_builder(args: argparse.Namespace, tables: list[EmbeddingBagConfig]) -> AllocationBuilder:
    return AllocationBuilder(tables, make_config(args), SOURCES[args.source])
