"""The sharded twin of LMAEmbeddingBagCollection, and its sharder."""

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding_sharding import EmbeddingSharding, EmbeddingShardingInfo
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, KJTList
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionContext,
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.sharding_plan import get_default_sharders as get_torchrec_default_sharders
from torchrec.distributed.types import (
    Awaitable,
    CommOp,
    ModuleSharder,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
    ShardingType,
)
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma.addressing import Addressing
from torchrec_lma.allocation import Allocation
from torchrec_lma.distributed.batched_embedding_kernel import FUSED_KERNELS
from torchrec_lma.distributed.embedding_sharding import (
    LMACwPooledEmbeddingSharding,
    LMADpPooledEmbeddingSharding,
    LMAGridPooledEmbeddingSharding,
    LMARwPooledEmbeddingSharding,
    LMATwCwPooledEmbeddingSharding,
    LMATwPooledEmbeddingSharding,
    LMATwRwPooledEmbeddingSharding,
)
from torchrec_lma.distributed.specs import LMASpecs, RowWiseInput
from torchrec_lma.features import check_features, normalize_weights, permute, reorder_inverse_indices
from torchrec_lma.hashing import table_salt
from torchrec_lma.memory_report import MemoryReport, report_memory
from torchrec_lma.modules import LMAEmbeddingBagCollection

_SHARDINGS = {
    ShardingType.DATA_PARALLEL.value: LMADpPooledEmbeddingSharding,
    ShardingType.TABLE_WISE.value: LMATwPooledEmbeddingSharding,
    ShardingType.COLUMN_WISE.value: LMACwPooledEmbeddingSharding,
    ShardingType.ROW_WISE.value: LMARwPooledEmbeddingSharding,
    ShardingType.TABLE_COLUMN_WISE.value: LMATwCwPooledEmbeddingSharding,
    ShardingType.TABLE_ROW_WISE.value: LMATwRwPooledEmbeddingSharding,
    ShardingType.GRID_SHARD.value: LMAGridPooledEmbeddingSharding,
}

# Grid's output dist has no VBE, and FBGEMM's dense kernel has none on CPU.
_WITHOUT_VBE = (ShardingType.GRID_SHARD.value, ShardingType.DATA_PARALLEL.value)

_SUM_BEFORE_MEAN = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value)


class ShardedLMAEmbeddingBagCollection(ShardedEmbeddingBagCollection):
    """LMA memories sharded as TorchRec tables `[rows, dim]`.

    Made by LMAEmbeddingBagCollectionSharder through DistributedModelParallel. Raw ids travel in the input dist and are
    expanded to chunk rows on the rank that owns a shard, just before FBGEMM. The state_dict has the weights as
    ShardedTensors and the allocation as buffers that are equal on every rank.

    Raises:
        ValueError: a sharding type or kernel without LMA support; a column shard that is not a multiple of chunk_dim;
            a chunk_dim or fused optimizer that FBGEMM's kernels cannot take; INT8 communication of row-wise types.
    """

    def __init__(
        self,
        module: LMAEmbeddingBagCollection,
        table_name_to_parameter_sharding: dict[str, ParameterSharding],
        env: ShardingEnv,
        fused_params: dict[str, Any] | None = None,
        device: torch.device | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        module_fqn: str | None = None,
        sharded_module_order_overwrite: list[str] | None = None,
        row_wise_input: RowWiseInput = "auto",
    ) -> None:
        if env.output_dtensor:
            raise ValueError(
                "LMA memories have their optimizer state per chunk as ShardedTensors and not as DTensors, which 2D "
                "parallelism (DMPCollection) and ShardingEnv(output_dtensor=True) need; use DistributedModelParallel"
            )
        _check_column_shards(table_name_to_parameter_sharding, module.config.chunk_dim)
        _check_codecs(table_name_to_parameter_sharding, qcomm_codecs_registry)
        addressing = Addressing(module.allocation).to(device)
        # Past nn.Module's __setattr__: the base __init__ creates the lookups, which need this, and registers nothing.
        self.__dict__["_lma_specs"] = LMASpecs(
            addressing,
            module.config.chunk_dim,
            {feature: table_salt(module.config.seed, table) for feature, table in module.table_of_feature.items()},
            row_wise_input,
        )
        super().__init__(
            module,
            table_name_to_parameter_sharding,
            env,
            fused_params,
            device,
            qcomm_codecs_registry,
            module_fqn,
            sharded_module_order_overwrite,
        )
        # The base class divides by the length of bags, after the reduce-scatter, what lookups of row-wise shards pooled
        # as SUM; features listed under SUM are left alone. Its own list (torchrec 1.8.0, embeddingbag.py:659) lacks
        # grid sharding, whose MEAN stays a sum, and MEAN features that other shardings pooled, divided twice.
        self._pooling_type_to_rs_features = defaultdict(list)
        for memory_config in module.embedding_bag_configs():
            summed = table_name_to_parameter_sharding[memory_config.name].sharding_type in _SUM_BEFORE_MEAN
            pooling = memory_config.pooling if summed else PoolingType.SUM
            self._pooling_type_to_rs_features[pooling.value].extend(memory_config.feature_names)
        self._batch_keys: list[str] = []  # of the first batch
        self._has_inverse_permutation = False
        self._has_dense_kernel = any(
            sharding.compute_kernel == EmbeddingComputeKernel.DENSE.value
            for sharding in table_name_to_parameter_sharding.values()
        )
        self._has_mean_pooling_callback = PoolingType.MEAN.value in self._pooling_type_to_rs_features
        self._allocation = module.allocation
        self._weighted_mean_features = module.weighted_mean_features
        self.addressing = addressing
        self._register_load_state_dict_pre_hook(self._check_state_dict)

    @property
    def allocation(self) -> Allocation:
        return self._allocation

    def create_embedding_bag_sharding(  # type: ignore[override]  # a classmethod there, always called on an instance
        self,
        sharding_infos: list[EmbeddingShardingInfo],
        env: ShardingEnv,
        device: torch.device | None = None,
        permute_embeddings: bool = False,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> EmbeddingSharding[Any, Any, Any, Any]:
        sharding_type = sharding_infos[0].param_sharding.sharding_type
        if sharding_type not in _SHARDINGS:
            raise ValueError(
                f"sharding type {sharding_type!r} of {[info.embedding_config.name for info in sharding_infos]} does "
                f"not run on LMA tables; choose one of {list(_SHARDINGS)}"
            )
        options: dict[str, Any] = {}
        if sharding_type != ShardingType.DATA_PARALLEL.value:
            options["qcomm_codecs_registry"] = qcomm_codecs_registry
        if sharding_type in (ShardingType.COLUMN_WISE.value, ShardingType.TABLE_COLUMN_WISE.value):
            options["permute_embeddings"] = permute_embeddings
        return _SHARDINGS[sharding_type](self._lma_specs, sharding_infos, env, device, **options)

    def input_dist(
        self, ctx: EmbeddingBagCollectionContext, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        check_features(features, self._lma_specs.salt_of_feature)
        if not self._has_uninitialized_input_dist and features.keys() != self._batch_keys:
            features = permute(features, self._batch_keys)  # TorchRec keeps the order of the first batch
        if self._is_weighted:
            features = normalize_weights(features, self._weighted_mean_features)
        self.addressing.check_not_overwritten()
        if self._has_uninitialized_input_dist:
            # What the base class does on the first batch, less its warning that ids are not below num_embeddings.
            self._create_input_dist(features.keys())
            self._has_uninitialized_input_dist: bool = False
            self._batch_keys = list(features.keys())
            self._inverse_order = [features.keys()[i] for i in self._features_order] or features.keys()
            if self._has_mean_pooling_callback:
                self._init_mean_pooling_callback(features.keys(), None)
        if features.variable_stride_per_key():
            if without := sorted(set(self._sharding_types) & set(_WITHOUT_VBE)):
                raise ValueError(
                    f"a variable batch size per feature (VBE) does not run under {without} sharding, neither here nor "
                    f"for TorchRec 1.8.0's own tables; shard LMA memories with {sorted(set(_SHARDINGS) - set(without))}"
                )
            if self._has_dense_kernel:
                raise ValueError(
                    "a variable batch size per feature (VBE) does not run on the dense kernel (FBGEMM's is wrong on "
                    "CPU); shard LMA memories with the fused one"
                )
            # TorchRec 1.8.0 takes the divisors of MEAN pooling after a reduce-scatter from lengths in the order of the
            # shardings' features, and inverse indices in the batch's own. Here they are in one order.
            features = reorder_inverse_indices(features, self._inverse_order)
            if not self._has_inverse_permutation:
                self._create_inverse_indices_permute_indices(features.inverse_indices())
                self._has_inverse_permutation = True
        return super().input_dist(ctx, features)

    def memory_report(self) -> MemoryReport:
        """Bytes over all ranks of weights, fused optimizer state and allocation; prints as a table."""
        return report_memory(
            self._allocation,
            {
                info.embedding_config.name: (info.fused_params or {}).get("optimizer")
                if info.param_sharding.compute_kernel != EmbeddingComputeKernel.DENSE.value
                else None
                for infos in self.sharding_type_to_sharding_infos.values()
                for info in infos
            },
        )

    @property
    def unsharded_module_type(self) -> type[LMAEmbeddingBagCollection]:
        return LMAEmbeddingBagCollection

    def _check_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.addressing.check_state_dict(state_dict, f"{prefix}addressing.")


def _check_column_shards(plan: dict[str, ParameterSharding], chunk_dim: int) -> None:
    for name, sharding in plan.items():
        for shard in sharding.sharding_spec.shards if sharding.sharding_spec is not None else []:
            if shard.shard_offsets[1] % chunk_dim != 0 or shard.shard_sizes[1] % chunk_dim != 0:
                raise ValueError(
                    f"{name!r} has a shard of columns {shard.shard_offsets[1]} to "
                    f"{shard.shard_offsets[1] + shard.shard_sizes[1]}, which cuts a chunk of {chunk_dim} columns; plan "
                    "with LMAEmbeddingShardingPlanner, or with "
                    f"ParameterConstraints(min_partition=<a multiple of {chunk_dim}>)"
                )


def _has_int8(registry: dict[str, QuantizedCommCodecs] | None) -> bool:
    """Whether a reduce-scatter would be in INT8, which TorchRec's codec cannot do."""
    codecs = (registry or {}).get(CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER.name)
    # A codec that does nothing has a method where the others have a property, and is none of these.
    sent = {codec.quantized_dtype for codec in (codecs.forward, codecs.backward)} if codecs is not None else set()
    return bool(sent & {torch.int8, torch.uint8})


def _check_codecs(plan: dict[str, ParameterSharding], registry: dict[str, QuantizedCommCodecs] | None) -> None:
    types = sorted({sharding.sharding_type for sharding in plan.values()} & set(_SUM_BEFORE_MEAN))
    if types and _has_int8(registry):
        raise ValueError(
            f"INT8 communication does not run under {types} sharding: TorchRec's INT8 codec takes no reduce-scatter, "
            "which adds up the parts of an embedding there; take FP16 or BF16, or shard table-wise or column-wise"
        )


class LMAEmbeddingBagCollectionSharder(EmbeddingBagCollectionSharder):
    """Shards LMAEmbeddingBagCollection; TorchRec finds it by the module's type.

    Args:
        fused_params: as EmbeddingBagCollectionSharder's, passed to FBGEMM (optimizer, learning_rate, ...).
        qcomm_codecs_registry: as there.
        row_wise_input: what row-wise, table-row-wise and grid sharding send: "ids", the raw ids to each rank that has
            rows of the memory; "addresses", each chunk's row to the rank that owns it; "auto", whichever is fewer: raw
            ids if those ranks are no more than the chunks of the shard. Weights are the same either way.

    Example::

        sharders = [*torchrec.distributed.sharding_plan.get_default_sharders(), LMAEmbeddingBagCollectionSharder()]
        model = DistributedModelParallel(model, sharders=sharders)
    """

    def __init__(
        self,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        row_wise_input: RowWiseInput = "auto",
    ) -> None:
        super().__init__(fused_params, qcomm_codecs_registry)
        self.row_wise_input = row_wise_input

    def shard(
        self,
        module: LMAEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedLMAEmbeddingBagCollection:
        return ShardedLMAEmbeddingBagCollection(
            module=module,
            table_name_to_parameter_sharding=params,
            env=env,
            fused_params=self.fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
            sharded_module_order_overwrite=self._sharded_module_order_overwrite,
            row_wise_input=self.row_wise_input,
        )

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """The same on every device: TorchRec leaves row-wise out on CPU, where it runs as well. Not what the codecs of
        `qcomm_codecs_registry` cannot do."""
        without = _SUM_BEFORE_MEAN if _has_int8(self.qcomm_codecs_registry) else ()
        return [sharding_type for sharding_type in _SHARDINGS if sharding_type not in without]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Data-parallel: dense. Else fused, on CUDA also in UVM with or without a cache."""
        if sharding_type == ShardingType.DATA_PARALLEL.value:
            return [EmbeddingComputeKernel.DENSE.value]
        kernels = FUSED_KERNELS if compute_device_type == "cuda" else FUSED_KERNELS[:1]
        return [kernel.value for kernel in kernels]

    @property
    def module_type(self) -> type[LMAEmbeddingBagCollection]:
        return LMAEmbeddingBagCollection

    @property
    def sharded_module_type(self) -> type[ShardedLMAEmbeddingBagCollection]:
        return ShardedLMAEmbeddingBagCollection


def get_default_sharders() -> list[ModuleSharder[nn.Module]]:
    """TorchRec's default sharders, and the one for LMAEmbeddingBagCollection."""
    return [*get_torchrec_default_sharders(), LMAEmbeddingBagCollectionSharder()]
