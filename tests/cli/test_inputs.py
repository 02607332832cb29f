"""Mistakes that people make with the commands: each is said in one line, before work is lost."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from support.paths import DLRM
from torchrec_lma import Allocation
from torchrec_lma.cli import main as torchrec_lma
from torchrec_lma.cli.outputs import check_folder, check_writable
from torchrec_lma.datasets import ParquetDataset, Schema
from torchrec_lma.options import load_allocation, make_tables, table_names, vocabulary_path

ROWS = 400


def rows(seed: int, users: int, positives: int = ROWS) -> pd.DataFrame:
    """Clicks in order of time, the last of which all have label 0 where `positives` is less than all rows."""
    random = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "click": random.integers(0, 2, ROWS) * (np.arange(ROWS) < positives),
            "user": random.integers(0, users, ROWS) + seed,
            "item": [f"i{item}" for item in random.integers(0, 30, ROWS)],
            "ts": np.arange(ROWS),
        }
    )


def columns(*more: str) -> list[str]:
    return ["--categorical", "user", "item", "--split", "time:ts", *more]


def run(program: str, *options: str | Path, ranks: int = 1, **more: Any) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, *launch, program, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **more)


# One run: yesterday's allocation, a validation without a positive, an export where the data is not


@pytest.mark.slow
def test_a_day_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows(0, users=40).to_parquet(tmp_path / "day1.parquet")
    rows(3, users=60, positives=ROWS // 2).to_parquet(tmp_path / "day2.parquet")
    tables = ["--dim", "8", "--compression", "2"]
    allocation = tmp_path / "a.safetensors"
    assert (
        torchrec_lma(
            ["allocate", "--data", str(tmp_path / "day1.parquet"), "--out", str(allocation), *columns(*tables)]
        )
        == 0
    )
    done = run(
        str(DLRM / "train.py"),
        *("--data", tmp_path / "day2.parquet", "--label", "click", *columns(*tables), "--allocation", allocation),
        *("--batch-size", "64", "--checkpoint-dir", tmp_path / "run", "--json", tmp_path / "run.json"),
    )
    assert done.returncode == 0, done.stderr
    assert "validation AUC not defined (all labels are 0)" in done.stdout

    def no_constant(name: str) -> None:
        pytest.fail(f"{name} is no JSON")

    record = json.loads((tmp_path / "run.json").read_text(), parse_constant=no_constant)
    assert [entry["validation"]["auc"] for entry in record["evaluations"]] == [None] * 3
    assert record["evaluations"][0]["validation"]["positive_share"] == 0
    assert record["evaluations"][0]["validation"]["log_loss"] > 0 and record["best"] is None

    (checkpoint,) = sorted((tmp_path / "run").glob("step-*"))[-1:]
    assert Allocation.from_checkpoint(checkpoint).fingerprint == Allocation.load(allocation).fingerprint
    shutil.copytree(checkpoint, tmp_path / "elsewhere" / checkpoint.name)
    for path in tmp_path.glob("*.parquet"):
        path.unlink()
    export = ["export", "--checkpoint", str(tmp_path / "elsewhere" / checkpoint.name), "--out", str(tmp_path / "m.pt")]
    assert torchrec_lma([*export, "--model", f"{DLRM / 'serving.py'}:dlrm"]) == 0
    assert "checked on 40 rows" in capsys.readouterr().out  # those of the test


@pytest.fixture
def allocated(tmp_path: Path) -> Path:
    rows(0, users=40).to_parquet(tmp_path / "day1.parquet")
    command = ["allocate", "--data", str(tmp_path / "day1.parquet"), "--out", str(tmp_path / "a"), "--dim", "8"]
    assert torchrec_lma([*command, *columns("--compression", "2")]) == 0
    return tmp_path / "a"


def day(path: Path, *names: str, **changes: Any) -> ParquetDataset:
    rows(1, users=50).assign(**changes).to_parquet(path)
    return ParquetDataset(path, Schema(None, names or ("user", "item")))


def test_an_allocation_is_for_columns_and_not_for_a_number_of_rows(allocated: Path, tmp_path: Path) -> None:
    allocation, vocabulary = load_allocation(allocated, day(tmp_path / "day2.parquet"))
    assert vocabulary is not None
    trained = rows(0, users=40)[: int(0.8 * ROWS)]
    assert vocabulary.ids["user"].tolist() == sorted(set(trained["user"]))
    assert {table.name: table.num_embeddings for table in allocation.tables} == {
        "t_user": trained["user"].nunique() + 1,
        "t_item": trained["item"].nunique() + 1,
    }
    other_order = ParquetDataset(tmp_path / "day2.parquet", Schema(None, ("item", "user")))
    assert load_allocation(allocated, other_order)[0].fingerprint == allocation.fingerprint


def test_an_allocation_of_other_columns_or_ids_is_refused(allocated: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"made for tables \['t_item', 't_user'\], the columns here give \['t_user'\]"):
        load_allocation(allocated, day(tmp_path / "b.parquet", "user"))
    strings = [str(i) for i in range(ROWS)]
    with pytest.raises(ValueError, match="column 'user' had integers in the data of .* and has strings now"):
        load_allocation(allocated, day(tmp_path / "b.parquet", user=strings))
    beside = vocabulary_path(allocated)
    content = beside.read_bytes()
    beside.unlink()
    with pytest.raises(FileNotFoundError, match="a needs .*a.vocabulary.safetensors, which was written with it"):
        load_allocation(allocated, day(tmp_path / "b.parquet"))
    at = content.index(torch.tensor(7).numpy().tobytes())  # user 7 becomes user 8, whom others are too
    beside.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    with pytest.raises(ValueError, match="is not the vocabulary"):
        load_allocation(allocated, day(tmp_path / "b.parquet"))


def test_an_allocation_of_raw_ids_has_no_vocabulary(tmp_path: Path) -> None:
    rows(0, users=40).to_parquet(tmp_path / "day1.parquet")
    command = ["allocate", "--data", str(tmp_path / "day1.parquet"), "--out", str(tmp_path / "a"), "--raw-ids"]
    assert torchrec_lma([*command, *columns("--dim", "8", "--compression", "2")]) == 0
    assert not vocabulary_path(tmp_path / "a").exists()
    assert load_allocation(tmp_path / "a", day(tmp_path / "b.parquet"))[1] is None


# Outputs


def test_outputs_are_checked_first_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for path in ("new", "file", "folder/new", "a/b/c", "/dev/null"):
        check_writable("--out", tmp_path / path)
    for path in ("new", "folder", "a/b/c"):
        check_folder("--checkpoint-dir", tmp_path / path)
    for path, error in (("folder", IsADirectoryError), ("file/new", OSError), ("file/a/b", OSError)):
        with pytest.raises(error, match=f"--out .*{path}"):
            check_writable("--out", tmp_path / path)
    for path in ("file", "file/run"):
        with pytest.raises(OSError, match=f"--checkpoint-dir .*{path} cannot be written: .*file takes no file"):
            check_folder("--checkpoint-dir", tmp_path / path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["export", "predict", "allocate", "train"])
def test_every_command_checks_before_it_works(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from train import check_outputs, parse_args

    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "out")
    data = ["--data", str(tmp_path / "none.parquet"), "--categorical", "user"]
    if command == "train":
        for option in ("--json", "--checkpoint-dir"):
            with pytest.raises(OSError, match=f"{option} .*file/out cannot be written"):
                check_outputs(parse_args([option, out]))
        return
    options = {
        "export": ["--checkpoint", str(tmp_path), "--model", "none.py:none", "--out", out],
        "predict": [*data, "--out", out],
        "allocate": [*data, "--out", out],
    }
    assert torchrec_lma([command, *options[command]]) == 2
    assert f"torchrec-lma {command}: --out {out} cannot be written" in capsys.readouterr().err


# Sizes and names


@pytest.mark.parametrize("value", ["0", "-3", "x", "1.5"])
@pytest.mark.parametrize(
    "option",
    [
        "--batch-size",
        "--epochs",
        "--dim",
        "--num-embeddings",
        "--memory-bytes",
        "--dense-layers",
        "--patience",
    ],
)
def test_sizes_below_1_are_no_sizes(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    from train import parse_args

    with pytest.raises(SystemExit) as stopped:
        parse_args([option, value])
    assert stopped.value.code == 2
    assert f"argument {option}: " in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--lr", "--dense-lr"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_learning_rates_are_positive_numbers(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    from train import parse_args

    with pytest.raises(SystemExit):
        parse_args([option, value])
    assert "must be a finite number above 0" in capsys.readouterr().err


NAMES = ["user.id", "keys", "forward", "a b", "x/y", "u@v", "größe", "用户", "'q'", "training", "1", ""]


def test_columns_of_any_name_have_tables(tmp_path: Path) -> None:
    from torchrec import EmbeddingBagCollection, KeyedJaggedTensor

    from torchrec_lma import LMAConfig, LMAEmbeddingBagCollection

    args = argparse.Namespace(dim=8, data_type=None, table="full")
    tables = make_tables(args, dict.fromkeys(NAMES, 10))
    assert len({table.name for table in tables}) == len(NAMES)
    given = KeyedJaggedTensor(NAMES, torch.arange(len(NAMES)) % 3, lengths=torch.ones(len(NAMES), dtype=torch.int32))
    for collection in (
        EmbeddingBagCollection(tables=tables),
        LMAEmbeddingBagCollection(tables, Allocation.hashed(tables, LMAConfig(compression=2))),
    ):
        assert collection(given).keys() == NAMES


def test_columns_whose_tables_would_have_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"columns \['a.b', 'a_b'\] would both have a table 't_a_b': rename one"):
        table_names(["a.b", "c", "a_b"])


@pytest.mark.parametrize("name", ["a.b", "a/b", "keys", "forward", "training", ""])
def test_tables_that_torch_cannot_name_are_refused_before_any_data(name: str) -> None:
    from torchrec import EmbeddingBagConfig

    from torchrec_lma import AllocationBuilder, LMAConfig

    table = EmbeddingBagConfig(name="t", num_embeddings=10, embedding_dim=8, feature_names=["f"])
    table = replace(table, name=name)
    for make in (Allocation.hashed, AllocationBuilder):
        with pytest.raises(ValueError, match="table name"):
            make([table], LMAConfig(compression=2))  # type: ignore[operator]


def test_keys_that_would_stand_twice_are_refused() -> None:
    from torchrec import EmbeddingBagConfig

    from torchrec_lma import AllocationBuilder, LMAConfig

    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=10, embedding_dim=8, feature_names=[feature])
        for name, feature in (("a", "item"), ("b", "item"), ("c", "item@a"))
    ]
    with pytest.raises(ValueError, match=r"keys \['item@a'\] of the output"):
        AllocationBuilder(tables, LMAConfig(compression=2))


# Answers of a server


class Server:
    """In place of a PredictionClient: answers row r with r / 10, and row `nan_at` with NaN."""

    said: dict[str, Any]

    def __init__(self, nan_at: int = -1) -> None:
        self.nan_at, self.rows = nan_at, 0

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def predict(self, floats: torch.Tensor, ids: object, **said: Any) -> np.ndarray:
        rows = np.arange(self.rows, self.rows + len(floats))
        self.rows += len(floats)
        self.said = said
        return np.where(rows == self.nan_at, np.nan, rows / 10).astype(np.float32)


def predict(
    server: Server, data: Path, monkeypatch: pytest.MonkeyPatch, labels: list[int], *options: str | Path
) -> int:
    frame = pd.DataFrame({"click": labels, "user": range(len(labels)), "item": [str(i) for i in range(len(labels))]})
    frame.to_parquet(data)
    monkeypatch.setattr("torchrec_lma.serving.client.PredictionClient", lambda *_, **__: server)
    command = ["predict", "--data", data, "--label", "click", "--categorical", "user", "item", "--batch-size", "4"]
    return torchrec_lma([*map(str, command), *map(str, options)])


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0] * 10, "AUC is not defined: all labels are 0 over 10 rows"),
        ([1] * 10, "AUC is not defined: all labels are 1 over 10 rows"),
        ([0] * 9 + [1], "AUC 1.000000 over 10 rows"),
    ],
)
def test_an_auc_of_one_class_is_said_to_be_none(
    labels: list[int], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server()
    assert predict(server, tmp_path / "a.parquet", monkeypatch, labels, "--auc") == 0
    out, err = capsys.readouterr()
    assert said in err
    assert out.split() == [f"{row / 10:.6f}" for row in [*range(10)]]
    assert server.said == {"float_names": (), "string_features": ["item"]}


def test_predictions_that_are_no_numbers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "a.parquet", tmp_path / "out"
    assert predict(Server(nan_at=6), data, monkeypatch, [0] * 10, "--out", out) == 2
    assert "answered row 6 with nan, no number" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [data]
    assert predict(Server(nan_at=6), data, monkeypatch, [0] * 10, "--out", out, "--limit", "4") == 0
    assert out.read_text().split() == ["0.000000", "0.100000", "0.200000", "0.300000"]


def test_loopback_connections_go_through_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    import grpc

    from torchrec_lma.serving.client import PredictionClient

    options: dict[str, dict[str, Any]] = {}
    channel = type("Channel", (), {"unary_unary": lambda *_, **__: None})()

    def make(address: str, given: list[tuple[str, Any]]) -> object:
        options[address] = dict(given)
        return channel

    monkeypatch.setattr(grpc, "insecure_channel", make)
    loopback = ["127.0.0.1:1", "localhost:1", "[::1]:1", "127.1.2.3:1"]
    for address in (*loopback, "models.example:1", "127.example:1", "10.0.0.1:1"):
        PredictionClient(address)
    assert [address for address, given in options.items() if given.get("grpc.enable_http_proxy") == 0] == loopback


def test_requests_take_integers_of_any_width() -> None:
    from torchrec import KeyedJaggedTensor

    from torchrec_lma.serving.client import make_request

    def sent(dtype: torch.dtype) -> bytes:
        ids = KeyedJaggedTensor(["user"], torch.tensor([0, 1]).to(dtype), lengths=torch.tensor([1, 1]))
        return make_request(torch.zeros(2, 1), ids).id_list_features.values

    for dtype in (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.int64, torch.uint64):
        assert sent(dtype) == sent(torch.int32)
    for dtype in (torch.float32, torch.float64, torch.bool):
        with pytest.raises(TypeError, match="expected integers"):
            sent(dtype)


def test_ids_of_another_type_have_another_fingerprint() -> None:
    from torchrec_lma.serving.contract import Contract, fingerprint_names

    model = Contract(("age",), ("user", "item"), string_features=("item",))
    assert Contract.from_json(model.to_json()).fingerprint == model.fingerprint
    assert model.fingerprint == fingerprint_names(("age",), ("user", "item"), (), string_features=["item"])
    others = [fingerprint_names(("age",), ("user", "item"), (), string_features=strings) for strings in ([], ["user"])]
    assert model.fingerprint not in others and len(set(others)) == 2
    assert others[0] == fingerprint_names(("age",), ("user", "item"), ())


# Several ranks


@pytest.mark.slow
def test_a_mistake_is_said_once_by_all_ranks(tmp_path: Path) -> None:
    rows(0, users=40).to_parquet(tmp_path / "a.parquet")
    data = ["--data", tmp_path / "a.parquet", "--label", "click", "--categorical", "usr"]
    done = run(str(DLRM / "train.py"), *data, ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("has no column 'usr', it has click, user, item, ts") == 1
    assert "in open_dataset" not in done.stderr  # no traceback of ours


# Threads


@pytest.mark.parametrize("given", [None, "1", "3"])
def test_omp_num_threads_is_respected(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    import train

    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "OMP_NUM_THREADS")}
    asked: list[int] = []
    monkeypatch.setattr(os, "environ", environment | ({} if given is None else {"OMP_NUM_THREADS": given}))
    monkeypatch.setattr(train.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(train.torch, "set_num_threads", asked.append)
    assert train.init_distributed().type == "cpu" or torch.cuda.is_available()
    if not torch.cuda.is_available():
        assert asked == ([len(os.sched_getaffinity(0))] if given is None else [])
