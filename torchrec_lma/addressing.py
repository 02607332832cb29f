"""The address function: ids of logical tables -> rows of a memory, one for each chunk.

Everything that needs an address (the unsharded module, the sharded lookups, serving) calls `MemoryAddressing`. Nothing
here knows of sharding, so the same id has the same address under every plan.
"""

from typing import Any, Final

import torch
from torch import Tensor, nn

from torchrec_lma.allocation.allocation import Allocation, MemoryAllocation
from torchrec_lma.allocation.index import IdIndex
from torchrec_lma.hashing import chunk_multipliers, mix64, salt, to_rows


class MemoryAddressing(nn.Module):
    """Addresses in one memory.

    An id is looked for first among the dedicated ids, then among the ids with a signature, else it is hashed:

    * dedicated: every chunk at the id's own row, in [0, dedicated_rows);
    * with a signature: chunk j at a hash of (signature value j mod K, j), so that two ids agree on the chunk exactly
      when they agree on that value, or by chance (arXiv 2103.06124, section 4.2);
    * else: chunk j at a hash of (table, id, j).

    The rows of the last two kinds are in [dedicated_rows, rows). The module scripts, and traces with the chunk range
    fixed by the caller.
    """

    # Final, so that TorchScript drops the branches that a memory does not use.
    has_dedicated: Final[bool]
    has_signatures: Final[bool]
    multipliers: Tensor
    signatures: Tensor
    value_of_chunk: Tensor

    def __init__(self, memory: MemoryAllocation, seed: int) -> None:
        super().__init__()
        self.rows = memory.rows
        self.n_chunks = memory.n_chunks
        self.dedicated_rows = memory.dedicated_rows
        self.shared_rows = memory.rows - memory.dedicated_rows
        self.signature_salt = salt("signature", seed)
        # A plain attribute would be baked into a script for one device; what the seed decides is not saved again.
        self.register_buffer("multipliers", chunk_multipliers(seed, memory.n_chunks), persistent=False)
        self.has_dedicated = memory.dedicated_low.numel() > 0
        self.has_signatures = memory.signatures.numel() > 0
        if self.has_dedicated:
            self.dedicated = IdIndex(memory.dedicated_low, memory.dedicated_starts)
        if self.has_signatures:
            self.signature_index = IdIndex(memory.signature_low, memory.signature_starts)
            self.register_buffer("signatures", memory.signatures)  # int32 [S, K]
            value_of_chunk = torch.arange(memory.n_chunks) % memory.signatures.size(1)
            self.register_buffer("value_of_chunk", value_of_chunk, persistent=False)

    def forward(self, ids: Tensor, salts: Tensor, first_chunk: int, end_chunk: int) -> Tensor:
        """
        Args:
            ids: integer [L], any values.
            salts: int64 [L] or [1], `table_salt` of each id's table.
            first_chunk, end_chunk: the chunks wanted, [first_chunk, end_chunk).
        Returns:
            int64 [end_chunk - first_chunk, L] in [0, rows).
        """
        keys = mix64(ids.to(torch.int64) ^ salts)  # (L)
        mixed = keys.unsqueeze(0)  # (1, L), every chunk from the id itself
        if self.has_signatures:
            slot = self.signature_index(keys)  # (L)
            values = self.signatures[slot.clamp(min=0)].t().to(torch.int64)  # (K, L)
            by_value = mix64(values ^ self.signature_salt)[self.value_of_chunk[first_chunk:end_chunk]]  # (chunks, L)
            mixed = torch.where((slot >= 0).unsqueeze(0), by_value, mixed)
        rows = to_rows(mixed, self.multipliers[first_chunk:end_chunk], self.shared_rows) + self.dedicated_rows
        if self.has_dedicated:
            own_row = self.dedicated(keys)  # (L)
            rows = torch.where((own_row >= 0).unsqueeze(0), own_row.unsqueeze(0), rows)
        return rows


class Addressing(nn.Module):
    """All memories of a collection, by name, and the identity of their allocation.

    A child of the collection, sharded or not, so that the allocation travels in every state_dict and checkpoint.
    `check_state_dict` refuses weights that were trained under other addresses.
    """

    fingerprint: Tensor

    def __init__(self, allocation: Allocation) -> None:
        super().__init__()
        self.expected = allocation.fingerprint
        self.register_buffer("fingerprint", _bytes_tensor(bytes.fromhex(allocation.fingerprint)))
        self.register_buffer("header", _bytes_tensor(allocation.header.encode()))
        self.memories = nn.ModuleDict(
            {memory.name: MemoryAddressing(memory, allocation.config.seed) for memory in allocation.memories}
        )
        self._checked_version = -1

    def __getitem__(self, memory: str) -> MemoryAddressing:
        module = self.memories[memory]
        assert isinstance(module, MemoryAddressing)
        return module

    def check_state_dict(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Raises ValueError, before anything is loaded, if the state was written under other addresses."""
        loaded = state_dict.get(f"{prefix}fingerprint")
        if isinstance(loaded, Tensor):
            self._check(_hex(loaded))

    def check_not_overwritten(self) -> None:
        """Raises ValueError if a checkpoint of other addresses was read into this module's tensors.

        torch.distributed.checkpoint writes into the tensors of a state_dict, so load_state_dict may never be called.
        Autograd's version counter tells when that happened; only then is the fingerprint read back from its device.
        """
        # An inference tensor counts no versions: it is checked once.
        version = 0 if self.fingerprint.is_inference() else self.fingerprint._version
        if version != self._checked_version:
            self._check(_hex(self.fingerprint))
            self._checked_version = version

    def _check(self, loaded: str) -> None:
        if loaded != self.expected:
            raise ValueError(
                f"the checkpoint was written with allocation {loaded}, this model has allocation {self.expected}: its "
                "weights would be read at the wrong addresses. Build the model with the checkpoint's own allocation: "
                "Allocation.from_checkpoint(path)"
            )


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _hex(fingerprint: Tensor) -> str:
    return bytes(fingerprint.cpu().tolist()).hex()
