"""Train a DLRM with full or LMA-compressed tables through TorchRec: `arguments.py` says how to call it."""

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
from arguments import EXIT_TERMINATED, parse_args
from checkpointing import read_settings
from model import (
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
from start import find_start, keep_sample, open_checkpoints
from torchrec.datasets.utils import Batch
from torchrec.distributed.types import ShardingPlan
from trainer import Diverged, Progress, Terminated, Trainer, format_auc, say

from torchrec_lma.cli.errors import first_to_say
from torchrec_lma.cli.outputs import check_folder, check_writable
from torchrec_lma.datasets import RowDataset
from torchrec_lma.files import replacing
from torchrec_lma.options import make_tables, open_dataset

# torchrec and torchmetrics call what newer torch versions deprecate; nothing a user of this script could change.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
warnings.filterwarnings("ignore", category=UserWarning, module="torchmetrics")
# Their planner warns of every choice that it leaves out; where it has none left it raises an error that says so.
for _name in ("torch.fx._symbolic_trace", "torchrec.distributed.planner", "torchrec.distributed.utils"):
    logging.getLogger(_name).setLevel(logging.ERROR)


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


def open_data(args: argparse.Namespace) -> tuple[RowDataset, int]:
    """The data, and how many steps an epoch has. Raises what is wrong with them now, and not after an epoch."""
    dataset = open_dataset(args)
    for split in ("validation", "test"):
        dataset.num_rows(split)
    return dataset, dataset.num_batches("train", args.batch_size, dist.get_world_size(), drop_last=True)


def main(args: argparse.Namespace) -> dict[str, Any]:
    device = init_distributed()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        check_outputs(args)
    restarted = _restarted(device)
    checkpoints = open_checkpoints(args, restarted)
    dataset, steps_per_epoch = open_data(args)
    resume_from, settings, vocabulary = find_start(args, dataset, checkpoints, restarted)
    if checkpoints is not None:
        settings["sample"] = keep_sample(dataset)
    prepare = make_prepare(args, vocabulary)

    tables = make_tables(args, settings["num_embeddings"])
    allocation = get_allocation(args, dataset, tables, prepare, resume_from) if args.table == "lma" else None
    collection = make_collection(tables, allocation, torch.device("meta"))
    # Ranks draw different numbers, so that the shards of a table do not start equal; DDP broadcasts the layers.
    torch.manual_seed(args.seed * world_size + rank)
    model = make_model(args, collection, len(dataset.schema.numeric), device)
    train_tables_in_backward(collection, args)
    plan = make_plan(model, args, device, read_settings(resume_from) if resume_from is not None else None)
    settings["plan"] = describe(plan)
    dmp, optimizer = shard(model, args, device, plan)

    progress = Progress(steps_per_epoch)
    if checkpoints is not None and resume_from is not None:
        saved = Progress(**checkpoints.load(resume_from, dmp, optimizer))
        progress = continued(saved, resume_from, steps_per_epoch)

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
        say(f"stopped: saved in {args.checkpoint_dir} at epoch {progress.epoch}, step {progress.step}")
        dist.destroy_process_group()
        raise

    record = make_record(settings, trainer, memory_use(collection, args))
    say_best(progress)
    if args.json is not None and rank == 0:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(record, indent=1, allow_nan=False))
    dist.barrier()
    dist.destroy_process_group()
    return record


def describe(plan: ShardingPlan) -> dict[str, dict[str, Any]]:
    """The plan of the tables as JSON, which is said as well."""
    described = {
        name: {"sharding_type": p.sharding_type, "compute_kernel": p.compute_kernel, "ranks": p.ranks}
        for name, p in plan.plan["model.sparse_arch.embedding_bag_collection"].items()
    }
    for name, table in described.items():
        say(f"{name}: {table['sharding_type']}, {table['compute_kernel']}, ranks {table['ranks']}")
    return described


def continued(saved: Progress, resume_from: Path, steps_per_epoch: int) -> Progress:
    """Where a run continues that had come as far as `saved`, maybe on another number of ranks."""
    progress = saved.with_steps_per_epoch(steps_per_epoch)
    say(f"resuming {resume_from}: epoch {progress.epoch}, step {progress.step} of {steps_per_epoch}")
    if progress is not saved:
        say(f"    the run had {saved.steps_per_epoch} steps in an epoch: some rows of this one come twice or not")
    return progress


def make_record(settings: dict[str, Any], trainer: Trainer, memory: dict[str, Any]) -> dict[str, Any]:
    """What --json writes."""
    progress = trainer.progress
    return {
        "arguments": settings["arguments"],
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "device": trainer.device.type,
        "world_size": dist.get_world_size(),
        "plan": settings["plan"],
        "memory": memory,
        "median_step_ms": 1000 * statistics.median(trainer.step_seconds) if trainer.step_seconds else None,
        "steps": progress.steps,
        "evaluations": progress.evaluations,
        "best": progress.best,
    }


def say_best(progress: Progress) -> None:
    """What the run reached, where anything decides it."""
    if progress.best is not None:
        best = progress.best
        say(
            f"best after {best['steps']} steps: validation {format_auc(best['validation'])}, test "
            f"{format_auc(best['test'])}, log-loss {best['test']['log_loss']:.4f}"
        )
    elif progress.evaluations:
        say(f"no evaluation is the best one: validation {format_auc(progress.evaluations[-1]['validation'])}")


def check_outputs(args: argparse.Namespace) -> None:
    """Raises OSError where what will be written cannot be: now, and not after an epoch."""
    if args.checkpoint_dir is not None:
        check_folder("--checkpoint-dir", args.checkpoint_dir)
    if args.json is not None:
        check_writable("--json", args.json)


def run() -> int:
    """The exit status: 1 if the run diverged, 2 if its input is at fault, which is said on stderr."""
    try:
        main(parse_args())
    except Terminated:
        return EXIT_TERMINATED
    except (Diverged, ValueError, OSError) as error:
        if first_to_say(str(error)):
            print(f"train.py: {error}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, Diverged) else 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
