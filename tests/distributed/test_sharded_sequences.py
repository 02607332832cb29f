"""Sharded unpooled collections against one process, in plain torch: forward, optimizer steps, checkpoints."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from support.ranks import run
from support.sequence_model import (
    DIM,
    SLOTS,
    Reference,
    Trained,
    build,
    build_allocation,
    initial_state,
    level_shapes,
    tables,
    train_reference,
    train_sharded,
)
from support.sharded_model import assert_close, batch, features, train, whole
from torchrec_lma import Allocation, LMAEmbeddingBagCollection, LMAEmbeddingCollection, get_default_sharders

TYPES = ["table_wise", "column_wise", "row_wise"]
# sharding, optimizer, pipelined
CASES: list[tuple[str, str, bool]] = [
    *[(sharding, "rowwise_adagrad", False) for sharding in TYPES],
    *[(sharding, "adagrad", False) for sharding in ("table_wise", "row_wise")],
    *[(sharding, "sgd", True) for sharding in ("table_wise", "mixed")],
    ("replicated", "adam", False),
    ("mixed", "rowwise_adagrad", False),
    ("planner", "rowwise_adagrad", True),
]


@pytest.mark.parametrize(("sharding", "optimizer", "pipeline"), CASES)
def test_training_equals_one_process(sharding: str, optimizer: str, pipeline: bool) -> None:
    allocation = build_allocation()
    results = run(train_sharded, 2, allocation, sharding, optimizer, pipeline)
    first = results[0]
    expected, sums = train_reference(allocation, 2, optimizer, column_shards=first.column_shards)
    start = initial_state(allocation)
    for name, value in expected.items():
        assert not torch.equal(value, start[name]), f"{name} did not train"
    assert_close(first.weights, expected)
    assert set(sums) == (set(level_shapes(allocation)) if "adagrad" in optimizer else set())
    for table, expected_sums in sums.items():
        if table in first.types:
            assert_sums_close([result.sums.get(table, []) for result in results], expected_sums, first, table)
    assert first.pipelined == (["ec"] if pipeline else [])


def assert_sums_close(
    of_ranks: list[list[tuple[list[int], Tensor]]], expected: Tensor, first: Trained, table: str
) -> None:
    """The ranks' shards together are the whole running sums."""
    if expected.size(1) == first.column_shards[table]:  # row-wise state: the rows of one column shard, then the next
        expected = expected.t().flatten()
    found = torch.full_like(expected, torch.nan)
    for shards in of_ranks:
        for offsets, values in shards:
            found[tuple(slice(start, start + size) for start, size in zip(offsets, values.size()))] = values
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# --- outputs --------------------------------------------------------------------------------------------------------


def output(allocation: Allocation, sharding: str, sizes: list[int]) -> tuple[list[dict[str, list[Tensor]]], list[str]]:
    """Values, lengths and ids of this rank's batches, and the types of the sharded modules."""
    dmp, _, _ = build(allocation, sharding, "sgd", need_indices=True)
    found = []
    for i in range(2):  # the features come in another order the second time
        given = features(dist.get_rank() + i, batch=sizes[dist.get_rank()])
        if i:
            given = given.permute(list(reversed(range(len(given.keys())))))
        out = dmp.module.ec(given)
        found.append({name: [out[name].values(), out[name].lengths(), out[name].weights()] for name in SLOTS})
    detached = [{name: [each.detach() for each in of_slot] for name, of_slot in batch.items()} for batch in found]
    return detached, [type(module).__name__ for module in dmp.modules() if "Sharded" in type(module).__name__]


@pytest.mark.parametrize("sharding", TYPES)
@pytest.mark.parametrize("sizes", [[5, 2], [3, 0]], ids=str)
def test_vectors_lengths_and_ids_are_those_of_one_process(sharding: str, sizes: list[int]) -> None:
    allocation = build_allocation()
    reference = Reference(allocation)
    for rank, (found, types) in enumerate(run(output, 2, allocation, sharding, sizes)):
        assert "ShardedLMAEmbeddingCollection" in types and types.count("ShardedEmbeddingCollection") == 2
        for i, of_batch in enumerate(found):
            given = features(rank + i, batch=sizes[rank])
            for name, (values, lengths, ids) in of_batch.items():
                if not sizes[rank]:  # which KeyedJaggedTensor does not index
                    assert values.shape == (0, DIM) and len(lengths) == len(ids) == 0
                    continue
                expected = given[name.split("@")[0]]
                assert torch.equal(ids, expected.values()) and torch.equal(lengths, expected.lengths())
                torch.testing.assert_close(values, reference.vectors(SLOTS[name], ids).detach())


def output_in_half(allocation: Allocation, sharding: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """The weights after a step, vectors under them, and their ids."""
    dmp, optim, _ = build(allocation, sharding, "sgd", need_indices=True)
    train(dmp, optim, [batch(0, dist.get_rank())], pipeline=False)
    out = dmp.module.ec(features(7))
    return whole(dmp.state_dict()), {name: out[name].values().detach() for name in SLOTS}, out["f2"].weights()


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_levels_in_half_precision_give_single_precision_vectors(sharding: str) -> None:
    half = build_allocation(data_type=None)  # the default
    weights, found, ids = run(output_in_half, 2, half, sharding)[0]
    assert {value.dtype for name, value in weights.items() if "levels" in name} == {torch.float16}
    ec = LMAEmbeddingCollection(tables(), half)
    ec.load_state_dict({name.removeprefix("ec."): value for name, value in weights.items() if "ec." in name})
    expected = ec(features(7))
    for name, values in found.items():
        assert values.dtype is torch.float32
        assert torch.equal(values, expected[name].values())
    assert torch.equal(ids, features(7)["f2"].values())


# --- checkpoints ----------------------------------------------------------------------------------------------------


def save(allocation: Allocation, sharding: str, path: str) -> dict[str, Tensor]:
    dmp, optim, _ = build(allocation, sharding, "rowwise_adagrad")
    train(dmp, optim, [batch(step, dist.get_rank()) for step in range(2)], pipeline=False)
    dcp.save({"model": dmp.state_dict(), "optimizer": optim.state_dict()}, checkpoint_id=path)
    return whole(dmp.state_dict())


def load_and_step(allocation: Allocation, sharding: str, path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights that were loaded, and those after a step on one batch, whatever the world size."""
    dmp, optim, _ = build(allocation, sharding, "rowwise_adagrad")
    state = {"model": dmp.state_dict(), "optimizer": optim.state_dict()}
    dcp.load(state, checkpoint_id=path)
    dmp.load_state_dict(state["model"])
    optim.load_state_dict(state["optimizer"])
    loaded = whole(dmp.state_dict())
    train(dmp, optim, [batch(50, 0)], pipeline=False)
    return loaded, whole(dmp.state_dict())


@pytest.mark.parametrize("saved", ["table_wise", "row_wise"])
def test_checkpoints_load_under_another_plan_and_world_size(tmp_path: Path, saved: str) -> None:
    allocation, path = build_allocation(), str(tmp_path / "checkpoint")
    weights = run(save, 2, allocation, saved, path)[0]
    assert Allocation.from_checkpoint(path).fingerprint == allocation.fingerprint
    expected, _ = train_reference(allocation, 2, "rowwise_adagrad", steps=2, then=[batch(50, 0)])
    for sharding, world_size in (("row_wise", 2), ("table_wise", 2), ("table_wise", 1)):
        loaded, stepped = run(load_and_step, world_size, allocation, sharding, path)[0]
        for name, value in weights.items():
            assert torch.equal(loaded[name], value), f"{name} differs after {saved} -> {sharding} on {world_size} ranks"
        assert_close(stepped, expected)


# --- errors ---------------------------------------------------------------------------------------------------------


def errors(allocation: Allocation) -> list[str]:
    messages = []
    for sharding, wrong in (("data_parallel", ""), ("row_wise", "feature"), ("row_wise", "state")):
        try:
            dmp, _, _ = build(allocation, sharding, "sgd")
            if wrong == "state":
                theirs = torch.zeros(32, dtype=torch.uint8)
                dmp.load_state_dict({**dmp.state_dict(), "ec.remap.fingerprint": theirs})
            dmp.module.ec(features(0).permute([0, 1, 2, 3, 4]))
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_what_cannot_be_is_named() -> None:
    dense, feature, state = run(errors, 2, build_allocation())[0]
    assert "are planned with the dense kernel, as data_parallel ones are" in dense
    assert "lacks features ['f4']" in feature
    assert "was written with allocation 0000" in state


def test_default_sharders_take_both_collections_and_plan_no_dense_kernel_on_the_cpu() -> None:
    sharders = {sharder.module_type: sharder for sharder in get_default_sharders()}
    assert LMAEmbeddingBagCollection in sharders
    assert sharders[LMAEmbeddingCollection].sharding_types("cpu") == TYPES
    assert "data_parallel" in sharders[LMAEmbeddingCollection].sharding_types("cuda")
