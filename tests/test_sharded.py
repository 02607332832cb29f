"""Sharded collections against one process, in plain torch: forward, gradients, optimizer steps, checkpoints."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchrec
from ranks import run
from torch import Tensor, nn
from torchrec import DataType, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.datasets.utils import Batch
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


def batch(step: int, rank: int, weighted: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(step * 100 + rank)
    return Batch(
        dense_features=torch.randn(BATCH, 4, generator=generator),
        sparse_features=features(step * 100 + rank, weighted),
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
            inputs.append(torch.stack(pooled))
        logits = self.over(torch.cat(inputs, 1)).squeeze(-1)
        return (logits - batch.labels).pow(2).mean(), logits.detach()


EPS = 1e-8  # FBGEMM's default


def optimizer_step(name: str, weight: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
    if name == "sgd":
        weight -= LR * gradient
    elif name == "adagrad":
        state["sum"] = state.get("sum", torch.zeros_like(weight)) + gradient**2
        weight -= LR * gradient / (state["sum"].sqrt() + EPS)
    elif name == "rowwise_adagrad":  # one sum for each chunk of a row
        square = gradient.view(weight.size(0), -1, CHUNK).pow(2).mean(2)
        state["sum"] = state.get("sum", torch.zeros_like(square)) + square
        weight -= LR * gradient / (state["sum"].sqrt() + EPS).repeat_interleave(CHUNK, 1)
    elif name == "adam":  # torch.optim.Adam
        state["t"] = state.get("t", torch.zeros(())) + 1
        state["m"] = 0.9 * state.get("m", torch.zeros_like(weight)) + 0.1 * gradient
        state["v"] = 0.999 * state.get("v", torch.zeros_like(weight)) + 0.001 * gradient**2
        m, v = state["m"] / (1 - 0.9 ** state["t"]), state["v"] / (1 - 0.999 ** state["t"])
        weight -= LR * m / (v.sqrt() + 1e-8)
    else:
        raise AssertionError(name)


def train_reference(
    allocation: Allocation, world_size: int, optimizer: str, pooling: PoolingType, weighted: bool, steps: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, and the optimizer's running sums by memory, after training on the batches of all ranks together."""
    model = Reference(allocation, pooling)
    states: dict[str, dict[str, Tensor]] = {name: {} for name in MEMORIES}
    for step in range(steps):
        model.zero_grad()
        losses = [model(batch(step, rank, weighted))[0] for rank in range(world_size)]
        (sum(losses) / world_size).backward()
        with torch.no_grad():
            for name, weight in model.weights.items():
                optimizer_step(optimizer, weight, weight.grad, states[name])
            for parameter in model.over.parameters():
                parameter -= LR * parameter.grad
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
    dmp = DistributedModelParallel(model, device=CPU, plan=plan, sharders=get_default_sharders())
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


def train_sharded(
    allocation: Allocation,
    sharding: str,
    optimizer: str,
    pooling: PoolingType = PoolingType.SUM,
    weighted: bool = False,
    steps: int = 4,
    pipeline: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    dmp, optim, plan = build(allocation, sharding, optimizer, pooling, weighted)
    batches = [batch(step, dist.get_rank(), weighted) for step in range(steps)]
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
    sums = {}
    for name, states in optim.state_dict()["state"].items():
        for key, value in states.items():
            if isinstance(value, ShardedTensor) and key.endswith("momentum1"):
                sums[name] = value
    # A table-wise state exists on its owner alone, and gathering is a collective, so only its sizes are compared.
    gathered = whole(sums) if sharding in ("column_wise", "row_wise") else {}
    types = [p.sharding_type for module in plan.plan.values() for p in module.values()]
    return whole(dmp.state_dict()), gathered, types


CASES = [
    *[
        (s, o, "SUM", False, False)
        for s in ("table_wise", "column_wise", "row_wise")
        for o in OPTIMIZERS
        if o != "adam"
    ],
    *[("data_parallel", o, "SUM", False, False) for o in ("sgd", "adam")],
    *[(f"{s}_dense", "adam", "SUM", False, False) for s in ("table_wise", "column_wise", "row_wise")],
    *[(s, "sgd", "SUM", True, False) for s in ("table_wise", "column_wise", "row_wise", "data_parallel")],
    *[(s, "sgd", "MEAN", w, False) for s in ("table_wise", "column_wise", "row_wise", "data_parallel") for w in (0, 1)],
    *[(s, "rowwise_adagrad", "SUM", False, True) for s in ("table_wise", "column_wise", "row_wise", "planner")],
    ("data_parallel", "sgd", "SUM", False, True),
    *[("mixed", "rowwise_adagrad", p, False, False) for p in ("SUM", "MEAN")],
]


@pytest.fixture(scope="module")
def allocation() -> Allocation:
    return build_allocation()


@pytest.mark.parametrize(("sharding", "optimizer", "pooling", "weighted", "pipeline"), CASES)
def test_training_equals_one_process(
    allocation: Allocation, sharding: str, optimizer: str, pooling: str, weighted: bool, pipeline: bool
) -> None:
    kind = PoolingType[pooling]
    results = run(train_sharded, 2, allocation, sharding, optimizer, kind, bool(weighted), 4, pipeline)
    expected, sums = train_reference(allocation, 2, optimizer, kind, bool(weighted), 4)
    start = initial_state(allocation)
    weights = results[0][0]
    for name, value in expected.items():
        assert not torch.equal(value, start[name]), f"{name} did not train"
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in results[0][1].items():
        memory = name.removeprefix("ebc.embedding_bags.").removesuffix(".weight")
        torch.testing.assert_close(value, sums[memory], rtol=1e-4, atol=1e-6)
    if sharding in ("column_wise", "row_wise") and optimizer != "sgd":
        assert len(results[0][1]) == len(MEMORIES), "optimizer state is missing from the state_dict"


def pooled(allocation: Allocation, data_type: DataType, sharding: str) -> tuple[Tensor, Tensor]:
    """Embeddings of a sharded collection, and of an unsharded one with the same weights; after one fused step."""
    configs = [dataclasses.replace(table, data_type=data_type, init_fn=None) for table in tables()]
    allocation = Allocation.hashed(configs, allocation.config)
    ebc = LMAEmbeddingBagCollection(configs, allocation.config, allocation)
    apply_optimizer_in_backward(torch.optim.SGD, ebc.parameters(), {"lr": LR})
    plan = plan_of(sharding, ebc, "fused")
    dmp = DistributedModelParallel(nn.ModuleDict({"ebc": ebc}), plan=plan, sharders=get_default_sharders(), device=CPU)
    out = dmp.module["ebc"](features(dist.get_rank())).wait()
    torch.cat([out[feature] for feature in FEATURES], 1).float().sum().backward()
    out = dmp.module["ebc"](features(7)).wait()
    state = whole({name.removeprefix("ebc."): value for name, value in dmp.state_dict().items()})
    ebc.load_state_dict(state)
    reference = ebc(features(7))
    return (
        torch.cat([out[feature] for feature in FEATURES], 1).detach(),
        torch.cat([reference[feature] for feature in FEATURES], 1).detach(),
    )


@pytest.mark.parametrize("data_type", [DataType.FP16, DataType.FP32])
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_weights_of_every_type_train_sharded(allocation: Allocation, data_type: DataType, sharding: str) -> None:
    sharded, unsharded = run(pooled, 2, allocation, data_type, sharding)[0]
    assert sharded.dtype is torch.float32 and sharded.abs().max() > LR  # a step of SGD on a sum moves weights by LR
    torch.testing.assert_close(sharded, unsharded, rtol=2e-2, atol=2e-2)


def pooled_unevenly(allocation: Allocation, sharding: str, sizes: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    dmp, _, _ = build(allocation, sharding, "sgd")
    rank = dist.get_rank()
    out = dmp.module.ebc(features(rank, batch=sizes[rank])).wait()
    return torch.cat([out[feature] for feature in FEATURES], 1).detach(), whole(dmp.state_dict())


@pytest.mark.parametrize("sharding", ["table_wise", "column_wise", "row_wise", "data_parallel"])
@pytest.mark.parametrize("sizes", [[5, 2], [3, 0], [0, 0]], ids=str)
def test_ranks_may_have_batches_of_different_sizes(allocation: Allocation, sharding: str, sizes: list[int]) -> None:
    results = run(pooled_unevenly, 2, allocation, sharding, sizes)
    ebc = LMAEmbeddingBagCollection(tables(), allocation.config, allocation)
    weights = {name.removeprefix("ebc."): value for name, value in results[0][1].items() if name.startswith("ebc.")}
    ebc.load_state_dict(weights)
    for rank, size in enumerate(sizes):
        expected = ebc(features(rank, batch=size))
        assert results[rank][0].shape == (size, sum(DIMS[table] for table in FEATURES.values()))
        torch.testing.assert_close(results[rank][0], torch.cat([expected[f] for f in FEATURES], 1).detach())


def bf16_error(allocation: Allocation) -> str:
    try:
        pooled(allocation, DataType.BF16, "table_wise")
    except ValueError as error:
        return str(error)
    return "no error"


def test_bf16_is_refused_where_fbgemm_has_no_kernel(allocation: Allocation) -> None:
    assert "got BF16" in run(bf16_error, 1, allocation)[0]


@pytest.mark.parametrize("sharding", ["table_row_wise", "table_column_wise", "grid_shard", "row_wise"])
@pytest.mark.parametrize(("optimizer", "pooling"), [("rowwise_adagrad", "SUM"), ("sgd", "MEAN")])
def test_training_on_two_hosts_equals_one_process(
    allocation: Allocation, sharding: str, optimizer: str, pooling: str
) -> None:
    kind = PoolingType[pooling]
    results = run(train_sharded, 4, allocation, sharding, optimizer, kind, local_world_size=2)
    expected, _ = train_reference(allocation, 4, optimizer, kind, False, 4)
    for name, value in expected.items():
        torch.testing.assert_close(results[0][0][name], value, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def save(allocation: Allocation, sharding: str, path: str) -> dict[str, Tensor]:
    dmp, optim, _ = build(allocation, sharding, "rowwise_adagrad" if sharding != "data_parallel" else "sgd")
    for step in range(3):
        optim.zero_grad()
        dmp(batch(step, dist.get_rank()))[0].backward()
        optim.step()
    dcp.save({"model": dmp.state_dict(), "optimizer": optim.state_dict()}, checkpoint_id=path)
    return whole(dmp.state_dict())


def load_and_step(allocation: Allocation, sharding: str, path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    dmp, optim, _ = build(allocation, sharding, "rowwise_adagrad")
    state = {"model": dmp.state_dict(), "optimizer": optim.state_dict()}
    dcp.load(state, checkpoint_id=path)
    dmp.load_state_dict(state["model"])
    optim.load_state_dict(state["optimizer"])
    loaded = whole(dmp.state_dict())
    # One step on the same global batch, whatever the world size: every rank takes the same rows.
    optim.zero_grad()
    dmp(batch(50, 0))[0].backward()
    optim.step()
    return loaded, whole(dmp.state_dict())


TWO_HOSTS = {"table_row_wise", "table_column_wise", "grid_shard"}


def ranks_for(sharding: str) -> dict[str, int]:
    return {"world_size": 4, "local_world_size": 2} if sharding in TWO_HOSTS else {"world_size": 2}


@pytest.mark.parametrize("saved", ["table_wise", "column_wise", "row_wise", *sorted(TWO_HOSTS)])
def test_checkpoint_loads_under_any_plan_and_world_size(allocation: Allocation, tmp_path: Path, saved: str) -> None:
    path = str(tmp_path / "checkpoint")
    sizes = ranks_for(saved)
    weights = run(save, sizes.pop("world_size"), allocation, saved, path, **sizes)[0]
    assert Allocation.from_checkpoint(path).fingerprint == allocation.fingerprint
    after = []
    for sharding, sizes in [
        ("table_wise", {"world_size": 1}),
        ("row_wise", {"world_size": 3}),
        *((sharding, ranks_for(sharding)) for sharding in ("table_wise", "column_wise", "row_wise", "mixed")),
        *((sharding, ranks_for(sharding)) for sharding in sorted(TWO_HOSTS)),
    ]:
        world_size = sizes.pop("world_size")
        loaded, stepped = run(load_and_step, world_size, allocation, sharding, path, **sizes)[0]
        for name, value in weights.items():
            assert torch.equal(loaded[name], value), f"{name} differs after {saved} -> {sharding} on {world_size} ranks"
        after.append(stepped)
    # The step after loading is the same under every plan, so the optimizer state arrived as well.
    for other in after[1:]:
        for name, value in after[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(after[0][name], weights[name]) for name in weights)


def load_errors(allocation: Allocation, other: Allocation, path: str) -> tuple[str, str, bool]:
    """What is said on load_state_dict, and on the next forward when only torch.distributed.checkpoint was called."""
    messages = []
    dmp, _, _ = build(allocation, "row_wise", "sgd")
    own = whole(dmp.state_dict())
    saved = {**dmp.state_dict()}
    theirs = torch.frombuffer(bytearray.fromhex(other.fingerprint), dtype=torch.uint8).clone()
    saved["ebc.addressing.fingerprint"] = theirs
    saved["ebc.embedding_bags.memory_16.weight"] = torch.zeros_like(own["ebc.embedding_bags.memory_16.weight"])
    try:
        dmp.load_state_dict(saved)
    except ValueError as error:
        messages.append(str(error))
    untouched = all(torch.equal(value, own[name]) for name, value in whole(dmp.state_dict()).items())
    state = dmp.state_dict()
    dcp.save({"ebc.addressing.fingerprint": theirs}, checkpoint_id=path)
    dcp.load({"ebc.addressing.fingerprint": state["ebc.addressing.fingerprint"]}, checkpoint_id=path)
    try:
        dmp(batch(0, dist.get_rank()))
    except ValueError as error:
        messages.append(str(error))
    return messages[0], messages[1], untouched


def test_loading_another_allocation_is_refused(allocation: Allocation, tmp_path: Path) -> None:
    other = build_allocation(seed=1)
    on_load, on_forward, untouched = run(load_errors, 2, allocation, other, str(tmp_path / "c"))[0]
    for message in (on_load, on_forward):
        assert allocation.fingerprint in message and other.fingerprint in message
    assert untouched


def planned_types(allocation: Allocation) -> tuple[list[str], str]:
    dmp, _, plan = build(allocation, "planner", "rowwise_adagrad")
    sharded = dmp.module.ebc
    return [p.sharding_type for p in plan.plan["ebc"].values()], str(sharded.memory_report())


def test_planner_shards_memories_as_tables(allocation: Allocation) -> None:
    types, report = run(planned_types, 2, allocation)[0]
    assert set(types) <= set(LMAEmbeddingBagCollectionSharder().sharding_types("cpu"))
    assert "memory_16" in report and "total" in report


def error_of(allocation: Allocation, sharding: str, optimizer: str, wrong: str) -> str:
    try:
        if wrong == "column shard":
            ebc = LMAEmbeddingBagCollection(tables(), allocation.config, allocation, device=torch.device("meta"))
            plan = ShardingPlan(
                {
                    "ebc": construct_module_sharding_plan(
                        ebc,
                        {
                            "memory_16": column_wise(size_per_rank=[8, 8], compute_kernel="fused"),
                            "memory_8": column_wise(size_per_rank=[6, 2], compute_kernel="fused"),
                        },
                        sharder=LMAEmbeddingBagCollectionSharder(),
                        local_size=2,
                        world_size=2,
                        device_type="cpu",
                    )
                }
            )
            DistributedModelParallel(Model(ebc), device=CPU, plan=plan, sharders=get_default_sharders())
        dmp, _, _ = build(allocation, sharding, optimizer)
        good = batch(0, dist.get_rank())
        if wrong == "missing feature":
            good.sparse_features = good.sparse_features.permute([0, 1, 2])
        if wrong == "vbe":
            good.sparse_features = KeyedJaggedTensor(
                keys=list(FEATURES),
                values=torch.arange(6),
                lengths=torch.ones(6, dtype=torch.int64),
                stride_per_key_per_rank=[[2], [1], [2], [1]],
            )
        dmp(good)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("sharding", "optimizer", "wrong", "said"),
    [
        ("row_wise", "sgd", "missing feature", "missing ['f3']"),
        ("row_wise", "sgd", "vbe", "variable batch size"),
        ("table_wise", "adam", "optimizer", "adam"),
        ("row_wise", "sgd", "column shard", "min_partition"),
    ],
)
def test_bad_input_is_named(allocation: Allocation, sharding: str, optimizer: str, wrong: str, said: str) -> None:
    assert said in run(error_of, 2, allocation, sharding, optimizer, wrong)[0]


def test_fused_kernels_refuse_chunks_that_fbgemm_cannot_take() -> None:
    assert "multiple of 4" in run(error_of, 1, build_allocation(chunk_dim=2), "table_wise", "sgd", "chunk")[0]
