"""examples/quickstart.py, run as a newcomer runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.py"


@pytest.mark.slow
def test_quickstart_compares_three_types_of_tables() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", QUICKSTART], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = re.findall(r"^(.*?) +([\d,]+) bytes +test AUC (0\.\d+)$", done.stdout, re.MULTILINE)
    names, sizes, aucs = zip(*found)
    assert names == ("full, dim 64", "full, dim 8, FP16", "LMA, dim 64, FP16")
    full, smaller, lma = (int(size.replace(",", "")) for size in sizes)
    assert smaller * 16 == full
    assert lma * 16 <= full
    assert min(map(float, aucs)) > 0.76  # always predicting an item's mean rating reaches 0.70
