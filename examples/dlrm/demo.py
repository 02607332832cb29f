"""The demo: full tables, a smaller dim and LMA tables on MovieLens-100K, each step launched through torchx.

    make demo        or        python examples/dlrm/demo.py --out runs/demo --seeds 3

Allocates from the training rows and trains three kinds of tables on two ranks: full ones of dim 64 in FP32; full ones
of a smaller dim in FP16; and LMA tables of dim 64 in the bytes of the smaller ones. Prints what they reach and what
they cost, and leaves the runs' JSON records, `summary.json` and `auc_against_memory.png` in --out. Then it exports the
first LMA model in INT8, as of its best evaluation, serves it, and scores the test rows over gRPC.

Each has the learning rate that reached the best validation AUC; --search repeats that search first.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from torchrec_lma.files import replacing

REPOSITORY = Path(__file__).resolve().parents[2]
COMPRESSION, DIM = 16, 64
SMALLER_DIM = 2 * DIM // COMPRESSION  # in FP16
DATA = ["--data", "movielens-100k"]
LMA = ["--dim", str(DIM), "--compression", str(COMPRESSION)]
TABLES = {
    "full": ["--table", "full", "--dim", str(DIM)],
    "smaller dim": ["--table", "full", "--dim", str(SMALLER_DIM), "--data-type", "FP16"],
    "LMA": ["--table", "lma", *LMA],
}
TRAINING = ["--batch-size", "128", "--epochs", "8", "--patience", "3"]
SEARCHED = (0.02, 0.05, 0.1, 0.2)  # of the tables; the layers have the same one for all kinds
LEARNING_RATES = {"full": 0.05, "smaller dim": 0.1, "LMA": 0.05}  # what the search found
MINUTES_A_RUN = 1.0  # on 2 cores


def torchx(component: str, options: list[str], arguments: list[str], log: Path) -> None:
    """Runs a component of this repository to its end; its output goes to `log`. Exits where it fails."""
    command = ["torchx", "run", "--scheduler", "local_cwd", "--wait", "--log"]
    command += [f"{REPOSITORY}/torchx_components/lma.py:{component}", *options, "--", *arguments]
    with log.open("w") as output, log.open() as so_far:
        running = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
        while running.poll() is None:
            time.sleep(0.2)
            show_evaluations(so_far.read())
    if running.returncode != 0:
        tail = "".join(log.read_text().splitlines(keepends=True)[-30:])
        sys.exit(f"{tail}\n{' '.join(command)}\nfailed; all of its output is in {log}")


def show_evaluations(text: str) -> None:
    """Prints what a piece of the trainer's output says of evaluations: a sign of life every few seconds."""
    for evaluation in re.findall(r"epoch \d+, step \d+ of \d+: .*", text):
        print(f"         {evaluation}", flush=True)


def train(tables: str, lr: float, seed: int, out: Path) -> dict[str, Any]:
    """The record of a run."""
    name = run_name(tables, seed)
    checkpoints = out / name
    shutil.rmtree(checkpoints, ignore_errors=True)  # of an earlier demo; the trainer would refuse to mix them
    arguments = [*DATA, *TABLES[tables], *TRAINING, "--lr", str(lr), "--seed", str(seed)]
    arguments += ["--json", str(out / f"{name}.json"), "--checkpoint-dir", str(checkpoints)]
    if tables == "LMA":
        arguments += ["--allocation", str(out / "allocation.safetensors")]
    torchx("train", ["-j", "1x2", "--max_restarts", "0"], arguments, out / f"{name}.log")
    return json.loads((out / f"{name}.json").read_text())


def run_name(tables: str, seed: int) -> str:
    return f"{tables.lower().replace(' ', '-')}-seed{seed}"


def search(out: Path, say: Callable[[str], None]) -> dict[str, float]:
    """The learning rate of each kind that reaches the best validation AUC with seed 0."""
    found = {}
    for tables in TABLES:
        aucs = {}
        for lr in SEARCHED:
            aucs[lr] = train(tables, lr, 0, out)["best"]["validation"]["auc"]
            say(f"{tables}, learning rate {lr}: validation AUC {aucs[lr]:.4f}")
        found[tables] = max(aucs, key=lambda lr: aucs[lr])
    return found


def export(checkpoint: Path, model: Path) -> None:
    factory = f"{REPOSITORY}/examples/dlrm/serving.py:dlrm"
    arguments = ["--checkpoint", str(checkpoint), "--model", factory, "--dtype", "int8", "--out", str(model)]
    torchx("export", [], arguments, model.with_suffix(".export.log"))


def score_over_grpc(model: Path) -> float:
    """The AUC of the test rows as a server of the model predicts them."""
    lma = [sys.executable, "-W", "ignore", "-m", "torchrec_lma.cli"]
    log = model.with_suffix(".serve.log")
    with log.open("w") as output:
        server = subprocess.Popen([*lma, "serve", str(model), "--port", "0"], stderr=output, cwd=REPOSITORY)
    try:
        while not (serving := [line for line in log.read_text().splitlines() if '"event": "serving"' in line]):
            if server.poll() is not None:
                sys.exit(f"{log.read_text()}\ntorchrec-lma serve {model} ended")
            time.sleep(0.1)
        address = f"127.0.0.1:{json.loads(serving[0])['port']}"
        # Strings were hashed to 64-bit ids, which do not fit the protocol's int32: --id-type.
        predict = [*lma, "predict", "--address", address, *DATA, "--part", "test", "--id-type", "int64", "--auc"]
        predict += ["--out", str(model.with_suffix(".predictions"))]
        done = subprocess.run(predict, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    finally:
        server.terminate()
        server.wait()
    if done.returncode != 0:
        sys.exit(f"{done.stderr}\n{' '.join(predict)}\nfailed")
    return float(done.stderr.rpartition("AUC ")[2].split()[0])


def summarise(runs: list[dict[str, Any]]) -> dict[str, float]:
    def mean(*keys: str) -> float:
        values = []
        for run in runs:
            value: Any = run
            for key in keys:
                value = value[key]
            values.append(value)
        return statistics.mean(values)

    return {
        "auc": mean("best", "test", "auc"),
        "log_loss": mean("best", "test", "log_loss"),
        "weight_bytes": mean("memory", "weight"),
        "optimizer_bytes": mean("memory", "optimizer"),
        "allocation_bytes": mean("memory", "allocation"),
        "median_step_ms": mean("median_step_ms"),
    }


def print_table(summary: dict[str, dict[str, float]]) -> None:
    columns = f"{'weights':>12}{'optimizer':>12}{'allocation':>12}{'step':>10}"
    print(f"\n{'tables':<14}{'test AUC':>10}{'log-loss':>10}{columns}")
    for tables, row in summary.items():
        print(
            f"{tables:<14}{row['auc']:>10.4f}{row['log_loss']:>10.4f}{row['weight_bytes']:>10,.0f} B"
            f"{row['optimizer_bytes']:>10,.0f} B{row['allocation_bytes']:>10,.0f} B{row['median_step_ms']:>7.1f} ms"
        )
    full, smaller, lma = (summary[tables] for tables in TABLES)
    ratio = full["weight_bytes"] / (lma["weight_bytes"] + lma["allocation_bytes"])
    print(
        f"LMA at {ratio:.1f}x: AUC {lma['auc'] - full['auc']:+.4f} against full tables and "
        f"{lma['auc'] - smaller['auc']:+.4f} against dim {SMALLER_DIM} in FP16\n"
    )


def plot(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4))
    for tables, records in runs.items():
        bytes_used = [run["memory"]["weight"] + run["memory"]["allocation"] for run in records]
        aucs = [run["best"]["test"]["auc"] for run in records]
        points = axes.plot(bytes_used, aucs, "o", alpha=0.5, label=f"{tables}, one seed")
        axes.plot(
            bytes_used[:1],
            [statistics.mean(aucs)],
            "_",
            markersize=24,
            color=points[0].get_color(),
            label=f"{tables}, mean",
        )
    axes.set_xscale("log")
    axes.set_xlabel("bytes of weights and allocation")
    axes.set_ylabel("test AUC")
    axes.set_title("MovieLens-100K, DLRM")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "demo", help="folder (default: runs/demo)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--search", action="store_true", help=f"try learning rates {SEARCHED} for each kind first")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def say(what: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {what}", flush=True)

    runs_ahead = len(TABLES) * (args.seeds + (len(SEARCHED) if args.search else 0))
    say(
        f"allocate, train {runs_ahead} models, export and serve one: "
        f"about {1 + round(runs_ahead * MINUTES_A_RUN)} minutes "
        f"on 2 cores; all output is in {out}"
    )
    say(f"MovieLens-100K: allocating LMA tables of dim {DIM} at {COMPRESSION}x from the training rows")
    torchx("allocate", [], ["--out", str(out / "allocation.safetensors"), *DATA, *LMA], out / "allocate.log")
    rates = search(out, say) if args.search else LEARNING_RATES
    runs: dict[str, list[dict[str, Any]]] = {tables: [] for tables in TABLES}
    for seed in range(args.seeds):
        for tables, records in runs.items():
            say(f"training {tables} on two ranks, learning rate {rates[tables]}, seed {seed}")
            records.append(train(tables, rates[tables], seed, out))
            best = records[-1]["best"]
            say(f"    test AUC {best['test']['auc']:.4f}, the best of {len(records[-1]['evaluations'])} evaluations")
    summary = {tables: summarise(records) for tables, records in runs.items()}
    print_table(summary)
    with replacing(out / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1))
    with replacing(out / "auc_against_memory.png") as temporary:
        plot(runs, temporary)

    best, name = runs["LMA"][0]["best"], run_name("LMA", 0)
    say("exporting the LMA model of seed 0 in INT8")
    model = out / f"{name}.pt"
    export(out / name, model)  # of its best evaluation
    say(f"serving {model.stat().st_size:,} B over gRPC")
    auc = score_over_grpc(model)
    say(f"    test AUC over gRPC {auc:.4f}, the trainer's {best['test']['auc']:.4f}")
    say(f"records, summary.json and auc_against_memory.png are in {out}")


if __name__ == "__main__":
    main()
