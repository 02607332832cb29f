"""A small model for sharded tests, its plain-torch reference in one process, and how to train both."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torchrec
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.datasets.utils import Batch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import (
    EnumerableShardingSpec,
    ParameterSharding,
    ShardedTensor,
    ShardingPlan,
    ShardMetadata,
)
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_lma import (
    Allocation,
    AllocationBuilder,
    LMAConfig,
    LMAEmbeddingBagCollection,
    LMAEmbeddingBagCollectionSharder,
    get_default_sharders,
)
from torchrec_lma.distributed import level_constraints

# A memory of dim 16 for `a`, `b` and `d`, whose ids are vocabularies, and one of dim 8 for the raw ids of `c`.
# f0 feeds two tables. Some levels are packed, and each has a row for every one of 4 ranks.
TABLES = {"a": (300, 16, ["f0", "f2"]), "b": (200, 16, ["f1", "f0"]), "c": (600, 8, ["f3"]), "d": (9, 16, ["f4"])}
FEATURES = ["f0", "f1", "f2", "f3", "f4"]
SLOTS = {"f0@a": "a", "f2": "a", "f1": "b", "f0@b": "b", "f3": "c", "f4": "d"}  # keys of the output, and their tables
CONFIG = LMAConfig(compression=3.5, widths={16: (2, 2, 4, 8), 8: (2, 2, 4)}, data_type="FP32", skew=0.5, raw_ids=("c",))
BATCH = 6
LR = 0.1
EPS = 1e-8  # FBGEMM's default
CPU = torch.device("cpu")
META = torch.device("meta")


def tables(pooling: str = "SUM") -> list[EmbeddingBagConfig]:
    """`pooling`: of all tables, or "mixed": MEAN of `a` and `d`, SUM of the others."""
    of_table = {name: ("MEAN" if name in "ad" else "SUM") if pooling == "mixed" else pooling for name in TABLES}
    return [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=rows,
            embedding_dim=dim,
            feature_names=list(features),
            pooling=PoolingType[of_table[name]],
        )
        for name, (rows, dim, features) in TABLES.items()
    ]


def features(seed: int, weighted: bool = False, batch: int = BATCH) -> KeyedJaggedTensor:
    """Bags of 0 to 3 ids, frequent, rare, unseen and outside of the vocabulary; those of f3 huge and negative too.

    A feature that no table takes comes first.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (1 + len(FEATURES), batch), generator=generator)
    values = []
    for feature, n in zip(["ignored", *FEATURES], lengths.sum(1).tolist()):
        if feature == "f3":
            frequent = (80 * torch.rand(n, generator=generator)).long() * 7919 - 50
            rare = torch.randint(-(2**62), 2**62, (n,), generator=generator)
            ids = torch.where(torch.rand(n, generator=generator) < 0.15, rare, frequent)
        else:
            ids = ((11 if feature == "f4" else 220) * torch.rand(n, generator=generator) ** 3).long()
        values.append(ids)
    weights = torch.rand(int(lengths.sum()), generator=generator) if weighted else None
    return KeyedJaggedTensor(
        keys=["ignored", *FEATURES], values=torch.cat(values), lengths=lengths.flatten(), weights=weights
    )


def vbe_features(seed: int, weighted: bool, bags_seed: int) -> KeyedJaggedTensor:
    """As `features`, but each feature has its own number of bags and every row of the batch takes one of them."""
    generator = torch.Generator().manual_seed(bags_seed)
    bags = torch.randint(1, BATCH, (len(FEATURES),), generator=generator).tolist()
    whole_batch = features(seed, weighted)
    parts = [whole_batch[feature] for feature in FEATURES]
    ends = [int(part.offsets()[n]) for part, n in zip(parts, bags)]
    return KeyedJaggedTensor(
        keys=list(FEATURES),
        values=torch.cat([part.values()[:end] for part, end in zip(parts, ends)]),
        weights=torch.cat([part.weights()[:end] for part, end in zip(parts, ends)]) if weighted else None,
        lengths=torch.cat([part.lengths()[:n] for part, n in zip(parts, bags)]),
        stride_per_key_per_rank=[[n] for n in bags],
        inverse_indices=(  # in an order of their own, as TorchRec allows
            list(reversed(FEATURES)),
            torch.stack([torch.randint(0, n, (BATCH,), generator=generator) for n in reversed(bags)]),
        ),
    )


def batch(step: int, rank: int, weighted: bool = False, vbe: str = "no") -> Batch:
    """`vbe`: "no", "by step" (all ranks have as many bags) or "by rank"."""
    seed = step * 100 + rank
    generator = torch.Generator().manual_seed(seed)
    if vbe == "no":
        sparse_features = features(seed, weighted)
    else:
        sparse_features = vbe_features(seed, weighted, bags_seed=seed if vbe == "by rank" else step)
    return Batch(
        dense_features=torch.randn(BATCH, 4, generator=generator),
        sparse_features=sparse_features,
        labels=torch.randint(0, 2, (BATCH,), generator=generator).float(),
    )


def build_allocation(seed: int = 0, config: LMAConfig = CONFIG) -> Allocation:
    builder = AllocationBuilder(tables(), dataclasses.replace(config, seed=seed))
    for i in range(20):
        builder.update(features(1000 + i, batch=32))
    allocation = builder.build()
    assert len(allocation.memories) == 2
    assert {level.pack for memory in allocation.memories for level in memory.levels} > {1}
    return allocation


class Model(nn.Module):
    def __init__(self, ebc: nn.Module) -> None:
        super().__init__()
        self.ebc = ebc
        self.over = nn.Linear(sum(TABLES[table][1] for table in SLOTS.values()) + 4, 1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        pooled = self.ebc(batch.sparse_features)
        logits = self.over(torch.cat([batch.dense_features, pooled.values()], 1)).squeeze(-1)
        loss = (logits - batch.labels).pow(2).mean()
        return loss, logits.detach()


def level_shapes(allocation: Allocation) -> dict[str, torch.Size]:
    """Of the TorchRec tables, in order."""
    ebc = LMAEmbeddingBagCollection(tables(), allocation, device=META)
    return {
        table.name: ebc.levels.embedding_bags[table.name].weight.shape for table in ebc.levels.embedding_bag_configs()
    }


def weight_name(table: str) -> str:
    return f"ebc.levels.embedding_bags.{table}.weight"


def initial_state(allocation: Allocation) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    width = sum(TABLES[table][1] for table in SLOTS.values()) + 4
    state = {
        weight_name(name): torch.randn(shape, generator=generator) for name, shape in level_shapes(allocation).items()
    }
    return state | {"over.weight": torch.randn(1, width, generator=generator) * 0.1, "over.bias": torch.zeros(1)}


# --- the reference: one process, plain torch indexing and autograd, optimizers written out -------------------------


def side_by_side(
    rows: Mapping[str, Tensor], weights: Mapping[str, Tensor], widths: Mapping[str, int], dim: int
) -> Tensor:
    """Embeddings, given the rows of ids by level, the weights of those that have some, and widths (else the dim)."""
    columns = []
    for level, of_level in rows.items():
        width = widths.get(level, dim)
        if level in weights:
            values = weights[level].view(-1, width)[of_level.clamp(min=0)]
            columns.append(values * (of_level >= 0).unsqueeze(1))
        else:
            columns.append(torch.zeros(len(of_level), width))
    return torch.cat(columns, 1)


class Reference(nn.Module):
    """Embeddings of ids are the rows of their levels side by side, zeros where they are absent."""

    def __init__(self, allocation: Allocation, pooling: str) -> None:
        super().__init__()
        self.ebc = LMAEmbeddingBagCollection(tables(), allocation)  # for `rows` only
        self.means = {table.name for table in tables(pooling) if table.pooling is PoolingType.MEAN}
        self.widths = {
            memory.level_name(k): level.width for memory in allocation.memories for k, level in enumerate(memory.levels)
        }
        self.weights = nn.ParameterDict()
        state = initial_state(allocation)
        for name in level_shapes(allocation):
            self.weights[name] = nn.Parameter(state[weight_name(name)].clone())
        self.over = nn.Linear(*reversed(state["over.weight"].shape))
        self.over.load_state_dict({"weight": state["over.weight"], "bias": state["over.bias"]})

    def embeddings(self, table: str, ids: Tensor) -> Tensor:
        return side_by_side(self.ebc.rows(table, ids), self.weights, self.widths, TABLES[table][1])

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs = [batch.dense_features]
        for slot, table in SLOTS.items():
            feature = slot.split("@")[0]
            bags = batch.sparse_features[feature]
            vectors = self.embeddings(table, bags.values())
            if bags.weights_or_none() is not None:
                vectors = vectors * bags.weights().unsqueeze(1)
            ends = bags.offsets().tolist()
            pooled = [vectors[start:end].sum(0) for start, end in itertools.pairwise(ends)]
            if table in self.means:
                pooled = [p / max(end - start, 1) for p, start, end in zip(pooled, ends, ends[1:])]
            if batch.sparse_features.variable_stride_per_key():
                names, indices = batch.sparse_features.inverse_indices()
                pooled = [pooled[i] for i in indices[names.index(feature)].tolist()]
            inputs.append(torch.stack(pooled))
        logits = self.over(torch.cat(inputs, 1)).squeeze(-1)
        return (logits - batch.labels).pow(2).mean(), logits.detach()


def optimizer_step(
    name: str, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: float = LR, column_shards: int = 1
) -> None:
    if name == "sgd":
        weight -= lr * gradient
    elif name == "adagrad":
        state["sum"] = state.get("sum", torch.zeros_like(weight)) + gradient**2
        weight -= lr * gradient / (state["sum"].sqrt() + EPS)
    elif name == "rowwise_adagrad":
        # Of each column shard the rows have sums of their own: TorchRec's, for any table.
        square = gradient.view(weight.size(0), column_shards, -1).pow(2).mean(2)
        state["sum"] = state.get("sum", torch.zeros_like(square)) + square
        columns = weight.size(1) // column_shards
        weight -= lr * gradient / (state["sum"].sqrt() + EPS).repeat_interleave(columns, 1)
    elif name == "adam":  # torch.optim.Adam
        state["t"] = state.get("t", torch.zeros(())) + 1
        state["m"] = 0.9 * state.get("m", torch.zeros_like(weight)) + 0.1 * gradient
        state["v"] = 0.999 * state.get("v", torch.zeros_like(weight)) + 0.001 * gradient**2
        m, v = state["m"] / (1 - 0.9 ** state["t"]), state["v"] / (1 - 0.999 ** state["t"])
        weight -= lr * m / (v.sqrt() + 1e-8)
    else:
        raise AssertionError(name)


def train_reference(
    allocation: Allocation,
    world_size: int,
    optimizer: str,
    pooling: str = "SUM",
    weighted: bool = False,
    steps: int = 4,
    vbe: str = "no",
    then: Sequence[Batch] = (),
    column_shards: Mapping[str, int] = {},
    lr_of_step: Callable[[int], float] = lambda step: LR,
    max_norm: float = float("inf"),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, and the optimizer's running sums by table, after training on the batches of all ranks together.

    Sums are [rows, dim], or [rows, column shards] of a row-wise optimizer.

    Args:
        then: batches of more steps, which all ranks take alike.
        column_shards: of each table, 1 where it says nothing. Only a row-wise optimizer sees them.
        max_norm: gradients are clipped to it, all together.
    """
    model = Reference(allocation, pooling)
    states: dict[str, dict[str, Tensor]] = {name: {} for name in model.weights}
    batches = [[batch(step, rank, weighted, vbe) for rank in range(world_size)] for step in range(steps)]
    for step, of_ranks in enumerate([*batches, *([each] for each in then)]):
        model.zero_grad()
        losses = [model(of_rank)[0] for of_rank in of_ranks]
        (sum(losses) / len(losses)).backward()
        lr = lr_of_step(step)
        with torch.no_grad():
            parameters = [*model.weights.values(), *model.over.parameters()]
            norm = torch.cat([parameter.grad.flatten() for parameter in parameters]).norm()
            for parameter in parameters:
                parameter.grad *= min(1.0, max_norm / float(norm))
            for name, weight in model.weights.items():
                optimizer_step(optimizer, weight, weight.grad, states[name], lr, column_shards.get(name, 1))
            for parameter in model.over.parameters():
                parameter -= lr * parameter.grad
    weights = {weight_name(name): weight.detach() for name, weight in model.weights.items()}
    weights |= {f"over.{name}": p.detach() for name, p in model.over.named_parameters()}
    return weights, {name: state["sum"] for name, state in states.items() if "sum" in state}


# --- the system under test ------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
    "adam": torch.optim.Adam,
}


def options(optimizer: str) -> dict[str, float]:
    """The dense RowWiseAdagrad, which data-parallel tables train with, has another default of eps than FBGEMM's."""
    return {"lr": LR} | ({"eps": EPS} if "adagrad" in optimizer else {})


TWO_HOSTS = {"table_row_wise", "table_column_wise", "grid_shard"}


def ranks_for(sharding: str) -> dict[str, int]:
    return {"world_size": 4, "local_world_size": 2} if sharding in TWO_HOSTS else {"world_size": 2}


def column_shards(width: int, most: int) -> int:
    """FBGEMM takes rows of a multiple of 4 columns."""
    return max(1, min(most, width // 4))


def table_column_wise(host: int, local_size: int, kernel: str) -> Callable[..., ParameterSharding]:
    """TorchRec has no plan generator for it: column-wise over the ranks of one host, under its own name."""

    def generate(param: nn.Parameter, *args: Any) -> ParameterSharding:
        ranks = [host * local_size + i for i in range(column_shards(param.size(1), local_size))]
        one = column_wise(ranks=ranks, compute_kernel=kernel)(param, *args)
        return dataclasses.replace(one, sharding_type="table_column_wise")

    return generate


def grid(local_size: int, world_size: int, kernel: str) -> Callable[..., ParameterSharding]:
    """TorchRec's plan generator for grids cuts columns of 128: here each host has as many columns as the others."""

    def generate(param: nn.Parameter, *args: Any) -> ParameterSharding:
        hosts = column_shards(param.size(1), world_size // local_size)
        rows, columns = -(-param.size(0) // local_size), param.size(1) // hosts
        shards = [
            ShardMetadata(
                shard_offsets=[min(i * rows, param.size(0)), host * columns],
                shard_sizes=[max(0, min(rows, param.size(0) - i * rows)), columns],
                placement=f"rank:{host * local_size + i}/cpu",
            )
            for host in range(hosts)
            for i in range(local_size)
        ]
        ranks = list(range(hosts * local_size))
        return ParameterSharding("grid_shard", kernel, ranks, EnumerableShardingSpec(shards))

    return generate


def plan_of(sharding: str, ebc: nn.Module, kernel: str, world_size: int | None = None) -> ShardingPlan:
    """All tables of a collection sharded alike, starting from different ranks where the sharding has an owner."""
    world_size = world_size or dist.get_world_size()
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    hosts = world_size // local_size
    lma = isinstance(ebc, LMAEmbeddingBagCollection)
    sharder: Any = LMAEmbeddingBagCollectionSharder() if lma else EmbeddingBagCollectionSharder()
    params = sharder.shardable_parameters(ebc)

    def column_wise_of(i: int, width: int) -> Any:
        ranks = [(i + j) % world_size for j in range(column_shards(width, world_size))]
        return column_wise(ranks=ranks, compute_kernel=kernel)

    generators: dict[str, Callable[[int, int], Any]] = {
        "table_wise": lambda i, w: table_wise(rank=i % world_size, compute_kernel=kernel),
        "column_wise": column_wise_of,
        "row_wise": lambda i, w: row_wise(compute_kernel=kernel),
        "data_parallel": lambda i, w: data_parallel(),
        "table_row_wise": lambda i, w: table_row_wise(host_index=i % hosts),
        "table_column_wise": lambda i, w: table_column_wise(i % hosts, local_size, kernel),
        "grid_shard": lambda i, w: grid(local_size, world_size, kernel),
        "mixed": lambda i, w: row_wise(compute_kernel=kernel) if i % 2 else column_wise_of(i, w),
    }
    return ShardingPlan(
        {
            "ebc": construct_module_sharding_plan(
                ebc,
                {name: generators[sharding](i, param.size(1)) for i, (name, param) in enumerate(params.items())},
                sharder=sharder,
                local_size=local_size,
                world_size=world_size,
                device_type="cpu",
            )
        }
    )


def planned(model: nn.Module) -> ShardingPlan:
    """TorchRec's own planner's."""
    topology = Topology(
        world_size=dist.get_world_size(), local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]), compute_device="cpu"
    )
    planner = EmbeddingShardingPlanner(topology=topology, constraints=level_constraints(model))
    return planner.collective_plan(model, get_default_sharders(), dist.GroupMember.WORLD)


def build(
    allocation: Allocation,
    sharding: str,
    optimizer: str,
    pooling: str = "SUM",
    weighted: bool = False,
    qcomm: str = "fp32",
) -> tuple[DistributedModelParallel, CombinedOptimizer, ShardingPlan]:
    ebc = LMAEmbeddingBagCollection(tables(pooling), allocation, is_weighted=weighted, device=META)
    model = Model(ebc)
    fused = sharding != "data_parallel" and not sharding.endswith("_dense")
    if fused:
        apply_optimizer_in_backward(OPTIMIZERS[optimizer], ebc.parameters(), options(optimizer))
    if sharding == "planner":
        plan = planned(model)
    else:
        plan = plan_of(sharding.removesuffix("_dense"), ebc, "fused" if fused else "dense")
    registry = get_qcomm_codecs_registry(QCommsConfig(CommType(qcomm), CommType(qcomm)), device=CPU)
    sharders = [LMAEmbeddingBagCollectionSharder(qcomm_codecs_registry=registry)]
    dmp = DistributedModelParallel(model, device=CPU, plan=plan, sharders=sharders)
    dmp.load_state_dict(initial_state(allocation), strict=False)
    return dmp, optimizer_of(dmp, optimizer), plan


def optimizer_of(dmp: DistributedModelParallel, optimizer: str) -> CombinedOptimizer:
    parameters = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    over = {name: p for name, p in parameters.items() if "over" in name}
    levels = {name: p for name, p in parameters.items() if "over" not in name}
    optimizers: list[Any] = [
        dmp.fused_optimizer,
        KeyedOptimizerWrapper(over, lambda p: torch.optim.SGD(p, lr=LR)),
    ]
    if levels:
        optimizers.append(KeyedOptimizerWrapper(levels, lambda p: OPTIMIZERS[optimizer](p, **options(optimizer))))
    return CombinedOptimizer(optimizers)


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state_dict, sharded ones gathered on rank 0 (zeros elsewhere)."""
    result = {}
    for name, value in state.items():
        if isinstance(value, ShardedTensor):
            result[name] = torch.zeros(value.size(), dtype=value.dtype)
            value.gather(0, result[name] if dist.get_rank() == 0 else None)
        elif isinstance(value, Tensor):
            result[name] = value.detach().clone()
    return result


# Of each table's weight: (offsets, values) of shards.
Sums = dict[str, list[tuple[list[int], Tensor]]]


@dataclass
class Trained:
    """What one rank has after training.

    Attributes:
        weights: whole, on rank 0.
        sums: this rank's shards of the optimizer's running sums.
        pipelined: names of the modules that TrainPipelineSparseDist pipelined.
        types: sharding types of the tables that have one; a table not in it is data-parallel.
        column_shards: of each table.
    """

    weights: dict[str, Tensor]
    sums: Sums
    pipelined: list[str]
    types: dict[str, str]
    column_shards: dict[str, int]


def train_sharded(
    allocation: Allocation,
    sharding: str,
    optimizer: str,
    pooling: str = "SUM",
    weighted: bool = False,
    steps: int = 4,
    pipeline: bool = False,
    vbe: str = "no",
    qcomm: str = "fp32",
) -> Trained:
    dmp, optim, plan = build(allocation, sharding, optimizer, pooling, weighted, qcomm)
    batches = [batch(step, dist.get_rank(), weighted, vbe) for step in range(steps)]
    pipelined = train(dmp, optim, batches, pipeline)
    # Shard by shard: a table-wise state exists on its owner alone, and gathering is a collective.
    sums: Sums = {
        name: [(shard.metadata.shard_offsets, shard.tensor) for shard in value.local_shards()]
        for name, states in optim.state_dict()["state"].items()
        for key, value in states.items()
        if isinstance(value, ShardedTensor) and key.endswith("momentum1")
    }
    specs = {name: one.sharding_spec for name, one in plan.plan["ebc"].items()}
    return Trained(
        weights=whole(dmp.state_dict()),
        sums=sums,
        pipelined=pipelined,
        types={name: one.sharding_type for name, one in plan.plan["ebc"].items() if specs[name] is not None},
        column_shards={
            name: len({shard.shard_offsets[1] for shard in spec.shards}) for name, spec in specs.items() if spec
        },
    )


def train(dmp: DistributedModelParallel, optim: CombinedOptimizer, batches: list[Batch], pipeline: bool) -> list[str]:
    """Returns the names of the modules that TrainPipelineSparseDist pipelined."""
    if not pipeline:
        for step_batch in batches:
            optim.zero_grad()
            dmp(step_batch)[0].backward()
            optim.step()
        return []
    train_pipeline = TrainPipelineSparseDist(dmp, optim, CPU)
    iterator = iter(batches)
    for _ in batches:
        train_pipeline.progress(iterator)
    return [module.forward.name for module in train_pipeline._pipelined_modules]


def assert_sums_close(ranks: Sequence[Trained], expected: dict[str, Tensor]) -> None:
    """The ranks' shards together are the whole running sums of each table that is not data-parallel."""
    for table, sums in expected.items():
        if table not in ranks[0].types:
            continue
        by_row = sums.dim() == 2 and sums.size(1) == ranks[0].column_shards[table]
        # The rows of one column shard, then those of the next: how TorchRec lays row-wise state out.
        expected_sums = sums.t().flatten() if by_row else sums
        found = torch.full_like(expected_sums, torch.nan)
        for of_rank in ranks:
            for offsets, values in of_rank.sums.get(weight_name(table), []):
                places = tuple(slice(start, start + size) for start, size in zip(offsets, values.size()))
                found[places] = values
        torch.testing.assert_close(found, expected_sums, rtol=1e-4, atol=1e-6, msg=lambda m, t=table: f"{t}: {m}")


def assert_close(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
