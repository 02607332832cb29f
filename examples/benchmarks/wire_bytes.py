"""Bytes that a training step gives to the collectives, for LMA and full tables under every sharding type.

Counts, on gloo processes of this machine, what each rank hands to torch.distributed in the input dist (ids or rows,
lengths, and their split sizes), the output dist, and the backward pass; summed over ranks. The same features, dims and
batches for both: ids of full tables are int64, rows of levels int32, lengths int32. LMA's allocation is built from the
ids' frequencies, which follow Zipf's law, as those of the batches do. What makes up the input is counted by itself.

    python examples/benchmarks/wire_bytes.py          # both workloads at pooling 1 and 20, 4 ranks on 2 hosts
    python examples/benchmarks/wire_bytes.py --workload equal --pooling 1 --qcomm fp16
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from speed import CRITEO_KAGGLE, Workload, build
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
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

from torchrec_lma import Allocation, LMAConfig, LMAEmbeddingBagCollection, LMAEmbeddingBagCollectionSharder
from torchrec_lma.text_table import text_table

# Data-parallel sharding sends no ids and no embeddings, only gradients, and that is DDP's.
ROW_TYPES = ("row_wise", "table_row_wise", "grid_shard")
SHARDING_TYPES = ("table_wise", "column_wise", "table_column_wise", *ROW_TYPES)
# Full tables must fit in memory: the published sizes over this, small ones and large ones alike.
DIVISOR = 40
SIZES = {"criteo": tuple(max(2, size // DIVISOR) for size in CRITEO_KAGGLE), "equal": (385_000 // DIVISOR,) * 26}
META = torch.device("meta")


@dataclass(frozen=True)
class Sent:
    """Bytes given to the collectives of one step, by one rank or all together."""

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


def column_shards(width: int) -> int:
    """In two where FBGEMM takes the halves, for full tables and levels alike."""
    return 2 if width % 8 == 0 else 1


def plan_for(sharding_type: str, index: int, rows: int, local_size: int) -> Callable[..., ParameterSharding]:
    """How table `index` is spread; one of few rows has one owner under row-wise types."""
    world_size = dist.get_world_size()
    hosts = world_size // local_size
    host = index % hosts

    def by_column(param: Tensor, *args: Any) -> ParameterSharding:
        ranks = [(index + i) % world_size for i in range(column_shards(param.size(1)))]
        return column_wise(ranks=ranks, compute_kernel="fused")(param, *args)

    def table_column_wise(param: Tensor, *args: Any) -> ParameterSharding:
        ranks = [host * local_size + i for i in range(column_shards(param.size(1)))]
        on_host = column_wise(ranks=ranks, compute_kernel="fused")(param, *args)
        return replace(on_host, sharding_type=ShardingType.TABLE_COLUMN_WISE.value)

    def grid(param: Tensor, *args: Any) -> ParameterSharding:
        on_hosts = column_shards(param.size(1))
        rows, columns = -(-param.size(0) // local_size), param.size(1) // on_hosts
        shards = [
            ShardMetadata(
                shard_offsets=[i * rows, h * columns],
                shard_sizes=[min(rows, param.size(0) - i * rows), columns],
                placement=f"rank:{h * local_size + i}/cpu",
            )
            for h in range(on_hosts)
            for i in range(local_size)
        ]
        return ParameterSharding(
            sharding_type=ShardingType.GRID_SHARD.value,
            compute_kernel=EmbeddingComputeKernel.FUSED.value,
            ranks=list(range(on_hosts * local_size)),
            sharding_spec=EnumerableShardingSpec(shards),
        )

    owner = table_wise(rank=index % world_size, compute_kernel="fused")
    if sharding_type in ROW_TYPES and rows < world_size**2:  # some ranks would have no row of it
        return owner
    return {
        "table_wise": owner,
        "column_wise": by_column,
        "table_column_wise": table_column_wise,
        "row_wise": row_wise(compute_kernel="fused"),
        "table_row_wise": table_row_wise(host_index=host),
        "grid_shard": grid,
    }[sharding_type]


def step(
    workload: Workload, allocation: Allocation | None, sharding_type: str, local_size: int, qcomm: str = "fp32"
) -> Sent:
    """What this rank sends in a step of LMA tables, or of full ones without an allocation."""
    registry = None
    if qcomm != "fp32":
        precision = CommType(qcomm)
        registry = get_qcomm_codecs_registry(
            QCommsConfig(forward_precision=precision, backward_precision=precision), device=torch.device("cpu")
        )
    ebc: nn.Module
    sharder: Any
    if allocation is None:
        ebc = EmbeddingBagCollection(workload.tables(), device=META)
        sharder = EmbeddingBagCollectionSharder(qcomm_codecs_registry=registry)
    else:
        ebc = LMAEmbeddingBagCollection(workload.tables(), allocation, device=META)
        sharder = LMAEmbeddingBagCollectionSharder(qcomm_codecs_registry=registry)
    apply_optimizer_in_backward(torch.optim.SGD, ebc.parameters(), {"lr": 0.1})
    plan = construct_module_sharding_plan(
        ebc,
        {
            name: plan_for(sharding_type, i, param.size(0), local_size)
            for i, (name, param) in enumerate(sharder.shardable_parameters(ebc).items())
        },
        sharder=sharder,
        local_size=local_size,
        world_size=dist.get_world_size(),
        device_type="cpu",
    )
    env = ShardingEnv.from_process_group(dist.GroupMember.WORLD)
    sharded = sharder.shard(ebc, plan, env, torch.device("cpu"))
    batch = workload.batch(dist.get_rank())
    sharded(batch).wait()  # the first batch sets up the dists
    with counted_bytes() as take:
        context = sharded.create_context()
        dist_input = sharded.input_dist(context, batch).wait().wait()
        sent_input = take()
        pooled = sharded.compute_and_output_dist(context, dist_input).wait().values()
        sent_output = take()
        pooled.sum().backward()
        return Sent(sent_input, sent_output, take())


@dataclass(frozen=True)
class Parts:
    """What an id of a batch takes on the wire where each key has one owner, in bytes, and where it comes from."""

    keys: int  # of the batch, for all features together
    rows: float  # bytes of ids or rows, for each id
    lengths: float  # bytes of lengths, for each id

    @classmethod
    def of(cls, batch: KeyedJaggedTensor, ids: int) -> "Parts":
        return cls(len(batch.keys()), batch.values().nbytes / ids, batch.lengths().nbytes / ids)


def parts(workload: Workload, allocation: Allocation) -> dict[str, Parts]:
    """Of full tables, and of each level of LMA tables."""
    batch = workload.batch(0)
    ids = batch.values().numel()
    remap = LMAEmbeddingBagCollection(workload.tables(), allocation, device=META).remap
    rows = remap(batch)
    result = {"full tables": Parts.of(batch, ids)}
    of_part: dict[str, list[int]] = {}
    for i, key in enumerate(rows.keys()):
        of_part.setdefault(f"level {key.split('/')[2]}", []).append(i)
    for name, members in of_part.items():
        result[name] = Parts.of(rows.permute(members), ids)
    return result


def _on_rank(
    rank: int,
    world_size: int,
    store: str,
    cases: Sequence[tuple[Workload, Allocation]],
    args: argparse.Namespace,
    results: str,
) -> None:
    torch.set_num_threads(1)
    local_size = args.local_size
    os.environ |= {"LOCAL_WORLD_SIZE": str(local_size), "LOCAL_RANK": str(rank % local_size), "RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    found = []
    for workload, allocation in cases:
        rows = []
        for sharding_type in args.sharding:
            if args.qcomm == "int8" and sharding_type in ROW_TYPES:
                continue  # TorchRec's INT8 codec does not take a reduce-scatter
            for name, given in (("full", None), ("LMA", allocation)):
                ranks: list[Any] = [None] * world_size
                dist.all_gather_object(ranks, step(workload, given, sharding_type, local_size, args.qcomm))
                total = Sent(*(sum(getattr(r, name) for r in ranks) for name in ("input", "output", "backward")))
                rows.append({"sharding_type": sharding_type, "tables": name, **asdict(total)})
        found.append(rows)
    if rank == 0:
        Path(results).write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--pooling", nargs="+", type=int, default=[1, 20], help="ids in each bag")
    parser.add_argument("--sharding", nargs="+", choices=SHARDING_TYPES, default=list(SHARDING_TYPES))
    parser.add_argument("--batch-size", type=int, default=256, help="of one rank (default: %(default)s)")
    parser.add_argument("--compression", type=float, default=16, help="of LMA (default: %(default)s)")
    parser.add_argument("--world-size", type=int, default=4)
    parser.add_argument("--local-size", type=int, default=2, help="ranks of a host, at least 2")
    parser.add_argument("--qcomm", choices=["fp32", "fp16", "bf16", "int8"], default="fp32", help="output and backward")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    cases = []
    for name in args.workload:
        for pooling in args.pooling:
            workload = Workload(SIZES[name], pooling, args.batch_size)
            cases.append((workload, build(workload, LMAConfig(compression=args.compression))))
    with tempfile.TemporaryDirectory() as folder:
        results = f"{folder}/results.json"
        mp.spawn(_on_rank, (args.world_size, f"{folder}/store", cases, args, results), nprocs=args.world_size)
        found = json.loads(Path(results).read_text())
    names = [(name, pooling) for name in args.workload for pooling in args.pooling]
    of_case = [parts(*case) for case in cases]
    if args.json:
        record = [
            {"workload": name, "pooling": pooling, "rows": rows, "parts": {k: asdict(v) for k, v in pieces.items()}}
            for (name, pooling), rows, pieces in zip(names, found, of_case)
        ]
        print(json.dumps({"arguments": vars(args), "cases": record}))
        return
    for (name, pooling), (workload, allocation), rows, pieces in zip(names, cases, found, of_case):
        print(
            f"\n{name}: {len(workload.sizes)} tables of {min(workload.sizes):,} to {max(workload.sizes):,} rows of dim "
            f"64, {pooling} ids a bag, batch {args.batch_size} on each of {args.world_size} ranks "
            f"({args.local_size} on a host), {args.qcomm}; levels of "
            + ", ".join(str(tuple(level.width for level in memory.levels)) for memory in allocation.memories)
            + " columns"
        )
        full = {row["sharding_type"]: row for row in rows if row["tables"] == "full"}
        print(
            text_table(
                ["KB in one step, all ranks", "tables", "input", "x full", "output", "backward"],
                [
                    [
                        row["sharding_type"],
                        row["tables"],
                        f"{row['input'] / 1e3:.1f}",
                        f"{row['input'] / full[row['sharding_type']]['input']:.2f}",
                        f"{row['output'] / 1e3:.1f}",
                        f"{row['backward'] / 1e3:.1f}",
                    ]
                    for row in rows
                ],
                left=2,
            )
        )
        print(
            text_table(
                ["bytes for each id of a batch", "keys", "ids or rows", "lengths"],
                [[k, str(part.keys), f"{part.rows:.2f}", f"{part.lengths:.2f}"] for k, part in pieces.items()],
            )
        )


if __name__ == "__main__":
    main()
