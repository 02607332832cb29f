"""Command-line options for data, tables and allocations; `torchrec-lma` and the DLRM example take the same ones."""

import argparse
from dataclasses import replace

from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType

from torchrec_lma.allocation import AllocationBuilder, ContextMinHash, RowsMinHash, Source
from torchrec_lma.config import LMAConfig
from torchrec_lma.datasets import CriteoDataset, NumpyDataset, ParquetDataset, RowDataset, Schema, Split, movielens

MOVIELENS = "movielens-100k"
SOURCES = (RowsMinHash.NAME, ContextMinHash.NAME)


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
        help="rows of each full table, which is what compression is measured against; without it the distinct ids of "
        "the training rows are counted, in one more pass over them",
    )
    group.add_argument("--data-type", choices=("FP32", "FP16", "BF16"), default="FP32", help="of the weights")
    group.add_argument("--pooling", choices=("SUM", "MEAN"), default="SUM", help="of features with several ids a row")


def count_embeddings(args: argparse.Namespace, dataset: RowDataset) -> dict[str, int]:
    """Rows of each column's full table: --num-embeddings, or the distinct ids of the training rows."""
    if args.num_embeddings is not None:
        return dict.fromkeys(dataset.schema.categorical, args.num_embeddings)
    return dataset.cardinalities()


def make_tables(args: argparse.Namespace, num_embeddings: dict[str, int]) -> list[EmbeddingBagConfig]:
    """One table for each categorical column, named `t_<column>`. Raises ValueError if one would have no row."""
    empty = [column for column, rows in num_embeddings.items() if rows < 1]
    if empty:
        raise ValueError(
            f"the tables of columns {', '.join(empty)} would have no row: leave columns without an id in the training "
            "rows out of --categorical, or give --num-embeddings of at least 1"
        )
    return [
        EmbeddingBagConfig(
            name=f"t_{column}",
            num_embeddings=rows,
            embedding_dim=args.dim,
            feature_names=[column],
            pooling=PoolingType[args.pooling],
            data_type=DataType[args.data_type],
        )
        for column, rows in num_embeddings.items()
    ]


def add_lma_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("LMA")
    budget = group.add_mutually_exclusive_group()
    budget.add_argument("--compression", type=float, metavar="FACTOR", help="full size over budget (default: 16)")
    budget.add_argument("--memory-bytes", type=int, metavar="BYTES", help="the budget itself")
    group.add_argument("--chunk-dim", type=int, default=4, help="columns of a chunk (default: %(default)s)")
    group.add_argument("--hash-seed", type=int, default=0, help="of the addresses (default: %(default)s)")
    group.add_argument(
        "--source",
        choices=(*SOURCES, "none"),
        default=RowsMinHash.NAME,
        help="what makes ids similar: the rows they are in, or the ids of other columns they occur with; none hashes "
        "every id that is not dedicated (default: %(default)s)",
    )
    group.add_argument(
        "--source-of",
        nargs="+",
        default=[],
        metavar="COLUMN=SOURCE",
        help="another --source for some columns, for example item=context-minhash day=none",
    )
    group.add_argument(
        "--context",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="columns that context-minhash looks at (default: all others)",
    )
    group.add_argument("--weighted", action="store_true", help="count how often: weighted Jaccard similarity")
    group.add_argument("--power", type=int, default=RowsMinHash.power, help="of the similarity (default: %(default)s)")
    group.add_argument(
        "--num-values", type=int, default=RowsMinHash.num_values, help="stored per signature (default: %(default)s)"
    )
    group.add_argument(
        "--min-support",
        type=int,
        default=RowsMinHash.min_support,
        help="sampled rows an id needs for a signature (default: %(default)s)",
    )
    group.add_argument(
        "--max-rows", type=int, default=RowsMinHash.max_rows, help="rows to sample at most (default: %(default)s)"
    )
    group.add_argument("--within-table", action="store_true", help="share by signature within a table only")
    group.add_argument(
        "--max-ids",
        type=int,
        default=AllocationBuilder.MAX_IDS,
        help="distinct ids to count exactly; with more, counts are estimates (default: %(default)s)",
    )
    group.add_argument(
        "--dedicated-fraction",
        type=float,
        default=AllocationBuilder.DEDICATED_FRACTION,
        help="share of the budget for rows of the most frequent ids (default: %(default)s)",
    )
    group.add_argument(
        "--signature-fraction",
        type=float,
        default=AllocationBuilder.SIGNATURE_FRACTION,
        help="share of the budget for signatures (default: %(default)s)",
    )


def make_config(args: argparse.Namespace) -> LMAConfig:
    compression = args.compression
    if compression is None and args.memory_bytes is None:
        compression = 16
    return LMAConfig(compression, args.memory_bytes, args.chunk_dim, args.hash_seed)


def make_builder(args: argparse.Namespace, tables: list[EmbeddingBagConfig]) -> AllocationBuilder:
    names = {table.name: args.source for table in tables}
    for choice in args.source_of:
        column, _, name = choice.partition("=")
        if f"t_{column}" not in names or name not in (*SOURCES, "none"):
            raise ValueError(
                f"--source-of {choice!r} is not COLUMN=SOURCE with a column of {[t.name[2:] for t in tables]} and a "
                f"source of {[*SOURCES, 'none']}"
            )
        names[f"t_{column}"] = name
    settings = (args.power, args.num_values, args.min_support, args.max_rows, args.within_table, args.weighted)
    unknown = [column for column in args.context if f"t_{column}" not in names]
    if unknown:
        raise ValueError(f"--context {' '.join(unknown)}: no such column; choose from {[t.name[2:] for t in tables]}")
    if args.context and ContextMinHash.NAME not in names.values():
        raise ValueError(
            f"--context {' '.join(args.context)} is for columns whose source is {ContextMinHash.NAME}, and there are "
            f"none: give --source {ContextMinHash.NAME}, or --source-of COLUMN={ContextMinHash.NAME}, or no --context"
        )
    context = tuple(f"t_{column}" for column in args.context)
    sources: dict[str, Source | None] = {
        RowsMinHash.NAME: RowsMinHash(*settings),
        ContextMinHash.NAME: ContextMinHash(*settings, fields=context),
    }
    return AllocationBuilder(
        tables,
        make_config(args),
        {table: sources.get(name) for table, name in names.items()},
        args.dedicated_fraction,
        args.signature_fraction,
        args.max_ids,
    )
