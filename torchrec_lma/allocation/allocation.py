"""The allocation: everything that decides addresses, as an artifact that can be saved, compared and shipped."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_lma.allocation.layout import MemoryLayout, TableSpec, lay_out
from torchrec_lma.config import LMAConfig

FORMAT_VERSION = 2
_TENSORS = ("dedicated_low", "dedicated_starts", "signature_low", "signature_starts", "signatures")


@dataclass(frozen=True, eq=False)
class MemoryAllocation:
    """The allocation of one memory. `n` below is the number of entries, zero where a kind of id is not used.

    Attributes:
        name: of the memory, and of the TorchRec table that holds its weights.
        dim: columns of the memory.
        chunk_dim: columns of a chunk.
        rows: rows of the memory, the dedicated ones included.
        tables: names of the logical tables that share it.
        dedicated_low, dedicated_starts: int32, `IdIndex` of the dedicated ids; an entry's position is its row.
        signature_low, signature_starts: int32, `IdIndex` of the ids with a signature.
        signatures: int32 [n, K], in the order of that index.
    """

    name: str
    dim: int
    chunk_dim: int
    rows: int
    tables: tuple[str, ...]
    dedicated_low: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    dedicated_starts: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    signature_low: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    signature_starts: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    signatures: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int32))

    @property
    def n_chunks(self) -> int:
        return self.dim // self.chunk_dim

    @property
    def dedicated_rows(self) -> int:
        return self.dedicated_low.numel()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _TENSORS}

    def header(self) -> dict[str, Any]:
        keys = ("name", "dim", "chunk_dim", "rows", "tables")
        return {key: getattr(self, key) for key in keys}


@dataclass(frozen=True, eq=False)
class Allocation:
    """Signatures, dedicated ids, rows and seeds of every memory of a collection.

    Made by `AllocationBuilder.build`, by `hashed` where there is no data, or read back by `load` and `from_checkpoint`.

    Attributes:
        config: the LMAConfig it was built for.
        tables: the logical tables it was built for.
        memories: one MemoryAllocation per embedding dim.
        provenance: where it came from (source, rows seen and sampled, ids by kind); decides no address.
    """

    config: LMAConfig
    tables: tuple[TableSpec, ...]
    memories: tuple[MemoryAllocation, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def hashed(cls, tables: Sequence[EmbeddingBagConfig], config: LMAConfig) -> "Allocation":
        """The allocation that needs no data and no bytes: every id is hashed (random chunk sharing)."""
        layouts = lay_out(tables, config)
        memories = tuple(empty_memory(layout, layout.rows_beside(0)) for layout in layouts)
        return cls(config, _specs(layouts), memories, {"source": None})

    @property
    def nbytes(self) -> int:
        """Bytes that serving and training must hold beside the weights."""
        return sum(memory.nbytes for memory in self.memories)

    @cached_property
    def header(self) -> str:
        """Canonical JSON of what is not in the tensors."""
        return json.dumps(
            {
                "format_version": FORMAT_VERSION,
                "config": self.config.to_dict(),
                "tables": [asdict(table) for table in self.tables],
                "memories": [memory.header() for memory in self.memories],
            },
            sort_keys=True,
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that decides addresses: equal fingerprints mean equal addresses."""
        digest = hashlib.sha256(json.dumps([FORMAT_VERSION, self.config.seed]).encode())
        for memory in self.memories:
            digest.update(json.dumps(memory.header(), sort_keys=True).encode())
            for name, tensor in memory.tensors().items():
                digest.update(json.dumps([name, list(tensor.shape)]).encode())
                digest.update(tensor.contiguous().numpy().data)  # its buffer, not a copy: it can be most of the memory
        return digest.hexdigest()

    def check_made_for(self, tables: Sequence[EmbeddingBagConfig], config: LMAConfig) -> None:
        """Raises ValueError, naming the differences, if this was built for other tables or another configuration."""
        if config != self.config:
            ours, theirs = self.config.to_dict(), config.to_dict()
            changed = ", ".join(f"{k}={ours[k]!r} (now {theirs[k]!r})" for k in ours if ours[k] != theirs[k])
            raise ValueError(
                f"the allocation was built with {changed}; build it again for this LMAConfig or pass allocation.config"
            )
        made = {table.name: table for table in self.tables}
        wanted = {table.name: table for layout in lay_out(tables, config) for table in layout.tables}
        if made != wanted:
            changed = "; ".join(
                f"{name}: built for {made.get(name, 'no such table')}, the collection has {wanted.get(name, 'none')}"
                for name in sorted(made.keys() | wanted.keys())
                if made.get(name) != wanted.get(name)
            )
            raise ValueError(f"the allocation was made for other tables ({changed}); build it again for these")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, under a temporary name first, so that `path` is whole or untouched.

        Raises OSError if it cannot be written.
        """
        path = Path(path)
        tensors = {
            f"{memory.name}/{name}": tensor.contiguous()
            for memory in self.memories
            for name, tensor in memory.tensors().items()
        }
        metadata = {
            "format": "torchrec_lma.allocation",
            "format_version": str(FORMAT_VERSION),
            "header": self.header,
            "fingerprint": self.fingerprint,
            "provenance": json.dumps(self.provenance, sort_keys=True),
        }
        metadata["checksum"] = _checksum(metadata)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # what the umask gives a new file; safetensors makes it private
            save_file(tensors, temporary, metadata)
            temporary.chmod(mode)
            os.replace(temporary, path)
        except SafetensorError as error:  # how safetensors passes on errors of the file system
            raise OSError(
                f"{path} was not written ({error}); make room for {self.nbytes:,} bytes and a header"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Allocation":
        """Read a file written by `save`; its tensors are memory-mapped.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not an allocation, truncated, changed since it was written, or of another format version.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no allocation file at {path}; write one with `torchrec-lma allocate`")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a whole safetensors file ({error}); it is truncated or something else. Build it again"
            ) from error
        if metadata.get("format") != "torchrec_lma.allocation":
            raise ValueError(
                f"{path} is a safetensors file but not an allocation; expected one that Allocation.save wrote"
            )
        if metadata.get("format_version") != str(FORMAT_VERSION):
            raise ValueError(
                f"{path} has allocation format version {metadata.get('format_version')}, this torchrec_lma reads "
                f"version {FORMAT_VERSION}; build it again or use the version of torchrec_lma that wrote it"
            )
        if metadata.get("checksum") != _checksum(metadata):
            raise ValueError(f"{path} does not match its checksum; the file was damaged. Build it again")
        allocation = cls._from_parts(metadata["header"], tensors, json.loads(metadata["provenance"]))
        if allocation.fingerprint != metadata["fingerprint"]:
            raise ValueError(
                f"{path} says its fingerprint is {metadata['fingerprint']} but its contents have "
                f"{allocation.fingerprint}; the file was damaged. Build it again"
            )
        return allocation

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str]) -> "Allocation":
        """The allocation inside a torch.distributed.checkpoint of a model with an LMA collection.

        Reads only the allocation's tensors, on one process, whatever plan and world size wrote them.

        Raises ValueError when the checkpoint holds no LMA collection, or more than one.
        """
        reader = dcp.FileSystemReader(path)
        stored = reader.read_metadata().state_dict_metadata
        prefixes = [key.removesuffix("addressing.header") for key in stored if key.endswith("addressing.header")]
        if len(prefixes) != 1:
            raise ValueError(f"{path} holds {len(prefixes)} LMA collections ({prefixes}), expected one")
        prefix = prefixes[0] + "addressing."
        state = {
            key: torch.empty(value.size, dtype=value.properties.dtype)
            for key, value in stored.items()
            if key.startswith(prefix) and isinstance(value, TensorStorageMetadata)
        }
        dcp.load(state, storage_reader=reader, no_dist=True)
        header = bytes(state[prefix + "header"].tolist()).decode()
        names = {
            "dedicated.low": "dedicated_low",
            "dedicated.starts": "dedicated_starts",
            "signature_index.low": "signature_low",
            "signature_index.starts": "signature_starts",
            "signatures": "signatures",
        }
        tensors = {}
        for key, tensor in state.items():
            if key.startswith(prefix + "memories."):
                memory, _, name = key.removeprefix(prefix + "memories.").partition(".")
                tensors[f"{memory}/{names[name]}"] = tensor
        allocation = cls._from_parts(header, tensors, {"source": f"checkpoint {path}"})
        stated = bytes(state[prefix + "fingerprint"].tolist()).hex()
        if allocation.fingerprint != stated:
            raise ValueError(f"{path} states allocation {stated} but holds {allocation.fingerprint}; it was damaged")
        return allocation

    @classmethod
    def _from_parts(cls, header: str, tensors: dict[str, Tensor], provenance: dict[str, Any]) -> "Allocation":
        values = json.loads(header)
        memories = []
        for memory in values["memories"]:
            own: dict[str, Any] = {
                name: tensors[f"{memory['name']}/{name}"] for name in _TENSORS if f"{memory['name']}/{name}" in tensors
            }
            memories.append(MemoryAllocation(**{**memory, "tables": tuple(memory["tables"])}, **own))
        tables = tuple(TableSpec(**table) for table in values["tables"])
        return cls(LMAConfig.from_dict(values["config"]), tables, tuple(memories), provenance)


def _checksum(metadata: dict[str, str]) -> str:
    """SHA-256 of everything in the metadata but itself; the fingerprint in it covers the tensors."""
    return hashlib.sha256(json.dumps({**metadata, "checksum": ""}, sort_keys=True).encode()).hexdigest()


def empty_memory(layout: MemoryLayout, rows: int) -> MemoryAllocation:
    """A memory in which every id is hashed."""
    return MemoryAllocation(layout.name, layout.dim, layout.chunk_dim, rows, tuple(t.name for t in layout.tables))


def _specs(layouts: tuple[MemoryLayout, ...]) -> tuple[TableSpec, ...]:
    return tuple(table for layout in layouts for table in layout.tables)
