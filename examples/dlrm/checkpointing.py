"""Checkpoints of a training run: one folder for each epoch, written beside and renamed, the newest ones kept."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

_PROGRESS = "progress.json"


class Checkpoints:
    """`folder/epoch-0001`, ...: model and optimizer by torch.distributed.checkpoint, and the run's progress as JSON.

    They load under any plan and world size. A folder without the prefix of a temporary name is complete.

    Args:
        folder: on a file system that all ranks share.
        keep: how many of the newest epochs to keep.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def newest(self) -> Path | None:
        return max(self.folder.glob("epoch-*"), default=None)

    def save(self, epoch: int, model: nn.Module, optimizer: CombinedOptimizer, progress: dict[str, Any]) -> Path:
        """Collective. `progress` is JSON that `load` gives back."""
        final = self.folder / f"epoch-{epoch:04d}"
        writing = self.folder / f".writing-{final.name}"
        if dist.get_rank() == 0:
            for leftover in (writing, final):
                shutil.rmtree(leftover, ignore_errors=True)
            writing.mkdir(parents=True)
        dist.barrier()
        dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=writing)
        if dist.get_rank() == 0:
            (writing / _PROGRESS).write_text(json.dumps(progress))
            os.replace(writing, final)
            for old in sorted(self.folder.glob("epoch-*"))[: -self.keep]:
                shutil.rmtree(old)
        dist.barrier()
        return final

    def load(self, path: Path, model: nn.Module, optimizer: CombinedOptimizer) -> dict[str, Any]:
        """Collective. Loads in place and returns the progress that was saved."""
        for _, part in optimizer.optimizers:
            if isinstance(part, KeyedOptimizerWrapper):
                part.init_state()  # Adam makes its state at the first step; there would be nothing to load into
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        dcp.load(state, checkpoint_id=path)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return json.loads((path / _PROGRESS).read_text())
