"""The command `torchrec-lma allocate`, alone or as one of the workers that torchrun starts."""

import argparse
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from torchrec_lma.allocation.allocation import Allocation
from torchrec_lma.allocation.reduction import noticing_lost_workers, reduce_builders
from torchrec_lma.datasets import RowDataset
from torchrec_lma.options import (
    add_data_options,
    add_lma_options,
    add_table_options,
    count_embeddings,
    make_builder,
    make_tables,
    open_dataset,
)


def add_allocate(commands: Any) -> None:
    parser = commands.add_parser(
        "allocate",
        help="build an allocation from training data",
        description="Reads the training split once and writes the allocation of its ids: a safetensors file. Under "
        "torchrun every worker reads its share of the rows and the first one writes; the result does not depend on how "
        "many there are.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the allocation")
    parser.add_argument("--batch-size", type=int, default=8192, help="rows read at a time (default: %(default)s)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=1800,
        metavar="SECONDS",
        help="how long workers wait for each other (default: %(default)s)",
    )
    add_data_options(parser)
    add_table_options(parser)
    add_lma_options(parser)
    parser.set_defaults(run=run_allocate)


def run_allocate(args: argparse.Namespace) -> None:
    if args.out.is_dir():
        raise IsADirectoryError(f"--out {args.out} is a directory: give the name of a file to write in it")
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        _allocate(args, rank=0, world_size=1)
        return
    with noticing_lost_workers():
        dist.init_process_group("gloo", timeout=timedelta(seconds=args.timeout))
    try:
        _allocate(args, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _allocate(args: argparse.Namespace, rank: int, world_size: int) -> None:
    dataset = open_dataset(args)
    builder = make_builder(args, make_tables(args, _count_embeddings(args, dataset, rank, world_size)))
    batches = dataset.batches("train", batch_size=args.batch_size, rank=rank, world_size=world_size)
    n_batches = dataset.num_batches("train", args.batch_size, world_size)
    for batch in tqdm(batches, total=n_batches, unit="batch", disable=None if rank == 0 else True):
        builder.update(batch.sparse_features)
    if world_size > 1:
        reduced = reduce_builders(builder)
        if reduced is None:
            return
        builder = reduced
    allocation = builder.build()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    allocation.save(args.out)
    _print(allocation, args.out)


def _count_embeddings(args: argparse.Namespace, dataset: RowDataset, rank: int, world_size: int) -> dict[str, int]:
    """Rows of each column's full table: --num-embeddings, or the distinct ids of the training rows of all workers."""
    if world_size == 1 or args.num_embeddings is not None:
        return count_embeddings(args, dataset)
    of_all: list[dict[str, np.ndarray]] = [{}] * world_size
    with noticing_lost_workers():
        dist.all_gather_object(of_all, dataset.distinct_ids(rank=rank, world_size=world_size))
    return {
        column: np.unique(np.concatenate([ids[column] for ids in of_all])).size for column in dataset.schema.categorical
    }


def _print(allocation: Allocation, path: Path) -> None:
    for memory in allocation.memories:
        print(f"{memory.name}: {memory.rows:,} rows, {memory.dedicated_rows:,} of them dedicated")
    for memory_name, tables in allocation.provenance["ids"].items():
        for table, ids in tables.items():
            print(
                f"  {memory_name} {table}: {ids['seen']:,} ids seen, {ids['dedicated']:,} dedicated, "
                f"{ids['with_signature']:,} with a signature"
            )
    if allocation.provenance["frequency"] == "sketched":
        print("  more distinct ids than --max-ids: counts are estimates, ids seen are those in the sampled rows")
    print(f"{path}: {allocation.nbytes:,} bytes beside the weights, fingerprint {allocation.fingerprint}")
