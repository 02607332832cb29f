"""Sharded collections against one process, in plain torch: forward, gradients, optimizer steps, checkpoints."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv2D
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from support.ranks import run
from support.sharded_model import (
    CONFIG,
    CPU,
    LR,
    META,
    OPTIMIZERS,
    SLOTS,
    TABLES,
    TWO_HOSTS,
    Model,
    Reference,
    assert_close,
    assert_sums_close,
    batch,
    build,
    build_allocation,
    features,
    initial_state,
    level_shapes,
    optimizer_of,
    plan_of,
    ranks_for,
    tables,
    train,
    train_reference,
    train_sharded,
    weight_name,
    whole,
)
from torchrec_lma import (
    Allocation,
    AllocationBuilder,
    LMAConfig,
    LMAEmbeddingBagCollection,
    LMAEmbeddingBagCollectionSharder,
)
from torchrec_lma.allocation.layout import Level
from torchrec_lma.distributed import ShardedLMAEmbeddingBagCollection

TYPES = ["table_wise", "column_wise", "row_wise"]
ROW_TYPES = ["row_wise", "table_row_wise", "grid_shard"]

# sharding, optimizer, pooling, weighted, pipelined
CASES: list[tuple[str, str, str, bool, bool]] = [
    *[(s, o, "SUM", False, False) for s in TYPES for o in OPTIMIZERS if o != "adam"],
    *[("data_parallel", o, "SUM", False, False) for o in ("sgd", "adam")],
    *[(f"{s}_dense", "adam", "SUM", False, False) for s in TYPES],
    *[(s, "sgd", p, w, False) for s in [*TYPES, "data_parallel"] for p, w in (("mixed", True), ("MEAN", False))],
    *[(s, "rowwise_adagrad", "mixed", False, True) for s in [*TYPES, "planner"]],
    ("data_parallel", "sgd", "mixed", True, True),
    ("mixed", "rowwise_adagrad", "mixed", True, False),
]


@pytest.fixture(scope="module")
def allocation() -> Allocation:
    return build_allocation()


@pytest.mark.parametrize(("sharding", "optimizer", "pooling", "weighted", "pipeline"), CASES)
def test_training_equals_one_process(
    allocation: Allocation, sharding: str, optimizer: str, pooling: str, weighted: bool, pipeline: bool
) -> None:
    results = run(train_sharded, 2, allocation, sharding, optimizer, pooling, weighted, 4, pipeline)
    first = results[0]
    expected, sums = train_reference(allocation, 2, optimizer, pooling, weighted, column_shards=first.column_shards)
    start = initial_state(allocation)
    for name, value in expected.items():
        assert not torch.equal(value, start[name]), f"{name} did not train"
    assert_close(first.weights, expected)
    assert set(sums) == (set(level_shapes(allocation)) if "adagrad" in optimizer else set())
    assert_sums_close(results, sums)
    assert first.pipelined == (["ebc"] if pipeline else [])


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_training_where_all_ids_own_the_same_columns_equals_one_process(sharding: str) -> None:
    """The default at a round budget; ids outside of their vocabulary are taken for id 0."""
    builder = AllocationBuilder(tables(), LMAConfig(compression=4, data_type="FP32"))
    for name, (rows, _, _) in TABLES.items():
        builder.add_counts(name, torch.arange(rows), torch.arange(rows) * 7 % 5 + 1)
    allocation = builder.build()
    assert [[level for level in memory.levels if level.rows] for memory in allocation.memories] == [
        [Level(4, own_rows=509, shared_rows=0)],
        [Level(2, own_rows=600, shared_rows=0)],
    ]
    result = run(train_sharded, 2, allocation, sharding, "sgd", "mixed", True)[0]
    expected, _ = train_reference(allocation, 2, "sgd", "mixed", True)
    assert_close(result.weights, expected)


@pytest.mark.parametrize("sharding", ["row_wise", *sorted(TWO_HOSTS)])
@pytest.mark.parametrize(("optimizer", "pooling"), [("rowwise_adagrad", "SUM"), ("sgd", "mixed")])
def test_training_on_two_hosts_equals_one_process(
    allocation: Allocation, sharding: str, optimizer: str, pooling: str
) -> None:
    results = run(train_sharded, 4, allocation, sharding, optimizer, pooling, local_world_size=2)
    expected, sums = train_reference(allocation, 4, optimizer, pooling, column_shards=results[0].column_shards)
    assert_close(results[0].weights, expected)
    assert_sums_close(results, sums)


def test_levels_are_cut_into_columns_where_they_are_wide_enough(allocation: Allocation) -> None:
    widths = {name: shape[1] for name, shape in level_shapes(allocation).items()}
    assert sorted(set(widths.values())) == [4, 8]
    cut = run(train_sharded, 2, allocation, "column_wise", "sgd")[0].column_shards
    assert cut == {name: 2 if width > 4 else 1 for name, width in widths.items()}
    assert run(train_sharded, 2, allocation, "planner", "sgd")[0].types.keys() <= widths.keys()


def bounds_check_modes(allocation: Allocation, asked_for: str) -> set[BoundsCheckMode]:
    ebc = LMAEmbeddingBagCollection(tables(), allocation, device=META)
    apply_optimizer_in_backward(torch.optim.SGD, ebc.parameters(), {"lr": LR})
    plan = plan_of("table_wise", Model(ebc).ebc, "fused")
    if asked_for == "by the plan":
        for sharding in plan.plan["ebc"].values():
            sharding.bounds_check_mode = BoundsCheckMode.FATAL
    fused_params = {"bounds_check_mode": BoundsCheckMode.FATAL} if asked_for == "by fused params" else None
    sharders = [LMAEmbeddingBagCollectionSharder(fused_params=fused_params)]
    dmp = DistributedModelParallel(Model(ebc), device=CPU, plan=plan, sharders=sharders)
    modules = [module for lookup in dmp.module.ebc._lookups for module in lookup.modules()]
    tbes = [module for module in modules if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen)]
    return {BoundsCheckMode(tbe.bounds_check_mode_int) for tbe in tbes}


@pytest.mark.parametrize("asked_for", ["by nobody", "by the plan", "by fused params"])
def test_rows_are_not_checked_again_unless_asked_for(allocation: Allocation, asked_for: str) -> None:
    expected = BoundsCheckMode.NONE if asked_for == "by nobody" else BoundsCheckMode.FATAL
    assert run(bounds_check_modes, 1, allocation, asked_for) == [{expected}]


def pooled(allocation: Allocation, seeds_and_sizes: list[tuple[int, int]], sharding: str) -> list[Tensor]:
    """Embeddings of this rank's batches, one after another, of a collection without a training step."""
    dmp, _, _ = build(allocation, sharding, "sgd", "mixed")
    seed, size = seeds_and_sizes[dist.get_rank()]
    return [dmp.module.ebc(features(seed + i, batch=size)).wait().values().detach() for i in range(2)]


def reference_pooled(allocation: Allocation, given: KeyedJaggedTensor, pooling: str = "mixed") -> Tensor:
    """[B, sum of dims] in plain torch."""
    size = given.stride()
    reference = Reference(allocation, pooling)
    # The reference's forward ends in a linear layer: look through it, one column at a time.
    columns = []
    dim = reference.over.weight.size(1)
    for i in range(4, dim):
        with torch.no_grad():
            reference.over.weight.zero_()
            reference.over.weight[0, i] = 1
            reference.over.bias.zero_()
        columns.append(reference(Batch(torch.zeros(size, 4), given, torch.zeros(size)))[1])
    return torch.stack(columns, 1)


@pytest.mark.parametrize("sharding", [*TYPES, "data_parallel"])
@pytest.mark.parametrize("sizes", [[5, 2], [3, 0], [0, 0]], ids=str)
def test_ranks_may_have_batches_of_different_sizes(allocation: Allocation, sharding: str, sizes: list[int]) -> None:
    results = run(pooled, 2, allocation, list(enumerate(sizes)), sharding)
    for rank, size in enumerate(sizes):
        for i, found in enumerate(results[rank]):
            assert found.shape == (size, sum(TABLES[table][1] for table in SLOTS.values()))
            if size:
                torch.testing.assert_close(found, reference_pooled(allocation, features(rank + i, batch=size)))


def pooled_in_another_order(allocation: Allocation, sharding: str) -> list[Tensor]:
    """Embeddings of a batch after the first: as it was, the other way round, and without what no table takes."""
    dmp, _, _ = build(allocation, sharding, "sgd", "mixed")
    dmp.module.ebc(features(1)).wait()
    one = features(2)
    n = len(one.keys())
    orders = [list(range(n)), list(reversed(range(n))), list(range(1, n))]
    return [dmp.module.ebc(one.permute(order)).wait().values().detach() for order in orders]


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_features_may_come_in_another_order_than_at_first(allocation: Allocation, sharding: str) -> None:
    expected = reference_pooled(allocation, features(2))
    for found in run(pooled_in_another_order, 2, allocation, sharding)[0]:
        torch.testing.assert_close(found, expected)


def of_data_type(data_type: str | None) -> Allocation:
    config = dataclasses.replace(CONFIG, data_type=data_type)
    return build_allocation(config=config)


def train_in_half(allocation: Allocation, sharding: str) -> tuple[dict[str, Tensor], Tensor]:
    """The weights after one step, and embeddings under them."""
    dmp, optim, _ = build(allocation, sharding, "sgd")
    train(dmp, optim, [batch(0, dist.get_rank())], pipeline=False)
    return whole(dmp.state_dict()), dmp.module.ebc(features(7)).wait().values().detach()


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_levels_in_half_precision_train_nearly_as_in_single(allocation: Allocation, sharding: str) -> None:
    half = of_data_type(None)  # the default
    weights, embeddings = run(train_in_half, 2, half, sharding)[0]
    assert {value.dtype for name, value in weights.items() if "levels" in name} == {torch.float16}
    assert embeddings.dtype is torch.float32
    expected, _ = train_reference(half, 2, "sgd", steps=1)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name].float(), value, rtol=2e-3, atol=2e-3)
    ebc = LMAEmbeddingBagCollection(tables(), half)
    ebc.load_state_dict({name.removeprefix("ebc."): value for name, value in weights.items() if "ebc." in name})
    torch.testing.assert_close(embeddings, ebc(features(7)).values().float().detach(), rtol=2e-3, atol=2e-3)


def error_of(allocation: Allocation, sharding: str, wrong: str = "") -> str:
    """What is raised by building the model, or by its first step on bad input."""
    try:
        dmp, _, _ = build(allocation, sharding, "adam" if wrong == "optimizer" else "sgd", weighted=wrong == "weights")
        given = batch(0, dist.get_rank())
        keys = given.sparse_features.keys()
        if wrong == "feature":
            given.sparse_features = given.sparse_features.permute([keys.index(key) for key in keys if key != "f3"])
        if wrong == "ids":
            given.sparse_features._values = given.sparse_features.values().float()
        if wrong == "lengths":
            given.sparse_features._values = given.sparse_features.values()[:-1]
        if wrong == "strict":
            dmp.module.ebc.remap.strict = True
        dmp(given)[0].backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("feature", "ValueError: the KeyedJaggedTensor lacks features ['f3']"),
        ("weights", "ValueError: the collection was made with is_weighted=True"),
        ("ids", "TypeError: the KeyedJaggedTensor has ids of torch.float32"),
        ("lengths", "ValueError: the KeyedJaggedTensor has lengths that add up to"),
        ("strict", "are outside of their table's [0, num_embeddings)"),
        ("optimizer", "adam is not supported in CPU mode"),  # TorchRec's words
    ],
)
def test_bad_input_is_named(allocation: Allocation, wrong: str, said: str) -> None:
    for message in run(error_of, 2, allocation, "row_wise", wrong):
        assert said in message


# --- few rows -------------------------------------------------------------------------------------------------------


def few_rows() -> Allocation:
    allocation = Allocation.hashed(tables(), dataclasses.replace(CONFIG, compression=400, widths={16: (16,), 8: (8,)}))
    assert [shape[0] for shape in level_shapes(allocation).values()] == [1, 1]
    return allocation


@pytest.mark.parametrize("sharding", ROW_TYPES)
def test_ranks_without_rows_are_refused(sharding: str) -> None:
    """On the CPU FBGEMM reads past the end of an empty table, of plain tables too."""
    for message in run(error_of, 4, few_rows(), sharding, local_world_size=2):
        assert message.startswith(
            f"ValueError: table 'a_lma16_level_0' has 1 rows, of which {sharding} sharding gives none"
        )


@pytest.mark.parametrize("sharding", ["table_wise", "column_wise", "data_parallel"])
def test_levels_with_fewer_rows_than_ranks_train_under_other_types(sharding: str) -> None:
    results = run(train_sharded, 4, few_rows(), sharding, "sgd", local_world_size=2)
    assert_close(results[0].weights, train_reference(few_rows(), 4, "sgd")[0])


# --- quantized communication ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharding", [*TYPES, *sorted(TWO_HOSTS)])
def test_communication_in_half_precision_trains_nearly_alike(allocation: Allocation, sharding: str) -> None:
    sizes = ranks_for(sharding)
    world_size = sizes.pop("world_size")
    args = (allocation, sharding, "sgd", "SUM", False, 3, False, "no", "fp16")
    weights = run(train_sharded, world_size, *args, **sizes)[0].weights
    expected, _ = train_reference(allocation, world_size, "sgd", steps=3)
    off = max(float((weights[name] - value).abs().max()) for name, value in expected.items())
    assert 1e-5 < off < 0.05, "the codec changed nothing, or too much"


def pooled_in_int8(allocation: Allocation, sharding: str) -> Tensor | str:
    dmp, _, _ = build(allocation, sharding, "sgd", qcomm="int8")
    try:
        out = dmp.module.ebc(features(dist.get_rank(), batch=8)).wait().values()  # the codec takes multiples of 32
        out.sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return out.detach()


@pytest.mark.parametrize("sharding", ["table_wise", "column_wise", "table_column_wise"])
def test_communication_in_int8_is_near(allocation: Allocation, sharding: str) -> None:
    sizes = ranks_for(sharding)
    for rank, out in enumerate(run(pooled_in_int8, sizes.pop("world_size"), allocation, sharding, **sizes)):
        off = float((out - reference_pooled(allocation, features(rank, batch=8), "SUM")).abs().max())
        assert 1e-5 < off < 0.05, "the codec changed nothing, or too much"


# --- 2D parallelism -------------------------------------------------------------------------------------------------


def train_in_2d(
    allocation: Allocation, sharding: str, steps: int
) -> tuple[dict[str, list[tuple[Any, Tensor]]], dict[str, Tensor]]:
    """Two replicas, each sharded over two ranks; after each step the replicas' shards are averaged.

    Returns the shards of this rank, by their places, and the dense layer.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("replicate", "shard"))
    env = ShardingEnv2D(
        sharding_pg=mesh.get_group("shard"),
        global_pg=dist.GroupMember.WORLD,
        device_mesh=mesh,
        node_group_size=2,
        replica_pg=mesh.get_group("replicate"),
    )
    ebc = LMAEmbeddingBagCollection(tables(), allocation, device=META)
    apply_optimizer_in_backward(torch.optim.SGD, ebc.parameters(), {"lr": LR})
    plan = plan_of(sharding, ebc, "fused", world_size // 2)
    for one in plan.plan["ebc"].values():  # of ranks within a replica: as DMPCollection does
        one.ranks = [2 * r + rank % 2 for r in one.ranks]
        for shard in one.sharding_spec.shards:
            of_rank = 2 * shard.placement.rank() + rank % 2
            shard.placement = torch.distributed._remote_device(f"rank:{of_rank}/cpu")
    dmp = DistributedModelParallel(
        Model(ebc), env=env, device=CPU, plan=plan, sharders=[LMAEmbeddingBagCollectionSharder()]
    )
    dmp.load_state_dict(initial_state(allocation), strict=False)
    optim = optimizer_of(dmp, "sgd")
    for step in range(steps):
        train(dmp, optim, [batch(step, rank)], pipeline=False)
        for parameter in dmp.module.ebc.levels.parameters():
            if parameter.numel():
                dist.all_reduce(parameter.data, group=mesh.get_group("replicate"))
                parameter.data /= world_size // 2
    state = dmp.state_dict()
    weights = {}
    for name, value in state.items():
        if "levels" in name:
            wrapper = value.to_local()
            weights[name] = list(zip(wrapper.local_offsets(), wrapper.local_shards()))
    over = {name: value.clone() for name, value in state.items() if name.startswith("over")}
    return weights, over


@pytest.mark.parametrize("sharding", TYPES)
def test_2d_parallelism_equals_one_process(allocation: Allocation, sharding: str) -> None:
    """DMPCollection takes CUDA devices only; this is the environment that it makes, and its averages, on gloo."""
    results = run(train_in_2d, 4, allocation, sharding, 3, local_world_size=2)
    expected, _ = train_reference(allocation, 4, "sgd", steps=3)
    for replica in ([0, 2], [1, 3]):
        for name, value in expected.items():
            if name.startswith("over"):
                found = results[replica[0]][1][name]
            else:
                found = torch.full_like(value, torch.nan)
                for rank in replica:
                    for (row, column), shard in results[rank][0][name]:
                        found[row : row + shard.size(0), column : column + shard.size(1)] = shard
            torch.testing.assert_close(found, value, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


# --- checkpoints ----------------------------------------------------------------------------------------------------


def save(allocation: Allocation, sharding: str, path: str) -> dict[str, Tensor]:
    dmp, optim, _ = build(allocation, sharding, "rowwise_adagrad" if sharding != "data_parallel" else "sgd")
    train(dmp, optim, [batch(step, dist.get_rank()) for step in range(3)], pipeline=False)
    dcp.save({"model": dmp.state_dict(), "optimizer": optim.state_dict()}, checkpoint_id=path)
    return whole(dmp.state_dict())


def load_and_step(
    allocation: Allocation, sharding: str, path: str, with_optimizer: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    dmp, optim, _ = build(allocation, sharding, "rowwise_adagrad" if sharding != "data_parallel" else "sgd")
    state = {"model": dmp.state_dict()} | ({"optimizer": optim.state_dict()} if with_optimizer else {})
    dcp.load(state, checkpoint_id=path)
    dmp.load_state_dict(state["model"])
    if with_optimizer:
        optim.load_state_dict(state["optimizer"])
    loaded = whole(dmp.state_dict())
    # One step on the same global batch, whatever the world size: every rank takes the same rows.
    train(dmp, optim, [batch(50, 0)], pipeline=False)
    return loaded, whole(dmp.state_dict())


# Row-wise state of a table that is cut into columns has a row for each of them in TorchRec, so it loads where the
# columns are cut alike: see test_optimizer_state_moves_as_that_of_plain_tables.
BY_ROWS = ["table_wise", "row_wise", "table_row_wise"]


@pytest.mark.parametrize("saved", BY_ROWS)
def test_checkpoint_loads_under_any_plan_and_world_size(allocation: Allocation, tmp_path: Path, saved: str) -> None:
    path = str(tmp_path / "checkpoint")
    sizes = ranks_for(saved)
    saved_by = sizes.pop("world_size")
    weights = run(save, saved_by, allocation, saved, path, **sizes)[0]
    assert Allocation.from_checkpoint(path).fingerprint == allocation.fingerprint
    # The step after loading is that of one process which never stopped, so the optimizer state arrived as well.
    expected, _ = train_reference(allocation, saved_by, "rowwise_adagrad", steps=3, then=[batch(50, 0)])
    targets: list[tuple[str, dict[str, int]]] = [
        ("table_wise", {"world_size": 1}),
        ("row_wise", {"world_size": 3}),
        *((sharding, ranks_for(sharding)) for sharding in BY_ROWS),
    ]
    for sharding, sizes in targets:
        world_size = sizes.pop("world_size")
        loaded, stepped = run(load_and_step, world_size, allocation, sharding, path, **sizes)[0]
        for name, value in weights.items():
            assert torch.equal(loaded[name], value), f"{name} differs after {saved} -> {sharding} on {world_size} ranks"
        assert_close(stepped, expected)


@pytest.mark.parametrize("sharding", ["column_wise", "grid_shard"])
def test_training_goes_on_from_a_checkpoint_of_column_shards(
    allocation: Allocation, tmp_path: Path, sharding: str
) -> None:
    sizes = ranks_for(sharding)
    world_size = sizes.pop("world_size")
    run(save, world_size, allocation, sharding, str(tmp_path / "c"), **sizes)
    _, stepped = run(load_and_step, world_size, allocation, sharding, str(tmp_path / "c"), **sizes)[0]
    shards = {name: 2 if shape[1] > 4 else 1 for name, shape in level_shapes(allocation).items()}
    args = (allocation, world_size, "rowwise_adagrad")
    assert_close(stepped, train_reference(*args, steps=3, then=[batch(50, 0)], column_shards=shards)[0])


@pytest.mark.parametrize("saved", ["column_wise", "table_column_wise", "grid_shard", "data_parallel"])
def test_weights_load_under_any_plan(allocation: Allocation, tmp_path: Path, saved: str) -> None:
    sizes = ranks_for(saved)
    weights = run(save, sizes.pop("world_size"), allocation, saved, str(tmp_path / "c"), **sizes)[0]
    for sharding in [*TYPES, *sorted(TWO_HOSTS), "mixed", "data_parallel"]:
        sizes = ranks_for(sharding)
        args = (allocation, sharding, str(tmp_path / "c"), False)
        loaded, _ = run(load_and_step, sizes.pop("world_size"), *args, **sizes)[0]
        for name, value in weights.items():
            assert torch.equal(loaded[name], value), f"{name} differs after {saved} -> {sharding}"


def outcome_of_plain(allocation: Allocation, sharding: str, path: str, saves: bool) -> str:
    """Save or load a plain collection of the level tables, with its optimizer."""
    lma = LMAEmbeddingBagCollection(tables(), allocation, device=META)
    ebc = EmbeddingBagCollection(tables=lma.levels.embedding_bag_configs(), device=META)
    apply_optimizer_in_backward(OPTIMIZERS["rowwise_adagrad"], ebc.parameters(), {"lr": LR})
    plan = plan_of(sharding, ebc, "fused")
    dmp = DistributedModelParallel(nn.ModuleDict({"ebc": ebc}), plan=plan, device=CPU)
    return outcome(dmp, dmp.fused_optimizer, path, saves)


def outcome_of_lma(allocation: Allocation, sharding: str, path: str, saves: bool) -> str:
    dmp, _, _ = build(allocation, sharding, "rowwise_adagrad")
    return outcome(dmp, dmp.fused_optimizer, path, saves)


def outcome(dmp: DistributedModelParallel, optimizer: Any, path: str, saves: bool) -> str:
    state = {"model": dmp.state_dict(), "optimizer": optimizer.state_dict()}
    try:
        (dcp.save if saves else dcp.load)(state, checkpoint_id=path)
    except BaseException as error:  # CheckpointException is one
        return type(error).__name__
    return "done"


@pytest.mark.slow
@pytest.mark.parametrize("saved", [*TYPES, *sorted(TWO_HOSTS)])
def test_optimizer_state_moves_as_that_of_plain_tables(allocation: Allocation, tmp_path: Path, saved: str) -> None:
    outcomes = {}
    for kind, function in (("plain", outcome_of_plain), ("lma", outcome_of_lma)):
        path = str(tmp_path / kind)
        sizes = ranks_for(saved)
        assert set(run(function, sizes.pop("world_size"), allocation, saved, path, True, **sizes)) == {"done"}
        for sharding in [*TYPES, *sorted(TWO_HOSTS)]:
            sizes = ranks_for(sharding)
            results = run(function, sizes.pop("world_size"), allocation, sharding, path, False, **sizes)
            outcomes[kind, sharding] = sorted(set(results))
    for sharding in [*TYPES, *sorted(TWO_HOSTS)]:
        assert outcomes["lma", sharding] == outcomes["plain", sharding], f"{saved} -> {sharding}"


def load_errors(allocation: Allocation, other: Allocation, path: str) -> tuple[str, str, bool]:
    """What is said on load_state_dict, and on the next forward when only torch.distributed.checkpoint was called."""
    messages = []
    dmp, _, _ = build(allocation, "row_wise", "sgd")
    own = whole(dmp.state_dict())
    saved = {**dmp.state_dict()}
    theirs = torch.frombuffer(bytearray.fromhex(other.fingerprint), dtype=torch.uint8).clone()
    saved["ebc.remap.fingerprint"] = theirs
    level = weight_name("c_lma8_level_2")
    saved[level] = torch.zeros_like(own[level])
    try:
        dmp.load_state_dict(saved)
    except ValueError as error:
        messages.append(str(error))
    untouched = all(torch.equal(value, own[name]) for name, value in whole(dmp.state_dict()).items())
    state = dmp.state_dict()
    dcp.save({"ebc.remap.fingerprint": theirs}, checkpoint_id=path)
    dcp.load({"ebc.remap.fingerprint": state["ebc.remap.fingerprint"]}, checkpoint_id=path)
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


def state_of_replicas(allocation: Allocation) -> tuple[bool, list[str], int]:
    dmp, _, _ = build(allocation, "table_wise", "sgd")
    sharded = dmp.module.ebc
    dmp(batch(0, dist.get_rank()))[0].backward()
    sharded_names = list(sharded.sharded_parameter_names("ebc"))
    return (
        isinstance(sharded, ShardedLMAEmbeddingBagCollection),
        [name for name, _ in dmp.named_buffers() if name not in sharded_names],
        int(sharded.remap.out_of_vocabulary),
    )


def test_ranks_count_their_own_ids_outside_of_vocabularies(allocation: Allocation) -> None:
    """DistributedDataParallel broadcasts buffers at each step, which shall not touch those of the allocation."""
    results = run(state_of_replicas, 2, allocation)
    expected = []
    for rank in range(2):
        given = features(rank)
        outside = 0
        for slot, table in SLOTS.items():
            if table != "c":
                outside += int((given[slot.split("@")[0]].values() >= TABLES[table][0]).sum())
        expected.append(outside)
    assert [outside for _, _, outside in results] == expected
    assert len(set(expected)) == 2  # else a broadcast would not show
    assert all(sharded for sharded, _, _ in results)
    assert not [name for _, broadcast, _ in results for name in broadcast if "remap" in name]
