"""NumPy columns read as the same rows of a parquet file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import torchrec_lma.datasets.numpy_columns as numpy_columns
from torchrec_lma.allocation import Allocation
from torchrec_lma.cli import main as torchrec_lma
from torchrec_lma.datasets import NumpyDataset, ParquetDataset, Schema, Split

SCHEMA = Schema("click", ("user", "tags", "city"), ("price",))
SPLIT = Split("time", ("time",))
ROWS = 101


@pytest.fixture
def columns(tmp_path: Path) -> dict[str, np.ndarray]:
    """The columns; each as a file in `npy`, and all in `all.parquet`."""
    random = np.random.default_rng(0)
    columns: dict[str, np.ndarray] = {
        "click": random.integers(0, 2, ROWS),
        "user": random.integers(-(2**62), 2**62, ROWS),
        "tags": random.integers(0, 9, (ROWS, 3)).astype(np.int32),
        "city": np.array(["Ulm", "", "Köln"])[random.integers(0, 3, ROWS)],
        "price": random.normal(size=ROWS).astype(np.float32),
        "time": random.permutation(ROWS).astype("datetime64[s]"),
    }
    (tmp_path / "npy").mkdir()
    for name, column in columns.items():
        np.save(tmp_path / "npy" / f"{name}.npy", column)
    pq.write_table(
        pa.table({name: column.tolist() if column.ndim == 2 else column for name, column in columns.items()}),
        tmp_path / "all.parquet",
    )
    return columns


@pytest.mark.parametrize("split", ["train", "validation", "test", "all"])
@pytest.mark.parametrize("read_rows", [7, 1 << 16])
def test_numpy_columns_are_read_as_parquet(
    columns: dict[str, np.ndarray], tmp_path: Path, split: str, read_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numpy_columns, "READ_ROWS", read_rows)
    ours, theirs = (
        NumpyDataset(tmp_path / "npy", SCHEMA, SPLIT),
        ParquetDataset(tmp_path / "all.parquet", SCHEMA, SPLIT),
    )
    assert ours.num_rows(split) == theirs.num_rows(split)
    for rank in range(2):
        read = [dataset.batches(split, batch_size=8, rank=rank, world_size=2) for dataset in (ours, theirs)]
        for one, other in zip(*read, strict=True):
            assert torch.equal(one.sparse_features.values(), other.sparse_features.values())
            assert torch.equal(one.sparse_features.lengths(), other.sparse_features.lengths())
            assert torch.equal(one.dense_features, other.dense_features) and torch.equal(one.labels, other.labels)


def test_the_command_reads_numpy_columns(columns: dict[str, np.ndarray], tmp_path: Path) -> None:
    common = ["--label", "click", "--categorical", "user", "tags", "city", "--dim", "8", "--compression", "2"]
    for form, data in (("npy", "npy"), ("parquet", "all.parquet")):
        out = ["--out", str(tmp_path / f"{form}.safetensors"), "--split", "time:time"]
        assert torchrec_lma(["allocate", "--data", str(tmp_path / data), "--format", form, *common, *out]) == 0
    fingerprints = {Allocation.load(tmp_path / f"{form}.safetensors").fingerprint for form in ("npy", "parquet")}
    assert len(fingerprints) == 1


@pytest.mark.parametrize(
    "options, said",
    [
        (["--memory-bytes", "4"], "bytes, in which not one row of 8 columns"),
        (["--out", "."], "--out . is a directory"),
    ],
)
def test_the_command_fails_before_it_reads_the_rows(
    columns: dict[str, np.ndarray],
    tmp_path: Path,
    options: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(NumpyDataset, "batches", lambda *_, **__: pytest.fail("a pass over the data was begun"))
    data = ["--data", str(tmp_path / "npy"), "--format", "npy", "--label", "click", "--num-embeddings", "100"]
    common = [*data, "--categorical", "user", "tags", "city", "--dim", "8", "--out", str(tmp_path / "out")]
    assert torchrec_lma(["allocate", *common, *options]) == 2
    assert said in capsys.readouterr().err


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    "damage, error, said",
    [
        (lambda path: path.unlink(), FileNotFoundError, "user.npy does not exist: column 'user'"),
        (truncate, ValueError, "user.npy is truncated or no .npy"),
        (lambda path: path.write_bytes(b"user"), ValueError, "user.npy is truncated or no .npy"),
        (
            lambda path: np.save(path, np.array([{}] * ROWS), allow_pickle=True),
            ValueError,
            "user.npy is truncated or no",
        ),
        (lambda path: np.save(path, np.zeros((ROWS, 2, 2))), ValueError, r"user.npy has shape \(101, 2, 2\)"),
        (lambda path: np.save(path, np.zeros(ROWS, ">i8")), ValueError, "user.npy has dtype >i8 .*write native"),
        (
            lambda path: np.save(path, np.zeros(ROWS, complex)),
            ValueError,
            "user.npy has dtype complex128 .*write native",
        ),
        (lambda path: np.save(path, np.zeros((ROWS, 0))), ValueError, r"shape \(101, 0\).*at least one a row"),
        (lambda path: np.save(path, np.zeros(7, np.int64)), ValueError, "different numbers of rows: .*'user': 7"),
    ],
)
def test_damaged_columns_are_refused(
    columns: dict[str, np.ndarray], tmp_path: Path, damage: Callable[[Path], None], error: type[Exception], said: str
) -> None:
    damage(tmp_path / "npy" / "user.npy")
    with pytest.raises(error, match=said):
        NumpyDataset(tmp_path / "npy", SCHEMA, SPLIT)


def test_no_directory_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        NumpyDataset(tmp_path / "nowhere", SCHEMA)
