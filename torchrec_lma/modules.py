"""LMAEmbeddingBagCollection: an EmbeddingBagCollection whose tables share compressed memories."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.distributed.utils import optimizer_type_to_emb_opt_type
from torchrec.modules.embedding_configs import (
    DataType,
    EmbeddingBagConfig,
    PoolingType,
    data_type_to_dtype,
    pooling_type_to_str,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_lma.addressing import Addressing
from torchrec_lma.allocation import Allocation
from torchrec_lma.config import LMAConfig
from torchrec_lma.expansion import ChunkExpansion
from torchrec_lma.features import check_features, feature_tables, normalize_weights
from torchrec_lma.hashing import table_salt
from torchrec_lma.memory_report import MemoryReport, report_memory


class LMAEmbeddingBagCollection(EmbeddingBagCollection):
    """An EmbeddingBagCollection in a fixed memory (LMA, arXiv 2103.06124).

    Logical tables of one embedding dim share one memory `[rows, dim]`, and an id's embedding is gathered chunk by chunk
    from addresses that are computed, not stored. To TorchRec each memory is one table named `memory_<dim>` with all
    the features: that is what `embedding_bag_configs`, a sharding plan and a state_dict show. `tables` has the logical
    ones.

    Raw ids go in: any int64 (negative ones and 64-bit hashes included) or int32, no vocabulary needed. `num_embeddings`
    of a table is only what compression is measured against.

    Args:
        tables: the logical tables. Tables of one dim need one pooling and one data type (FP32, FP16 or BF16). With
            weighted MEAN pooling a bag's embedding is sum(w_i * e_i) / length, as FBGEMM defines it.
        config: budget, chunk_dim and seed.
        allocation: from AllocationBuilder or Allocation.load; None hashes every id.
        is_weighted: whether the input KeyedJaggedTensor carries per-sample weights.
        device: of the parameters; the allocation stays on the CPU while this is "meta".
    Raises:
        ValueError: tables that cannot share a memory, a chunk_dim that does not divide a dim, a budget too small, or an
            allocation made for other tables or another config.

    Example::

        tables = [EmbeddingBagConfig(name="t_user", num_embeddings=1_000_000, embedding_dim=32, feature_names=["user"]),
                  EmbeddingBagConfig(name="t_item", num_embeddings=50_000, embedding_dim=32, feature_names=["item"])]
        ebc = LMAEmbeddingBagCollection(tables, LMAConfig(compression=16))
        features = KeyedJaggedTensor(keys=["user", "item"], values=torch.tensor([7, -3, 2**40]),
                                     lengths=torch.tensor([1, 1, 1, 0]))
        ebc(features)["user"]  # float [2, 32]
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        config: LMAConfig,
        allocation: Allocation | None = None,
        is_weighted: bool = False,
        device: torch.device | None = None,
    ) -> None:
        if allocation is None:
            allocation = Allocation.hashed(tables, config)
        else:
            allocation.check_made_for(tables, config)
        by_name = {table.name: table for table in tables}
        table_of_feature = feature_tables(tables)
        memory_configs = []
        for memory in allocation.memories:
            members = [by_name[name] for name in memory.tables]
            memory_configs.append(
                EmbeddingBagConfig(
                    name=memory.name,
                    num_embeddings=memory.rows,
                    embedding_dim=memory.dim,
                    feature_names=[f for f, table in table_of_feature.items() if table in memory.tables],
                    pooling=PoolingType.SUM if is_weighted else members[0].pooling,  # see normalize_weights
                    data_type=members[0].data_type,
                    weight_init_min=_common(members, "weight_init_min"),
                    weight_init_max=_common(members, "weight_init_max"),
                    init_fn=_common(members, "init_fn") if not any(map(_has_default_init, members)) else None,
                )
            )
        device = torch.device(device) if device is not None else None
        super().__init__(tables=memory_configs, is_weighted=is_weighted, device=device)
        self._tables = list(tables)
        self._allocation = allocation
        self.table_of_feature = table_of_feature
        self.weighted_mean_features = {
            feature
            for feature, table in table_of_feature.items()
            if is_weighted and by_name[table].pooling is PoolingType.MEAN
        }
        self.addressing = Addressing(allocation)
        if device is not None and device.type != "meta":
            self.addressing.to(device)
        for memory_config in memory_configs:
            if memory_config.data_type is DataType.BF16:  # the base class knows float32 and float16 only
                bag = self.embedding_bags[memory_config.name]
                bag.weight = nn.Parameter(bag.weight.detach().to(data_type_to_dtype(memory_config.data_type)))
        self._register_load_state_dict_pre_hook(self._check_state_dict)

    @property
    def tables(self) -> list[EmbeddingBagConfig]:
        """The logical tables, as given."""
        return self._tables

    @property
    def config(self) -> LMAConfig:
        return self._allocation.config

    @property
    def allocation(self) -> Allocation:
        return self._allocation

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled embeddings.

        Args:
            features: each feature of the tables once, with one bag per row; empty bags give zeros.
        Returns:
            KeyedTensor, float32 [B, sum of dims], one key for each feature, tables of one memory together.
        Raises:
            ValueError: a feature is missing or unknown, weights are missing, or batch sizes differ between features.
        """
        check_features(features, self.table_of_feature)
        features = normalize_weights(features, self.weighted_mean_features) if self._is_weighted else features
        self.addressing.check_not_overwritten()
        features = features.permute([features.keys().index(f) for f in self._embedding_names])
        lengths = features.lengths().view(len(self._embedding_names), -1)  # (F, B)
        weights = features.weights() if self._is_weighted else None
        ends = features.offset_per_key()
        pooled, first = [], 0
        for memory_config in self._embedding_bag_configs:
            end = first + len(memory_config.feature_names)
            ids = slice(ends[first], ends[end])
            pooled.append(
                self._pool(
                    memory_config,
                    features.values()[ids],
                    lengths[first:end],
                    weights[ids] if weights is not None else None,
                )
            )
            first = end
        return KeyedTensor(
            keys=self._embedding_names, length_per_key=self._lengths_per_embedding, values=torch.cat(pooled, dim=1)
        )

    def _pool(self, memory: EmbeddingBagConfig, ids: Tensor, lengths: Tensor, weights: Tensor | None) -> Tensor:
        expansion = ChunkExpansion(
            self.addressing[memory.name],
            [table_salt(self.config.seed, self.table_of_feature[f]) for f in memory.feature_names],
            device=ids.device,
        )
        chunk_rows, bags, weights = expansion(ids, lengths, weights)
        weight = self.embedding_bags[memory.name].weight
        out = F.embedding_bag(
            chunk_rows,
            weight.view(-1, self.config.chunk_dim),  # (rows * n_chunks, chunk_dim)
            offsets=F.pad(torch.cumsum(bags, 0), (1, 0)),
            mode=pooling_type_to_str(memory.pooling),
            per_sample_weights=weights.to(weight.dtype) if weights is not None else None,
            include_last_offset=True,
        )  # (F * n * B, chunk_dim)
        n_features, batch_size = lengths.shape
        out = out.view(n_features, expansion.n_chunks, batch_size, self.config.chunk_dim)
        return out.permute(2, 0, 1, 3).reshape(batch_size, n_features * memory.embedding_dim).float()

    def addresses(self, feature: str, ids: Tensor) -> Tensor:
        """Where the chunks of ids live.

        Args:
            feature: name of a feature; features of one table have the same addresses.
            ids: integer [N], any values.
        Returns:
            int64 [N, n_chunks] in [0, rows): `out[i, j]` is the memory row of chunk j of `ids[i]`.
        Raises:
            ValueError: an unknown feature. TypeError: ids that are not integers.
        """
        if feature not in self.table_of_feature:
            raise ValueError(f"unknown feature {feature!r}; this collection has {list(self.table_of_feature)}")
        return self._table_addresses(self.table_of_feature[feature], ids)[1]

    @torch.no_grad()
    def materialize(self, table: str, ids: Tensor) -> Tensor:
        """Ordinary embedding vectors, for any other stack.

        Args:
            table: name of a logical table.
            ids: integer [N], any values.
        Returns:
            [N, dim] in the table's data type, a copy.
        Raises:
            ValueError: an unknown table. TypeError: ids that are not integers.
        """
        if table not in {t.name for t in self._tables}:
            raise ValueError(f"unknown table {table!r}; this collection has {[t.name for t in self._tables]}")
        memory, rows = self._table_addresses(table, ids)
        weight = self.embedding_bags[memory].weight
        n_chunks = rows.size(1)
        chunks = weight.view(-1, n_chunks, self.config.chunk_dim)  # (rows, n, chunk_dim)
        return chunks[rows, torch.arange(n_chunks, device=rows.device)].flatten(1)

    def _table_addresses(self, table: str, ids: Tensor) -> tuple[str, Tensor]:
        if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
            raise TypeError(f"ids must be an integer tensor of shape [N], got {ids.dtype} of shape {list(ids.shape)}")
        memory = next(memory.name for memory in self._allocation.memories if table in memory.tables)
        self.addressing.check_not_overwritten()
        addressing = self.addressing[memory]
        salts = torch.tensor([table_salt(self.config.seed, table)], device=ids.device)
        return memory, addressing(ids, salts, 0, addressing.n_chunks).t()

    def memory_report(self) -> MemoryReport:
        """Bytes of weights, optimizer state and allocation against full tables; prints as a table."""
        optimizers = {}
        for name, bag in self.embedding_bags.items():
            # Set by torchrec's apply_optimizer_in_backward; sharding turns it into the fused optimizer.
            classes = getattr(bag.weight, "_optimizer_classes", None)
            optimizers[name] = optimizer_type_to_emb_opt_type(classes[0]) if classes else None
        return report_memory(self._allocation, optimizers)

    def reset_parameters(self) -> None:
        """Initialise the weights, and the allocation as well: `to_empty` leaves both undefined."""
        for memory_config in self._embedding_bag_configs:
            weight = self.embedding_bags[memory_config.name].weight
            self._device = weight.device  # the base class keeps "meta" here, and then initialises nothing
        super().reset_parameters()
        if hasattr(self, "addressing"):  # absent while the base class constructs itself
            self.addressing = Addressing(self._allocation).to("cpu" if self._device.type == "meta" else self._device)

    def _check_state_dict(self, state_dict: dict[str, object], prefix: str, *args: object) -> None:
        self.addressing.check_state_dict(state_dict, f"{prefix}addressing.")


def _has_default_init(table: EmbeddingBagConfig) -> bool:
    """Whether TorchRec chose the init_fn itself, for the rows of the full table."""
    return isinstance(table.init_fn, partial) and table.init_fn.func is nn.init.uniform_


def _common(members: list[EmbeddingBagConfig], setting: str) -> Any:
    """How a memory is initialised: as its tables where they agree, else None for TorchRec's default for its rows."""
    values = {getattr(table, setting) for table in members}
    return values.pop() if len(values) == 1 else None
