"""The allocation: everything that decides rows, as an artifact that can be saved, compared and shipped."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_lma import checkpoint
from torchrec_lma.allocation.layout import Level, MemoryLayout, TableSpec, lay_out, shared_levels
from torchrec_lma.allocation.validation import check_memory, check_tables
from torchrec_lma.config import LMAConfig
from torchrec_lma.files import replacing

FORMAT_VERSION = 5
FORMAT = "torchrec_lma.allocation"
# The module of a collection whose buffers are the allocation, as keys of a checkpoint show it.
STATE_PREFIX = "remap."


@dataclass(frozen=True, eq=False)
class MemoryAllocation:
    """The allocation of one memory.

    Its tensors, each where it is needed:

    * `owners.<k>.words`: int32, `RankBitmap` of who has an own row on level k, among the positions of level k - 1: its
      own rows, or for level 0 all ids of the vocabularies one table after another. A member's rank is its own row.
      Without it all positions are owners, or if the level has no own row, none.
    * `owners.<k>.ranges`: int64 [tables, 2], in place of the bitmap where the vocabularies are sorted by frequency: of
      each table the owners are a range of those positions, from the first to before the second.
    * `owners.0.low`, `owners.0.starts`: int32, `IdIndex` of raw ids in place of the bitmap of level 0.
    * `signed.words`, or `signed.low` and `signed.starts`: the ids that have a signature, in the same two forms.
    * `signatures`: int32 [S, K], their signatures, in the order of that set.

    Attributes:
        name: of the memory; its level tables are `<name>_level_<k>`.
        dim: columns; the widths of the levels add up to it.
        raw_ids: ids are any 64-bit integers, else vocabularies.
        tables: the logical tables that share it, in order.
        levels: first to last.
    """

    name: str
    dim: int
    raw_ids: bool
    tables: tuple[str, ...]
    levels: tuple[Level, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes that a process holds beside the weights: the tensors, and a bitmap's ranks, which follow from it."""
        ranks = sum(t.nbytes for name, t in self.tensors.items() if name.endswith(".words"))
        return sum(tensor.nbytes for tensor in self.tensors.values()) + ranks

    def level_name(self, level: int) -> str:
        """The TorchRec table of a level."""
        return f"{self.name}_level_{level}"

    def header(self) -> dict[str, Any]:
        keys = ("name", "dim", "raw_ids", "tables")
        return {key: getattr(self, key) for key in keys} | {"levels": [asdict(level) for level in self.levels]}


@dataclass(frozen=True, eq=False)
class Allocation:
    """Rows, their owners, signatures and seeds of every memory of a collection.

    Made by `AllocationBuilder.build`, by `hashed` where there is no data, or read back by `load` and `from_checkpoint`.

    Attributes:
        config: the LMAConfig it was built for.
        tables: the logical tables it was built for.
        memories: one MemoryAllocation for those of each embedding dim and kind of ids.
        provenance: where it came from (source, rows seen, ids and bytes); decides no row.
    """

    config: LMAConfig
    tables: tuple[TableSpec, ...]
    memories: tuple[MemoryAllocation, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def hashed(cls, tables: Sequence[BaseEmbeddingConfig], config: LMAConfig) -> "Allocation":
        """The allocation that needs no data and no bytes: no id has a row of its own, all share by hash.

        With one level this is the hashing trick, with several of equal width random chunk sharing (arXiv 2103.06124,
        section 3). Without `config.widths` it is one level as wide as the dim, or as few as a kernel takes.

        Raises ValueError as `AllocationBuilder`, or if the budget holds not one row.
        """
        layouts = lay_out(tables, config)
        memories = []
        for layout in layouts:
            levels = shared_levels(layout, layout.budget_bytes)
            memories.append(new_memory(layout, levels, {}))
        return cls(config, all_tables(tables, layouts), tuple(memories), {"source": None})

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
        """SHA-256, in hex, of all that decides rows: equal fingerprints mean equal rows."""
        decides = {
            "format_version": FORMAT_VERSION,
            "seed": self.config.seed,
            # A bitmap is as long as the vocabularies are.
            "tables": [[table.name, table.num_embeddings] for table in self.tables],
            "memories": [memory.header() for memory in self.memories],
        }
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
        for memory in self.memories:
            for name, tensor in sorted(memory.tensors.items()):
                digest.update(json.dumps([memory.name, name, str(tensor.dtype), list(tensor.shape)]).encode())
                digest.update(tensor.contiguous().numpy().data)  # its buffer, not a copy: it can be most of the RAM
        return digest.hexdigest()

    def check_made_for(self, tables: Sequence[BaseEmbeddingConfig]) -> None:
        """Raises ValueError, naming the differences, if this was built for other tables."""
        made = {table.name: table for table in self.tables}
        wanted = {table.name: table for table in all_tables(tables, lay_out(tables, self.config))}
        if list(made.items()) == list(wanted.items()):
            return
        changed = "; ".join(
            f"{name}: built for {made.get(name, 'no such table')}, the collection has {wanted.get(name, 'none')}"
            for name in sorted(made.keys() | wanted.keys())
            if made.get(name) != wanted.get(name)
        )
        changed = changed or f"in the order {list(made)}, the collection has {list(wanted)}"
        raise ValueError(f"the allocation was made for other tables ({changed}); build it again for these")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, under a temporary name first, so that `path` is whole or untouched.

        Raises OSError if it cannot be written.
        """
        path = Path(path)
        tensors = {
            f"{memory.name}/{name}": tensor.contiguous()
            for memory in self.memories
            for name, tensor in memory.tensors.items()
        }
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "header": self.header,
            "fingerprint": self.fingerprint,
            "provenance": json.dumps(self.provenance, sort_keys=True),
        }
        metadata["checksum"] = _checksum(metadata)
        try:
            with replacing(path) as temporary:
                save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # how safetensors passes on errors of the file system
            raise OSError(
                f"{path} was not written ({error}); make room for {self.nbytes:,} bytes and a header"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Allocation":
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not an allocation, truncated, changed since it was written, of another format version, or with
                contents that no builder makes.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no allocation file at {path}; write one with `torchrec-lma allocate`")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                # Copies: the file's pages would change under a loaded allocation when somebody writes over them.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a whole safetensors file ({error}); it is truncated or something else. Build it again"
            ) from error
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} is a safetensors file but not an allocation; expected one that Allocation.save wrote"
            )
        version = metadata.get("format_version")
        if version != str(FORMAT_VERSION):
            raise ValueError(
                f"{path} has allocation format version {version}, this torchrec_lma reads version {FORMAT_VERSION}; "
                "build it again"
            )
        if metadata.get("checksum") != _checksum(metadata):
            raise ValueError(f"{path} does not match its checksum; the file was damaged. Build it again")
        try:
            allocation = cls._from_parts(metadata["header"], tensors, json.loads(metadata["provenance"]))
        except ValueError as error:
            raise ValueError(f"{path} holds what no builder makes: {error}. Build it again") from error
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

        Nothing in the checkpoint is run: see `torchrec_lma.checkpoint`.

        Raises:
            FileNotFoundError: the folder holds no checkpoint.
            ValueError: the checkpoint holds no LMA collection, more than one, or what torch.distributed.checkpoint or a
                builder does not write.
        """
        reader = checkpoint.CheckpointReader(path)
        stored = reader.read_metadata().state_dict_metadata
        header_key = f"{STATE_PREFIX}header"
        prefixes = [key.removesuffix(header_key) for key in stored if key.endswith(header_key)]
        if len(prefixes) != 1:
            raise ValueError(f"{path} holds {len(prefixes)} LMA collections ({prefixes}), expected one")
        prefix = prefixes[0] + STATE_PREFIX
        state = {
            key: torch.empty(value.size, dtype=value.properties.dtype)
            for key, value in stored.items()
            if key.startswith(prefix) and isinstance(value, TensorStorageMetadata)
        }
        checkpoint.load(state, reader, no_dist=True)
        tensors = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
        try:
            stated = bytes(tensors.pop("fingerprint").tolist()).hex()
            allocation = cls.from_state(tensors, {"source": f"checkpoint {path}"})
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds what no builder makes: {error}; it was damaged") from error
        if allocation.fingerprint != stated:
            raise ValueError(f"{path} states allocation {stated} but holds {allocation.fingerprint}; it was damaged")
        return allocation

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], provenance: dict[str, Any]) -> "Allocation":
        """From the state_dict of `Remap`: `header`, and `memories.<name>.<tensor>`."""
        header = bytes(state["header"].tolist()).decode()
        tensors = {}
        for key, tensor in state.items():
            if key.startswith("memories."):
                memory, _, name = key.removeprefix("memories.").partition(".")
                tensors[f"{memory}/{name}"] = tensor
        return cls._from_parts(header, tensors, provenance)

    @classmethod
    def _from_parts(cls, header: str, tensors: dict[str, Tensor], provenance: dict[str, Any]) -> "Allocation":
        """Raises ValueError if these parts make no allocation."""
        try:
            values = json.loads(header)
            if values["format_version"] != FORMAT_VERSION:
                version = values["format_version"]
                raise ValueError(f"format version {version!r}, this torchrec_lma reads {FORMAT_VERSION}")
            tables = tuple(TableSpec(**table) for table in values["tables"])
            by_name = {table.name: table for table in tables}
            memories = []
            for memory in values["memories"]:
                prefix = f"{memory['name']}/"
                own = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
                levels = tuple(Level(**level) for level in memory["levels"])
                fields = {**memory, "tables": tuple(memory["tables"]), "levels": levels}
                memories.append(MemoryAllocation(**fields, tensors=own))
            if len({memory.name for memory in memories}) < len(memories):
                raise ValueError(f"memories {[memory.name for memory in memories]} have a name twice")
            check_tables(tables, [table for memory in memories for table in memory.tables])
            for memory in memories:
                of_memory = [by_name[table] for table in memory.tables]
                check_memory(memory.name, memory.dim, memory.raw_ids, of_memory, memory.levels, memory.tensors)
            config = LMAConfig.from_dict(values["config"])
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"the parts make no allocation ({type(error).__name__}: {error})") from error
        return cls(config, tables, tuple(memories), provenance)


def new_memory(layout: MemoryLayout, levels: tuple[Level, ...], tensors: Mapping[str, Tensor]) -> MemoryAllocation:
    """The memory of a layout."""
    tables = tuple(table.name for table in layout.tables)
    return MemoryAllocation(layout.name, layout.dim, layout.raw_ids, tables, levels, tensors)


def all_tables(tables: Sequence[BaseEmbeddingConfig], layouts: Sequence[MemoryLayout]) -> tuple[TableSpec, ...]:
    """All tables, in the order of the tables."""
    by_name = {spec.name: spec for layout in layouts for spec in layout.tables}
    return tuple(by_name[table.name] for table in tables)


def _checksum(metadata: dict[str, str]) -> str:
    """SHA-256 of everything in the metadata but itself; the fingerprint in it covers the tensors."""
    return hashlib.sha256(json.dumps({**metadata, "checksum": ""}, sort_keys=True).encode()).hexdigest()
