"""A variable batch size per feature (VBE): each feature has its own bags, and every row takes one of them."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding.grid_sharding import BaseGridEmbeddingSharding

from support.ranks import run
from support.sharded_model import (
    BATCH,
    CPU,
    META,
    Reference,
    assert_close,
    batch,
    build,
    build_allocation,
    initial_state,
    plan_of,
    ranks_for,
    tables,
    train_reference,
    train_sharded,
    vbe_features,
)
from torchrec_lma import Allocation, LMAEmbeddingBagCollection

# What TorchRec asks of a sharding type for VBE; inherited, it only raises.
GRID_TAKES_IT = "uncombined_embedding_dims" in vars(BaseGridEmbeddingSharding)


@pytest.fixture(scope="module")
def allocation() -> Allocation:
    return build_allocation()


@pytest.mark.parametrize("sharding", ["table_wise", "column_wise"])
@pytest.mark.parametrize(
    ("pooling", "weighted", "pipeline"), [("SUM", False, True), ("SUM", True, False), ("mixed", True, False)]
)
def test_training_equals_one_process(
    allocation: Allocation, sharding: str, pooling: str, weighted: bool, pipeline: bool
) -> None:
    expected, _ = train_reference(allocation, 2, "sgd", pooling, weighted, 3, "by rank")
    args = (allocation, sharding, "sgd", pooling, weighted, 3, pipeline, "by rank")
    assert_close(run(train_sharded, 2, *args)[0].weights, expected)


# Gloo has no all-gather of different sizes, so under row-wise types the ranks have as many bags.
@pytest.mark.parametrize(
    "sharding", ["row_wise", "table_row_wise", "table_column_wise", *(["grid_shard"] if GRID_TAKES_IT else [])]
)
def test_training_with_as_many_bags_on_all_ranks_equals_one_process(allocation: Allocation, sharding: str) -> None:
    sizes = ranks_for(sharding)
    world_size = sizes.pop("world_size")
    expected, _ = train_reference(allocation, world_size, "sgd", "mixed", False, 3, "by step")
    args = (allocation, sharding, "sgd", "mixed", False, 3, False, "by step")
    assert_close(run(train_sharded, world_size, *args, **sizes)[0].weights, expected)


def outcome_of_plain(allocation: Allocation, sharding: str) -> str:
    """What TorchRec says of a batch of the level tables of its own collection, without LMA."""
    lma = LMAEmbeddingBagCollection(tables(), allocation)
    rows = lma.remap(vbe_features(0, False, 0))
    ebc = EmbeddingBagCollection(tables=lma.levels.embedding_bag_configs(), device=META)
    dmp = DistributedModelParallel(
        nn.ModuleDict({"ebc": ebc}),
        plan=plan_of(sharding, ebc, "dense" if "dense" in sharding else "fused"),
        device=CPU,
    )
    return outcome(dmp.module["ebc"], rows)


def outcome_of_lma(allocation: Allocation, sharding: str) -> str:
    dmp, _, _ = build(allocation, sharding, "sgd")
    return outcome(dmp.module.ebc, vbe_features(0, False, 0))


def outcome(ebc: nn.Module, given: KeyedJaggedTensor) -> str:
    try:
        ebc(given).wait().values().sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


@pytest.mark.parametrize("sharding", ["data_parallel", *([] if GRID_TAKES_IT else ["grid_shard"])])
def test_types_without_vbe_say_what_they_say_of_plain_tables(allocation: Allocation, sharding: str) -> None:
    sizes = ranks_for(sharding)
    world_size = sizes.pop("world_size")
    said = run(outcome_of_lma, world_size, allocation, sharding, **sizes)
    assert said == run(outcome_of_plain, world_size, allocation, sharding, **sizes)
    assert "done" not in said


def pooled_in_another_order(allocation: Allocation) -> tuple[Tensor, Tensor, list[str]]:
    """Embeddings of a batch after the first, and of the same with its features the other way round."""
    dmp, _, _ = build(allocation, "row_wise", "sgd", "mixed")
    dmp.module.ebc(vbe_features(1, False, 1)).wait()
    one = vbe_features(2, False, 2)
    order = list(reversed(range(len(one.keys()))))
    turned = KeyedJaggedTensor(
        keys=[one.keys()[i] for i in order],
        values=torch.cat([one[one.keys()[i]].values() for i in order]),
        lengths=torch.cat([one[one.keys()[i]].lengths() for i in order]),
        stride_per_key_per_rank=[one.stride_per_key_per_rank()[i] for i in order],
        inverse_indices=one.inverse_indices(),
    )
    first, second = (dmp.module.ebc(given).wait().values().detach() for given in (one, turned))
    return first, second, turned.keys()


def test_features_may_come_in_another_order_than_at_first(allocation: Allocation) -> None:
    for first, second, keys in run(pooled_in_another_order, 2, allocation):
        assert keys == list(reversed(vbe_features(2, False, 2).keys()))
        torch.testing.assert_close(second, first)


@pytest.mark.parametrize("weighted", [False, True])
def test_an_unsharded_collection_takes_it(allocation: Allocation, weighted: bool) -> None:
    ebc = LMAEmbeddingBagCollection(tables("mixed"), allocation, is_weighted=weighted)
    state = initial_state(allocation)
    ebc.load_state_dict({k.removeprefix("ebc."): v for k, v in state.items() if "ebc" in k}, strict=False)
    inputs = torch.cat([torch.zeros(BATCH, 4), ebc(vbe_features(3, weighted, 3)).values()], 1)
    reference = Reference(allocation, "mixed")
    _, logits = reference(Batch(torch.zeros(BATCH, 4), vbe_features(3, weighted, 3), torch.zeros(BATCH)))
    torch.testing.assert_close(reference.over(inputs).squeeze(-1).detach(), logits)


def error_without_inverse_indices(allocation: Allocation) -> str:
    dmp, _, _ = build(allocation, "row_wise", "sgd")
    given = batch(0, dist.get_rank(), vbe="by step")
    one = given.sparse_features
    given.sparse_features = KeyedJaggedTensor(
        keys=one.keys(),
        values=one.values(),
        lengths=one.lengths(),
        stride_per_key_per_rank=one.stride_per_key_per_rank(),
    )
    try:
        dmp(given)
    except ValueError as error:
        return str(error)
    return "no error"


def test_missing_inverse_indices_are_named(allocation: Allocation) -> None:
    for said in run(error_without_inverse_indices, 2, allocation):
        assert "has a variable batch size per feature (VBE) and inverse_indices for None" in said
