"""From full tables to LMA tables, back, and from one allocation to another."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, data_type_to_dtype
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_lma.allocation.artifact import Allocation
from torchrec_lma.collection import LMACollection, configs_of, tables_of
from torchrec_lma.features import to_int64
from torchrec_lma.least_squares import LeastSquares
from torchrec_lma.text_table import text_table

_CHUNK_VALUES = 1 << 21  # of one chunk of vectors: 16 MiB as float64


LMA = TypeVar("LMA", bound=LMACollection)
Full = TypeVar("Full", EmbeddingBagCollection, EmbeddingCollection)


@torch.no_grad()
def compress(
    full: EmbeddingBagCollection | EmbeddingCollection,
    lma: LMA,
    id_weights: Mapping[str, Tensor] | None = None,
    ids: Mapping[str, Tensor] | None = None,
) -> LMA:
    """`lma` with the weights whose embeddings are closest to those of the full tables: see
    LMAEmbeddingBagCollection.from_embedding_bag_collection."""
    id_weights = id_weights or {}
    ids = _ids_of_rows(lma.tables, ids, id_weights, lma.device)
    weights = tables_of(full)
    _fit(lma, ids, lambda table, chunk: weights[table].weight[chunk], id_weights)
    return lma


@torch.no_grad()
def decompress(lma: LMACollection, full: Full, ids: Mapping[str, Tensor] | None = None) -> Full:
    """`full` with the embeddings of `lma`."""
    device = lma.device
    ids = _ids_of_rows(lma.tables, ids, {}, device)
    stored = tables_of(full)
    for table in configs_of(full):
        held, dtype = stored[table.name], data_type_to_dtype(table.data_type)
        if held.weight.dtype != dtype:  # the collection itself knows FP32 and FP16 only
            held.weight = nn.Parameter(held.weight.to(dtype))
        for chunk in _chunks(table.num_embeddings, table.embedding_dim):
            held.weight[chunk] = lma.materialize(table.name, ids[table.name][chunk].to(device)).to(dtype)
    return full


def check_plain(name: str, given: object, wanted: type[nn.Module]) -> None:
    if not isinstance(given, wanted):
        raise TypeError(
            f"{name} is a {type(given).__name__}, expected an unsharded {wanted.__name__} of full tables; load a "
            "sharded model's checkpoint into one, and use reallocate for LMA tables"
        )


def _ids_of_rows(
    tables: Sequence[BaseEmbeddingConfig],
    ids: Mapping[str, Tensor] | None,
    id_weights: Mapping[str, Tensor],
    device: torch.device,
) -> Mapping[str, Tensor]:
    """The id of each row of each full table: `ids` after a check, or where there are none row numbers."""
    sizes = {table.name: table.num_embeddings for table in tables}
    if ids is None:
        ids = {name: torch.arange(size, device=device) for name, size in sizes.items()}
    _check_ids(ids, sizes, id_weights)
    _check_one_id_a_row(ids, sizes)
    return ids


@dataclass(frozen=True)
class TableChange:
    """How far the embeddings of one logical table moved, over the ids that were given and weighted as they were.

    Attributes:
        table: its name, or "total".
        ids: how many were given.
        rms_before: root mean square of a value of the embeddings before.
        rms_change: root mean square of the difference to it afterwards.
    """

    table: str
    ids: int
    rms_before: float
    rms_change: float

    @property
    def relative(self) -> float:
        """0: nothing changed; 1: the change is as large as the embeddings."""
        return self.rms_change / self.rms_before if self.rms_before else 0.0


@dataclass(frozen=True)
class Reallocation:
    """The model under its new allocation, and what that changed; `print(reallocation)` shows the changes as a table."""

    module: LMACollection
    changes: tuple[TableChange, ...]

    def __str__(self) -> str:
        lines = [
            (
                change.table,
                f"{change.ids:,}",
                f"{change.rms_before:.3g}",
                f"{change.rms_change:.3g}",
                f"{change.relative:.1%}",
            )
            for change in self.changes
        ]
        return text_table(("table", "ids", "RMS before", "RMS change", "relative"), lines)


@torch.no_grad()
def reallocate(
    module: LMACollection,
    allocation: Allocation,
    ids: Mapping[str, Tensor],
    id_weights: Mapping[str, Tensor] | None = None,
) -> Reallocation:
    """Moves trained weights under another allocation, changing the embeddings of ids as little as possible.

    An id's own rows get its columns, rows that ids share the weighted mean of theirs (see `least_squares`). Columns on
    which an id has no row any more are lost; those on which it has one now are zeros where it had none before. Rows
    that none of the ids has keep the old weights where the level has the same name and size, else they are initialised.

    What an optimizer knew of the old rows means nothing for the new ones: make a new optimizer for the result. Build
    the new allocation with the old one's seed: under another seed every id that is hashed moves as well.

    Args:
        module: unsharded; a sharded model's checkpoint loads into one. It is left as it is.
        allocation: the new one, for tables of the same names, dims and data types. Their num_embeddings, and the
            config, may be others.
        ids: for each table, integer [N], distinct: the ids whose embeddings are to be kept.
        id_weights: for any of the tables, [N] >= 0, how much each id counts where it shares (how often it occurs, plus
            1, is a good weight); without them all count alike.
    Raises:
        TypeError: `module` is no unsharded LMA collection, or ids that are not integers.
        ValueError: an allocation for other tables; ids or weights that do not fit the tables; weights on the meta
            device.

    Example::

        result = reallocate(model.sparse_arch.embedding_bag_collection, new_allocation, ids)
        print(result)
        model.sparse_arch.embedding_bag_collection = result.module
    """
    if not isinstance(module, LMACollection):
        raise TypeError(
            f"module is a {type(module).__name__}, expected an unsharded LMAEmbeddingBagCollection or "
            "LMAEmbeddingCollection; load a sharded model's checkpoint into one first"
        )
    device, id_weights = device_of(module), id_weights or {}
    old_tables = module.tables
    _check_ids(ids, [table.name for table in old_tables], id_weights)
    sizes = {table.name: table.num_embeddings for table in allocation.tables}
    tables = [replace(table, num_embeddings=sizes.get(table.name, table.num_embeddings)) for table in old_tables]
    new = module.like_this(tables, allocation, device)
    old = module.stored_tables()
    for name, table in new.stored_tables().items():
        if name in old and table.weight.shape == old[name].weight.shape:
            table.weight.copy_(old[name].weight)
    _fit(new, ids, lambda table, chunk: module.materialize(table, ids[table][chunk].to(device)), id_weights)
    return Reallocation(new, _changes(module, new, ids, id_weights))


def _changes(
    old: LMACollection,
    new: LMACollection,
    ids: Mapping[str, Tensor],
    id_weights: Mapping[str, Tensor],
) -> tuple[TableChange, ...]:
    """A change for each table, then the total."""
    device = device_of(old)
    changes = []
    total = torch.zeros(3, dtype=torch.float64, device=device)
    for table in new.tables:
        # Weight of all values, weighted squares of the values before, weighted squares of their change.
        sums = torch.zeros_like(total)
        for chunk in _chunks(ids[table.name].numel(), table.embedding_dim):
            chunk_ids = ids[table.name][chunk].to(device)
            weights = torch.ones(chunk_ids.numel())
            if table.name in id_weights:
                weights = id_weights[table.name][chunk]
            weights = weights.to(device, torch.float64)
            before = old.materialize(table.name, chunk_ids).to(torch.float64)
            change = new.materialize(table.name, chunk_ids).to(torch.float64) - before
            sums[0] += weights.sum() * table.embedding_dim
            sums[1] += weights @ before.square().sum(1)
            sums[2] += weights @ change.square().sum(1)
        changes.append(_change(table.name, ids[table.name].numel(), sums))
        total += sums
    return (*changes, _change("total", sum(change.ids for change in changes), total))


def _change(table: str, n_ids: int, sums: Tensor) -> TableChange:
    values, before, change = sums.tolist()
    return TableChange(table, n_ids, (before / (values or 1)) ** 0.5, (change / (values or 1)) ** 0.5)


def _fit(
    lma: LMACollection,
    ids: Mapping[str, Tensor],
    vectors: Callable[[str, slice], Tensor],
    id_weights: Mapping[str, Tensor],
) -> None:
    """Writes all weights of a collection, reading the vectors chunk by chunk.

    Args:
        ids: for each logical table, integer [N].
        vectors: called with a table and a slice of its ids; returns float [n, dim].
        id_weights: for any of the tables, [N] >= 0; 1 for the others.
    """
    device = device_of(lma)
    sizes = {table.name: table.num_embeddings for table in lma.tables}
    for memory in lma.allocation.memories:
        widths, weights = zip(*lma.level_weights(memory.tables[0]))
        solvers = [
            None if w is None else LeastSquares(w, level.own_rows)
            for w, level in zip(weights, memory.levels, strict=True)
        ]
        remap: Any = lma.remap.memories[memory.name]
        for table in memory.tables:
            for chunk in _chunks(ids[table].numel(), sum(widths)):
                each = id_weights[table][chunk].to(device) if table in id_weights else None
                columns = vectors(table, chunk).to(device).split(widths, dim=1)
                of_chunk = ids[table][chunk].to(device)
                all_rows = list(lma.rows(table, of_chunk).values())
                if remap.outside_is_0:  # those outside look at the rows of id 0, which are not theirs
                    inside = (of_chunk >= 0) & (of_chunk < sizes[table])
                    all_rows = [torch.where(inside, rows, -1) for rows in all_rows]
                for solver, rows, part in zip(solvers, all_rows, columns):
                    if solver is not None:
                        solver.add(rows, part, each)
        for solver in solvers:
            if solver is not None:
                solver.write()


def _chunks(n: int, dim: int) -> Iterator[slice]:
    """Slices of n vectors of a dim, each of bounded size."""
    step = max(1, _CHUNK_VALUES // dim)
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def device_of(module: nn.Module) -> torch.device:
    """Raises ValueError where the weights have no values."""
    device = next(module.parameters()).device
    if device.type == "meta":
        raise ValueError(
            f"the weights of the {type(module).__name__} are on the meta device and have no values; load a checkpoint "
            "first"
        )
    return device


def _check_ids(
    ids: Mapping[str, Tensor], tables: Sequence[str] | Mapping[str, int], weights: Mapping[str, Tensor]
) -> None:
    """Raises ValueError unless there are ids for each table and weights that fit them, TypeError unless in tensors."""
    if set(ids) != set(tables):
        raise ValueError(
            f"ids are needed for each of the tables {list(tables)}; missing {sorted(set(tables) - set(ids))}, unknown "
            f"{sorted(set(ids) - set(tables))}. Give an empty tensor for a table whose ids do not matter"
        )
    for name, values in ids.items():
        if not isinstance(values, Tensor):
            raise TypeError(f"ids of {name!r} are {type(values).__name__}; give an integer tensor of shape [N]")
        if values.dim() != 1:
            raise TypeError(f"ids of {name!r} have shape {list(values.shape)}; give an integer tensor of shape [N]")
        to_int64(values, f"the tensor of {name!r}")
    for name, of_ids in weights.items():
        if name not in ids:
            raise ValueError(f"id_weights has a table {name!r}; the tables are {list(ids)}")
        if not isinstance(of_ids, Tensor):
            raise TypeError(f"id_weights of {name!r} are {type(of_ids).__name__}; give a tensor of shape [N]")
        if of_ids.shape != ids[name].shape:
            raise ValueError(
                f"id_weights of {name!r} has shape {list(of_ids.shape)}, expected one weight for each of its "
                f"{ids[name].numel()} ids"
            )
        if not bool(((of_ids >= 0) & torch.isfinite(of_ids)).all()):
            raise ValueError(
                f"id_weights of {name!r} has a value that is negative or not finite; give counts or other weights >= 0"
            )


def _check_one_id_a_row(ids: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
    for name, values in ids.items():
        if values.numel() != sizes[name]:
            raise ValueError(
                f"ids of {name!r} has {values.numel()} values, expected one for each of its {sizes[name]} rows"
            )
