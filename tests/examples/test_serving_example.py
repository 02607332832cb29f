"""examples/dlrm/serving.py: checkpoints of the trainer become the models that were trained."""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed.checkpoint as dcp
from model import make_model
from start import keep_sample
from torch import Tensor
from torchmetrics.classification import BinaryAUROC
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from train import parse_args

from support.paths import DLRM
from torchrec_lma import Allocation, LMAEmbeddingBagCollection
from torchrec_lma.cli import main as torchrec_lma
from torchrec_lma.cli.export import load_factory
from torchrec_lma.datasets import RowDataset
from torchrec_lma.options import (
    count_embeddings,
    make_builder,
    make_config,
    make_tables,
    make_vocabulary,
    open_dataset,
)
from torchrec_lma.quant import export, request

SERVING = f"{DLRM / 'serving.py'}:dlrm"
ROWS = 600


@pytest.fixture(scope="module")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw ids of 32 and of 64 bits, a column of lists and missing numbers."""
    random = np.random.default_rng(0)
    item = random.integers(0, 40, ROWS)
    frame = pd.DataFrame(
        {
            "click": (random.random(ROWS) < 0.1 + 0.6 * (item % 3 == 0)).astype("int8"),
            "user": (random.integers(0, 60, ROWS) << 40) - 7,
            "item": item,
            "tags": [list(range(i % 4)) for i in item],
            "price": np.where(item % 7 == 0, np.nan, item * 1.5),
        }
    )
    path = tmp_path_factory.mktemp("data") / "clicks.parquet"
    frame.to_parquet(path)
    return path


def arguments(clicks: Path, *more: str) -> argparse.Namespace:
    columns = ["--label", "click", "--categorical", "user", "item", "tags", "--numeric", "price"]
    small = ["--dim", "8", "--compression", "2", "--dense-layers", "4", "--over-layers", "4"]
    return parse_args(["--data", str(clicks), *columns, *small, *more])


def write_checkpoint(
    folder: Path, args: argparse.Namespace, dataset: RowDataset, best: dict[str, Any] | None = None
) -> Callable[[Tensor, KeyedJaggedTensor], Tensor]:
    """What the trainer leaves, of an untrained model; returns what that model predicts of rows as the data has them."""
    vocabulary = make_vocabulary(args, dataset)
    num_embeddings = vocabulary.num_embeddings if vocabulary is not None else count_embeddings(args, dataset)
    tables = make_tables(args, num_embeddings)
    torch.manual_seed(0)
    if args.table == "lma":
        builder = make_builder(args, tables)
        for batch in dataset.batches("train", batch_size=100):
            builder.update(vocabulary(batch.sparse_features) if vocabulary is not None else batch.sparse_features)
        ebc: Any = LMAEmbeddingBagCollection(tables, builder.build())
    else:
        ebc = EmbeddingBagCollection(tables=tables)
    for weight in ebc.parameters():
        weight.data.normal_()
    model = make_model(args, ebc, 1, torch.device("cpu"))
    folder.mkdir(parents=True)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder, no_dist=True)
    settings = {"arguments": vars(args), "categorical": ["user", "item", "tags"], "numeric": ["price"]}
    settings |= {"num_embeddings": num_embeddings, "sample": keep_sample(dataset), "id_types": dataset.id_types}
    (folder / "settings.json").write_text(json.dumps(settings))
    if vocabulary is not None:
        vocabulary.save(folder / "vocabulary.safetensors")
    (folder / "progress.json").write_text(json.dumps({"best": best}))
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"sha256": digests}))

    def predict(dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        ids = features.values()
        if args.num_embeddings is not None and args.table == "full":
            ids = ids % args.num_embeddings
        elif vocabulary is not None:  # one id after another: the place of an id among those of the training rows
            known = {name: {int(value): i for i, value in enumerate(of, 1)} for name, of in vocabulary.ids.items()}
            parts = zip(features.keys(), features.to_dict().values())
            ids = torch.tensor([known[name].get(int(value), 0) for name, part in parts for value in part.values()])
        rows = KeyedJaggedTensor(keys=features.keys(), values=ids, lengths=features.lengths())
        return model.model(dense, rows).detach().reshape(-1).sigmoid()

    return predict


@pytest.mark.parametrize(
    "options",
    [
        "--table lma",
        "--table lma --raw-ids",
        "--table full",
        "--table full --num-embeddings 50",
        "--table full --dim 4 --data-type FP16",
    ],
)
def test_a_checkpoint_becomes_the_model_that_was_trained(clicks: Path, tmp_path: Path, options: str) -> None:
    args = arguments(clicks, *options.split())
    dataset = open_dataset(args)
    write_checkpoint(tmp_path / "step-00000007", args, dataset)
    predict = write_checkpoint(tmp_path / "step-00000009", args, dataset)
    servable = load_factory(SERVING)(tmp_path, None)  # of a run that was never evaluated: the newest
    assert (servable.float_features, servable.id_list_features) == (["price"], ["user", "item", "tags"])
    exported = export(servable, tmp_path / "model.pt", "fp32")
    batch = next(dataset.batches("train", batch_size=400))  # other rows than the sample
    unseen = batch.sparse_features.values().clone()
    unseen[::50] = -(2**60)
    batch.sparse_features._values = unseen
    served = torch.jit.load(exported.path)(request(batch.dense_features, batch.sparse_features))["default"]
    # The unsharded collection pools FP16 weights in FP16.
    atol = 1e-6 if options in ("--table full", "--table full --num-embeddings 50") else 1e-3
    torch.testing.assert_close(served, predict(batch.dense_features, batch.sparse_features), rtol=0, atol=atol)


def test_checkpoints_that_cannot_be_served_are_named(clicks: Path, tmp_path: Path) -> None:
    factory = load_factory(SERVING)
    with pytest.raises(ValueError, match="nor does it hold one"):
        factory(tmp_path, None)
    args = arguments(clicks)
    dataset = open_dataset(args)
    write_checkpoint(tmp_path / "step-00000001", args, dataset)
    tables = make_tables(args, make_vocabulary(args, dataset).num_embeddings)
    with pytest.raises(ValueError, match="in size|has no tensor|was written with allocation"):
        factory(tmp_path, Allocation.hashed(tables, make_config(args)))
    (tmp_path / "step-00000001" / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="settings.json has SHA-256"):
        factory(tmp_path / "step-00000001", None)


def test_of_a_run_the_best_checkpoint_is_served(
    clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments(clicks)
    dataset = open_dataset(args)
    best = {"steps": 20, "validation": {"auc": 0.75}}
    for name in ("step-00000020", "step-00000040", "step-00000070"):
        write_checkpoint(tmp_path / name, args, dataset, best)
    find_checkpoint = sys.modules[load_factory(SERVING).__module__].find_checkpoint
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000020"
    assert f"taking {tmp_path / 'step-00000020'}, validation AUC 0.7500" in capsys.readouterr().err
    assert find_checkpoint(tmp_path / "step-00000040") == tmp_path / "step-00000040"
    shutil.rmtree(tmp_path / "step-00000020")
    with pytest.raises(ValueError, match="step-00000020, the best checkpoint of the run, is gone"):
        find_checkpoint(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--table lma", "--table lma --raw-ids", "--table full"])
def test_trained_exported_and_scored_as_the_trainer_did(clicks: Path, tmp_path: Path, options: str) -> None:
    import test_train

    columns = ["--label", "click", "--categorical", "user", "item", "tags", "--numeric", "price", "--dim", "8"]
    data = ["--data", str(clicks), *columns, "--epochs", "2"]
    run = [*options.split(), *data, "--checkpoint-dir", tmp_path / "run", "--json", tmp_path / "run.json"]
    record = test_train.record_of(test_train.train(*run, ranks=2), tmp_path / "run.json")
    options = ["--checkpoint", str(tmp_path / "run"), "--model", SERVING, "--out", str(tmp_path / "model.pt")]
    assert torchrec_lma(["export", *options]) == 0
    model, auc = torch.jit.load(tmp_path / "model.pt"), BinaryAUROC()
    args = arguments(clicks)
    for batch in open_dataset(args).batches("test", batch_size=50):
        auc.update(model(request(batch.dense_features, batch.sparse_features))["default"], batch.labels.int())
    assert auc.compute().item() == pytest.approx(record["best"]["test"]["auc"], abs=1e-3)
