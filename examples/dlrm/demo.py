"""The demo: full tables against LMA tables on MovieLens-100K, each step launched through torchx.

    make demo        or        python examples/dlrm/demo.py --out runs/demo --seeds 3

Allocates from the training rows, trains both kinds of table with the same seeds on two ranks, prints a table of what
they reach and what they cost, and leaves the runs' JSON records, `summary.json` and `auc_against_memory.png` in --out.
Then it exports the first LMA model in INT8, as of its best epoch, serves it, and scores the test rows over gRPC.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
COMPRESSION = 16
DATASET = ["--data", "movielens-100k"]
DATA = [*DATASET, "--compression", str(COMPRESSION)]
# Similarity finds nothing to gain among so few ids (see README), so all but the dedicated ids are hashed.
ALLOCATION = ["--source", "none"]
# Each kind with the optimizer and learning rate that reached the best validation AUC. Adagrad's steps shrink with the
# gradients a weight has seen, and a weight of an LMA memory sees those of many ids: Adam suits it better.
TRAINING = {
    "full": "--optimizer rowwise-adagrad --lr 0.05 --epochs 10 --batch-size 128 --patience 2".split(),
    "lma": "--optimizer adam --lr 0.001 --epochs 10 --batch-size 128 --patience 2".split(),
}


def torchx(component: str, options: list[str], arguments: list[str], log: Path) -> None:
    """Runs a component of this repository to its end; its output goes to `log`. Exits where it fails."""
    command = ["torchx", "run", "--scheduler", "local_cwd", "--wait", "--log"]
    command += [f"{REPOSITORY}/torchx_components/lma.py:{component}", *options, "--", *arguments]
    with log.open("w") as output:
        done = subprocess.run(command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        tail = "".join(log.read_text().splitlines(keepends=True)[-30:])
        sys.exit(f"{tail}\n{' '.join(command)}\nfailed; all of its output is in {log}")


def train(table: str, seed: int, out: Path) -> dict[str, Any]:
    record = out / f"{table}-seed{seed}.json"
    checkpoints = out / f"{table}-seed{seed}"
    shutil.rmtree(checkpoints, ignore_errors=True)  # of an earlier demo; the trainer would refuse to mix them
    arguments = ["--table", table, "--seed", str(seed), "--json", str(record), *DATA, *TRAINING[table]]
    arguments += ["--checkpoint-dir", str(checkpoints)]
    if table == "lma":
        arguments += [*ALLOCATION, "--allocation", str(out / "allocation.safetensors")]
    torchx("train", ["-j", "1x2"], arguments, out / f"{table}-seed{seed}.log")
    return json.loads(record.read_text())


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
        predict = [*lma, "predict", "--address", address, *DATASET, "--rows", "test", "--id-type", "int64", "--auc"]
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
    print(f"\n{'tables':<10}{'test AUC':>10}{'log-loss':>10}{columns}")
    for kind, row in summary.items():
        print(
            f"{kind:<10}{row['auc']:>10.4f}{row['log_loss']:>10.4f}{row['weight_bytes']:>10,.0f} B"
            f"{row['optimizer_bytes']:>10,.0f} B{row['allocation_bytes']:>10,.0f} B{row['median_step_ms']:>7.1f} ms"
        )
    full, lma = summary["full"], summary["lma"]
    ratio = full["weight_bytes"] / (lma["weight_bytes"] + lma["allocation_bytes"])
    slower = lma["median_step_ms"] / full["median_step_ms"]
    print(f"LMA at {ratio:.1f}x: AUC {lma['auc'] - full['auc']:+.4f}, step time {slower:.2f}x")


def plot(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4))
    for kind, records in runs.items():
        bytes_used = [run["memory"]["weight"] + run["memory"]["allocation"] for run in records]
        aucs = [run["best"]["test"]["auc"] for run in records]
        points = axes.plot(bytes_used, aucs, "o", alpha=0.5, label=f"{kind}, one seed")
        axes.plot(
            bytes_used[:1],
            [statistics.mean(aucs)],
            "_",
            markersize=24,
            color=points[0].get_color(),
            label=f"{kind}, mean",
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
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: %(default)s)")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def say(what: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {what}", flush=True)

    say("allocating from the training rows")
    torchx("allocate", [], ["--out", str(out / "allocation.safetensors"), *DATA, *ALLOCATION], out / "allocate.log")
    runs: dict[str, list[dict[str, Any]]] = {"full": [], "lma": []}
    for seed in range(args.seeds):
        for kind, records in runs.items():
            say(f"training {kind} tables on two ranks, seed {seed}")
            records.append(train(kind, seed, out))
            say(f"    test AUC {records[-1]['best']['test']['auc']:.4f}")
    summary = {kind: summarise(records) for kind, records in runs.items()}
    print_table(summary)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    plot(runs, out / "auc_against_memory.png")

    best = runs["lma"][0]["best"]
    say("exporting the LMA model of seed 0 in INT8")
    model = out / "lma-seed0.pt"
    export(out / "lma-seed0", model)  # of its best epoch
    say(f"serving {model.stat().st_size:,} B over gRPC")
    auc = score_over_grpc(model)
    say(f"    test AUC over gRPC {auc:.4f}, the trainer's {best['test']['auc']:.4f}")
    say(f"records, summary.json and auc_against_memory.png are in {out}")


if __name__ == "__main__":
    main()
