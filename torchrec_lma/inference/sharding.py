"""QuantLMAEmbeddingBagCollection over the devices of one process, for `shard_quant_model`."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding_types import BaseQuantEmbeddingSharder, EmbeddingComputeKernel
from torchrec.distributed.types import (
    EnumerableShardingSpec,
    ModuleSharder,
    NullShardedModuleContext,
    ParameterSharding,
    ShardedModule,
    ShardingEnv,
    ShardingType,
)
from torchrec.inference.modules import DEFAULT_SHARDERS
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_lma.addressing import Addressing
from torchrec_lma.inference.modules import ChunkLookup, MemoryFeatures, QuantLMAEmbeddingBagCollection


class ShardedQuantLMAEmbeddingBagCollection(
    ShardedModule[list[MemoryFeatures], list[Tensor], KeyedTensor, NullShardedModuleContext]
):
    """A quantized collection of which each device looks up a block (rows and chunks) of each memory.

    Raw ids go to every device that has a block of their memory and are addressed there, as in training; the pooled
    blocks come back, those of equal columns are added and the others are put side by side. The blocks are ordinary
    TBEs, so every row format works under every sharding type. Traces and scripts.

    Follows `torchrec.distributed.quant_embeddingbag.ShardedQuantEmbeddingBagCollection`. It differs in that the weights
    come along: TorchRec leaves them to be copied after sharding.

    Args:
        module: what is sharded. Its weights are copied.
        params: the plan of each memory.
        device: "cpu", where all blocks are; or "cuda", where they are at the plan's placements. Pooled embeddings come
            back to the device of `module`.
    Raises:
        ValueError: the device is "meta", or a shard's columns are no whole chunks.
    """

    def __init__(
        self, module: QuantLMAEmbeddingBagCollection, params: dict[str, ParameterSharding], device: torch.device
    ) -> None:
        super().__init__()
        if device.type == "meta":
            raise ValueError(
                "sharding_device='meta' would lose the weights; give shard_quant_model sharding_device='cpu' or 'cuda'"
            )
        self._embedding_bag_configs = module.embedding_bag_configs()
        self._device = module.device
        self.features = module.features
        lookups: list[ChunkLookup] = []
        # Of each memory, the blocks of each range of columns: {(first column, end): indices in lookups}.
        self._blocks: list[dict[tuple[int, int], list[int]]] = []
        addressing: dict[torch.device, Addressing] = {}
        for memory, whole in zip(self._embedding_bag_configs, module.lookups):
            spec = params[memory.name].sharding_spec
            assert isinstance(spec, EnumerableShardingSpec)
            blocks: dict[tuple[int, int], list[int]] = {}
            for shard in spec.shards:
                (row, column), (rows, columns) = shard.shard_offsets, shard.shard_sizes
                if rows == 0:  # a memory with fewer rows than ranks
                    continue
                if column % module.chunk_dim or columns % module.chunk_dim:
                    raise ValueError(
                        f"the plan cuts {memory.name!r} at columns [{column}, {column + columns}), which are no whole "
                        f"chunks of {module.chunk_dim}; pass ParameterConstraints(min_partition={module.chunk_dim})"
                    )
                where = device if device.type == "cpu" else shard.placement.device()
                if where not in addressing:
                    addressing[where] = Addressing(module.allocation).to(where)
                blocks.setdefault((column, column + columns), []).append(len(lookups))
                lookups.append(
                    module.block(
                        memory,
                        addressing[where][memory.name],
                        cast(ChunkLookup, whole).weights(),
                        (column // module.chunk_dim, (column + columns) // module.chunk_dim),
                        (row, row + rows),
                        where,
                    )
                )
            self._blocks.append(blocks)
        self.lookups = nn.ModuleList(lookups)
        self._devices = [lookup.device for lookup in lookups]
        # Known before tracing: where all is on one device, there is nothing to trace.
        self._moves = any(device != self._device for device in self._devices)

    def input_dist(self, ctx: NullShardedModuleContext, features: KeyedJaggedTensor) -> list[MemoryFeatures]:
        """The features of each memory."""
        return self.features(features)

    def compute(self, ctx: NullShardedModuleContext, dist_input: list[MemoryFeatures]) -> list[Tensor]:
        """[B, n_features * block columns] of each block, on its device."""
        pooled: list[Tensor] = []
        for features, blocks in zip(dist_input, self._blocks):
            for block in [block for same_columns in blocks.values() for block in same_columns]:
                pooled.append(self.lookups[block](*(self._to(part, self._devices[block]) for part in features)))
        return pooled

    def output_dist(self, ctx: NullShardedModuleContext, output: list[Tensor]) -> KeyedTensor:
        """The pooled embeddings of whole memories, on the device of the module that was sharded."""
        memories, parts = [], iter(self._to(part, self._device) for part in output)
        for memory, blocks in zip(self._embedding_bag_configs, self._blocks):
            columns = []
            for (first, end), same_columns in sorted(blocks.items()):
                total = next(parts)
                for _ in same_columns[1:]:
                    total = total + next(parts)
                columns.append(total.view(-1, len(memory.feature_names), end - first))  # (B, F, columns)
            memories.append((columns[0] if len(columns) == 1 else torch.cat(columns, dim=2)).flatten(1))
        return self.features.keyed_tensor(memories)

    def _to(self, tensor: Any, device: torch.device) -> Any:
        if tensor is None or not self._moves:
            return tensor
        return tensor.to(device, non_blocking=device.type != "cpu")  # the CPU would read before the copy is there

    def compute_and_output_dist(self, ctx: NullShardedModuleContext, input: list[MemoryFeatures]) -> KeyedTensor:
        return self.output_dist(ctx, self.compute(ctx, input))

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """As the unsharded module's. Features are on the device of the module that was sharded."""
        ctx = self.create_context()
        return self.compute_and_output_dist(ctx, self.input_dist(ctx, features))

    def create_context(self) -> NullShardedModuleContext:
        return NullShardedModuleContext()

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._embedding_bag_configs

    @property
    def unsharded_module_type(self) -> type[QuantLMAEmbeddingBagCollection]:
        return QuantLMAEmbeddingBagCollection


class QuantLMAEmbeddingBagCollectionSharder(BaseQuantEmbeddingSharder[QuantLMAEmbeddingBagCollection]):
    """Table-wise, row-wise and column-wise, for `shard_quant_model(sharders=get_inference_sharders())`.

    A plan sees the memories, [rows, dim]: column-wise shards are whole chunks, so pass
    ParameterConstraints(min_partition=...) a multiple of chunk_dim with it.
    """

    def shard(
        self,
        module: QuantLMAEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv | dict[str, ShardingEnv],
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedQuantLMAEmbeddingBagCollection:
        return ShardedQuantLMAEmbeddingBagCollection(module, params, device or module.device)

    def shardable_parameters(self, module: QuantLMAEmbeddingBagCollection) -> dict[str, nn.Parameter]:
        """What the planner measures: [rows, dim], a byte for each value."""
        return {
            memory.name: nn.Parameter(
                torch.empty(memory.num_embeddings, memory.embedding_dim, dtype=torch.uint8, device="meta"),
                requires_grad=False,
            )
            for memory in module.embedding_bag_configs()
        }

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value, ShardingType.COLUMN_WISE.value]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return [EmbeddingComputeKernel.QUANT.value]

    @property
    def module_type(self) -> type[QuantLMAEmbeddingBagCollection]:
        return QuantLMAEmbeddingBagCollection


def get_inference_sharders() -> list[ModuleSharder[nn.Module]]:
    """TorchRec's sharders of quantized modules, and the one of LMA tables."""
    return [*DEFAULT_SHARDERS, cast(ModuleSharder[nn.Module], QuantLMAEmbeddingBagCollectionSharder())]
