"""Remap: from raw ids to rows of level tables, before TorchRec sees the batch.

The only computation that an LMA table adds. Pure integer arithmetic on the local batch; nothing here knows of sharding,
so an id has the same rows under every plan. Everything scripts, and traces under torch.fx and torch.export; on a GPU,
where it does neither, Triton kernels take its place.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma.allocation.artifact import Allocation
from torchrec_lma.features import Slot, bag_ends, ids_per_feature, take_features
from torchrec_lma.memory_remap import MemoryRemap, cat, complete_cumsum

# On GPUs; torch's operators do it elsewhere. Set it to False where Triton lacks what it needs to compile: a C compiler
# and a folder for its cache.
USE_TRITON = find_spec("triton") is not None

# torch.fx leaves alone what is wrapped in the module that calls it.
torch.fx.wrap("bag_ends")
torch.fx.wrap("ids_per_feature")
torch.fx.wrap("take_features")


class Remap(nn.Module):
    """Turns a batch of raw ids into one of rows: the input of the plain collection of level tables.

    A child of the collection, sharded or not, so that the allocation travels in every state_dict and checkpoint, and
    weights that were trained under another one are refused.

    Args:
        allocation: of the collection.
        slots: the features of its tables.
        is_weighted: whether batches carry per-sample weights.

    Attributes:
        keys: of the batch of rows: for each level of each memory, for each place in a packed row,
            `<table>/<feature>/<level>/<place>`.
        sources: the index in `slots` of each key.
        out_of_vocabulary: int64 [], how many ids so far were outside of their vocabulary. They are treated as unseen,
            or where no row is shared as id 0.
        strict: raise an error for them instead.
    """

    is_weighted: Final[bool]
    fingerprint: Tensor
    header: Tensor
    out_of_vocabulary: Tensor

    def __init__(self, allocation: Allocation, slots: Sequence[Slot], is_weighted: bool) -> None:
        super().__init__()
        self.expected = allocation.fingerprint
        self.is_weighted = is_weighted
        self.strict = False
        self.register_buffer("fingerprint", _bytes_tensor(bytes.fromhex(allocation.fingerprint)))
        self.register_buffer("header", _bytes_tensor(allocation.header.encode()))
        self.register_buffer("out_of_vocabulary", torch.zeros((), dtype=torch.int64), persistent=False)
        num_embeddings = {table.name: table.num_embeddings for table in allocation.tables}

        self.keys: list[str] = []
        self.sources: list[int] = []
        order: list[int] = []
        self.memory_slots: list[int] = []
        memories: dict[str, nn.Module] = {}
        for memory in allocation.memories:
            members = [i for table in memory.tables for i, slot in enumerate(slots) if slot.table == table]
            memories[memory.name] = MemoryRemap(
                memory, [slots[i] for i in members], num_embeddings, allocation.config.seed
            )
            self.memory_slots.append(len(members))
            order += members
            for k, level in enumerate(memory.levels):
                for place in range(level.pack if level.rows else 0):
                    self.keys += [level_key(slots[i], k, place) for i in members]
                    self.sources += members
        self.memories = nn.ModuleDict(memories)
        self.features = [slots[i].feature for i in order]
        self.features_of_keys = [slots[i].feature for i in self.sources]
        self._checked_version = -1

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """
        Args:
            features: a batch with the features of the collection, and maybe others.
        Returns:
            The batch of rows, int32, with lengths int32; `keys` in order.
        """
        batch = take_features(features, self.features)
        if not torch.jit.is_scripting():
            if _has_kernel(batch, self.fingerprint.device):
                return self._by_kernels(features, batch)
        ids, lengths = batch.values().to(torch.int64), batch.lengths()
        offsets = complete_cumsum(lengths)
        bags, ends, counts = bag_ends(batch), batch.offset_per_key(), ids_per_feature(batch)
        weights: Tensor | None = None
        if self.is_weighted:
            weights = batch.weights()
        all_rows: list[Tensor] = []
        all_lengths: list[Tensor] = []
        all_weights: list[Tensor] = []
        outside: list[Tensor] = []
        first, m = 0, 0
        for memory in self.memories.values():
            end = first + self.memory_slots[m]
            begins = ends[first]
            of_memory = ids[begins : ends[end]]
            slot = torch.arange(end - first, dtype=torch.int32, device=ids.device).repeat_interleave(
                counts[first:end], output_size=of_memory.numel()
            )
            of_weights = weights[begins : ends[end]] if weights is not None else None
            rows, row_lengths, row_weights, beyond = memory(
                of_memory, slot, offsets[bags[first] : bags[end] + 1] - begins, of_weights
            )
            all_rows.append(rows)
            all_lengths.append(row_lengths)
            if row_weights is not None:
                all_weights.append(row_weights)
            outside.append(beyond)
            first, m = end, m + 1
        self._count_outside(outside[0] if len(outside) == 1 else torch.stack(outside).sum())
        return _rows_batch(features, self.keys, self.features_of_keys, all_rows, all_lengths, all_weights, None)

    def _by_kernels(self, features: KeyedJaggedTensor, batch: KeyedJaggedTensor) -> KeyedJaggedTensor:
        from torchrec_lma.gpu_remap import remap_batch  # Triton comes with torch for GPUs only

        with torch.cuda.device_of(batch.values()):  # Triton launches on the current device
            rows, lengths, kept_weights, of_each_key, n_outside = remap_batch(self, batch)
        self._count_outside(n_outside)
        weights = [] if kept_weights is None else [kept_weights]
        return _rows_batch(features, self.keys, self.features_of_keys, [rows], [lengths], weights, of_each_key)

    def _count_outside(self, n_outside: Tensor) -> None:
        """Raises ValueError where some ids are outside of their vocabulary and that is an error."""
        self.out_of_vocabulary.add_(n_outside)
        if self.strict and bool(n_outside > 0):
            raise ValueError(
                f"{int(n_outside)} ids of the batch are outside of their table's [0, num_embeddings); correct the "
                "vocabulary, name the table in LMAConfig.raw_ids, or leave strict off, which treats them as unseen or "
                "as id 0"
            )

    def check_state_dict(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Raises ValueError, before anything is loaded, if the state was written under another allocation."""
        loaded = state_dict.get(f"{prefix}fingerprint")
        if isinstance(loaded, Tensor):
            self._check(_hex(loaded))

    def check_not_overwritten(self) -> None:
        """Raises ValueError if a checkpoint of another allocation was read into this module's tensors.

        torch.distributed.checkpoint writes into the tensors of a state_dict, so load_state_dict may never be called.
        Autograd's version counter tells when that happened; only then is the fingerprint read back from its device.
        """
        if torch.compiler.is_compiling() or isinstance(self.fingerprint, torch.fx.Proxy):
            return
        # An inference tensor counts no versions: it is checked once.
        version = 0 if self.fingerprint.is_inference() else self.fingerprint._version
        if version != self._checked_version:
            self._check(_hex(self.fingerprint))
            self._checked_version = version

    def _check(self, loaded: str) -> None:
        if loaded != self.expected:
            raise ValueError(
                f"the checkpoint was written with allocation {loaded}, this model has allocation {self.expected}: its "
                "weights would be read at the wrong rows. Build the model with the checkpoint's own allocation: "
                "Allocation.from_checkpoint(path)"
            )


def _has_kernel(batch: KeyedJaggedTensor, device: torch.device) -> bool:
    """Whether Triton's kernels take a batch on this device: not where the operators are traced or compiled."""
    if isinstance(batch, torch.fx.Proxy) or torch.compiler.is_compiling():
        return False
    on_gpu = device.type == "cuda" and batch.values().device == device
    return USE_TRITON and on_gpu and batch.values().numel() > 0 and batch.lengths().numel() > 0


def level_key(slot: Slot, level: int, place: int) -> str:
    """The key of the batch of rows that feeds a level from a slot, of its rows at a place in packed rows."""
    return f"{slot.table}/{slot.feature}/{level}/{place}"


@torch.fx.wrap
def _rows_batch(
    features: KeyedJaggedTensor,
    keys: list[str],
    features_of_keys: list[str],
    rows: list[Tensor],
    lengths: list[Tensor],
    weights: list[Tensor],
    of_each_key: list[int] | None,
) -> KeyedJaggedTensor:
    """The batch of rows, with the batch size of `features`, or with VBE those of its features.

    Where it is known how many rows each key has, TorchRec need not wait for the device to learn it.
    """
    all_rows, all_lengths = cat(rows), cat(lengths)
    all_weights: Tensor | None = None
    if len(weights) > 0:
        all_weights = cat(weights)
    if not torch.jit.is_scripting() and features.variable_stride_per_key():
        at = [features.keys().index(feature) for feature in features_of_keys]
        strides = features.stride_per_key_per_rank()
        names, indices = features.inverse_indices()
        of_keys = torch.tensor([names.index(feature) for feature in features_of_keys]).to(indices.device)
        return KeyedJaggedTensor(
            keys=keys,
            values=all_rows,
            lengths=all_lengths,
            weights=all_weights,
            stride_per_key_per_rank=[strides[i] for i in at],
            inverse_indices=(keys, indices.index_select(0, of_keys)),
        )
    return KeyedJaggedTensor(
        keys=keys,
        values=all_rows,
        lengths=all_lengths,
        weights=all_weights,
        stride=features.stride(),
        length_per_key=of_each_key,
    )


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _hex(fingerprint: Tensor) -> str:
    return bytes(fingerprint.cpu().tolist()).hex()
