"""Restart: an interrupted run ends in the bits of an undisturbed one, and damaged checkpoints are not used.

The slow tests run the DLRM example under torchrun on two gloo ranks and send real signals to it.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import arguments
import checkpointing
import model
import numpy as np
import pandas as pd
import pytest
import start as start_of_run
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import train
import trainer
from soak import tensors
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

import torchx_components.lma as lma
from support import faulty_train
from support.faulty_train import Fault
from torchrec_lma.datasets import ParquetDataset, Schema, Split, Vocabulary

Checkpoints = checkpointing.Checkpoints

FAULTY_TRAIN = Path(faulty_train.__file__)
ROWS, BATCH_SIZE, EPOCHS, EVERY = 2000, 40, 2, 5
STEPS = 20  # of an epoch on two ranks: 80% of the rows are the training split
EVALUATIONS = [7, 14, 20]


# --- Checkpoints in this process -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Small:
    """A model and its optimizer, which changes with every step."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Linear(3, 2)
        parameters = dict(self.model.named_parameters())
        self.optimizer = CombinedOptimizer([KeyedOptimizerWrapper(parameters, lambda p: torch.optim.Adam(p, lr=0.1))])

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.rand(4, 3)).square().sum().backward()
        self.optimizer.step()

    def save(self, checkpoints: Any, steps: int, **more: Any) -> Path:
        return checkpoints.save(steps, self.model, self.optimizer, {"steps": steps}, {"arguments": {}}, **more)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_checkpoints_sort_by_what_was_done_and_the_newest_are_kept(tmp_path: Path) -> None:
    small, checkpoints = Small(0), Checkpoints(tmp_path, keep=3)
    (tmp_path / "step-of-mine").mkdir()  # not a checkpoint, not ours to remove
    for steps in (500, 1000, 1500, 20_000_000, 300_000_000):
        small.save(checkpoints, steps)
    expected = ["step-00001500", "step-20000000", "step-300000000"]
    assert [path.name for path in checkpoints.paths()] == expected
    assert names(tmp_path) == [*expected, "step-of-mine"]
    assert checkpoints.newest() == checkpoints.paths()[-1]


def test_the_best_checkpoint_is_kept_however_old(tmp_path: Path) -> None:
    small, checkpoints = Small(0), Checkpoints(tmp_path, keep=1)
    for steps, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        small.save(checkpoints, steps, best=best)
    assert names(tmp_path) == ["step-00000002", "step-00000004"]
    small.save(checkpoints, 5, best=5)
    assert names(tmp_path) == ["step-00000005"]


def test_an_empty_or_absent_folder_has_no_newest_checkpoint(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "absent").newest() is None


def test_keep_must_leave_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_loading_brings_back_every_bit_and_the_random_state(tmp_path: Path) -> None:
    checkpoints, saved, loaded = Checkpoints(tmp_path), Small(0), Small(1)
    saved.step()
    path = saved.save(checkpoints, 7)
    saved.step()  # draws from the random state
    progress = checkpoints.load(path, loaded.model, loaded.optimizer)
    loaded.step()
    assert progress == {"steps": 7}
    for mine, theirs in zip(loaded.model.parameters(), saved.model.parameters()):
        assert torch.equal(mine, theirs)
    mine, theirs = loaded.optimizer.state_dict()["state"], saved.optimizer.state_dict()["state"]
    assert mine.keys() == theirs.keys() and mine
    for name in mine:
        for key, value in theirs[name].items():
            assert torch.equal(torch.as_tensor(mine[name][key]), torch.as_tensor(value)), (name, key)


def test_settings_and_vocabulary_come_back(tmp_path: Path) -> None:
    path = Small(0).save(Checkpoints(tmp_path), 1, vocabulary=Vocabulary({"user": np.array([7, -3, 2**60])}))
    assert checkpointing.read_settings(path) == {"arguments": {}}
    assert checkpointing.read_vocabulary(path)._rows("user", torch.tensor([2**60, 5, -3, 7])).tolist() == [3, 0, 1, 2]
    assert checkpointing.read_vocabulary(Small(0).save(Checkpoints(tmp_path), 2)) is None


def truncate(path: Path) -> str:
    (file,) = path.glob("*.distcp")
    os.truncate(file, file.stat().st_size - 1)
    return file.name


def flip_a_bit(path: Path) -> str:
    (file,) = path.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file.name


def remove_metadata(path: Path) -> str:
    (path / ".metadata").unlink()
    return ".metadata is missing"


def remove_manifest(path: Path) -> str:
    (path / "manifest.json").unlink()
    return "manifest.json is missing"


def cut_manifest(path: Path) -> str:
    os.truncate(path / "manifest.json", 40)
    return "manifest.json cannot be read"


def change_progress(path: Path) -> str:
    (path / "progress.json").write_text("{}")
    return "progress.json has SHA-256"


def rewrite_manifest(path: Path, digests: Any) -> None:
    (path / "manifest.json").write_text(json.dumps({"sha256": digests}))


def list_nothing(path: Path) -> str:
    rewrite_manifest(path, {})
    return "manifest.json does not list .metadata"


def list_nothing_by_a_string(path: Path) -> str:
    rewrite_manifest(path, "")
    return "manifest.json cannot be read: its sha256 is a str"


def do_not_list(ending: str) -> Callable[[Path], str]:
    def harm(path: Path) -> str:
        digests = json.loads((path / "manifest.json").read_text())["sha256"]
        (name,) = [each for each in digests if each.endswith(ending)]
        rewrite_manifest(path, {each: digest for each, digest in digests.items() if each != name})
        return f"{name} is not in manifest.json" if ending == ".distcp" else f"manifest.json does not list {name}"

    return harm


def add_a_vocabulary(path: Path) -> str:
    Vocabulary({"user": np.array([7])}).save(path / "vocabulary.safetensors")
    return "vocabulary.safetensors is not in manifest.json"


def add_a_folder(path: Path) -> str:
    (path / "more").mkdir()
    return "more is not in manifest.json"


HARMS: dict[str, Callable[[Path], str]] = {
    **{f.__name__: f for f in (truncate, flip_a_bit, remove_metadata, remove_manifest, cut_manifest, change_progress)},
    **{f.__name__: f for f in (list_nothing, list_nothing_by_a_string, add_a_vocabulary, add_a_folder)},
    **{f"do not list {ending}": do_not_list(ending) for ending in (".distcp", ".metadata", "settings.json")},
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS.keys())
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, harm: Callable[[Path], str], caplog: pytest.LogCaptureFixture
) -> None:
    small, checkpoints = Small(0), Checkpoints(tmp_path)
    whole, damaged = small.save(checkpoints, 5), small.save(checkpoints, 10)
    assert checkpointing.damage(whole) is None and checkpointing.damage(damaged) is None
    problem = harm(damaged)
    assert checkpoints.newest() == whole
    assert str(damaged) in caplog.text and problem in caplog.text
    assert names(tmp_path) == ["damaged-step-00000010", whole.name]
    small.save(checkpoints, 10)  # the run comes by again
    assert checkpoints.newest() == damaged


def test_a_run_does_not_start_anew_where_all_checkpoints_are_damaged(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    truncate(Small(0).save(checkpoints, 5))
    for _ in range(2):  # nor when it is tried again
        with pytest.raises(ValueError, match=r"damaged-step-00000005.*remove them"):
            checkpoints.newest()


@pytest.mark.parametrize("calls", [0, 1, 2])
@pytest.mark.parametrize("stage", ["dcp.save", "_write_json", "_digests", "os.replace", "shutil.rmtree"])
@pytest.mark.parametrize("step", [5, 10])  # over the same name, and under another
def test_a_save_that_is_cut_short_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, calls: int, step: int
) -> None:
    class Cut(Exception):
        pass

    small, checkpoints, left = Small(0), Checkpoints(tmp_path, keep=1), calls
    before = small.save(checkpoints, 5)
    module, _, function = f"checkpointing.{stage}".rpartition(".")
    uncut = getattr(sys.modules.get(module) or getattr(checkpointing, module.rpartition(".")[2]), function)

    def cut(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Cut
        return uncut(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(f"checkpointing.{stage}", cut)
        try:
            small.save(checkpoints, step)
        except Cut:  # when the old ones are removed, the new one is whole
            expected = checkpoints.paths()[-1] if stage == "shutil.rmtree" else before
        else:  # there were no more calls to cut
            expected = checkpoints.paths()[-1]
    assert Checkpoints(tmp_path).newest() == expected
    after = small.save(checkpoints, 10)
    assert checkpoints.newest() == after
    assert names(tmp_path) == [after.name]  # what the cut save left is gone


def save_for_ever(folder: Path, connection: Any) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    small = Small(1)
    checkpoints = Checkpoints(folder)
    for steps in itertools.count(1):
        path = small.save(checkpoints, steps)
        if steps == 1:
            connection.send(path)


def test_two_runs_do_not_write_in_one_folder_and_a_dead_one_does_not_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "LOCK_SECONDS", 0.5)
    folder = tmp_path / "run"
    here, there = multiprocessing.get_context("spawn").Pipe()
    other = multiprocessing.get_context("spawn").Process(target=save_for_ever, args=(folder, there), daemon=True)
    other.start()
    try:
        assert here.recv() == folder / "step-00000001"
        (tmp_path / "link").symlink_to(folder)
        small = Small(0)
        said = rf"another run writes in {folder}: process {other.pid} on .* since"
        for mine in (Checkpoints(folder), Checkpoints(tmp_path / "link")):
            with pytest.raises(OSError, match=said):
                mine.newest()
            with pytest.raises(OSError, match=said):
                small.save(mine, 5)
    finally:
        other.kill()
        other.join()
    assert (folder / ".lock").exists()
    newest = Checkpoints(folder).newest()
    assert newest is not None and checkpointing.damage(newest) is None
    saved = small.save(Checkpoints(folder), 10**6)
    assert Checkpoints(folder).newest() == saved
    assert not list(folder.glob(".writing-*"))


def test_a_folder_that_was_removed_and_made_again_is_locked_again(tmp_path: Path) -> None:
    small, checkpoints = Small(0), Checkpoints(tmp_path / "run")
    small.save(checkpoints, 1)
    shutil.rmtree(tmp_path / "run")
    small.save(checkpoints, 1)
    lock = f"import fcntl; fcntl.flock(open('{tmp_path}/run/.lock'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    tried = subprocess.run([sys.executable, "-c", lock], capture_output=True, text=True)
    assert "BlockingIOError" in tried.stderr
    del checkpoints
    subprocess.run([sys.executable, "-c", lock], check=True)


def test_what_a_survivor_of_an_earlier_run_still_writes_is_in_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, checkpoints = Small(0), Checkpoints(tmp_path)
    writing: list[Any] = []
    save = dcp.save

    def beside_a_survivor(state: dict[str, Any], checkpoint_id: Path) -> None:
        for earlier in writing:  # it makes its folder again, or has it still
            earlier.mkdir(exist_ok=True)
            (earlier / "__1_0.distcp").write_bytes(b"weights of another run")
        writing.append(checkpoint_id)
        save(state, checkpoint_id=checkpoint_id)

    monkeypatch.setattr("checkpointing.dcp.save", beside_a_survivor)
    for _ in range(3):
        path = small.save(checkpoints, 5)
        assert checkpointing.damage(path) is None
        assert "__1_0.distcp" not in names(path)


def test_a_save_without_room_leaves_nothing_behind(tmp_path: Path) -> None:
    small, checkpoints = Small(0), Checkpoints(tmp_path)
    before = small.save(checkpoints, 5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(dcp.CheckpointException, match="File too large|enforce fail"):
            small.save(checkpoints, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == [before.name] and checkpoints.newest() == before


@pytest.mark.parametrize("within", [".", "more", "more/and/more"])
@pytest.mark.parametrize("prefix", ["", "damaged-", ".writing-"])
def test_a_checkpoint_is_no_folder_of_checkpoints(tmp_path: Path, prefix: str, within: str) -> None:
    path = Small(0).save(Checkpoints(tmp_path), 5)
    path = path.rename(path.with_name(prefix + path.name))
    (path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=rf"is in the checkpoint {path}; give the folder of the run, {tmp_path}"):
        Checkpoints(path / within)


# --- the trainer's parts -------------------------------------------------------------------------------------------


def test_other_settings_are_refused_by_name() -> None:
    data = {"train_rows": 80, "rows_digest": "1", "id_types": {}}
    then = {"arguments": {"dim": 8, "lr": 0.1, "epochs": 1, "data": "a"}, **data}
    now = {"arguments": {"dim": 8, "lr": 0.1, "epochs": 2, "data": "b", "new_option": 1}, **data}
    start_of_run.check_settings(then, now, Path("step-00000001"))
    with pytest.raises(ValueError, match="--data had other rows than b has"):
        start_of_run.check_settings(then, now | {"rows_digest": "2"}, Path("step-00000001"))
    now["arguments"]["lr"], now["arguments"]["dim"], now["train_rows"] = 0.2, 16, 90
    with pytest.raises(ValueError, match=r"--dim was 8, now 16; --lr was 0.1, now 0.2; --data had 80 rows .* now 90"):
        start_of_run.check_settings(then, now, Path("step-00000001"))


@pytest.mark.parametrize("row", [0, 799, 1400, 1999])
@pytest.mark.parametrize("column", ["click", "user", "price"])
def test_other_rows_of_the_same_number_are_told(tmp_path: Path, row: int, column: str) -> None:
    frame = pd.DataFrame({"click": [0, 1] * 1000, "user": range(2000), "price": np.linspace(0, 1, 2000)})

    def digest(name: str) -> str:
        frame.to_parquet(tmp_path / name)
        schema = Schema(categorical=("user",), numeric=("price",), label="click")
        return start_of_run.digest_of_rows(ParquetDataset(tmp_path / name, schema, Split()))

    before = digest("a.parquet")
    assert digest("moved.parquet") == before
    frame.loc[row, column] = 1 - frame.loc[row, column]
    assert digest("a.parquet") != before


def options_of_run(folder: Path, *options: str) -> argparse.Namespace:
    columns = ["--data", "-", "--label", "click", "--categorical", "user"]
    return arguments.parse_args([*columns, "--checkpoint-dir", str(folder), *options])


def test_a_run_that_cannot_be_resumed_is_not_started(tmp_path: Path) -> None:
    def problem(folder: Path) -> str:
        with pytest.raises(ValueError, match="--resume|checkpoint") as refused:
            start_of_run.open_checkpoints(options_of_run(folder, "--resume"), restarted=False)
        return str(refused.value)

    Small(0).save(Checkpoints(tmp_path / "runs" / "mine"), 5)
    (tmp_path / "killed" / ".writing-step-00000005-89abcdef").mkdir(parents=True)
    assert f"--resume: {tmp_path}/slip does not exist. Leave --resume out" in problem(tmp_path / "slip")
    assert not (tmp_path / "slip").exists()
    assert f"--resume: {tmp_path}/killed holds no checkpoint. Leave" in problem(tmp_path / "killed")
    assert f"holds no checkpoint; there are some in {tmp_path}/runs/mine. Leave" in problem(tmp_path / "runs")
    assert f"give the folder of the run, {tmp_path}/runs/mine" in problem(tmp_path / "runs" / "mine" / "step-00000005")


def test_a_run_is_resumed_or_started_as_it_is_told(tmp_path: Path) -> None:
    Small(0).save(Checkpoints(tmp_path / "run"), 5)
    for options, restarted in ((["--resume"], False), (["--resume", "auto"], False), ([], True), ([], False)):
        assert start_of_run.open_checkpoints(options_of_run(tmp_path / "run", *options), restarted).newest() is not None
        if options != ["--resume"]:
            found = start_of_run.open_checkpoints(options_of_run(tmp_path / "new", *options), restarted)
            assert found.newest() is None
    # A first attempt, which found something, may have died before it saved anything new.
    assert start_of_run.open_checkpoints(options_of_run(tmp_path / "new", "--resume"), restarted=True).newest() is None


def test_another_world_size_goes_on_at_the_same_share_of_the_epoch() -> None:
    progress = trainer.Progress(steps_per_epoch=40, epoch=3, step=10, steps=90, losses=(5.0, 3))
    moved = progress.with_steps_per_epoch(80)
    assert (moved.epoch, moved.step, moved.losses) == (3, 20, (5.0, 3))
    assert progress.with_steps_per_epoch(40) is progress


@pytest.mark.parametrize(
    ("steps", "per_epoch", "expected"), [(20, 3, [7, 14, 20]), (20, 1, [20]), (9, 3, [3, 6, 9]), (2, 3, [1, 2])]
)
def test_evaluations_are_spread_over_an_epoch_and_end_with_it(steps: int, per_epoch: int, expected: list[int]) -> None:
    progress = trainer.Progress(steps_per_epoch=steps)
    for step in expected:
        assert progress.next_evaluation(per_epoch) == step
        progress.evaluated += 1


def test_tables_keep_their_sharding_types_and_their_kind_of_optimizer() -> None:
    trained = {
        "world_size": 1,
        "arguments": {"optimizer": "adagrad"},
        "plan": {"t_item": {"sharding_type": "row_wise"}, "t_user": {"sharding_type": "data_parallel"}},
    }
    assert model.types_again(trained, "t_item", None) == ["row_wise"]
    assert model.types_again(trained, "t_item", ["column_wise", "data_parallel"]) == ["column_wise"]
    elsewhere = {**trained, "world_size": 4}
    assert "column_wise" in model.types_again(elsewhere, "t_item", None)
    assert "data_parallel" not in model.types_again(elsewhere, "t_item", None)
    assert model.types_again(elsewhere, "t_user", None) == ["data_parallel"]
    with pytest.raises(ValueError, match="t_user was data_parallel .* add data_parallel"):
        model.types_again(elsewhere, "t_user", ["row_wise"])
    # Row-wise state has a value for each row and column shard.
    by_row = {**elsewhere, "arguments": {"optimizer": "rowwise-adagrad"}}
    assert "column_wise" not in model.types_again(by_row, "t_item", None)
    by_row["plan"] = {"t_item": {"sharding_type": "column_wise"}}
    assert model.types_again(by_row, "t_item", None) == ["column_wise", "table_column_wise", "grid_shard"]
    assert "row_wise" in model.types_again({**by_row, "arguments": elsewhere["arguments"]}, "t_item", None)


def test_tables_whose_optimizer_would_end_in_nan_are_not_replicated() -> None:
    lma = ["--table", "lma", "--sharding-types", "data_parallel"]
    assert "dense" not in model.allowed_kernels(train.parse_args([*lma, "row_wise"]))
    assert model.allowed_kernels(train.parse_args([*lma, "--data-type", "FP32"])) is None
    with pytest.raises(ValueError, match="data_parallel tables train in FP32 only, these are FP16"):
        model.allowed_kernels(train.parse_args(lma))


# --- real runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    numbers = np.random.default_rng(0)
    user, item = numbers.integers(0, 50, ROWS), numbers.integers(0, 30, ROWS)
    frame = pd.DataFrame(
        {
            "click": (numbers.random(ROWS) < 0.2 + 0.5 * (user % 3 == 0)).astype("int8"),
            "user": (user.astype(np.int64) << 40) - 7,
            "item": [f"item-{i}" for i in item],
            "price": item * 1.5,
        }
    )
    path = tmp_path_factory.mktemp("data") / "clicks.parquet"
    frame.to_parquet(path)
    return path


def start(
    data: Path, folder: Path, *options: str, ranks: int = 2, restarts: int = 0, fault: Fault | None = None
) -> subprocess.CompletedProcess[str]:
    """A run to its end, with checkpoints in `folder`."""
    torchrun = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"] if ranks > 1 else None
    done = launch(torchrun, data, folder, *options, environment=fault.to_environment() if fault is not None else {})
    try:
        output, errors = done.communicate(timeout=240)
    finally:
        done.terminate()  # of a run that hangs torchrun ends the ranks
    return subprocess.CompletedProcess(done.args, done.returncode, output, errors)


def launch(
    torchrun: list[str] | None, data: Path, folder: Path, *options: str, environment: dict[str, str]
) -> subprocess.Popen[str]:
    program = [sys.executable, str(FAULTY_TRAIN)]
    if torchrun is not None:
        program = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *torchrun,
            "--monitor-interval=0.1",
            str(FAULTY_TRAIN),
        ]
    columns = ["--label", "click", "--categorical", "user", "item", "--numeric", "price"]
    model = ["--dim", "8", "--compression", "2", "--dense-layers", "8", "--over-layers", "8"]
    run = ["--batch-size", str(BATCH_SIZE), "--epochs", str(EPOCHS), "--patience", "9", "--split", "time"]
    checkpoints = ["--checkpoint-dir", str(folder), "--checkpoint-every", str(EVERY), "--json", f"{folder}.json"]
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [*program, "--data", str(data), *columns, *model, *run, *checkpoints, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=inherited | environment,
    )


def assert_ended_alike(folder: Path, undisturbed: Path, checkpoint: str = "step-00000040") -> None:
    mine, theirs = tensors(folder / checkpoint), tensors(undisturbed / checkpoint)
    assert mine.keys() == theirs.keys()
    assert {name.split(".")[0] for name in mine if "embedding_bags" in name} == {"model", "optimizer"}
    different = [name for name in theirs if not torch.equal(mine[name], theirs[name])]
    assert not different
    records = [json.loads(Path(f"{run}.json").read_text()) for run in (folder, undisturbed)]
    assert records[0]["evaluations"] == records[1]["evaluations"]  # losses and AUCs to the last digit


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGHUP))],
)
def test_a_signal_saves_and_says_run_me_again(clicks: Path, tmp_path: Path, number: signal.Signals) -> None:
    fault = Fault(number, rank=0, step=7, done=str(tmp_path / "done"))
    done = start(clicks, tmp_path / "run", ranks=1, fault=fault)
    assert done.returncode == train.EXIT_TERMINATED == 75, done.stderr[-3000:]
    newest = Checkpoints(tmp_path / "run").paths()[-1]
    assert newest.name == "step-00000008"  # the step under way was finished
    assert checkpointing.damage(newest) is None
    assert json.loads((newest / "progress.json").read_text())["step"] == 8


@pytest.fixture(scope="module")
def undisturbed(clicks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = start(clicks, folder, "--keep", "20")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_rank_is_restarted_and_the_run_ends_in_the_same_bits(
    clicks: Path, tmp_path: Path, undisturbed: Path, seed: int
) -> None:
    numbers = random.Random(seed)
    step, rank = numbers.randrange(1, EPOCHS * STEPS), numbers.randrange(2)
    fault = Fault(signal.SIGKILL, rank, step, done=str(tmp_path / "done"))
    done = start(clicks, tmp_path / "run", restarts=1, fault=fault)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path(fault.done).exists()
    if step > EVERY:
        assert "resuming" in done.stdout
    assert_ended_alike(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_rank_killed_on_one_of_two_nodes_is_restarted_with_those_of_the_other(
    clicks: Path, tmp_path: Path, undisturbed: Path
) -> None:
    fault = Fault(signal.SIGKILL, rank=1, step=EVERY + 3, done=str(tmp_path / "done"))
    component = lma.train(j="2x1", max_restarts=2).roles[0].env  # what the torchx component sets for several nodes
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    torchrun = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
    nodes = [
        launch(
            [*torchrun, "--rdzv-id=restart"],
            clicks,
            tmp_path / "run",
            environment=component | fault.to_environment(),
        )
        for _ in range(2)
    ]
    try:
        ended = [node.communicate(timeout=150) for node in nodes]
    finally:
        for node in nodes:
            node.terminate()
    assert [node.returncode for node in nodes] == [0, 0], ended
    assert Path(fault.done).exists() and any("resuming" in output for output, _ in ended)
    assert_ended_alike(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["progress.json", "manifest.json"])
def test_a_rank_killed_during_a_save_leaves_nothing_half_written(
    clicks: Path, tmp_path: Path, undisturbed: Path, file: str
) -> None:
    fault = Fault(signal.SIGKILL, rank=0, step=0, file=file, save=2, done=str(tmp_path / "done"))
    done = start(clicks, tmp_path / "run", "--keep", "20", restarts=1, fault=fault)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming {tmp_path / 'run' / 'step-00000007'}" in done.stdout
    steps = sorted({*range(EVERY, 2 * STEPS, EVERY), *EVALUATIONS, *(STEPS + step for step in EVALUATIONS)})
    assert names(tmp_path / "run") == [f"step-{step:08d}" for step in steps]
    assert all(checkpointing.damage(path) is None for path in (tmp_path / "run").glob("step-*"))
    assert_ended_alike(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_sigterm_at_one_rank_stops_all_and_the_resumed_run_ends_in_the_same_bits(
    clicks: Path, tmp_path: Path, undisturbed: Path
) -> None:
    fault = Fault(signal.SIGTERM, rank=1, step=STEPS + 3, done=str(tmp_path / "done"))
    done = start(clicks, tmp_path / "run", fault=fault)
    assert done.returncode != 0
    assert re.findall(r"exitcode +: (\d+)", done.stderr) and set(re.findall(r"exitcode +: (\d+)", done.stderr)) == {
        "75"
    }
    assert Checkpoints(tmp_path / "run").paths()[-1].name == "step-00000024"
    refused = start(clicks, tmp_path / "run")
    assert refused.returncode != 0 and "--resume" in refused.stderr  # does not mix with the old run
    changed = start(clicks, tmp_path / "run", "--resume", "--lr", "0.125")
    assert changed.returncode != 0 and "--lr was 0.05, now 0.125" in changed.stderr
    done = start(clicks, tmp_path / "run", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_ended_alike(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_run_resumes_from_before_a_damaged_checkpoint_to_the_same_bits(
    clicks: Path, tmp_path: Path, undisturbed: Path
) -> None:
    done = start(clicks, tmp_path / "run", "--max-steps", "12")
    assert done.returncode == 0, done.stderr[-3000:]
    assert names(tmp_path / "run") == ["step-00000007", "step-00000010", "step-00000012"]  # the first is the best
    newest = tmp_path / "run" / "step-00000012"
    file = sorted(newest.glob("*.distcp"))[-1]
    os.truncate(file, 100)
    done = start(clicks, tmp_path / "run", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"checkpoint {newest} is damaged ({file.name} has SHA-256" in done.stderr
    assert "step-00000010: epoch 1, step 10 of 20" in done.stdout
    assert_ended_alike(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_torchrun_saves_and_the_resumed_run_ends_in_the_same_bits(
    clicks: Path, tmp_path: Path, undisturbed: Path, number: signal.Signals
) -> None:
    fault = Fault(number, rank=0, step=8, done=str(tmp_path / "done"), to_torchrun=True)
    done = start(clicks, tmp_path / "run", restarts=1, fault=fault)
    assert done.returncode != 0
    # How far the ranks are when torchrun passes the signal on is up to the machine; it can be the same step.
    newest = Checkpoints(tmp_path / "run").paths()[-1]
    saved = json.loads((newest / "progress.json").read_text())
    assert saved["steps"] >= fault.step and newest.name == f"step-{saved['steps']:08d}"
    assert f"stopped: saved in {tmp_path / 'run'} at epoch {saved['epoch']}, step {saved['step']}" in done.stdout
    done = start(clicks, tmp_path / "run", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_ended_alike(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--table", "full"),
        ("--table", "full", "--dim", "4", "--data-type", "FP16"),
        ("--data-type", "FP32", "--sharding-types", "data_parallel", "--optimizer", "adagrad"),
        ("--raw-ids", "--evaluations-per-epoch", "1"),
    ],
)
def test_other_tables_and_optimizers_resume_to_the_same_bits(
    clicks: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    for folder, steps in (("whole", "60"), ("run", "33"), ("run", "60")):
        done = start(clicks, tmp_path / folder, *options, "--resume", "auto", "--max-steps", steps, ranks=1)
        assert done.returncode == 0, done.stderr[-3000:]
    assert_ended_alike(tmp_path / "run", tmp_path / "whole", "step-00000060")


def test_a_run_whose_weights_are_ruined_stops_and_leaves_the_checkpoint_before(clicks: Path, tmp_path: Path) -> None:
    fault = Fault(signal=0, rank=0, step=2 * EVERY, done="")  # found before the step's checkpoint is written
    done = start(clicks, tmp_path / "run", ranks=1, fault=fault)
    assert done.returncode == 1
    assert f"a weight is NaN or infinite in epoch 1, after {fault.step} steps in all" in done.stderr
    (newest,) = Checkpoints(tmp_path / "run").paths()
    assert newest.name == f"step-{EVERY:08d}" and checkpointing.damage(newest) is None


@pytest.mark.slow
def test_checkpoints_of_more_ranks_follow_those_of_fewer(clicks: Path, tmp_path: Path) -> None:
    # 30 of 40 steps are 15 of 20: the checkpoints of two ranks must still come after that of one.
    for ranks, steps in ((1, "30"), (2, "32"), (2, "34")):
        done = start(clicks, tmp_path / "run", "--resume", "auto", "--keep", "1", "--max-steps", steps, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        assert names(tmp_path / "run")[-1] == f"step-000000{steps}"
    assert "step-00000032: epoch 1, step 17 of 20" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, checkpoint, said",
    [(1, "step-00000010", "epoch 1, step 20 of 40"), (3, "step-00000020", "epoch 2, step 0 of 13")],
)
def test_a_run_resumes_on_another_number_of_ranks(
    clicks: Path, tmp_path: Path, undisturbed: Path, ranks: int, checkpoint: str, said: str
) -> None:
    shutil.copytree(undisturbed / checkpoint, tmp_path / "run" / checkpoint)
    done = start(clicks, tmp_path / "run", "--resume", ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    assert said in done.stdout
    record = json.loads((tmp_path / "run.json").read_text())
    there = json.loads((undisturbed / "step-00000040" / "progress.json").read_text())["evaluations"]
    assert record["world_size"] == ranks
    assert [entry["epoch"] for entry in record["evaluations"]] == [1, 1, 1, 2, 2, 2]
    assert record["evaluations"][0] == there[0]
    # Not the same batches any more, but it goes on learning from where it was.
    assert record["evaluations"][-1]["train_loss"] < there[0]["train_loss"]
