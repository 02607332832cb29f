"""A trained model under a new allocation, and trained full tables compressed: the validation loss around each.

    python examples/benchmarks/refresh.py --compression 4         # MovieLens-100K, about a minute and a half
    python examples/benchmarks/refresh.py --data clicks.parquet --label click --categorical user item --plot curve.png

The old allocation is built from the first half of the training rows, the new one from all of them. LMA tables are
trained for --epochs under the old one; then each of these goes on for one more epoch over the same batches:

* unchanged: as if nothing happened;
* new optimizer: the tables' optimizer forgets its state, as it must after a reallocation;
* reallocated: the memory moves to the new allocation by least squares, with a new optimizer for the tables;
* afresh: new random tables under the new allocation beside the trained layers.

Full tables trained for --epochs are compressed at the same rate, each id weighing alike or by its occurrences plus 1,
and go on for one more epoch as well. One process on the CPU or one GPU, Adam.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma import Allocation, LMAEmbeddingBagCollection, reallocate
from torchrec_lma.datasets import RowDataset, Vocabulary
from torchrec_lma.inspection import ObservedIds
from torchrec_lma.options import (
    add_data_options,
    add_lma_options,
    add_table_options,
    make_builder,
    make_config,
    make_tables,
    open_dataset,
)
from torchrec_lma.text_table import text_table

Prepare = Callable[[KeyedJaggedTensor], KeyedJaggedTensor]
LR = 1e-3
POINTS = 8  # of the curve, over one epoch


class Run:
    """A model with its optimizers, and what turns the dataset's ids into its input."""

    def __init__(self, ebc: EmbeddingBagCollection, args: argparse.Namespace, dense: int, prepare: Prepare) -> None:
        torch.manual_seed(args.seed)
        self.model = DLRM(ebc, dense, [64, args.dim], [128, 64, 1])
        layers = [p for name, p in self.model.named_parameters() if "embedding_bags" not in name]
        self.layers_optimizer = torch.optim.Adam(layers, LR)
        self.prepare = prepare
        self.set_tables(ebc)

    def set_tables(self, ebc: EmbeddingBagCollection, prepare: Prepare | None = None) -> None:
        """Other tables, with an optimizer that knows nothing of them; the layers and their optimizer stay."""
        self.model.sparse_arch.embedding_bag_collection = ebc
        self.tables_optimizer = torch.optim.Adam(ebc.parameters(), LR)
        self.prepare = prepare or self.prepare

    @property
    def tables(self) -> Any:
        return self.model.sparse_arch.embedding_bag_collection

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.model(batch.dense_features, self.prepare(batch.sparse_features)).squeeze(1)
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
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    dataset = open_dataset(args)
    vocabulary = Vocabulary(dataset.distinct_ids())
    tables = make_tables(args, vocabulary.num_embeddings)
    old, new, observed = allocations(args, dataset, tables)
    ids, weights = by_table(observed)
    dense = len(dataset.schema.numeric)

    def batches(epoch: int) -> Iterator[Batch]:
        return dataset.batches("train", batch_size=args.batch_size, shuffle_seed=args.seed, epoch=epoch)

    def trained(ebc: EmbeddingBagCollection, prepare: Prepare) -> Run:
        run = Run(ebc, args, dense, prepare)
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
    lma = trained(LMAEmbeddingBagCollection(tables, old.config, old), lambda features: features)
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
    afresh.set_tables(LMAEmbeddingBagCollection(tables, new.config, new))
    curves["afresh"] = one_more_epoch(afresh)

    full = trained(EmbeddingBagCollection(tables), vocabulary)
    curves["full tables"] = one_more_epoch(copy.deepcopy(full))
    rows = row_ids(vocabulary, tables)
    row_weights = {name: occurrences_of(rows[name], ids[name], weights[name]) for name in rows}
    for name, id_weights in (("compressed, alike", None), ("compressed, weighted", row_weights)):
        torch.manual_seed(args.seed)
        compressed = copy.deepcopy(full)
        compressed.set_tables(
            LMAEmbeddingBagCollection.from_embedding_bag_collection(full.tables, new.config, new, id_weights, rows),
            lambda features: features,
        )
        curves[name] = one_more_epoch(compressed)
    report(args, curves, result.changes)


def allocations(
    args: argparse.Namespace, dataset: RowDataset, tables: list
) -> tuple[Allocation, Allocation, ObservedIds]:
    """From the first half of the training rows, from all of them, and the ids of all of them."""
    builder, old = make_builder(args, tables), None
    n_batches = dataset.num_batches("train", 4096)

    def features() -> Iterator[KeyedJaggedTensor]:
        """All training rows, which the builder sees on their way."""
        nonlocal old
        for number, batch in enumerate(dataset.batches("train", batch_size=4096), 1):
            builder.update(batch.sparse_features)
            if number == max(1, n_batches // 2):
                old = builder.build()
            yield batch.sparse_features

    table_of_feature = {table.feature_names[0]: table.name for table in tables}
    observed = ObservedIds(features(), table_of_feature, make_config(args).seed, max_rows=None)
    assert old is not None
    return old, builder.build(), observed


def by_table(observed: ObservedIds) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The ids of each table and how often each occurs, plus 1."""
    ids, weights = {}, {}
    for index, name in enumerate(observed.tables):
        ids[name] = observed.ids[observed.table == index]
        weights[name] = observed.count[observed.table == index] + 1
    return ids, weights


def row_ids(vocabulary: Vocabulary, tables: list) -> dict[str, Tensor]:
    """The raw id of each row of the full tables; row 0, of unknown ids, stands for an id of its own."""
    ids = {}
    for table in tables:
        known = vocabulary.ids[table.feature_names[0]]
        ids[table.name] = torch.cat([torch.tensor([torch.iinfo(torch.int64).min]), known])
    return ids


def occurrences_of(rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The weight of each row's id; 0 for row 0, which no training row uses."""
    ids, order = torch.sort(ids)
    out = weights[order][torch.searchsorted(ids, rows).clamp(max=ids.numel() - 1)]
    out[0] = 0
    return out


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
        args.json.write_text(json.dumps(record, indent=1))
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
    figure.savefig(args.plot, dpi=130)


if __name__ == "__main__":
    main()
