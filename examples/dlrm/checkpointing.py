"""Checkpoints of a training run: folders that are whole or recognised as damaged, the newest ones kept."""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from training_state import TrainingState, gathered

from torchrec_lma import checkpoint
from torchrec_lma.datasets import Vocabulary
from torchrec_lma.files import FolderLock, lock_folder, sync

PROGRESS = "progress.json"
SETTINGS = "settings.json"
VOCABULARY = "vocabulary.safetensors"
MANIFEST = "manifest.json"
_ALWAYS = (".metadata", PROGRESS, SETTINGS)  # in every checkpoint
_WRITING, _REPLACED = ".writing-", ".replaced-"
_NAME = re.compile(r"step-(\d+)")
# A scheduler may start a job again while processes of the one before still end.
LOCK_SECONDS = 10

logger = logging.getLogger(__name__)


class Checkpoints:
    """Folders `step-00000500`, 500 steps into the run.

    Each holds the model and the optimizer, which load under any plan and world size, and the ranks' random states, all
    written by torch.distributed.checkpoint; `progress.json`; `settings.json`; `vocabulary.safetensors` where there is
    one; and, written last, `manifest.json` with the SHA-256 of every other file. A folder is written as
    `.writing-<name>-<random>` and renamed, so what has a checkpoint's name was complete once; the manifest tells
    whether it still is.

    One run writes in a folder: it is locked, by `newest` and `save` too, while this object lives.

    Args:
        folder: on a file system that all ranks share.
        keep: how many of the newest checkpoints to keep, at least 1; the best one is kept beside them.
    Raises:
        ValueError: `keep` is below 1, or the folder is a checkpoint or in one.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1: the newest checkpoint is what a restart needs")
        for outer in (folder.absolute(), *folder.absolute().parents):
            if is_checkpoint(outer):
                raise ValueError(f"{folder} is in the checkpoint {outer}; give the folder of the run, {outer.parent}")
        self.folder = folder
        self.keep = keep
        self._lock: FolderLock | None = None

    def paths(self) -> list[Path]:
        """The checkpoints, oldest first. Whether they are whole is not looked at: see `newest` and `damage`."""
        found = ((_NAME.fullmatch(path.name), path) for path in self.folder.glob("step-*"))
        return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]

    def exist(self) -> bool:
        """Whether there is any, whole or damaged; what a killed save left is none."""
        found = (path for path in self.folder.glob("*step-*") if not path.name.startswith(_WRITING))
        return any(is_checkpoint(path) for path in found)

    def path(self, steps: int) -> Path:
        """The checkpoint after so many steps, whether or not there is one."""
        return self.folder / f"step-{steps:08d}"

    def newest(self) -> Path | None:
        """The newest whole checkpoint, None if there never was one. Collective if there is a process group.

        A damaged one is named in the log and renamed to `damaged-<name>`, and the one before it is looked at.

        Raises:
            ValueError: there are damaged checkpoints and no whole one.
            FolderInUse: another run writes in the folder.
        """
        self.lock()
        if _rank() == 0:
            for old in self.folder.glob(f"{_REPLACED}*"):
                if (final := old.with_name(old.name.removeprefix(_REPLACED))).exists():
                    shutil.rmtree(old)  # its save was killed while it removed it
                else:
                    os.replace(old, final)  # between two renames
        for path in reversed(_from_rank_0(self.paths())):
            problem = damage(path)
            if problem is None:
                return path
            if _rank() == 0:
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
                logger.warning("checkpoint %s is damaged (%s): renamed to %s, not used", path, problem, aside.name)
        damaged = _from_rank_0(sorted(path.name for path in self.folder.glob("damaged-*")))
        if damaged:
            raise ValueError(
                f"no checkpoint in {self.folder} is whole, there are only {damaged}: restore one of them from a copy, "
                "or remove them to start anew"
            )
        return None

    def save(
        self,
        steps: int,
        model: nn.Module,
        optimizer: CombinedOptimizer,
        progress: dict[str, Any],
        settings: dict[str, Any],
        vocabulary: Vocabulary | None = None,
        best: int | None = None,
    ) -> Path:
        """Writes a checkpoint and removes those that are not kept. Collective. Raises FolderInUse as `newest`.

        Args:
            steps: done in all epochs.
            progress: JSON that `load` gives back.
            settings: JSON that `read_settings` gives back: how to build the model again.
            vocabulary: `read_vocabulary` gives it back.
            best: the checkpoint after so many steps is kept, however old: it is the one to use.
        """
        self.lock()
        final = self.path(steps)
        # A name that no rank of a dead run knows: one that still lives must not write into this checkpoint.
        writing = self.folder / _from_rank_0(f"{_WRITING}{final.name}-{secrets.token_hex(4)}")
        if _rank() == 0:
            for leftover in self.folder.glob(f"{_WRITING}*"):  # of saves that were killed
                shutil.rmtree(leftover, ignore_errors=True)  # whose ranks may still write there
            writing.mkdir(parents=True)
        dist.barrier()
        try:
            self._write(writing, model, optimizer, progress, settings, vocabulary)
            if _rank() == 0:
                if final.exists():
                    os.replace(final, self.folder / f"{_REPLACED}{final.name}")
                os.replace(writing, final)
                sync(self.folder)
        finally:
            if _rank() == 0 and writing.exists():  # of a save that failed, for want of room maybe
                shutil.rmtree(writing, ignore_errors=True)
        if _rank() == 0:
            for old in [*self.paths()[: -self.keep], *self.folder.glob(f"{_REPLACED}*")]:
                if best is None or old != self.path(best):
                    shutil.rmtree(old)
        dist.barrier()
        return final

    @staticmethod
    def _write(
        folder: Path,
        model: nn.Module,
        optimizer: CombinedOptimizer,
        progress: dict[str, Any],
        settings: dict[str, Any],
        vocabulary: Vocabulary | None,
    ) -> None:
        dcp.save(TrainingState(model, optimizer, _random_state()).stored(), checkpoint_id=folder)
        if _rank() == 0:
            _write_json(folder / PROGRESS, progress)
            _write_json(folder / SETTINGS, settings)
            if vocabulary is not None:
                vocabulary.save(folder / VOCABULARY)
        dist.barrier()
        digests = _digests(folder)
        if _rank() == 0:
            _write_json(folder / MANIFEST, {"sha256": digests})

    def lock(self) -> None:
        """Lets no other run write in the folder while this object lives. Collective. Raises FolderInUse as `newest`."""
        problem: OSError | None = None
        if _rank() == 0:
            try:
                self._lock = lock_folder(self.folder, LOCK_SECONDS)
            except OSError as error:
                problem = error
        if (problem := _from_rank_0(problem)) is not None:
            raise problem

    def load(self, path: Path, model: nn.Module, optimizer: CombinedOptimizer) -> dict[str, Any]:
        """Loads in place and returns the progress that was saved. Collective.

        A rank that the run did not have when it was saved keeps its own random state.
        """
        for _, part in optimizer.optimizers:
            if isinstance(part, KeyedOptimizerWrapper):
                part.init_state()  # Adam makes its state at the first step; there would be nothing to load into
        reader = checkpoint.CheckpointReader(path)
        saved = reader.read_metadata().state_dict_metadata
        random = {name: value for name, value in _random_state().items() if f"random.{name}" in saved}
        TrainingState(model, optimizer, random).load(reader)
        _set_random_state(random)
        return read_progress(path)


def read_progress(path: Path) -> dict[str, Any]:
    """The progress that a checkpoint was saved with."""
    return json.loads((path / PROGRESS).read_text())


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a checkpoint was saved with."""
    return json.loads((path / SETTINGS).read_text())


def read_vocabulary(path: Path) -> Vocabulary | None:
    """The vocabulary that a checkpoint was saved with; None for tables that take ids as they are."""
    file = path / VOCABULARY
    return Vocabulary.load(file) if file.exists() else None


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, whole or damaged, by the files in it."""
    return sum((path / name).is_file() for name in (*_ALWAYS, MANIFEST)) >= 2


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is. A process group shares the work: collective then."""
    manifest = _from_rank_0(_read_manifest(path))
    if isinstance(manifest, str):
        return manifest
    found = _digests(path)
    for name, digest in manifest.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} has SHA-256 {found[name]}, {MANIFEST} says {digest}"
    for name in found:
        if name not in manifest:
            return f"{name} is not in {MANIFEST}"
    return None


def _read_manifest(path: Path) -> dict[str, str] | str:
    """The SHA-256 of each file, or what is wrong with the manifest."""
    try:
        digests = json.loads((path / MANIFEST).read_text())["sha256"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {type(error).__name__}: {error}"
    if not isinstance(digests, dict):
        return f"{MANIFEST} cannot be read: its sha256 is a {type(digests).__name__}"
    missing = [name for name in _ALWAYS if name not in digests]
    return f"{MANIFEST} does not list {missing[0]}" if missing else digests


def _digests(path: Path) -> dict[str, str]:
    """SHA-256 of each file but the manifest, in hex; each rank reads a part of them."""
    names = _from_rank_0(sorted(file.name for file in path.iterdir() if file.name != MANIFEST))
    mine = {name: _sha256(path / name) for name in names[_rank() :: _world_size()]}
    return {name: digest for part in gathered(mine) for name, digest in part.items()}


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:  # a bad sector reads as damage, not as the end of the run
        return f"unreadable ({error})"


def _write_json(file: Path, content: dict[str, Any]) -> None:
    with file.open("w") as stream:
        json.dump(content, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def _random_state() -> dict[str, torch.Tensor]:
    """This rank's random states, under names of its own: what training draws from is torch's."""
    state = {f"rank-{_rank()}-cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"rank-{_rank()}-cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    for name, value in state.items():
        if name.endswith("-cpu"):
            torch.set_rng_state(value)
        else:
            torch.cuda.set_rng_state(value)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _from_rank_0(value: Any) -> Any:
    """Rank 0's value on every rank: two ranks that look at a folder while it changes may see different things."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
