"""FBGEMM table-batched kernels over LMA memories; the twin of torchrec/distributed/batched_embedding_kernel.py.

TorchRec describes a local shard of a memory as [local_rows, local_cols]. FBGEMM holds the same bytes as
[local_rows * n_chunks, chunk_dim], n_chunks being the chunks in the shard, and looks up one row for each chunk. The
classes here expand the input and show weights and optimizer state in the logical shape, so that everything TorchRec
builds on a kernel (sharded state_dict, fused optimizer, checkpoints) sees ordinary tables.
"""

import itertools
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
    EmbeddingComputeKernel,
    GroupedEmbeddingConfig,
    ShardedEmbeddingTable,
    compute_kernel_to_embedding_location,
)
from torchrec.distributed.types import Shard, ShardedTensor, ShardedTensorMetadata, ShardingType, ShardMetadata
from torchrec.modules.embedding_configs import DataType, data_type_to_sparse_type
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma.distributed.input_dist import OwnedChunks, rows_per_rank, sends_addresses
from torchrec_lma.distributed.specs import LMASpecs
from torchrec_lma.expansion import ChunkExpansion

# A fused kernel's memory is on the device, or in host memory mapped into it (UVM), without or with a cache before it.
FUSED_KERNELS = (
    EmbeddingComputeKernel.FUSED,
    EmbeddingComputeKernel.FUSED_UVM,
    EmbeddingComputeKernel.FUSED_UVM_CACHING,
)
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
        shards: (local_rows, n_chunks) of each table's shard; the other arguments are the base class's.
    """

    def __init__(self, shards: Sequence[tuple[int, int]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._lma_shards = list(shards)

    def split_embedding_weights(self) -> list[Tensor]:
        """[local_rows, local_cols] views, one for each table."""
        return [_logical_rows(w, *shard) for w, shard in zip(super().split_embedding_weights(), self._lma_shards)]

    def get_optimizer_state(self) -> list[dict[str, Tensor]]:
        """Each table's states: [local_rows, local_cols], or [local_rows, n_chunks] where a chunk has one value."""
        return [
            {name: _logical_rows(state, *shard) for name, state in states.items()}
            for states, shard in zip(super().get_optimizer_state(), self._lma_shards)
        ]


class LMADenseTBE(DenseTableBatchedEmbeddingBagsCodegen):
    """As LMASplitTBE, for weights that any torch optimizer trains."""

    def __init__(self, shards: Sequence[tuple[int, int]], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lma_shards = list(shards)

    def split_embedding_weights(self) -> list[Tensor]:
        return [_logical_rows(w, *shard) for w, shard in zip(super().split_embedding_weights(), self._lma_shards)]


def _logical_rows(physical: Tensor, rows: int, n_chunks: int) -> Tensor:
    """A view [rows, n_chunks * values] of one or several values for each physical row."""
    values = physical.size(1) if physical.dim() == 2 else 1
    return physical.view(-1, n_chunks * values)[:rows]  # an empty shard has a row on the CPU: see _physical_shapes


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
        row_ranks: int,
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
        expansions: list[ChunkExpansion | OwnedChunks] = []
        feature_table_map: list[int] = []
        for index, table in enumerate(config.embedding_tables):
            expansion = _expansion(table, specs, row_ranks, device)
            expansions.append(expansion)
            feature_table_map.extend([index] * (table.num_features() * expansion.n_chunks))
        # A plain list: the addressing belongs to the sharded module, and this kernel's state_dict is its weights.
        self._expansions = expansions
        self._shards = [(rows, expansion.n_chunks) for rows, expansion in zip(self._local_rows, expansions)]
        self._n_chunks_of_feature = [e.n_chunks for e in expansions for _ in range(e.n_features)]
        self._feature_table_map = feature_table_map

    def _physical_shapes(self) -> list[tuple[int, int]]:
        # A memory with few rows leaves ranks empty, and FBGEMM's CPU kernels fail on a table without rows.
        least = 1 if self._on_cpu else 0
        return [(max(rows, least) * n, self._chunk_dim) for rows, n in self._shards]

    def forward(
        self,
        features: KeyedJaggedTensor,
        vbe_output: Tensor | None = None,
        vbe_output_offsets: Tensor | None = None,
    ) -> Tensor:
        """Pooled embeddings of the local shards, [B, sum of local_cols over features].

        With a variable batch size per feature (VBE) flat: [B, local_cols] for each feature of each rank, as FBGEMM's.
        """
        indices, offsets, weights = self.expand(features)
        allocated: dict[str, Tensor] = {}
        if vbe_output is not None and vbe_output_offsets is not None:
            repeats = torch.tensor(self._n_chunks_of_feature, device=vbe_output_offsets.device)
            allocated["vbe_output"] = vbe_output
            allocated["vbe_output_offsets"] = vbe_output_offsets.repeat_interleave(
                repeats, dim=1, output_size=len(self._feature_table_map)
            )
        return self.emb_module(
            indices=indices,
            offsets=offsets,
            per_sample_weights=weights,
            batch_size_per_feature_per_rank=self._batch_sizes(features),
            **allocated,
        )

    def _batch_sizes(self, features: KeyedJaggedTensor) -> list[list[int]] | None:
        """What TBE is told of a VBE batch: a batch size for each of its features and each rank."""
        if not features.variable_stride_per_key():
            return None
        # TBE has a feature for each chunk. The chunks of a bag are adjacent, all in the first of them, and the others
        # are empty: so the output of a feature is [B * n_chunks, chunk_dim], which already is [B, local_cols].
        batch_sizes: list[list[int]] = []
        for n_chunks, per_rank in zip(self._n_chunks_of_feature, features.stride_per_key_per_rank()):
            batch_sizes.append([n_chunks * batch_size for batch_size in per_rank])
            batch_sizes.extend([[0] * len(per_rank)] * (n_chunks - 1))
        return batch_sizes

    def expand(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """TBE's input: int64 indices [M], int64 offsets [n_chunks * number of bags + 1], float weights [M] or None."""
        vbe = features.variable_stride_per_key()
        strides = features.stride_per_key()
        bag_ends = [0, *itertools.accumulate(strides)]
        id_ends = features.offset_per_key()
        bags = features.lengths()
        weights = features.weights_or_none() if self._config.is_weighted else None
        expanded, first = [], 0
        for expansion in self._expansions:
            end = first + expansion.n_features
            ids = features.values()[id_ends[first] : id_ends[end]]
            own_bags = bags[bag_ends[first] : bag_ends[end]]
            own_weights = weights[id_ends[first] : id_ends[end]] if weights is not None else None
            expanded.append(
                expansion.ragged(ids, own_bags, strides[first:end], own_weights)
                if vbe
                else expansion(ids, own_bags.view(expansion.n_features, -1), own_weights)
            )
            first = end
        indices, all_bags, all_weights = zip(*expanded)
        offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.cat(all_bags).to(torch.int64))
        return torch.cat(indices), offsets, torch.cat(all_weights) if weights is not None else None


def _expansion(
    table: ShardedEmbeddingTable, specs: LMASpecs, row_ranks: int, device: torch.device | None
) -> ChunkExpansion | OwnedChunks:
    """From what the table's input dist sends to the chunk rows of the local shard."""
    addressing = specs.addressing[table.name]
    first_row = table.local_metadata.shard_offsets[0] if table.local_metadata is not None else 0  # None: replicated
    first_chunk, end_chunk = specs.chunks(table)
    if sends_addresses(specs.row_wise_input, row_ranks, end_chunk - first_chunk):
        block = rows_per_rank(addressing.rows, row_ranks)
        if first_row % block != 0 and table.local_rows > 0:
            raise ValueError(
                f"{table.name!r} has a row shard that starts at row {first_row}, expected a multiple of {block}, its "
                f"{addressing.rows} rows over {row_ranks} ranks; cut it evenly, or shard with row_wise_input='ids'"
            )
        return OwnedChunks(table.num_features(), end_chunk - first_chunk, block, device)
    return ChunkExpansion(
        addressing,
        [specs.salt_of_feature[feature] for feature in table.feature_names],
        chunks=(first_chunk, end_chunk),
        rows=(first_row, first_row + table.local_rows),
        device=device,
    )


class LMABatchedFusedEmbeddingBag(_LMAKernel, BatchedFusedEmbeddingBag):
    """Memories whose optimizer runs inside FBGEMM's backward pass."""

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        specs: LMASpecs,
        row_ranks: int = 1,
        pg: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        sharding_type: ShardingType | None = None,
    ) -> None:
        self._init_lma(config, specs, row_ranks, pg, device, sharding_type)
        fused_params = dict(config.fused_params or {})
        _check_fused(specs.chunk_dim, fused_params, config.compute_kernel, self._on_cpu)
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
            self._shards,
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

    def prefetch(self, features: KeyedJaggedTensor, forward_stream: torch.cuda.Stream | None) -> None:
        """Brings the chunk rows of the next batch into the cache of a UVM_CACHING memory."""
        if not self._emb_module.prefetch_pipeline:
            raise ValueError(
                "prefetching without fused_params['prefetch_pipeline'] = True gives wrong gradients (FBGEMM "
                "evicts rows that the backward pass still needs); set it in the sharder's or the planner's fused_params"
            )
        indices, offsets, _ = self.expand(features)
        self._emb_module.prefetch(
            indices=indices,
            offsets=offsets,
            forward_stream=forward_stream,
            batch_size_per_feature_per_rank=self._batch_sizes(features),
        )

    # ShardedEmbeddingBagCollection registers these slices as `embedding_bags.<name>.weight`, and optimizer wrappers
    # find the fused optimizer on them. They must be [local_rows, local_cols], as the state_dict hooks assume.
    @property
    def _param_per_table(self) -> dict[str, TableBatchedEmbeddingSlice]:
        tbe = self._emb_module
        storages = {
            EmbeddingLocation.HOST: tbe.weights_host,
            EmbeddingLocation.DEVICE: tbe.weights_dev,
            EmbeddingLocation.MANAGED: tbe.weights_uvm,
            EmbeddingLocation.MANAGED_CACHING: tbe.weights_uvm,
        }
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
        row_ranks: int = 1,
        pg: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        sharding_type: ShardingType | None = None,
    ) -> None:
        self._init_lma(config, specs, row_ranks, pg, device, sharding_type)
        self._emb_module = LMADenseTBE(
            self._shards,
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


def _check_fused(
    chunk_dim: int, fused_params: Mapping[str, Any], compute_kernel: EmbeddingComputeKernel, on_cpu: bool
) -> None:
    if on_cpu and compute_kernel is not EmbeddingComputeKernel.FUSED:
        raise ValueError(f"compute kernel {compute_kernel.value!r} needs a CUDA device; choose 'fused' on a CPU")
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
