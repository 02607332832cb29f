"""TorchRec's sharding planner with what LMA memories cost, and constraints that may name logical tables."""

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.constants import NUM_POOLINGS, POOLING_FACTOR
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import _get_optimizer_multipler
from torchrec.distributed.planner.stats import EmbeddingStats
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    PlannerError,
    PlannerErrorType,
    Shard,
    ShardingOption,
    Stats,
    Storage,
    StorageReservation,
    Topology,
)
from torchrec.distributed.planner.utils import build_sharder_data_map, bytes_to_gb, sharder_name
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets
from torchrec.distributed.types import ModuleSharder, ParameterSharding, PipelineType, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_lma.distributed.embeddingbag import LMAEmbeddingBagCollectionSharder
from torchrec_lma.distributed.shard_estimators import (
    LMAPerfEstimator,
    LMAStorageEstimator,
    fused_optimizer,
    is_memory,
    shard_chunks,
    shard_traffic,
)
from torchrec_lma.distributed.specs import RowWiseInput
from torchrec_lma.memory_report import optimizer_state_bytes
from torchrec_lma.modules import LMAEmbeddingBagCollection
from torchrec_lma.text_table import text_table


class LMAEmbeddingShardingPlanner(EmbeddingShardingPlanner):
    """EmbeddingShardingPlanner for models with LMAEmbeddingBagCollections; other tables are planned as TorchRec does.

    It counts what LMA costs (LMAStorageEstimator, LMAPerfEstimator, LMAStorageReservation), cuts columns between chunks
    only, tries grid sharding on several hosts, and its printed table shows the logical tables of each memory.

    Args:
        topology, batch_size, storage_reservation, stats: as EmbeddingShardingPlanner's; batch_size is that of one rank.
        constraints: by name of a memory (`memory_<dim>`), of a logical table, or of any other table. Those of the
            logical tables of one memory are joined: pooling_factors, num_poolings and batch_sizes by feature;
            sharding_types and compute_kernels are what all of them allow; min_partition is the greatest, raised to
            whole chunks; the others must be equal. Without sharding_types a memory on several hosts may get any type
            that its sharder has, grid sharding only if no batch_sizes are given: it has no VBE. Without a
            min_partition it gets at most one column shard for each rank, table-column-wise for each rank of a host,
            and grid-sharded for each host.
        pipeline_type: of the training pipeline, which decides how many batches are in memory; see
            EmbeddingStorageEstimator.
        planner_options: EmbeddingShardingPlanner's other arguments, but no enumerator: this planner makes one.
    Raises:
        ValueError: from plan, where constraints of one memory contradict each other or do not fit its features.
        PlannerError: from plan, as EmbeddingShardingPlanner's; also where the allocation leaves no memory.

    Example::

        planner = LMAEmbeddingShardingPlanner(
            topology=Topology(world_size=8, compute_device="cuda"),
            batch_size=2048,
            constraints={"t_user": ParameterConstraints(pooling_factors=[20.0])},
            pipeline_type=PipelineType.TRAIN_SPARSE_DIST,
        )
        plan = planner.collective_plan(model, get_default_sharders())
    """

    def __init__(
        self,
        *,
        topology: Topology | None = None,
        batch_size: int | None = None,
        storage_reservation: StorageReservation | None = None,
        stats: Stats | list[Stats] | None = None,
        constraints: Mapping[str, ParameterConstraints] | None = None,
        pipeline_type: PipelineType = PipelineType.NONE,
        **planner_options: Any,
    ) -> None:
        if planner_options.get("enumerator") is not None:
            raise TypeError(
                "LMAEmbeddingShardingPlanner makes its own enumerator; with one of yours use EmbeddingShardingPlanner, "
                "and give the enumerator estimator=[LMAPerfEstimator(...), LMAStorageEstimator(...)]"
            )
        super().__init__(
            topology=topology,
            batch_size=batch_size,
            storage_reservation=storage_reservation,
            stats=stats if stats is not None else LMAEmbeddingStats(),
            constraints=constraints,
            **planner_options,
        )
        # _storage_reservation, _constraints, _enumerator and _topology of the base class: plan() there reads them.
        if not isinstance(storage_reservation, LMAStorageReservation):
            self._storage_reservation: StorageReservation = LMAStorageReservation(self._storage_reservation)
        self._given_constraints = dict(constraints or {})
        self._pipeline_type = pipeline_type

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        collections = {path: m for path, m in module.named_modules() if isinstance(m, LMAEmbeddingBagCollection)}
        of_memories = {
            path: memory_constraints(collection, self._given_constraints, _hosts(self._topology), self._batch_size)
            for path, collection in collections.items()
        }
        self._constraints = self._given_constraints | _by_name(of_memories)
        row_wise_input = _row_wise_input(sharders)
        self._enumerator = _Enumerator(
            {path + "." + name: own for path, named in of_memories.items() for name, own in named.items()},
            topology=self._topology,
            batch_size=self._batch_size,
            constraints=self._constraints,
            # An EmbeddingBagCollectionSharder's storage_usage has no say: estimators get a snapshot (SharderData).
            estimator=[
                LMAPerfEstimator(self._topology, self._constraints, row_wise_input),
                LMAStorageEstimator(
                    self._topology, self._constraints, self._pipeline_type, row_wise_input=row_wise_input
                ),
            ],
        )
        return super().plan(module, sharders)


def _row_wise_input(sharders: list[ModuleSharder[nn.Module]]) -> RowWiseInput:
    """That of the sharder of LMA collections, which TorchRec's snapshot of a sharder (SharderData) leaves out."""
    return next((s.row_wise_input for s in sharders if isinstance(s, LMAEmbeddingBagCollectionSharder)), "auto")


def _hosts(topology: Topology) -> int:
    """As TorchRec's partitioner counts them."""
    return max(1, topology.world_size // topology.intra_group_size)


class _Enumerator(EmbeddingEnumerator):
    """Gives each memory the inputs of its own collection, and column shards that its sharding type can spread.

    TorchRec finds constraints by the name of a table, and the memories of two collections may have one name. It cuts
    columns alike for all sharding types.
    """

    def __init__(
        self, constraints_by_fqn: Mapping[str, ParameterConstraints], topology: Topology, **kwargs: Any
    ) -> None:
        super().__init__(topology=topology, **kwargs)
        self._constraints_by_fqn = constraints_by_fqn
        self._topology = topology

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        for option in sharding_options:
            own = self._constraints_by_fqn.get(option.fqn)
            if own is not None:
                option.input_lengths, option.num_poolings = own.pooling_factors, own.num_poolings
                _cut_columns(option, own.min_partition, self._topology)
        super().populate_estimates(sharding_options)


def _cut_columns(option: ShardingOption, min_partition: int | None, topology: Topology) -> None:
    """Cuts a memory's columns between chunks, by default into no more shards than can be on ranks of their own."""
    world_size, ranks_of_host = topology.world_size, topology.intra_group_size
    most = {
        ShardingType.COLUMN_WISE.value: world_size,
        ShardingType.TABLE_COLUMN_WISE.value: ranks_of_host,
        ShardingType.GRID_SHARD.value: _hosts(topology),  # the ranks of a host share the rows of a column shard
    }.get(option.sharding_type)
    if most is None:
        return
    dim = option.tensor.shape[1]
    width = whole_chunks(dim, option.module[1].config.chunk_dim, min_partition or math.ceil(dim / most))
    shards = calculate_shard_sizes_and_offsets(option.tensor, world_size, ranks_of_host, option.sharding_type, width)
    option.shards = [Shard(size=size, offset=offset) for size, offset in zip(*shards)]


def memory_constraints(
    collection: LMAEmbeddingBagCollection,
    constraints: Mapping[str, ParameterConstraints],
    hosts: int,
    batch_size: int,
) -> dict[str, ParameterConstraints]:
    """The constraints of each memory, by its name, from those of the memory and of its logical tables.

    `pooling_factors`, `num_poolings` and, if any is given, `batch_sizes` have a value for each feature of the memory.
    The rest, and what is raised, is as LMAEmbeddingShardingPlanner says.
    """
    features = {
        table.name: [f for f, t in collection.table_of_feature.items() if t == table.name]
        for table in collection.tables
    }
    result = {}
    for memory, allocation in zip(collection.embedding_bag_configs(), collection.allocation.memories):
        features_of = {memory.name: list(memory.feature_names)} | {name: features[name] for name in allocation.tables}
        given = {name: constraints[name] for name in features_of if name in constraints}
        variable_batch = any(c.batch_sizes for c in given.values())
        sharding_types = _allowed_by_all(memory.name, "sharding_types", given)
        if sharding_types is None and hosts > 1 and not variable_batch:
            # TorchRec leaves grid out unless it is named, since other tables fill the other hosts; a memory may have
            # none beside it. On one host grid would be table-row-wise again. What the sharder lacks is not tried.
            sharding_types = [sharding_type.value for sharding_type in ShardingType]
        result[memory.name] = ParameterConstraints(
            **_agreed(memory.name, given),
            sharding_types=sharding_types,
            compute_kernels=_allowed_by_all(memory.name, "compute_kernels", given),
            min_partition=max((c.min_partition for c in given.values() if c.min_partition), default=None),
            pooling_factors=_per_feature("pooling_factors", given, features_of, POOLING_FACTOR, memory),
            num_poolings=_per_feature("num_poolings", given, features_of, NUM_POOLINGS, memory),
            batch_sizes=_per_feature("batch_sizes", given, features_of, batch_size, memory) if variable_batch else None,
            is_weighted=any(c.is_weighted for c in given.values()),
        )
    return result


def whole_chunks(dim: int, chunk_dim: int, lower_bound: int) -> int:
    """The narrowest width of at least `lower_bound` columns that divides `dim` and cuts no chunk.

    It is a multiple of 4 too, or `dim`: TorchRec takes no other width.
    """
    step = math.lcm(chunk_dim, 4)
    return next((width for width in range(step, dim, step) if width >= lower_bound and dim % width == 0), dim)


def _per_feature(
    field: str,
    given: Mapping[str, ParameterConstraints],
    features_of: Mapping[str, list[str]],
    default: float,
    memory: EmbeddingBagConfig,
) -> list[float]:
    value_of: dict[str, tuple[float, str]] = {}
    for name, constraint in given.items():
        values = getattr(constraint, field)
        if not values or values == [default]:  # ParameterConstraints' default, whatever the number of features
            continue
        features = features_of[name]
        if len(values) != len(features):
            raise ValueError(
                f"{field} of {name!r} has {len(values)} values, expected one for each of its {len(features)} features "
                f"{features}"
            )
        for feature, value in zip(features, values):
            other, other_name = value_of.setdefault(feature, (value, name))
            if other != value:
                raise ValueError(
                    f"{field} of feature {feature!r} is {other} in the constraints of {other_name!r} and {value} in "
                    f"those of {name!r}; give it once"
                )
    return [value_of.get(feature, (default, ""))[0] for feature in memory.feature_names]


def _allowed_by_all(memory: str, field: str, given: Mapping[str, ParameterConstraints]) -> list[str] | None:
    choices = {name: getattr(constraint, field) for name, constraint in given.items() if getattr(constraint, field)}
    if not choices:
        return None
    first, *others = choices.values()
    allowed = [choice for choice in first if all(choice in other for other in others)]
    if not allowed:
        raise ValueError(f"no {field} is allowed by all constraints of memory {memory!r}: {choices}; they share one")
    return allowed


_JOINED = (
    "sharding_types",
    "compute_kernels",
    "min_partition",
    "pooling_factors",
    "num_poolings",
    "batch_sizes",
    "is_weighted",
    "feature_names",
)  # a memory's features are known


def _agreed(memory: str, given: Mapping[str, ParameterConstraints]) -> dict[str, Any]:
    """The other fields, which apply to the memory as a whole."""
    agreed = {}
    for field in dataclasses.fields(ParameterConstraints):
        if field.name in _JOINED:
            continue
        values = {name: getattr(c, field.name) for name, c in given.items() if getattr(c, field.name)}
        if not values:
            continue
        if field.name == "use_virtual_table":
            raise ValueError(f"memory {memory!r} is no virtual table, got use_virtual_table for {list(values)}")
        first = next(iter(values.values()))
        if any(value != first for value in values.values()):
            raise ValueError(f"{field.name} must be one for all tables of memory {memory!r}, got {values}")
        agreed[field.name] = first
    return agreed


def _by_name(of_memories: Mapping[str, Mapping[str, ParameterConstraints]]) -> dict[str, ParameterConstraints]:
    """Constraints as TorchRec takes them, by name alone, where several collections may have a memory of that name."""
    result: dict[str, ParameterConstraints] = {}
    for named in of_memories.values():
        for name, own in named.items():
            other = result.setdefault(name, own)
            if other is own:
                continue
            # The enumerator has inputs and widths of each; only the reserve for batches is made from the greater input.
            inputs = max(own, other, key=lambda c: sum(c.pooling_factors))
            joined = {"pooling_factors": inputs.pooling_factors, "num_poolings": inputs.num_poolings}
            joined["min_partition"] = None
            result[name] = dataclasses.replace(own, **joined)
            if result[name] != dataclasses.replace(other, **joined):
                raise ValueError(
                    f"two collections have a memory {name!r}, with constraints {own} and {other}; the planner knows "
                    "tables by name, so give both the same sharding_types, compute_kernels and kernel settings"
                )
    return result


class LMAStorageReservation(StorageReservation):
    """Takes the allocation off every rank's memory, after what another reservation takes.

    Every rank holds the allocations of all collections, whichever memories it owns; with a GPU both on the device, for
    lookups, and on the host, as `allocation` of the collection.

    Args:
        inner: TorchRec's reservation for dense layers, batches and a margin.
    """

    def __init__(self, inner: StorageReservation) -> None:
        self.inner = inner
        self._last_reserved_topology: Topology | None = None

    def reserve(
        self,
        topology: Topology,
        batch_size: int,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]],
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> Topology:
        reserved = self.inner.reserve(topology, batch_size, module, sharders, constraints)
        nbytes = sum(m.allocation.nbytes for m in module.modules() if isinstance(m, LMAEmbeddingBagCollection))
        allocation = Storage(hbm=0 if topology.compute_device == "cpu" else nbytes, ddr=nbytes, ssd=0)
        for device in reserved.devices:
            device.storage -= allocation
            if device.storage.hbm < 0 or device.storage.ddr < 0:
                raise PlannerError(
                    error_type=PlannerErrorType.INSUFFICIENT_STORAGE,
                    message=f"the allocation takes {nbytes} bytes on every rank, device and host, which is more than "
                    f"rank {device.rank} has left; build one with a lower signature_fraction or dedicated_fraction",
                )
        self._last_reserved_topology = copy.deepcopy(reserved)
        return reserved

    @property
    def last_reserved_topology(self) -> Topology | None:
        return self._last_reserved_topology

    def __getattr__(self, name: str) -> Any:
        # EmbeddingShardingPlanner.plan reports _percentage, _dense_storage and _kjt_storage of its reservation.
        if name == "inner":  # not set yet, while it is unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)


class LMAEmbeddingStats(EmbeddingStats):
    """TorchRec's table of a plan, with the logical tables of each memory and LMA's optimizer state and inputs."""

    def log(
        self,
        sharding_plan: ShardingPlan,
        topology: Topology,
        batch_size: int,
        storage_reservation: StorageReservation,
        *args: Any,
        best_plan: list[ShardingOption],
        sharders: list[ModuleSharder[nn.Module]] | None = None,
        **kwargs: Any,
    ) -> None:
        sharder_data = build_sharder_data_map({sharder_name(s.module_type): s for s in sharders or []})
        self._row_wise_input = _row_wise_input(sharders or [])
        self._optimizer_bytes: dict[str, int] = {}
        for option in best_plan:
            optimizer = fused_optimizer(option, sharder_data.get(option.module_type_key)) if is_memory(option) else None
            if optimizer is not None:
                shard_sizes = (shard.size for shard in option.shards)
                state = sum(optimizer_state_bytes(optimizer, r, c, shard_chunks(option)) for r, c in shard_sizes)
            else:  # as the base class; _get_optimizer_multipler gives state bytes for each weight byte
                optimizer_class = getattr(option.tensor, "_optimizer_classes", [None])[0]
                state = math.ceil(option.tensor.nbytes * _get_optimizer_multipler(optimizer_class, option.tensor.shape))
            self._optimizer_bytes[option.compute_kernel] = self._optimizer_bytes.get(option.compute_kernel, 0) + state
        if isinstance(storage_reservation, LMAStorageReservation):
            storage_reservation = storage_reservation.inner  # the base class shows those that it knows
        super().log(
            sharding_plan,
            topology,
            batch_size,
            storage_reservation,
            *args,
            best_plan=best_plan,
            sharders=sharders,
            **kwargs,
        )

    # The hooks below are private to EmbeddingStats, whose one public method prints the whole table.

    def _log_compute_kernel_stats(self, compute_kernels_stats: dict[str, Any], description: str) -> None:
        if description == "Compute Kernels Optimizer State":
            compute_kernels_stats = {
                kernel: f"{round(bytes_to_gb(state), 3)} GB" for kernel, state in self._optimizer_bytes.items()
            }
        super()._log_compute_kernel_stats(compute_kernels_stats, description)

    def _get_shard_stats(
        self,
        shard: ParameterSharding,
        sharding_option: ShardingOption,
        world_size: int,
        local_world_size: int,
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> tuple[list[int], list[float], list[float]]:
        ranks, input_mb, output_mb = super()._get_shard_stats(
            shard, sharding_option, world_size, local_world_size, constraints
        )
        if is_memory(sharding_option):
            traffic = shard_traffic(sharding_option, constraints, world_size, local_world_size, self._row_wise_input)
            input_mb = [mb * traffic.copies for mb in input_mb]
        return ranks, input_mb, output_mb

    def _log_sharding_plan(self, best_plan: list[ShardingOption], *args: Any, **kwargs: Any) -> list[str]:
        lines = super()._log_sharding_plan(best_plan, *args, **kwargs)
        tables = logical_tables([option for option in best_plan if is_memory(option)])
        if tables:
            lines = [*lines, "", "Logical tables of the memories:", *tables]
            # The frame, as the base class widens it for its own lines.
            self._width: int = max(self._width, *(len(line) + 6 for line in tables))
        return lines


def logical_tables(options: list[ShardingOption]) -> list[str]:
    """Lines of a table: the logical tables of each memory among the options, and what the memory is."""
    header = (
        "memory",
        "logical table",
        "features",
        "num embeddings",
        "full size",
        "compression",
        "allocation, each rank",
    )
    rows: list[tuple[str, ...]] = []
    for option in options:
        collection: LMAEmbeddingBagCollection = option.module[1]
        memory = next(m for m in collection.allocation.memories if m.name == option.name)
        tables = [table for table in collection.allocation.tables if table.name in memory.tables]
        full_bytes = sum(table.full_bytes for table in tables)
        rows.append(
            (
                option.fqn,
                f"{len(tables)} in {memory.rows:,} rows of {memory.n_chunks} x {memory.chunk_dim}",
                "",
                f"{sum(table.num_embeddings for table in tables):,}",
                f"{bytes_to_gb(full_bytes):.3f} GB",
                f"{full_bytes / (option.tensor.nbytes + memory.nbytes):.2f}x",
                f"{bytes_to_gb(memory.nbytes):.3f} GB",
            )
        )
        for table in tables:
            features = ", ".join(f for f, name in collection.table_of_feature.items() if name == table.name)
            size = f"{bytes_to_gb(table.full_bytes):.3f} GB"
            rows.append(("", table.name, features, f"{table.num_embeddings:,}", size, "", ""))
    return text_table(header, rows, left=3).splitlines() if rows else []
