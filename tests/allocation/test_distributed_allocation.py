"""Allocations built by several workers: the result of one, over gloo, through torchrun, and when a worker dies."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from support import ranks
from torchrec_lma import Allocation, AllocationBuilder, LMAConfig
from torchrec_lma.allocation import ContextMinHash, RowsMinHash, SimHash
from torchrec_lma.allocation.reduction import reduce_builders, reduce_to_first
from torchrec_lma.cli import main as torchrec_lma

TABLES = [
    EmbeddingBagConfig(name=name, num_embeddings=2000, embedding_dim=8, feature_names=[name])
    for name in ("user", "item", "tag")
]
SOURCES = {"user": RowsMinHash(max_rows=200), "item": ContextMinHash(weighted=True, max_rows=150), "tag": SimHash()}
CONFIG = LMAConfig(compression=60, raw_ids=("item",))
ROWS = 500


def builder_of(rank: int, world_size: int, max_ids: int) -> AllocationBuilder:
    """The builder that saw every world_size-th of the rows and of the vectors."""
    random = np.random.default_rng(0)
    ids = np.stack([random.zipf(1.3, ROWS) % most for most in (300, 50, 9)])[:, rank::world_size]
    builder = AllocationBuilder(TABLES, CONFIG, SOURCES, max_ids=max_ids, signature_fraction=0.5)
    for part in np.array_split(ids, 3, axis=1):
        values = torch.from_numpy(part.reshape(-1))
        builder.update(
            KeyedJaggedTensor(
                keys=["user", "item", "tag"], values=values, lengths=torch.ones_like(values, dtype=torch.int32)
            )
        )
    vectors = random.normal(size=(9, 4))
    return builder.add_vectors("tag", np.arange(9)[rank::world_size], vectors[rank::world_size])


def reduced_on_this_rank(max_ids: int) -> tuple[str, dict[str, Any]] | None:
    reduced = reduce_builders(builder_of(dist.get_rank(), dist.get_world_size(), max_ids))
    if reduced is None:
        return None
    allocation = reduced.build()
    return allocation.fingerprint, allocation.provenance


@pytest.mark.parametrize("max_ids", [1 << 20, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_workers_build_the_allocation_of_one(world_size: int, max_ids: int) -> None:
    expected = builder_of(0, 1, max_ids).build()
    first, *others = ranks.run(reduced_on_this_rank, world_size, max_ids)
    assert first == (expected.fingerprint, expected.provenance)
    assert others == [None] * (world_size - 1)
    assert expected.provenance["frequency"] == ("counted" if max_ids > 100 else "sketched")


def union_on_this_rank() -> set[int] | None:
    return reduce_to_first({dist.get_rank(), 10 * dist.get_rank()}, set.union)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_values_are_merged_on_the_first_worker_only(world_size: int) -> None:
    of_all = set(range(world_size)) | {10 * rank for rank in range(world_size)}
    assert ranks.run(union_on_this_rank, world_size) == [of_all, *[None] * (world_size - 1)]


# The command line.


@pytest.fixture(scope="module")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(1)
    n = 3000
    folder = tmp_path_factory.mktemp("clicks")
    for part in range(3):
        frame = pd.DataFrame(
            {
                "click": random.integers(0, 2, n),
                "user": random.zipf(1.4, n) % 500,
                "item": [f"item-{i}" for i in random.integers(0, 90, n)],
                "day": random.integers(0, 3, n),
            }
        )
        frame.to_parquet(folder / f"part{part}.parquet", row_group_size=400)
    return folder


def arguments(clicks: Path, out: Path, *more: str) -> list[str]:
    columns = ["--label", "click", "--categorical", "user", "item", "day"]
    size = ["--dim", "8", "--compression", "20", "--source", "context-minhash"]
    return ["allocate", "--data", str(clicks), *columns, *size, "--out", str(out), *more]


def test_labels_are_neither_needed_nor_read(clicks: Path, tmp_path: Path) -> None:
    assert torchrec_lma(arguments(clicks, tmp_path / "labelled")) == 0
    expected = Allocation.load(tmp_path / "labelled").fingerprint
    for name, label in {"null": None, "text": "yes", "missing": ()}.items():
        for part in sorted(clicks.iterdir()):
            frame = pd.read_parquet(part)
            (tmp_path / name).mkdir(exist_ok=True)
            if name == "missing":
                frame = frame.drop(columns="click")
            else:
                frame["click"] = frame["click"].astype(object)
                frame.loc[5, "click"] = label
                frame["click"] = frame["click"].astype(str if label else "float64")
            frame.to_parquet(tmp_path / name / part.name, row_group_size=400)
        command = arguments(tmp_path / name, tmp_path / "a")
        at = command.index("--label")
        if name != "missing":
            assert torchrec_lma(command) == 0
        assert torchrec_lma(command[:at] + command[at + 2 :]) == 0
        assert Allocation.load(tmp_path / "a").fingerprint == expected


def test_ids_are_those_of_a_vocabulary_unless_they_are_raw(clicks: Path, tmp_path: Path) -> None:
    frame = pd.concat([pd.read_parquet(part) for part in sorted(clicks.iterdir())])
    for options, raw_ids, sizes in (
        ([], False, None),
        (["--raw-ids"], True, None),
        (["--num-embeddings", "700"], True, {"user": 700, "item": 700, "day": 700}),
    ):
        assert torchrec_lma(arguments(clicks, tmp_path / "a", *options)) == 0
        allocation = Allocation.load(tmp_path / "a")
        assert {spec.raw_ids for spec in allocation.tables} == {raw_ids}
        for spec in allocation.tables:
            seen = allocation.provenance["ids"][spec.name]["seen"]
            column = spec.name.removeprefix("t_")
            assert 0.9 * frame[column].nunique() <= seen <= frame[column].nunique()  # a part is not for training
            assert spec.num_embeddings == (sizes[column] if sizes else seen + 1)  # and one that stands for the others
            assert allocation.provenance["ids"][spec.name].get("out_of_vocabulary", 0) == 0


def test_the_command_warns_of_signatures_that_share_nothing(
    clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every user comes with items of his own: no two users are alike. An item is in one row, too few to be compared."""
    ids = np.arange(600)
    pd.DataFrame({"user": ids % 200, "item": ids + 10_000}).to_parquet(tmp_path / "data.parquet")
    options = ["--categorical", "user", "item", "--dim", "8", "--compression", "200", "--num-embeddings", "4000"]
    command = ["allocate", "--data", str(tmp_path / "data.parquet"), *options, "--out", str(tmp_path / "a")]
    assert torchrec_lma([*command, "--source", "context-minhash"]) == 0
    (memory,) = Allocation.load(tmp_path / "a").memories
    warned = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warned) == 1
    found = re.fullmatch(
        r"  warning: t_user: no two signatures agree in any value; these signatures share no rows and take ([\d,]+) "
        r"bytes; give another --source or none",
        warned[0],
    )
    assert found and 0 < int(found[1].replace(",", "")) == memory.tensors["signatures"].nbytes


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/self"])
def test_a_file_that_cannot_be_written_is_refused_before_the_pass(
    clicks: Path, tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(AllocationBuilder, "update", lambda *_: pytest.fail("a pass over the data was begun"))
    (tmp_path / "file").touch()
    out = tmp_path / folder / "allocation"
    assert torchrec_lma(arguments(clicks, out)) == 2
    assert f"--out {out} cannot be written" in capsys.readouterr().err


def test_sigterm_while_saving_leaves_no_file(clicks: Path, tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\nfrom torchrec_lma.cli import main\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\nsys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, *arguments(clicks, tmp_path / "new" / "allocation")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, process.stderr[-3000:]
    assert list((tmp_path / "new").iterdir()) == []


def torchrun(world_size: int, command: list[str]) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [*launcher, "-m", "torchrec_lma.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--raw-ids"], ["--num-embeddings", "700"]], ids=" ".join)
def test_workers_of_torchrun_write_the_file_of_one_process(clicks: Path, tmp_path: Path, options: list[str]) -> None:
    assert torchrec_lma(arguments(clicks, tmp_path / "one", *options)) == 0
    process = torchrun(3, arguments(clicks, tmp_path / "three", *options))
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    one, three = Allocation.load(tmp_path / "one"), Allocation.load(tmp_path / "three")
    assert (three.fingerprint, three.provenance, three.header) == (one.fingerprint, one.provenance, one.header)
    assert output.count("fingerprint") == 1


DYING = """
import os, signal, sys
from torchrec_lma import AllocationBuilder
from torchrec_lma.cli import main

if os.environ["RANK"] == os.environ["VICTIM"]:
    AllocationBuilder.update = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_dies_ends_the_build_and_leaves_no_file(clicks: Path, tmp_path: Path, victim: int) -> None:
    """Without torchrun, which would end the other workers before they could tell."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    out = tmp_path / "out" / "allocation"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DYING, *arguments(clicks, out)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            | {"VICTIM": str(victim), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert processes[victim].returncode == -signal.SIGKILL
    assert processes[1 - victim].returncode == 2, errors[1 - victim]
    assert "torchrec-lma allocate: another worker ended" in errors[1 - victim]
    assert not out.parent.exists()


@pytest.mark.slow
def test_a_worker_that_cannot_read_its_share_ends_the_build(clicks: Path, tmp_path: Path) -> None:
    for part in clicks.iterdir():
        (tmp_path / part.name).write_bytes(part.read_bytes())
    frame = pd.read_parquet(tmp_path / "part2.parquet")
    frame["user"] = frame["user"].astype(float)
    frame.loc[2700, "user"] = 7.5
    frame.to_parquet(tmp_path / "part2.parquet")
    process = torchrun(2, [*arguments(tmp_path, tmp_path / "out"), "--split", "hash", "--num-embeddings", "500"])
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert re.search(r"torchrec-lma allocate: .*part2.parquet.*'user'.*float 7\.5 is not an id", errors)
    assert not (tmp_path / "out").exists()
