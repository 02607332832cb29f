"""Does a DLRM for Criteo's Terabyte logs fit on these devices? A sharding plan for full and for LMA tables.

Only plans, by TorchRec's own planner: the model is on the meta device, no table is allocated and no GPU is needed. The
allocation is a sketch, for no counts of the 883 million values are at hand: it is built for tables a thousand times
smaller, whose ids occur by Zipf's law in a thousand times fewer rows, and given a thousand times the rows. Its bytes,
which every device holds, are real; who owns what is not. The sizes of the 26 tables are published ones:

* unclipped: every value of the 24 days that occurs has a row, 882,774,559 together (the cardinalities used by NVIDIA's,
  OneFlow's and Hetu's DLRM examples).
* mlperf_v2: hashed to at most 40 million rows, MLPerf Training's DLRM-DCNv2 (and TorchRec's example for it).

    python examples/benchmarks/criteo_plan.py                              # 8 devices of 40 GB
    python examples/benchmarks/criteo_plan.py --uvm                        # tables may lie in host memory
    python examples/benchmarks/criteo_plan.py --sizes mlperf_v2 --optimizer adagrad --devices 4
    python examples/benchmarks/criteo_plan.py --devices 128                # 16 hosts of 8
"""

import argparse
import json
import logging
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.stats import EmbeddingStats
from torchrec.distributed.planner.types import PlannerError, ShardingOption, Stats
from torchrec.distributed.types import PipelineType
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection, get_default_sharders
from torchrec_lma.allocation import MemoryAllocation
from torchrec_lma.allocation.artifact import all_tables
from torchrec_lma.allocation.layout import lay_out
from torchrec_lma.distributed import level_constraints
from torchrec_lma.files import replacing
from torchrec_lma.text_table import text_table

# fmt: off
SIZES = {
    "unclipped": [
        227605432, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 130229467, 3067956, 405282, 10, 2209, 11938, 155, 4,
        976, 14, 292775614, 40790948, 187188510, 590152, 12973, 108, 36,
    ],
    "mlperf_v2": [
        40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10, 2209, 11938, 155, 4,
        976, 14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36,
    ],
}
# fmt: on
OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "rowwise-adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
}
SCALE = 1000
ROWS = 4_373_472_329  # of the 24 days
ZIPF = 1.05
GB = 2**30  # as TorchRec's planner prints it
META = torch.device("meta")


class Plan(Stats):
    """What the planner chose: the tables' bytes and times on each rank and the sharding types."""

    options: list[ShardingOption]

    def log(self, *args: Any, best_plan: list[ShardingOption], **kwargs: Any) -> None:
        self.options = best_plan

    def bytes_by_rank(self, where: str, ranks: int) -> list[int]:
        result = [0] * ranks
        for option in self.options:
            for shard in option.shards:
                result[shard.rank] += getattr(shard.storage, where)
        return result

    def ms_by_rank(self, ranks: int) -> list[float]:
        """As the planner's model has it, without the input dist."""
        result = [0.0] * ranks
        for option in self.options:
            for shard in option.shards:
                result[shard.rank] += shard.perf.total
        return result

    def shardings(self) -> dict[str, int]:
        return dict(Counter(f"{option.sharding_type}, {option.compute_kernel}" for option in self.options))


def sketched(tables: list[EmbeddingBagConfig], config: LMAConfig) -> Allocation:
    """The allocation of tables a SCALE smaller, with SCALE times the rows."""
    small = [replace(table, num_embeddings=max(1, table.num_embeddings // SCALE)) for table in tables]
    builder = AllocationBuilder(small, config, max_ids=sum(table.num_embeddings for table in small))
    for table in small:
        n = table.num_embeddings
        edges = np.arange(1, n + 2, dtype=np.float64) ** (1 - ZIPF)
        share = np.diff(edges) / (edges[-1] - edges[0])
        builder.add_counts(table.name, np.arange(n), np.maximum(1, np.rint(share * ROWS / SCALE)).astype(np.int64))
    built = builder.build()
    sizes = {table.name: table.num_embeddings for table in tables}
    memories = [scaled(memory, sizes) for memory in built.memories]
    specs = all_tables(tables, lay_out(tables, config))
    return Allocation(config, specs, tuple(memories), built.provenance)


def scaled(memory: MemoryAllocation, sizes: dict[str, int]) -> MemoryAllocation:
    """SCALE times the rows, and of as many of the ids, which are sorted by frequency."""
    levels, tensors = [], {}
    positions = sum(sizes[table] for table in memory.tables)
    for k, level in enumerate(memory.levels):
        name = f"owners.{k}.ranges"
        own_rows = min(level.own_rows * SCALE, positions) if name in memory.tensors or not level.own_rows else positions
        if name in memory.tensors:
            tensors[name] = memory.tensors[name] * SCALE
        levels.append(replace(level, own_rows=own_rows, shared_rows=level.shared_rows * SCALE))
        positions = own_rows
    return replace(memory, levels=tuple(levels), tensors=tensors)


def make_model(args: argparse.Namespace, table: str) -> DLRM:
    tables = [
        EmbeddingBagConfig(name=f"t_{i}", num_embeddings=size, embedding_dim=args.dim, feature_names=[f"cat_{i}"])
        for i, size in enumerate(SIZES[args.sizes])
    ]
    ebc: EmbeddingBagCollection | LMAEmbeddingBagCollection
    if table == "lma":
        ebc = LMAEmbeddingBagCollection(tables, sketched(tables, LMAConfig(args.compression)), device=META)
    else:
        ebc = EmbeddingBagCollection(tables=tables, device=META)
    apply_optimizer_in_backward(OPTIMIZERS[args.optimizer], ebc.parameters(), {"lr": 0.01})
    return DLRM(
        ebc,
        dense_in_features=13,
        dense_arch_layer_sizes=[512, 256, args.dim],
        over_arch_layer_sizes=[1024, 1024, 512, 256, 1],
        dense_device=META,
    )


def plan(args: argparse.Namespace, table: str) -> dict[str, Any]:
    model = make_model(args, table)
    collection = model.sparse_arch.embedding_bag_collection
    kernels = None if args.uvm else ["fused", "dense"]
    given = {table.name: ParameterConstraints(compute_kernels=kernels) for table in collection.embedding_bag_configs()}
    found = Plan()
    local_devices = min(args.devices, args.local_devices)
    held_bytes = collection.allocation.nbytes if table == "lma" else 0  # on every device
    topology = Topology(
        world_size=args.devices,
        local_world_size=local_devices,
        compute_device="cuda",
        hbm_cap=int(args.device_gb * GB) - held_bytes,
        ddr_cap=int(args.host_gb * GB),
    )
    constraints = level_constraints(model, given)
    storage = EmbeddingStorageEstimator(
        topology=topology, constraints=constraints, pipeline_type=PipelineType.TRAIN_SPARSE_DIST
    )
    performance = EmbeddingPerfEstimator(topology=topology, constraints=constraints)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=args.batch_size,
        enumerator=EmbeddingEnumerator(topology, args.batch_size, constraints, [performance, storage]),
        constraints=constraints,
        stats=[found, EmbeddingStats()],
    )
    result: dict[str, Any] = {
        "tables": table,
        "weight_bytes": sum(p.nbytes for p in collection.parameters()),
        "allocation_bytes": held_bytes,
        "rows": {name.split(".")[-2]: list(p.shape) for name, p in collection.named_parameters()},
        "fits": True,
    }
    try:
        planner.plan(model, get_default_sharders())
    except PlannerError as error:
        return result | {"fits": False, "error": str(error).split("\n")[0].strip()}
    host_bytes = found.bytes_by_rank("ddr", args.devices)
    return result | {
        "device_bytes": [held_bytes + nbytes for nbytes in found.bytes_by_rank("hbm", args.devices)],
        "host_bytes": [sum(host_bytes[i : i + local_devices]) for i in range(0, args.devices, local_devices)],
        "device_ms": found.ms_by_rank(args.devices),
        "shardings": found.shardings(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=SIZES, default="unclipped", help="of the tables (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=128, help="of the embeddings (default: %(default)s)")
    parser.add_argument("--compression", type=float, default=16, help="of LMA (default: %(default)s)")
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="rowwise-adagrad", help="of the tables (default: %(default)s)"
    )
    parser.add_argument("--devices", type=int, default=8, help="on all hosts (default: %(default)s)")
    parser.add_argument("--local-devices", type=int, default=8, help="on a host (default: %(default)s)")
    parser.add_argument("--device-gb", type=float, default=40, help="memory of a device, 2^30 (default: %(default)s)")
    parser.add_argument("--host-gb", type=float, default=128, help="host memory per device (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8192, help="rows on each device (default: %(default)s)")
    parser.add_argument("--uvm", action="store_true", help="tables may lie in host memory (UVM, with or without cache)")
    parser.add_argument("--show-plan", action="store_true", help="print the planner's own tables too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchrec")
    logging.getLogger("torchrec").setLevel(logging.ERROR)  # remarks on topologies and dry runs
    if args.show_plan:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("torchrec.distributed.planner.stats").setLevel(logging.INFO)

    results = [plan(args, table) for table in ("full", "lma")]
    sizes = SIZES[args.sizes]
    print(
        f"{sum(sizes):,} rows of dim {args.dim} in {len(sizes)} tables, {args.optimizer}, {args.devices} devices of "
        f"{args.device_gb:g} GB, {args.batch_size} rows on each; LMA at {args.compression:g}x. GB are 2^30 bytes."
    )
    print(
        text_table(
            ["tables", "plan", "weights", "allocation", "on a device", "on a host", "slowest device, model"],
            [
                [
                    result["tables"],
                    ", ".join(f"{n} x {s}" for s, n in result["shardings"].items()) if result["fits"] else "none found",
                    f"{result['weight_bytes'] / GB:.2f} GB",
                    f"{result['allocation_bytes'] / GB:.2f} GB",
                    "{:.2f} to {:.2f} GB".format(min(result["device_bytes"]) / GB, max(result["device_bytes"]) / GB)
                    if result["fits"]
                    else "-",
                    f"{max(result['host_bytes']) / GB:.2f} GB" if result["fits"] else "-",
                    f"{max(result['device_ms']):.1f} ms" if result["fits"] else "-",
                ]
                for result in results
            ],
            left=2,
        )
    )
    if args.json is not None:
        record = {"arguments": vars(args) | {"json": str(args.json)}, "results": results}
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
