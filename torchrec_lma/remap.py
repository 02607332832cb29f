"""Remap: from raw ids to rows of level tables, before TorchRec sees the batch.

The only computation that an LMA table adds. Pure integer arithmetic on the local batch; nothing here knows of sharding,
so an id has the same rows under every plan. Everything scripts, and traces under torch.fx and torch.export.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

# Registers torch.ops.fbgemm.*
import fbgemm_gpu  # noqa: F401  isort: skip

from torchrec_lma.allocation.artifact import Allocation, MemoryAllocation
from torchrec_lma.allocation.bitmap import RankBitmap
from torchrec_lma.allocation.index import IdIndex
from torchrec_lma.allocation.layout import MAX_ROWS
from torchrec_lma.features import Slot, bag_ends, ids_per_feature, take_features
from torchrec_lma.hashing import level_multiplier, mix64, salt, table_salt, to_row
from torchrec_lma.owners import owners_of_levels

HAS_TRITON = find_spec("triton") is not None

# torch.fx leaves alone what is wrapped in the module that calls it.
torch.fx.wrap("bag_ends")
torch.fx.wrap("ids_per_feature")
torch.fx.wrap("take_features")


class MemoryRemap(nn.Module):
    """Rows of the levels of one memory.

    On each level an id has its own row, or a shared one, or none. Own rows: on level 0 the rank of the id among those
    that own one (of a bitmap or ranges of the vocabularies, or an index of raw ids), on level k the rank of its row of
    level k - 1 among those that own one, so an own row costs a bit or two an id and level (nothing where vocabularies
    are sorted by frequency), and each level looks at fewer ids than the one before. Shared rows, where the level has
    some, are a hash of the id, or of its signature value k mod K, so that ids which agree on it share the row (arXiv
    2103.06124, section 4.2). If they are no more than the tables, as where every id that was seen owns a row, each is
    for the other ids of a table.

    Args:
        memory: its allocation.
        slots: the features of the memory's tables.
        num_embeddings: of each table, by name.
        seed: of the hashes.
    """

    # Final, so that TorchScript drops the branches that a memory does not use.
    raw_ids: Final[bool]
    has_signatures: Final[bool]
    first: Tensor
    sizes: Tensor
    salts: Tensor
    rows_of_slots: Tensor
    signatures: Tensor

    def __init__(
        self, memory: MemoryAllocation, slots: Sequence[Slot], num_embeddings: dict[str, int], seed: int
    ) -> None:
        super().__init__()
        self.raw_ids = memory.raw_ids
        self.own_rows = [level.own_rows for level in memory.levels]
        self.shared_rows = [level.shared_rows for level in memory.levels]
        self.packs = [level.pack for level in memory.levels]
        self.multipliers = [level_multiplier(seed, k) for k in range(len(memory.levels))]
        self.signature_salt = salt("signature", seed)

        tensors = memory.tensors
        sizes = [num_embeddings[table] for table in memory.tables]
        positions = sum(sizes)
        self.positions_fit_int32 = positions <= MAX_ROWS
        self.owners = nn.ModuleList(owners_of_levels(memory, slots, positions))
        self.has_signatures = "signatures" in tensors
        if self.has_signatures:
            self.register_buffer("signatures", tensors["signatures"])  # int32 [S, K]
            if memory.raw_ids:
                self.signed: IdIndex | RankBitmap = IdIndex(tensors["signed.low"], tensors["signed.starts"])
            else:
                self.signed = RankBitmap(tensors["signed.words"])

        few = 0 if self.has_signatures else len(memory.tables)
        self.shared_by_table = [0 < rows <= few for rows in self.shared_rows]
        numbers = torch.tensor([memory.tables.index(slot.table) for slot in slots])
        rows_of_slots = [level.own_rows + numbers % max(1, level.shared_rows) for level in memory.levels]
        self.register_buffer("rows_of_slots", torch.stack(rows_of_slots).to(torch.int32), persistent=False)
        starts = dict(zip(memory.tables, torch.tensor([0, *sizes]).cumsum(0).tolist()))
        for name, values in (
            ("first", [starts[slot.table] for slot in slots]),  # position of id 0 of the slot's table
            ("sizes", [num_embeddings[slot.table] for slot in slots]),
            ("salts", [table_salt(seed, slot.table) for slot in slots]),
        ):
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)

    def forward(
        self, ids: Tensor, slot: Tensor, offsets: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """
        Args:
            ids: int64 [L], the bags of slot 0, then of slot 1, ...
            slot: int32 [L], the slot of each id.
            offsets: int64 [bags + 1], where the bags begin.
            weights: float [L] per-sample weights, or None.
        Returns:
            rows int32 [M], lengths int32 [tables * bags] and weights [M] of the ids that have a row, table by table: of
            each level that has rows, of each place in a table row of a packed level.
            int64 [], how many ids are outside of their vocabulary.
        """
        of_tables, outside = self.rows(ids, slot)
        rows = _cat(of_tables)
        present = rows >= 0
        kept = places(present)
        n, n_tables = ids.size(0), len(of_tables)
        starts = torch.arange(n_tables, device=ids.device).unsqueeze(1) * n
        before = count_before(present).index_select(0, (offsets + starts).flatten()).view(n_tables, -1)
        if weights is not None:
            weights = weights.index_select(0, kept if n_tables == 1 else kept % n)
        return rows.index_select(0, kept), (before[:, 1:] - before[:, :-1]).flatten(), weights, outside

    def rows(self, ids: Tensor, slot: Tensor) -> tuple[list[Tensor], Tensor]:
        """
        Args:
            ids: int64 [L].
            slot: int32 [L], the slot of each.
        Returns:
            Of each level that has rows, of each place in a table row of a packed level: int32 [L], table rows, or
            negative where an id has none there.
            int64 [], how many ids are outside of their vocabulary.
        """
        if self.raw_ids:
            position = mix64(ids ^ self.salts.index_select(0, slot))
            outside = torch.zeros([], dtype=torch.int64, device=ids.device)
        else:
            inside = (ids >= 0) & (ids < self.sizes.index_select(0, slot))
            position = torch.where(inside, ids + self.first.index_select(0, slot), -1)
            if self.positions_fit_int32:  # half the bytes, twice the speed
                position = position.to(torch.int32)
            outside = (~inside).sum()
        of_tables: list[Tensor] = []
        own = position
        for k, owners in enumerate(self.owners):
            own = owners(own, slot)
            if self.own_rows[k] + self.shared_rows[k] > 0:
                rows = own
                if self.shared_by_table[k]:
                    rows = with_rows_of_slots(own, slot, self.rows_of_slots[k])
                elif self.shared_rows[k] > 0:
                    missing = places(own < 0)
                    rows = own.index_copy(0, missing, self._shared(k, ids, slot, position, missing))
                pack = self.packs[k]
                if pack == 1:
                    of_tables.append(rows)
                else:
                    place, rows = rows % pack, rows.div(pack, rounding_mode="floor")
                    for at in range(pack):
                        of_tables.append(torch.where(place == at, rows, -1))
        return of_tables, outside

    def _shared(self, k: int, ids: Tensor, slot: Tensor, position: Tensor, missing: Tensor) -> Tensor:
        """int32 [M], the shared rows on level k of those of the ids that are at these places, int64 [M]."""
        place = position.index_select(0, missing)
        if self.raw_ids:
            keys = place
        else:
            keys = mix64(ids.index_select(0, missing) ^ self.salts.index_select(0, slot.index_select(0, missing)))
        if self.has_signatures:
            found = self.signed.find(place)
            values = self.signatures[:, k % self.signatures.size(1)].index_select(0, found.clamp(min=0))
            by_value = mix64(values.to(torch.int64) ^ self.signature_salt)
            keys = torch.where(found >= 0, by_value, keys)
        return (to_row(keys, self.multipliers[k], self.shared_rows[k]) + self.own_rows[k]).to(torch.int32)


class Remap(nn.Module):
    """Turns a batch of raw ids into one of rows: the input of the plain collection of level tables and whole tables.

    A child of the collection, sharded or not, so that the allocation travels in every state_dict and checkpoint, and
    weights that were trained under another one are refused.

    Args:
        allocation: of the collection.
        slots: the features of its tables.
        is_weighted: whether batches carry per-sample weights.

    Attributes:
        keys: of the batch of rows: `<table>/<feature>` of whole tables, then for each level of each memory, for each
            place in a packed row, `<table>/<feature>/<level>/<place>`.
        sources: the index in `slots` of each key.
        out_of_vocabulary: int64 [], how many ids so far were outside of their vocabulary. They are treated as unseen.
        strict: raise an error for them instead.
    """

    is_weighted: Final[bool]
    fingerprint: Tensor
    header: Tensor
    out_of_vocabulary: Tensor
    whole_sizes: Tensor

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
        whole = [i for i, slot in enumerate(slots) if slot.table in allocation.whole]
        self.keys += [whole_key(slots[i]) for i in whole]
        self.sources += whole
        self.register_buffer(
            "whole_sizes", torch.tensor([num_embeddings[slots[i].table] for i in whole]).long(), persistent=False
        )
        order = list(whole)
        self.n_whole = len(whole)
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
        if not torch.jit.is_scripting() and _has_kernel(features):
            from torchrec_lma.remap_kernel import remap_batch

            rows, row_lengths, row_weights, of_each_key, n_outside = remap_batch(self, batch)
            self._count_outside(n_outside)
            kept_weights = [] if row_weights is None else [row_weights]
            return _rows_batch(
                features, self.keys, self.features_of_keys, [rows], [row_lengths], kept_weights, of_each_key
            )
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
        first, m = self.n_whole, 0
        if self.n_whole > 0:
            whole = ids[0 : ends[first]]  # [0 : n]: of [:n], n from the data, AOTInductor makes invalid C++
            sizes = self.whole_sizes.repeat_interleave(counts[:first], output_size=whole.numel())
            inside = (whole >= 0) & (whole < sizes)
            all_rows.append(torch.where(inside, whole, sizes).to(torch.int32))  # the last row is that of unseen ids
            all_lengths.append(lengths[0 : bags[first]].to(torch.int32))
            if weights is not None:
                all_weights.append(weights[0 : ends[first]])
            outside.append((~inside).sum())
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

    def _count_outside(self, n_outside: Tensor) -> None:
        """Raises ValueError where some ids are outside of their vocabulary and that is an error."""
        self.out_of_vocabulary.add_(n_outside)
        if self.strict and bool(n_outside > 0):
            raise ValueError(
                f"{int(n_outside)} ids of the batch are outside of their table's [0, num_embeddings); correct the "
                "vocabulary, name the table in LMAConfig.raw_ids, or leave strict off, which treats them as unseen"
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


def _has_kernel(features: KeyedJaggedTensor) -> bool:
    """Whether Triton's kernels take the batch: not where the operators are traced or compiled."""
    if isinstance(features, torch.fx.Proxy) or torch.compiler.is_compiling():
        return False
    return features.values().is_cuda and features.values().numel() > 0 and HAS_TRITON


def whole_key(slot: Slot) -> str:
    """The key of the batch of rows that feeds a whole table."""
    return f"{slot.table}/{slot.feature}"


def level_key(slot: Slot, level: int, place: int) -> str:
    """The key of the batch of rows that feeds a level from a slot, of its rows at a place in packed rows."""
    return f"{slot.table}/{slot.feature}/{level}/{place}"


def complete_cumsum(values: Tensor) -> Tensor:
    """int64 [n + 1], the sum of the values before each place, and of all."""
    return torch.ops.fbgemm.asynchronous_complete_cumsum(values.to(torch.int64))


@torch.fx.wrap
def places(chosen: Tensor) -> Tensor:
    """int64 [m], where bool [n] is true."""
    if not torch.jit.is_scripting() and not torch.compiler.is_compiling():
        if chosen.device.type == "cpu":  # torch's takes up to ten times as long where neither value is rare
            return torch.from_numpy(chosen.numpy().nonzero()[0])
    return chosen.nonzero().squeeze(1)


@torch.fx.wrap
def with_rows_of_slots(own: Tensor, slot: Tensor, rows: Tensor) -> Tensor:
    """int32 [L], the own rows, and where there is none that of the slot, int32 [slots]."""
    if own.is_cpu and (torch.jit.is_scripting() or not torch.compiler.is_compiling()):  # few are missing
        missing = places(own < 0)
        return own.index_copy(0, missing, rows.index_select(0, slot.index_select(0, missing)))
    return torch.where(own < 0, rows.index_select(0, slot), own)  # without waiting for the device


def count_before(chosen: Tensor) -> Tensor:
    """int32 [n + 1], how many are chosen before each place, and in all; from bool [n]."""
    return torch.ops.fbgemm.asynchronous_complete_cumsum(chosen.to(torch.int32))


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
    all_rows, all_lengths = _cat(rows), _cat(lengths)
    all_weights: Tensor | None = None
    if len(weights) > 0:
        all_weights = _cat(weights)
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


def _cat(parts: list[Tensor]) -> Tensor:  # a single part is not copied
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _hex(fingerprint: Tensor) -> str:
    return bytes(fingerprint.cpu().tolist()).hex()
