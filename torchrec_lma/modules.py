"""LMAEmbeddingBagCollection: what an EmbeddingBagCollection does, with tables that share compressed memories."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.types import ShardedModule
from torchrec.distributed.utils import optimizer_type_to_emb_opt_type
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType, data_type_to_dtype
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_lma.allocation.artifact import Allocation, MemoryAllocation
from torchrec_lma.config import LMAConfig
from torchrec_lma.features import Slot, bag_lengths, cast_weights, checked, slots_of, to_int64
from torchrec_lma.memory_report import MemoryReport, report_memory
from torchrec_lma.regroup import divide_by_lengths, pieces_of, regroup
from torchrec_lma.remap import Remap, level_key, whole_key

# torch.fx leaves alone what is wrapped in the module that calls it.
for _function in ("bag_lengths", "cast_weights", "checked", "divide_by_lengths", "regroup"):
    torch.fx.wrap(_function)


class LMAEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """What an EmbeddingBagCollection does, in a fixed memory (LMA, arXiv 2103.06124).

    Three parts in a row: `remap` turns raw ids into rows, `levels`, a plain EmbeddingBagCollection, looks them up, and
    regroup puts the pooled levels side by side. Logical tables of one embedding dim share a memory, a list of levels
    whose widths add up to the dim; each level is an ordinary TorchRec table, `levels.embedding_bags.<name>`. What a
    frequent id has for itself on many levels, a rare one has on the first only, or shares.

    Output keys, dims and their order are those of an EmbeddingBagCollection of the same tables, which this class
    contains and is not: TorchRec's functions that wrap, fuse or shard plain collections find `levels`.

    Args:
        tables: the logical tables, SUM or MEAN. With weighted MEAN pooling a bag's embedding is sum(w_i * e_i) /
            length, as FBGEMM defines it. Their weight_init_min, weight_init_max and init_fn initialise the levels where
            all tables of a memory agree.
        allocation: who has which row: from AllocationBuilder, Allocation.load or Allocation.hashed. The config is its.
        is_weighted: whether the input KeyedJaggedTensor carries per-sample weights.
        device: of the parameters; the allocation stays on the CPU while this is "meta".
        strict: an id outside of its table's [0, num_embeddings) is an error. Without it such ids are treated as unseen,
            and counted in `remap.out_of_vocabulary`. Tables of raw ids (`LMAConfig.raw_ids`) take any integer.
    Raises:
        ValueError: an allocation made for other tables.

    Example::

        tables = [EmbeddingBagConfig(name="t_user", num_embeddings=1_000_000, embedding_dim=32, feature_names=["user"]),
                  EmbeddingBagConfig(name="t_item", num_embeddings=50_000, embedding_dim=32, feature_names=["item"])]
        builder = AllocationBuilder(tables, LMAConfig(compression=16))
        for batch in loader:
            builder.update(batch.sparse_features)
        ebc = LMAEmbeddingBagCollection(tables, builder.build())
        features = KeyedJaggedTensor(keys=["user", "item"], values=torch.tensor([7, 3, 41]),
                                     lengths=torch.tensor([1, 1, 1, 0]))
        ebc(features)["user"]  # float [2, 32]
    """

    __jit_unused_properties__ = ["allocation", "config", "device", "strict", "tables"]

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        allocation: Allocation,
        is_weighted: bool = False,
        device: torch.device | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(allocation, Allocation):
            raise TypeError(
                f"allocation is a {type(allocation).__name__}; give AllocationBuilder(tables, config).build() or "
                "Allocation.hashed(tables, config)"
            )
        allocation.check_made_for(tables)
        self._tables = list(tables)
        self._allocation = allocation
        self._is_weighted = is_weighted
        slots = slots_of(self._tables)
        self._slots = {slot.name: slot for slot in slots}
        self._names = [slot.name for slot in slots]
        self._dims = [slot.dim for slot in slots]
        self._features = [slot.feature for slot in slots]
        means = {table.name for table in tables if table.pooling is PoolingType.MEAN}
        self._is_mean = [slot.table in means for slot in slots]
        self._has_mean = any(self._is_mean)
        self._piece_keys, self._piece_widths = pieces_of(slots, allocation)

        device = torch.device(device) if device is not None else None
        self.remap = Remap(allocation, slots, is_weighted)
        self.levels = EmbeddingBagCollection(
            tables=level_tables(self._tables, allocation, slots), is_weighted=is_weighted, device=device
        )
        for config in self.levels.embedding_bag_configs():
            _set_data_type(self.levels.embedding_bags[config.name], config.data_type)
        if device is not None and device.type != "meta":
            self.remap.to(device)
        self.strict = strict
        self._weight_dtype = data_type_to_dtype(allocation.config.weight_type)
        self._register_load_state_dict_pre_hook(self._check_state_dict)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled embeddings.

        Args:
            features: has the features of the tables, and maybe others, which are ignored; ids are integers of any width
                and empty bags give zeros. With a variable batch size per feature (VBE), inverse indices say which bag
                each of the B rows has, as in TorchRec.
        Returns:
            KeyedTensor, float32 [B, sum of dims], with the keys of an EmbeddingBagCollection of the same tables.
        Raises:
            TypeError: ids that are not integers.
            ValueError: a feature, weights or the inverse indices of VBE are missing; lengths that do not add up to the
                values; with `strict`, an id outside of its vocabulary; the weights were loaded from a checkpoint of
                another allocation.
        """
        features = checked(features, self._features, self._is_weighted)
        rows = self.remap(features)
        if not torch.jit.is_scripting():
            self.remap.check_not_overwritten()
            if isinstance(self.levels, ShardedModule):
                _warn_of_missing_sharder()
            # nn.EmbeddingBag wants weights of its own type; FBGEMM's kernels take float32.
            if self._is_weighted and type(self.levels) is EmbeddingBagCollection:
                rows = cast_weights(rows, next(self.levels.parameters()).dtype)
        pooled = self.levels(rows)
        values = regroup(pooled, self._piece_keys, self._piece_widths)
        if self._has_mean:
            lengths = bag_lengths(features, self._features)
            values = divide_by_lengths(values, lengths, self._is_mean, self._dims)
        return KeyedTensor(keys=self._names, length_per_key=self._dims, values=values)

    @property
    def strict(self) -> bool:
        """Whether an id outside of its vocabulary is an error."""
        return self.remap.strict

    @strict.setter
    def strict(self, value: bool) -> None:
        self.remap.strict = value

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The logical tables, as given; `levels.embedding_bag_configs()` has what TorchRec stores and shards."""
        return self._tables

    def is_weighted(self) -> bool:
        return self._is_weighted

    @property
    def config(self) -> LMAConfig:
        return self._allocation.config

    @property
    def allocation(self) -> Allocation:
        return self._allocation

    @property
    def device(self) -> torch.device:
        return self.levels.device

    def __getattr__(self, name: str) -> Any:
        # A property cannot say this: torch.nn.Module puts its own words in place of an AttributeError's.
        if name == "embedding_bags":
            raise AttributeError(
                "an LMAEmbeddingBagCollection has no embedding_bags of its logical tables: `levels.embedding_bags` has "
                "the tables that TorchRec stores, `materialize` gives embeddings. TorchRec's sharders of modules that "
                "hold a collection cannot shard it: give sharders=torchrec_lma.get_default_sharders()"
            )
        if name == "embedding_configs":
            raise AttributeError(
                "an LMAEmbeddingBagCollection has no embedding_configs, which ManagedCollisionEmbeddingBagCollection "
                "asks for: it needs no managed collisions, LMAConfig(raw_ids=True) takes any ids"
            )
        return super().__getattr__(name)

    def reset_parameters(self) -> None:
        """Initialise the weights, and the allocation as well: `to_empty` leaves both undefined."""
        device = next(self.levels.parameters()).device
        self.levels._device = device  # TorchRec keeps "meta" here, and then initialises nothing
        self.levels.reset_parameters()
        strict = self.strict
        self.remap = Remap(self._allocation, list(self._slots.values()), self._is_weighted)
        self.remap.to("cpu" if device.type == "meta" else device)
        self.strict = strict

    def _check_state_dict(self, state_dict: dict[str, object], prefix: str, *args: object) -> None:
        self.remap.check_state_dict(state_dict, f"{prefix}remap.")

    def rows(self, table: str, ids: Tensor) -> dict[str, Tensor]:
        """Which rows ids have.

        Args:
            table: name of a logical table.
            ids: integer [N], any values.
        Returns:
            For each level of the table's memory, by the name of its TorchRec table (for a whole table its own name),
            int64 [N]: the row of each id, own rows before shared ones, -1 where the id is absent. A level of 1 or 2
            columns has several of its rows in one row of the TorchRec table: see `allocation.layout.Level.pack`.
        Raises:
            ValueError: an unknown table. TypeError: ids that are not integers.
        """
        slot, ids = self._slot(table), self._ids(ids)
        n = ids.numel()
        if slot.table in self._allocation.whole:
            size = next(t.num_embeddings for t in self._tables if t.name == table)
            return {table: torch.where((ids >= 0) & (ids < size), ids, size)}
        memory = self._memory(table)
        remap = self.remap.memories[memory.name]
        members = [s.table for t in memory.tables for s in self._slots.values() if s.table == t]
        index = torch.full_like(ids, members.index(table))
        parts, lengths, _, _ = remap(ids, index, torch.arange(n + 1, device=ids.device), None)
        found = {memory.level_name(k): torch.full_like(ids, -1) for k in range(len(memory.levels))}
        of_part = iter(zip(parts, lengths))
        for k, level in enumerate(memory.levels):
            for place in range(level.pack if level.rows else 0):
                rows, present = next(of_part)
                found[memory.level_name(k)][present > 0] = rows.to(torch.int64) * level.pack + place
        return found

    @torch.no_grad()
    def materialize(self, table: str, ids: Tensor) -> Tensor:
        """Ordinary embedding vectors, for any other stack.

        Args:
            table: name of a logical table.
            ids: integer [N], any values.
        Returns:
            [N, dim] in the memory's data type, a copy.
        Raises:
            ValueError: an unknown table. TypeError: ids that are not integers.
        """
        columns = []
        for (width, weights), rows in zip(self.level_weights(table), self.rows(table, ids).values()):
            if weights is None:
                columns.append(torch.zeros(rows.numel(), width, dtype=self._weight_dtype, device=rows.device))
            else:
                present = (rows >= 0).unsqueeze(1)
                columns.append(torch.where(present, weights[rows.clamp(min=0)], 0))
        return torch.cat(columns, dim=1)

    def level_weights(self, table: str) -> Iterator[tuple[int, Tensor | None]]:
        """Of each level of a table, in the order of `rows`, its width and its weights by row, [rows, width].

        The weights are views; None for a level without rows. A whole table has one row more, for unseen ids.
        """
        bags = self.levels.embedding_bags
        if table in self._allocation.whole:
            yield self._slot(table).dim, bags[table].weight
            return
        memory = self._memory(table)
        for k, level in enumerate(memory.levels):
            name = memory.level_name(k)
            yield level.width, bags[name].weight.view(-1, level.width) if level.rows else None

    def _slot(self, table: str) -> Slot:
        for slot in self._slots.values():
            if slot.table == table:
                return slot
        raise ValueError(f"unknown table {table!r}; this collection has {[t.name for t in self._tables]}")

    def _memory(self, table: str) -> MemoryAllocation:
        return next(memory for memory in self._allocation.memories if table in memory.tables)

    def _ids(self, ids: Tensor) -> Tensor:
        if ids.dim() != 1:
            raise TypeError(f"ids must be an integer tensor of shape [N], got {ids.dtype} of shape {list(ids.shape)}")
        self.remap.check_not_overwritten()
        return to_int64(ids, "the tensor")

    @classmethod
    def from_embedding_bag_collection(
        cls,
        ebc: EmbeddingBagCollection,
        allocation: Allocation,
        id_weights: Mapping[str, Tensor] | None = None,
        ids: Mapping[str, Tensor] | None = None,
    ) -> "LMAEmbeddingBagCollection":
        """Compresses trained tables: the weights whose embeddings are closest to theirs (see `least_squares`).

        An id's own rows get its columns, a row that ids share the weighted mean of theirs; rows that no id has keep
        their initial values. Columns on which an id has no row are lost: they become zeros, which is a harder cut than
        training compressed tables from the start. Weights are rounded to the allocation's data type.

        Args:
            ebc: unsharded, with values (not on the meta device).
            allocation: for the tables of `ebc`.
            id_weights: for any of the tables, [num_embeddings] >= 0, how much each id's error counts where ids share;
                how often the id occurs, plus 1, is a good weight. Without them all ids count alike.
            ids: for each table, integer [num_embeddings], the id that each row of the full table stands for where the
                model is fed other ids from now on, such as raw ones. Without it row r is id r.
        Returns:
            A collection on the device of `ebc`.
        Raises:
            TypeError: `ebc` is no plain EmbeddingBagCollection; ids that are not integers. ValueError: as the
                constructor; weights or ids that do not fit the tables; weights on the meta device.

        Example::

            lma = LMAEmbeddingBagCollection.from_embedding_bag_collection(ebc, Allocation.load(path))
        """
        from torchrec_lma import conversion  # it knows this class

        return conversion.from_embedding_bag_collection(ebc, allocation, id_weights, ids)

    def to_embedding_bag_collection(self, ids: Mapping[str, Tensor] | None = None) -> EmbeddingBagCollection:
        """Full tables with the embeddings of this collection, for any stack that takes a plain one.

        Args:
            ids: for each table, integer [num_embeddings], the id that each row stands for; without it row r is id r.
        Returns:
            An EmbeddingBagCollection of the logical tables, in their data types, on the same device, filled block by
            block.
        Raises:
            ValueError: ids that do not fit the tables; weights on the meta device. TypeError: ids that are not
                integers.
        """
        from torchrec_lma import conversion  # it knows this class

        return conversion.to_embedding_bag_collection(self, ids)

    def memory_report(self) -> MemoryReport:
        """Bytes of weights, optimizer state and allocation against full tables; prints as a table."""
        optimizers = {}
        for name, bag in self.levels.embedding_bags.items():
            # Set by torchrec's apply_optimizer_in_backward; sharding turns it into the fused optimizer.
            classes = getattr(bag.weight, "_optimizer_classes", None)
            optimizers[name] = optimizer_type_to_emb_opt_type(classes[0]) if classes else None
        return report_memory(self._allocation, optimizers)


def _warn_of_missing_sharder() -> None:
    warnings.warn(
        "TorchRec has sharded the levels of an LMAEmbeddingBagCollection and not the collection itself: results are "
        "right, but pipelines do not overlap it with the step before. Pass "
        "sharders=torchrec_lma.get_default_sharders() to the planner and to DistributedModelParallel",
        stacklevel=3,
    )


def level_tables(
    tables: Sequence[EmbeddingBagConfig], allocation: Allocation, slots: Sequence[Slot]
) -> list[EmbeddingBagConfig]:
    """The TorchRec tables of a collection: whole tables, then the levels of each memory that have rows.

    All pool SUM. What a MEAN is divided by is the number of ids of a bag, not that of those present on a level.
    """
    by_name = {table.name: table for table in tables}
    data_type = allocation.config.weight_type
    configs = [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=by_name[name].num_embeddings + 1,  # the last row is that of unseen ids
            embedding_dim=by_name[name].embedding_dim,
            feature_names=[whole_key(slot) for slot in slots if slot.table == name],
            pooling=PoolingType.SUM,
            data_type=data_type,
            **_initialisation([by_name[name]]),
        )
        for name in allocation.whole
    ]
    for memory in allocation.memories:
        members = [slot for table in memory.tables for slot in slots if slot.table == table]
        initialisation = _initialisation([by_name[name] for name in memory.tables])
        for k, level in enumerate(memory.levels):
            if level.rows:
                configs.append(
                    EmbeddingBagConfig(
                        name=memory.level_name(k),
                        num_embeddings=level.table_rows,
                        embedding_dim=level.table_width,
                        feature_names=[level_key(slot, k, place) for place in range(level.pack) for slot in members],
                        pooling=PoolingType.SUM,
                        data_type=data_type,
                        **initialisation,
                    )
                )
    return configs


def _initialisation(tables: Sequence[EmbeddingBagConfig]) -> dict[str, Any]:
    """How a level is initialised: as its tables where they say so and agree, else as a full table of their mean size.

    TorchRec's default depends on the rows of a table, of which a level has others than the tables it stands for.
    """
    init_fns = {None if _has_default_init(table) else table.init_fn for table in tables}
    if len(init_fns) == 1 and None not in init_fns:
        return {"init_fn": init_fns.pop()}
    bounds = {(table.weight_init_min, table.weight_init_max) for table in tables}
    if len(bounds) == 1 and bounds != {(None, None)}:
        least, most = bounds.pop()
        return {"weight_init_min": least, "weight_init_max": most}
    rows = sum(table.num_embeddings for table in tables) / len(tables)
    return {"weight_init_min": -(rows**-0.5), "weight_init_max": rows**-0.5}


def _has_default_init(table: EmbeddingBagConfig) -> bool:
    """Whether TorchRec chose the init_fn itself, for the rows of the full table."""
    return isinstance(table.init_fn, partial) and table.init_fn.func is nn.init.uniform_


def _set_data_type(bag: nn.EmbeddingBag, data_type: DataType) -> None:
    """The weights of an EmbeddingBagCollection's bag in their data type: the base class knows FP32 and FP16 only."""
    if data_type is DataType.BF16:
        bag.weight = nn.Parameter(bag.weight.detach().to(data_type_to_dtype(data_type)))
