"""What the address of an id costs on the CPU, by kind of id and size of the allocation.

    python examples/benchmarks/addressing.py --json addressing.json

Random ids, so that every look-up goes to a random place of the index: the worst case for caches. Times are CPU time of
the one thread, so that other work on the machine disturbs them less.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from torchrec_lma.addressing import MemoryAddressing
from torchrec_lma.allocation import MemoryAllocation
from torchrec_lma.allocation.index import build_index
from torchrec_lma.hashing import mix64

ROWS = 1 << 22


def random_ids(n: int, random: torch.Generator) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (n,), generator=random)


def measure(addressing: MemoryAddressing, ids: torch.Tensor, batch: int, repeats: int) -> tuple[float, float | None]:
    """Median CPU nanoseconds an id over batches of ids: of the address, and of the look-up in the index alone."""
    salts, n_chunks = torch.zeros(1, dtype=torch.int64), addressing.n_chunks
    index = addressing.signature_index if addressing.has_signatures else None
    address_seconds, index_seconds = [], []
    for part in ids.split(batch)[:repeats]:
        started = time.thread_time()
        addressing(part, salts, 0, n_chunks)
        address_seconds.append(time.thread_time() - started)
    for part in map(mix64, ids.split(batch)[repeats : 2 * repeats]):
        if index is not None:
            started = time.thread_time()
            index(part)
            index_seconds.append(time.thread_time() - started)
    nanoseconds = 1e9 / batch
    return (
        statistics.median(address_seconds) * nanoseconds,
        statistics.median(index_seconds) * nanoseconds if index_seconds else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 100_000, 1_000_000, 10_000_000],
                        help="ids with a signature (default: %(default)s)")  # fmt: skip
    parser.add_argument("--num-values", type=int, default=4, help="K (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--chunk-dim", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16384, help="ids of one call (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=30, help="calls timed; the median counts (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    args = parser.parse_args()

    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    results: list[dict[str, Any]] = []
    for size in tqdm(args.sizes, unit="size", disable=None):
        wanted = 2 * args.repeats * args.batch
        known = random_ids(max(size, 1), random)
        tensors = {}
        if size:
            low, starts, order = build_index(mix64(known))
            signatures = torch.randint(-(2**31), 2**31, (order.numel(), args.num_values), dtype=torch.int32)
            tensors = {"signature_low": low, "signature_starts": starts, "signatures": signatures}
        memory = MemoryAllocation("memory", args.dim, args.chunk_dim, ROWS, ("t",), **tensors)
        addressing = MemoryAddressing(memory, seed=0)
        kinds = {"unknown": random_ids(wanted, random)}
        if size:
            kinds["known"] = known[torch.randint(0, size, (wanted,), generator=random)]
        for kind, ids in kinds.items():
            address, index = measure(addressing, ids, args.batch, args.repeats)
            results.append(
                {
                    "ids_with_signature": size,
                    "kind": kind,
                    "address_ns": address,
                    "index_ns": index,
                    "bytes_per_id": memory.nbytes / size if size else 0.0,
                }
            )
    print(f"{'with signature':>15}{'look-up of':>12}{'bytes/id':>10}{'index ns/id':>13}{'address ns/id':>15}")
    for result in results:
        index_ns = f"{result['index_ns']:.1f}" if result["index_ns"] is not None else "-"
        print(
            f"{result['ids_with_signature']:>15,}{result['kind']:>12}{result['bytes_per_id']:>10.2f}"
            f"{index_ns:>13}{result['address_ns']:>15.1f}"
        )
    if args.json is not None:
        record = {"arguments": {**vars(args), "json": str(args.json)}}
        temporary = args.json.with_name(f".{args.json.name}.tmp")
        temporary.write_text(json.dumps({**record, "results": results}, indent=1))
        os.replace(temporary, args.json)


if __name__ == "__main__":
    main()
