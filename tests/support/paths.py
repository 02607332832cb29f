"""Where the repository has what tests run. pytest puts tests/ and both folders of examples on the path (setup.cfg)."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"
DLRM = EXAMPLES / "dlrm"
BENCHMARKS = EXAMPLES / "benchmarks"
