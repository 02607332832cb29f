"""LMAEmbeddingBagCollection: an EmbeddingBagCollection whose tables share compressed memories."""

import copy
import itertools
from collections.abc import Mapping, Sequence
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
from torchrec_lma.features import check_features, feature_tables, normalize_weights, permute
from torchrec_lma.hashing import table_salt
from torchrec_lma.least_squares import blocks, check_ids, fit
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
            _set_data_type(self.embedding_bags[memory_config.name], memory_config.data_type)
        self._register_load_state_dict_pre_hook(self._check_state_dict)

    @classmethod
    @torch.no_grad()
    def from_embedding_bag_collection(
        cls,
        ebc: EmbeddingBagCollection,
        config: LMAConfig,
        allocation: Allocation | None = None,
        id_weights: Mapping[str, Tensor] | None = None,
        ids: Mapping[str, Tensor] | None = None,
    ) -> "LMAEmbeddingBagCollection":
        """Compresses trained tables: the memory whose embeddings are closest to theirs (see `least_squares`).

        Each chunk of a memory row becomes the weighted mean of that chunk over the ids that share it; chunks that no
        id uses keep their initial values. Beside the result it holds 8 bytes for each weight of one memory.

        Args:
            ebc: unsharded, FP32 or FP16, with values (not on the meta device).
            config, allocation: as for the constructor.
            id_weights: for any of the tables, [num_embeddings] >= 0, how much each id's error counts; how often the id
                occurs, plus 1, is a good weight. Without them all ids count alike.
            ids: for each table, integer [num_embeddings], the id that each row of the full table stands for where the
                model is fed raw ids from now on. Without it row r is id r.
        Returns:
            A collection on the device of `ebc`.
        Raises:
            TypeError: `ebc` is no plain EmbeddingBagCollection. ValueError: as the constructor; weights or ids that do
                not fit the tables; weights on the meta device.

        Example::

            lma = LMAEmbeddingBagCollection.from_embedding_bag_collection(ebc, LMAConfig(compression=16), allocation)
        """
        if not isinstance(ebc, EmbeddingBagCollection) or isinstance(ebc, LMAEmbeddingBagCollection):
            raise TypeError(
                f"ebc is a {type(ebc).__name__}, expected an unsharded EmbeddingBagCollection of full tables; load a "
                "sharded model's checkpoint into one, and use reallocate for LMA tables"
            )
        bags = ebc.embedding_bags
        device = next(ebc.parameters()).device
        if device.type == "meta":
            raise ValueError("the weights of ebc are on the meta device and have no values; load a checkpoint first")
        tables = [copy.copy(table) for table in ebc.embedding_bag_configs()]
        if ids is None:
            ids = {table.name: torch.arange(table.num_embeddings, device=device) for table in tables}
        lma = cls(tables, config, allocation, is_weighted=ebc.is_weighted(), device=device)
        _check_one_id_a_row(lma, ids)
        fit(lma, ids, lambda table, block: bags[table].weight[block], id_weights)
        return lma

    @torch.no_grad()
    def to_embedding_bag_collection(self, ids: Mapping[str, Tensor] | None = None) -> EmbeddingBagCollection:
        """Full tables with the embeddings of this collection, for any stack that takes a plain one.

        Args:
            ids: for each table, integer [num_embeddings], the id that each row stands for; without it row r is id r.
        Returns:
            An EmbeddingBagCollection of `tables` on the same device, filled block by block.
        Raises:
            ValueError: ids that do not fit the tables. TypeError: ids that are not integers.
        """
        device = next(self.parameters()).device
        if ids is None:
            ids = {table.name: torch.arange(table.num_embeddings, device=device) for table in self._tables}
        _check_one_id_a_row(self, ids)
        tables = [copy.copy(table) for table in self._tables]
        ebc = EmbeddingBagCollection(tables, is_weighted=self._is_weighted, device=device)
        for table in tables:
            bag = ebc.embedding_bags[table.name]
            _set_data_type(bag, table.data_type)
            for block in blocks(table.num_embeddings, table.embedding_dim):
                bag.weight[block] = self.materialize(table.name, ids[table.name][block].to(device))
        return ebc

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
            features: each feature of the tables once, with one bag per row; empty bags give zeros. With a variable
                batch size per feature (VBE), inverse indices say which bag each of the B rows has, as in TorchRec.
        Returns:
            KeyedTensor, float32 [B, sum of dims], one key for each feature, tables of one memory together.
        Raises:
            ValueError: a feature is missing or unknown, or weights or the inverse indices of VBE are missing.
        """
        check_features(features, self.table_of_feature)
        features = normalize_weights(features, self.weighted_mean_features) if self._is_weighted else features
        self.addressing.check_not_overwritten()
        features = permute(features, self._embedding_names)
        vbe = features.variable_stride_per_key()
        weights = features.weights() if self._is_weighted else None
        strides = features.stride_per_key()
        bag_ends = [0, *itertools.accumulate(strides)]
        id_ends = features.offset_per_key()
        pooled: list[Tensor] = []
        first = 0
        for memory_config in self._embedding_bag_configs:
            end = first + len(memory_config.feature_names)
            pooled.extend(
                self._pool(
                    memory_config,
                    features.values()[id_ends[first] : id_ends[end]],
                    features.lengths()[bag_ends[first] : bag_ends[end]],
                    strides[first:end] if vbe else None,
                    weights[id_ends[first] : id_ends[end]] if weights is not None else None,
                )
            )
            first = end
        if vbe:
            names, indices = features.inverse_indices()
            pooled = [bags[indices[names.index(name)]] for name, bags in zip(self._embedding_names, pooled)]
        return KeyedTensor(
            keys=self._embedding_names, length_per_key=self._lengths_per_embedding, values=torch.cat(pooled, dim=1)
        )

    def _pool(
        self,
        memory: EmbeddingBagConfig,
        ids: Tensor,
        bags: Tensor,
        bags_per_feature: list[int] | None,
        weights: Tensor | None,
    ) -> Sequence[Tensor]:
        """[B, dim] for each feature, or [B, n_features * dim] at once if all have the same number of bags."""
        expansion = ChunkExpansion(
            self.addressing[memory.name],
            [table_salt(self.config.seed, self.table_of_feature[f]) for f in memory.feature_names],
            device=ids.device,
        )
        if bags_per_feature is None:
            lengths = bags.view(expansion.n_features, -1)
            chunk_rows, chunk_bags, weights = expansion(ids, lengths, weights)
        else:
            chunk_rows, chunk_bags, weights = expansion.ragged(ids, bags, bags_per_feature, weights)
        weight = self.embedding_bags[memory.name].weight
        out = F.embedding_bag(
            chunk_rows,
            weight.view(-1, self.config.chunk_dim),  # (rows * n_chunks, chunk_dim)
            offsets=F.pad(torch.cumsum(chunk_bags, 0), (1, 0)),
            mode=pooling_type_to_str(memory.pooling),
            per_sample_weights=weights.to(weight.dtype) if weights is not None else None,
            include_last_offset=True,
        ).float()
        if bags_per_feature is not None:  # (sum of bags * n, chunk_dim)
            return out.view(-1, memory.embedding_dim).split(bags_per_feature)
        batch_size = lengths.size(1)
        out = out.view(expansion.n_features, expansion.n_chunks, batch_size, self.config.chunk_dim)
        return [out.permute(2, 0, 1, 3).reshape(batch_size, expansion.n_features * memory.embedding_dim)]

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


def _set_data_type(bag: nn.EmbeddingBag, data_type: DataType) -> None:
    """The weights of an EmbeddingBagCollection's bag in their data type: the base class knows FP32 and FP16 only."""
    if data_type is DataType.BF16:
        bag.weight = nn.Parameter(bag.weight.detach().to(data_type_to_dtype(data_type)))


def _check_one_id_a_row(ebc: LMAEmbeddingBagCollection, ids: Mapping[str, Tensor]) -> None:
    """Raises ValueError or TypeError unless `ids` has an integer for each row of each full table."""
    check_ids(ebc, ids)
    for table in ebc.tables:
        if ids[table.name].numel() != table.num_embeddings:
            raise ValueError(
                f"ids of {table.name!r} has {ids[table.name].numel()} values, expected one for each of its "
                f"{table.num_embeddings} rows (num_embeddings)"
            )


def _has_default_init(table: EmbeddingBagConfig) -> bool:
    """Whether TorchRec chose the init_fn itself, for the rows of the full table."""
    return isinstance(table.init_fn, partial) and table.init_fn.func is nn.init.uniform_


def _common(members: list[EmbeddingBagConfig], setting: str) -> Any:
    """How a memory is initialised: as its tables where they agree, else None for TorchRec's default for its rows."""
    values = {getattr(table, setting) for table in members}
    return values.pop() if len(values) == 1 else None
