"""Signatures of fewer bits (b-bit MinHash): what the bytes that they save buy, and what their collisions cost.

    python examples/benchmarks/signature_bits.py                        # MovieLens-100K
    python examples/benchmarks/signature_bits.py --data clicks.parquet --label click --categorical user item

A signature is K values of b bits. Fewer bits take fewer bytes, so the same share of the budget has signatures for more
ids; but two unrelated ids then agree on a value with probability 2^-b and not 1 / rows, and all ids with a signature
have only 2^b addresses for a chunk. The library stores 32 bits. Here an allocation gets the ids that signatures of b
bits have room for, its values are cut to b bits, and its rows are those that the budget has beside them.

One process, Adam; the AUCs are those of the epoch with the best validation AUC, as means over seeds.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from refresh import Run
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_lma import Allocation, LMAEmbeddingBagCollection
from torchrec_lma.allocation.layout import lay_out
from torchrec_lma.datasets import RowDataset
from torchrec_lma.options import (
    add_data_options,
    add_lma_options,
    add_table_options,
    make_builder,
    make_tables,
    open_dataset,
)
from torchrec_lma.text_table import text_table

STORED_BITS = 32


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_options(parser)
    add_table_options(parser)
    add_lma_options(parser)
    parser.add_argument(
        "--signatures",
        nargs="+",
        default=["4x32", "4x16", "4x8", "8x1"],
        metavar="KxBITS",
        help="what to compare (default: %(default)s)",
    )
    parser.add_argument("--epochs", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=2, help="of weights and shuffling (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    return parser.parse_args()


def allocate(
    args: argparse.Namespace, dataset: RowDataset, tables: list[EmbeddingBagConfig], num_values: int, bits: int
) -> tuple[Allocation, int]:
    """As an allocation with signatures of `bits` bits would be, and the bytes that it would take."""
    fraction = min(args.signature_fraction * STORED_BITS / bits, 0.99 - args.dedicated_fraction)
    builder = make_builder(
        argparse.Namespace(**{**vars(args), "num_values": num_values, "signature_fraction": fraction}), tables
    )
    for batch in dataset.batches("train", batch_size=8192):
        builder.update(batch.sparse_features)
    built = builder.build()
    memories, total = [], 0
    for memory, layout in zip(built.memories, lay_out(tables, built.config)):
        saved = memory.signatures.nbytes * (STORED_BITS - bits) // STORED_BITS
        total += memory.nbytes - saved
        memories.append(
            dataclasses.replace(
                memory,
                rows=layout.rows_beside(memory.nbytes - saved),
                signatures=memory.signatures & (-1 if bits == STORED_BITS else (1 << bits) - 1),
            )
        )
    return dataclasses.replace(built, memories=tuple(memories)), total


def train(args: argparse.Namespace, dataset: RowDataset, tables: Any, allocation: Allocation, seed: int) -> float:
    """Test AUC of the best epoch."""
    torch.manual_seed(seed)
    run = Run(
        LMAEmbeddingBagCollection(tables, allocation.config, allocation),
        argparse.Namespace(seed=seed, dim=args.dim),
        len(dataset.schema.numeric),
        lambda features: features,
    )
    reached = []
    for epoch in range(args.epochs):
        run.train(dataset.batches("train", batch_size=args.batch_size, shuffle_seed=seed, epoch=epoch))
        reached.append((run.evaluate(dataset)["auc"], run.evaluate(dataset, "test")["auc"]))
    return max(reached)[1]


def main() -> None:
    args = parse_args()
    dataset = open_dataset(args)
    tables = make_tables(args, dataset.cardinalities())
    results = []
    for signature in args.signatures:
        num_values, bits = map(int, signature.split("x"))
        allocation, allocation_bytes = allocate(args, dataset, tables, num_values, bits)
        aucs = [train(args, dataset, tables, allocation, seed) for seed in range(args.seeds)]
        results.append(
            {
                "signature": signature,
                "ids": sum(memory.signatures.size(0) for memory in allocation.memories),
                "allocation_bytes": allocation_bytes,
                "rows": sum(memory.rows for memory in allocation.memories),
                "test_auc": aucs,
            }
        )
        print(json.dumps(results[-1]), flush=True)
    header = ("K x bits", "ids with one", "allocation, bytes", "rows", "test AUC", "spread")
    lines = [
        (
            result["signature"],
            f"{result['ids']:,}",
            f"{result['allocation_bytes']:,}",
            f"{result['rows']:,}",
            f"{statistics.mean(result['test_auc']):.4f}",
            f"{max(result['test_auc']) - min(result['test_auc']):.4f}",
        )
        for result in results
    ]
    print(text_table(header, lines))
    if args.json is not None:
        args.json.write_text(json.dumps({"arguments": vars(args), "results": results}, indent=1, default=str))


if __name__ == "__main__":
    main()
