"""Reading checkpoints of torch.distributed.checkpoint (DCP) as data: nothing that stands in one is run.

DCP keeps what a checkpoint holds in `.metadata`, a pickle, and what is no tensor as pickles in the other files, and
reads both with all that Python's pickle can do: whoever can write a checkpoint can run commands as whoever loads it.
Here both are read by unpicklers that know DCP's own classes, or plain values, and nothing else.
"""

import os
import pickle
import re
from pathlib import PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem

_CLASSES: dict[tuple[str, str], Any] = {
    (known.__module__, known.__qualname__): known
    for known in (
        dcp_metadata.BytesStorageMetadata,
        dcp_metadata.ChunkStorageMetadata,
        dcp_metadata.Metadata,
        dcp_metadata.MetadataIndex,
        dcp_metadata.StorageMeta,
        dcp_metadata.TensorProperties,
        dcp_metadata.TensorStorageMetadata,
        dcp_metadata._MEM_FORMAT_ENCODING,
        # Private, and what FileSystemWriter writes for each tensor: file, offset, length.
        _StorageInfo,
    )
} | {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): PurePath,  # where the checkpoint was once; it is not read from there
    ("pathlib", "PurePosixPath"): PurePath,
}


class UntrustedCheckpoint(ValueError):
    """A checkpoint holds what torch.distributed.checkpoint does not write."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _CLASSES.get((module, name))
        if found is None and module == "torch":
            found = getattr(torch, name, None) if name.isidentifier() else None
            found = found if isinstance(found, torch.dtype) else None
        if found is None:
            raise UntrustedCheckpoint(f"names {module}.{name}, which torch.distributed.checkpoint does not write")
        return found


class CheckpointReader(dcp.FileSystemReader):
    """DCP's reader of a folder, for a checkpoint that somebody else may have written."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp_metadata.Metadata:
        """What the checkpoint holds.

        Raises:
            FileNotFoundError: the folder holds no checkpoint.
            UntrustedCheckpoint: `.metadata` is none of DCP's, or names files outside of the folder.
        """
        path = self._get_metadata_path(kwargs.get("rank"))
        try:
            with open(path, "rb") as file:
                metadata = _Unpickler(file).load()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self.path} holds no torch.distributed.checkpoint (it has no {PurePath(path).name})"
            ) from error
        except UntrustedCheckpoint as error:
            raise UntrustedCheckpoint(f"{path} {error}: it was not loaded, for a name can run any command") from None
        except Exception as error:  # what bytes that are no pickle of DCP's raise is up to what they are
            raise UntrustedCheckpoint(
                f"{path} was not written by torch.distributed.checkpoint ({type(error).__name__}: {error}); the "
                "checkpoint was damaged"
            ) from error
        _check(metadata, path)
        if metadata.storage_meta is None:  # as the method that this stands for has it
            metadata.storage_meta = dcp_metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _LoadPlanner(DefaultLoadPlanner):
    """DCP's own planner, but what is not a tensor is read as plain values, and never unpickled into anything else."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        key = read_item.dest_index.fqn
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).split("\n")[0]
            raise UntrustedCheckpoint(f"{key} in the checkpoint is not a plain value: {reason}") from None
        set_element(self.original_state_dict, self.mappings[key], loaded)


def load(state: dict[str, Any], reader: CheckpointReader, no_dist: bool = False) -> None:
    """`torch.distributed.checkpoint.load` into `state`, running nothing of what is in the checkpoint.

    Args:
        state: by the checkpoint's keys, without nested dicts; tensors are loaded in place.
        no_dist: on this process alone, else collective.
    Raises:
        UntrustedCheckpoint: see `CheckpointReader`, or a value is other than plain.
        FileNotFoundError: the folder holds no checkpoint.
        CheckpointException: keys are missing, or tensors are of another size; or the cause is one of the above, found
            while reading.
    """
    reader.read_metadata()  # raises as it stands, where dcp.load would wrap it
    dcp.load(state, storage_reader=reader, planner=_LoadPlanner(), no_dist=no_dist)


def _check(metadata: Any, path: str | os.PathLike[str]) -> None:
    """Raises UntrustedCheckpoint unless the parts that are read have the types that DCP gives them."""
    stored = getattr(metadata, "state_dict_metadata", None)
    places = getattr(metadata, "storage_data", None)
    known = (dcp_metadata.TensorStorageMetadata, dcp_metadata.BytesStorageMetadata)
    if not (
        isinstance(metadata, dcp_metadata.Metadata)
        and isinstance(stored, dict)
        and isinstance(places, dict)
        and all(isinstance(key, str) and isinstance(value, known) for key, value in stored.items())
        and all(isinstance(place, _StorageInfo) for place in places.values())
    ):
        raise UntrustedCheckpoint(f"{path} is a {type(metadata).__name__}, expected the metadata of a checkpoint")
    for place in places.values():
        if not (isinstance(place.relative_path, str) and re.fullmatch(r"[\w.\-]+\.distcp", place.relative_path)):
            raise UntrustedCheckpoint(
                f"{path} refers to {place.relative_path!r}; expected .distcp files in the same folder"
            )
