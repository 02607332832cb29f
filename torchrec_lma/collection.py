"""What collections of LMA tables have in common, pooled or not: the remap, the level tables, what an id has there."""

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchrec.distributed.utils import optimizer_type_to_emb_opt_type
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType, data_type_to_dtype

from torchrec_lma.allocation.artifact import Allocation, MemoryAllocation
from torchrec_lma.config import LMAConfig
from torchrec_lma.features import Slot, slots_of, to_int64
from torchrec_lma.memory_report import MemoryReport, report_memory
from torchrec_lma.remap import Remap, level_key


class LMACollection(nn.Module):
    """Logical tables in compressed memories: `remap` turns raw ids into rows, `levels` has the tables of those rows.

    LMAEmbeddingBagCollection and LMAEmbeddingCollection say what `levels` is, and what a batch of rows becomes.

    Args:
        tables: the logical tables.
        allocation: who has which row.
        is_weighted: whether batches of rows carry a number with each row.
        device: of the parameters; the allocation stays on the CPU while this is "meta".
        strict: an id outside of its table's [0, num_embeddings) is an error.
    Raises:
        TypeError: `allocation` is none; tables of another collection. ValueError: it was made for other tables.
    """

    __jit_unused_properties__ = ["allocation", "config", "device", "strict", "tables"]

    _config_type: type[BaseEmbeddingConfig]

    def __init__(
        self,
        tables: Sequence[BaseEmbeddingConfig],
        allocation: Allocation,
        is_weighted: bool,
        device: torch.device | None,
        strict: bool,
    ) -> None:
        super().__init__()
        if not isinstance(allocation, Allocation):
            raise TypeError(
                f"allocation is a {type(allocation).__name__}; give AllocationBuilder(tables, config).build() or "
                "Allocation.hashed(tables, config)"
            )
        for table in tables:
            if not isinstance(table, self._config_type):
                raise TypeError(
                    f"tables of an {type(self).__name__} must be {self._config_type.__name__}, got a "
                    f"{type(table).__name__}: {table}; LMAEmbeddingBagCollection pools, LMAEmbeddingCollection does not"
                )
        allocation.check_made_for(tables)
        self._tables = list(tables)
        self._allocation = allocation
        self._is_weighted = is_weighted
        slots = slots_of(self._tables)
        self._slots = {slot.name: slot for slot in slots}
        self._names = [slot.name for slot in slots]
        self._features = [slot.feature for slot in slots]

        device = torch.device(device) if device is not None else None
        self.remap = Remap(allocation, slots, is_weighted)
        self.levels = self._make_levels(level_tables(self._config_type, self._tables, allocation, slots), device)
        stored = self.stored_tables()
        for config in self.level_configs():
            _set_data_type(stored[config.name], config.data_type)
        if device is not None and device.type != "meta":
            self.remap.to(device)
        self.strict = strict
        self._weight_dtype = data_type_to_dtype(allocation.config.weight_type)
        self._register_load_state_dict_pre_hook(self._check_state_dict)

    @abstractmethod
    def _make_levels(self, configs: list[Any], device: torch.device | None) -> nn.Module:
        """`levels`, of these tables."""

    @abstractmethod
    def plain_collections(self) -> list[Any]:
        """The collections of TorchRec that `levels` is made of."""

    def level_keys(self) -> list[list[str]]:
        """Of each of them, the keys of the batches that it is given."""
        return [self.remap.keys]

    @abstractmethod
    def like_this(self, tables: Sequence[Any], allocation: Allocation, device: torch.device) -> Self:
        """A new collection with the options of this one."""

    @property
    def tables(self) -> list[Any]:
        """The logical tables, as given."""
        return self._tables

    @property
    def strict(self) -> bool:
        """Whether an id outside of its vocabulary is an error."""
        return self.remap.strict

    @strict.setter
    def strict(self, value: bool) -> None:
        self.remap.strict = value

    @property
    def config(self) -> LMAConfig:
        return self._allocation.config

    @property
    def allocation(self) -> Allocation:
        return self._allocation

    @property
    def device(self) -> torch.device:
        return self.plain_collections()[0].device

    def reset_parameters(self) -> None:
        """Initialise the weights, and the allocation as well: `to_empty` leaves both undefined."""
        device = next(self.levels.parameters()).device
        for plain in self.plain_collections():
            plain._device = device  # TorchRec keeps "meta" here, and then initialises nothing
            plain.reset_parameters()
        strict = self.strict
        self.remap = Remap(self._allocation, list(self._slots.values()), self._is_weighted)
        self.remap.to("cpu" if device.type == "meta" else device)
        self.strict = strict

    def level_configs(self) -> list[Any]:
        """What TorchRec stores and shards: the levels of each memory that have rows."""
        return [config for plain in self.plain_collections() for config in configs_of(plain)]

    def stored_tables(self) -> dict[str, Any]:
        """Of each of these tables, by name, the module that has its `weight`, [rows, width]."""
        return {name: table for plain in self.plain_collections() for name, table in tables_of(plain).items()}

    def _check_state_dict(self, state_dict: dict[str, object], prefix: str, *args: object) -> None:
        self.remap.check_state_dict(state_dict, f"{prefix}remap.")

    def rows(self, table: str, ids: Tensor) -> dict[str, Tensor]:
        """Which rows ids have.

        Args:
            table: name of a logical table.
            ids: integer [N], any values.
        Returns:
            For each level of the table's memory, by the name of its TorchRec table, int64 [N]: the row of each id, own
            rows before shared ones, -1 where the id is absent. Where all ids of a vocabulary own a row and none is
            shared, ids outside of it have those of id 0. A level of 1 or 2
            columns has several of its rows in one row of the TorchRec table: see `allocation.layout.Level.pack`.
        Raises:
            ValueError: an unknown table. TypeError: ids that are not integers.
        """
        memory, ids = self._memory(table), self._ids(ids)
        remap: Any = self.remap.memories[memory.name]
        members = [s.table for t in memory.tables for s in self._slots.values() if s.table == t]
        index = torch.full_like(ids, members.index(table))
        of_tables = iter(remap.rows(ids, index)[0])
        found = {memory.level_name(k): torch.full_like(ids, -1) for k in range(len(memory.levels))}
        for k, level in enumerate(memory.levels):
            for place in range(level.pack if level.rows else 0):
                rows = next(of_tables)
                found[memory.level_name(k)][rows >= 0] = rows[rows >= 0].to(torch.int64) * level.pack + place
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

        The weights are views; None for a level without rows.
        """
        stored = self.stored_tables()
        memory = self._memory(table)
        for k, level in enumerate(memory.levels):
            name = memory.level_name(k)
            yield level.width, stored[name].weight.view(-1, level.width) if level.rows else None

    def _memory(self, table: str) -> MemoryAllocation:
        for memory in self._allocation.memories:
            if table in memory.tables:
                return memory
        raise ValueError(f"unknown table {table!r}; this collection has {[t.name for t in self._tables]}")

    def _ids(self, ids: Tensor) -> Tensor:
        if ids.dim() != 1:
            raise TypeError(f"ids must be an integer tensor of shape [N], got {ids.dtype} of shape {list(ids.shape)}")
        self.remap.check_not_overwritten()
        return to_int64(ids, "the tensor")

    def memory_report(self) -> MemoryReport:
        """Bytes of weights, optimizer state and allocation against full tables; prints as a table."""
        optimizers = {}
        for name, table in self.stored_tables().items():
            # Set by torchrec's apply_optimizer_in_backward; sharding turns it into the fused optimizer.
            classes = getattr(table.weight, "_optimizer_classes", None)
            optimizers[name] = optimizer_type_to_emb_opt_type(classes[0]) if classes else None
        return report_memory(self._allocation, optimizers)


def warn_of_missing_sharder(collection: LMACollection) -> None:
    warnings.warn(
        f"TorchRec has sharded the levels of an {type(collection).__name__} and not the collection itself: results are "
        "right, but pipelines do not overlap it with the step before. Pass "
        "sharders=torchrec_lma.get_default_sharders() to the planner and to DistributedModelParallel",
        stacklevel=3,
    )


def configs_of(plain: Any) -> list[Any]:
    """The tables of an EmbeddingBagCollection or an EmbeddingCollection, quantized or not."""
    return plain.embedding_bag_configs() if hasattr(plain, "embedding_bag_configs") else plain.embedding_configs()


def tables_of(plain: Any) -> Any:
    """Of each of these tables, by name, the module that has its `weight`: a ModuleDict."""
    return plain.embedding_bags if hasattr(plain, "embedding_bags") else plain.embeddings


def level_tables(
    config_type: type[BaseEmbeddingConfig],
    tables: Sequence[BaseEmbeddingConfig],
    allocation: Allocation,
    slots: Sequence[Slot],
) -> list[BaseEmbeddingConfig]:
    """The TorchRec tables of a collection: the levels of each memory that have rows.

    Where they pool it is SUM, the default: what a MEAN is divided by is the number of ids of a bag, not that of those
    present on a level.
    """
    by_name = {table.name: table for table in tables}
    data_type = allocation.config.weight_type
    configs = []
    for memory in allocation.memories:
        members = [slot for table in memory.tables for slot in slots if slot.table == table]
        initialisation = _initialisation([by_name[name] for name in memory.tables])
        for k, level in enumerate(memory.levels):
            if level.rows:
                configs.append(
                    config_type(
                        name=memory.level_name(k),
                        num_embeddings=level.table_rows,
                        embedding_dim=level.table_width,
                        feature_names=[level_key(slot, k, place) for place in range(level.pack) for slot in members],
                        data_type=data_type,
                        **initialisation,
                    )
                )
    return configs


def _initialisation(tables: Sequence[BaseEmbeddingConfig]) -> dict[str, Any]:
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


def _has_default_init(table: BaseEmbeddingConfig) -> bool:
    """Whether TorchRec chose the init_fn itself, for the rows of the full table."""
    return isinstance(table.init_fn, partial) and table.init_fn.func is nn.init.uniform_


def _set_data_type(table: Any, data_type: DataType) -> None:
    """The weights of a TorchRec table in their data type: its collections know FP32 and FP16 only."""
    if data_type is DataType.BF16:
        table.weight = nn.Parameter(table.weight.detach().to(data_type_to_dtype(data_type)))
