"""Bytes that a training step gives to the collectives, for LMA and full tables under every sharding type.

Counts, on gloo processes of this machine, what each rank hands to torch.distributed in the input dist (ids, lengths and
their split sizes), the output dist, and the backward pass; summed over ranks. The same features, dims and batches for
both. Row-wise types are counted with raw ids, with addresses, and with what `row_wise_input="auto"` chooses.

    python examples/benchmarks/wire_bytes.py                  # 4 ranks on 2 hosts
    python examples/benchmarks/wire_bytes.py --chunk-dim 32   # fewer chunks than ranks: addresses are cheaper
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import (
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingEnv,
    ShardingType,
    ShardMetadata,
)
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_lma import LMAConfig, LMAEmbeddingBagCollection, LMAEmbeddingBagCollectionSharder
from torchrec_lma.distributed.specs import RowWiseInput
from torchrec_lma.text_table import text_table

ROW_TYPES = ("row_wise", "table_row_wise", "grid_shard")
# Data-parallel sharding sends no ids and no embeddings, only gradients, and that is DDP's.
SHARDING_TYPES = ("table_wise", "column_wise", "table_column_wise", *ROW_TYPES)


@dataclass(frozen=True)
class Workload:
    """One embedding dim, so LMA has one memory, which every sharding type spreads as it does the full tables."""

    features: int = 8
    ids_per_bag: int = 1
    batch_size: int = 256
    dim: int = 64
    chunk_dim: int = 8
    num_embeddings: int = 10_000
    compression: float = 16
    qcomm: str = "fp32"

    def tables(self) -> list[EmbeddingBagConfig]:
        return [
            EmbeddingBagConfig(
                name=f"t{i}", num_embeddings=self.num_embeddings, embedding_dim=self.dim, feature_names=[f"f{i}"]
            )
            for i in range(self.features)
        ]

    def batch(self, rank: int) -> KeyedJaggedTensor:
        bags = self.features * self.batch_size
        generator = torch.Generator().manual_seed(rank)
        return KeyedJaggedTensor(
            keys=[f"f{i}" for i in range(self.features)],
            values=torch.randint(0, self.num_embeddings, (bags * self.ids_per_bag,), generator=generator),
            lengths=torch.full((bags,), self.ids_per_bag, dtype=torch.int32),
        )


@dataclass(frozen=True)
class Sent:
    """Bytes that one rank, or all together, gave to the collectives of one step."""

    input: int
    output: int
    backward: int


@contextmanager
def counted_bytes() -> Iterator[Callable[[], int]]:
    """Yields a function that tells the bytes given to torch.distributed's collectives since it was last called."""
    total = 0
    input_argument = {
        "all_to_all_single": 1,
        "reduce_scatter": 1,
        "reduce_scatter_tensor": 1,
        "all_gather": 1,
        "all_gather_into_tensor": 1,
        "all_reduce": 0,
    }
    originals = {name: getattr(dist, name) for name in input_argument}

    def counting(name: str) -> Callable[..., Any]:
        position = input_argument[name]

        def collective(*args: Any, **kwargs: Any) -> Any:
            nonlocal total
            given = kwargs["input"] if "input" in kwargs else args[position]
            total += sum(t.numel() * t.element_size() for t in (given if isinstance(given, list) else [given]))
            return originals[name](*args, **kwargs)

        return collective

    def take() -> int:
        nonlocal total
        counted, total = total, 0
        return counted

    for name in input_argument:
        setattr(dist, name, counting(name))
    try:
        yield take
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def plan_for(sharding_type: str, index: int, local_size: int) -> Callable[..., ParameterSharding]:
    """How table `index` is spread. Column-wise types cut in two, so that both kinds of tables are cut alike."""
    world_size = dist.get_world_size()
    hosts = world_size // local_size
    host = index % hosts

    def table_column_wise(*args: Any) -> ParameterSharding:
        on_host = column_wise(ranks=[host * local_size, host * local_size + 1], compute_kernel="fused")(*args)
        return replace(on_host, sharding_type=ShardingType.TABLE_COLUMN_WISE.value)

    def grid(param: Tensor, *args: Any) -> ParameterSharding:
        rows, cols = -(-param.size(0) // local_size), param.size(1) // hosts
        shards = [
            ShardMetadata(
                shard_offsets=[i * rows, h * cols],
                shard_sizes=[min(rows, param.size(0) - i * rows), cols],
                placement=f"rank:{h * local_size + i}/cpu",
            )
            for h in range(hosts)
            for i in range(local_size)
        ]
        return ParameterSharding(
            sharding_type=ShardingType.GRID_SHARD.value,
            compute_kernel=EmbeddingComputeKernel.FUSED.value,
            ranks=list(range(world_size)),
            sharding_spec=EnumerableShardingSpec(shards),
        )

    return {
        "table_wise": table_wise(rank=index % world_size, compute_kernel="fused"),
        "column_wise": column_wise(ranks=[index % world_size, (index + 1) % world_size], compute_kernel="fused"),
        "table_column_wise": table_column_wise,
        "row_wise": row_wise(compute_kernel="fused"),
        "table_row_wise": table_row_wise(host_index=host),
        "grid_shard": grid,
    }[sharding_type]


def step(workload: Workload, sharding_type: str, row_wise_input: RowWiseInput | None, local_size: int) -> Sent:
    """What this rank sends in a step of LMA memories, or of full tables where `row_wise_input` is None."""
    registry = None
    if workload.qcomm != "fp32":
        precision = CommType(workload.qcomm)
        registry = get_qcomm_codecs_registry(
            QCommsConfig(forward_precision=precision, backward_precision=precision), device=torch.device("cpu")
        )
    sharder: Any
    ebc: EmbeddingBagCollection
    if row_wise_input is None:
        ebc = EmbeddingBagCollection(tables=workload.tables())
        sharder = EmbeddingBagCollectionSharder(qcomm_codecs_registry=registry)
    else:
        ebc = LMAEmbeddingBagCollection(
            workload.tables(), LMAConfig(compression=workload.compression, chunk_dim=workload.chunk_dim)
        )
        sharder = LMAEmbeddingBagCollectionSharder(qcomm_codecs_registry=registry, row_wise_input=row_wise_input)
    apply_optimizer_in_backward(torch.optim.SGD, ebc.parameters(), {"lr": 0.1})
    plan = construct_module_sharding_plan(
        ebc,
        {c.name: plan_for(sharding_type, i, local_size) for i, c in enumerate(ebc.embedding_bag_configs())},
        sharder=sharder,
        local_size=local_size,
        world_size=dist.get_world_size(),
        device_type="cpu",
    )
    env = ShardingEnv.from_process_group(dist.GroupMember.WORLD)
    sharded = sharder.shard(ebc, plan, env, torch.device("cpu"))
    sharded(workload.batch(dist.get_rank()))  # the first batch sets up the dists
    with counted_bytes() as take:
        context = sharded.create_context()
        dist_input = sharded.input_dist(context, workload.batch(dist.get_rank())).wait().wait()
        sent_input = take()
        pooled = sharded.compute_and_output_dist(context, dist_input).wait().values()
        sent_output = take()
        pooled.sum().backward()
        return Sent(sent_input, sent_output, take())


def _on_rank(rank: int, world_size: int, local_size: int, store: str, workload: Workload, results: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_WORLD_SIZE": str(local_size), "LOCAL_RANK": str(rank % local_size), "RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    rows = []
    for sharding_type in SHARDING_TYPES:
        if workload.qcomm == "int8" and sharding_type in ROW_TYPES:
            continue  # TorchRec's INT8 codec does not take a reduce-scatter
        kinds: list[RowWiseInput | None] = [None, "auto"]
        if sharding_type in ROW_TYPES:
            kinds += ["ids", "addresses"]
        for kind in kinds:
            ranks: list[Any] = [None] * world_size
            dist.all_gather_object(ranks, step(workload, sharding_type, kind, local_size))
            total = Sent(*(sum(getattr(r, name) for r in ranks) for name in ("input", "output", "backward")))
            rows.append({"sharding_type": sharding_type, "tables": kind or "full", **asdict(total)})
    if rank == 0:
        with open(results, "w") as file:
            json.dump(rows, file)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, default=4)
    parser.add_argument("--local-size", type=int, default=2, help="ranks of a host, at least 2")
    for name in ("features", "ids_per_bag", "batch_size", "dim", "chunk_dim"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Workload, name))
    parser.add_argument("--qcomm", choices=["fp32", "fp16", "bf16", "int8"], default="fp32", help="output and backward")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    workload = Workload(args.features, args.ids_per_bag, args.batch_size, args.dim, args.chunk_dim, qcomm=args.qcomm)
    with tempfile.TemporaryDirectory() as folder:
        results = f"{folder}/results.json"
        mp.spawn(
            _on_rank,
            (args.world_size, args.local_size, f"{folder}/store", workload, results),
            nprocs=args.world_size,
        )
        with open(results) as file:
            rows = json.load(file)
    if args.json:
        print(json.dumps({**vars(args), "rows": rows}))
        return
    full = {row["sharding_type"]: row for row in rows if row["tables"] == "full"}
    print(
        f"KB given to the collectives in one step, all {args.world_size} ranks together ({args.local_size} on a host); "
        f"{args.features} features, {args.ids_per_bag} ids a bag, batch {args.batch_size}, dim {args.dim}, "
        f"{args.dim // args.chunk_dim} chunks, {args.qcomm}"
    )
    print(
        text_table(
            ["sharding", "tables", "input", "x full", "output", "backward"],
            [
                [
                    row["sharding_type"],
                    "full" if row["tables"] == "full" else f"LMA {row['tables']}",
                    f"{row['input'] / 1e3:.1f}",
                    f"{row['input'] / max(full[row['sharding_type']]['input'], 1):.2f}",
                    f"{row['output'] / 1e3:.1f}",
                    f"{row['backward'] / 1e3:.1f}",
                ]
                for row in rows
            ],
            left=2,
        )
    )


if __name__ == "__main__":
    main()
