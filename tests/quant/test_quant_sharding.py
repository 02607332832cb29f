"""Quantized LMA tables under TorchRec's shard_quant_model, against the unsharded module and bags pooled by hand."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torchrec.distributed.fused_params import (
    FUSED_PARAM_QUANT_STATE_DICT_SPLIT_SCALE_BIAS,
    FUSED_PARAM_REGISTER_TBE_BOOL,
)
from torchrec.distributed.global_settings import set_propogate_device
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.quant_embeddingbag import (
    QuantEmbeddingBagCollectionSharder,
    ShardedQuantEmbeddingBagCollection,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.inference.modules import (
    assign_weights_to_tbe,
    get_table_to_weights_from_tbe,
    shard_quant_model,
)
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from support.quantized_model import FEATURES, Model, collection, make_batch, make_tables, quantized, same
from support.quantized_reference import decoded_tables, pooled_by_hand
from torchrec_lma.quant import quantize, script


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    """What TorchRec's sharded quantized tables need on the CPU."""
    set_propogate_device(True)
    yield
    set_propogate_device(False)


def shard(model: nn.Module, sharding_type: str, world_size: int, **options) -> tuple[nn.Module, ShardingPlan]:
    """In place, with the weights, as the docstring of torchrec_lma.quant has it."""
    names = [table for module in model.modules() for table in getattr(module, "embedding_bags", ())]
    constraints = {
        name: ParameterConstraints(sharding_types=[sharding_type], compute_kernels=["quant"], min_partition=4)
        for name in names
    }
    weights = {key: value for key, value in model.state_dict().items() if ".tbes." not in key}
    sharded, plan = shard_quant_model(
        model,
        world_size=world_size,
        compute_device="cpu",
        sharding_device="cpu",
        constraints=constraints,
        **options,
    )
    left = sharded.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys and all(".tbes." in key for key in left.missing_keys)
    return sharded, plan


@pytest.mark.parametrize("is_weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize(
    ("sharding_type", "world_size"),
    [("table_wise", 1), ("table_wise", 2), ("column_wise", 2), ("row_wise", 2), ("row_wise", 3)],
)
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_sharded_lookups_give_what_the_whole_tables_give(
    dtype: str, sharding_type: str, world_size: int, is_weighted: bool
) -> None:
    ebc = collection(PoolingType.MEAN, is_weighted)
    model = quantized(ebc, dtype)
    batches = [make_batch(is_weighted, seed) for seed in range(3)]
    expected = [model(features) for features in batches]
    by_hand = pooled_by_hand(
        decoded_tables(model.ebc.levels, dict.fromkeys(ebc.levels.embedding_bags, dtype)), ebc, batches[0]
    )
    sharded, plan = shard(model, sharding_type, world_size)
    assert type(sharded.ebc.levels) is ShardedQuantEmbeddingBagCollection
    found = plan.plan["ebc.levels"]
    assert set(found) == set(ebc.levels.embedding_bags)
    assert {parameter.sharding_type for parameter in found.values()} == {sharding_type}
    ranks = {rank for parameter in found.values() for rank in parameter.ranks}
    assert ranks == set(range(world_size))
    out = [sharded(features) for features in batches]
    for feature in FEATURES:
        np.testing.assert_allclose(out[0][feature].numpy(), by_hand[feature], rtol=1e-5, atol=1e-6)
        for pooled, whole in zip(out, expected):
            if sharding_type == "row_wise":  # adds in another order
                torch.testing.assert_close(pooled[feature], whole[feature], rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(pooled[feature], whole[feature])
    scripted = script(sharded)
    assert all(same(scripted(features), pooled) for features, pooled in zip(batches, out))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_float_tables_are_sharded_table_wise(dtype: str, world_size: int) -> None:
    """They have no scales to split from the values, which TorchRec's default sharders do."""
    model = quantized(collection(), dtype)
    features = make_batch()
    expected, weights = model(features), get_table_to_weights_from_tbe(model)
    fused_params = {FUSED_PARAM_REGISTER_TBE_BOOL: True, FUSED_PARAM_QUANT_STATE_DICT_SPLIT_SCALE_BIAS: False}
    sharded, _ = shard_quant_model(
        model,
        world_size=world_size,
        compute_device="cpu",
        sharding_device="cpu",
        sharders=[QuantEmbeddingBagCollectionSharder(fused_params=fused_params)],
    )
    assign_weights_to_tbe(sharded, weights)
    assert same(sharded(features), expected)
    assert same(script(sharded)(features), expected)


def test_shards_hold_the_weights_once() -> None:
    for sharding_type in ("table_wise", "column_wise", "row_wise"):
        model = quantized(collection(), "int8")
        whole = sum(tbe.weights_host.numel() for tbe in model.ebc.levels.tbes)
        sharded, plan = shard(model, sharding_type, 2)
        shards = sum(len(parameter.sharding_spec.shards) for parameter in plan.plan["ebc.levels"].values())
        held = sum(tbe.weights_host.numel() for tbe in sharded.ebc.levels.tbes)
        # FBGEMM rounds each up to a cache line, and column-wise each shard has scales of its own.
        scales = 4 * sum(
            parameter.sharding_spec.shards[0].shard_sizes[0] * (len(parameter.sharding_spec.shards) - 1)
            for parameter in plan.plan["ebc.levels"].values()
        )
        assert whole <= held <= whole + 128 * shards + (scales if sharding_type == "column_wise" else 0)


def test_a_model_of_lma_and_full_tables_is_sharded_whole() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lma = collection()
            self.full = EmbeddingBagCollection(tables=make_tables(prefix="full"))

        def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
            return torch.cat([self.lma(features).values(), self.full(features).values()], dim=1)

    model = quantize(Both(), torch.int8)
    features = make_batch(low=0, high=7)
    expected = model(features)
    sharded, plan = shard(model, "row_wise", 2)
    assert set(plan.plan) == {"lma.levels", "full"}
    torch.testing.assert_close(sharded(features), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(script(sharded)(features), sharded(features))


def test_tables_with_fewer_rows_than_ranks() -> None:
    model = quantized(collection(), "int8")
    assert min(table.num_embeddings for table in model.ebc.levels.embedding_bag_configs()) < 16
    features = make_batch()
    expected = model(features)
    sharded, _ = shard(model, "row_wise", 16)
    out = sharded(features)
    for feature in FEATURES:
        torch.testing.assert_close(out[feature], expected[feature], rtol=1e-5, atol=1e-6)


def test_ids_of_32_bits() -> None:
    model: Model = quantized(collection(), "int8")
    features, narrow = make_batch(), make_batch(dtype=torch.int32)
    expected = model(features)
    sharded, _ = shard(model, "table_wise", 2)
    assert same(sharded(features), expected)
    assert same(script(sharded)(narrow), expected)
