"""A small model for sharded tests, its plain-torch reference in one process, and how to train both."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torchrec
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.datasets.utils import Batch
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ParameterSharding, ShardedTensor, ShardingPlan
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
from torchrec_lma.distributed.specs import RowWiseInput

# Two memories: dim 16 with three features of two tables, dim 8 with one.
FEATURES = {"f0": "a", "f1": "b", "f2": "a", "f3": "c"}
DIMS = {"a": 16, "b": 16, "c": 8}
MEMORIES = {"memory_16": ["f0", "f2", "f1"], "memory_8": ["f3"]}
CHUNK = 4
BATCH = 6
LR = 0.1
CPU = torch.device("cpu")


def tables(pooling: PoolingType = PoolingType.SUM) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(
            name="a", num_embeddings=3000, embedding_dim=16, feature_names=["f0", "f2"], pooling=pooling
        ),
        EmbeddingBagConfig(name="b", num_embeddings=2000, embedding_dim=16, feature_names=["f1"], pooling=pooling),
        EmbeddingBagConfig(name="c", num_embeddings=2000, embedding_dim=8, feature_names=["f3"], pooling=pooling),
    ]


def features(seed: int, weighted: bool = False, batch: int = BATCH) -> KeyedJaggedTensor:
    """Bags of 0 to 3 ids, many seen before (so with signatures or rows of their own) and some negative or huge."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(FEATURES) * batch,), generator=generator)
    n_ids = int(lengths.sum())
    ids = torch.randint(0, 60, (n_ids,), generator=generator)
    rare = torch.rand(n_ids, generator=generator) < 0.3
    ids = torch.where(rare, torch.randint(-(2**62), 2**62, (n_ids,), generator=generator), ids)
    weights = torch.rand(n_ids, generator=generator) if weighted else None
    return KeyedJaggedTensor(keys=list(FEATURES), values=ids, lengths=lengths, weights=weights)


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


def build_allocation(seed: int = 0, chunk_dim: int = CHUNK) -> Allocation:
    builder = AllocationBuilder(tables(), LMAConfig(compression=16, seed=seed, chunk_dim=chunk_dim))
    for i in range(20):
        builder.update(features(1000 + i, batch=32))
    return builder.build()


class Model(nn.Module):
    def __init__(self, ebc: nn.Module) -> None:
        super().__init__()
        self.ebc = ebc
        self.over = nn.Linear(sum(DIMS[table] for table in FEATURES.values()) + 4, 1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        pooled = self.ebc(batch.sparse_features)
        inputs = torch.cat([batch.dense_features] + [pooled[feature] for feature in FEATURES], 1)
        logits = self.over(inputs).squeeze(-1)
        loss = (logits - batch.labels).pow(2).mean()
        return loss, logits.detach()


def initial_state(allocation: Allocation) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    width = sum(DIMS[table] for table in FEATURES.values()) + 4
    state = {
        f"ebc.embedding_bags.{memory.name}.weight": torch.randn(memory.rows, memory.dim, generator=generator)
        for memory in allocation.memories
    }
    return state | {"over.weight": torch.randn(1, width, generator=generator) * 0.1, "over.bias": torch.zeros(1)}


# --- the reference: one process, plain torch indexing and autograd, optimizers written out -------------------------


class Reference(nn.Module):
    def __init__(self, allocation: Allocation, pooling: PoolingType) -> None:
        super().__init__()
        self.ebc = LMAEmbeddingBagCollection(tables(), allocation.config, allocation)  # for `addresses` only
        self.mean = pooling is PoolingType.MEAN
        self.weights = nn.ParameterDict()
        state = initial_state(allocation)
        for name in MEMORIES:
            self.weights[name] = nn.Parameter(state[f"ebc.embedding_bags.{name}.weight"].clone())
        self.over = nn.Linear(*reversed(state["over.weight"].shape))
        self.over.load_state_dict({"weight": state["over.weight"], "bias": state["over.bias"]})

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs = [batch.dense_features]
        for feature, table in FEATURES.items():
            weight = self.weights[f"memory_{DIMS[table]}"]
            bags = batch.sparse_features[feature]
            rows = self.ebc.addresses(feature, bags.values())  # (L, n)
            chunks = [weight[rows[:, j], j * CHUNK : (j + 1) * CHUNK] for j in range(rows.size(1))]
            vectors = torch.cat(chunks, 1)  # (L, dim)
            if bags.weights_or_none() is not None:
                vectors = vectors * bags.weights().unsqueeze(1)
            ends = bags.offsets().tolist()
            pooled = [vectors[start:end].sum(0) for start, end in zip(ends, ends[1:])]
            if self.mean:
                pooled = [p / max(end - start, 1) for p, start, end in zip(pooled, ends, ends[1:])]
            if batch.sparse_features.variable_stride_per_key():
                names, indices = batch.sparse_features.inverse_indices()
                pooled = [pooled[i] for i in indices[names.index(feature)].tolist()]
            inputs.append(torch.stack(pooled))
        logits = self.over(torch.cat(inputs, 1)).squeeze(-1)
        return (logits - batch.labels).pow(2).mean(), logits.detach()


EPS = 1e-8  # FBGEMM's default


def optimizer_step(name: str, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], lr: float = LR) -> None:
    if name == "sgd":
        weight -= lr * gradient
    elif name == "adagrad":
        state["sum"] = state.get("sum", torch.zeros_like(weight)) + gradient**2
        weight -= lr * gradient / (state["sum"].sqrt() + EPS)
    elif name == "rowwise_adagrad":  # one sum for each chunk of a row
        square = gradient.view(weight.size(0), -1, CHUNK).pow(2).mean(2)
        state["sum"] = state.get("sum", torch.zeros_like(square)) + square
        weight -= lr * gradient / (state["sum"].sqrt() + EPS).repeat_interleave(CHUNK, 1)
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
    pooling: PoolingType,
    weighted: bool,
    steps: int,
    vbe: str = "no",
    lr_of_step: Callable[[int], float] = lambda step: LR,
    max_norm: float = float("inf"),
    then: Sequence[Batch] = (),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, and the optimizer's running sums by memory, after training on the batches of all ranks together.

    `then`: batches of more steps, which all ranks take alike.
    """
    model = Reference(allocation, pooling)
    states: dict[str, dict[str, Tensor]] = {name: {} for name in MEMORIES}
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
                optimizer_step(optimizer, weight, weight.grad, states[name], lr)
            for parameter in model.over.parameters():
                parameter -= lr * parameter.grad
    weights = {f"ebc.embedding_bags.{name}.weight": weight.detach() for name, weight in model.weights.items()}
    weights |= {f"over.{name}": p.detach() for name, p in model.over.named_parameters()}
    return weights, {name: state["sum"] for name, state in states.items() if "sum" in state}


# --- the system under test ------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
    "adam": torch.optim.Adam,
}


def table_column_wise(host: int, local_size: int, kernel: str) -> Callable[..., ParameterSharding]:
    """TorchRec has no plan generator for it: column-wise over the ranks of one host, under its own name."""
    generate = column_wise(ranks=[host * local_size + i for i in range(local_size)], compute_kernel=kernel)

    def rename(*args: Any) -> ParameterSharding:
        return dataclasses.replace(generate(*args), sharding_type="table_column_wise")

    return rename


def plan_of(sharding: str, ebc: LMAEmbeddingBagCollection, kernel: str) -> ShardingPlan:
    """memory_16 and memory_8 sharded alike, starting from different ranks where the sharding has an owner."""
    world_size = dist.get_world_size()
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    hosts = world_size // local_size
    ranks = list(range(world_size))
    generators: dict[str, Callable[[int], Any]] = {
        "table_wise": lambda i: table_wise(rank=i % world_size, compute_kernel=kernel),
        "column_wise": lambda i: column_wise(ranks=ranks[: 2 if i else world_size], compute_kernel=kernel),
        "row_wise": lambda i: row_wise(compute_kernel=kernel),
        "data_parallel": lambda i: data_parallel(),
        "table_row_wise": lambda i: table_row_wise(host_index=i % hosts),
        "table_column_wise": lambda i: table_column_wise(i % hosts, local_size, kernel),
        "mixed": lambda i: row_wise(compute_kernel=kernel) if i else column_wise(ranks=ranks, compute_kernel=kernel),
    }
    return ShardingPlan(
        {
            "ebc": construct_module_sharding_plan(
                ebc,
                {name: generators[sharding](i) for i, name in enumerate(MEMORIES)},
                sharder=LMAEmbeddingBagCollectionSharder(),
                local_size=local_size,
                world_size=world_size,
                device_type="cpu",
            )
        }
    )


def build(
    allocation: Allocation,
    sharding: str,
    optimizer: str,
    pooling: PoolingType = PoolingType.SUM,
    weighted: bool = False,
    row_wise_input: RowWiseInput = "auto",
    qcomm: str = "fp32",
) -> tuple[DistributedModelParallel, CombinedOptimizer, ShardingPlan]:
    ebc = LMAEmbeddingBagCollection(
        tables(pooling), allocation.config, allocation, is_weighted=weighted, device=torch.device("meta")
    )
    model = Model(ebc)
    fused = sharding != "data_parallel" and not sharding.endswith("_dense")
    if fused:
        apply_optimizer_in_backward(OPTIMIZERS[optimizer], ebc.parameters(), {"lr": LR})
    if sharding in ("planner", "grid_shard"):  # TorchRec's plan generator for grids cuts columns of 128 only
        topology = Topology(
            world_size=dist.get_world_size(),
            local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
            compute_device="cpu",
        )
        types = ["grid_shard"] if sharding == "grid_shard" else None
        constraints = {name: ParameterConstraints(sharding_types=types, min_partition=4) for name in MEMORIES}
        plan = EmbeddingShardingPlanner(topology=topology, constraints=constraints).collective_plan(
            model, get_default_sharders(), dist.GroupMember.WORLD
        )
    else:
        plan = plan_of(sharding.removesuffix("_dense"), ebc, "fused" if fused else "dense")
    registry = get_qcomm_codecs_registry(QCommsConfig(CommType(qcomm), CommType(qcomm)), device=CPU)
    sharders = [LMAEmbeddingBagCollectionSharder(qcomm_codecs_registry=registry, row_wise_input=row_wise_input)]
    dmp = DistributedModelParallel(model, device=CPU, plan=plan, sharders=sharders)
    parameters = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    over = {name: p for name, p in parameters.items() if "over" in name}
    memories = {name: p for name, p in parameters.items() if "over" not in name}
    optimizers: list[Any] = [
        dmp.fused_optimizer,
        KeyedOptimizerWrapper(over, lambda p: torch.optim.SGD(p, lr=LR)),
    ]
    if memories:
        optimizers.append(KeyedOptimizerWrapper(memories, lambda p: OPTIMIZERS[optimizer](p, lr=LR)))
    dmp.load_state_dict(initial_state(allocation), strict=False)
    return dmp, CombinedOptimizer(optimizers), plan


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state_dict, sharded ones gathered on rank 0 (zeros elsewhere)."""
    result = {}
    for name, value in state.items():
        if isinstance(value, ShardedTensor):
            result[name] = torch.zeros(value.size())
            value.gather(0, result[name] if dist.get_rank() == 0 else None)
        elif isinstance(value, Tensor):
            result[name] = value.detach().clone()
    return result


# Of each memory's weight: (offsets, values) of shards.
Sums = dict[str, list[tuple[list[int], Tensor]]]


def train_sharded(
    allocation: Allocation,
    sharding: str,
    optimizer: str,
    pooling: PoolingType = PoolingType.SUM,
    weighted: bool = False,
    steps: int = 4,
    pipeline: bool = False,
    row_wise_input: RowWiseInput = "auto",
    vbe: str = "no",
    qcomm: str = "fp32",
) -> tuple[dict[str, Tensor], Sums, list[str]]:
    """The weights (on rank 0), this rank's shards of the optimizer's running sums, and the sharding types."""
    dmp, optim, plan = build(allocation, sharding, optimizer, pooling, weighted, row_wise_input, qcomm)
    batches = [batch(step, dist.get_rank(), weighted, vbe) for step in range(steps)]
    if pipeline:
        train_pipeline = TrainPipelineSparseDist(dmp, optim, CPU)
        iterator = iter(batches)
        for _ in batches:
            train_pipeline.progress(iterator)
    else:
        for step_batch in batches:
            optim.zero_grad()
            dmp(step_batch)[0].backward()
            optim.step()
    # Shard by shard: a table-wise state exists on its owner alone, and gathering is a collective.
    sums: Sums = {
        name: [(shard.metadata.shard_offsets, shard.tensor) for shard in value.local_shards()]
        for name, states in optim.state_dict()["state"].items()
        for key, value in states.items()
        if isinstance(value, ShardedTensor) and key.endswith("momentum1")
    }
    types = [p.sharding_type for module in plan.plan.values() for p in module.values()]
    return whole(dmp.state_dict()), sums, types


def assert_sums_close(shards_of_ranks: list[Sums], expected: dict[str, Tensor]) -> None:
    """The ranks' shards together are the whole running sums of each memory."""
    for memory, sums in expected.items():
        found = torch.full_like(sums, torch.nan)
        for shards in shards_of_ranks:
            for (row, column), values in shards.get(f"ebc.embedding_bags.{memory}.weight", []):
                found[row : row + values.size(0), column : column + values.size(1)] = values
        torch.testing.assert_close(found, sums, rtol=1e-4, atol=1e-6)


def assert_close(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


TWO_HOSTS = {"table_row_wise", "table_column_wise", "grid_shard"}


def ranks_for(sharding: str) -> dict[str, int]:
    return {"world_size": 4, "local_world_size": 2} if sharding in TWO_HOSTS else {"world_size": 2}
