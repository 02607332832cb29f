"""examples/benchmarks/gpu_check.py on the CPU: its form, and its references where FBGEMM has a CPU kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import BENCHMARKS

GPU_CHECK = BENCHMARKS / "gpu_check.py"


@pytest.mark.slow
def test_checks_that_a_cpu_can_run_pass_and_are_written_down(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(GPU_CHECK), "--device", "cpu", "--repeats", "2"]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    left_out = {outcome["check"] for outcome in record["checks"] if outcome["status"] == "left out"}
    assert left_out == {"sharded, fused Adam", "UVM caching, prefetched"}
    assert all(outcome["status"] == "passed" for outcome in record["checks"] if outcome["check"] not in left_out)
    assert [row["tables"] for row in record["speed"]] == ["full", "LMA FP16", "LMA FP32", "hashing trick"]
    page = (tmp_path / "out" / "gpu_check.md").read_text()
    assert all(f"| {outcome['check']} | {outcome['status']} |" in page for outcome in record["checks"])


def test_without_a_gpu_the_command_says_how_to_run_it_for_form(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(GPU_CHECK), "--out", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "torch finds no CUDA GPU; --device cpu runs" in done.stderr
