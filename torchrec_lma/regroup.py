"""Regroup: from pooled levels to the pooled embeddings that full tables would give."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedTensor

from torchrec_lma.allocation.artifact import Allocation
from torchrec_lma.features import Slot
from torchrec_lma.remap import level_key, whole_key


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
