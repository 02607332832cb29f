"""Regroup: from levels to the embeddings that full tables would give, pooled or one for each id."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_lma.allocation.artifact import Allocation
from torchrec_lma.features import Slot, take_features
from torchrec_lma.remap import Remap, level_key, whole_key


def pieces_of(slots: Sequence[Slot], allocation: Allocation) -> tuple[list[list[str]], list[int]]:
    """Where the columns of the output come from.

    Returns:
        For each piece of the output in order the keys of pooled levels that it is in, one for each place of a packed
        row, or an empty key where it is zero for all ids; and its width.
    """
    memory_of = {table: memory for memory in allocation.memories for table in memory.tables}
    keys: list[list[str]] = []
    widths: list[int] = []
    for slot in slots:
        if slot.table in allocation.whole:
            keys.append([whole_key(slot)])
            widths.append(slot.dim)
            continue
        for k, level in enumerate(memory_of[slot.table].levels):
            keys.append([level_key(slot, k, place) for place in range(level.pack)] if level.rows else [""])
            widths.append(level.width)
    return keys, widths


@torch.fx.wrap
def regroup(pooled: KeyedTensor, keys: list[list[str]], widths: list[int]) -> Tensor:
    """Puts pooled levels side by side, in the order of the output. Scripts.

    Args:
        pooled: of the plain collection, its keys in any order.
        keys, widths: from `pieces_of`.
    Returns:
        float [B, sum of widths].
    """
    of_key = pooled.to_dict()
    columns: list[Tensor] = []
    for i in range(len(widths)):
        width, places = widths[i], len(keys[i])
        if keys[i][0] == "":
            values = pooled.values()
            columns.append(torch.zeros([values.size(0), width], dtype=values.dtype, device=values.device))
        elif places == 1:
            columns.append(of_key[keys[i][0]])
        else:  # an id is at one place; at the others its bag is empty there
            column = of_key[keys[i][0]][:, :width]
            for place in range(1, places):
                column = column + of_key[keys[i][place]][:, place * width : (place + 1) * width]
            columns.append(column)
    return torch.cat(columns, dim=1)


@torch.fx.wrap
def divide_by_lengths(pooled: Tensor, lengths: Tensor, is_mean: list[bool], dims: list[int]) -> Tensor:
    """MEAN pooling of the slots that have it: levels pool SUM. Weighted, that is sum(w_i * e_i) / length, as FBGEMM's.

    Args:
        pooled: float [B, sum of dims].
        lengths: integer [B, slots].
        is_mean, dims: of each slot.
    """
    mean = torch.tensor(is_mean, device=lengths.device)
    divisors = torch.where(mean, lengths.clamp(min=1), 1).to(pooled.dtype)  # (B, slots)
    columns = torch.tensor(dims, device=lengths.device)
    return pooled / divisors.repeat_interleave(columns, dim=1, output_size=pooled.size(1))


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
    keys: list[str],
    slots: list[int],
    widths: list[list[int]],
    packs: list[list[int]],
) -> list[Tensor]:
    """Scatters the rows of each level to the ids that have them, zeros to the others. Scripts.

    Args:
        found: by key of the batch of rows, from one collection or several.
        positions: int64, of each of these rows the place of its id among the ids of all slots; in the order of `keys`.
        counts: how many ids each slot has.
        keys, slots, widths, packs: see Pieces.
    Returns:
        Of each slot, float [ids, dim].
    """
    of_key: dict[str, JaggedTensor] = {}
    for each in found:
        of_key.update(each)
    vectors: list[Tensor] = []
    key, first, begin, start = 0, 0, 0, 0
    for group in range(len(slots)):
        of_slots = counts[first : first + slots[group]]
        n = sum(of_slots)
        columns: list[Tensor] = []
        for k in range(len(packs[group])):
            width, pack = widths[group][k], packs[group][k]
            parts: list[Tensor] = []
            for place in range(pack):
                rows = torch.cat([of_key[keys[key + i]].values() for i in range(slots[group])])
                parts.append(rows[:, place * width : (place + 1) * width])
                key += slots[group]
            if pack == 0:
                values = of_key[keys[0]].values()
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


@dataclass(frozen=True)
class Pieces:
    """Where the columns of unpooled embeddings come from: groups of slots, each a whole table's or a memory's.

    Attributes:
        keys: of the batch of rows, group by group, level by level, place by place in packed rows, slot by slot.
        slots: how many each group has.
        widths, packs: of each level of each group; a level without rows has pack 0.
        names: of the output.
        order: where the slot of each name stands among those of the groups.
    """

    keys: list[str]
    slots: list[int]
    widths: list[list[int]]
    packs: list[list[int]]
    names: list[str]
    order: list[int]

    def regroup(
        self, found: list[dict[str, JaggedTensor]], positions: Tensor, batch: KeyedJaggedTensor, need_indices: bool
    ) -> dict[str, JaggedTensor]:
        """The output of an EmbeddingCollection of full tables: see `vectors_of_slots` and `sequences`."""
        counts = batch.length_per_key()
        vectors = vectors_of_slots(found, positions, counts, self.keys, self.slots, self.widths, self.packs)
        return sequences(vectors, batch, self.names, self.order, need_indices)

    @classmethod
    def of(cls, slots: Sequence[Slot], allocation: Allocation, remap: Remap) -> "Pieces":
        whole = [slot for slot in slots if slot.table in allocation.whole]
        placed = list(dict.fromkeys(remap.sources))
        return cls(
            keys=remap.keys,
            slots=[1] * len(whole) + remap.memory_slots,
            widths=[[slot.dim] for slot in whole] + [[lv.width for lv in m.levels] for m in allocation.memories],
            packs=[[1]] * len(whole) + [[lv.pack if lv.rows else 0 for lv in m.levels] for m in allocation.memories],
            names=[slot.name for slot in slots],
            order=[placed.index(i) for i in range(len(slots))],
        )
