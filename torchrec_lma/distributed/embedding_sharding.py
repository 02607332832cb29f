"""TorchRec's shardings with LMA lookups: what is new is the lookup, and the input dist of row-wise shardings."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_sharding import BaseEmbeddingLookup, BaseSparseFeaturesDist, EmbeddingShardingInfo
from torchrec.distributed.embedding_types import (
    BaseGroupedFeatureProcessor,
    EmbeddingComputeKernel,
    GroupedEmbeddingConfig,
)
from torchrec.distributed.sharding.cw_sharding import CwPooledEmbeddingSharding
from torchrec.distributed.sharding.dp_sharding import DpPooledEmbeddingSharding
from torchrec.distributed.sharding.grid_sharding import GridPooledEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingSharding
from torchrec.distributed.sharding.twcw_sharding import TwCwPooledEmbeddingSharding
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingSharding
from torchrec.distributed.types import ShardingEnv, ShardingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma.distributed.batched_embedding_kernel import (
    FUSED_KERNELS,
    LMABatchedDenseEmbeddingBag,
    LMABatchedFusedEmbeddingBag,
)
from torchrec_lma.distributed.input_dist import LMARwSparseFeaturesDist, LMATwRwSparseFeaturesDist
from torchrec_lma.distributed.specs import LMASpecs


class LMAGroupedPooledEmbeddingsLookup(GroupedPooledEmbeddingsLookup):
    """TorchRec's lookup with LMA kernels, chosen at the hook that the base class calls from its __init__.

    Args:
        specs: of the collection.
        row_ranks: over how many ranks the rows of each memory are; the other arguments are the base class's.
    """

    def __init__(self, specs: LMASpecs, row_ranks: int, **kwargs: Any) -> None:
        # Past nn.Module's __setattr__, which works only after the base __init__ that already needs these.
        self.__dict__["_lma_specs"] = specs
        self.__dict__["_row_ranks"] = row_ranks
        super().__init__(**kwargs)

    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        device: torch.device | None,
        pg: dist.ProcessGroup | None,
        sharding_type: ShardingType | None,
        env: ShardingEnv | None,
    ) -> nn.Module:
        if config.compute_kernel in FUSED_KERNELS:
            return LMABatchedFusedEmbeddingBag(config, self._lma_specs, self._row_ranks, pg, device, sharding_type)
        if config.compute_kernel is EmbeddingComputeKernel.DENSE:
            return LMABatchedDenseEmbeddingBag(config, self._lma_specs, self._row_ranks, pg, device, sharding_type)
        raise ValueError(
            f"compute kernel {config.compute_kernel.value!r} does not run on LMA tables; choose one of "
            f"{[kernel.value for kernel in (*FUSED_KERNELS, EmbeddingComputeKernel.DENSE)]}"
        )

    def prefetch(self, sparse_features: KeyedJaggedTensor, forward_stream: torch.cuda.Stream | None = None) -> None:
        """As the base class's, but of the chunk rows that the kernels will read, not of raw ids."""
        for kernel, features in zip(self._emb_modules, sparse_features.split(self._feature_splits)):
            if kernel.config.compute_kernel is EmbeddingComputeKernel.FUSED_UVM_CACHING:
                kernel.prefetch(features, forward_stream)

    def _forward_with_vbe_merging(self, features_by_group: list[KeyedJaggedTensor], device: torch.device) -> Tensor:
        # The base class lets the kernels of a VBE batch write into one output, which FBGEMM refuses on CPU; this is its
        # own other way, which it takes on MTIA devices only.
        if device.type == "cpu":
            return self._merge_variable_batch_embeddings(
                self._forward(features_by_group), self._vbe_splits(features_by_group)
            )
        return super()._forward_with_vbe_merging(features_by_group, device)


class _LMASharding:
    """Mixin for TorchRec's pooled shardings: their own grouping and communication, an LMA lookup."""

    _env: ShardingEnv
    _device: torch.device
    _grouped_embedding_configs: list[GroupedEmbeddingConfig]

    _sharding_type: ShardingType | None = None  # only row-wise sharding tells its kernels (it pools MEAN as SUM)
    _scale_weight_gradients = True

    def __init__(self, specs: LMASpecs, sharding_infos: list[EmbeddingShardingInfo], *args: Any, **kwargs: Any) -> None:
        self._lma_specs = specs
        super().__init__(sharding_infos, *args, **kwargs)  # type: ignore[call-arg]  # the sharding beside this mixin

    def _local_groups(self) -> list[GroupedEmbeddingConfig]:
        return self._grouped_embedding_configs

    def _row_ranks(self) -> int:
        return 1

    def create_lookup(
        self,
        device: torch.device | None = None,
        fused_params: dict[str, Any] | None = None,
        feature_processor: BaseGroupedFeatureProcessor | None = None,
    ) -> BaseEmbeddingLookup:
        return LMAGroupedPooledEmbeddingsLookup(
            self._lma_specs,
            self._row_ranks(),
            grouped_configs=self._local_groups(),
            pg=self._env.process_group,
            device=device if device is not None else self._device,
            feature_processor=feature_processor,
            scale_weight_gradients=self._scale_weight_gradients,
            sharding_type=self._sharding_type,
            env=self._env,
        )


class LMATwPooledEmbeddingSharding(_LMASharding, TwPooledEmbeddingSharding):
    """Table-wise: raw ids go once to the rank that owns the memory."""


class LMACwPooledEmbeddingSharding(_LMASharding, CwPooledEmbeddingSharding):
    """Column-wise: raw ids go once to each rank that owns some chunks of the memory."""


class LMATwCwPooledEmbeddingSharding(_LMASharding, TwCwPooledEmbeddingSharding):
    """Table-column-wise: column-wise within one host."""


class LMADpPooledEmbeddingSharding(_LMASharding, DpPooledEmbeddingSharding):
    """Data-parallel: nothing travels but gradients."""

    _scale_weight_gradients = False  # as the base class: DDP has divided the gradients already


class LMARwPooledEmbeddingSharding(_LMASharding, RwPooledEmbeddingSharding):
    """Row-wise: an input dist of its own, partial sums come back by reduce-scatter as TorchRec's do."""

    _sharding_type = ShardingType.ROW_WISE

    def _row_ranks(self) -> int:
        return self._world_size

    def create_input_dist(self, device: torch.device | None = None) -> BaseSparseFeaturesDist[KeyedJaggedTensor]:
        assert self._pg is not None
        return LMARwSparseFeaturesDist(
            pg=self._pg,
            tables=[table for group in self._grouped_embedding_configs for table in group.embedding_tables],
            specs=self._lma_specs,
            feature_hash_sizes=self._get_feature_hash_sizes(),
            device=device if device is not None else self._device,
        )


class _LMATwRwSharding(_LMASharding):
    """What table-row-wise and grid sharding share: an input dist within hosts, and groups kept by rank and host."""

    _sharding_type = ShardingType.TABLE_ROW_WISE  # as both base classes; MEAN is pooled as SUM
    _grouped_embedding_configs_per_rank: list[list[GroupedEmbeddingConfig]]
    _grouped_embedding_configs_per_node: list[list[GroupedEmbeddingConfig]]
    _rank: int
    _local_size: int

    def _local_groups(self) -> list[GroupedEmbeddingConfig]:
        return self._grouped_embedding_configs_per_rank[self._rank]

    def _row_ranks(self) -> int:
        return self._local_size

    def create_input_dist(self, device: torch.device | None = None) -> BaseSparseFeaturesDist[KeyedJaggedTensor]:
        assert self._env.process_group is not None
        return LMATwRwSparseFeaturesDist(
            pg=self._env.process_group,
            tables=[
                table
                for groups in self._grouped_embedding_configs_per_node
                for group in groups
                for table in group.embedding_tables
            ],
            specs=self._lma_specs,
            local_size=self._local_size,
            features_per_rank=self._features_per_rank(  # type: ignore[attr-defined]  # of the sharding beside this mixin
                self._grouped_embedding_configs_per_rank
            ),
            feature_hash_sizes=self._get_feature_hash_sizes(),  # type: ignore[attr-defined]
            device=device if device is not None else self._device,
        )


class LMATwRwPooledEmbeddingSharding(_LMATwRwSharding, TwRwPooledEmbeddingSharding):
    """Table-row-wise: the rows of a memory over the ranks of one host."""


class LMAGridPooledEmbeddingSharding(_LMATwRwSharding, GridPooledEmbeddingSharding):
    """Grid: column shards, each table-row-wise on a host."""
