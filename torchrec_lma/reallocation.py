"""A new allocation for a trained model: new ids, drift, or another source of similarity."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchrec_lma.allocation import Allocation
from torchrec_lma.least_squares import blocks, fit
from torchrec_lma.modules import LMAEmbeddingBagCollection
from torchrec_lma.text_table import text_table


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

    module: LMAEmbeddingBagCollection
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
    module: LMAEmbeddingBagCollection,
    allocation: Allocation,
    ids: Mapping[str, Tensor],
    id_weights: Mapping[str, Tensor] | None = None,
) -> Reallocation:
    """Moves a trained memory under another allocation, changing the embeddings of ids as little as possible.

    The new memory is the least-squares solution (see `least_squares`). Chunks that none of the ids uses keep the old
    memory's values where it has as many rows; else they are initialised. A hashed id that is not given keeps its
    embedding only if the dedicated rows are as many too, the seed is the same, and no given id shares its chunks.

    What an optimizer knew of the old chunks means nothing for the new ones: make a new optimizer for the result. Build
    the new allocation with the old one's seed: under another seed every hashed id moves as well.

    Args:
        module: unsharded; a sharded model's checkpoint loads into one. It is left as it is.
        allocation: the new one, for tables of the same names, dims and data types. Their num_embeddings, and the
            config, may be others.
        ids: for each table, integer [N], distinct: the ids whose embeddings are to be kept.
        id_weights: for any of the tables, [N] >= 0, how much each id counts (how often it occurs, plus 1, is a good
            weight); without them all count alike.
    Raises:
        TypeError: `module` is no unsharded LMA collection, or ids that are not integers.
        ValueError: an allocation for other tables; ids or weights that do not fit the tables; weights on the meta
            device.

    Example::

        result = reallocate(model.sparse_arch.embedding_bag_collection, new_allocation, ids)
        print(result)
        model.sparse_arch.embedding_bag_collection = result.module
    """
    if not isinstance(module, LMAEmbeddingBagCollection):
        raise TypeError(
            f"module is a {type(module).__name__}, expected an unsharded LMAEmbeddingBagCollection; load a sharded "
            "model's checkpoint into one first"
        )
    device = next(module.parameters()).device
    if device.type == "meta":
        raise ValueError("the weights of the module are on the meta device and have no values; load a checkpoint first")
    sizes = {table.name: table.num_embeddings for table in allocation.tables}
    tables = [replace(table, num_embeddings=sizes.get(table.name, table.num_embeddings)) for table in module.tables]
    new = LMAEmbeddingBagCollection(tables, allocation.config, allocation, module.is_weighted(), device)
    for name, bag in new.embedding_bags.items():
        if name in module.embedding_bags and bag.weight.shape == module.embedding_bags[name].weight.shape:
            bag.weight.copy_(module.embedding_bags[name].weight)
    fit(new, ids, lambda table, block: module.materialize(table, ids[table][block].to(device)), id_weights)
    return Reallocation(new, _changes(module, new, ids, id_weights or {}))


def _changes(
    old: LMAEmbeddingBagCollection,
    new: LMAEmbeddingBagCollection,
    ids: Mapping[str, Tensor],
    id_weights: Mapping[str, Tensor],
) -> tuple[TableChange, ...]:
    """A change for each table, then the total."""
    device = next(old.parameters()).device
    changes = []
    total = torch.zeros(3, dtype=torch.float64, device=device)
    for table in new.tables:
        # Weight of all values, weighted squares of the values before, weighted squares of their change.
        sums = torch.zeros_like(total)
        for block in blocks(ids[table.name].numel(), table.embedding_dim):
            block_ids = ids[table.name][block].to(device)
            weights = torch.ones(block_ids.numel())
            if table.name in id_weights:
                weights = id_weights[table.name][block]
            weights = weights.to(device, torch.float64)
            before = old.materialize(table.name, block_ids).to(torch.float64)
            change = new.materialize(table.name, block_ids).to(torch.float64) - before
            sums[0] += weights.sum() * table.embedding_dim
            sums[1] += weights @ before.square().sum(1)
            sums[2] += weights @ change.square().sum(1)
        changes.append(_change(table.name, ids[table.name].numel(), sums))
        total += sums
    return (*changes, _change("total", sum(change.ids for change in changes), total))


def _change(table: str, n_ids: int, sums: Tensor) -> TableChange:
    values, before, change = sums.tolist()
    return TableChange(table, n_ids, (before / (values or 1)) ** 0.5, (change / (values or 1)) ** 0.5)
