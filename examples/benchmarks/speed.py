"""How long LMA tables take beside full ones, interleaved in one process.

Everything goes through DistributedModelParallel with fused row-wise Adagrad: TorchRec's full tables, and in the
compressed bytes tables of a smaller dim in FP16, the hashing trick (a plain table of as many rows as fit), TorchRec's
managed-collision collection, and LMA tables with the settings given. Timed are the embeddings' forward, forward and
backward, the remap alone, and a whole DLRM step through TrainPipelineSparseDist on 1 and 2 ranks; minima and medians of
interleaved repeats, and their ratios to full tables.

    python examples/benchmarks/speed.py                              # both workloads, pooling 1 and 20, 1 and 2 ranks
    python examples/benchmarks/speed.py --workload equal --pooling 1 --world-size 1 --data-type FP16 FP32
    python examples/benchmarks/speed.py --id-space                   # the step as the id space grows at one memory
    python examples/benchmarks/speed.py --device cuda --world-size 1 --batch-size 8192                # on a CUDA GPU
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingPlan
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection, get_default_sharders
from torchrec_lma.text_table import text_table

# Distinct values of the 26 categorical columns of the Criteo Kaggle data, as facebookresearch/dlrm counts them.
CRITEO_KAGGLE = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
WORKLOADS = {"criteo": CRITEO_KAGGLE, "equal": (385_000,) * 26}
DIM = 64
DENSE_FEATURES = 13
COMPRESSION = 16.0
ZIPF = 1.05
ROWS = 45_840_617


@dataclass(frozen=True)
class Workload:
    """Tables of these sizes, whose ids occur by Zipf's law; `pooling` ids in each bag. `in_order`: by frequency."""

    sizes: tuple[int, ...]
    pooling: int
    batch_size: int
    in_order: bool = False

    def tables(
        self, divide_by: float = 1.0, dim: int = DIM, data_type: DataType = DataType.FP32
    ) -> list[EmbeddingBagConfig]:
        return [
            EmbeddingBagConfig(
                name=f"t{i}",
                num_embeddings=max(1, int(size / divide_by)),
                embedding_dim=dim,
                feature_names=[f"f{i}"],
                data_type=data_type,
            )
            for i, size in enumerate(self.sizes)
        ]

    def ids(self, table: int, rank: np.ndarray) -> np.ndarray:
        """The ids of a table by their rank in frequency: that, or an order in which frequent ids are no neighbours."""
        if self.in_order:
            return rank
        size = self.sizes[table]
        return (rank * _coprime(size) + 17 * table) % size

    def counts(self, table: int) -> np.ndarray:
        """int64 [size], how often the id of each rank occurs in as many rows as the Criteo Kaggle data has."""
        edges = np.arange(1, self.sizes[table] + 2, dtype=np.float64) ** (1 - ZIPF)
        share = np.diff(edges) / (edges[-1] - edges[0])
        return np.maximum(1, np.rint(share * self.pooling * ROWS)).astype(np.int64)

    def batch(self, seed: int) -> KeyedJaggedTensor:
        n = self.batch_size * self.pooling
        rng = np.random.default_rng(seed)
        values = []
        for i, size in enumerate(self.sizes):
            uniform = rng.random(n)
            rank = ((size + 1) ** (1 - ZIPF) * uniform + (1 - uniform)) ** (1 / (1 - ZIPF)) - 1
            values.append(self.ids(i, np.minimum(rank.astype(np.int64), size - 1)))
        return KeyedJaggedTensor(
            keys=[f"f{i}" for i in range(len(self.sizes))],
            values=torch.from_numpy(np.concatenate(values)),
            lengths=torch.full((len(self.sizes) * self.batch_size,), self.pooling, dtype=torch.int32),
        )


def _coprime(size: int) -> int:
    step = int(size * 0.6180339887) | 1
    while np.gcd(step, size) != 1:
        step += 2
    return step


def build(workload: Workload, config: LMAConfig) -> Allocation:
    builder = AllocationBuilder(workload.tables(), config, max_ids=sum(workload.sizes))
    for i, size in enumerate(workload.sizes):
        builder.add_counts(f"t{i}", workload.ids(i, np.arange(size)), workload.counts(i))
    return builder.build()


def hashed(features: KeyedJaggedTensor, tables: list[EmbeddingBagConfig]) -> KeyedJaggedTensor:
    sizes = torch.tensor([[t.num_embeddings] for t in tables], device=features.device())
    ids = features.values().view(len(tables), -1) % sizes
    return KeyedJaggedTensor(features.keys(), ids.view(-1), lengths=features.lengths())


class Pooled(nn.Module):
    """The embeddings alone; a managed-collision collection also returns remapped features."""

    def __init__(self, ebc: nn.Module) -> None:
        super().__init__()
        self.ebc = ebc

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        pooled = self.ebc(features)
        return (pooled[0] if isinstance(pooled, tuple) else pooled).values()


@dataclass
class Method:
    """Tables of one kind, and their times by what is timed, in seconds."""

    name: str
    tables: Callable[[], nn.Module]
    prepare: Callable[[KeyedJaggedTensor], KeyedJaggedTensor] = lambda features: features
    times: dict[str, list[float]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    def timed(self, what: str, seconds: float) -> None:
        self.times.setdefault(what, []).append(seconds)


def methods(
    workload: Workload, allocations: dict[str, Allocation], beside: Sequence[str], device: torch.device
) -> list[Method]:
    """LMA tables of each allocation, beside those of these names; the first is what the others are compared with."""
    meta = torch.device("meta")
    small = workload.tables(divide_by=COMPRESSION)
    narrow = workload.tables(dim=int(2 * DIM / COMPRESSION), data_type=DataType.FP16)

    def managed_collision() -> nn.Module:
        tables = workload.tables(divide_by=COMPRESSION)
        modules = {
            table.name: MCHManagedCollisionModule(
                zch_size=table.num_embeddings,
                device=device,
                input_hash_size=2**62,
                eviction_interval=100,
                eviction_policy=DistanceLFU_EvictionPolicy(),
            )
            for table in tables
        }
        return ManagedCollisionEmbeddingBagCollection(
            EmbeddingBagCollection(tables, device=meta), ManagedCollisionCollection(modules, tables)
        )

    lma = [
        Method(name, partial(LMAEmbeddingBagCollection, workload.tables(), allocation, device=meta))
        for name, allocation in allocations.items()
    ]
    others = [
        Method("full", lambda: EmbeddingBagCollection(workload.tables(), device=meta)),
        Method("smaller dim", lambda: EmbeddingBagCollection(narrow, device=meta)),
        Method("hashing trick", lambda: EmbeddingBagCollection(small, device=meta), lambda x: hashed(x, small)),
        Method("managed collision", managed_collision),
    ]
    full, *rest = (method if method.name in beside else None for method in others)
    return [method for method in (full, *lma, *rest) if method is not None]


def shard(model: nn.Module, ebc: nn.Module, batch_size: int, device: torch.device) -> DistributedModelParallel:
    apply_optimizer_in_backward(RowWiseAdagrad, ebc.parameters(), {"lr": 0.01})
    world_size = dist.get_world_size()
    local_size = get_local_size(world_size)
    topology = Topology(world_size=world_size, local_world_size=local_size, compute_device=device.type)
    sharders = get_default_sharders()
    if isinstance(ebc, ManagedCollisionEmbeddingBagCollection):
        # Row-wise is the only type it has, and the planner does not plan that on the CPU.
        sharder = next(each for each in sharders if each.module_type is type(ebc))
        by_table = {name: row_wise(compute_kernel="fused") for name in sharder.shardable_parameters(ebc)}
        sizes = {"world_size": world_size, "local_size": world_size, "device_type": device.type}
        plan = ShardingPlan({"ebc": construct_module_sharding_plan(ebc, by_table, sharder=sharder, **sizes)})
        return DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)
    inner: Any = getattr(ebc, "levels", ebc)
    # Data-parallel tables would have no fused optimizer.
    fused = ParameterConstraints(
        sharding_types=["table_wise", "column_wise", *(["row_wise"] if world_size > 1 else [])],
        compute_kernels=["fused"],
    )
    constraints = {table.name: fused for table in inner.embedding_bag_configs()}
    planner = EmbeddingShardingPlanner(topology=topology, batch_size=batch_size, constraints=constraints)
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    return DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)


def time_embeddings(found: list[Method], workload: Workload, repeats: int, warm_up: int, device: torch.device) -> None:
    batches = [workload.batch(seed).to(device) for seed in range(8)]
    models: list[tuple[Method, DistributedModelParallel, list[KeyedJaggedTensor]]] = []
    for method in found:
        ebc = method.tables()
        model = shard(Pooled(ebc), ebc, workload.batch_size, device)
        models.append((method, model, [method.prepare(batch) for batch in batches]))
    n_ids = batches[0].values().numel()
    for repeat in range(warm_up + repeats):
        for method, model, prepared in models:
            features = _fresh(prepared[repeat % len(prepared)])
            start = now(device)
            pooled = model(features)
            forward = now(device) - start
            pooled.backward(torch.ones_like(pooled))
            both = now(device) - start
            remap = getattr(model.module.ebc, "remap", None)
            if remap is not None:
                features = _fresh(prepared[repeat % len(prepared)])
                start = now(device)
                remap(features)
                if repeat >= warm_up:
                    method.timed("remap_per_id", (now(device) - start) / n_ids)
            if repeat >= warm_up:
                method.timed("forward", forward)
                method.timed("forward_backward", both)


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _fresh(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """Without what a KeyedJaggedTensor has computed and keeps: a batch is new in every step."""
    return KeyedJaggedTensor(features.keys(), features.values(), lengths=features.lengths())


def time_step(found: list[Method], workload: Workload, repeats: int, warm_up: int, device: torch.device) -> None:
    torch.manual_seed(0)
    steps = 10 if device.type == "cuda" else 1  # for each time: a GPU is to run behind the host, as in training
    pipelines: list[tuple[Method, TrainPipelineSparseDist, Iterator[Batch]]] = []
    for method in found:
        ebc: Any = method.tables()
        if isinstance(ebc, ManagedCollisionEmbeddingBagCollection):
            continue  # returns a tuple, which DLRM does not take
        dim = ebc.embedding_bag_configs()[0].embedding_dim
        dlrm = DLRM(ebc, DENSE_FEATURES, [512, 256, dim], [512, 512, 256, 1], dense_device=device)
        model = shard(DLRMTrain(dlrm), ebc, workload.batch_size, device)
        layers = dict(in_backward_optimizer_filter(model.named_parameters()))
        optimizer = CombinedOptimizer(
            [model.fused_optimizer, KeyedOptimizerWrapper(layers, lambda p: torch.optim.Adagrad(p, lr=0.01))]
        )

        def batches(method: Method = method) -> Iterator[Batch]:
            ready = [method.prepare(workload.batch(100 * dist.get_rank() + seed)) for seed in range(8)]
            dense = torch.rand(workload.batch_size, DENSE_FEATURES)
            labels = (torch.rand(workload.batch_size) < 0.3).float()
            made = [Batch(dense, features, labels) for features in ready]
            if device.type == "cuda":
                made = [batch.pin_memory() for batch in made]
            while True:
                for batch in made:
                    yield Batch(batch.dense_features, _fresh(batch.sparse_features), batch.labels)

        pipelines.append((method, TrainPipelineSparseDist(model, optimizer, device), batches()))
    for repeat in range(warm_up + repeats):
        for method, pipeline, iterator in pipelines:
            dist.barrier()
            start = now(device)
            for _ in range(steps):
                pipeline.progress(iterator)
            if repeat >= warm_up:
                method.timed("step", (now(device) - start) / steps)


def _on_rank(rank: int, world_size: int, store: str, allocations: str, job: dict[str, Any], results: str) -> None:
    torch.set_num_threads(job["threads"] or max(1, (os.cpu_count() or 1) // world_size))
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(world_size)
    device = torch.device("cpu")
    if job["device"] == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
    workload = Workload(**job["workload"])
    loaded = {name: Allocation.load(Path(allocations) / f"{i}.lma") for i, name in enumerate(job["allocations"])}
    found = methods(workload, loaded, job["beside"], device)
    if world_size == 1:
        time_embeddings(found, workload, job["repeats"], job["warm_up"], device)
        gc.collect()
    time_step(found, workload, max(5, job["repeats"] // 2), job["warm_up"], device)
    if rank == 0:
        Path(results).write_text(json.dumps({method.name: method.times for method in found}))
    dist.destroy_process_group()


def measure(workload: Workload, allocations: dict[str, Allocation], world_size: int, args: Any) -> list[dict[str, Any]]:
    """A row for each method: minimum and median of each time, and the ratio of both to those of the first method."""
    with tempfile.TemporaryDirectory() as folder:
        for i, allocation in enumerate(allocations.values()):
            allocation.save(Path(folder) / f"{i}.lma")
        job = {
            "workload": vars(workload),
            "allocations": list(allocations),
            "beside": args.beside,
            "repeats": args.repeats,
            "warm_up": args.warm_up,
            "threads": args.threads,
            "device": args.device,
        }
        results = f"{folder}/results.json"
        mp.spawn(_on_rank, (world_size, f"{folder}/store", folder, job, results), nprocs=world_size)
        times = json.loads(Path(results).read_text())
    base = next(iter(times.values()))
    rows = []
    for name, of_method in times.items():
        row: dict[str, Any] = {"tables": name}
        for what, seconds in of_method.items():
            row[what] = {"min": min(seconds), "median": statistics.median(seconds)}
            if what in base:
                row[what] |= {
                    "min_ratio": min(seconds) / min(base[what]),
                    "median_ratio": statistics.median(seconds) / statistics.median(base[what]),
                }
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    header = ["tables", "forward", "", "forward + backward", "", "DLRM step", "", "remap, ns an id"]
    lines = []
    for row in rows:
        line = [row["tables"]]
        for what in ("forward", "forward_backward", "step"):
            if what in row:
                line += [
                    f"{row[what]['min'] * 1e3:.2f} ms",
                    f"{row[what]['min_ratio']:.2f}x / {row[what]['median_ratio']:.2f}x",
                ]
            else:
                line += ["", ""]
        line.append(f"{row['remap_per_id']['min'] * 1e9:.1f}" if "remap_per_id" in row else "")
        lines.append(line)
    return text_table(header, lines)


def id_space(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One memory of 16 MiB for 10^6, 10^8 and 10^10 raw ids, of which 50 batches are counted."""
    rows = []
    for exponent in (6, 8, 10):
        workload = Workload((10**exponent // 26,) * 26, 1, args.batch_size)
        builder = AllocationBuilder(workload.tables(), LMAConfig(memory_bytes=16 << 20, raw_ids=True))
        for seed in range(50):
            builder.update(workload.batch(10_000 + seed))
        args.beside = []
        rows += measure(workload, {f"10^{exponent} ids": builder.build()}, 1, args)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--pooling", nargs="+", type=int, default=[1, 20], help="ids in a bag")
    parser.add_argument("--world-size", nargs="+", type=int, default=[1, 2], help="ranks")
    parser.add_argument("--batch-size", type=int, default=2048, help="rows on each rank")
    parser.add_argument(
        "--data-type", nargs="+", default=["FP16"], help="of LMA weights; the default is that of LMAConfig"
    )
    parser.add_argument(
        "--widths", nargs="+", default=["default"], help="of LMA levels, such as 8,56; the default is that of LMAConfig"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the ranks (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of each rank (default: the cores, shared by the ranks)")
    parser.add_argument("--in-order", action="store_true", help="vocabularies are sorted by frequency")
    parser.add_argument("--raw-ids", action="store_true", help="also LMA tables of raw ids")
    others = ["full", "smaller dim", "hashing trick", "managed collision"]
    parser.add_argument(
        "--beside", nargs="*", choices=others, default=others, help="other tables to time (default: all)"
    )
    parser.add_argument("--id-space", action="store_true", help="only the step as the id space grows at one memory")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.device == "cuda" and torch.cuda.device_count() < max(args.world_size):
        parser.error(f"--device cuda: torch finds {torch.cuda.device_count()} GPUs for {max(args.world_size)} ranks")
    if args.id_space:
        rows = id_space(args)
        print(json.dumps(rows) if args.json else show(rows))
        return
    records = []
    for name in args.workload:
        for pooling in args.pooling:
            workload = Workload(WORKLOADS[name], pooling, args.batch_size // (4 if pooling > 1 else 1), args.in_order)
            allocations = {}
            for data_type, widths, raw_ids in itertools.product(args.data_type, args.widths, {False, args.raw_ids}):
                chosen = None if widths == "default" else tuple(map(int, widths.split(",")))
                config = LMAConfig(compression=COMPRESSION, data_type=data_type, widths=chosen, raw_ids=raw_ids)
                label = " ".join(["LMA", data_type, *([widths] if chosen else []), *(["raw ids"] if raw_ids else [])])
                allocations[label] = build(workload, config)
            for world_size in args.world_size:
                rows = measure(workload, allocations, world_size, args)
                records.append({"workload": name, "pooling": pooling, "world_size": world_size, "rows": rows})
                if not args.json:
                    print(
                        f"\n{name}, pooling {pooling}, batch {workload.batch_size}, {world_size} ranks (min / median)"
                    )
                    for label, allocation in allocations.items():
                        for memory in allocation.memories:
                            levels = ", ".join(f"{level.width} x {level.rows:,}" for level in memory.levels)
                            print(f"{label}: {len(memory.tables)} tables in levels {levels}")
                    print(show(rows), flush=True)
    if args.json:
        print(json.dumps(records))


if __name__ == "__main__":
    main()
