"""FBGEMM table-batched kernels over LMA memories; the twin of torchrec/distributed/batched_embedding_kernel.py.

TorchRec describes a local shard of a memory as [local_rows, local_cols]. FBGEMM holds the same bytes as
[local_rows * n_chunks, chunk_dim], n_chunks being the chunks in the shard, and looks up one row for each chunk. The
classes here expand the input and show weights and optimizer state in the logical shape, so that everything TorchRec
builds on a kernel (sharded state_dict, fused optimizer, checkpoints) sees ordinary tables.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType as OptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    DenseTableBatchedEmbeddingBagsCodegen,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import TensorProperties
from torchrec.distributed.batched_embedding_kernel import (
    BaseBatchedEmbeddingBag,
    BatchedDenseEmbeddingBag,
    BatchedFusedEmbeddingBag,
    EmbeddingFusedOptimizer,
)
from torchrec.distributed.composable.table_batched_embedding_slice import TableBatchedEmbeddingSlice
from torchrec.distributed.embedding_types import (
    GroupedEmbeddingConfig,
    ShardedEmbeddingTable,
    compute_kernel_to_embedding_location,
)
from torchrec.distributed.types import Shard, ShardedTensor, ShardedTensorMetadata, ShardingType, ShardMetadata
from torchrec.modules.embedding_configs import DataType, data_type_to_sparse_type
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma.distributed.specs import LMASpecs
from torchrec_lma.expansion import ChunkExpansion

# FBGEMM's CPU kernels have these; the others raise deep inside its constructor.
CPU_OPTIMIZERS = (OptimType.SGD, OptimType.EXACT_SGD, OptimType.EXACT_ADAGRAD, OptimType.EXACT_ROWWISE_ADAGRAD)
# Every state of these is one value per weight or one per physical row, which is what the logical views know.
CUDA_OPTIMIZERS = (
    *CPU_OPTIMIZERS,
    OptimType.ADAM,
    OptimType.PARTIAL_ROWWISE_ADAM,
    OptimType.LAMB,
    OptimType.PARTIAL_ROWWISE_LAMB,
    OptimType.LARS_SGD,
)


class LMASplitTBE(SplitTableBatchedEmbeddingBagsCodegen):
    """A fused TBE over physical rows that shows its weights and optimizer state as logical rows.

    Args:
        n_chunks: chunks in each table's shard; the other arguments are the base class's.
    """

    def __init__(self, n_chunks: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._lma_n_chunks = list(n_chunks)

    def split_embedding_weights(self) -> list[Tensor]:
        """[local_rows, local_cols] views, one for each table."""
        return [w.view(-1, n * w.size(1)) for w, n in zip(super().split_embedding_weights(), self._lma_n_chunks)]

    def get_optimizer_state(self) -> list[dict[str, Tensor]]:
        """Each table's states: [local_rows, local_cols], or [local_rows, n_chunks] where a chunk has one value."""
        return [
            {name: state.view(-1, n * (state.size(1) if state.dim() == 2 else 1)) for name, state in states.items()}
            for states, n in zip(super().get_optimizer_state(), self._lma_n_chunks)
        ]


class LMADenseTBE(DenseTableBatchedEmbeddingBagsCodegen):
    """As LMASplitTBE, for weights that any torch optimizer trains."""

    def __init__(self, n_chunks: Sequence[int], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lma_n_chunks = list(n_chunks)

    def split_embedding_weights(self) -> list[Tensor]:
        return [w.view(-1, n * w.size(1)) for w, n in zip(super().split_embedding_weights(), self._lma_n_chunks)]


class LMAFusedOptimizer(EmbeddingFusedOptimizer):
    """TorchRec's view of the fused optimizer, with row-wise state as a ShardedTensor [rows, n_chunks].

    TorchRec keeps row-wise state as [rows], and as [rows * shards] under column-wise sharding, which is why such state
    cannot be resharded there. A chunk never spans two shards, so [rows, n_chunks] is cut exactly as the weights are.
    """

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        emb_module: LMASplitTBE,
        chunk_dim: int,
        pg: dist.ProcessGroup | None,
        create_for_table: str | None = None,
        param_weight_for_table: nn.Parameter | None = None,
    ) -> None:
        states = emb_module.get_optimizer_state() or [{} for _ in config.embedding_tables]
        per_chunk = [
            {name: state for name, state in table_states.items() if state.size(1) != weight.size(1)}
            for table_states, weight in zip(states, emb_module.split_embedding_weights())
        ]
        super().__init__(
            config,
            emb_module,
            pg,
            create_for_table,
            param_weight_for_table,
            all_optimizer_states=[
                {name: state for name, state in all_states.items() if name not in own}
                for all_states, own in zip(states, per_chunk)
            ],
        )
        shards: dict[str, list[tuple[ShardedEmbeddingTable, dict[str, Tensor]]]] = {}
        for table, own in zip(config.embedding_tables, per_chunk):
            if create_for_table in (None, table.name):
                shards.setdefault(table.name, []).append((table, own))
        first_name = next(iter(states[0]), "")
        for table_name, local in shards.items():
            weight = self.params["" if create_for_table is not None else f"{table_name}.weight"]
            for name in local[0][1]:
                # The base class's name for the first state of every optimizer, which existing checkpoints use.
                key = f"{table_name}.{'momentum1' if name == first_name else name}"
                self.state[weight][key] = _per_chunk_sharded_tensor(
                    [(table, own[name]) for table, own in local], chunk_dim, pg
                )


def _per_chunk_sharded_tensor(
    local: Sequence[tuple[ShardedEmbeddingTable, Tensor]], chunk_dim: int, pg: dist.ProcessGroup | None
) -> ShardedTensor:
    """The local shards [local_rows, local_chunks] as one ShardedTensor [rows, n_chunks], cut as the weights are."""

    def in_chunks(shard: ShardMetadata) -> ShardMetadata:
        return ShardMetadata(
            shard_offsets=[shard.shard_offsets[0], shard.shard_offsets[1] // chunk_dim],
            shard_sizes=[shard.shard_sizes[0], shard.shard_sizes[1] // chunk_dim],
            placement=shard.placement,
        )

    weights = local[0][0].global_metadata
    assert weights is not None
    metadata = ShardedTensorMetadata(
        shards_metadata=[in_chunks(shard) for shard in weights.shards_metadata],
        size=torch.Size([weights.size[0], weights.size[1] // chunk_dim]),
        tensor_properties=TensorProperties(dtype=local[0][1].dtype),
    )
    shards = []
    for table, state in local:
        assert table.local_metadata is not None
        shards.append(Shard(state, in_chunks(table.local_metadata)))
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata, process_group=pg)


class _LMAKernel(BaseBatchedEmbeddingBag[Tensor]):
    """What the fused and the dense kernel share: the expansion of raw ids to chunk rows before TBE."""

    def _init_lma(
        self,
        config: GroupedEmbeddingConfig,
        specs: LMASpecs,
        pg: dist.ProcessGroup | None,
        device: torch.device | None,
        sharding_type: ShardingType | None,
    ) -> None:
        self._on_cpu = device is None or device.type == "cpu"
        if self._on_cpu and config.data_type is DataType.BF16:
            raise ValueError("FBGEMM's CPU kernels take FP32 and FP16 weights, got BF16; choose another data_type")
        # BatchedFusedEmbeddingBag and BatchedDenseEmbeddingBag build their TBE inside __init__ from the logical
        # shapes, so theirs is skipped and the common base is initialised alone.
        BaseBatchedEmbeddingBag.__init__(self, config, pg, device, sharding_type)
        self._chunk_dim = specs.chunk_dim
        expansions: list[ChunkExpansion] = []
        feature_table_map: list[int] = []
        for index, table in enumerate(config.embedding_tables):
            expansion = _expansion(table, specs, device)
            expansions.append(expansion)
            feature_table_map.extend([index] * (table.num_features() * expansion.n_chunks))
        # A plain list: the addressing belongs to the sharded module, and this kernel's state_dict is its weights.
        self._expansions = expansions
        self._n_chunks = [expansion.n_chunks for expansion in expansions]
        self._feature_table_map = feature_table_map

    def _physical_shapes(self) -> list[tuple[int, int]]:
        return [(rows * n, self._chunk_dim) for rows, n in zip(self._local_rows, self._n_chunks)]

    def forward(
        self,
        features: KeyedJaggedTensor,
        vbe_output: Tensor | None = None,
        vbe_output_offsets: Tensor | None = None,
    ) -> Tensor:
        """Pooled embeddings of the local shards, [B, sum of local_cols over features]."""
        indices, offsets, weights = self.expand(features)
        return self.emb_module(indices=indices, offsets=offsets, per_sample_weights=weights)

    def expand(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """TBE's input: int64 indices [M], int64 offsets [F * n_chunks * B + 1], float weights [M] or None."""
        lengths = features.lengths().view(len(features.keys()), -1)  # (F, B)
        weights = features.weights_or_none() if self._config.is_weighted else None
        ends = features.offset_per_key()
        expanded, first = [], 0
        for expansion in self._expansions:
            end = first + expansion.n_features
            ids = slice(ends[first], ends[end])
            expanded.append(
                expansion(features.values()[ids], lengths[first:end], weights[ids] if weights is not None else None)
            )
            first = end
        indices, bags, all_weights = zip(*expanded)
        offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.cat(bags).to(torch.int64))
        return torch.cat(indices), offsets, torch.cat(all_weights) if weights is not None else None


def _expansion(table: ShardedEmbeddingTable, specs: LMASpecs, device: torch.device | None) -> ChunkExpansion:
    row, col = table.local_metadata.shard_offsets if table.local_metadata is not None else (0, 0)  # None: replicated
    return ChunkExpansion(
        specs.addressing[table.name],
        [specs.salt_of_feature[feature] for feature in table.feature_names],
        chunks=(col // specs.chunk_dim, (col + table.local_cols) // specs.chunk_dim),
        rows=(row, row + table.local_rows),
        device=device,
    )


class LMABatchedFusedEmbeddingBag(_LMAKernel, BatchedFusedEmbeddingBag):
    """Memories whose optimizer runs inside FBGEMM's backward pass."""

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        specs: LMASpecs,
        pg: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        sharding_type: ShardingType | None = None,
    ) -> None:
        self._init_lma(config, specs, pg, device, sharding_type)
        fused_params = dict(config.fused_params or {})
        _check_fused(specs.chunk_dim, fused_params, self._on_cpu)
        weights_precision = data_type_to_sparse_type(config.data_type)
        fused_params.setdefault("cache_precision", weights_precision)
        embedding_specs = [
            (
                rows,
                cols,
                EmbeddingLocation.HOST if self._on_cpu else compute_kernel_to_embedding_location(table.compute_kernel),
                ComputeDevice.CPU if self._on_cpu else ComputeDevice.CUDA,
            )
            for (rows, cols), table in zip(self._physical_shapes(), config.embedding_tables)
        ]
        self._emb_module = LMASplitTBE(
            self._n_chunks,
            embedding_specs=embedding_specs,
            feature_table_map=self._feature_table_map,
            pooling_mode=self._pooling,
            weights_precision=weights_precision,
            device=device,
            table_names=[table.name for table in config.embedding_tables],
            **fused_params,
        )
        self._optim = LMAFusedOptimizer(config, self._emb_module, specs.chunk_dim, pg)
        self.init_parameters()

    # ShardedEmbeddingBagCollection registers these slices as `embedding_bags.<name>.weight`, and optimizer wrappers
    # find the fused optimizer on them. They must be [local_rows, local_cols], as the state_dict hooks assume.
    @property
    def _param_per_table(self) -> dict[str, TableBatchedEmbeddingSlice]:
        tbe = self._emb_module
        storages = {EmbeddingLocation.HOST: tbe.weights_host, EmbeddingLocation.DEVICE: tbe.weights_dev}
        slices = _table_slices(self, [storages[location] for _, _, location, _ in tbe.embedding_specs])
        for name, weight in slices.items():
            weight._in_backward_optimizers = [
                LMAFusedOptimizer(self._config, tbe, self._chunk_dim, self._pg, name, weight)
            ]
        return slices

    @_param_per_table.setter
    def _param_per_table(self, value: Mapping[str, TableBatchedEmbeddingSlice]) -> None:
        pass  # the base class sets an empty one in __init__


class LMABatchedDenseEmbeddingBag(_LMAKernel, BatchedDenseEmbeddingBag):
    """Memories that autograd and any torch optimizer train; the kernel of data-parallel sharding."""

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        specs: LMASpecs,
        pg: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        sharding_type: ShardingType | None = None,
    ) -> None:
        self._init_lma(config, specs, pg, device, sharding_type)
        self._emb_module = LMADenseTBE(
            self._n_chunks,
            self._physical_shapes(),
            feature_table_map=self._feature_table_map,
            pooling_mode=self._pooling,
            use_cpu=self._on_cpu,
            weights_precision=data_type_to_sparse_type(config.data_type),
        )
        self._param_per_table = _table_slices(self, [self._emb_module.weights] * len(config.embedding_tables))
        self.init_parameters()


def _table_slices(kernel: _LMAKernel, storages: Sequence[Tensor]) -> dict[str, TableBatchedEmbeddingSlice]:
    """The part of TBE's flat storage that belongs to each table; several column shards of one table are adjacent."""
    slices: dict[str, TableBatchedEmbeddingSlice] = {}
    for index, table in enumerate(kernel.config.embedding_tables):
        if table.name in slices:
            continue
        start = int(kernel.emb_module.weights_physical_offsets[index])
        size = table.local_rows * table.local_cols * kernel.table_name_to_count[table.name]
        slices[table.name] = TableBatchedEmbeddingSlice(
            data=storages[index],
            start_offset=start,
            end_offset=start + size,
            num_embeddings=-1,
            embedding_dim=table.local_cols,
        )
    return slices


def _check_fused(chunk_dim: int, fused_params: Mapping[str, Any], on_cpu: bool) -> None:
    if chunk_dim % 4 != 0:
        raise ValueError(
            f"fused kernels take chunks of a multiple of 4 columns, got chunk_dim={chunk_dim}; choose such a one, "
            "or shard with the dense kernel (data_parallel, or compute_kernel='dense')"
        )
    optimizer = fused_params.get("optimizer", OptimType.EXACT_SGD)
    supported = CPU_OPTIMIZERS if on_cpu else CUDA_OPTIMIZERS
    if optimizer not in supported:
        raise ValueError(
            f"fused optimizer {optimizer} does not run on LMA tables on this device; choose one of "
            f"{[choice.name for choice in supported]}, or shard with the dense kernel and a torch optimizer"
        )
