"""TorchRec's shardings with LMA lookups: what is new is the lookup, and row-wise sharding's input dist."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
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
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding, RwSparseFeaturesDist
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingSharding
from torchrec.distributed.sharding.twcw_sharding import TwCwPooledEmbeddingSharding
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingSharding, TwRwSparseFeaturesDist
from torchrec.distributed.types import Awaitable, ShardingEnv, ShardingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma.distributed.batched_embedding_kernel import LMABatchedDenseEmbeddingBag, LMABatchedFusedEmbeddingBag
from torchrec_lma.distributed.specs import LMASpecs


class LMAGroupedPooledEmbeddingsLookup(GroupedPooledEmbeddingsLookup):
    """TorchRec's lookup with LMA kernels, chosen at the hook that the base class calls from its __init__."""

    def __init__(self, specs: LMASpecs, **kwargs: Any) -> None:
        # Past nn.Module's __setattr__, which works only after the base __init__ that already needs this.
        self.__dict__["_lma_specs"] = specs
        super().__init__(**kwargs)

    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        device: torch.device | None,
        pg: dist.ProcessGroup | None,
        sharding_type: ShardingType | None,
        env: ShardingEnv | None,
    ) -> nn.Module:
        if config.compute_kernel is EmbeddingComputeKernel.FUSED:
            return LMABatchedFusedEmbeddingBag(config, self._lma_specs, pg, device, sharding_type)
        if config.compute_kernel is EmbeddingComputeKernel.DENSE:
            return LMABatchedDenseEmbeddingBag(config, self._lma_specs, pg, device, sharding_type)
        raise ValueError(
            f"compute kernel {config.compute_kernel.value!r} does not run on LMA tables; choose 'fused' or 'dense'"
        )


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

    def create_lookup(
        self,
        device: torch.device | None = None,
        fused_params: dict[str, Any] | None = None,
        feature_processor: BaseGroupedFeatureProcessor | None = None,
    ) -> BaseEmbeddingLookup:
        return LMAGroupedPooledEmbeddingsLookup(
            self._lma_specs,
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


class LMARwSparseFeaturesDist(RwSparseFeaturesDist):
    """Sends the raw ids of every feature to every rank; each keeps the chunks whose address it owns.

    The base class buckets ids by row before it sends them, but an LMA id has a row for each chunk, on different ranks.
    """

    def forward(self, sparse_features: KeyedJaggedTensor) -> Awaitable[Awaitable[KeyedJaggedTensor]]:
        # In the order of the base class's buckets: all features for rank 0, then for rank 1, ...
        return self._dist(sparse_features.permute(list(range(self._num_features)) * self._world_size))


class LMATwRwSparseFeaturesDist(TwRwSparseFeaturesDist):
    """As LMARwSparseFeaturesDist, but to the ranks of the host that owns the memory."""

    def forward(self, sparse_features: KeyedJaggedTensor) -> Awaitable[Awaitable[KeyedJaggedTensor]]:
        # The base class's order of its buckets, all features for local rank 0, then for 1, ..., so that KJTAllToAll's
        # staggered split fits; bucket i here is a copy of feature i mod n.
        n_features = len(sparse_features.keys())
        return self._dist(sparse_features.permute([bucket % n_features for bucket in self._sf_staggered_shuffle]))


class LMARwPooledEmbeddingSharding(_LMASharding, RwPooledEmbeddingSharding):
    """Row-wise: raw ids go to every rank, partial sums come back by reduce-scatter as TorchRec's do."""

    _sharding_type = ShardingType.ROW_WISE

    def create_input_dist(self, device: torch.device | None = None) -> BaseSparseFeaturesDist[KeyedJaggedTensor]:
        assert self._pg is not None
        return LMARwSparseFeaturesDist(
            pg=self._pg,
            num_features=self._get_num_features(),
            feature_hash_sizes=self._get_feature_hash_sizes(),
            device=device if device is not None else self._device,
        )


class _LMATwRwSharding(_LMASharding):
    """What table-row-wise and grid sharding share: an input dist within hosts, and groups kept by rank."""

    _sharding_type = ShardingType.TABLE_ROW_WISE  # as both base classes; MEAN is pooled as SUM
    _grouped_embedding_configs_per_rank: list[list[GroupedEmbeddingConfig]]
    _rank: int

    def _local_groups(self) -> list[GroupedEmbeddingConfig]:
        return self._grouped_embedding_configs_per_rank[self._rank]

    def create_input_dist(self, device: torch.device | None = None) -> BaseSparseFeaturesDist[KeyedJaggedTensor]:
        return LMATwRwSparseFeaturesDist(
            pg=self._env.process_group,
            local_size=self._intra_pg.size(),  # type: ignore[attr-defined]  # of the sharding beside this mixin
            features_per_rank=self._features_per_rank(  # type: ignore[attr-defined]
                self._grouped_embedding_configs_per_rank
            ),
            feature_hash_sizes=self._get_feature_hash_sizes(),  # type: ignore[attr-defined]
            device=device if device is not None else self._device,
        )


class LMATwRwPooledEmbeddingSharding(_LMATwRwSharding, TwRwPooledEmbeddingSharding):
    """Table-row-wise: the rows of a memory over the ranks of one host."""


class LMAGridPooledEmbeddingSharding(_LMATwRwSharding, GridPooledEmbeddingSharding):
    """Grid: column shards, each table-row-wise on a host."""
