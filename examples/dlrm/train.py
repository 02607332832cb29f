"""Train a DLRM with full or LMA-compressed tables through TorchRec.

On one process:       python examples/dlrm/train.py --table lma --compression 16
On two:               torchrun --nproc-per-node 2 examples/dlrm/train.py ...
Through a scheduler:  torchx run --scheduler slurm torchx_components/lma.py:train -j 2x8 -- ...

Runs on CUDA with NCCL where there is a GPU for each local rank, else on the CPU with gloo.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpointing import Checkpoints, read_settings, read_vocabulary
from model import (
    OPTIMIZERS,
    get_allocation,
    make_collection,
    make_model,
    make_plan,
    make_prepare,
    memory_use,
    prepared,
    shard,
    train_tables_in_backward,
)
from torchrec.datasets.utils import Batch
from torchrec.distributed.types import ShardingType
from trainer import Progress, Terminated, Trainer, say

from torchrec_lma.datasets import RowDataset, Vocabulary
from torchrec_lma.options import (
    add_data_options,
    add_lma_options,
    add_table_options,
    count_embeddings,
    make_tables,
    make_vocabulary,
    open_dataset,
)

EXIT_TERMINATED = 75  # EX_TEMPFAIL of sysexits.h: run it again
# Arguments that may change when a run is resumed; the others decide what the model is or what it learns from. --data
# may move, but must have as many rows.
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

# torchrec and torchmetrics call what newer torch versions deprecate; nothing a user of this script could change.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
warnings.filterwarnings("ignore", category=UserWarning, module="torchmetrics")
# Their planner warns of every choice that it leaves out; where it has none left it raises an error that says so.
for _name in ("torch.fx._symbolic_trace", "torchrec.distributed.planner", "torchrec.distributed.utils"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=("lma", "full"), default="lma", help="kind of tables (default: %(default)s)")
    add_data_options(parser)
    add_table_options(parser)
    add_lma_options(parser)
    parser.add_argument_group("LMA").add_argument(
        "--allocation", type=Path, metavar="FILE", help="from `torchrec-lma allocate`; without it one is built first"
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--dense-layers", type=int, nargs="*", default=[64], metavar="WIDTH", help="before the last, dim"
    )
    model.add_argument(
        "--over-layers", type=int, nargs="*", default=[128, 64], metavar="WIDTH", help="before the logit"
    )

    training = parser.add_argument_group("training")
    training.add_argument("--batch-size", type=int, default=512, help="rows on each rank (default: %(default)s)")
    training.add_argument("--epochs", type=int, default=1, help="at most (default: %(default)s)")
    training.add_argument(
        "--evaluations-per-epoch",
        type=int,
        default=3,
        metavar="N",
        help="how often the validation rows are scored (default: %(default)s)",
    )
    training.add_argument(
        "--patience",
        type=int,
        default=3,
        metavar="N",
        help="stop after this many evaluations without a better validation AUC (default: %(default)s)",
    )
    training.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="rowwise-adagrad", help="of the tables (default: %(default)s)"
    )
    training.add_argument("--lr", type=float, default=0.05, help="of the tables (default: %(default)s)")
    training.add_argument("--dense-lr", type=float, default=1e-3, help="of the layers, Adam (default: %(default)s)")
    training.add_argument("--seed", type=int, default=0, help="of weights and shuffling (default: %(default)s)")

    sharding = parser.add_argument_group("sharding")
    sharding.add_argument(
        "--sharding-types",
        nargs="+",
        metavar="TYPE",
        choices=[sharding_type.value for sharding_type in ShardingType],
        help="what the planner may choose from (default: all)",
    )

    run = parser.add_argument_group("run")
    run.add_argument("--max-steps", type=int, metavar="N", help="stop after this many steps of all epochs")
    run.add_argument("--json", type=Path, metavar="FILE", help="write a record of the run")

    restart = parser.add_argument_group("restart (docs/restart.md)")
    restart.add_argument(
        "--checkpoint-dir",
        type=Path,
        metavar="DIR",
        help="save after every evaluation, at the end, and at SIGTERM, which ends the run with status "
        f"{EXIT_TERMINATED}; on a file system that all ranks share",
    )
    restart.add_argument("--checkpoint-every", type=int, metavar="N", help="also save after every N steps of an epoch")
    restart.add_argument(
        "--keep",
        type=int,
        default=2,
        metavar="K",
        help="newest checkpoints to keep, beside the best one (default: %(default)s)",
    )
    restart.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest whole checkpoint in --checkpoint-dir, if there is one; a restart by torchrun does "
        "so without being told",
    )
    args = parser.parse_args(arguments)
    for option in ("resume", "checkpoint_every"):
        if getattr(args, option) and args.checkpoint_dir is None:
            parser.error(f"--{option.replace('_', '-')} needs --checkpoint-dir")
    if args.table == "full" and args.raw_ids:
        parser.error(
            "--raw-ids is of LMA tables; full tables take the ids of a vocabulary, or with --num-embeddings hashes"
        )
    for option in ("checkpoint_every", "evaluations_per_epoch", "keep", "max_steps", "patience"):
        value = getattr(args, option)
        if value is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')} {value} must be at least 1")
    return args


def init_distributed() -> torch.device:
    """The process group that torchrun describes, or one of a single process; returns this rank's device."""
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)
    else:
        store, rank, world_size = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps one store for all restarts of a node. Without a prefix for each, ranks find the addresses
            # there that those of the attempt before left, and wait for the dead. Nodes count their restarts each for
            # itself, so several need a new store each time: see torchx_components/lma.py.
            store = dist.PrefixStore(f"attempt-{_restarts()}", store)
        dist.init_process_group(_backend(), store=store, rank=rank, world_size=world_size)
    if not _use_cuda():
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])))
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def _restarts() -> int:
    """How often torchrun has restarted the processes of this node."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _restarted(device: torch.device) -> bool:
    """Whether torchrun has restarted any node. Collective."""
    restarts = torch.tensor(_restarts(), device=device)
    dist.all_reduce(restarts)
    return bool(restarts)


def _use_cuda() -> bool:
    return torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])


def _backend() -> str:
    return "nccl" if _use_cuda() else "gloo"


def check_settings(then: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> None:
    """Raises ValueError naming what differs where resuming would be training something else."""
    changed = [
        f"--{name.replace('_', '-')} was {then['arguments'][name]}, now {value}"
        for name, value in now["arguments"].items()
        if name not in MAY_CHANGE and name in then["arguments"] and then["arguments"][name] != value
    ]
    if then["train_rows"] != now["train_rows"]:
        changed.append(f"--data had {then['train_rows']} rows to train on, now {now['train_rows']}")
    if changed:
        raise ValueError(f"cannot go on from {checkpoint} with other settings: {'; '.join(changed)}")


def find_start(
    args: argparse.Namespace, dataset: RowDataset, checkpoints: Checkpoints | None, device: torch.device
) -> tuple[Path | None, dict[str, Any], Vocabulary | None]:
    """The checkpoint to go on from, the settings of this run, and the vocabulary. Collective."""
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    settings: dict[str, Any] = {
        "arguments": arguments,
        "train_rows": dataset.num_rows("train"),
        "world_size": dist.get_world_size(),
        "categorical": dataset.schema.categorical,
        "numeric": dataset.schema.numeric,
    }
    resume_from = checkpoints.newest() if checkpoints is not None else None
    if resume_from is None:
        vocabulary = make_vocabulary(args, dataset)
        counts = vocabulary.num_embeddings if vocabulary is not None else count_embeddings(args, dataset)
        return None, settings | {"num_embeddings": counts}, vocabulary
    if not (args.resume or _restarted(device)):
        raise ValueError(f"{args.checkpoint_dir} holds {resume_from.name}; go on from it with --resume, or empty it")
    trained = read_settings(resume_from)
    check_settings(trained, settings, resume_from)
    return resume_from, settings | {"num_embeddings": trained["num_embeddings"]}, read_vocabulary(resume_from)


def main(args: argparse.Namespace) -> dict[str, Any]:
    device = init_distributed()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dataset = open_dataset(args)
    for split in ("validation", "test"):
        dataset.num_rows(split)  # raises now, and not after an epoch, if there is none
    steps_per_epoch = dataset.num_batches("train", args.batch_size, world_size, drop_last=True)
    checkpoints = Checkpoints(args.checkpoint_dir, args.keep) if args.checkpoint_dir is not None else None
    resume_from, settings, vocabulary = find_start(args, dataset, checkpoints, device)
    prepare = make_prepare(args, vocabulary)

    tables = make_tables(args, settings["num_embeddings"])
    allocation = get_allocation(args, dataset, tables, prepare, resume_from) if args.table == "lma" else None
    collection = make_collection(tables, allocation, torch.device("meta"))
    # Ranks draw different numbers, so that the shards of a table do not start equal; DDP broadcasts the layers.
    torch.manual_seed(args.seed * world_size + rank)
    model = make_model(args, collection, len(dataset.schema.numeric), device)
    train_tables_in_backward(collection, args)
    plan = make_plan(model, args, device, read_settings(resume_from) if resume_from is not None else None)
    settings["plan"] = {
        name: {"sharding_type": p.sharding_type, "compute_kernel": p.compute_kernel, "ranks": p.ranks}
        for name, p in plan.plan["model.sparse_arch.embedding_bag_collection"].items()
    }
    for name, table in settings["plan"].items():
        say(f"{name}: {table['sharding_type']}, {table['compute_kernel']}, ranks {table['ranks']}")
    dmp, optimizer = shard(model, args, device, plan)

    progress = Progress(steps_per_epoch)
    if checkpoints is not None and resume_from is not None:
        saved = Progress(**checkpoints.load(resume_from, dmp, optimizer))
        progress = saved.with_steps_per_epoch(steps_per_epoch)
        say(f"going on from {resume_from}: epoch {progress.epoch}, step {progress.step} of {steps_per_epoch}")
        if progress is not saved:
            say(f"    the run had {saved.steps_per_epoch} steps in an epoch: some rows of this one come twice or not")

    def batches(split: str, epoch: int = 0, first_batch: int = 0) -> Iterator[Batch]:
        train = split == "train"
        read = dataset.batches(
            split,
            batch_size=args.batch_size,
            rank=rank,
            world_size=world_size,
            shuffle_seed=args.seed if train else None,
            epoch=epoch,
            drop_last=train,
            first_batch=first_batch,
        )
        return (prepared(batch, prepare) for batch in read)

    def save(progress: Progress) -> None:
        assert checkpoints is not None
        best = progress.best["steps"] if progress.best is not None else None
        checkpoints.save(progress.steps, dmp, optimizer, asdict(progress), settings, vocabulary, best)

    trainer = Trainer(args, device, dmp, optimizer, batches, progress, save if checkpoints is not None else None)
    try:
        trainer.run()
    except Terminated:
        say(f"SIGTERM: saved in {args.checkpoint_dir} at epoch {progress.epoch}, step {progress.step}")
        dist.destroy_process_group()
        raise

    record = {
        "arguments": settings["arguments"],
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "device": device.type,
        "world_size": world_size,
        "plan": settings["plan"],
        "memory": memory_use(collection, args),
        "median_step_ms": 1000 * statistics.median(trainer.step_seconds) if trainer.step_seconds else None,
        "steps": progress.steps,
        "evaluations": progress.evaluations,
        "best": progress.best,
    }
    if progress.best is not None:
        best = progress.best
        say(
            f"best after {best['steps']} steps: validation AUC {best['validation']['auc']:.4f}, test AUC "
            f"{best['test']['auc']:.4f}, log-loss {best['test']['log_loss']:.4f}"
        )
    if args.json is not None and rank == 0:
        write_record(args.json, record)
    dist.barrier()
    dist.destroy_process_group()
    return record


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes it as JSON, under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=1))
    os.replace(temporary, path)


if __name__ == "__main__":
    try:
        main(parse_args())
    except Terminated:
        sys.exit(EXIT_TERMINATED)
