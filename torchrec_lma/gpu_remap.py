"""The remap on a GPU: a Triton kernel for each memory and one for the batch, for some eighty of torch's operators.

At the batch sizes that models are trained with, a host launches those for longer than the device looks up rows. On a
CPU, in TorchScript, torch.export and torch.compile torch's operators run. Nothing waits for the device before the end,
where TorchRec needs the number of rows of each key.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import triton
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma.allocation.bitmap import RankBitmap
from torchrec_lma.allocation.index import IdIndex
from torchrec_lma.features import bag_ends
from torchrec_lma.gpu_kernels import ALL, BITMAP, INDEX, NONE, RANGES, kept_kernel, rows_kernel
from torchrec_lma.memory_remap import MemoryRemap, complete_cumsum
from torchrec_lma.owners import AllOwn, RangeOwners

if TYPE_CHECKING:
    from torchrec_lma.remap import Remap

_BLOCK = 512  # ids

# What follows from the allocation, `_of_allocation`: to gather it takes longer than a launch.
_KNOWN: WeakKeyDictionary[MemoryRemap, tuple[int, bool, dict[str, Any]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Group:
    """Slots that one launch takes: those of a memory.

    Attributes:
        n_tables: how many table rows an id can have.
        nobody_is_absent: whether each has as many.
        arguments: of `rows_kernel`, by name.
    """

    n_slots: int
    n_tables: int
    nobody_is_absent: bool
    arguments: dict[str, Any]

    @classmethod
    def of_memory(cls, memory: MemoryRemap) -> "_Group":
        if memory not in _KNOWN:
            _KNOWN[memory] = _of_allocation(memory)
        n_tables, hashes, constants = _KNOWN[memory]
        arguments = {
            "sizes": memory.sizes,
            "first": memory.first,
            "salts": memory.salts if hashes else None,
            "rows_of_slots": memory.rows_of_slots,
            "signatures": memory.signatures if memory.has_signatures else None,
            "signed": _tensors(memory.signed)[:2] if memory.has_signatures else (None, None),
            "owners": tuple(tensor for owners in memory.owners for tensor in _tensors(owners)),
        }
        nobody_is_absent = memory.nobody_is_absent and n_tables == 1
        return cls(memory.sizes.numel(), n_tables, nobody_is_absent, arguments | constants)


def _of_allocation(memory: MemoryRemap) -> tuple[int, bool, dict[str, Any]]:
    """How many table rows an id can have, whether some row is a hash, and the constants of `rows_kernel`."""
    has_rows = (own + shared > 0 for own, shared in zip(memory.own_rows, memory.shared_rows))
    n_tables = sum(pack for pack, has in zip(memory.packs, has_rows) if has)
    # Salts are for keys: where no row is a hash, none is read.
    hashes = memory.raw_ids or any(
        shared and not by_table for shared, by_table in zip(memory.shared_rows, memory.shared_by_table)
    )
    kinds, bits, steps = zip(*(_kind(owners) for owners in memory.owners))
    signed_kind, signed_bits, signed_steps = (NONE.value, 0, 0)
    if memory.has_signatures:
        signed_kind, signed_bits, signed_steps = _kind(memory.signed)
    constants = {
        "RAW_IDS": memory.raw_ids,
        "OUTSIDE_IS_0": memory.outside_is_0,
        "KINDS": kinds,
        "OWN_ROWS": tuple(memory.own_rows),
        "SHARED_ROWS": tuple(memory.shared_rows),
        "BY_TABLE": tuple(memory.shared_by_table),
        "PACKS": tuple(memory.packs),
        "MULTIPLIERS": tuple(memory.multipliers),
        "BITS": max(bits),  # only the first level has an index
        "STEPS": max(steps),
        "SIGNATURES": memory.signatures.size(1) if memory.has_signatures else 0,
        "SIGNATURE_SALT": memory.signature_salt,
        "SIGNED_KIND": signed_kind,
        "SIGNED_BITS": signed_bits,
        "SIGNED_STEPS": signed_steps,
    }
    return n_tables, hashes, constants


def _kind(owners: nn.Module) -> tuple[int, int, int]:
    """Of owners, and of an index its bits and steps."""
    if isinstance(owners, RankBitmap):
        return BITMAP.value, 0, 0
    if isinstance(owners, IdIndex):
        return INDEX.value, 64 - owners.shift, owners.steps
    if isinstance(owners, RangeOwners):
        return RANGES.value, 0, 0
    return (ALL if isinstance(owners, AllOwn) else NONE).value, 0, 0


def _tensors(owners: nn.Module) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if isinstance(owners, RankBitmap):
        return owners.words, owners.before, None
    if isinstance(owners, IdIndex):
        return owners.low, owners.starts, None
    if isinstance(owners, RangeOwners):
        return owners.first, owners.end, owners.shift
    return None, None, None


def remap_batch(
    remap: "Remap", batch: KeyedJaggedTensor
) -> tuple[Tensor, Tensor, Tensor | None, list[int] | None, Tensor]:
    """What `Remap.forward` computes of a batch that has at least one id. Waits for the device once, at its end.

    Args:
        batch: the features of `remap`, in its order.
    Returns:
        rows int32 [M] and weights [M] or None of all keys, lengths int32 [bags of all keys]; how many rows each key
        has, None with VBE; int64 [], how many ids are outside of their vocabulary.
    Raises:
        ValueError: lengths that are negative or add up to more than there are ids.
    """
    ids, offsets = batch.values().contiguous(), complete_cumsum(batch.lengths())
    is_variable = batch.variable_stride_per_key()
    ends = bag_ends(batch)
    n, n_slots, n_bags = ids.numel(), len(ends) - 1, ends[-1]
    if is_variable:
        slot_starts = offsets.index_select(0, torch.tensor(ends).to(offsets.device, non_blocking=True))
    else:
        slot_starts = offsets[:: batch.stride()]
    groups = [_Group.of_memory(memory) for memory in remap.memories.values()]  # type: ignore[arg-type]
    rows = torch.empty([sum(group.n_tables for group in groups), n], dtype=torch.int32, device=ids.device)
    outside = torch.zeros([], dtype=torch.int64, device=ids.device)
    table, slot = 0, 0
    of_keys: list[tuple[slice, slice]] = []  # among tables and bags
    for group in groups:
        rows_kernel[(triton.cdiv(n, _BLOCK),)](
            ids=ids,
            slot_starts=slot_starts,
            rows=rows,
            outside=outside,
            n=n,
            slot_stride=slot_starts.stride(0),
            first_slot=slot,
            first_table=table,
            N_SLOTS=group.n_slots,
            N_ALL_SLOTS=n_slots,
            SLOT_BITS=(n_slots - 1).bit_length(),
            BLOCK=_BLOCK,
            **group.arguments,
        )
        of_keys.append((slice(table, table + group.n_tables), slice(ends[slot], ends[slot + group.n_slots])))
        table, slot = table + group.n_tables, slot + group.n_slots
    kept_ids: Tensor | None = None
    if len(groups) == 1 and groups[0].nobody_is_absent:
        kept, of_bags, n_rows = rows.view(-1), batch.lengths().to(torch.int32), offsets[-1:]
    else:
        until = (rows.view(-1) >= 0).cumsum(0, dtype=torch.int32)
        kept, lengths = torch.empty_like(until), until.new_empty([table, n_bags])
        if remap.is_weighted:
            kept_ids = torch.empty_like(until)
        kept_kernel[(triton.cdiv(max(rows.numel(), lengths.numel()), _BLOCK),)](
            rows,
            until,
            offsets,
            kept,
            kept_ids,
            lengths,
            n,
            rows.numel(),
            n_bags,
            lengths.numel(),
            BLOCK=_BLOCK,
        )
        parts = [lengths[tables, bags].flatten() for tables, bags in of_keys]
        of_bags = parts[0] if len(parts) == 1 else torch.cat(parts)
        n_rows = until[-1:]
    sums = of_bags.sum().view(1) if is_variable else of_bags.view(-1, batch.stride()).sum(1)
    *of_each_key, least, m, n_given = torch.cat([sums, of_bags.min().view(1), n_rows, offsets[-1:]]).tolist()
    if least < 0 or sum(of_each_key) != m or not 0 <= n_given <= n:
        raise ValueError(
            f"the KeyedJaggedTensor has lengths that are negative, or {n} values and lengths that add up to {n_given}; "
            "check how the batch was cut"
        )
    weights: Tensor | None = None
    if kept_ids is not None:  # they may be trained: an operator that autograd knows
        weights = batch.weights().index_select(0, kept_ids[:m])
    elif remap.is_weighted:
        weights = batch.weights()[:m]
    return kept[:m], of_bags, weights, None if is_variable else of_each_key, outside
