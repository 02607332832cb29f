"""QuantLMAEmbeddingBagCollection: an LMAEmbeddingBagCollection quantized for inference."""

from collections.abc import Sequence
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
    EmbeddingLocation,
    IntNBitTableBatchedEmbeddingBagsCodegen,
    PoolingMode,
)
from torch import Tensor, nn
from torchrec.modules.embedding_configs import (
    EmbeddingBagConfig,
    PoolingType,
    data_type_to_sparse_type,
    dtype_to_data_type,
    pooling_type_to_pooling_mode,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from torchrec.types import ModuleNoCopyMixin

from torchrec_lma.addressing import Addressing, MemoryAddressing
from torchrec_lma.allocation import Allocation
from torchrec_lma.expansion import ChunkExpansion
from torchrec_lma.features import feature_tables
from torchrec_lma.hashing import table_salt
from torchrec_lma.inference.rows import (
    FP8_EXPONENT_BITS,
    chunk_bytes,
    finer_dtypes,
    fp8_exponent_bias,
    quantize_chunks,
    sparse_type,
)
from torchrec_lma.modules import LMAEmbeddingBagCollection

# FBGEMM's inference kernels on the GPU take int32 rows (TorchRec casts to it, `_fx_trec_unwrap_kjt`).
_MAX_CUDA_ROWS = 2**31 - 1

# Features of one memory: ids [L], lengths [n_features, B], per-sample weights [L] or None.
MemoryFeatures = tuple[Tensor, Tensor, Tensor | None]


class ChunkLookup(nn.Module):
    """Pooled embeddings of the features that read one block (chunks and rows) of a quantized memory.

    Args:
        memory: name, dims, pooling and features of the whole memory.
        addressing: of the memory, on the device of the block. Shared with other blocks, not copied.
        salts: `table_salt` of the table of each of the memory's features.
        weights: `split_embedding_weights()[0]` of a lookup that has the whole memory: what this one takes its part of.
        kind: row format of the weights.
        exponent_bias: of FP8 weights.
        output_dtype: of the pooled embeddings.
        chunks, rows: [first, end) of the chunks and rows in the block.
        device: of the block.
    Raises:
        ValueError: the block has more chunk rows than FBGEMM can address on a GPU.
    """

    def __init__(
        self,
        memory: EmbeddingBagConfig,
        addressing: MemoryAddressing,
        salts: Sequence[int],
        weights: tuple[Tensor, Tensor | None],
        kind: SparseType,
        exponent_bias: int,
        output_dtype: torch.dtype,
        chunks: tuple[int, int],
        rows: tuple[int, int],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.device = device
        self.expansion = ChunkExpansion(addressing, salts, chunks, rows, device)
        self.index_dtype = torch.int32 if device.type == "cuda" else torch.int64
        self.n_rows = n_rows = rows[1] - rows[0]
        n_chunks = chunks[1] - chunks[0]
        if device.type == "cuda" and n_rows * n_chunks > _MAX_CUDA_ROWS:
            raise ValueError(
                f"{memory.name!r} has {n_rows} rows of {n_chunks} chunks on {device}; FBGEMM's inference kernels "
                f"address {_MAX_CUDA_ROWS} chunks on a GPU. Shard it row-wise or column-wise over more GPUs"
            )

        def part(rows_of_chunks: Tensor) -> Tensor:
            whole = rows_of_chunks.view(addressing.rows, addressing.n_chunks, -1)
            return whole[rows[0] : rows[1], chunks[0] : chunks[1]].reshape(n_rows * n_chunks, -1)

        chunk_dim = memory.embedding_dim // addressing.n_chunks
        # Bags of a block with some of the rows are not whole: their sums are added up, and then divided.
        self.divide = memory.pooling is PoolingType.MEAN and not self.expansion.all_rows
        self.tbe = IntNBitTableBatchedEmbeddingBagsCodegen(
            embedding_specs=[
                (
                    memory.name,
                    n_rows * n_chunks,
                    chunk_dim,
                    kind,
                    EmbeddingLocation.HOST if device.type == "cpu" else EmbeddingLocation.DEVICE,
                )
            ],
            feature_table_map=[0] * (len(salts) * n_chunks),
            pooling_mode=PoolingMode.SUM if self.divide else pooling_type_to_pooling_mode(memory.pooling),
            weight_lists=[(part(weights[0]), part(weights[1]) if weights[1] is not None else None)],
            device=device,
            output_dtype=data_type_to_sparse_type(dtype_to_data_type(output_dtype)),
            fp8_exponent_bits=FP8_EXPONENT_BITS,
            fp8_exponent_bias=exponent_bias,
        )

    def forward(self, ids: Tensor, lengths: Tensor, weights: Tensor | None) -> Tensor:
        """
        Args:
            ids: integer [L], raw ids of the memory's features, feature-major.
            lengths: integer [n_features, B].
            weights: float32 [L] per-sample weights, or None.
        Returns:
            [B, n_features * block columns]. A block with some of the rows of a MEAN memory gives its part of the mean.
        """
        chunk_rows, bags, weights = self.expansion(ids, lengths, weights)
        offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(bags.to(self.index_dtype))
        pooled = self.tbe(indices=chunk_rows.to(self.index_dtype), offsets=offsets, per_sample_weights=weights)
        if self.divide:
            sizes = lengths.t().clamp(min=1).unsqueeze(2)  # (B, F, 1)
            pooled = (pooled.view(sizes.size(0), sizes.size(1), -1) / sizes).flatten(1).to(pooled.dtype)
        return pooled

    def rows(self) -> Tensor:
        """uint8 [block rows, bytes of a row], scales, biases and padding included; a view."""
        return self.tbe.split_embedding_weights(split_scale_shifts=False)[0][0].view(self.n_rows, -1)

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """uint8 values [N, ...] and, for integer formats, scale and bias [N, 4] of the block's chunks; views."""
        return self.tbe.split_embedding_weights()[0]


class QuantLMAEmbeddingBagCollection(EmbeddingBagCollectionInterface, ModuleNoCopyMixin):
    """An LMAEmbeddingBagCollection whose memories are stored in few bits, over FBGEMM's IntNBit TBE.

    Made by TorchRec's `quantize_inference_model`, of which `torchrec_lma.inference.quantize` is the short form. Ids
    have the same addresses as in training: both call `ChunkExpansion`. The integer formats have a scale and a bias for
    each chunk; `row_bytes` says what a memory row takes. Runs eagerly, traces with `torchrec.fx.Tracer` (leaf module:
    IntNBitTableBatchedEmbeddingBagsCodegen), scripts, and shards through `shard_quant_model` with
    `torchrec_lma.inference.get_inference_sharders()`.

    Follows `torchrec.quant.embedding_modules.EmbeddingBagCollection`. In the state_dict a memory is
    `embedding_bags.<name>.weight`, uint8 [rows, bytes of a row].

    Args:
        float_module: trained.
        dtypes: quantization dtype of each memory, by name.
        output_dtype: of the pooled embeddings.
    """

    def __init__(
        self, float_module: LMAEmbeddingBagCollection, dtypes: dict[str, torch.dtype], output_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._embedding_bag_configs = float_module.embedding_bag_configs()
        weight = {name: bag.weight.detach() for name, bag in float_module.embedding_bags.items()}
        device = next(iter(weight.values())).device
        if device.type == "meta":
            raise ValueError("the collection is on the meta device: load its weights before it is quantized")
        self._allocation = float_module.allocation
        self._is_weighted = float_module.is_weighted()
        self._output_dtype = output_dtype
        self._device = device
        self.dtypes = dtypes
        self.table_of_feature = feature_tables(float_module.tables)
        self.features = FeatureOrder(
            self._embedding_bag_configs, float_module.weighted_mean_features, self._is_weighted
        )
        self.addressing = Addressing(self._allocation).to(device)
        self.exponent_bias = {name: fp8_exponent_bias(weight[name]) for name in weight}
        lookups = []
        for memory in self._embedding_bag_configs:
            kind = sparse_type(dtypes[memory.name])
            chunk_bytes(dtypes[memory.name], self.chunk_dim, device.type)  # raises where it cannot be stored
            chunks = weight[memory.name].view(-1, self.chunk_dim)
            lookups.append(
                self.block(
                    memory,
                    self.addressing[memory.name],
                    quantize_chunks(chunks, kind, self.exponent_bias[memory.name]),
                    (0, memory.embedding_dim // self.chunk_dim),
                    (0, memory.num_embeddings),
                    device,
                )
            )
        self.lookups = nn.ModuleList(lookups)
        self.embedding_bags = nn.ModuleDict()  # what a state_dict shows, as in TorchRec's collection
        for memory, lookup in zip(self._embedding_bag_configs, lookups):
            self.embedding_bags[memory.name] = nn.Module()
            self.embedding_bags[memory.name].register_buffer("weight", lookup.rows())

        self._register_load_state_dict_pre_hook(self._check_state_dict)

    def _check_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: object) -> None:
        self.addressing.check_state_dict(state_dict, f"{prefix}addressing.")

    def block(
        self,
        memory: EmbeddingBagConfig,
        addressing: MemoryAddressing,
        weights: tuple[Tensor, Tensor | None],
        chunks: tuple[int, int],
        rows: tuple[int, int],
        device: torch.device,
    ) -> ChunkLookup:
        """The lookup of a part of a memory, its weights copied from those of the whole."""
        return ChunkLookup(
            memory,
            addressing,
            [table_salt(self._allocation.config.seed, self.table_of_feature[f]) for f in memory.feature_names],
            weights,
            sparse_type(self.dtypes[memory.name]),
            self.exponent_bias[memory.name],
            self._output_dtype,
            chunks,
            rows,
            device,
        )

    @classmethod
    def from_float(
        cls, module: LMAEmbeddingBagCollection, use_precomputed_fake_quant: bool = False
    ) -> "QuantLMAEmbeddingBagCollection":
        """Called by `quantize_inference_model`, which puts a `qconfig` on the module.

        Raises:
            ValueError: a dtype that FBGEMM cannot store with this chunk_dim, or a module on the meta device.
        """
        qconfig: Any = module.qconfig
        default = qconfig.weight().dtype
        per_table = getattr(qconfig, "per_table_weight_dtype", None) or {}
        dtypes = {memory.name: per_table.get(memory.name, default) for memory in module.embedding_bag_configs()}
        return cls(module, dtypes, qconfig.activation().dtype)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled embeddings.

        Args:
            features: each feature of the tables, in any order, with raw ids (int32 or int64).
        Returns:
            KeyedTensor in the output dtype [B, sum of dims], one key for each feature, tables of one memory together.
        """
        pooled = [lookup(*memory) for lookup, memory in zip(self.lookups, self.features(features))]
        return self.features.keyed_tensor(pooled)

    def row_bytes(self) -> dict[str, int]:
        """Bytes that a row of each memory takes where it is now: values, scales, biases and padding."""
        return {name: bag.get_buffer("weight").size(1) for name, bag in self.embedding_bags.items()}

    def finer_dtypes(self) -> dict[str, list[str]]:
        """For each memory, the dtypes that would be more exact in no more bytes, the most exact first."""
        return {name: finer_dtypes(dtype, self.chunk_dim, self._device.type) for name, dtype in self.dtypes.items()}

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._embedding_bag_configs

    def is_weighted(self) -> bool:
        return self._is_weighted

    def output_dtype(self) -> torch.dtype:
        return self._output_dtype

    @property
    def allocation(self) -> Allocation:
        return self._allocation

    @property
    def chunk_dim(self) -> int:
        return self._allocation.config.chunk_dim

    @property
    def device(self) -> torch.device:
        return self._device


class FeatureOrder(nn.Module):
    """Takes a KeyedJaggedTensor apart into the features of each memory, and puts the pooled embeddings together.

    Args:
        memories: of the collection.
        weighted_mean_features: those whose weights are divided by the length of their bag, see `normalize_weights`.
        is_weighted: whether there are per-sample weights.
    """

    def __init__(
        self, memories: Sequence[EmbeddingBagConfig], weighted_mean_features: set[str], is_weighted: bool
    ) -> None:
        super().__init__()
        self.names = [feature for memory in memories for feature in memory.feature_names]
        self.splits = [len(memory.feature_names) for memory in memories]
        self.dims = [memory.embedding_dim for memory in memories for _ in memory.feature_names]
        self.is_weighted = is_weighted
        self.weighted_mean = [
            any(feature in weighted_mean_features for feature in memory.feature_names) for memory in memories
        ]

    def forward(self, features: KeyedJaggedTensor) -> list[MemoryFeatures]:
        parts = _in_order(features, self.names, self.is_weighted).split(self.splits)
        taken: list[MemoryFeatures] = []
        for i, n_features in enumerate(self.splits):
            lengths = parts[i].lengths().view(n_features, -1)  # (F, B)
            weights = parts[i].weights() if self.is_weighted else None
            if self.weighted_mean[i]:  # tables of one memory have one pooling
                assert weights is not None
                weights = weights / torch.repeat_interleave(lengths.reshape(-1), lengths.reshape(-1))
            taken.append((parts[i].values(), lengths, weights))
        return taken

    def keyed_tensor(self, pooled: list[Tensor]) -> KeyedTensor:
        """
        Args:
            pooled: [B, n_features * dim] of each memory.
        """
        values = pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)
        return KeyedTensor(keys=self.names, length_per_key=self.dims, values=values)


@torch.fx.wrap
def _in_order(features: KeyedJaggedTensor, names: list[str], is_weighted: bool) -> KeyedJaggedTensor:
    """The named features, in that order. Scripted as it stands: tracing cannot look at keys."""
    keys = features.keys()
    for name in names:
        if name not in keys:
            raise ValueError(f"the KeyedJaggedTensor lacks feature {name}; it has {keys}")
    if is_weighted and features.weights_or_none() is None:
        raise ValueError("the collection was trained with weights and the KeyedJaggedTensor has none")
    if keys == names:
        return features
    return features.permute([keys.index(name) for name in names])
