"""AUC at a given memory: full tables, smaller dims and LMA tables, each at its own best learning rate.

Trains the DLRM of examples/dlrm/train.py, through the same code, for every method, learning rate of the embeddings and
seed. A method's learning rate is the one with the best mean validation AUC; what is shown is the test AUC and log-loss
at that rate, with standard errors over seeds, and the bytes of weights and allocation. Results are kept in --out, line
by line: a run that is there is not run again.

    python examples/benchmarks/accuracy.py --out runs/accuracy                                # MovieLens-100K
    python examples/benchmarks/accuracy.py --out runs/kuairand --data kuairand_pure.parquet --label is_click \
        --split time:time_ms --categorical user_id video_id author_id ... --methods full dim-fp16 lma --batch-size 1024
"""

import argparse
import contextlib
import io
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "dlrm"))
import train

from torchrec_lma.text_table import text_table

# Arguments of the trainer for a method at a compression of FP32 tables of a dim.
METHODS: dict[str, Callable[[int, float], list[str]]] = {
    "full": lambda dim, compression: ["--table", "full", "--dim", str(dim)],
    "dim-fp32": lambda dim, compression: ["--table", "full", "--dim", _dim(dim / compression)],
    "dim-fp16": lambda dim, compression: [
        "--table",
        "full",
        "--dim",
        _dim(2 * dim / compression),
        "--data-type",
        "FP16",
    ],
    "lma": lambda dim, compression: ["--table", "lma", "--dim", str(dim), "--compression", str(compression)],
}


def _dim(dim: float) -> str:
    if dim < 4 or dim % 4:
        raise ValueError(
            f"a smaller dim of {dim:g} would be needed, and fused kernels take multiples of 4: leave it out"
        )
    return str(int(dim))


def runs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every run asked for, with the trainer's arguments."""
    found = []
    for compression in args.compression:
        for name in args.methods:
            method, *settings = name.split()
            try:
                arguments = METHODS[method](args.dim, compression) + settings
            except ValueError as error:
                print(f"{name} at {compression:g}x: {error}", file=sys.stderr)
                continue
            at = 1.0 if method == "full" else compression
            for lr in args.lr:
                for seed in args.seeds:
                    found.append({"method": name, "compression": at, "lr": lr, "seed": seed, "arguments": arguments})
    return [run for i, run in enumerate(found) if run not in found[:i]]


def run_once(run: dict[str, Any], common: list[str]) -> dict[str, Any]:
    arguments = [*common, *run["arguments"], "--lr", str(run["lr"]), "--seed", str(run["seed"])]
    with contextlib.redirect_stdout(io.StringIO()):
        record = train.main(train.parse_args(arguments))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    best, memory = record["best"], record["memory"]
    return {
        "validation_auc": best["validation"]["auc"],
        "test_auc": best["test"]["auc"],
        "test_log_loss": best["test"]["log_loss"],
        "bytes": memory["weight"] + memory["allocation"],
        "full_bytes": memory["full"],
        "step_ms": record["median_step_ms"],
    }


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method and compression, at the learning rate of the best mean validation AUC."""
    groups: dict[tuple[str, float], dict[float, list[dict[str, Any]]]] = {}
    for record in records:
        groups.setdefault((record["method"], record["compression"]), {}).setdefault(record["lr"], []).append(record)
    rows = []
    for (method, compression), by_lr in groups.items():
        lr, best = max(by_lr.items(), key=lambda item: statistics.mean(r["validation_auc"] for r in item[1]))
        aucs = [record["test_auc"] for record in best]
        rows.append(
            {
                "method": method,
                "compression": compression,
                "lr": lr,
                "at_edge_of_search": lr in (min(by_lr), max(by_lr)) and len(by_lr) > 1,
                "seeds": len(best),
                "validation_auc": statistics.mean(record["validation_auc"] for record in best),
                "test_auc": statistics.mean(aucs),
                "standard_error": statistics.stdev(aucs) / math.sqrt(len(aucs)) if len(aucs) > 1 else math.nan,
                "test_log_loss": statistics.mean(record["test_log_loss"] for record in best),
                "bytes": statistics.mean(record["bytes"] for record in best),
                "step_ms": statistics.mean(record["step_ms"] for record in best),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["full", "dim-fp16", "lma"],
        help=f"of {', '.join(METHODS)}; trainer's options may follow",
    )
    parser.add_argument("--compression", nargs="+", type=float, default=[16.0])
    parser.add_argument("--dim", type=int, default=64, help="of full tables")
    parser.add_argument("--lr", nargs="+", type=float, default=[0.02, 0.05, 0.1], help="of the embeddings, to search")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    args, data = parser.parse_known_args()  # the rest says which data, as the trainer takes it
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    records = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(r["method"], r["compression"], r["lr"], r["seed"]) for r in records}
    common = [*data, "--epochs", str(args.epochs), "--batch-size", str(args.batch_size)]
    for run in runs(args):
        if (run["method"], run["compression"], run["lr"], run["seed"]) in done:
            continue
        record = run | run_once(run, common)
        records.append(record)
        with results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(
            f"{run['method']} at {run['compression']:g}x, lr {run['lr']}, seed {run['seed']}: validation "
            f"{record['validation_auc']:.4f}, test {record['test_auc']:.4f}",
            file=sys.stderr,
            flush=True,
        )
    rows = summarise(records)
    if args.json:
        print(json.dumps(rows))
        return
    header = ["method", "compression", "lr", "validation AUC", "test AUC", "log-loss", "bytes", "step"]
    lines = [
        [
            row["method"],
            f"{row['compression']:g}x",
            f"{row['lr']:g}{' (edge)' if row['at_edge_of_search'] else ''}",
            f"{row['validation_auc']:.4f}",
            f"{row['test_auc']:.4f} +- {row['standard_error']:.4f}",
            f"{row['test_log_loss']:.4f}",
            f"{row['bytes']:,.0f}",
            f"{row['step_ms']:.1f} ms",
        ]
        for row in rows
    ]
    print(text_table(header, lines))


if __name__ == "__main__":
    main()
