"""The command `torchrec-lma allocate`, alone or as one of the workers that torchrun starts."""

import argparse
import math
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from torchrec_lma.allocation.allocation import Allocation
from torchrec_lma.allocation.reduction import noticing_lost_workers, reduce_builders, reduce_to_first
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
    add_data_options(parser, needs_label=False)
    add_table_options(parser)
    add_lma_options(parser)
    parser.set_defaults(run=run_allocate)


def run_allocate(args: argparse.Namespace) -> None:
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
    if rank == 0:
        _check_writable(args.out)
    dataset = open_dataset(args, needs_label=False)
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
    with _ending_on_sigterm():
        args.out.parent.mkdir(parents=True, exist_ok=True)
        allocation.save(args.out)
    _print(allocation, args.out)


def _check_writable(path: Path) -> None:
    """Raises OSError if a file cannot be written at `path`: before the pass over the data, and leaving nothing there.

    Folders that are missing are made when the file is written.
    """
    if path.is_dir():
        raise IsADirectoryError(f"--out {path} is a directory: give the name of a file to write in it")
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"--out {path} cannot be written: {folder} takes no file ({error.strerror})") from error


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit, so that what is half written is removed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _count_embeddings(args: argparse.Namespace, dataset: RowDataset, rank: int, world_size: int) -> dict[str, int]:
    """Rows of each column's full table: --num-embeddings, or the distinct ids of the training rows of all workers."""
    if world_size == 1 or args.num_embeddings is not None:
        return count_embeddings(args, dataset)
    ids = reduce_to_first(dataset.distinct_ids(rank=rank, world_size=world_size), _union)
    counts = [None if ids is None else {column: of_column.size for column, of_column in ids.items()}]
    with noticing_lost_workers():
        dist.broadcast_object_list(counts)
    assert counts[0] is not None
    return counts[0]


def _union(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {column: np.union1d(ids, other[column]) for column, ids in one.items()}


def _print(allocation: Allocation, path: Path) -> None:
    for memory in allocation.memories:
        print(f"{memory.name}: {memory.rows:,} rows, {memory.dedicated_rows:,} of them dedicated")
    for memory_name, tables in allocation.provenance["ids"].items():
        for table, ids in tables.items():
            print(
                f"  {memory_name} {table}: {ids['seen']:,} ids seen, {ids['dedicated']:,} dedicated, "
                f"{ids['with_signature']:,} with a signature"
            )
    _print_unshared(allocation)
    if allocation.provenance["frequency"] == "sketched":
        print("  more distinct ids than --max-ids: counts are estimates, ids seen are those in the sampled rows")
    print(f"{path}: {allocation.nbytes:,} bytes beside the weights, fingerprint {allocation.fingerprint}")


def _print_unshared(allocation: Allocation) -> None:
    """Warns of the tables whose signatures cost bytes and make no ids share."""
    for memory in allocation.memories:
        of_table = allocation.provenance["ids"][memory.name]
        n = sum(ids["with_signature"] for ids in of_table.values())
        index_bytes = memory.signature_low.nbytes + memory.signature_starts.nbytes
        for table, ids in of_table.items():
            # Values of 32 bits of so many ids agree by chance as well: so many times, and six deviations more.
            by_chance = ids["with_signature"] * n * memory.signatures.size(1) / 2**32
            if ids["with_signature"] and ids["sharing"] <= by_chance + 6 * math.sqrt(by_chance):
                saved = ids["with_signature"] * (memory.signatures.nbytes + index_bytes) // n
                print(
                    f"  warning: {table}: no two signatures agree in any value; these signatures share no memory; "
                    f"--source-of {table.removeprefix('t_')}=none saves {saved:,} bytes"
                )
