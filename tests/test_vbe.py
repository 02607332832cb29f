"""A variable batch size per feature (VBE): each feature has its own bags, and every row takes one of them."""

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import Tensor, nn
from torchrec import PoolingType
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from training import (
    BATCH,
    CPU,
    FEATURES,
    LR,
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
    whole,
)

from torchrec_lma import (
    Allocation,
    LMAEmbeddingBagCollection,
    get_default_sharders,
)


@pytest.fixture(scope="module")
def allocation() -> Allocation:
    return build_allocation()


@pytest.mark.parametrize("sharding", ["table_wise", "column_wise"])
@pytest.mark.parametrize(("pooling", "weighted"), [("SUM", False), ("SUM", True), ("MEAN", False), ("MEAN", True)])
def test_variable_batch_per_feature_equals_one_process(
    allocation: Allocation, sharding: str, pooling: str, weighted: bool
) -> None:
    kind = PoolingType[pooling]
    expected, _ = train_reference(allocation, 2, "sgd", kind, weighted, 3, "by rank")
    args = (allocation, sharding, "sgd", kind, weighted, 3, False, "auto", "by rank")
    assert_close(run(train_sharded, 2, *args)[0][0], expected)


@pytest.mark.parametrize("sharding", ["table_row_wise", "table_column_wise"])
def test_variable_batch_per_feature_on_two_hosts_equals_one_process(allocation: Allocation, sharding: str) -> None:
    expected, _ = train_reference(allocation, 4, "sgd", PoolingType.MEAN, False, 3, "by step")
    args = (allocation, sharding, "sgd", PoolingType.MEAN, False, 3, False, "auto", "by step")
    assert_close(run(train_sharded, 4, *args, local_world_size=2)[0][0], expected)


def vbe_error(allocation: Allocation, sharding: str) -> str:
    dmp, _, _ = build(allocation, sharding, "sgd")
    try:
        dmp(batch(0, dist.get_rank(), vbe="by step"))
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("sharding", "said"),
    [
        ("grid_shard", "['grid_shard']"),
        ("data_parallel", "['data_parallel']"),
        ("table_wise_dense", "does not run on the dense kernel"),
    ],
)
def test_variable_batch_per_feature_is_refused_where_torchrec_has_none(
    allocation: Allocation, sharding: str, said: str
) -> None:
    sizes = ranks_for(sharding)
    assert said in run(vbe_error, sizes.pop("world_size"), allocation, sharding, **sizes)[0]


def vbe_of_two_kernels(allocation: Allocation) -> tuple[Tensor, Tensor]:
    """Memories of different pooling are in different kernels, which write into one output."""
    configs = tables(PoolingType.MEAN)
    configs[2].pooling = PoolingType.SUM
    ebc = LMAEmbeddingBagCollection(configs, allocation.config, allocation)
    apply_optimizer_in_backward(torch.optim.SGD, ebc.parameters(), {"lr": LR})
    plan = plan_of("table_wise", ebc, "fused")
    dmp = DistributedModelParallel(nn.ModuleDict({"ebc": ebc}), plan=plan, sharders=get_default_sharders(), device=CPU)
    dmp.module["ebc"](vbe_features(3, False, 3)).wait().values().sum().backward()
    out = dmp.module["ebc"](vbe_features(4, False, 4)).wait()
    ebc.load_state_dict(whole({name.removeprefix("ebc."): value for name, value in dmp.state_dict().items()}))
    expected = ebc(vbe_features(4, False, 4))
    return (
        torch.cat([out[feature] for feature in FEATURES], 1).detach(),
        torch.cat([expected[feature] for feature in FEATURES], 1).detach(),
    )


def test_variable_batch_per_feature_in_two_kernels(allocation: Allocation) -> None:
    torch.testing.assert_close(*run(vbe_of_two_kernels, 1, allocation)[0])


def test_variable_batch_per_feature_unsharded(allocation: Allocation) -> None:
    for weighted in (False, True):
        ebc = LMAEmbeddingBagCollection(tables(), allocation.config, allocation, is_weighted=weighted)
        state = initial_state(allocation)
        ebc.load_state_dict({k.removeprefix("ebc."): v for k, v in state.items() if "ebc" in k}, strict=False)
        out = ebc(vbe_features(3, weighted, 3))
        inputs = torch.cat([torch.zeros(BATCH, 4)] + [out[feature] for feature in FEATURES], 1)
        reference = Reference(allocation, PoolingType.SUM)
        _, logits = reference(Batch(torch.zeros(BATCH, 4), vbe_features(3, weighted, 3), torch.zeros(BATCH)))
        torch.testing.assert_close(reference.over(inputs).squeeze(-1).detach(), logits)
