"""Checkpoints as data: what torch.distributed.checkpoint wrote loads, what would run something is refused unread."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from torchrec_lma import Allocation
from torchrec_lma.checkpoint import CheckpointReader, UntrustedCheckpoint, load
from torchrec_lma.quant import load_checkpoint

STATE = {
    "weight": torch.arange(6.0).view(2, 3),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "count": torch.tensor(5),
    "bytes": torch.arange(4, dtype=torch.uint8),
    "lr": 0.125,
    "betas": (0.9, 0.999),
    "name": "adam",
    "nothing": None,
}


class Runs:
    """Unpickles by running a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    dcp.save(dict(STATE), checkpoint_id=folder, no_dist=True)
    return folder


def metadata(folder: Path) -> Metadata:
    return dcp.FileSystemReader(folder).read_metadata()


def write_metadata(folder: Path, content: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def test_what_was_saved_loads(saved: Path) -> None:
    state = {name: torch.zeros_like(v) if isinstance(v, torch.Tensor) else None for name, v in STATE.items()}
    weight = state["weight"]
    load(state, CheckpointReader(saved), no_dist=True)
    assert state["weight"] is weight
    for name, value in STATE.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(state[name], value) and state[name].dtype == value.dtype
        else:
            assert state[name] == value and type(state[name]) is type(value)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_metadata_of_any_pickle_protocol_is_as_torch_reads_it(saved: Path, protocol: int) -> None:
    expected = metadata(saved)
    expected.storage_meta.checkpoint_id = PosixPath(saved)
    (saved / ".metadata").write_bytes(pickle.dumps(expected, protocol=protocol))
    found = CheckpointReader(saved).read_metadata()
    assert found.state_dict_metadata == expected.state_dict_metadata
    assert found.storage_data == expected.storage_data and found.planner_data == expected.planner_data


def in_place_of_the_metadata(folder: Path, runs: Runs) -> None:
    write_metadata(folder, runs)


def among_the_tensors(folder: Path, runs: Runs) -> None:
    content = metadata(folder)
    content.state_dict_metadata["weight"] = runs
    write_metadata(folder, content)


def as_planner_data(folder: Path, runs: Runs) -> None:
    content = metadata(folder)
    content.planner_data["weight"] = runs
    write_metadata(folder, content)


def as_the_checkpoint_s_path(folder: Path, runs: Runs) -> None:
    content = metadata(folder)
    content.storage_meta.checkpoint_id = runs
    write_metadata(folder, content)


def after_the_metadata_in_an_attribute(folder: Path, runs: Runs) -> None:
    content = metadata(folder)
    content.version = runs
    write_metadata(folder, content)


def as_a_value_that_is_no_tensor(folder: Path, runs: Runs) -> None:
    """A tensor that the metadata says is bytes: DCP unpickles these."""
    content, stream = metadata(folder), io.BytesIO()
    torch.save(runs, stream)
    (folder / "__9_9.distcp").write_bytes(stream.getvalue())
    content.state_dict_metadata["weight"] = BytesStorageMetadata()
    content.storage_data = {index: place for index, place in content.storage_data.items() if index.fqn != "weight"}
    content.storage_data[MetadataIndex("weight")] = _StorageInfo("__9_9.distcp", 0, len(stream.getvalue()))
    write_metadata(folder, content)


def by_another_module(folder: Path, runs: Runs) -> None:
    """What the standard library or torch could do: any name that is not DCP's."""
    (folder / ".metadata").write_bytes(b"cposix\nsystem\n(S'touch " + str(runs.path).encode() + b"'\ntR.")


CRAFTED = [
    in_place_of_the_metadata,
    among_the_tensors,
    as_planner_data,
    as_the_checkpoint_s_path,
    after_the_metadata_in_an_attribute,
    as_a_value_that_is_no_tensor,
    by_another_module,
]


def load_tensors(folder: Path) -> None:
    load({"weight": torch.zeros(2, 3)}, CheckpointReader(folder), no_dist=True)


def export(folder: Path) -> None:
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(2, 3))
    load_checkpoint(model, folder)


@pytest.mark.parametrize("reads", [load_tensors, export, Allocation.from_checkpoint])
@pytest.mark.parametrize("craft", CRAFTED)
def test_a_crafted_checkpoint_runs_nothing(
    saved: Path, tmp_path: Path, craft: Callable[[Path, Runs], None], reads: Callable[[Path], Any]
) -> None:
    craft(saved, Runs(tmp_path / "ran"))
    if craft is as_a_value_that_is_no_tensor:  # found while reading, if it is read
        expected: Any = pytest.raises((ValueError, dcp.CheckpointException), match="weight|holds 0 LMA collections")
    else:
        expected = pytest.raises(UntrustedCheckpoint, match=rf"{saved}/.metadata names posix.system, which torch")
    with expected:
        reads(saved)
    assert not (tmp_path / "ran").exists()


def test_the_crafted_checkpoints_would_run(saved: Path, tmp_path: Path) -> None:
    by_another_module(saved, Runs(tmp_path / "ran"))
    with pytest.raises(AttributeError):
        dcp.FileSystemReader(saved).read_metadata()
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../weights.distcp", "/etc/passwd", "a/b.distcp", "", "..", 5])
def test_files_outside_of_the_folder_are_not_read(saved: Path, name: Any) -> None:
    content = metadata(saved)
    for place in content.storage_data.values():
        place.relative_path = name
    write_metadata(saved, content)
    with pytest.raises(UntrustedCheckpoint, match="expected .distcp files in the same folder"):
        load_tensors(saved)


@pytest.mark.parametrize("content", [b"", b"\x80", b"N.", b"]q\x00.", b"not a pickle", pickle.dumps({"weight": 1})])
def test_other_contents_are_named(saved: Path, content: bytes) -> None:
    (saved / ".metadata").write_bytes(content)
    with pytest.raises(UntrustedCheckpoint, match=rf"{saved}/.metadata (was not written by|is|refers)"):
        load_tensors(saved)


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no torch.distributed.checkpoint"):
        Allocation.from_checkpoint(tmp_path)
