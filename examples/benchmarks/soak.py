"""A long training run whose ranks are killed again and again: does it end in the right bits, and does it leak?

    python examples/benchmarks/soak.py --minutes 30 --kill-every 120 --json soak.json

Trains examples/dlrm/train.py under torchrun on two ranks and sends SIGKILL to a random one every `--kill-every`
seconds, SIGTERM to all at the end. Then the same steps undisturbed, and all tensors of the two last checkpoints are
compared bit by bit. The disturbed run saves very often and the other one after evaluations, so it is faster.

RAM is read from /proc/PID/smaps_rollup. `anonymous` is what the process has allocated; `RSS` also counts the pages
of libraries and data files that happen to be mapped in, which grow as code is first used. Drift within a lifetime is
the median of the last third of the samples after the warm-up against that of the first third; drift across lifetimes
is the furthest median of a lifetime from that of the first one. Exits with status 1 if a bit differs, if a rank died
that was not killed, or if a drift is above 2%.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from torchrec_lma.files import replacing

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "examples" / "dlrm"))

from checkpointing import Checkpoints, damage  # noqa: E402

SAMPLE_SECONDS = 1.0
MAX_DRIFT = 0.02
DATA = ["--data", "movielens-100k", "--dim", "16", "--compression", "16"]
TRAINING = ["--table", "lma", "--batch-size", "128", "--epochs", "1000000", "--patience", "1000000"]
# malloc and Arrow keep what was freed for later use; how much depends on chance, 10 MiB more or less in 390. So that
# this does not hide a leak, they are told to give it back.
GIVE_BACK = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}
MEASURES = ("anonymous", "rss")


@dataclass
class Lifetime:
    """One process of one rank.

    Attributes:
        samples: (seconds since it started, {measure: bytes}), oldest first.
    """

    rank: int
    pid: int
    started: float
    samples: list[tuple[float, dict[str, int]]] = field(default_factory=list)

    def after(self, warm_up: float, measure: str) -> list[int]:
        return [memory[measure] for age, memory in self.samples if age >= warm_up]

    def drift(self, warm_up: float, measure: str) -> float | None:
        """Last third against first third; None where the process was too short-lived to tell."""
        values = self.after(warm_up, measure)
        third = len(values) // 3
        return statistics.median(values[-third:]) / statistics.median(values[:third]) - 1 if third >= 3 else None


class Run:
    """A training run under torchrun, its ranks watched through /proc."""

    def __init__(self, folder: Path, allocation: Path, options: list[str], restarts: int) -> None:
        self.folder = folder
        self.lifetimes: dict[int, Lifetime] = {}  # by pid
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        train = [str(REPOSITORY / "examples" / "dlrm" / "train.py"), *DATA, *TRAINING, "--allocation", str(allocation)]
        self.log = folder.with_suffix(".log").open("w")
        self.process = subprocess.Popen(
            [*torchrun, f"--max-restarts={restarts}", *train, "--checkpoint-dir", str(folder), *options],
            cwd=REPOSITORY,
            env=os.environ | GIVE_BACK,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def ranks(self) -> dict[int, int]:
        """pid of each living rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return {rank: pid for pid in map(int, children) if (rank := _rank_of(pid)) is not None}

    def watch(self, until: float | None = None) -> None:
        """Samples the ranks until then, or until the run ends. Raises RuntimeError if it ends before."""
        while until is None or time.monotonic() < until:
            if self.process.poll() is not None:
                if until is None and self.process.returncode == 0:
                    return
                raise RuntimeError(f"the run ended with status {self.process.returncode}; see {self.log.name}")
            for rank, pid in self.ranks().items():
                life = self.lifetimes.setdefault(pid, Lifetime(rank, pid, time.monotonic()))
                memory = _memory(pid)
                if memory is not None:
                    life.samples.append((time.monotonic() - life.started, memory))
            time.sleep(SAMPLE_SECONDS)

    def stop(self) -> None:
        """SIGTERM, as a scheduler sends it; torchrun passes it on and waits for the ranks to save."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)

    def newest(self) -> Path:
        path = Checkpoints(self.folder).paths()[-1]
        if (problem := damage(path)) is not None:
            raise RuntimeError(f"{path} is damaged: {problem}")
        return path


def _rank_of(pid: int) -> int | None:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has just ended
        return None
    return next((int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")), None)


def _memory(pid: int) -> dict[str, int] | None:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    kilobytes = {name.rstrip(":"): int(value) for name, value, *_ in map(str.split, lines)}
    return {"rss": 1024 * kilobytes["Rss"], "anonymous": 1024 * kilobytes["Anonymous"]} if kilobytes else None


def disturb(run: Run, minutes: float, kill_every: float, seed: int) -> list[dict[str, Any]]:
    """Kills ranks until the time is over, then stops the run; returns what was killed and when."""
    numbers, kills = random.Random(seed), []
    began = time.monotonic()
    end = began + 60 * minutes
    while time.monotonic() + kill_every < end:
        run.watch(until=time.monotonic() + kill_every)
        ranks = run.ranks()
        rank = numbers.choice(sorted(ranks))
        os.kill(ranks[rank], signal.SIGKILL)
        kills.append({"second": round(time.monotonic() - began, 1), "rank": rank})
        newest = Checkpoints(run.folder).paths()[-1:]
        print(
            f"[{kills[-1]['second']:6.0f} s] killed rank {rank}; newest checkpoint {newest[0].name if newest else '-'}"
        )
    run.watch(until=end)
    run.stop()
    return kills


def compare(mine: Path, theirs: Path) -> tuple[int, list[str]]:
    """How many tensors of model and optimizer two checkpoints have, and the names of those that differ in a bit."""
    sides = [tensors(path) for path in (mine, theirs)]
    names = sides[0].keys() | sides[1].keys()
    different = [
        name
        for name in sorted(names)
        if any(name not in side for side in sides) or not torch.equal(sides[0][name], sides[1][name])
    ]
    return len(names), different


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's model and optimizer, read on one process."""
    with tempfile.TemporaryDirectory() as folder:
        dcp_to_torch_save(checkpoint, Path(folder) / "whole.pt")
        state = torch.load(Path(folder) / "whole.pt", weights_only=False)
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name.startswith(("model.", "optimizer."))
    }


def drifts(run: Run, warm_up: float) -> dict[str, dict[str, float | None]]:
    """The worst of the run's drifts, as a share: within a lifetime, and across the lifetimes of a rank."""
    result: dict[str, dict[str, float | None]] = {}
    for measure in MEASURES:
        lives = list(run.lifetimes.values())
        within = [drift for life in lives if (drift := life.drift(warm_up, measure)) is not None]
        across = []
        for rank in sorted({life.rank for life in lives}):
            own = [life.after(warm_up, measure) for life in lives if life.rank == rank]
            medians = [statistics.median(values) for values in own if len(values) >= 9]
            across += [median / medians[0] - 1 for median in medians[1:]]
        result[measure] = {"within": max(within, key=abs, default=None), "across": max(across, key=abs, default=None)}
    return result


def print_lifetimes(title: str, run: Run, warm_up: float) -> None:
    print(f"\n{title}\n{'rank':>4}{'seconds':>9}{'anonymous, median':>20}{'drift':>8}{'RSS, median':>14}{'drift':>8}")
    for life in run.lifetimes.values():
        if not life.samples:
            continue
        line = f"{life.rank:>4}{life.samples[-1][0]:>9.0f}"
        for measure, width in (("anonymous", 20), ("rss", 14)):
            values, drift = life.after(warm_up, measure), life.drift(warm_up, measure)
            line += f"{statistics.median(values) / 2**20:>{width - 4}.1f} MiB" if values else f"{'-':>{width}}"
            line += f"{drift:>+8.2%}" if drift is not None else f"{'-':>8}"
        print(line)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="of the disturbed run (default: %(default)s)")
    parser.add_argument("--kill-every", type=float, default=120, metavar="SECONDS", help="(default: %(default)s)")
    parser.add_argument(
        "--warm-up", type=float, default=60, metavar="SECONDS", help="of a process (default: %(default)s)"
    )
    parser.add_argument("--checkpoint-every", type=int, default=2, metavar="N", help="steps (default: %(default)s)")
    parser.add_argument("--allocation", type=Path, metavar="FILE", help="without it one is built first")
    parser.add_argument("--seed", type=int, default=0, help="of which ranks are killed (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="keeps checkpoints and logs (default: a temporary folder)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record, every sample of RAM included")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.warm_up >= args.kill_every:
        raise SystemExit(
            f"--warm-up {args.warm_up} must be below --kill-every {args.kill_every}: nothing is left to measure"
        )
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        return soak(args, args.out.resolve() if args.out is not None else Path(temporary))


def soak(args: argparse.Namespace, out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    allocation = args.allocation.resolve() if args.allocation is not None else out / "allocation.safetensors"
    if args.allocation is None:  # else the first lifetime would build it and the later ones load it: not alike
        command = [sys.executable, "-m", "torchrec_lma.cli", "allocate", *DATA, "--out", str(allocation)]
        subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)

    restarts = int(60 * args.minutes / args.kill_every) + 1
    every = ["--checkpoint-every", str(args.checkpoint_every)]
    disturbed = Run(out / "disturbed", allocation, every, restarts)
    try:
        kills = disturb(disturbed, args.minutes, args.kill_every, args.seed)
    finally:
        disturbed.process.terminate()
    steps = json.loads((disturbed.newest() / "progress.json").read_text())["steps"]
    print(f"{len(kills)} kills in {args.minutes:g} minutes, {steps} steps; now the same steps undisturbed", flush=True)

    began = time.monotonic()
    undisturbed = Run(out / "undisturbed", allocation, ["--max-steps", str(steps)], 0)
    try:
        undisturbed.watch()
    finally:
        undisturbed.process.terminate()
    undisturbed_seconds = time.monotonic() - began
    compared, different = compare(disturbed.newest(), undisturbed.newest())
    progress = [json.loads((run.newest() / "progress.json").read_text()) for run in (disturbed, undisturbed)]

    runs = {"disturbed": disturbed, "undisturbed": undisturbed}
    print_lifetimes("disturbed run", disturbed, args.warm_up)
    print_lifetimes("undisturbed run", undisturbed, args.warm_up)
    worst = {name: drifts(run, args.warm_up) for name, run in runs.items()}
    unexpected = len(disturbed.lifetimes) // 2 - 1 - len(kills)
    print(
        f"\n{len(kills)} kills, {unexpected} other restarts; {steps} steps, undisturbed in {undisturbed_seconds:.0f} s"
    )
    print(
        f"{compared - len(different)} of {compared} tensors have the same bits"
        + "".join(f"\n  not {n}" for n in different)
    )
    same = progress[0]["evaluations"] == progress[1]["evaluations"]
    print(f"losses and AUCs of the {len(progress[0]['evaluations'])} evaluations are {'' if same else 'NOT '}the same")
    for name, measures in worst.items():
        for measure, drift in measures.items():
            parts = [f"{where} lifetimes {value:+.2%}" for where, value in drift.items() if value is not None]
            print(f"{name} run, {measure} bytes, worst drift: {', '.join(parts) or 'too short to tell'}")
    if args.json is not None:
        record = {
            "arguments": {name: str(value) for name, value in vars(args).items()},
            "kills": kills,
            "other_restarts": unexpected,
            "steps": steps,
            "undisturbed_seconds": undisturbed_seconds,
            "tensors": compared,
            "different": different,
            "drift": worst,
            "lifetimes": {name: [asdict(life) for life in run.lifetimes.values()] for name, run in runs.items()},
        }
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(record))
    values = [value for measures in worst.values() for drift in measures.values() for value in drift.values()]
    leaks = any(value is not None and abs(value) > MAX_DRIFT for value in values)
    return 1 if different or not same or unexpected or leaks else 0


if __name__ == "__main__":
    sys.exit(main())
