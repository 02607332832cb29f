"""What TorchRec's planner is told of level tables: ParameterConstraints by logical table, turned into those by level.

To TorchRec a level is an ordinary table; logical tables it does not know. Where it matters to a plan, a level differs
from a full table in how many of a bag's ids it is asked for: an absent id is not looked up.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.constants import NUM_POOLINGS, POOLING_FACTOR
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_lma.collection import LMACollection
from torchrec_lma.features import Slot, slots_of

_BY_FEATURE = ("pooling_factors", "num_poolings", "batch_sizes", "feature_names")
_CHOICES = ("sharding_types", "compute_kernels")


def level_constraints(
    model: nn.Module, constraints: Mapping[str, ParameterConstraints] | None = None
) -> dict[str, ParameterConstraints]:
    """Constraints for TorchRec's planner, by the names of the tables that it plans.

    A level is shared by the logical tables of a memory, so their constraints are joined: `sharding_types` and
    `compute_kernels` are what all of them allow; values by feature are listed for each key that feeds the level; the
    others must not contradict each other. Pooling factors are those of the logical tables times the share of their ids
    that has a row on the level, where the allocation knows it from its training rows, else 1.

    Args:
        model: the model to plan, with any number of LMA collections; or one collection.
        constraints: by the name of a logical table, or of a level table (`collection.level_configs()`), which
            then holds as it is; those of other tables are passed through.
    Returns:
        Constraints of every level table, and the passed through ones.
    Raises:
        ValueError: constraints of tables of one memory contradict each other, or have as many values by feature as
            their table has no features.

    Example::

        constraints = level_constraints(model, {"t_user": ParameterConstraints(pooling_factors=[20.0])})
        planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
        plan = planner.collective_plan(model, torchrec_lma.get_default_sharders())
    """
    result = dict(constraints or {})
    for collection in model.modules():
        if isinstance(collection, LMACollection):
            logical = {table.name: table for table in collection.tables}
            given = {name: result.pop(name) for name in logical if name in result}
            for level in collection.level_configs():
                if level.name not in result:
                    result[level.name] = _constraints_of(level, collection, logical, given)
    return result


def _constraints_of(
    level: BaseEmbeddingConfig,
    collection: LMACollection,
    logical: Mapping[str, BaseEmbeddingConfig],
    constraints: Mapping[str, ParameterConstraints],
) -> ParameterConstraints:
    remap = collection.remap
    slots = slots_of(collection.tables)
    of_keys = [slots[remap.sources[remap.keys.index(key)]] for key in level.feature_names]
    given = {name: constraints[name] for name in {slot.table: None for slot in of_keys} if name in constraints}

    def by_feature(field: str, slot: Slot, default: Any) -> Any:
        """The value of a key that a slot feeds."""
        features = logical[slot.table].feature_names
        values = getattr(given[slot.table], field) if slot.table in given else None
        if not values or (field == "pooling_factors" and values == [POOLING_FACTOR]):  # not given
            return default
        if len(values) != len(features):
            raise ValueError(
                f"the constraints of table {slot.table!r} have {len(values)} {field}, and it has {len(features)} "
                f"features, {features}; give one for each"
            )
        return values[features.index(slot.feature)]

    shares = _shares(level, collection, of_keys)
    pooling_factors = [by_feature("pooling_factors", slot, POOLING_FACTOR) * s for slot, s in zip(of_keys, shares)]
    num_poolings = [by_feature("num_poolings", slot, NUM_POOLINGS) for slot in of_keys]
    batch_sizes = [by_feature("batch_sizes", slot, None) for slot in of_keys]
    if None in batch_sizes and any(batch_sizes):
        without = sorted({slot.table for slot, size in zip(of_keys, batch_sizes) if size is None})
        raise ValueError(
            f"level table {level.name!r} has batch_sizes of {sorted(given)} and none of {without}, which feed it too; "
            "give them for all tables of a memory or for none"
        )
    return ParameterConstraints(
        pooling_factors=pooling_factors,
        num_poolings=num_poolings,
        batch_sizes=None if None in batch_sizes else batch_sizes,
        **{field: _in_common(field, level.name, given) for field in _CHOICES},
        **_agreed(level.name, given),
    )


def _shares(level: BaseEmbeddingConfig, collection: LMACollection, slots: Sequence[Slot]) -> list[float]:
    """For each key of a level how many of its slot's ids are looked up there, at most 1."""
    memory, k = next(
        (memory, k)
        for memory in collection.allocation.memories
        for k in range(len(memory.levels))
        if memory.level_name(k) == level.name
    )
    known = collection.allocation.provenance.get("ids", {})
    of_table = {name: known.get(name, {}).get("present") for name in memory.tables}
    # An id is at one place of a packed row, so each place is asked for a part of them.
    return [(of_table[s.table][k] if of_table[s.table] else 1.0) / memory.levels[k].pack for s in slots]


def _in_common(field: str, level: str, given: Mapping[str, ParameterConstraints]) -> list[str] | None:
    """The sharding types or kernels that all tables allow which name some; None where none does."""
    lists = {name: getattr(one, field) for name, one in given.items() if getattr(one, field)}
    if not lists:
        return None
    first, *others = lists.values()
    common = [each for each in first if all(each in other for other in others)]
    if not common:
        raise ValueError(
            f"level table {level!r} is shared by tables whose constraints have no {field} in common: {lists}; let them "
            "have one"
        )
    return common


def _agreed(level: str, given: Mapping[str, ParameterConstraints]) -> dict[str, Any]:
    """The other fields, where a table says something other than the default."""
    result = {}
    default = ParameterConstraints()
    for field in (f.name for f in fields(ParameterConstraints) if f.name not in (*_BY_FEATURE, *_CHOICES)):
        values = {name: getattr(one, field) for name, one in given.items()}
        said = {name: value for name, value in values.items() if value != getattr(default, field)}
        if any(value != next(iter(said.values())) for value in said.values()):
            raise ValueError(
                f"level table {level!r} is shared by tables whose constraints have different {field}: {said}; make "
                "them equal"
            )
        if said:
            result[field] = next(iter(said.values()))
    return result


def refuse_constraints_of_logical_tables(module: LMACollection) -> None:
    """Raises ValueError where TorchRec's planner, which asks for the shardable parameters, would drop a constraint.

    The planner looks constraints up by the names of the tables it plans, and says nothing of others; a sharder is not
    told them. So this looks at who asks: EmbeddingEnumerator, which has them as `_constraints`. If it ever has them
    elsewhere, nothing is refused.
    """
    enumerator = sys._getframe(2).f_locals.get("self")
    constraints = getattr(enumerator, "_constraints", None)
    if not isinstance(constraints, Mapping):
        return
    planned = {table.name for table in module.level_configs()}
    dropped = [t.name for t in module.tables if t.name in constraints and t.name not in planned]
    if dropped:
        raise ValueError(
            f"the planner was given constraints for {dropped}, logical tables of an LMA collection, and "
            f"would drop them: it plans {sorted(planned)}. Give it what "
            "torchrec_lma.distributed.level_constraints(model, constraints) makes of them"
        )
