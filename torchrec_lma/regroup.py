"""Regroup: from levels to the embeddings that full tables would give, pooled or one for each id."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_lma.allocation.artifact import Allocation
from torchrec_lma.features import Slot, take_features
from torchrec_lma.remap import Remap


@torch.fx.wrap
def numbered(features: KeyedJaggedTensor, names: list[str]) -> KeyedJaggedTensor:
    """The named features, with the place of each id among all of theirs as its weight: int64 0, 1, 2, ..."""
    if not torch.jit.is_scripting() and features.variable_stride_per_key():
        raise ValueError(
            "the KeyedJaggedTensor has a variable batch size per feature (VBE), which an LMAEmbeddingCollection does "
            "not take; give all features one batch size"
        )
    chosen = take_features(features, names)
    return KeyedJaggedTensor(
        keys=names,
        values=chosen.values(),
        weights=torch.arange(chosen.values().numel(), device=chosen.values().device),
        lengths=chosen.lengths(),
        stride=chosen.stride(),
    )


@torch.fx.wrap
def for_plain_collections(rows: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The batch of rows without weights; and with a row, an empty one, which TorchRec's EmbeddingCollections need."""
    lengths, stride = rows.lengths(), rows.stride()
    if not torch.compiler.is_compiling() and stride == 0:
        lengths, stride = torch.zeros([len(rows.keys())], dtype=lengths.dtype, device=lengths.device), 1
    return KeyedJaggedTensor(keys=rows.keys(), values=rows.values(), lengths=lengths, stride=stride)


@torch.fx.wrap
def vectors_of_slots(
    found: list[dict[str, JaggedTensor]],
    positions: Tensor,
    counts: list[int],
    tables: list[list[str]],
    slots: list[int],
    levels: list[list[tuple[int, int]]],
) -> list[Tensor]:
    """Scatters the rows of each level to the ids that have them, zeros to the others. Scripts.

    Args:
        found: by key of the batch of rows, from one collection or several.
        positions: int64, of each of these rows the place of its id among the ids of all slots; in the order of
            `tables`.
        counts: how many ids each slot has.
        tables, slots, levels: see Pieces.
    Returns:
        Of each slot, float [ids, dim].
    """
    of_key: dict[str, JaggedTensor] = {}
    for each in found:
        of_key.update(each)
    vectors: list[Tensor] = []
    table, first, begin, start = 0, 0, 0, 0
    for group in range(len(slots)):
        of_slots = counts[first : first + slots[group]]
        n = sum(of_slots)
        columns: list[Tensor] = []
        for width, pack in levels[group]:
            parts: list[Tensor] = []
            for place in range(pack):
                rows = torch.cat([of_key[key].values() for key in tables[table]])
                parts.append(rows[:, place * width : (place + 1) * width])
                table += 1
            if pack == 0:
                values = of_key[tables[0][0]].values()
                columns.append(torch.zeros([n, width], dtype=values.dtype, device=values.device))
            else:
                rows = torch.cat(parts)
                end = begin + rows.size(0)
                places = positions[begin:end] - start
                columns.append(rows.new_zeros([n, width]).index_copy(0, places, rows))
                begin = end
        vectors.extend(torch.cat(columns, dim=1).split(of_slots))
        first += slots[group]
        start += n
    return vectors


@torch.fx.wrap
def sequences(
    vectors: list[Tensor], batch: KeyedJaggedTensor, names: list[str], order: list[int], need_indices: bool
) -> dict[str, JaggedTensor]:
    """The output of an EmbeddingCollection. Scripts.

    Args:
        vectors: of each slot, float [ids, dim].
        batch: the slots' ids.
        names, order: see Pieces.
        need_indices: ids go along as weights.
    """
    ids = batch.values().split(batch.length_per_key())
    lengths = batch.lengths().view(len(names), batch.stride())
    result: dict[str, JaggedTensor] = {}
    for name, i in zip(names, order):
        weights: Tensor | None = None
        if need_indices:
            weights = ids[i]
        result[name] = JaggedTensor(values=vectors[i], lengths=lengths[i], weights=weights)
    return result


@torch.fx.wrap
def split_tables(pooled: KeyedTensor, tables: list[list[str]]) -> list[Tensor]:
    """The pooled features of each list of keys, float [B, keys, width]. Scripts.

    TorchRec has the features of a table side by side, so a view is enough; where it has not, they are copied.
    """
    keys, widths = pooled.keys(), pooled.length_per_key()
    number: dict[str, int] = {}
    for t in range(len(tables)):
        number[tables[t][0]] = t
    order: list[int] = []
    columns: list[int] = []
    k = 0
    while k < len(keys):
        t = number.get(keys[k], 0)
        end = k + len(tables[t])
        if keys[k:end] != tables[t]:
            break
        order.append(t)
        columns.append(len(tables[t]) * widths[k])
        k = end
    parts: list[Tensor] = []
    if k == len(keys) and len(order) == len(tables):
        split = pooled.values().split(columns, dim=1)
        parts = [split[order.index(t)] for t in range(len(tables))]
    else:
        of_key = pooled.to_dict()
        parts = [torch.cat([of_key[key] for key in table], dim=1) for table in tables]
    return [parts[t].unflatten(1, (len(tables[t]), -1)) for t in range(len(tables))]


def _zeros(like: Tensor, slots: int, width: int) -> Tensor:
    """[B, slots, width], with the B of [B, ...]; a view."""
    return like.new_zeros([1, 1, 1]).expand(like.size(0), slots, width)


@torch.fx.wrap
def regroup(
    pooled: KeyedTensor,
    tables: list[list[str]],
    slots: list[int],
    levels: list[list[tuple[int, int]]],
    cuts: list[list[int]],
    runs: list[tuple[int, int, bool]],
    lengths: Tensor | None,
) -> Tensor:
    """Puts pooled levels side by side, in the order of the output. Scripts.

    Args:
        pooled: of the plain collection, its keys in any order.
        tables, slots, levels, cuts, runs: see Pieces. The sums of a run that pools MEAN are divided by the lengths of
            its bags; weighted, that is sum(w_i * e_i) / length, as FBGEMM's.
        lengths: integer [B, slots], in the order of the output; None where nothing pools MEAN.
    Returns:
        float [B, sum of dims].
    """
    parts = split_tables(pooled, tables)
    of_groups: list[list[list[Tensor]]] = []  # columns of each level of each group, run by run
    blanks: list[int] = []  # zeros behind them
    table = 0
    for group in range(len(slots)):
        columns: list[list[Tensor]] = []
        blank = 0
        for width, pack in levels[group]:
            if pack == 0:
                blank += width
                continue
            if blank > 0:
                columns.append([_zeros(parts[0], n, blank) for n in cuts[group]])
                blank = 0
            column = parts[table] if pack == 1 else parts[table][:, :, :width]
            for place in range(1, pack):  # an id is at one place; at the others its bag is empty
                column = column + parts[table + place][:, :, place * width : (place + 1) * width]
            table += pack
            # A split costs a copy in the backward.
            columns.append(column.split(cuts[group], dim=1) if len(cuts[group]) > 1 else [column])
        of_groups.append(columns)
        blanks.append(blank)
    outputs: list[Tensor] = []
    slot = 0
    for group, run, is_mean in runs:
        pieces = [column[run] for column in of_groups[group]]
        end = slot + cuts[group][run]
        if is_mean and lengths is not None:
            divisors = lengths[:, slot:end].clamp(min=1).to(pieces[0].dtype).unsqueeze(2)
            pieces = [piece / divisors for piece in pieces]
        blank = blanks[group]
        if end - slot > 1:  # slot by slot, not level by level
            # On a GPU padding takes a third of the time of a cat with zeros.
            joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
            pieces = [torch.nn.functional.pad(joined, [0, blank]) if blank > 0 else joined]
        elif blank > 0:
            pieces.append(_zeros(pieces[0], 1, blank))
        outputs += [piece.flatten(1) for piece in pieces]
        slot = end
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


@dataclass(frozen=True)
class Pieces:
    """Where the columns of embeddings come from: groups of slots, each of a memory.

    Attributes:
        tables: of each level table, or place of a packed one, the keys of the batch of rows, one for each slot of its
            group; group by group, level by level, place by place.
        slots: how many each group has.
        levels: of each group, the width and `Level.pack` of each level; a level without rows has pack 0.
        names: of the output.
        order: where the slot of each name stands among those of the groups.
        cuts: of each group, how many slots each of its runs has. Slots of a run are neighbours in the output, too, and
            pool alike.
        runs: the output, run by run: the group, which of its runs, and whether it pools MEAN.
    """

    tables: list[list[str]]
    slots: list[int]
    levels: list[list[tuple[int, int]]]
    names: list[str]
    order: list[int]
    cuts: list[list[int]]
    runs: list[tuple[int, int, bool]]

    def regroup(
        self, found: list[dict[str, JaggedTensor]], positions: Tensor, batch: KeyedJaggedTensor, need_indices: bool
    ) -> dict[str, JaggedTensor]:
        """The output of an EmbeddingCollection of full tables: see `vectors_of_slots` and `sequences`."""
        counts = batch.length_per_key()
        vectors = vectors_of_slots(found, positions, counts, self.tables, self.slots, self.levels)
        return sequences(vectors, batch, self.names, self.order, need_indices)

    @classmethod
    def of(
        cls, slots: Sequence[Slot], allocation: Allocation, remap: Remap, mean_tables: Collection[str] = ()
    ) -> "Pieces":
        """
        Args:
            slots: of the output, in order.
            allocation, remap: of the collection.
            mean_tables: which logical tables pool MEAN.
        """
        counts = remap.memory_slots
        levels = [[(lv.width, lv.pack if lv.rows else 0) for lv in m.levels] for m in allocation.memories]
        keys = iter(remap.keys)
        placed = list(dict.fromkeys(remap.sources))
        order = [placed.index(i) for i in range(len(slots))]
        where = [(group, i) for group, count in enumerate(counts) for i in range(count)]
        found: list[tuple[int, int, int, bool]] = []  # group, begin, end, MEAN
        for slot, place in zip(slots, order):
            group, i = where[place]
            is_mean = slot.table in mean_tables
            if found and (found[-1][0], *found[-1][2:]) == (group, i, is_mean):
                found[-1] = (group, found[-1][1], i + 1, is_mean)
            else:
                found.append((group, i, i + 1, is_mean))
        of_groups = [sorted(run for run in found if run[0] == group) for group in range(len(counts))]
        return cls(
            tables=[
                list(islice(keys, n))
                for n, of_group in zip(counts, levels)
                for _, pack in of_group
                for _ in range(pack)
            ],
            slots=counts,
            levels=levels,
            names=[slot.name for slot in slots],
            order=order,
            cuts=[[end - begin for _, begin, end, _ in of_group] for of_group in of_groups],
            runs=[(run[0], of_groups[run[0]].index(run), run[3]) for run in found],
        )
