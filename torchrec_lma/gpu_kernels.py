"""Triton kernels of the remap: `gpu_remap.py` launches them.

They compute what `MemoryRemap` does, line by line, with the same hashes, bitmaps and indices; that is the reference.
All tensors but `slot_starts` are contiguous. Numbers that change with the batch are not specialised on, so that only
the first batch waits for the compiler.
"""

import triton
import triton.language as tl

# Who owns a row of a level: the classes of owners.py.
NONE = tl.constexpr(0)
ALL = tl.constexpr(1)
BITMAP = tl.constexpr(2)
RANGES = tl.constexpr(3)
INDEX = tl.constexpr(4)


@triton.jit
def _mix64(x):
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _find_in_bitmap(values, words, before):
    word = values >> 5
    up_to_it = tl.load(words + word, mask=values >= 0, other=0) << (~values & 31).to(tl.int32)
    is_member = up_to_it < 0
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
def _slots_of(at, slot_starts, slot_stride, N_SLOTS: tl.constexpr, BITS: tl.constexpr):
    """The last slot that begins at a place or before: that of the id, for those after it are empty or begin later."""
    slot = tl.zeros(at.shape, tl.int32)
    for bit in tl.static_range(BITS):
        later = slot + (1 << (BITS - 1 - bit))
        start = tl.load(slot_starts + later.to(tl.int64) * slot_stride, mask=later < N_SLOTS, other=0)
        slot = tl.where((later < N_SLOTS) & (start <= at), later, slot)
    return slot


@triton.jit
def _own_rows(values, slot, is_id, a, b, c, KIND: tl.constexpr, BITS: tl.constexpr, STEPS: tl.constexpr):
    """The classes of owners.py."""
    if KIND == ALL:
        own = values.to(tl.int32)
    elif KIND == BITMAP:
        own = _find_in_bitmap(values, a, b)
    elif KIND == INDEX:
        own = _find_in_index(values, a, b, is_id, BITS, STEPS)
    elif KIND == RANGES:
        first = tl.load(a + slot, mask=is_id, other=0)
        end = tl.load(b + slot, mask=is_id, other=0)
        shift = tl.load(c + slot, mask=is_id, other=0)
        own = tl.where((values >= first) & (values < end), values + shift, -1).to(tl.int32)
    else:
        own = tl.full(values.shape, -1, tl.int32)
    return own


@triton.jit
def _with_signatures(
    key,
    position,
    is_id,
    signatures,
    a,
    b,
    K: tl.constexpr,  # of the level
    SIGNATURES: tl.constexpr,
    SALT: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The keys of ids, where they have a signature those of its value."""
    which = _own_rows(position, position, is_id, a, b, b, KIND, BITS, STEPS)
    value_at = which.to(tl.int64) * SIGNATURES + K % SIGNATURES
    value = tl.load(signatures + value_at, mask=which >= 0, other=0).to(tl.int64)
    return tl.where(which >= 0, _mix64(value ^ SALT), key)


@triton.jit
def _store(out, row, mask, n, PACK: tl.constexpr):
    """The table rows of rows, place by place. Returns where those of the next level go."""
    for place in tl.static_range(PACK):
        is_here = (row >= 0) & (row % PACK == place)
        tl.store(out, tl.where(is_here, row // PACK, -1), mask=mask)
        out += n
    return out


@triton.jit(do_not_specialize=["n", "slot_stride", "first_slot", "first_table"])
def rows_kernel(
    ids,  # [N], of all slots
    slot_starts,  # where the ids of each slot begin, and the last ones end
    sizes,  # int64 [slots of the group]: this and what follows are buffers of MemoryRemap
    first,
    salts,
    rows_of_slots,  # [levels, slots of the group]
    signatures,
    signed,  # tensors of the bitmap or index of ids with a signature
    owners,  # three of each level
    rows,  # out: int32 [tables of all groups, N], -1 where an id is of another group
    outside,  # out: int64 [], added to
    n,  # N
    slot_stride,  # of slot_starts
    first_slot,  # of the group
    first_table,
    N_SLOTS: tl.constexpr,
    N_ALL_SLOTS: tl.constexpr,
    SLOT_BITS: tl.constexpr,  # 2 ** SLOT_BITS >= slots
    RAW_IDS: tl.constexpr,
    OUTSIDE_IS_0: tl.constexpr,
    KINDS: tl.constexpr,  # of the owners of each level
    OWN_ROWS: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    BY_TABLE: tl.constexpr,
    PACKS: tl.constexpr,
    MULTIPLIERS: tl.constexpr,
    BITS: tl.constexpr,  # of the owners' index
    STEPS: tl.constexpr,
    SIGNATURES: tl.constexpr,  # how many an id has, 0 for none
    SIGNATURE_SALT: tl.constexpr,
    SIGNED_KIND: tl.constexpr,
    SIGNED_BITS: tl.constexpr,
    SIGNED_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = _slots_of(at, slot_starts, slot_stride, N_ALL_SLOTS, SLOT_BITS) - first_slot
    end = tl.load(slot_starts + N_ALL_SLOTS * slot_stride)  # lengths may add up to less than there are values
    is_id = (at < n) & (at < end) & (slot >= 0) & (slot < N_SLOTS)
    value = tl.load(ids + at, mask=is_id, other=0).to(tl.int64)
    inside = is_id
    if not RAW_IDS:
        inside = is_id & (value >= 0) & (value < tl.load(sizes + slot, mask=is_id, other=0))
        if OUTSIDE_IS_0:
            value = tl.where(inside, value, 0)
    mixed = value
    if salts is not None:
        mixed = _mix64(value ^ tl.load(salts + slot, mask=is_id, other=0))
    position = mixed
    if not RAW_IDS:
        position = value + tl.load(first + slot, mask=is_id, other=0)
        if not OUTSIDE_IS_0:
            position = tl.where(inside, position, -1)
        n_outside = tl.sum((is_id & ~inside).to(tl.int64))
        if n_outside > 0:
            tl.atomic_add(outside, n_outside)
    own = position
    out = rows + first_table.to(tl.int64) * n + at
    for k in tl.static_range(len(KINDS)):
        own = _own_rows(own, slot, is_id, owners[3 * k], owners[3 * k + 1], owners[3 * k + 2], KINDS[k], BITS, STEPS)
        if OWN_ROWS[k] + SHARED_ROWS[k] > 0:
            row = own
            if BY_TABLE[k]:
                of_slot = tl.load(rows_of_slots + k * N_SLOTS + slot, mask=is_id, other=0).to(tl.int32)
                row = tl.where(own < 0, of_slot, own)
            elif SHARED_ROWS[k] > 0:
                key = mixed
                if SIGNATURES > 0:
                    key = _with_signatures(
                        key,
                        position,
                        is_id,
                        signatures,
                        signed[0],
                        signed[1],
                        k,
                        SIGNATURES,
                        SIGNATURE_SALT,
                        SIGNED_KIND,
                        SIGNED_BITS,
                        SIGNED_STEPS,
                    )
                key = key * MULTIPLIERS[k]
                key = (key ^ (key >> 32)) & 0x7FFFFFFFFFFFFFFF
                row = tl.where(own < 0, (key % SHARED_ROWS[k] + OWN_ROWS[k]).to(tl.int32), own)
            out = _store(out, tl.where(is_id, row, -1), at < n, n, PACKS[k])


@triton.jit(do_not_specialize=["n", "total", "n_bags", "n_lengths"])
def kept_kernel(
    rows,  # int32 [total]: [tables, N]
    until,  # int32 [total], how many rows there are up to each and with it
    offsets,  # [bags + 1]
    kept,  # out: int32 [total], of which the first until[-1] are written
    kept_ids,  # out, as kept: where the id of each is among the N; or None
    lengths,  # out: int32 [n_lengths]: [tables, bags]
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
    if kept_ids is not None:
        tl.store(kept_ids + to, (at % n).to(tl.int32), mask=is_kept)

    is_length = at < n_lengths
    bag = at % n_bags
    table_start = at // n_bags * n
    # Nothing is read beyond what there is, whatever the offsets say.
    begin = table_start + tl.minimum(tl.load(offsets + bag, mask=is_length, other=0).to(tl.int64), n)
    end = table_start + tl.minimum(tl.load(offsets + bag + 1, mask=is_length, other=0).to(tl.int64), n)
    before = tl.load(until + begin - 1, mask=is_length & (begin > 0), other=0)
    length = tl.load(until + end - 1, mask=is_length & (end > 0), other=0) - before
    tl.store(lengths + at, length, mask=is_length)
