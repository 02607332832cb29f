"""The load test and the soak, briefly: real servers in processes of their own, two models whose answers are known."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from support.paths import BENCHMARKS
from support.running_server import save_model

SCRIPT = BENCHMARKS / "serving_load.py"
IDS, FLOATS = ("user", "item"), ("price",)


def run(tmp_path: Path, *options: str) -> Any:
    random = np.random.default_rng(0)
    columns = {"label": random.integers(0, 2, 400), "price": random.uniform(size=400)}
    columns |= {name: random.integers(0, 2**40, 400) for name in IDS}
    pd.DataFrame(columns).to_parquet(tmp_path / "rows.parquet")
    models = [save_model(tmp_path / f"{bias}.pt", bias=bias, floats=FLOATS, ids=IDS) for bias in (0, 1)]
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--rows", "4", "--rate", "30"]
    command += [f"--model={path.stem}={path}" for path in models]
    command += ["--data", str(tmp_path / "rows.parquet"), "--label", "label", "--numeric", *FLOATS]
    command += ["--categorical", *IDS, "--json", str(tmp_path / "result.json"), *options]
    subprocess.run(command, check=False, timeout=300)
    return json.loads((tmp_path / "result.json").read_text())


@pytest.mark.slow
def test_load_is_measured_for_each_model(tmp_path: Path) -> None:
    result = run(tmp_path, "--seconds", "2", "--rounds", "2")
    assert set(result) == {"0", "1"}
    for rounds in result.values():
        for measured in rounds:
            assert measured["right"] > 20
            assert not [name for name in measured if name.startswith(("wrong", "failed", "not_sent"))]
            assert 0 < measured["p50_ms"] <= measured["p99_ms"]


@pytest.mark.slow
def test_soak_finds_no_wrong_answer(tmp_path: Path) -> None:
    result = run(tmp_path, "--soak", "0.5", "--swap-seconds", "2")
    assert result["right"] > 100
    assert result["bad_refused"] > 5
    assert result["models_loaded"] > 2
    assert not [name for name in result if name.startswith(("wrong", "failed", "bad_answered", "not_sent"))]
    assert result["models_refused"] == []
    assert result["exit_status"] == 0
