"""examples/benchmarks/accuracy.py: methods fit their budget and look up what they say; what is found is told right."""

import json
import subprocess
import sys
from pathlib import Path

import accuracy
import numpy as np
import pandas as pd
import pytest
import torch
from accuracy_data import Data, load
from accuracy_methods import METHODS, Budget, NotPossible, QuotientRemainder, as_features, find_method
from torchrec.modules.embedding_configs import DataType

from support.paths import BENCHMARKS


@pytest.fixture(scope="module")
def data() -> Data:
    """Columns of 4, 60 and 900 values whose frequencies follow Zipf's law."""
    rng = np.random.default_rng(0)
    n, sizes = 5000, (4, 60, 900)
    ids = np.stack([np.minimum(rng.zipf(1.2, n) - 1, size - 2) for size in sizes], 1)
    counts = tuple(np.bincount(ids[:4000, i], minlength=size) for i, size in enumerate(sizes))
    return Data(("a", "b", "c"), ids, sizes, counts, (rng.random(n) < 0.3).astype(np.float32), (4000, 4500, n))


@pytest.mark.parametrize("compression", [4, 16])
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"full"}))
def test_methods_fit_their_budget_and_count_their_bytes(data: Data, name: str, compression: float) -> None:
    budget = Budget(data, 64, compression)
    assert budget.full == 964 * 64 * 4
    method = METHODS[name](budget, 0)
    collection = method.make()
    weights = sum(p.numel() * p.element_size() for p in collection.parameters())
    assert weights <= method.bytes <= budget.bytes * 1.001 and method.bytes > 0.9 * budget.bytes
    if not name.startswith(("LMA", "paper")):
        assert weights == method.bytes
    out = collection(as_features(method.columns, method.ids[:7]))
    dim = collection.embedding_bag_configs()[0].embedding_dim
    assert out.keys() == ["a", "b", "c"] and out.values().shape == (7, 3 * dim) and bool(out.values().isfinite().all())


def test_narrow_smaller_dims_own_a_row_for_every_id(data: Data) -> None:
    method = METHODS["dim FP16"](Budget(data, 64, 64), 0)
    collection = method.make()
    assert collection.embedding_bag_configs()[2].embedding_dim == 2
    seen = torch.from_numpy(data.counts[2].nonzero()[0])
    (rows,) = collection.rows("t_c", seen).values()  # type: ignore[operator]
    assert rows.unique().numel() == seen.numel()
    with pytest.raises(NotPossible, match=r"no FP16 rows of 0\.5 columns"):
        METHODS["dim FP16"](Budget(data, 64, 256), 0)


def test_hashing_keeps_small_tables_whole(data: Data) -> None:
    method = METHODS["hashing"](Budget(data, 64, 16), 0)
    assert np.array_equal(method.ids[:, 0], data.ids[:, 0])
    assert len(np.unique(method.ids[:, 2])) < len(np.unique(data.ids[:, 2]))
    same = data.ids[:, 2] == data.ids[0, 2]
    assert (method.ids[same, 2] == method.ids[0, 2]).all()


def test_hot_ids_own_a_row_and_the_others_share(data: Data) -> None:
    method = METHODS["hot and hashed"](Budget(data, 64, 16), 0)
    pairs = np.unique(np.stack([data.ids[:, 2], method.ids[:, 2]], 1), axis=0)
    sharers = np.bincount(pairs[:, 1])[pairs[:, 1]]
    hot = pairs[:, 0] < 20
    assert (sharers[hot] == 1).all() and sharers[~hot].max() > 1


def test_quotients_and_remainders_tell_ids_apart_and_are_multiplied(data: Data) -> None:
    method = METHODS["quotient-remainder"](Budget(data, 64, 8), 0)
    collection = method.make()
    assert isinstance(collection, QuotientRemainder) and method.columns == ("a", "b", "c", "c_quotient")
    pairs = np.unique(np.stack([data.ids[:, 2], method.ids[:, 2], method.ids[:, 3]], 1), axis=0)
    assert len(pairs) == len(np.unique(data.ids[:, 2])) == len(np.unique(pairs[:, 1:], axis=0))
    out = collection(as_features(method.columns, method.ids[:5])).to_dict()["c"]
    weights = {name: bag.weight for name, bag in collection.inner.embedding_bags.items()}
    expected = weights["t_c"].float()[method.ids[:5, 2]] * weights["t_c_quotient"].float()[method.ids[:5, 3]]
    assert torch.equal(out, expected)


def test_settings_of_lma_are_methods_too(data: Data) -> None:
    method = find_method("LMA widths=8,56 skew=0.5 data_type=FP32")(Budget(data, 64, 16), 0)
    levels = [t for t in method.make().levels.embedding_bag_configs() if "level" in t.name]  # type: ignore[union-attr]
    assert [t.embedding_dim for t in levels] == [8, 56] and levels[0].data_type == DataType.FP32
    for wrong in ("LMA fast", "levels"):
        with pytest.raises(ValueError, match="no method"):
            find_method(wrong)


def test_the_search_stops_where_both_neighbours_are_worse() -> None:
    def searched(best: float) -> list[tuple[float, int]]:
        asked: list[tuple[float, int]] = []

        def run(lr: float, seed: int) -> float:
            asked.append((lr, seed))
            return -abs(np.log2(lr / best))

        accuracy.search(run, [0, 1], None)
        return asked

    assert searched(0.1) == [(0.1, 0), (0.05, 0), (0.2, 0), (0.1, 1)]
    assert searched(0.4) == [(0.1, 0), (0.05, 0), (0.2, 0), (0.4, 0), (0.8, 0), (0.4, 1)]
    assert len(searched(100.0)) == accuracy.MOST_RATES + 1


def test_the_table_shows_the_rate_of_the_best_validation_and_errors_over_seeds() -> None:
    cell = {"data": "d", "model": "dlrm", "method": "LMA", "dim": 64, "compression": 16.0, "bytes": 9}
    found = [(0.1, 0, 0.71, 0.60), (0.05, 0, 0.72, 0.61), (0.025, 0, 0.70, 0.9), (0.05, 1, 0.73, 0.63)]
    records = [
        cell | {"lr": lr, "seed": seed, "validation_auc": validation, "test_auc": test, "test_log_loss": 0.5}
        for lr, seed, validation, test in found
    ]
    (row,) = accuracy.summarise(records)
    assert row["lr"] == 0.05 and row["seeds"] == 2 and not row["edge"]
    assert row["test_auc"] == pytest.approx(0.62) and row["test_auc_error"] == pytest.approx(0.01)


def test_a_file_of_ones_own_is_run_and_not_run_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"u": rng.integers(0, 50, 2000), "i": rng.choice(["x", "y", None], 2000), "when": range(2000)})
    frame["click"] = (frame.u % 2 == 0).astype(int)
    frame.to_parquet(tmp_path / "mine.parquet")
    data = load("parquet", tmp_path / "mine.parquet", "click", None, "u*i", "when")
    assert data.columns == ("u", "i", "u_x_i") and data.sizes[1] == 4  # x, y, missing, and unseen
    assert all((np.diff(counts) <= 0).all() for counts in data.counts)
    options = ["--data", "parquet", "--path", tmp_path / "mine.parquet", "--label", "click", "--time", "when"]
    options += ["--out", tmp_path / "out", "--methods", "LMA", "--compression", "4", "--lr", "0.1", "--seeds", "0"]
    command = [sys.executable, "-W", "ignore", BENCHMARKS / "accuracy.py", *options, "--json"]
    first = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert first[0]["test_auc"] > 0.9 and first[0]["data"] == "mine" and first[0]["test_auc_error"] is None
    lines = (tmp_path / "out/results.jsonl").read_text()
    again = subprocess.run([*command, "--plot", tmp_path / "p.png"], check=True, capture_output=True, text=True)
    assert json.loads(again.stdout) == first and (tmp_path / "out/results.jsonl").read_text() == lines
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
