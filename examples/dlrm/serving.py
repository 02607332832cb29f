"""The DLRM that train.py trained, as `torchrec-lma export` takes it.

torchrec-lma export --checkpoint runs/demo/lma-seed0 --model examples/dlrm/serving.py:dlrm --out model.pt
"""

import argparse
import sys
from pathlib import Path

import torch
from checkpointing import Checkpoints, damage, read_progress, read_settings, read_vocabulary
from model import make_collection, make_model
from torch import Tensor, nn
from torchrec.models.dlrm import DLRM
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma import Allocation
from torchrec_lma.datasets import Vocabulary
from torchrec_lma.features import to_int64
from torchrec_lma.options import make_tables
from torchrec_lma.quant import ServableModel, load_checkpoint

torch.fx.wrap("to_int64")  # it looks at the type, which a trace cannot


def dlrm(checkpoint: Path, allocation: Allocation | None = None) -> ServableModel:
    """The factory.

    Args:
        checkpoint: of train.py, or the --checkpoint-dir of a run, of which `find_checkpoint` takes one.
        allocation: must be the one of the checkpoint, which holds it too.
    Raises:
        ValueError: there is no whole checkpoint, or it was trained under another allocation.
    """
    checkpoint = find_checkpoint(checkpoint)
    settings = read_settings(checkpoint)
    args = argparse.Namespace(**settings["arguments"])
    tables = make_tables(args, settings["num_embeddings"])
    categorical = list(settings["categorical"])
    allocation = (allocation or Allocation.from_checkpoint(checkpoint)) if args.table == "lma" else None
    cpu = torch.device("cpu")
    model = make_model(args, make_collection(tables, allocation, cpu), len(settings["numeric"]), cpu).model
    load_checkpoint(model, checkpoint, "model.model.")
    vocabulary = read_vocabulary(checkpoint)
    if vocabulary is not None:
        model = _WithRows(_VocabularyRows(vocabulary, categorical), model)
    elif args.table == "full":
        model = _WithRows(_HashedRows(args.num_embeddings), model)
    return ServableModel(
        model=model,
        float_features=list(settings["numeric"]),
        id_list_features=categorical,
        id_score_list_features=[],
        sample={
            name: torch.tensor(values, dtype=torch.float32 if name == "float_features" else torch.int64)
            for name, values in settings["sample"].items()
        },
        string_features=[name for name, id_type in settings["id_types"].items() if id_type == "strings"],
    )


def find_checkpoint(path: Path) -> Path:
    """The checkpoint itself, or of a run's folder the best one, or the newest if the run was not evaluated yet.

    Raises ValueError if there is none, or it is damaged or gone.
    """
    if not (path / ".metadata").exists():
        checkpoints = Checkpoints(path)
        if not (paths := checkpoints.paths()):
            raise ValueError(f"{path} is not a checkpoint of train.py, nor does it hold one; give its --checkpoint-dir")
        newest, best = paths[-1], read_progress(paths[-1])["best"]
        path = newest if best is None else checkpoints.path(best["steps"])
        if not path.exists():
            raise ValueError(f"{path}, the best checkpoint of the run, is gone; give another one, such as {newest}")
        reached = "" if best is None else f", validation AUC {best['validation']['auc']:.4f}"
        print(f"taking {path}{reached}", file=sys.stderr)
    if problem := damage(path):
        raise ValueError(f"checkpoint {path} is damaged ({problem}); export another one")
    return path


class _WithRows(nn.Module):
    """A model behind what turns the ids of the data into those of its tables, as in training."""

    def __init__(self, rows: nn.Module, model: DLRM) -> None:
        super().__init__()
        self.rows = rows
        self.model = model

    def forward(self, float_features: Tensor, features: KeyedJaggedTensor) -> Tensor:
        return self.model(float_features, self.rows(features))


class _HashedRows(nn.Module):
    """The hashing trick."""

    def __init__(self, num_embeddings: int) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        ids = to_int64(features.values(), "the request")
        return KeyedJaggedTensor(keys=features.keys(), values=ids % self.num_embeddings, lengths=features.lengths())


class _VocabularyRows(nn.Module):
    """A Vocabulary that scripts: its ids travel in the model."""

    def __init__(self, vocabulary: Vocabulary, features: list[str]) -> None:
        super().__init__()
        self.features = features
        for i, feature in enumerate(features):
            self.register_buffer(f"ids_{i}", vocabulary.ids[feature])

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        parts = features.split([1] * len(self.features))
        rows = []
        for i in range(len(self.features)):
            known, ids = self.get_buffer(f"ids_{i}"), to_int64(parts[i].values(), self.features[i])
            if not len(known):
                rows.append(torch.zeros_like(ids))
                continue
            found = torch.searchsorted(known, ids).clamp(max=len(known) - 1)
            rows.append(torch.where(known[found] == ids, found + 1, 0))
        return KeyedJaggedTensor(keys=self.features, values=torch.cat(rows), lengths=features.lengths())
