"""examples/dlrm/serving.py: checkpoints of the trainer become the models that were trained."""

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torchmetrics.classification import BinaryAUROC
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_lma import Allocation, LMAEmbeddingBagCollection
from torchrec_lma.cli import main as torchrec_lma
from torchrec_lma.datasets import RowDataset, Vocabulary
from torchrec_lma.inference import export, request
from torchrec_lma.inference.export import load_factory
from torchrec_lma.options import make_config, make_tables, open_dataset

DLRM_EXAMPLE = Path(__file__).parents[1] / "examples" / "dlrm"
SERVING = f"{DLRM_EXAMPLE / 'serving.py'}:dlrm"
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
    sys.path.insert(0, str(DLRM_EXAMPLE))
    from train import parse_args

    columns = ["--label", "click", "--categorical", "user", "item", "tags", "--numeric", "price"]
    small = ["--dim", "8", "--compression", "2", "--dense-layers", "4", "--over-layers", "4"]
    return parse_args(["--data", str(clicks), *columns, *small, *more])


def write_checkpoint(
    folder: Path, args: argparse.Namespace, dataset: RowDataset, best: dict[str, Any] | None = None
) -> torch.nn.Module:
    """What the trainer leaves, of an untrained model; returns the model, which takes the trainer's own input."""
    from train import make_model

    vocabulary = None
    num_embeddings = dataset.cardinalities()
    if args.table == "full" and args.num_embeddings is None:
        vocabulary = Vocabulary(dataset.distinct_ids())
        num_embeddings = vocabulary.num_embeddings
    elif args.num_embeddings is not None:
        num_embeddings = dict.fromkeys(num_embeddings, args.num_embeddings)
    tables = make_tables(args, num_embeddings)
    torch.manual_seed(0)
    if args.table == "lma":
        ebc: EmbeddingBagCollection = LMAEmbeddingBagCollection(tables, make_config(args))
    else:
        ebc = EmbeddingBagCollection(tables=tables)
    for bag in ebc.embedding_bags.values():
        bag.weight.data.normal_()
    model = make_model(args, ebc, 1, torch.device("cpu"))
    folder.mkdir(parents=True)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder, no_dist=True)
    settings = {"arguments": vars(args), "categorical": ["user", "item", "tags"], "numeric": ["price"]}
    (folder / "settings.json").write_text(json.dumps({**settings, "num_embeddings": num_embeddings}))
    if vocabulary is not None:
        vocabulary.save(folder / "vocabulary.safetensors")
    (folder / "progress.json").write_text(json.dumps({"best": best}))
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"sha256": digests}))

    def predict(dense: Tensor, features: torch.nn.Module) -> Tensor:
        if vocabulary is not None:
            features = vocabulary(features)
        elif args.table == "full":
            features._values = features.values() % args.num_embeddings
        return model.model(dense, features).detach().reshape(-1).sigmoid()

    return predict


@pytest.mark.parametrize("kind", ["lma", "full", "hashed"])
def test_a_checkpoint_becomes_the_model_that_was_trained(clicks: Path, tmp_path: Path, kind: str) -> None:
    more = ["--table", "full"] if kind != "lma" else []
    args = arguments(clicks, *more, *(["--num-embeddings", "50"] if kind == "hashed" else []))
    dataset = open_dataset(args)
    write_checkpoint(tmp_path / "epoch-0001-step-00000007", args, dataset)
    predict = write_checkpoint(tmp_path / "epoch-0001", args, dataset)
    servable = load_factory(SERVING)(tmp_path, None)  # a run's folder without a best epoch: the newest, all of epoch 1
    assert (servable.float_features, servable.id_list_features) == (["price"], ["user", "item", "tags"])
    exported = export(servable, tmp_path / "model.pt", "fp32")
    batch = next(dataset.batches("train", batch_size=400))  # other rows than the sample
    served = torch.jit.load(exported.path)(request(batch.dense_features, batch.sparse_features))["default"]
    torch.testing.assert_close(served, predict(batch.dense_features, batch.sparse_features), rtol=0, atol=1e-6)


def test_checkpoints_that_cannot_be_served_are_named(clicks: Path, tmp_path: Path) -> None:
    factory = load_factory(SERVING)
    with pytest.raises(ValueError, match="holds none"):
        factory(tmp_path, None)
    args = arguments(clicks)
    dataset = open_dataset(args)
    write_checkpoint(tmp_path / "epoch-0001", args, dataset)
    tables = make_tables(args, dataset.cardinalities())
    args.hash_seed = 1
    with pytest.raises(ValueError, match="was written with allocation"):
        factory(tmp_path, Allocation.hashed(tables, make_config(args)))
    (tmp_path / "epoch-0001" / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="settings.json has SHA-256"):
        factory(tmp_path / "epoch-0001", None)


def test_of_a_run_the_best_epoch_is_served(clicks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = arguments(clicks)
    dataset = open_dataset(args)
    best = {"epoch": 1, "validation": {"auc": 0.75}}
    for name in ("epoch-0001", "epoch-0002", "epoch-0003-step-00000070"):
        write_checkpoint(tmp_path / name, args, dataset, best)
    find_checkpoint = sys.modules[load_factory(SERVING).__module__].find_checkpoint
    assert find_checkpoint(tmp_path) == tmp_path / "epoch-0001"
    assert f"taking {tmp_path / 'epoch-0001'}, validation AUC 0.7500" in capsys.readouterr().err
    assert find_checkpoint(tmp_path / "epoch-0002") == tmp_path / "epoch-0002"
    shutil.rmtree(tmp_path / "epoch-0001")
    with pytest.raises(ValueError, match="epoch-0001, the best epoch of the run, is gone"):
        find_checkpoint(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("table", ["lma", "full"])
def test_trained_exported_and_scored_as_the_trainer_did(clicks: Path, tmp_path: Path, table: str) -> None:
    import test_train

    columns = ["--label", "click", "--categorical", "user", "item", "tags", "--numeric", "price", "--dim", "8"]
    data = ["--data", str(clicks), *columns, "--epochs", "2"]
    run = ["--table", table, *data, "--checkpoint-dir", tmp_path / "run", "--json", tmp_path / "run.json"]
    record = test_train.record_of(test_train.train(*run, ranks=2), tmp_path / "run.json")
    options = ["--checkpoint", str(tmp_path / "run"), "--model", SERVING, "--out", str(tmp_path / "model.pt")]
    assert torchrec_lma(["export", *options]) == 0
    model, auc = torch.jit.load(tmp_path / "model.pt"), BinaryAUROC()
    args = arguments(clicks)
    for batch in open_dataset(args).batches("test", batch_size=50):
        auc.update(model(request(batch.dense_features, batch.sparse_features))["default"], batch.labels.int())
    assert auc.compute().item() == pytest.approx(record["best"]["test"]["auc"], abs=1e-3)
