"""Sharded collections against one process, in plain torch: forward, gradients, optimizer steps, checkpoints."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run
from torch import Tensor, nn
from torchrec import DataType, KeyedJaggedTensor, PoolingType
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
)
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from training import (
    CHUNK,
    CPU,
    DIMS,
    FEATURES,
    LR,
    MEMORIES,
    OPTIMIZERS,
    TWO_HOSTS,
    Model,
    assert_close,
    assert_sums_close,
    batch,
    build,
    build_allocation,
    features,
    initial_state,
    plan_of,
    ranks_for,
    tables,
    train_reference,
    train_sharded,
    vbe_features,
    whole,
)

from torchrec_lma import (
    Allocation,
    LMAConfig,
    LMAEmbeddingBagCollection,
    LMAEmbeddingBagCollectionSharder,
    get_default_sharders,
)
from torchrec_lma.distributed.specs import RowWiseInput
from torchrec_lma.features import permute

ROW_TYPES = ("row_wise", "table_row_wise", "grid_shard")

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
    assert_close(weights, expected)
    assert set(sums) == (set(MEMORIES) if "adagrad" in optimizer else set())
    assert_sums_close([shards for _, shards, _ in results], sums)


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


def pooled_in_another_order(allocation: Allocation, sharding: str, vbe: bool) -> tuple[Tensor, Tensor]:
    """Embeddings of a batch after the first, and of the same with its features the other way round."""
    dmp, _, _ = build(allocation, sharding, "sgd", PoolingType.MEAN)
    dmp.module.ebc(vbe_features(1, False, 1) if vbe else features(1)).wait()
    one = vbe_features(2, False, 2) if vbe else features(2)
    turned = permute(one, list(reversed(FEATURES)))
    assert turned.keys() == list(reversed(one.keys()))
    results = [dmp.module.ebc(given).wait() for given in (one, turned)]
    first, second = (torch.cat([out[feature] for feature in FEATURES], 1).detach() for out in results)
    return first, second


@pytest.mark.parametrize("vbe", [False, True], ids=["", "vbe"])
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_features_may_come_in_another_order_than_at_first(allocation: Allocation, sharding: str, vbe: bool) -> None:
    first, second = run(pooled_in_another_order, 2, allocation, sharding, vbe)[0]
    torch.testing.assert_close(first, second)


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
    expected, sums = train_reference(allocation, 4, optimizer, kind, False, 4)
    assert_close(results[0][0], expected)
    assert_sums_close([shards for _, shards, _ in results], sums)


@pytest.mark.parametrize(("sharding", "optimizer"), [("row_wise", "rowwise_adagrad"), ("row_wise_dense", "adam")])
def test_memories_may_leave_ranks_without_rows(sharding: str, optimizer: str) -> None:
    small = Allocation.hashed(tables(), LMAConfig(memory_bytes=480, chunk_dim=CHUNK))
    assert [memory.rows for memory in small.memories] == [6, 2]  # 2 + 2 + 2 + 0, and 1 + 1 + 0 + 0
    results = run(train_sharded, 4, small, sharding, optimizer)
    expected, sums = train_reference(small, 4, optimizer, PoolingType.SUM, False, 4)
    assert_close(results[0][0], expected)
    if optimizer != "adam":
        assert_sums_close([shards for _, shards, _ in results], sums)


@pytest.mark.parametrize("sharding", ["table_wise", "column_wise", "row_wise", *sorted(TWO_HOSTS)])
@pytest.mark.parametrize("qcomm", ["fp16", "bf16"])  # gloo has no BF16: TorchRec takes FP16 in its place
def test_quantized_communication_trains_nearly_alike(allocation: Allocation, sharding: str, qcomm: str) -> None:
    sizes = ranks_for(sharding)
    world_size = sizes.pop("world_size")
    args = (allocation, sharding, "sgd", PoolingType.SUM, False, 3, False, "auto", "no", qcomm)
    weights = run(train_sharded, world_size, *args, **sizes)[0][0]
    expected, _ = train_reference(allocation, world_size, "sgd", PoolingType.SUM, False, 3)
    off = max(float((weights[name] - value).abs().max()) for name, value in expected.items())
    assert 1e-5 < off < 0.05, "the codec changed nothing, or too much"


def pooled_in_int8(allocation: Allocation, sharding: str) -> Tensor:
    dmp, _, _ = build(allocation, sharding, "sgd", qcomm="int8")
    out = dmp.module.ebc(features(dist.get_rank(), batch=8)).wait()  # the codec takes multiples of 32 values
    pooled = torch.cat([out[feature] for feature in FEATURES], 1)
    pooled.sum().backward()
    return pooled.detach()


@pytest.mark.parametrize("sharding", ["table_wise", "column_wise", "table_column_wise", *ROW_TYPES])
def test_int8_communication_is_near_or_refused(allocation: Allocation, sharding: str) -> None:
    sizes = ranks_for(sharding)
    world_size = sizes.pop("world_size")
    registry = get_qcomm_codecs_registry(QCommsConfig(CommType.INT8, CommType.INT8), device=CPU)
    planned = LMAEmbeddingBagCollectionSharder(qcomm_codecs_registry=registry).sharding_types("cpu")
    assert (sharding in planned) == (sharding not in ROW_TYPES)
    if sharding in ROW_TYPES:
        said = run(error_of, world_size, allocation, sharding, "sgd", "int8", **sizes)
        assert all(f"INT8 communication does not run under ['{sharding}']" in message for message in said)
        return
    ebc = LMAEmbeddingBagCollection(tables(), allocation.config, allocation)
    start = {name.removeprefix("ebc."): value for name, value in initial_state(allocation).items() if "ebc." in name}
    ebc.load_state_dict(start, strict=False)
    for rank, out in enumerate(run(pooled_in_int8, world_size, allocation, sharding, **sizes)):
        expected = ebc(features(rank, batch=8))
        off = float((out - torch.cat([expected[feature] for feature in FEATURES], 1).detach()).abs().max())
        assert 1e-5 < off < 0.05, "the codec changed nothing, or too much"


# Gloo has no all-gather of different sizes, so in VBE batches the ranks have as many bags here.
@pytest.mark.parametrize("row_wise_input", ["ids", "addresses"])
@pytest.mark.parametrize(("pooling", "weighted"), [("SUM", False), ("SUM", True), ("MEAN", False)])
@pytest.mark.parametrize("vbe", ["no", "by step"])
def test_row_wise_input_does_not_change_training(
    allocation: Allocation, row_wise_input: RowWiseInput, pooling: str, weighted: bool, vbe: str
) -> None:
    kind = PoolingType[pooling]
    args = (allocation, "row_wise", "rowwise_adagrad", kind, weighted, 3, True, row_wise_input, vbe)
    expected, _ = train_reference(allocation, 2, "rowwise_adagrad", kind, weighted, 3, vbe)
    assert_close(run(train_sharded, 2, *args)[0][0], expected)


def test_memories_may_differ_in_what_is_cheaper_to_send(allocation: Allocation) -> None:
    # On 3 ranks memory_16 (4 chunks) is fed raw ids and memory_8 (2 chunks) addresses, through one input dist.
    args = (allocation, "row_wise", "rowwise_adagrad", PoolingType.SUM, True, 3)
    expected, _ = train_reference(allocation, 3, "rowwise_adagrad", PoolingType.SUM, True, 3)
    assert_close(run(train_sharded, 3, *args)[0][0], expected)


@pytest.mark.parametrize("sharding", ["table_row_wise", "grid_shard"])
@pytest.mark.parametrize("row_wise_input", ["ids", "addresses"])
def test_row_wise_input_does_not_change_training_on_two_hosts(
    allocation: Allocation, sharding: str, row_wise_input: RowWiseInput
) -> None:
    args = (allocation, sharding, "rowwise_adagrad", PoolingType.SUM, False, 3, False, row_wise_input)
    expected, _ = train_reference(allocation, 4, "rowwise_adagrad", PoolingType.SUM, False, 3)
    assert_close(run(train_sharded, 4, *args, local_world_size=2)[0][0], expected)


def test_2d_parallelism_is_refused(allocation: Allocation) -> None:
    assert "DMPCollection" in run(error_of, 1, allocation, "table_wise", "sgd", "2d")[0]


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


@pytest.mark.parametrize("saved", ["table_wise", "column_wise", "row_wise", *sorted(TWO_HOSTS)])
def test_checkpoint_loads_under_any_plan_and_world_size(allocation: Allocation, tmp_path: Path, saved: str) -> None:
    path = str(tmp_path / "checkpoint")
    sizes = ranks_for(saved)
    saved_by = sizes.pop("world_size")
    weights = run(save, saved_by, allocation, saved, path, **sizes)[0]
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
    # The step after loading is that of one process which never stopped, so the optimizer state arrived as well.
    expected, _ = train_reference(
        allocation, saved_by, "rowwise_adagrad", PoolingType.SUM, False, 3, then=[batch(50, 0)]
    )
    for stepped in after:
        assert_close(stepped, expected)


def load_weights(allocation: Allocation, sharding: str, path: str) -> dict[str, Tensor]:
    dmp, _, _ = build(allocation, sharding, "sgd")
    state = {"model": dmp.state_dict()}
    dcp.load(state, checkpoint_id=path)
    dmp.load_state_dict(state["model"])
    return whole(dmp.state_dict())


@pytest.mark.parametrize("sharding", ["table_wise", "column_wise", "row_wise", *sorted(TWO_HOSTS)])
def test_weights_move_between_data_parallel_and_sharded(allocation: Allocation, tmp_path: Path, sharding: str) -> None:
    sizes = ranks_for(sharding)
    world_size = sizes.pop("world_size")
    for saved, loaded in [("data_parallel", sharding), (sharding, "data_parallel")]:
        path = str(tmp_path / saved)
        weights = run(save, world_size, allocation, saved, path, **sizes)[0]
        for name, value in run(load_weights, world_size, allocation, loaded, path, **sizes)[0].items():
            assert torch.equal(value, weights[name]), f"{name} differs after {saved} -> {loaded}"


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
        if wrong == "2d":
            ebc = LMAEmbeddingBagCollection(tables(), allocation.config, allocation)
            env = ShardingEnv(dist.get_world_size(), dist.get_rank(), dist.GroupMember.WORLD, output_dtensor=True)
            LMAEmbeddingBagCollectionSharder().shard(ebc, plan_of(sharding, ebc, "fused").plan["ebc"], env, CPU)
        dmp, _, _ = build(allocation, sharding, optimizer, qcomm="int8" if wrong == "int8" else "fp32")
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
        ("row_wise", "sgd", "vbe", "inverse_indices"),
        ("table_wise", "adam", "optimizer", "adam"),
        ("row_wise", "sgd", "column shard", "min_partition"),
    ],
)
def test_bad_input_is_named(allocation: Allocation, sharding: str, optimizer: str, wrong: str, said: str) -> None:
    assert said in run(error_of, 2, allocation, sharding, optimizer, wrong)[0]


def test_fused_kernels_refuse_chunks_that_fbgemm_cannot_take() -> None:
    assert "multiple of 4" in run(error_of, 1, build_allocation(chunk_dim=2), "table_wise", "sgd", "chunk")[0]
