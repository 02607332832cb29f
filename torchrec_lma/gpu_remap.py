"""The remap on a GPU: two launches of Triton kernels and a sum, for some eighty launches of torch's operators.

At the batch sizes that models are trained with, a host launches those for longer than the device looks up rows. On a
CPU, in TorchScript, torch.export and torch.compile torch's operators run. Nothing waits for the device before the end,
where TorchRec needs the number of rows of each key.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma.allocation.bitmap import RankBitmap
from torchrec_lma.allocation.index import IdIndex
from torchrec_lma.features import bag_ends
from torchrec_lma.gpu_kernels import ALL, BITMAP, INDEX, NONE, RANGES, kept_kernel, rows_kernel
from torchrec_lma.memory_remap import MemoryRemap
from torchrec_lma.owners import AllOwn, NoneOwns, RangeOwners

if TYPE_CHECKING:
    from torchrec_lma.remap import Remap

_BLOCK = 512  # ids


def _finder(owners: nn.Module) -> tuple[tl.constexpr, tuple[Tensor | None, ...], int, int]:
    """The kind, three tensors, and of an index its bits and steps."""
    if isinstance(owners, RankBitmap):
        return BITMAP, (owners.words, owners.before, None), 0, 0
    if isinstance(owners, IdIndex):
        return INDEX, (owners.low, owners.starts, None), 64 - owners.shift, owners.steps
    if isinstance(owners, RangeOwners):
        return RANGES, (owners.first, owners.end, owners.shift), 0, 0
    return (ALL if isinstance(owners, AllOwn) else NONE), (None, None, None), 0, 0


@dataclass(frozen=True)
class _Group:
    """Slots that one launch takes: those of whole tables, or of a memory.

    Attributes:
        n_tables: how many table rows an id can have.
        tensors, constants: of `rows_kernel`.
    """

    n_slots: int
    n_tables: int
    tensors: tuple[Any, ...]
    constants: dict[str, Any]

    @classmethod
    def of_whole(cls, remap: "Remap") -> "_Group":
        """As one level on which all ids own a row, and those that are outside share one for each table, the last."""
        sizes = remap.whole_sizes
        constants = {
            "RAW_IDS": False,
            "KINDS": (ALL.value,),
            "OWN_ROWS": (1,),
            "SHARED_ROWS": (1,),
            "BY_TABLE": (True,),
            "PACKS": (1,),
            "MULTIPLIERS": (1,),
            "BITS": 0,
            "STEPS": 0,
            "SIGNATURES": 0,
            "SIGNATURE_SALT": 0,
            "SIGNED_KIND": NONE.value,
            "SIGNED_BITS": 0,
            "SIGNED_STEPS": 0,
        }
        return cls(remap.n_whole, 1, (sizes, None, None, sizes, None, (None, None), (None,) * 3), constants)

    @classmethod
    def of_memory(cls, memory: MemoryRemap) -> "_Group":
        kinds, tensors, bits, steps = zip(*(_finder(owners) for owners in memory.owners))
        signatures = memory.signatures if memory.has_signatures else None
        signed_kind, signed, signed_bits, signed_steps = _finder(memory.signed if memory.has_signatures else NoneOwns())
        constants = {
            "RAW_IDS": memory.raw_ids,
            "KINDS": tuple(kind.value for kind in kinds),
            "OWN_ROWS": tuple(memory.own_rows),
            "SHARED_ROWS": tuple(memory.shared_rows),
            "BY_TABLE": tuple(memory.shared_by_table),
            "PACKS": tuple(memory.packs),
            "MULTIPLIERS": tuple(memory.multipliers),
            "BITS": max(bits),  # only the first level has an index
            "STEPS": max(steps),
            "SIGNATURES": 0 if signatures is None else signatures.size(1),
            "SIGNATURE_SALT": memory.signature_salt,
            "SIGNED_KIND": signed_kind.value,
            "SIGNED_BITS": signed_bits,
            "SIGNED_STEPS": signed_steps,
        }
        has_rows = [own + shared > 0 for own, shared in zip(memory.own_rows, memory.shared_rows)]
        # Salts are for keys: where no row is a hash, none is read.
        hashes = memory.raw_ids or any(
            shared and not by_table for shared, by_table in zip(memory.shared_rows, memory.shared_by_table)
        )
        return cls(
            memory.sizes.numel(),
            sum(pack for pack, has in zip(memory.packs, has_rows) if has),
            (
                memory.sizes,
                memory.first,
                memory.salts if hashes else None,
                memory.rows_of_slots,
                signatures,
                signed[:2],
                tuple(tensor for of_level in tensors for tensor in of_level),
            ),
            constants,
        )


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
    ids, offsets = batch.values().contiguous(), batch.offsets()
    ends = bag_ends(batch)
    n, n_bags = ids.numel(), ends[-1]
    if batch.variable_stride_per_key():
        slot_starts = offsets.index_select(0, torch.tensor(ends, device=offsets.device))
    else:
        slot_starts = offsets[:: batch.stride()]
    groups = [_Group.of_whole(remap)] if remap.n_whole else []
    groups += [_Group.of_memory(memory) for memory in remap.memories.values()]  # type: ignore[arg-type]
    rows = torch.empty([sum(group.n_tables for group in groups), n], dtype=torch.int32, device=ids.device)
    outside = torch.zeros([], dtype=torch.int64, device=ids.device)
    table, slot = 0, 0
    of_keys: list[tuple[slice, slice]] = []  # among tables and bags
    for group in groups:
        end = table + group.n_tables
        rows_kernel[(triton.cdiv(n, _BLOCK),)](
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
    weights = batch.weights() if remap.is_weighted else None
    kept_ids = None if weights is None else torch.empty_like(until)
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
    of_each_key: list[int] | None = None
    if batch.variable_stride_per_key():
        m = int(until[-1])
    else:
        of_each_key = of_bags.view(-1, batch.stride()).sum(1).tolist()
        m = sum(of_each_key)
    if weights is not None and kept_ids is not None:  # they may be trained: an operator that autograd knows
        weights = weights.index_select(0, kept_ids[:m])
    return kept[:m], of_bags, weights, of_each_key, outside
