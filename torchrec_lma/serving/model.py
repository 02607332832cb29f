"""The model that is served: loaded from a TorchScript file, checked and warmed up."""

import errno
import os
import stat
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fbgemm_gpu  # noqa: F401  registers the operators of scripted tables
import numpy as np
import torch

from torchrec_lma.serving.contract import ID_TYPES, METADATA_FILE, Contract, Inputs, Sparse

MAX_CODE_BYTES = 256 << 20  # what torch compresses is the model's code; more than that is no code
WARM_UP_RUNS = 3  # TorchScript profiles a graph in its first runs and then compiles it


class FileChanged(ValueError):
    """A model file was replaced or written while it was read."""


@dataclass(frozen=True)
class Stamp:
    """What of a file changes when it is written or replaced."""

    inode: int
    size: int
    modified_ns: int
    mode: int

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        status = os.stat(path)  # of what a link points to
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode)

    def check(self, path: Path) -> "Stamp":
        """Itself, if it is of a regular file: a pipe or a device may never end.

        Raises:
            ValueError: it is not.
        """
        if not stat.S_ISREG(self.mode):
            raise ValueError(f"{path} is not a regular file: give a TorchScript file")
        return self


class Model:
    """A TorchScript module with TorchRec's inference contract.

    Args:
        path: the file; it is read whole, so that it may be replaced while the model is used.
        counts: of the features of each kind, if the file does not say; else they must agree with it.
        device: where to compute.
        warm_up_rows: the batch size that it is warmed up for.
        source: what to read in place of `path`, such as a descriptor of it: the same file, whatever has its name now.

    Raises:
        ValueError: the file is damaged, is no TorchScript module, or does not keep the contract; says which.
        OSError: it cannot be read.
    """

    def __init__(
        self,
        path: Path,
        counts: Sequence[int] | None,
        device: torch.device,
        warm_up_rows: int = 1024,
        source: Path | None = None,
    ) -> None:
        self.path = path
        source = source or path
        self.stamp = Stamp.of(source).check(path)
        self._device = device
        extra = {METADATA_FILE: ""}
        try:
            with zipfile.ZipFile(source) as archive:
                _check_sizes(archive.infolist(), self.stamp.size)
                damaged = archive.testzip()  # torch does not look at the checksums
            if damaged is not None:
                raise ValueError(f"{damaged} in it does not match its checksum")
            self._module = torch.jit.load(str(source), map_location=device, _extra_files=extra).eval()
        except (RuntimeError, ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that is a place before the file's start
                raise
            what = _first_line(error) or type(error).__name__
            raise ValueError(f"{path} is truncated, damaged or no TorchScript model ({what})") from error
        if Stamp.of(source) != self.stamp:
            raise FileChanged(f"{path} changed while it was read: write models beside it and rename them")
        if extra[METADATA_FILE]:
            self.contract = Contract.from_json(extra[METADATA_FILE])
            if counts is not None and tuple(counts) != self.contract.counts:
                raise ValueError(
                    f"{path} takes {self.contract.counts} float, id-list, id-score-list features, not "
                    f"the {tuple(counts)} of counts: leave counts out"
                )
        elif counts is not None:
            self.contract = Contract.from_counts(counts)
        else:
            raise ValueError(
                f"{path} holds no {METADATA_FILE}, so it does not say what it takes: export it with torchrec-lma "
                "export, or serve it from Python with Settings(counts=...)"
            )
        self._check(warm_up_rows)

    def predict(self, batch: Sequence[Inputs]) -> list[dict[str, np.ndarray]]:
        """The predictions of each of several requests, computed as one batch: task -> float32 [rows].

        Raises:
            RuntimeError: the model failed, or its output is not what the contract says.
        """
        rows = [inputs.rows for inputs in batch]
        features = {"float_features": torch.from_numpy(np.concatenate([inputs.float_features for inputs in batch]))}
        features |= _merge("id_list_features", [inputs.id_list_features for inputs in batch])
        if self.contract.id_score_list_features:
            features |= _merge("id_score_list_features", [inputs.id_score_list_features for inputs in batch])
        with torch.inference_mode():
            output = self._module({name: tensor.to(self._device) for name, tensor in features.items()})
        if not isinstance(output, dict) or "default" not in output:
            raise RuntimeError('the model returned no dictionary with a "default" prediction')
        predictions = {}
        for task, tensor in output.items():
            if tensor.shape != (sum(rows),) or not tensor.is_floating_point():
                raise RuntimeError(
                    f"the model returned {tensor.dtype} {list(tensor.shape)} as {task!r}, not floats [{sum(rows)}]"
                )
            predictions[task] = tensor.float().cpu().numpy()
        ends = np.cumsum(rows)
        return [
            {task: values[end - count : end] for task, values in predictions.items()} for count, end in zip(rows, ends)
        ]

    def _check(self, warm_up_rows: int) -> None:
        """Runs the model on made-up rows: id 0, which every table has, of both types, and empty bags."""
        try:
            for ids_per_bag in (1, 0):
                for id_type in ID_TYPES:
                    for rows in (1, warm_up_rows):
                        made_up = self._made_up(rows, ids_per_bag, id_type)
                        for _ in range(WARM_UP_RUNS):
                            self.predict([made_up])
        except Exception as error:
            raise ValueError(
                f"{self.path} does not keep TorchRec's inference contract for {self.contract.counts} float, id-list "
                f"and id-score-list features: {_last_line(error)}"
            ) from error

    def _made_up(self, rows: int, ids_per_bag: int, id_type: str) -> Inputs:
        floats, ids, scored = self.contract.counts

        def sparse(features: int, weighted: bool) -> Sparse:
            lengths = np.full((features, rows), ids_per_bag, np.int32)
            count = features * rows * ids_per_bag
            weights = np.ones(count, np.float32) if weighted else None
            return Sparse(lengths, np.zeros(count, ID_TYPES[id_type]), weights)

        return Inputs(np.zeros((rows, floats), np.float32), sparse(ids, False), sparse(scored, True))


def _merge(field: str, parts: Sequence[Sparse]) -> dict[str, torch.Tensor]:
    """Bags of several requests -> those of one batch: lengths int32 [F * B], values [ids], weights float32 [ids]."""
    lengths = torch.from_numpy(np.concatenate([part.lengths for part in parts], axis=1))  # [F, B]
    values = torch.from_numpy(np.concatenate([part.values for part in parts]))  # one request after the other
    weights = None
    if parts[0].weights is not None:
        weights = torch.from_numpy(np.concatenate([part.weights for part in parts if part.weights is not None]))
    if len(parts) > 1 and len(lengths) > 1 and len(values):
        # Segments (request, feature) -> (feature, request), which makes all of a feature's ids neighbours.
        ids = np.stack([part.lengths.sum(axis=1) for part in parts]).astype(np.int32)  # [requests, F]
        order = torch.arange(ids.size, dtype=torch.int32).view(ids.shape).T.flatten()
        _, values, weights = torch.ops.fbgemm.permute_1D_sparse_data(
            order, torch.from_numpy(ids.flatten()), values, weights, len(values)
        )
    merged = {f"{field}.lengths": lengths.flatten(), f"{field}.values": values}
    return merged if weights is None else merged | {f"{field}.weights": weights}


def _check_sizes(entries: Sequence[zipfile.ZipInfo], size: int) -> None:
    """Raises ValueError where a file of `size` bytes claims contents that it cannot hold, or that would unpack to more
    than a model's code ever has."""
    stored = sum(entry.file_size for entry in entries if entry.compress_type == zipfile.ZIP_STORED)
    unpacked = sum(entry.file_size for entry in entries if entry.compress_type != zipfile.ZIP_STORED)
    if stored > size or unpacked > MAX_CODE_BYTES:
        raise ValueError(f"its {size:,} bytes would unpack to {stored + unpacked:,}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _last_line(error: BaseException) -> str:
    """TorchScript's messages end with the cause."""
    return str(error).strip().split("\n")[-1]
