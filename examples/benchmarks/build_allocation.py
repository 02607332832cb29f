"""Time and RAM of building an allocation from a stream of synthetic ids on one core.

    python examples/benchmarks/build_allocation.py --occurrences 100000000 --json build.json

Each of --features fields has ids of a Zipf law, drawn batch by batch; drawing them is not part of the times. One
thread; its CPU time is told beside the time of the clock, which other work on the machine makes longer.
"""

import argparse
import json
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from tqdm import tqdm

from torchrec_lma import AllocationBuilder, LMAConfig
from torchrec_lma.allocation import ContextMinHash, RowsMinHash, Source
from torchrec_lma.files import replacing


def zipf_ids(random: np.random.Generator, ids: int, exponent: float, size: int) -> np.ndarray:
    """int64 [size] in [0, ids): id k with probability close to (k + 1) ** -exponent over its sum."""
    power = 1 - exponent
    ranks = ((((ids + 1.0) ** power - 1) * random.random(size)) + 1) ** (1 / power)
    return np.minimum(ranks.astype(np.int64) - 1, ids - 1)


def batches(args: argparse.Namespace, names: list[str]) -> Iterator[KeyedJaggedTensor]:
    random = np.random.default_rng(args.seed)
    rows = -(-args.occurrences // len(names))
    for start in range(0, rows, args.batch_rows):
        n = min(args.batch_rows, rows - start)
        values = zipf_ids(random, args.ids, args.exponent, n * len(names))
        yield KeyedJaggedTensor(
            keys=names, values=torch.from_numpy(values), lengths=torch.ones(n * len(names), dtype=torch.int32)
        )


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux gives KiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--occurrences", type=int, default=10_000_000, help="ids in all rows (default: %(default)s)")
    parser.add_argument("--features", type=int, default=26, help="fields, a table each (default: %(default)s)")
    parser.add_argument("--ids", type=int, default=1_000_000, help="of each field (default: %(default)s)")
    parser.add_argument("--exponent", type=float, default=1.05, help="of the Zipf law, not 1 (default: %(default)s)")
    parser.add_argument("--batch-rows", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--compression", type=float, default=16)
    parser.add_argument("--raw-ids", action="store_true", help="an index of ids in place of bitmaps of vocabularies")
    parser.add_argument("--source", choices=("none", "rows-minhash", "context-minhash"), default="none")
    parser.add_argument("--num-values", type=int, default=4, help="K (default: %(default)s)")
    parser.add_argument("--power", type=int, default=2)
    parser.add_argument("--max-rows", type=int, default=RowsMinHash.max_rows, help="sampled (default: %(default)s)")
    parser.add_argument("--max-ids", type=int, default=AllocationBuilder.MAX_IDS, help="counted (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    args = parser.parse_args()

    torch.set_num_threads(1)
    names = [f"f{i}" for i in range(args.features)]
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=args.ids, embedding_dim=args.dim, feature_names=[name])
        for name in names
    ]
    settings = {"power": args.power, "num_values": args.num_values, "max_rows": args.max_rows}
    sources: dict[str, Source | None] = {
        "none": None,
        "rows-minhash": RowsMinHash(**settings),
        "context-minhash": ContextMinHash(**settings),
    }
    config = LMAConfig(compression=args.compression, raw_ids=args.raw_ids)
    builder = AllocationBuilder(tables, config, sources[args.source], max_ids=args.max_ids)
    before_bytes = peak_bytes()
    occurrences, update_seconds, update_cpu_seconds = 0, 0.0, 0.0
    for batch in tqdm(batches(args, names), unit="batch", disable=None):
        started, cpu_started = time.perf_counter(), time.thread_time()
        builder.update(batch)
        update_seconds += time.perf_counter() - started
        update_cpu_seconds += time.thread_time() - cpu_started
        occurrences += batch.values().numel()
    after_update_bytes = peak_bytes()
    started, cpu_started = time.perf_counter(), time.thread_time()
    allocation = builder.build()
    build_seconds, build_cpu_seconds = time.perf_counter() - started, time.thread_time() - cpu_started

    (memory,) = allocation.memories
    ids = allocation.provenance["ids"].values()
    record = {
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "occurrences": occurrences,
        "update_seconds": update_seconds,
        "build_seconds": build_seconds,
        "update_cpu_seconds": update_cpu_seconds,
        "build_cpu_seconds": build_cpu_seconds,
        "occurrences_per_second": occurrences / (update_seconds + build_seconds),
        "occurrences_per_cpu_second": occurrences / (update_cpu_seconds + build_cpu_seconds),
        "bytes_before": before_bytes,
        "peak_bytes_after_update": after_update_bytes,
        "peak_bytes": peak_bytes(),
        "frequency": allocation.provenance["frequency"],
        "rows_seen": allocation.provenance["rows_seen"],
        "rows_sampled": allocation.provenance["rows_sampled"],
        **{what: sum(of_table[what] for of_table in ids) for what in ("seen", "with_signature")},
        "levels": [asdict(level) for level in memory.levels],
        "allocation_bytes": allocation.nbytes,
        "config": asdict(allocation.config),
        "fingerprint": allocation.fingerprint,
    }
    print(
        f"{occurrences:,} occurrences of {record['seen']:,} ids ({record['frequency']})\n"
        f"update {update_seconds:.1f} s ({update_cpu_seconds:.1f} s of CPU), build {build_seconds:.1f} s "
        f"({build_cpu_seconds:.1f} s of CPU): {record['occurrences_per_second']:,.0f} occurrences/s, "
        f"{record['occurrences_per_cpu_second']:,.0f} a second of CPU\n"
        f"peak RAM {record['peak_bytes'] / 2**30:.2f} GiB ({before_bytes / 2**30:.2f} before the first row)\n"
        f"own rows of columns: {', '.join(f'{level.own_rows:,} of {level.width}' for level in memory.levels)}; "
        f"{memory.levels[0].shared_rows:,} shared; {record['with_signature']:,} ids with a signature; allocation "
        f"{allocation.nbytes / 2**20:.1f} MiB"
    )
    if args.json is not None:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
