"""The remap on a GPU: Triton kernels for what takes some eighty launches of torch's operators.

At the batch sizes that models are trained with, a host launches those for longer than the device looks up rows. What is
computed is `Remap.forward`, line by line: that stays the reference, and is what the CPU, TorchScript and torch.compile
run. Nothing waits for the device before the end, where TorchRec needs the number of rows of each key.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma.allocation.index import IdIndex
from torchrec_lma.features import bag_ends
from torchrec_lma.owners import AllOwn, BitmapOwners, IndexOwners, RangeOwners

if TYPE_CHECKING:
    from torchrec_lma.remap import MemoryRemap, Remap

_BLOCK = 512

# Who owns a row of a level: the classes of owners.py.
_NONE = tl.constexpr(0)
_ALL = tl.constexpr(1)
_BITMAP = tl.constexpr(2)
_RANGES = tl.constexpr(3)
_INDEX = tl.constexpr(4)


@triton.jit
def _mix64(x):
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _find_in_bitmap(values, words, before):
    inside = values >= 0
    word = values >> 5
    up_to_it = tl.load(words + word, mask=inside, other=0) << (~values & 31).to(tl.int32)
    is_member = inside & (up_to_it < 0)
    x = up_to_it - ((up_to_it >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    rank = tl.load(before + word, mask=is_member, other=0) + ((x * 0x01010101) >> 24) - 1
    return tl.where(is_member, rank, -1)


@triton.jit
def _find_in_index(keys, low, starts, inside, BITS: tl.constexpr, STEPS: tl.constexpr):
    bucket = (keys >> (64 - BITS)) & ((1 << BITS) - 1)
    wanted = (keys & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    first = tl.load(starts + bucket, mask=inside, other=0)
    end = tl.load(starts + bucket + 1, mask=inside, other=0)
    after = end
    for _ in tl.static_range(STEPS):
        middle = first + ((after - first) >> 1)
        less = (tl.load(low + middle, mask=first < after, other=0) < wanted) & (first < after)
        first = tl.where(less, middle + 1, first)
        after = tl.where(less, after, middle)
    found = (first < end) & (tl.load(low + first, mask=first < end, other=0) == wanted)
    return tl.where(found, first, -1)


@triton.jit
def _store(out, row, mask, n, PACK: tl.constexpr):
    """The table rows of rows, place by place. Where those of the next level go."""
    for place in tl.static_range(PACK):
        is_here = (row >= 0) & (row % PACK == place)
        tl.store(out, tl.where(is_here, row // PACK, -1), mask=mask)
        out += n
    return out


@triton.jit(do_not_specialize=["n", "first_slot"])
def _rows_kernel(
    ids,  # [N], of all slots
    slot_starts,  # where the ids of each slot begin
    sizes,  # int64 [slots of the group]: this and what follows are buffers of MemoryRemap
    first,
    salts,
    rows_of_slots,  # [levels, slots of the group]
    signatures,
    signed,  # tensors of the bitmap or index of ids with a signature
    owners,  # those of all levels, two or three of each
    rows,  # out: int32 [tables, N], -1 where an id is of another group
    outside,  # out: int64 [], added to
    n,  # N
    slot_stride,  # of slot_starts
    first_slot,  # of the group
    N_SLOTS: tl.constexpr,
    N_ALL_SLOTS: tl.constexpr,
    RAW_IDS: tl.constexpr,
    KINDS: tl.constexpr,  # of owners, of each level
    OWNERS_AT: tl.constexpr,  # where their tensors begin
    OWN_ROWS: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    BY_TABLE: tl.constexpr,
    PACKS: tl.constexpr,
    MULTIPLIERS: tl.constexpr,
    BITS: tl.constexpr,  # of the owners' index
    STEPS: tl.constexpr,
    SIGNATURES: tl.constexpr,  # how many an id has, 0 for none
    SIGNATURE_SALT: tl.constexpr,
    SIGNED_BITS: tl.constexpr,
    SIGNED_STEPS: tl.constexpr,
    SLOT_BITS: tl.constexpr,  # 2 ** SLOT_BITS > slots
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # The last slot that begins here or before: the one of the id, for those after it are empty or begin later.
    slot = tl.zeros([BLOCK], tl.int32)
    for bit in tl.static_range(SLOT_BITS):
        next = slot + (1 << (SLOT_BITS - 1 - bit))
        start = tl.load(slot_starts + next.to(tl.int64) * slot_stride, mask=next < N_ALL_SLOTS, other=0)
        slot = tl.where((next < N_ALL_SLOTS) & (start <= at), next, slot)
    slot -= first_slot
    is_id = (at < n) & (slot >= 0) & (slot < N_SLOTS)
    id = tl.load(ids + at, mask=is_id, other=0).to(tl.int64)
    if RAW_IDS:
        inside = is_id
        position = _mix64(id ^ tl.load(salts + slot, mask=is_id, other=0))
    else:
        inside = is_id & (id >= 0) & (id < tl.load(sizes + slot, mask=is_id, other=0))
        position = id
        if first is not None:
            position += tl.load(first + slot, mask=is_id, other=0)
        position = tl.where(inside, position, -1)
        n_outside = tl.sum((is_id & ~inside).to(tl.int64))
        if n_outside > 0:
            tl.atomic_add(outside, n_outside)
    own = position
    out = rows + at
    for k in tl.static_range(len(KINDS)):
        a = owners[OWNERS_AT[k]]
        b = owners[OWNERS_AT[k] + 1]
        if KINDS[k] == _ALL:
            own = own.to(tl.int32)
        elif KINDS[k] == _BITMAP:
            own = _find_in_bitmap(own, a, b)
        elif KINDS[k] == _RANGES:
            c = owners[OWNERS_AT[k] + 2]
            is_owner = (own >= tl.load(a + slot, mask=is_id, other=0)) & (own < tl.load(b + slot, mask=is_id, other=0))
            own = tl.where(is_owner, own + tl.load(c + slot, mask=is_id, other=0), -1).to(tl.int32)
        elif KINDS[k] == _INDEX:
            own = _find_in_index(position, a, b, inside, BITS, STEPS)
        else:
            own = tl.full([BLOCK], -1, tl.int32)
        if OWN_ROWS[k] + SHARED_ROWS[k] > 0:
            row = own
            if BY_TABLE[k]:
                of_slot = tl.load(rows_of_slots + k * N_SLOTS + slot, mask=is_id, other=0).to(tl.int32)
                row = tl.where(own < 0, of_slot, own)
            elif SHARED_ROWS[k] > 0:
                if RAW_IDS:
                    key = position
                else:
                    key = _mix64(id ^ tl.load(salts + slot, mask=is_id, other=0))
                if SIGNATURES > 0:
                    if RAW_IDS:
                        which = _find_in_index(position, signed[0], signed[1], inside, SIGNED_BITS, SIGNED_STEPS)
                    else:
                        which = _find_in_bitmap(position, signed[0], signed[1])
                    is_signed = which >= 0
                    value_at = which.to(tl.int64) * SIGNATURES + k % SIGNATURES
                    value = tl.load(signatures + value_at, mask=is_signed, other=0).to(tl.int64)
                    key = tl.where(is_signed, _mix64(value ^ SIGNATURE_SALT), key)
                key = key * MULTIPLIERS[k]
                key = (key ^ (key >> 32)) & 0x7FFFFFFFFFFFFFFF
                row = tl.where(own < 0, (key % SHARED_ROWS[k] + OWN_ROWS[k]).to(tl.int32), own)
            out = _store(out, tl.where(is_id, row, -1), at < n, n, PACKS[k])


@triton.jit(do_not_specialize=["n", "total", "n_lengths"])
def _kept_kernel(
    rows,  # int32 [total]: [tables, N]
    until,  # int32 [total], how many rows there are up to each and with it
    offsets,  # [bags + 1]
    weights,  # [N] or None
    kept,  # out: int32 [total], of which the first until[-1] are written
    lengths,  # out: int32 [n_lengths]: [tables, bags]
    kept_weights,  # out, as kept
    n,  # N
    total,
    n_bags,
    n_lengths,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + at, mask=at < total, other=-1)
    is_kept = row >= 0
    to = tl.load(until + at, mask=is_kept, other=1) - 1
    tl.store(kept + to, row, mask=is_kept)
    if weights is not None:
        tl.store(kept_weights + to, tl.load(weights + at % n, mask=is_kept), mask=is_kept)

    is_length = at < n_lengths
    bag = at % n_bags
    table_start = at // n_bags * n
    begin = table_start + tl.load(offsets + bag, mask=is_length, other=0)
    end = table_start + tl.load(offsets + bag + 1, mask=is_length, other=0)
    before = tl.load(until + begin - 1, mask=is_length & (begin > 0), other=0)
    length = tl.load(until + end - 1, mask=is_length & (end > 0), other=0) - before
    tl.store(lengths + at, length, mask=is_length)


@dataclass(frozen=True)
class _Group:
    """Slots that one launch takes: those of whole tables, or of a memory.

    Attributes:
        n_tables: how many table rows an id can have.
        tensors, constants: of `_rows_kernel`.
    """

    n_slots: int
    n_tables: int
    tensors: tuple[Any, ...]
    constants: dict[str, Any]

    @classmethod
    def of_whole(cls, remap: "Remap") -> "_Group":
        """As one level on which all ids own a row, and those that are outside share one for each table, the last."""
        sizes = remap.whole_sizes
        constants = _constants([_ALL.value], [0], [1], [1], [True], [1], [0])
        return cls(remap.n_whole, 1, (sizes, None, None, sizes, None, (sizes,), (sizes, sizes)), constants)

    @classmethod
    def of_memory(cls, memory: "MemoryRemap") -> "_Group":
        kinds: list[int] = []
        tensors: list[Tensor] = []
        starts: list[int] = []
        index: IdIndex | None = None
        for owners in memory.owners:
            starts.append(len(tensors))
            if isinstance(owners, BitmapOwners):
                kinds.append(_BITMAP.value)
                tensors += [owners.words, owners.before]
            elif isinstance(owners, RangeOwners):
                kinds.append(_RANGES.value)
                tensors += [owners.first, owners.end, owners.shift]
            elif isinstance(owners, IndexOwners):
                kinds.append(_INDEX.value)
                tensors += [owners.low, owners.starts]
                index = owners
            else:
                kinds.append(_ALL.value if isinstance(owners, AllOwn) else _NONE.value)
                tensors += [memory.sizes, memory.sizes]  # not read
        signatures: Tensor | None = None
        signed: tuple[Tensor, ...] = (memory.sizes,)
        signed_index: IdIndex | None = None
        if memory.has_signatures:
            signatures = memory.signatures
            if isinstance(memory.signed, IdIndex):
                signed_index = memory.signed
                signed = (signed_index.low, signed_index.starts)
            else:
                signed = (memory.signed.words, memory.signed.before)
        constants = _constants(
            kinds, starts, memory.own_rows, memory.shared_rows, memory.shared_by_table, memory.packs, memory.multipliers
        ) | {
            "RAW_IDS": memory.raw_ids,
            **_index_constants("", index),
            **_index_constants("SIGNED_", signed_index),
            "SIGNATURES": 0 if signatures is None else signatures.size(1),
            "SIGNATURE_SALT": memory.signature_salt,
        }
        of_memory = (memory.sizes, memory.first, memory.salts, memory.rows_of_slots, signatures, signed, tuple(tensors))
        has_rows = [own + shared > 0 for own, shared in zip(memory.own_rows, memory.shared_rows)]
        n_tables = sum(pack for pack, has in zip(memory.packs, has_rows) if has)
        return cls(memory.sizes.numel(), n_tables, of_memory, constants)


def _constants(
    kinds: Sequence[int],
    owners_at: Sequence[int],
    own_rows: Sequence[int],
    shared_rows: Sequence[int],
    by_table: Sequence[bool],
    packs: Sequence[int],
    multipliers: Sequence[int],
) -> dict[str, Any]:
    """Those of a group of vocabularies without signatures."""
    return {
        "RAW_IDS": False,
        "KINDS": tuple(kinds),
        "OWNERS_AT": tuple(owners_at),
        "OWN_ROWS": tuple(own_rows),
        "SHARED_ROWS": tuple(shared_rows),
        "BY_TABLE": tuple(by_table),
        "PACKS": tuple(packs),
        "MULTIPLIERS": tuple(multipliers),
        "SIGNATURES": 0,
        "SIGNATURE_SALT": 0,
        **_index_constants("", None),
        **_index_constants("SIGNED_", None),
    }


def _index_constants(prefix: str, index: IdIndex | None) -> dict[str, int]:
    if index is None:
        return {f"{prefix}BITS": 1, f"{prefix}STEPS": 0}
    return {f"{prefix}BITS": 64 - index.shift, f"{prefix}STEPS": index.steps}


def remap_batch(
    remap: "Remap", batch: KeyedJaggedTensor
) -> tuple[Tensor, Tensor, Tensor | None, list[int] | None, Tensor]:
    """What `Remap.forward` computes of a batch that has at least one id. Waits for the device once, at its end.

    Args:
        batch: the features of `remap`, in its order.
    Returns:
        rows int32 [M] and weights [M] or None of all keys, lengths int32 [bags of all keys]; how many rows each key
        has, None with VBE; int64 [], how many ids are outside of their vocabulary.
    """
    ids, offsets = batch.values(), batch.offsets()
    ends = bag_ends(batch)
    n, n_bags = ids.numel(), ends[-1]
    if batch.variable_stride_per_key():
        slot_starts = offsets.index_select(0, torch.tensor(ends, device=offsets.device))
    else:
        slot_starts = offsets[:: batch.stride()]
    groups = [_Group.of_whole(remap)] if remap.n_whole else []
    groups += [_Group.of_memory(memory) for memory in remap.memories.values()]
    rows = torch.empty([sum(group.n_tables for group in groups), n], dtype=torch.int32, device=ids.device)
    outside = torch.zeros([], dtype=torch.int64, device=ids.device)
    table, slot = 0, 0
    of_keys: list[tuple[slice, slice]] = []  # among tables and bags
    for group in groups:
        end = table + group.n_tables
        _rows_kernel[(triton.cdiv(n, _BLOCK),)](
            ids,
            slot_starts,
            *group.tensors,
            rows[table:end],
            outside,
            n,
            slot_starts.stride(0),
            slot,
            N_SLOTS=group.n_slots,
            N_ALL_SLOTS=len(ends) - 1,
            SLOT_BITS=(len(ends) - 1).bit_length(),
            BLOCK=_BLOCK,
            **group.constants,
        )
        of_keys.append((slice(table, end), slice(ends[slot], ends[slot + group.n_slots])))
        table, slot = end, slot + group.n_slots
    until = (rows.view(-1) >= 0).cumsum(0, dtype=torch.int32)
    kept, lengths = torch.empty_like(until), until.new_empty([table, n_bags])
    weights = batch.weights_or_none() if remap.is_weighted else None
    kept_weights = None if weights is None else weights.new_empty(rows.numel())
    _kept_kernel[(triton.cdiv(max(rows.numel(), lengths.numel()), _BLOCK),)](
        rows,
        until,
        offsets,
        weights,
        kept,
        lengths,
        kept_weights,
        n,
        rows.numel(),
        n_bags,
        lengths.numel(),
        BLOCK=_BLOCK,
    )
    parts = [lengths[tables, bags].flatten() for tables, bags in of_keys]
    of_bags = parts[0] if len(parts) == 1 else torch.cat(parts)
    of_each_key: list[int] | None = None
    if batch.variable_stride_per_key():
        m = int(until[-1])
    else:
        of_each_key = of_bags.view(-1, batch.stride()).sum(1).tolist()
        m = sum(of_each_key)
    return kept[:m], of_bags, None if kept_weights is None else kept_weights[:m], of_each_key, outside
