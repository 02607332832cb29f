"""Quantized LMA tables through TorchRec's shard_quant_model, against the quantized module that was sharded."""

import copy
from collections.abc import Sequence

import pytest
import torch
from test_inference import CONFIG, FEATURES, Model, collection, make_batch, make_tables, quantized
from torch import nn
from torch.distributed.remote_device import _remote_device
from torchrec.distributed.global_settings import set_propogate_device
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import ShardingPlan
from torchrec.inference.modules import shard_quant_model
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma import LMAConfig, LMAEmbeddingBagCollection
from torchrec_lma.inference import DTYPES, get_inference_sharders, quantize, script
from torchrec_lma.inference.sharding import ShardedQuantLMAEmbeddingBagCollection

MEMORIES = ("memory_16", "memory_32")


def shard(
    model: nn.Module,
    sharding_type: str,
    world_size: int,
    names: Sequence[str] = MEMORIES,
    min_partition: int = CONFIG.chunk_dim,
    sharding_device: str = "cpu",
) -> tuple[nn.Module, ShardingPlan]:
    constraints = {
        name: ParameterConstraints(
            sharding_types=[sharding_type], compute_kernels=["quant"], min_partition=min_partition
        )
        for name in names
    }
    return shard_quant_model(
        copy.deepcopy(model),
        world_size=world_size,
        compute_device="cpu",
        sharding_device=sharding_device,
        sharders=get_inference_sharders(),
        constraints=constraints,
    )


@pytest.mark.parametrize("is_weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize(
    ("sharding_type", "world_size", "blocks"),
    [("table_wise", 1, 2), ("table_wise", 2, 2), ("column_wise", 2, 2 + 4), ("row_wise", 2, 4), ("row_wise", 3, 6)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sharded_lookups_give_what_the_whole_memory_gives(
    dtype: str, sharding_type: str, world_size: int, blocks: int, is_weighted: bool
) -> None:
    model = quantized(collection(make_tables(PoolingType.MEAN), is_weighted=is_weighted), dtype)
    sharded, _ = shard(model, sharding_type, world_size)
    assert isinstance(sharded.ebc, ShardedQuantLMAEmbeddingBagCollection)
    assert len(sharded.ebc.lookups) == blocks
    for seed in range(2):
        features = make_batch(is_weighted, seed)
        out, expected = sharded(features), model(features)
        for feature in FEATURES:
            if sharding_type == "row_wise":  # adds in another order
                torch.testing.assert_close(out[feature], expected[feature], rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(out[feature], expected[feature])


@pytest.mark.parametrize("is_weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("sharding_type", ["table_wise", "column_wise", "row_wise"])
def test_sharded_scripts_give_what_the_sharded_module_gives(sharding_type: str, is_weighted: bool) -> None:
    model = quantized(collection(make_tables(PoolingType.MEAN), is_weighted=is_weighted), "int8")
    sharded, _ = shard(model, sharding_type, 2)
    scripted = script(sharded)
    for seed in range(3):
        features = make_batch(is_weighted, seed)
        out, expected = scripted(features), sharded(features)
        assert all(torch.equal(out[feature], expected[feature]) for feature in FEATURES)


def test_shards_hold_the_weights_once() -> None:
    model = quantized(collection(make_tables()), "int8")
    whole = sum(lookup.tbe.weights_host.numel() for lookup in model.ebc.lookups)
    for sharding_type in ("table_wise", "column_wise", "row_wise"):
        sharded, _ = shard(model, sharding_type, 2)
        parts = [lookup.tbe.weights_host.numel() for lookup in sharded.ebc.lookups]
        assert whole <= sum(parts) <= whole + 128 * len(parts)  # FBGEMM rounds each up to a cache line
        assert len(parts) == 2 or max(parts) < 0.7 * whole


def test_a_model_of_lma_and_full_tables_is_sharded_whole() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lma = LMAEmbeddingBagCollection(make_tables(), CONFIG)
            self.full = EmbeddingBagCollection(tables=make_tables())

        def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
            return torch.cat([self.lma(features).values(), self.full(features).values()], dim=1)

    set_propogate_device(True)  # which TorchRec's own quantized tables need on the CPU
    try:
        model = quantize(Both(), torch.int8)
        features = make_batch(low=0, high=300)
        expected = model(features)
        sharded, plan = shard_quant_model(
            model, compute_device="cpu", sharding_device="cpu", sharders=get_inference_sharders()
        )
        assert {name for module in plan.plan.values() for name in module} == {*MEMORIES, "t_user", "t_place", "t_item"}
        lma = expected.size(1) // 2
        assert torch.equal(sharded(features)[:, :lma], expected[:, :lma])  # TorchRec leaves its own to be copied
        assert torch.equal(script(sharded)(features), sharded(features))
    finally:
        set_propogate_device(False)


def test_blocks_on_other_devices_come_back_to_the_devices_of_the_module() -> None:
    """The meta device stands for a GPU: it computes shapes, and says that there is nothing to copy back."""
    model = quantized(collection(make_tables()), "int8")
    _, plan = shard(model, "column_wise", 2)
    for parameter in plan.plan["ebc"].values():
        for block, device in zip(parameter.sharding_spec.shards, ("cpu", "meta")):
            block.placement = _remote_device(f"rank:0/{device}")
    sharded = ShardedQuantLMAEmbeddingBagCollection(model.ebc, plan.plan["ebc"], torch.device("cuda"))
    ctx = sharded.create_context()
    pooled = sharded.compute(ctx, sharded.input_dist(ctx, make_batch()))
    assert {part.device.type for part in pooled} == {"cpu", "meta"}
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        sharded.output_dist(ctx, pooled)


def test_memories_with_fewer_rows_than_ranks() -> None:
    tables = make_tables(dims=(16, 16))
    ebc = LMAEmbeddingBagCollection(tables, LMAConfig(memory_bytes=3 * 16 * 4, chunk_dim=8))
    assert ebc.allocation.memories[0].rows == 3
    model = quantize(Model(ebc), torch.int8)
    sharded, _ = shard(model, "row_wise", 4, ["memory_16"])
    features = make_batch()
    out, expected = sharded(features), model(features)
    for feature in FEATURES:
        torch.testing.assert_close(out[feature], expected[feature])


def test_plans_that_cut_chunks_are_refused() -> None:
    model = quantized(collection(make_tables()), "int8")
    with pytest.raises(ValueError, match=r"min_partition=8"):
        shard(model, "column_wise", 2, min_partition=4)


def test_sharding_onto_the_meta_device_is_refused() -> None:
    with pytest.raises(ValueError, match="would lose the weights"):
        shard(quantized(collection(make_tables()), "int8"), "table_wise", 1, sharding_device="meta")
