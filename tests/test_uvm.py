"""Kernels in UVM: only for CUDA, so they are constructed on the meta device here and their lookups are not run."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.distributed.types import ShardedTensorMetadata, ShardMetadata
from torchrec.modules.embedding_configs import DataType

from torchrec_lma import Allocation, LMAConfig, LMAEmbeddingBagCollection, LMAEmbeddingBagCollectionSharder
from torchrec_lma.addressing import Addressing
from torchrec_lma.distributed.batched_embedding_kernel import LMABatchedFusedEmbeddingBag
from torchrec_lma.distributed.embedding_sharding import LMAGroupedPooledEmbeddingsLookup
from torchrec_lma.distributed.specs import LMASpecs
from torchrec_lma.hashing import table_salt

DIM, CHUNK = 16, 4
UVM_KERNELS = [EmbeddingComputeKernel.FUSED_UVM, EmbeddingComputeKernel.FUSED_UVM_CACHING]
TABLES = [EmbeddingBagConfig(name="t", num_embeddings=4000, embedding_dim=DIM, feature_names=["f0", "f1"])]
ALLOCATION = Allocation.hashed(TABLES, LMAConfig(compression=4, chunk_dim=CHUNK))
ROWS = ALLOCATION.memories[0].rows
SPECS = LMASpecs(Addressing(ALLOCATION), CHUNK, dict.fromkeys(["f0", "f1"], table_salt(0, "t")))


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    """The optimizer state is a ShardedTensor, which needs a process group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def config(kernel: EmbeddingComputeKernel, device: str = "meta", **fused_params: Any) -> GroupedEmbeddingConfig:
    shard = ShardMetadata(shard_offsets=[0, 0], shard_sizes=[ROWS, DIM], placement=f"rank:0/{device}")
    table = ShardedEmbeddingTable(
        name="memory_16",
        num_embeddings=ROWS,
        embedding_dim=DIM,
        feature_names=["f0", "f1"],
        embedding_names=["f0", "f1"],
        local_rows=ROWS,
        local_cols=DIM,
        compute_kernel=kernel,
        local_metadata=shard,
        global_metadata=ShardedTensorMetadata(shards_metadata=[shard], size=torch.Size([ROWS, DIM])),
    )
    params = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD} | fused_params
    return GroupedEmbeddingConfig(DataType.FP32, PoolingType.SUM, False, False, kernel, [table], fused_params=params)


def on_meta(kernel: EmbeddingComputeKernel, **fused_params: Any) -> LMABatchedFusedEmbeddingBag:
    with mock.patch("torch.cuda.get_device_properties", return_value=SimpleNamespace(total_memory=80 << 30)):
        return LMABatchedFusedEmbeddingBag(config(kernel, **fused_params), SPECS, device=torch.device("meta"))


@pytest.mark.parametrize("kernel", UVM_KERNELS)
def test_memory_lies_in_uvm_and_is_shown_as_logical_rows(kernel: EmbeddingComputeKernel) -> None:
    lookup = on_meta(kernel, prefetch_pipeline=kernel is EmbeddingComputeKernel.FUSED_UVM_CACHING)
    tbe = lookup.emb_module
    assert tbe.weights_uvm.numel() == ROWS * DIM and tbe.weights_dev.numel() == 0
    assert tbe.embedding_specs[0][:2] == (ROWS * DIM // CHUNK, CHUNK)
    assert dict(lookup.named_parameters_by_table())["memory_16"].shape == (ROWS, DIM)
    assert [tuple(weight.shape) for weight in lookup.split_embedding_weights()] == [(ROWS, DIM)]
    state = tbe.get_optimizer_state()[0]
    assert [tuple(value.shape) for value in state.values()] == [(ROWS, DIM // CHUNK)]


@pytest.mark.parametrize("load_factor", [0.1, 0.5])
def test_cache_settings_reach_fbgemm(load_factor: float) -> None:
    tbe = on_meta(EmbeddingComputeKernel.FUSED_UVM_CACHING, cache_load_factor=load_factor).emb_module
    assert tbe.embedding_specs[0][2] is EmbeddingLocation.MANAGED_CACHING
    cached_rows = tbe.lxu_cache_weights.size(0)
    assert cached_rows == pytest.approx(load_factor * ROWS * DIM // CHUNK, abs=64)  # sets of 32 or 64 rows


def test_prefetch_asks_for_the_chunk_rows_of_the_batch() -> None:
    ebc = LMAEmbeddingBagCollection(TABLES, ALLOCATION.config, ALLOCATION)
    with mock.patch("torch.cuda.get_device_properties", return_value=SimpleNamespace(total_memory=80 << 30)):
        lookup = LMAGroupedPooledEmbeddingsLookup(
            SPECS,
            1,
            grouped_configs=[config(EmbeddingComputeKernel.FUSED_UVM_CACHING, prefetch_pipeline=True)],
            device=torch.device("meta"),
        )
    kernel = lookup._emb_modules[0]
    kernel._expansions = LMABatchedFusedEmbeddingBag(config(EmbeddingComputeKernel.FUSED, "cpu"), SPECS)._expansions
    ids = torch.tensor([3, 99, -7])
    features = KeyedJaggedTensor(keys=["f0", "f1"], values=ids, lengths=torch.tensor([2, 0, 1, 0]))
    with mock.patch.object(kernel.emb_module, "prefetch") as prefetch:
        lookup.prefetch(features)
    (call,) = prefetch.call_args_list
    rows = ebc.addresses("f0", ids)
    chunk = torch.arange(DIM // CHUNK)
    expected = rows * (DIM // CHUNK) + chunk  # (3, n)
    assert call.kwargs["indices"].tolist() == [*expected[:2].t().reshape(-1).tolist(), *expected[2].tolist()]
    assert call.kwargs["offsets"].tolist() == [0, 2, 2, 4, 4, 6, 6, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12]


def test_prefetch_without_its_pipeline_setting_is_refused() -> None:
    kernel = on_meta(EmbeddingComputeKernel.FUSED_UVM_CACHING)
    with pytest.raises(ValueError, match="prefetch_pipeline"):
        kernel.prefetch(None, None)


@pytest.mark.parametrize("kernel", UVM_KERNELS)
def test_uvm_is_refused_on_cpu(kernel: EmbeddingComputeKernel) -> None:
    with pytest.raises(ValueError, match="needs a CUDA device"):
        LMABatchedFusedEmbeddingBag(config(kernel), SPECS, device=torch.device("cpu"))


def test_planner_is_offered_uvm_on_cuda_only() -> None:
    sharder = LMAEmbeddingBagCollectionSharder()
    assert sharder.compute_kernels("table_wise", "cpu") == ["fused"]
    assert sharder.compute_kernels("table_wise", "cuda") == ["fused", "fused_uvm", "fused_uvm_caching"]
    assert sharder.compute_kernels("data_parallel", "cuda") == ["dense"]
