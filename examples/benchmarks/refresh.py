"""A trained model under a new allocation, and trained full tables compressed: the validation loss around each.

    python examples/benchmarks/refresh.py --compression 4         # MovieLens-100K, about a minute and a half
    python examples/benchmarks/refresh.py --data clicks.parquet --label click --categorical user item --plot curve.png

The old allocation is built from the first half of the training rows, the new one from all of them. LMA tables are
trained for --epochs under the old one; then each of these goes on for one more epoch over the same batches:

* unchanged: as if nothing happened;
* new optimizer: the tables' optimizer forgets its state, as it must after a reallocation;
* reallocated: the weights move to the new allocation by least squares, with a new optimizer for the tables;
* afresh: new random tables under the new allocation beside the trained layers.

Full tables trained for --epochs are compressed at the same rate, each id weighing alike or by its occurrences plus 1,
and go on for one more epoch as well. One process on the CPU or one GPU, Adam, FP32 weights everywhere: plain Adam loses
the small updates of FP16 weights.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_lma import Allocation, LMAEmbeddingBagCollection, reallocate
from torchrec_lma.datasets import RowDataset, Vocabulary
from torchrec_lma.files import replacing
from torchrec_lma.options import (
    add_data_options,
    add_lma_options,
    add_table_options,
    make_builder,
    make_tables,
    open_dataset,
)
from torchrec_lma.text_table import text_table

Tables: TypeAlias = EmbeddingBagCollection | LMAEmbeddingBagCollection
LR = 1e-3
POINTS = 8  # of the curve, over one epoch


class Run:
    """A model with its optimizers; its tables take the ids of a vocabulary."""

    def __init__(self, ebc: Tables, args: argparse.Namespace, dense: int, vocabulary: Vocabulary) -> None:
        torch.manual_seed(args.seed)
        self.model = DLRM(ebc, dense, [64, args.dim], [128, 64, 1])
        layers = [p for name, p in self.model.named_parameters() if "embedding_bags" not in name]
        self.layers_optimizer = torch.optim.Adam(layers, LR)
        self.vocabulary = vocabulary
        self.set_tables(ebc)

    def set_tables(self, ebc: Tables) -> None:
        """Other tables, with an optimizer that knows nothing of them; the layers and their optimizer stay."""
        self.model.sparse_arch.embedding_bag_collection = ebc
        self.tables_optimizer = torch.optim.Adam(ebc.parameters(), LR)

    @property
    def tables(self) -> Any:
        return self.model.sparse_arch.embedding_bag_collection

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.model(batch.dense_features, self.vocabulary(batch.sparse_features)).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels), logits

    def train(self, batches: Iterator[Batch]) -> None:
        self.model.train()
        for batch in batches:
            self.layers_optimizer.zero_grad()
            self.tables_optimizer.zero_grad()
            self.loss(batch)[0].backward()
            self.layers_optimizer.step()
            self.tables_optimizer.step()

    @torch.no_grad()
    def evaluate(self, dataset: RowDataset, split: str = "validation") -> dict[str, float]:
        self.model.eval()
        auc, total, rows = BinaryAUROC(), 0.0, 0
        for batch in dataset.batches(split, batch_size=4096):
            loss, logits = self.loss(batch)
            auc.update(logits.sigmoid(), batch.labels.int())
            total, rows = total + loss.item() * batch.labels.numel(), rows + batch.labels.numel()
        return {"log_loss": total / rows, "auc": auc.compute().item()}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_options(parser)
    add_table_options(parser)
    add_lma_options(parser)
    parser.add_argument("--epochs", type=int, default=2, help="before the change (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0, help="of weights and shuffling")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves")
    parser.set_defaults(data_type="FP32")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    dataset = open_dataset(args)
    vocabulary = Vocabulary(dataset.distinct_ids())
    tables = make_tables(args, vocabulary.num_embeddings)
    old, new, weights = allocations(args, dataset, tables, vocabulary)
    ids = {name: torch.arange(of_table.numel()) for name, of_table in weights.items()}
    dense = len(dataset.schema.numeric)

    def batches(epoch: int) -> Iterator[Batch]:
        return dataset.batches("train", batch_size=args.batch_size, shuffle_seed=args.seed, epoch=epoch)

    def trained(ebc: Tables) -> Run:
        run = Run(ebc, args, dense, vocabulary)
        for epoch in range(args.epochs):
            run.train(batches(epoch))
        return run

    def one_more_epoch(run: Run) -> list[dict[str, float]]:
        steps = list(batches(args.epochs))
        curve = [run.evaluate(dataset)]
        for point in range(POINTS):
            run.train(iter(steps[len(steps) * point // POINTS : len(steps) * (point + 1) // POINTS]))
            curve.append(run.evaluate(dataset))
        return curve

    torch.manual_seed(args.seed)
    lma = trained(LMAEmbeddingBagCollection(tables, old))
    curves = {}
    unchanged, reset, moved, afresh = (copy.deepcopy(lma) for _ in range(4))
    curves["unchanged"] = one_more_epoch(unchanged)
    reset.set_tables(reset.tables)
    curves["new optimizer"] = one_more_epoch(reset)
    result = reallocate(moved.tables, new, ids, weights)
    print(f"{result}\n")
    moved.set_tables(result.module)
    curves["reallocated"] = one_more_epoch(moved)
    torch.manual_seed(args.seed)
    afresh.set_tables(LMAEmbeddingBagCollection(tables, new))
    curves["afresh"] = one_more_epoch(afresh)

    full = trained(EmbeddingBagCollection(tables))
    torch.manual_seed(args.seed)
    from_the_start = trained(LMAEmbeddingBagCollection(tables, new))
    curves["LMA tables from the start"] = one_more_epoch(from_the_start)
    curves["full tables"] = one_more_epoch(copy.deepcopy(full))
    for name, id_weights in (("compressed, alike", None), ("compressed, weighted", weights)):
        torch.manual_seed(args.seed)
        compressed = copy.deepcopy(full)
        compressed.set_tables(LMAEmbeddingBagCollection.from_embedding_bag_collection(full.tables, new, id_weights))
        curves[name] = one_more_epoch(compressed)
    report(args, curves, result.changes)


def allocations(
    args: argparse.Namespace, dataset: RowDataset, tables: list, vocabulary: Vocabulary
) -> tuple[Allocation, Allocation, dict[str, Tensor]]:
    """From the first half of the training rows, from all of them, and how often each id occurs in these, plus 1."""
    builder, old = make_builder(args, tables), None
    n_batches = dataset.num_batches("train", 4096)
    weights = {table.name: torch.ones(table.num_embeddings, dtype=torch.int64) for table in tables}
    for number, batch in enumerate(dataset.batches("train", batch_size=4096), 1):
        features = vocabulary(batch.sparse_features)
        builder.update(features)
        for table in tables:
            ids = features[table.feature_names[0]].values()
            weights[table.name] += torch.bincount(ids, minlength=table.num_embeddings)
        if number == max(1, n_batches // 2):
            old = builder.build()
    assert old is not None
    return old, builder.build(), weights


def report(args: argparse.Namespace, curves: dict[str, list[dict[str, float]]], changes: tuple) -> None:
    header = ("validation log-loss", *(f"{point}/{POINTS}" for point in range(POINTS + 1)), "AUC at 0", "AUC at end")
    lines = [
        (name, *(f"{point['log_loss']:.4f}" for point in curve), f"{curve[0]['auc']:.4f}", f"{curve[-1]['auc']:.4f}")
        for name, curve in curves.items()
    ]
    print(text_table(header, lines))
    if args.json is not None:
        arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        record = {"arguments": arguments, "curves": curves, "changes": [vars(change) for change in changes]}
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(record, indent=1))
    if args.plot is not None:
        plot(curves, args)


def plot(curves: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        x = [args.epochs + point / POINTS for point in range(POINTS + 1)]
        axes.plot(x, [point["log_loss"] for point in curve], "o-", markersize=3, label=name)
    axes.set_xlabel("epochs")
    axes.set_ylabel("validation log-loss")
    axes.legend(frameon=False)
    with replacing(args.plot) as temporary:
        figure.savefig(temporary, dpi=130)


if __name__ == "__main__":
    main()
