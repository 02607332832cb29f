"""A small model of unpooled embeddings for sharded tests, its plain-torch reference, and how to train both."""

from collections.abc import Mapping, Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingConfig
from torchrec.datasets.utils import Batch
from torchrec.distributed.embedding_types import BaseEmbeddingSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardedTensor, ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.sparse.jagged_tensor import JaggedTensor

from support.sharded_model import (
    BATCH,
    CPU,
    LR,
    META,
    OPTIMIZERS,
    TABLES,
    Sums,
    Trained,
    batch,
    column_shards,
    features,
    optimizer_of,
    optimizer_step,
    options,
    planned,
    side_by_side,
    train,
    whole,
)
from torchrec_lma import (
    Allocation,
    AllocationBuilder,
    LMAConfig,
    LMAEmbeddingCollection,
    LMAEmbeddingCollectionSharder,
)

DIM = 16
# The tables of sharded_model, all of one dim: `c` has raw ids, f0 feeds two tables.
CONFIG = LMAConfig(compression=3.5, widths=(2, 2, 4, 8), data_type="FP32", skew=0.5, raw_ids=("c",))
SLOTS = {"f0@a": "a", "f2": "a", "f1": "b", "f0@b": "b", "f3": "c", "f4": "d"}  # keys of the output, and their tables


def tables() -> list[EmbeddingConfig]:
    return [
        EmbeddingConfig(name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=list(names))
        for name, (rows, _, names) in TABLES.items()
    ]


@cache
def build_allocation(seed: int = 0, data_type: str | None = "FP32") -> Allocation:
    config = LMAConfig(**{**CONFIG.to_dict(), "seed": seed, "data_type": data_type})
    builder = AllocationBuilder(tables(), config)
    for i in range(20):
        builder.update(features(1000 + i, batch=32))
    allocation = builder.build()
    assert len(allocation.memories) == 2
    assert {level.pack for memory in allocation.memories for level in memory.levels} == {1, 2}
    return allocation


class Head(nn.Module):
    """Logits of the sums over each sequence of its vectors, weighted by their places: who is where matters."""

    def __init__(self) -> None:
        super().__init__()
        self.over = nn.Linear(len(SLOTS) * DIM + 4, 1)

    def forward(self, batch: Batch, found: Mapping[str, JaggedTensor]) -> tuple[Tensor, Tensor]:
        inputs = [batch.dense_features]
        for slot in SLOTS:
            padded = found[slot].to_padded_dense(4)  # [B, 4, dim]
            inputs.append((padded * torch.arange(1.0, 5).view(1, 4, 1)).sum(1))
        logits = self.over(torch.cat(inputs, 1)).squeeze(-1)
        return (logits - batch.labels).pow(2).mean(), logits.detach()


class Model(nn.Module):
    def __init__(self, ec: nn.Module) -> None:
        super().__init__()
        self.ec = ec
        self.head = Head()

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.head(batch, self.ec(batch.sparse_features))


def level_shapes(allocation: Allocation) -> dict[str, torch.Size]:
    """Of the TorchRec tables, in order."""
    stored = LMAEmbeddingCollection(tables(), allocation, device=META).stored_tables()
    return {name: table.weight.shape for name, table in stored.items()}


def weight_name(table: str, shape: torch.Size) -> str:
    return f"ec.levels.{shape[1]}.embeddings.{table}.weight"


def initial_state(allocation: Allocation) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    state = {
        weight_name(name, shape): torch.randn(shape, generator=generator)
        for name, shape in level_shapes(allocation).items()
    }
    over = torch.randn(1, len(SLOTS) * DIM + 4, generator=generator) * 0.03
    return state | {"head.over.weight": over, "head.over.bias": torch.zeros(1)}


class Reference(nn.Module):
    """Vectors of ids are the rows of their levels side by side, zeros where they are absent."""

    def __init__(self, allocation: Allocation) -> None:
        super().__init__()
        self.ec = LMAEmbeddingCollection(tables(), allocation)  # for `rows` only
        self.widths = {m.level_name(k): level.width for m in allocation.memories for k, level in enumerate(m.levels)}
        self.shapes = level_shapes(allocation)
        state = initial_state(allocation)
        self.weights = nn.ParameterDict(
            {name: nn.Parameter(state[weight_name(name, shape)].clone()) for name, shape in self.shapes.items()}
        )
        self.head = Head()
        self.head.load_state_dict({name: state[f"head.{name}"] for name in ("over.weight", "over.bias")})

    def vectors(self, table: str, ids: Tensor) -> Tensor:
        return side_by_side(self.ec.rows(table, ids), self.weights, self.widths, DIM)

    def sequences(self, batch: Batch) -> dict[str, JaggedTensor]:
        found = {}
        for slot, table in SLOTS.items():
            of_feature = batch.sparse_features[slot.split("@")[0]]
            found[slot] = JaggedTensor(self.vectors(table, of_feature.values()), lengths=of_feature.lengths())
        return found

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.head(batch, self.sequences(batch))


def train_reference(
    allocation: Allocation,
    world_size: int,
    optimizer: str,
    steps: int = 3,
    then: Sequence[Batch] = (),
    column_shards: Mapping[str, int] = {},
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, and the optimizer's running sums by table, after training on the batches of all ranks together.

    `then`: batches of more steps, which all ranks take alike.
    """
    model = Reference(allocation)
    states: dict[str, dict[str, Tensor]] = {name: {} for name in model.weights}
    batches = [[batch(step, rank) for rank in range(world_size)] for step in range(steps)]
    for of_ranks in [*batches, *([each] for each in then)]:
        model.zero_grad()
        losses = [model(of_rank)[0] for of_rank in of_ranks]
        (sum(losses) / len(losses)).backward()
        with torch.no_grad():
            for name, weight in model.weights.items():
                optimizer_step(optimizer, weight, weight.grad, states[name], LR, column_shards.get(name, 1))
            for parameter in model.head.parameters():
                parameter -= LR * parameter.grad
    weights = {weight_name(name, weight.shape): weight.detach() for name, weight in model.weights.items()}
    weights |= {f"head.{name}": p.detach() for name, p in model.head.named_parameters()}
    return weights, {name: state["sum"] for name, state in states.items() if "sum" in state}


def plan_of(sharding: str, ec: nn.Module, sharder: BaseEmbeddingSharder) -> ShardingPlan:
    """All tables sharded alike, from different ranks on where they have an owner; "replicated" ones are in no plan."""
    if sharding == "replicated":
        return ShardingPlan({})
    kernel, world_size = "fused", dist.get_world_size()

    def of_table(i: int, width: int):
        if sharding == "mixed":
            return [row_wise(compute_kernel=kernel), table_wise(rank=i % world_size, compute_kernel=kernel)][i % 2]
        if sharding == "column_wise":
            ranks = [(i + j) % world_size for j in range(column_shards(width, world_size))]
            return column_wise(ranks=ranks, compute_kernel=kernel)
        if sharding == "table_wise":
            return table_wise(rank=i % world_size, compute_kernel=kernel)
        return row_wise(compute_kernel=kernel) if sharding == "row_wise" else data_parallel()  # which is refused

    parameters = sharder.shardable_parameters(ec)
    return ShardingPlan(
        {
            "ec": construct_module_sharding_plan(
                ec,
                {name: of_table(i, parameter.size(1)) for i, (name, parameter) in enumerate(parameters.items())},
                sharder=sharder,
                local_size=world_size,
                world_size=world_size,
                device_type="cpu",
            )
        }
    )


def build(
    allocation: Allocation, sharding: str, optimizer: str, qcomm: str = "fp32", need_indices: bool = False
) -> tuple[DistributedModelParallel, CombinedOptimizer, ShardingPlan]:
    ec = LMAEmbeddingCollection(tables(), allocation, need_indices, META)
    model = Model(ec)
    if sharding != "replicated":
        apply_optimizer_in_backward(OPTIMIZERS[optimizer], ec.parameters(), options(optimizer))
    registry = get_qcomm_codecs_registry(QCommsConfig(CommType(qcomm), CommType(qcomm)), device=CPU)
    sharder = LMAEmbeddingCollectionSharder(qcomm_codecs_registry=registry)
    plan = planned(model) if sharding == "planner" else plan_of(sharding, ec, sharder)
    dmp = DistributedModelParallel(model, device=CPU, plan=plan, sharders=[sharder])
    dmp.load_state_dict(initial_state(allocation), strict=False)
    return dmp, optimizer_of(dmp, optimizer), plan


def train_sharded(
    allocation: Allocation, sharding: str, optimizer: str, pipeline: bool = False, steps: int = 3
) -> Trained:
    dmp, optim, plan = build(allocation, sharding, optimizer)
    pipelined = train(dmp, optim, [batch(step, dist.get_rank()) for step in range(steps)], pipeline)
    sums: Sums = {
        name.split(".")[-2]: [(shard.metadata.shard_offsets, shard.tensor) for shard in value.local_shards()]
        for name, states in optim.state_dict()["state"].items()
        for key, value in states.items()
        if isinstance(value, ShardedTensor) and key.endswith("momentum1")
    }
    specs = {name: one.sharding_spec for name, one in plan.plan.get("ec", {}).items()}
    return Trained(
        weights=whole(dmp.state_dict()),
        sums=sums,
        pipelined=pipelined,
        types={name: one.sharding_type for name, one in plan.plan.get("ec", {}).items() if specs[name] is not None},
        column_shards={
            name: len({shard.shard_offsets[1] for shard in spec.shards}) for name, spec in specs.items() if spec
        },
    )


assert BATCH > 4
