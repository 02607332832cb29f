"""The `torchrec-lma` command."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from torchrec_lma.options import (
    add_data_options,
    add_lma_options,
    add_table_options,
    count_embeddings,
    make_builder,
    make_tables,
    open_dataset,
)


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status: 0, or 2 when the input is at fault, which is said on stderr."""
    parser = argparse.ArgumentParser(prog="torchrec-lma", description="Tools for LMA-compressed embedding tables.")
    commands = parser.add_subparsers(dest="command", required=True)
    allocate = commands.add_parser(
        "allocate",
        help="build an allocation from training data",
        description="Reads the training split once and writes the allocation of its ids: a safetensors file.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    allocate.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the allocation")
    allocate.add_argument("--batch-size", type=int, default=8192, help="rows read at a time (default: %(default)s)")
    add_data_options(allocate)
    add_table_options(allocate)
    add_lma_options(allocate)
    allocate.set_defaults(run=run_allocate)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"torchrec-lma {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def run_allocate(args: argparse.Namespace) -> None:
    dataset = open_dataset(args)
    builder = make_builder(args, make_tables(args, count_embeddings(args, dataset)))
    batches = dataset.batches("train", batch_size=args.batch_size)
    for batch in tqdm(batches, total=dataset.num_batches("train", args.batch_size), unit="batch", disable=None):
        builder.update(batch.sparse_features)
    allocation = builder.build()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    allocation.save(args.out)
    for memory in allocation.memories:
        print(f"{memory.name}: {memory.rows:,} rows, {memory.dedicated_rows:,} of them dedicated")
    for memory_name, tables in allocation.provenance["ids"].items():
        for table, ids in tables.items():
            print(
                f"  {memory_name} {table}: {ids['seen']:,} ids seen, {ids['dedicated']:,} dedicated, "
                f"{ids['with_signature']:,} with a signature"
            )
    print(f"{args.out}: {allocation.nbytes:,} bytes beside the weights, fingerprint {allocation.fingerprint}")


if __name__ == "__main__":
    sys.exit(main())
