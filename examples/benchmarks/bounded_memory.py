"""Time and peak RAM of what passes over all ids once: compressing full tables, writing them out, inspecting.

    python examples/benchmarks/bounded_memory.py compress --ids 4000000 --dim 64
    python examples/benchmarks/bounded_memory.py leave --ids 4000000 --dim 64
    python examples/benchmarks/bounded_memory.py inspect --ids 12000000

On random ids and vectors, in one process; each prints the peak of the process before and after.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection
from torchrec_lma.files import replacing
from torchrec_lma.inspection import inspect

CONFIG = LMAConfig(compression=16)
MIB = 1 << 20


def tables(ids: int, dim: int) -> list[EmbeddingBagConfig]:
    """Four tables with a quarter of the ids each."""
    return [
        EmbeddingBagConfig(name=f"t{i}", num_embeddings=ids // 4, embedding_dim=dim, feature_names=[f"f{i}"])
        for i in range(4)
    ]


def allocation(ids: int, dim: int) -> Allocation:
    """Every id occurs, the smaller numbers more often."""
    builder = AllocationBuilder(tables(ids, dim), CONFIG)
    for start in range(0, ids // 4, 1 << 16):
        these = torch.arange(start, min(ids // 4, start + (1 << 16)))
        again = these[torch.rand(these.numel()) < 1000 / (1 + these)]
        of_table = torch.cat([these, again])
        builder.update(
            KeyedJaggedTensor(
                keys=[f"f{i}" for i in range(4)],
                values=of_table.repeat(4),
                lengths=torch.ones(4 * of_table.numel(), dtype=torch.int32),
            )
        )
    return builder.build()


def compress(args: argparse.Namespace) -> tuple[int, Callable[[], object]]:
    made_with = in_a_process_of_its_own(args)
    full = EmbeddingBagCollection(tables(args.ids, args.dim))
    full_bytes = sum(weight.nbytes for weight in full.parameters())
    return full_bytes, lambda: LMAEmbeddingBagCollection.from_embedding_bag_collection(full, made_with)


def leave(args: argparse.Namespace) -> tuple[int, Callable[[], object]]:
    lma = LMAEmbeddingBagCollection(tables(args.ids, args.dim), in_a_process_of_its_own(args))
    return lma.memory_report().full_bytes, lma.to_embedding_bag_collection


def inspect_file(args: argparse.Namespace) -> tuple[int, Callable[[], object]]:
    made_with = in_a_process_of_its_own(args)
    return made_with.nbytes, lambda: print(inspect(made_with), "\n")


def in_a_process_of_its_own(args: argparse.Namespace) -> Allocation:
    """The allocation, built where its builder's peak does not count."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "allocation.safetensors"
        process = torch.multiprocessing.get_context("spawn").Process(
            target=write_allocation, args=(args.ids, args.dim, str(path))
        )
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)
        return Allocation.load(path)


def write_allocation(ids: int, dim: int, path: str) -> None:
    torch.manual_seed(0)
    allocation(ids, dim).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = {"compress": compress, "leave": leave, "inspect": inspect_file}
    parser.add_argument("what", choices=what)
    parser.add_argument("--ids", type=int, default=4_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    args = parser.parse_args()
    size, run = what[args.what](args)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{args.what}: {size / MIB:,.0f} MiB in {seconds:.1f} s, peak {after:,.0f} MiB, {before:,.0f} before")
    if args.json is not None:
        record = {"what": args.what, "ids": args.ids, "bytes": size, "seconds": seconds, "peak_mib": after}
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps({**record, "before_mib": before}, indent=1))


if __name__ == "__main__":
    main()
