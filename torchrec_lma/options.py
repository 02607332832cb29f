"""Command-line options for data, tables and allocations; `torchrec-lma` and the DLRM example take the same ones."""

import argparse
from pathlib import Path

from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType

from torchrec_lma.allocation import AllocationBuilder, RowsMinHash
from torchrec_lma.config import LMAConfig
from torchrec_lma.datasets import CriteoDataset, ParquetDataset, RowDataset, Schema, Split, movielens

MOVIELENS = "movielens-100k"


def add_data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        default=MOVIELENS,
        metavar="WHAT",
        help=f"{MOVIELENS} (fetched with pip and cached), a parquet file or a directory of them, or with "
        "--format criteo a TSV file (default: %(default)s)",
    )
    group.add_argument("--format", choices=("parquet", "criteo"), default="parquet", help="of --data when it is a path")
    group.add_argument("--label", metavar="COLUMN", help="parquet: the 0/1 column to predict")
    group.add_argument("--categorical", nargs="+", default=[], metavar="COLUMN", help="parquet: columns of ids")
    group.add_argument("--numeric", nargs="+", default=[], metavar="COLUMN", help="parquet: columns of numbers")
    group.add_argument(
        "--split",
        metavar="HOW",
        help="time:COLUMN puts the last rows by that column in the test, hash draws rows at random, time follows the "
        "order of the data (default: hash)",
    )
    group.add_argument("--validation-fraction", type=float, default=0.1, metavar="SHARE")
    group.add_argument("--test-fraction", type=float, default=0.1, metavar="SHARE")


def open_dataset(args: argparse.Namespace) -> RowDataset:
    """The dataset of `add_data_options`. Raises ValueError or FileNotFoundError naming what is wrong."""
    how = args.split or "hash"
    kind, _, column = how.partition(":")
    if kind not in ("time", "hash"):
        raise ValueError(f"--split {how!r} is unknown; give time:COLUMN, time or hash")
    split = Split(kind, (column,) if column else (), args.validation_fraction, args.test_fraction)
    if args.data == MOVIELENS:
        return ParquetDataset(movielens.prepare(), movielens.SCHEMA, split)
    if args.format == "criteo":
        return CriteoDataset(Path(args.data), split)
    if not args.label or not args.categorical:
        raise ValueError(f"--data {args.data} is parquet, which needs --label COLUMN and --categorical COLUMN ...")
    return ParquetDataset(args.data, Schema(args.label, tuple(args.categorical), tuple(args.numeric)), split)


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
    """One table for each categorical column, named `t_<column>`."""
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
        choices=("rows-minhash", "none"),
        default="rows-minhash",
        help="what makes ids similar; none hashes every id that is not dedicated (default: %(default)s)",
    )
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
    source = None
    if args.source == "rows-minhash":
        source = RowsMinHash(args.power, args.num_values, args.min_support, args.max_rows, args.within_table)
    return AllocationBuilder(tables, make_config(args), source, args.dedicated_fraction, args.signature_fraction)
