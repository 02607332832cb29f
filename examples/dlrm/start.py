"""What a run of train.py starts from: a checkpoint to resume, or an allocation, or the ids of the data."""

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch.distributed as dist
from checkpointing import Checkpoints, is_checkpoint, read_settings, read_vocabulary

from torchrec_lma.datasets import RowDataset, Vocabulary
from torchrec_lma.options import check_id_types, count_embeddings, load_allocation, make_vocabulary, table_names
from torchrec_lma.quant import request

SAMPLE_ROWS = 200  # that a checkpoint keeps
COMPARED_ROWS = 10_000  # at each of four places, when a run is resumed
# Arguments that may change when a run is resumed; the others decide what the model is or what it learns from. --data
# may move, but must have the same rows.
MAY_CHANGE = {
    "allocation",
    "checkpoint_dir",
    "checkpoint_every",
    "data",
    "epochs",
    "json",
    "keep",
    "max_steps",
    "patience",
    "resume",
    "sharding_types",
}


def check_settings(then: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> None:
    """Raises ValueError naming what differs where resuming would be training something else."""
    changed = [
        f"--{name.replace('_', '-')} was {then['arguments'][name]}, now {value}"
        for name, value in now["arguments"].items()
        if name not in MAY_CHANGE and name in then["arguments"] and then["arguments"][name] != value
    ]
    check_id_types(then.get("id_types", {}), now["id_types"], checkpoint)
    if then["train_rows"] != now["train_rows"]:
        changed.append(f"--data had {then['train_rows']} rows to train on, now {now['train_rows']}")
    elif then["rows_digest"] != now["rows_digest"]:
        changed.append(f"--data had other rows than {now['arguments']['data']} has")
    if changed:
        raise ValueError(f"cannot resume {checkpoint} with other settings: {'; '.join(changed)}")


def find_start(
    args: argparse.Namespace, dataset: RowDataset, checkpoints: Checkpoints | None, restarted: bool
) -> tuple[Path | None, dict[str, Any], Vocabulary | None]:
    """The checkpoint to resume, the settings of this run, and the vocabulary. Collective.

    `restarted`: by torchrun, on any node.
    """
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    settings: dict[str, Any] = {
        "arguments": arguments,
        "train_rows": dataset.num_rows("train"),
        "rows_digest": digest_of_rows(dataset),
        "world_size": dist.get_world_size(),
        "categorical": dataset.schema.categorical,
        "numeric": dataset.schema.numeric,
        "id_types": dataset.id_types,
    }
    resume_from = checkpoints.newest() if checkpoints is not None else None
    if resume_from is None:
        counts, vocabulary = count_and_number_ids(args, dataset)
        return None, settings | {"num_embeddings": counts}, vocabulary
    if not (args.resume or restarted):
        raise ValueError(f"{args.checkpoint_dir} holds {resume_from.name}; give --resume, or empty the folder")
    trained = read_settings(resume_from)
    check_settings(trained, settings, resume_from)
    return resume_from, settings | {"num_embeddings": trained["num_embeddings"]}, read_vocabulary(resume_from)


def open_checkpoints(args: argparse.Namespace, restarted: bool) -> Checkpoints | None:
    """The checkpoints of this run, whose folder no other run writes in from here on. Collective.

    Raises:
        ValueError: --resume finds nothing there, or the folder is in a checkpoint.
        OSError: another run writes there.
    """
    if args.checkpoint_dir is None:
        return None
    folder, checkpoints = args.checkpoint_dir, Checkpoints(args.checkpoint_dir, args.keep)
    if args.resume == "required" and not restarted and not checkpoints.exist():
        runs = sorted({str(path.parent) for path in folder.glob("*/step-*") if is_checkpoint(path)})
        raise ValueError(
            f"--resume: {folder} {'holds no checkpoint' if folder.exists() else 'does not exist'}"
            + (f"; there are some in {', '.join(runs)}" if runs else "")
            + ". Leave --resume out to start, or give --resume auto to start where there is none"
        )
    checkpoints.lock()
    return checkpoints


def digest_of_rows(dataset: RowDataset) -> str:
    """SHA-256, in hex, of the first rows of each split, and of those in the middle of the training rows: other data of
    the same size is told by them, without a pass over all of it."""
    digest = hashlib.sha256()
    for split, part, parts in (("train", 0, 2), ("train", 1, 2), ("validation", 0, 1), ("test", 0, 1)):
        batch = next(dataset.batches(split, batch_size=COMPARED_ROWS, rank=part, world_size=parts))
        ids = batch.sparse_features
        for values in (batch.labels, batch.dense_features, ids.lengths(), ids.values()):
            digest.update(values.contiguous().numpy().data)
    return digest.hexdigest()


def count_and_number_ids(args: argparse.Namespace, dataset: RowDataset) -> tuple[dict[str, int], Vocabulary | None]:
    """Rows of each column's full table, and the vocabulary, of the allocation's data if one is given."""
    vocabulary = None
    if args.allocation is not None:
        allocation, vocabulary = load_allocation(args.allocation, dataset)
        if vocabulary is not None and (args.raw_ids or args.num_embeddings is not None):
            raise ValueError(f"{args.allocation} is of a vocabulary: leave --raw-ids and --num-embeddings out")
        rows = {table.name: table.num_embeddings for table in allocation.tables}
        if vocabulary is not None or all(table.raw_ids for table in allocation.tables):
            return {column: rows[name] for column, name in table_names(dataset.schema.categorical).items()}, vocabulary
    vocabulary = make_vocabulary(args, dataset)
    return vocabulary.num_embeddings if vocabulary is not None else count_embeddings(args, dataset), vocabulary


def keep_sample(dataset: RowDataset) -> dict[str, Any]:
    """Some test rows as JSON, so that an export can check the model where the data is not."""
    sample = next(dataset.batches("test", batch_size=SAMPLE_ROWS))
    rows = request(sample.dense_features, sample.sparse_features)
    return {name: values.tolist() for name, values in rows.items()}
