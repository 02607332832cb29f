"""The DLRM example and the allocate command, run as a user runs them, on small made-up click logs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from support.paths import DLRM
from torchrec_lma import Allocation
from torchrec_lma.cli import main as torchrec_lma

TRAIN = DLRM / "train.py"
ROWS = 6000


@pytest.fixture(scope="module")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some users and some items draw more clicks; raw 64-bit user ids, a column of lists and missing values."""
    random = np.random.default_rng(0)
    user, item = random.integers(0, 200, ROWS), random.integers(0, 100, ROWS)
    chance = 0.1 + 0.4 * (user % 5 < 2) + 0.4 * (item % 3 == 0)
    frame = pd.DataFrame(
        {
            "click": (random.random(ROWS) < chance).astype("int8"),
            "user": (user.astype(np.int64) << 40) - 7,
            "item": [f"item-{i}" for i in item],
            "tags": [list(range(i % 4)) for i in item],
            "price": np.where(item % 7 == 0, np.nan, item * 1.5),
            "time": np.arange(ROWS),
        }
    )
    path = tmp_path_factory.mktemp("data") / "clicks.parquet"
    frame.to_parquet(path)
    return path


def arguments(path: Path) -> list[str]:
    columns = ["--label", "click", "--categorical", "user", "item", "tags", "--numeric", "price"]
    return ["--data", str(path), *columns, "--split", "time:time", "--dim", "8", "--compression", "4"]


def train(*options: str | Path, ranks: int = 1, patience: int = 9) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(TRAIN)]
    if ranks > 1:
        program = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            str(TRAIN),
        ]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [*program, *map(str, options), "--batch-size", "128", "--patience", str(patience)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def record_of(done: subprocess.CompletedProcess[str], path: Path) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("options", ["--table lma", "--table full", "--table full --dim 4 --data-type FP16"])
def test_two_ranks_learn_and_record_what_they_did(clicks: Path, tmp_path: Path, options: str) -> None:
    out = tmp_path / "run.json"
    # The few hundred values learn slowly at the default rate, to an AUC that varies with the first weights.
    run = [*arguments(clicks), *options.split(), "--epochs", "5", "--lr", "0.2", "--json", out]
    done = train(*run, "--evaluations-per-epoch", "2", ranks=2)
    record = record_of(done, out)
    assert record["best"]["test"]["auc"] > 0.7
    assert record["world_size"] == 2
    steps = 0.8 * ROWS // 256  # of an epoch
    assert [entry["steps"] for entry in record["evaluations"]] == [
        epoch * steps + step for epoch in range(5) for step in ((steps + 1) // 2, steps)
    ]
    memory = record["memory"]
    ids = 200 + 100 + 3 + 3  # and one for ids that are in no training row
    expected = {"lma": ids * 8 * 4, "full": ids * 8 * 4, "FP16": ids * 4 * 2}[options.split()[-1]]
    assert memory["full"] == expected
    if "lma" in options:
        assert 0.8 * expected < 4 * (memory["weight"] + memory["allocation"]) <= expected
    else:
        assert memory["weight"] == expected and memory["optimizer"] == 4 * ids
    assert "test AUC" in done.stdout


def test_a_resumed_run_ends_where_an_undisturbed_one_does(clicks: Path, tmp_path: Path) -> None:
    lma = ["--table", "lma", *arguments(clicks), "--seed", "3"]
    whole = record_of(train(*lma, "--epochs", "2", "--json", tmp_path / "a.json"), tmp_path / "a.json")
    stops = [*lma, "--checkpoint-dir", tmp_path / "checkpoints", "--json", tmp_path / "b.json"]
    record_of(train(*stops, "--epochs", "1"), tmp_path / "b.json")
    resumed = record_of(train(*stops, "--epochs", "2", "--resume"), tmp_path / "b.json")
    assert [entry["epoch"] for entry in resumed["evaluations"]] == [1, 1, 1, 2, 2, 2]
    assert "--resume" in train(*stops, "--epochs", "1").stderr  # a new run does not mix with the old one's checkpoints
    for mine, theirs in zip(resumed["evaluations"], whole["evaluations"]):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
        assert mine["validation"]["auc"] == pytest.approx(theirs["validation"]["auc"], abs=1e-5)


def test_a_run_stops_when_validation_gets_no_better(clicks: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    # The labels of few rows are soon known by heart.
    run = ["--table", "full", *arguments(clicks), "--epochs", "40", "--lr", "0.5", "--json", out]
    done = train(*run, "--evaluations-per-epoch", "1", patience=2)
    evaluations = record_of(done, out)["evaluations"]
    aucs = [entry["validation"]["auc"] for entry in evaluations]
    assert len(aucs) < 40
    assert aucs.index(max(aucs)) == len(aucs) - 3


@pytest.mark.parametrize("table", ["lma", "full"])
def test_a_run_that_diverges_ends_in_an_error(clicks: Path, tmp_path: Path, table: str) -> None:
    run = ["--table", table, *arguments(clicks), "--json", tmp_path / "run.json", "--checkpoint-dir", tmp_path / "run"]
    done = train(*run, "--lr", "1e30", "--checkpoint-every", "1")
    assert done.returncode == 1
    assert "is NaN or infinite in epoch 1, after 1 steps in all: lower --lr" in done.stderr
    assert not list(tmp_path.glob("run.json"))


def test_the_allocate_command_writes_what_the_trainer_builds(clicks: Path, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "allocation.safetensors"
    assert torchrec_lma(["allocate", "--out", str(path), *arguments(clicks)]) == 0
    allocation = Allocation.load(path)
    assert allocation.provenance["rows_seen"] == 0.8 * ROWS  # the training split alone
    run = ["--table", "lma", *arguments(clicks), "--epochs", "1", "--checkpoint-dir", tmp_path / "checkpoints"]
    assert train(*run).returncode == 0
    (newest, *_) = sorted((tmp_path / "checkpoints").glob("step-*"), reverse=True)
    assert Allocation.from_checkpoint(newest).fingerprint == allocation.fingerprint
    other = train("--table", "lma", *arguments(clicks), "--dim", "16", "--allocation", path)
    assert other.returncode != 0
    assert "the allocation was made for other tables" in other.stderr


def criteo_text(path: Path) -> Path:
    random = np.random.default_rng(0)
    lines = []
    for _ in range(2000):
        label = int(random.integers(0, 2))
        integers = [str(random.integers(0, 50)) if random.random() < 0.8 else "" for _ in range(13)]
        hashes = [f"{random.integers(0, 2**32):08x}" if random.random() < 0.9 else "" for _ in range(26)]
        lines.append("\t".join([str(label), *integers, *hashes]))
    path.write_text("\n".join(lines) + "\n")
    return path


def avazu_rows(path: Path) -> Path:
    columns = "C1 banner_pos site_id site_domain site_category app_id app_domain app_category device_id device_ip "
    columns += "device_model device_type device_conn_type C14 C15 C16 C17 C18 C19 C20 C21"
    random = np.random.default_rng(0)
    rows: dict[str, Any] = {column: [f"{v:08x}" for v in random.integers(0, 99, 2000)] for column in columns.split()}
    rows |= {"click": random.integers(0, 2, 2000), "hour": 14102100 + np.arange(2000) // 100}
    pd.DataFrame(rows).to_parquet(path)
    return path


def test_criteo_text_trains_without_a_vocabulary(tmp_path: Path) -> None:
    path, out = criteo_text(tmp_path / "day_0.tsv"), tmp_path / "run.json"
    criteo = ["--data", path, "--format", "criteo", "--num-embeddings", "1000", "--dim", "8", "--compression", "2"]
    record = record_of(train("--table", "lma", *criteo, "--split", "hash", "--json", out), out)
    assert record["memory"]["full"] == 26 * 1000 * 8 * 4


@pytest.mark.parametrize("name, make", [("criteo_kaggle", criteo_text), ("avazu", avazu_rows)])
def test_arguments_come_from_files(tmp_path: Path, name: str, make: Callable[[Path], Path]) -> None:
    """The LMA paper's settings; later arguments win."""
    out = tmp_path / "run.json"
    later = ["--compression", "32", "--epochs", "1", "--max-steps", "2", "--json", out]
    run = train(f"@{DLRM / name}.args", "--data", make(tmp_path / "data"), *later)
    expected = {
        **{"dim": 128, "dense_layers": [512, 256], "over_layers": [1024, 1024, 512, 256]},
        **{"optimizer": "sgd", "lr": 0.1, "compression": 32, "epochs": 1},
    }
    assert record_of(run, out)["arguments"].items() >= expected.items()


def test_wrong_input_is_said_in_one_line(clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    allocate = ["allocate", "--out", str(tmp_path / "a.safetensors")]
    assert torchrec_lma([*allocate, "--data", str(clicks), "--label", "click", "--categorical", "usr"]) == 2
    assert "usr" in capsys.readouterr().err
    assert (
        torchrec_lma([*allocate, "--data", str(tmp_path / "none.parquet"), "--label", "a", "--categorical", "b"]) == 2
    )
    assert "none.parquet" in capsys.readouterr().err
    assert torchrec_lma([*allocate, "--data", str(clicks)]) == 2
    assert "needs --categorical" in capsys.readouterr().err  # and no label, which allocations are not made from
    assert not list(tmp_path.iterdir())
