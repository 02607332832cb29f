"""The command `torchrec-lma allocate`, alone or as one of the workers that torchrun starts."""

import argparse
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from torchrec_lma.allocation import Allocation
from torchrec_lma.allocation.reduction import noticing_lost_workers, reduce_builders, reduce_to_first
from torchrec_lma.cli.outputs import check_writable
from torchrec_lma.datasets import RowDataset, Vocabulary
from torchrec_lma.options import (
    add_data_options,
    add_lma_options,
    add_table_options,
    count_embeddings,
    make_builder,
    make_tables,
    make_vocabulary,
    open_dataset,
    save_allocation,
    vocabulary_path,
)

READ_ROWS = 8192  # at a time


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Reads the training split and writes the allocation of its ids: a safetensors file. Under torchrun "
        "every worker reads its share of the rows and the first one writes; the result does not depend on how many "
        "there are."
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="Where to write the allocation. Its vocabulary goes beside it, with the ending .vocabulary.safetensors.",
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
        dist.init_process_group("gloo")
    try:
        _allocate(args, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _allocate(args: argparse.Namespace, rank: int, world_size: int) -> None:
    if rank == 0:
        check_writable("--out", args.out)
        check_writable("--out", vocabulary_path(args.out))
    dataset = open_dataset(args, needs_label=False)
    vocabulary, num_embeddings = _vocabulary(args, dataset, rank, world_size)
    builder = make_builder(args, make_tables(args, num_embeddings))
    batches = dataset.batches("train", batch_size=READ_ROWS, rank=rank, world_size=world_size)
    n_batches = dataset.num_batches("train", READ_ROWS, world_size)
    for batch in tqdm(batches, total=n_batches, unit="batch", disable=None if rank == 0 else True):
        builder.update(batch.sparse_features if vocabulary is None else vocabulary(batch.sparse_features))
    if world_size > 1:
        reduced = reduce_builders(builder)
        if reduced is None:
            return
        builder = reduced
    allocation = builder.build()
    with _ending_on_sigterm():
        args.out.parent.mkdir(parents=True, exist_ok=True)
        allocation = save_allocation(args.out, allocation, dataset, vocabulary)
    _print(allocation, args.out)


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit, so that what is half written is removed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _vocabulary(
    args: argparse.Namespace, dataset: RowDataset, rank: int, world_size: int
) -> tuple[Vocabulary | None, dict[str, int]]:
    """The vocabulary of the training rows of all workers, where tables take one, and the rows of each full table."""
    if world_size == 1:
        vocabulary = make_vocabulary(args, dataset)
        return vocabulary, count_embeddings(args, dataset) if vocabulary is None else vocabulary.num_embeddings
    if args.num_embeddings is not None:
        return None, count_embeddings(args, dataset)
    ids = reduce_to_first(dataset.distinct_ids(rank=rank, world_size=world_size), _union)
    # Workers that take raw ids need their number only.
    message: list[Any] = [ids]
    if ids is not None and args.raw_ids:
        message = [{column: of_column.size + 1 for column, of_column in ids.items()}]
    with noticing_lost_workers():
        dist.broadcast_object_list(message)
    if args.raw_ids:
        return None, message[0]
    vocabulary = Vocabulary(message[0])
    return vocabulary, vocabulary.num_embeddings


def _union(ids: dict[str, np.ndarray], more: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {column: np.union1d(of_column, more[column]) for column, of_column in ids.items()}


def _print(allocation: Allocation, path: Path) -> None:
    ids = allocation.provenance["ids"]
    for memory in allocation.memories:
        levels = ", ".join(f"{level.own_rows:,} of {level.width}" for level in memory.levels)
        shared = sum(level.shared_rows for level in memory.levels)
        print(f"{memory.name}: own rows of columns: {levels}; {shared:,} shared rows")
        for table in memory.tables:
            of_table = ids[table]
            line = f"  {table}: {of_table['seen']:,} ids seen, own rows: {', '.join(f'{n:,}' for n in of_table['own'])}"
            if of_table["with_signature"]:
                line += f", {of_table['with_signature']:,} with a signature"
            print(line)
    _print_unshared(allocation)
    if allocation.provenance["frequency"] == "sketched":
        print("  more distinct ids than can be counted: counts are estimates, ids seen are those in the sampled rows")
    print(f"{path}: {allocation.nbytes:,} bytes beside the weights, fingerprint {allocation.fingerprint}")


def _print_unshared(allocation: Allocation) -> None:
    """Warns of the tables whose signatures cost bytes and make no ids share."""
    for memory in allocation.memories:
        if "signatures" not in memory.tensors:
            continue
        n, num_values = memory.tensors["signatures"].shape
        for table in memory.tables:
            ids = allocation.provenance["ids"][table]
            # Values of 32 bits of so many ids agree by chance as well: so many times, and six deviations more.
            by_chance = ids["with_signature"] * n * num_values / 2**32
            if ids["with_signature"] and ids["sharing_by_signature"] <= by_chance + 6 * math.sqrt(by_chance):
                print(
                    f"  warning: {table}: no two signatures agree in any value; these signatures share no rows and "
                    f"take {ids['with_signature'] * num_values * 4:,} bytes; give another --source or none"
                )
