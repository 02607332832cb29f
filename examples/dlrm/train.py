"""Train a DLRM with full or LMA-compressed tables through TorchRec.

On one process:       python examples/dlrm/train.py --table lma --compression 16
On two:               torchrun --nproc-per-node 2 examples/dlrm/train.py ...
Through a scheduler:  torchx run --scheduler slurm torchx_components/lma.py:train -j 2x8 -- ...

Runs on CUDA with NCCL where there is a GPU for each local rank, else on the CPU with gloo.
"""

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpointing import Checkpoints
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAUROC
from torchrec.datasets.utils import Batch
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingPlan, ShardingType
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig, data_type_to_dtype
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from tqdm import tqdm

from torchrec_lma import Allocation, LMAEmbeddingBagCollection, get_default_sharders
from torchrec_lma.datasets import RowDataset, Vocabulary
from torchrec_lma.options import (
    add_data_options,
    add_lma_options,
    add_table_options,
    count_embeddings,
    make_builder,
    make_config,
    make_tables,
    open_dataset,
)

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise-adagrad": RowWiseAdagrad,
    "adam": torch.optim.Adam,
}
Prepare = Callable[[Batch], Batch]

# torchrec and torchmetrics call what newer torch versions deprecate; nothing a user of this script could change.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
warnings.filterwarnings("ignore", category=UserWarning, module="torchmetrics")


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
        "--patience",
        type=int,
        default=1,
        help="stop after this many epochs without a better validation AUC (default: %(default)s)",
    )
    training.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="rowwise-adagrad",
        help="of the tables; FBGEMM has no fused Adam on the CPU, where adam trains data-parallel tables "
        "(default: %(default)s)",
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
        help="what the planner may choose from (default: all that run with the optimizer and --chunk-dim)",
    )

    run = parser.add_argument_group("run")
    run.add_argument("--checkpoint-dir", type=Path, metavar="DIR", help="save after every epoch, keep the last two")
    run.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --checkpoint-dir")
    run.add_argument("--json", type=Path, metavar="FILE", help="write a record of the run")
    args = parser.parse_args(arguments)
    if args.resume and args.checkpoint_dir is None:
        parser.error("--resume needs --checkpoint-dir")
    return args


def init_distributed() -> torch.device:
    """The process group that torchrun describes, or one of a single process; returns this rank's device."""
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(_backend())
    if not _use_cuda():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def _use_cuda() -> bool:
    return torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])


def _backend() -> str:
    return "nccl" if _use_cuda() else "gloo"


def make_collection(
    args: argparse.Namespace, dataset: RowDataset, resume_from: Path | None
) -> tuple[EmbeddingBagCollection, Prepare]:
    """The collection on the meta device, and what turns the dataset's raw ids into its input."""
    if args.table == "lma":
        tables = make_tables(args, count_embeddings(args, dataset))
        allocation = _allocation(args, dataset, tables, resume_from)
        config = allocation.config if resume_from is not None else make_config(args)
        ebc = LMAEmbeddingBagCollection(tables, config, allocation, device=torch.device("meta"))
        return ebc, lambda batch: batch
    if args.num_embeddings is not None:  # no vocabulary pass: the hashing trick
        tables = make_tables(args, count_embeddings(args, dataset))
        return _full(tables), lambda batch: _with_ids(batch, batch.sparse_features.values() % args.num_embeddings)
    vocabulary = Vocabulary(dataset.distinct_ids())
    tables = make_tables(args, vocabulary.num_embeddings)
    return _full(tables), lambda batch: _with_ids(batch, vocabulary(batch.sparse_features).values())


def _full(tables: list[EmbeddingBagConfig]) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(tables, device=torch.device("meta"))


def _with_ids(batch: Batch, ids: torch.Tensor) -> Batch:
    batch.sparse_features._values = ids  # a fresh batch that nothing else holds; a copy would drop cached offsets
    return batch


def _allocation(
    args: argparse.Namespace, dataset: RowDataset, tables: list[EmbeddingBagConfig], resume_from: Path | None
) -> Allocation:
    if resume_from is not None:
        return Allocation.from_checkpoint(resume_from)
    if args.allocation is not None:
        return Allocation.load(args.allocation)
    builder = make_builder(args, tables)
    share = dataset.batches("train", batch_size=8192, rank=dist.get_rank(), world_size=dist.get_world_size())
    for batch in share:
        if batch.labels.numel():
            builder.update(batch.sparse_features)
    builders: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(builders, builder)
    for other in builders[1:]:
        builders[0].merge(other)
    return builders[0].build()


def allowed_sharding_types(args: argparse.Namespace, device: torch.device) -> list[str] | None:
    """What the planner may choose from; None is all. Raises ValueError if nothing runs."""
    why = None
    if args.optimizer == "adam" and device.type == "cpu":
        why = "FBGEMM has no fused Adam on the CPU"
    elif args.table == "lma" and args.chunk_dim % 4 != 0:
        why = f"fused kernels need a --chunk-dim that is a multiple of 4, not {args.chunk_dim}"
    if why is None:
        return args.sharding_types
    if args.sharding_types is not None and "data_parallel" not in args.sharding_types:
        raise ValueError(f"{why}, so tables must be data_parallel; --sharding-types has {args.sharding_types}")
    return ["data_parallel"]


def make_plan(
    model: torch.nn.Module, device: torch.device, sharding_types: list[str] | None, chunk_dim: int
) -> ShardingPlan:
    """The planner's own plan within the given constraints."""
    constraints = {
        table.name: ParameterConstraints(sharding_types=sharding_types, min_partition=chunk_dim)
        for table in model.model.sparse_arch.embedding_bag_collection.embedding_bag_configs()
    }
    topology = Topology(
        world_size=dist.get_world_size(),
        local_world_size=get_local_size(dist.get_world_size()),
        compute_device=device.type,
    )
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    return planner.collective_plan(model, get_default_sharders(), dist.GroupMember.WORLD)


def evaluate(
    pipeline: TrainPipelineSparseDist, model: torch.nn.Module, batches: Iterator[Batch], device: torch.device
) -> dict[str, float]:
    """AUC and log-loss over the rows of all ranks."""
    auc, log_loss = BinaryAUROC().to(device), MeanMetric().to(device)
    model.eval()
    for _, logits, labels in _outputs(pipeline, batches):
        auc.update(logits.sigmoid(), labels.int())
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        log_loss.update(losses)
    model.train()
    return {"auc": auc.compute().item(), "log_loss": log_loss.compute().item()}


def _outputs(pipeline: TrainPipelineSparseDist, batches: Iterator[Batch]) -> Iterator[tuple[torch.Tensor, ...]]:
    while True:
        try:
            yield pipeline.progress(batches)
        except StopIteration:
            return


def main(args: argparse.Namespace) -> dict[str, Any]:
    device = init_distributed()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dataset = open_dataset(args)
    checkpoints = Checkpoints(args.checkpoint_dir) if args.checkpoint_dir is not None else None
    resume_from = checkpoints.newest() if checkpoints is not None else None
    if resume_from is not None and not args.resume:
        raise ValueError(f"{args.checkpoint_dir} holds {resume_from.name}; go on from it with --resume, or empty it")

    ebc, prepare = make_collection(args, dataset, resume_from)
    # Ranks draw different numbers, so that the shards of a table do not start equal; DDP broadcasts the layers.
    torch.manual_seed(args.seed * world_size + rank)
    model = DLRMTrain(
        DLRM(
            ebc,
            dense_in_features=len(dataset.schema.numeric),
            dense_arch_layer_sizes=[*args.dense_layers, args.dim],
            over_arch_layer_sizes=[*args.over_layers, 1],
            dense_device=device,
        )
    )
    sharding_types = allowed_sharding_types(args, device)
    if sharding_types != ["data_parallel"]:
        apply_optimizer_in_backward(OPTIMIZERS[args.optimizer], ebc.parameters(), {"lr": args.lr})
    plan = make_plan(model, device, sharding_types, args.chunk_dim)
    dmp = DistributedModelParallel(model, device=device, plan=plan, sharders=get_default_sharders())
    parameters = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    tables = {name: p for name, p in parameters.items() if "embedding_bags" in name}  # data-parallel ones
    layers = {name: p for name, p in parameters.items() if name not in tables}
    optimizers = [
        dmp.fused_optimizer,
        KeyedOptimizerWrapper(layers, lambda p: torch.optim.Adam(p, lr=args.dense_lr)),
    ]
    if tables:
        optimizers.append(KeyedOptimizerWrapper(tables, lambda p: OPTIMIZERS[args.optimizer](p, lr=args.lr)))
    optimizer = CombinedOptimizer(optimizers)
    pipeline = TrainPipelineSparseDist(dmp, optimizer, device)

    progress: dict[str, Any] = {"epochs": [], "best": None}
    if resume_from is not None:
        progress = checkpoints.load(resume_from, dmp, optimizer)
    say = print if rank == 0 else lambda *_: None
    for name, sharding in plan.plan["model.sparse_arch.embedding_bag_collection"].items():
        say(f"{name}: {sharding.sharding_type}, {sharding.compute_kernel}, ranks {sharding.ranks}")

    def batches(split: str, epoch: int = 0) -> Iterator[Batch]:
        train = split == "train"
        read = dataset.batches(
            split,
            batch_size=args.batch_size,
            rank=rank,
            world_size=world_size,
            shuffle_seed=args.seed if train else None,
            epoch=epoch,
            drop_last=train,
        )
        return map(prepare, read)

    step_seconds: list[float] = []
    for epoch in range(len(progress["epochs"]) + 1, args.epochs + 1):
        best = progress["best"]
        if best is not None and epoch - best["epoch"] > args.patience:
            break
        steps = dataset.num_batches("train", args.batch_size, world_size, drop_last=True)
        bar = tqdm(total=steps, desc=f"epoch {epoch}", unit="step", disable=None if rank == 0 else True)
        train_loss, started = 0.0, time.perf_counter()
        for loss, _, _ in _outputs(pipeline, batches("train", epoch)):
            train_loss += loss.item()  # also waits for the device, so that the time is the step's
            step_seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
            bar.update()
        bar.close()
        entry: dict[str, Any] = {"epoch": epoch, "train_loss": train_loss / steps}
        entry["validation"] = evaluate(pipeline, dmp, batches("validation"), device)
        if best is None or entry["validation"]["auc"] > best["validation"]["auc"]:
            entry["test"] = evaluate(pipeline, dmp, batches("test"), device)
            progress["best"] = entry
        progress["epochs"].append(entry)
        say(
            f"epoch {epoch}: train loss {entry['train_loss']:.4f}, validation AUC {entry['validation']['auc']:.4f}"
            + (f", test AUC {entry['test']['auc']:.4f}" if "test" in entry else "")
        )
        if checkpoints is not None:
            checkpoints.save(epoch, dmp, optimizer, progress)

    record = {
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "device": device.type,
        "world_size": world_size,
        "plan": {
            name: {"sharding_type": p.sharding_type, "compute_kernel": p.compute_kernel, "ranks": p.ranks}
            for module in plan.plan.values()
            for name, p in module.items()
        },
        "memory": memory_use(ebc, args.optimizer, sharding_types == ["data_parallel"]),
        # The first steps allocate and warm up.
        "median_step_ms": 1000 * statistics.median(step_seconds[5:]) if len(step_seconds) > 5 else None,
        **progress,
    }
    if progress["best"] is not None:
        best = progress["best"]
        say(f"best epoch {best['epoch']}: test AUC {best['test']['auc']:.4f}, log-loss {best['test']['log_loss']:.4f}")
    if args.json is not None and rank == 0:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        temporary = args.json.with_name(f".{args.json.name}.tmp")
        temporary.write_text(json.dumps(record, indent=1))
        os.replace(temporary, args.json)
    dist.barrier()
    dist.destroy_process_group()
    return record


def memory_use(ebc: EmbeddingBagCollection, optimizer: str, data_parallel: bool) -> dict[str, int]:
    """Bytes of the tables, their optimizer state and their allocation; once, however many ranks replicate them."""
    lma = isinstance(ebc, LMAEmbeddingBagCollection)
    weight_bytes = state_values = 0
    for table in ebc.embedding_bag_configs():
        weights = table.num_embeddings * table.embedding_dim
        weight_bytes += weights * data_type_to_dtype(table.data_type).itemsize
        # FBGEMM's rows are chunks; the dense optimizer sees whole rows.
        row_dim = ebc.config.chunk_dim if lma and not data_parallel else table.embedding_dim
        state_values += {"sgd": 0, "adagrad": weights, "adam": 2 * weights, "rowwise-adagrad": weights // row_dim}[
            optimizer
        ]
    return {
        "weight": weight_bytes,
        "optimizer": 4 * state_values,
        "allocation": ebc.allocation.nbytes if lma else 0,
        "full": ebc.memory_report().full_bytes if lma else weight_bytes,
    }


if __name__ == "__main__":
    main(parse_args())
