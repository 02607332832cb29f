"""Train a DLRM with full or LMA-compressed tables through TorchRec.

On one process:       python examples/dlrm/train.py --table lma --compression 16
On two:               torchrun --nproc-per-node 2 examples/dlrm/train.py ...
Through a scheduler:  torchx run --scheduler slurm torchx_components/lma.py:train -j 2x8 -- ...

Runs on CUDA with NCCL where there is a GPU for each local rank, else on the CPU with gloo.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from checkpointing import Checkpoints, read_settings, read_vocabulary
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAUROC
from torchrec.datasets.utils import Batch
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import PipelineType, ShardingPlan, ShardingType
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig, data_type_to_dtype
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from tqdm import tqdm

from torchrec_lma import Allocation, LMAEmbeddingBagCollection, LMAEmbeddingShardingPlanner, get_default_sharders
from torchrec_lma.allocation import reduce_builders
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
    run.add_argument("--max-steps", type=int, metavar="N", help="stop after this many steps of all epochs")
    run.add_argument("--json", type=Path, metavar="FILE", help="write a record of the run")

    restart = parser.add_argument_group("restart (docs/restart.md)")
    restart.add_argument(
        "--checkpoint-dir",
        type=Path,
        metavar="DIR",
        help=f"save after every epoch, at the end, and at SIGTERM, which ends the run with status {EXIT_TERMINATED}; "
        "on a file system that all ranks share",
    )
    restart.add_argument("--checkpoint-every", type=int, metavar="N", help="also save after every N steps of an epoch")
    restart.add_argument(
        "--keep",
        type=int,
        default=2,
        metavar="K",
        help="newest checkpoints to keep, beside the best epoch's (default: %(default)s)",
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
    for option in ("checkpoint_every", "keep", "max_steps"):
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


def make_collection(
    args: argparse.Namespace,
    dataset: RowDataset,
    num_embeddings: dict[str, int],
    vocabulary: Vocabulary | None,
    resume_from: Path | None,
) -> tuple[EmbeddingBagCollection, Prepare]:
    """The collection on the meta device, and what turns the dataset's raw ids into its input."""
    tables, meta = make_tables(args, num_embeddings), torch.device("meta")
    if args.table == "lma":
        allocation = _allocation(args, dataset, tables, resume_from)
        return LMAEmbeddingBagCollection(tables, make_config(args), allocation, device=meta), lambda batch: batch
    ebc = EmbeddingBagCollection(tables, device=meta)
    if vocabulary is None:  # the hashing trick
        return ebc, lambda batch: _with_ids(batch, batch.sparse_features.values() % args.num_embeddings)
    return ebc, lambda batch: _with_ids(batch, vocabulary(batch.sparse_features).values())


def _with_ids(batch: Batch, ids: torch.Tensor) -> Batch:
    batch.sparse_features._values = ids  # a fresh batch that nothing else holds; a copy would drop cached offsets
    return batch


def _allocation(
    args: argparse.Namespace, dataset: RowDataset, tables: list[EmbeddingBagConfig], resume_from: Path | None
) -> Allocation:
    given = Allocation.load(args.allocation) if args.allocation is not None else None
    if resume_from is not None:
        trained = Allocation.from_checkpoint(resume_from)
        if given is not None and given.fingerprint != trained.fingerprint:
            raise ValueError(
                f"--allocation {args.allocation} has fingerprint {given.fingerprint}, {resume_from} was trained with "
                f"{trained.fingerprint}: leave the option out, the checkpoint brings its own"
            )
        return trained
    if given is not None:
        return given
    builder = make_builder(args, tables)
    share = dataset.batches("train", batch_size=8192, rank=dist.get_rank(), world_size=dist.get_world_size())
    for batch in share:
        builder.update(batch.sparse_features)
    gloo = dist.new_group(backend="gloo")  # what a builder holds is on the CPU
    reduced = reduce_builders(builder, gloo)
    built: list[Any] = [None]
    if reduced is not None:
        try:
            built = [reduced.build()]
        except ValueError as error:  # all ranks shall say it, none wait for an allocation
            built = [error]
    dist.broadcast_object_list(built, group=gloo, group_src=0)
    if isinstance(built[0], ValueError):
        raise built[0]
    return built[0]


def make_model(
    args: argparse.Namespace, ebc: EmbeddingBagCollection, dense_in_features: int, device: torch.device
) -> DLRMTrain:
    """The DLRM of the arguments, its layers on `device`."""
    return DLRMTrain(
        DLRM(
            ebc,
            dense_in_features=dense_in_features,
            dense_arch_layer_sizes=[*args.dense_layers, args.dim],
            over_arch_layer_sizes=[*args.over_layers, 1],
            dense_device=device,
        )
    )


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
    model: torch.nn.Module,
    device: torch.device,
    sharding_types: list[str] | None,
    batch_size: int,
    trained: dict[str, Any] | None,
) -> ShardingPlan:
    """The planner's own plan within the given constraints.

    `trained`: settings of the run that is resumed. On as many ranks as then, tables keep their sharding types: where
    two cost the same, the planner may choose another one each time.
    """
    constraints = {
        table.name: ParameterConstraints(
            sharding_types=sharding_types if trained is None else _types_again(trained, table.name, sharding_types),
        )
        for table in model.model.sparse_arch.embedding_bag_collection.embedding_bag_configs()
    }
    topology = Topology(
        world_size=dist.get_world_size(),
        local_world_size=get_local_size(dist.get_world_size()),
        compute_device=device.type,
    )
    planner = LMAEmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        constraints=constraints,
        pipeline_type=PipelineType.TRAIN_SPARSE_DIST,
    )
    return planner.collective_plan(model, get_default_sharders(), dist.GroupMember.WORLD)


def _types_again(trained: dict[str, Any], table: str, sharding_types: list[str] | None) -> list[str]:
    allowed = sharding_types if sharding_types is not None else [each.value for each in ShardingType]
    then = trained["plan"][table]["sharding_type"]
    if then in allowed and trained["world_size"] == dist.get_world_size():
        return [then]
    # Dense and fused optimizers keep different state: a data-parallel table stays so, and no other one becomes it.
    found = [each for each in allowed if (each == "data_parallel") == (then == "data_parallel")]
    if not found:
        raise ValueError(
            f"{table} was {then} in the checkpoint and --sharding-types {allowed} has no type with the same kind of "
            "optimizer: add " + (then if then == "data_parallel" else f"one that is not data_parallel, such as {then}")
        )
    return found


@dataclass
class Progress:
    """Where a run is and what it has reached; JSON in a checkpoint.

    Attributes:
        epoch: the one under way, from 1.
        step: how many of its steps are done.
        steps: how many steps of all epochs are done.
        steps_per_epoch: with this data, batch size and world size.
        loss_sum: over the steps of the epoch that are done, of the loss's mean over ranks.
        epochs: what each finished epoch reached.
        best: the one of them with the best validation AUC.
    """

    steps_per_epoch: int
    epoch: int = 1
    step: int = 0
    steps: int = 0
    loss_sum: float = 0.0
    epochs: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None

    def with_steps_per_epoch(self, steps: int) -> "Progress":
        """At the same share of the epoch, for another world size. Ranks' shares of the rows are cut elsewhere there, so
        the rest of this one epoch has some rows again and others not at all."""
        if steps == self.steps_per_epoch:
            return self
        step = self.step * steps // self.steps_per_epoch
        loss_sum = self.loss_sum / self.step * step if self.step else 0.0
        return replace(self, steps_per_epoch=steps, step=step, loss_sum=loss_sum)


class Terminated(Exception):
    """SIGTERM came and the run has been saved."""


class Trainer:
    """Trains, evaluates and saves. `run` is collective; ranks call it together."""

    def __init__(
        self,
        args: argparse.Namespace,
        device: torch.device,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        batches: Callable[..., Iterator[Batch]],
        progress: Progress,
        save: Callable[[Progress, bool], None],
    ) -> None:
        self.args = args
        self.device = device
        self.model = model
        self.pipeline = TrainPipelineSparseDist(model, optimizer, device)
        self.batches = batches
        self.progress = progress
        self.save = save
        self.step_seconds: deque[float] = deque(maxlen=1000)
        self._terminate = False
        if args.checkpoint_dir is not None:
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_: Any) -> None:
        self._terminate = True  # the ranks agree about it after their step: see _over_ranks

    def run(self) -> None:
        """Until the epochs, the steps or the patience are used up. Raises Terminated after SIGTERM."""
        progress, args = self.progress, self.args
        while progress.epoch <= args.epochs and not self._out_of_steps():
            best = progress.best
            if best is not None and progress.epoch - best["epoch"] > args.patience:
                break
            self._train_epoch()
            if progress.step < progress.steps_per_epoch:
                self.save(progress, False)
            else:
                self._finish_epoch()

    def _out_of_steps(self) -> bool:
        return self.args.max_steps is not None and self.progress.steps >= self.args.max_steps

    def _train_epoch(self) -> None:
        """The steps of the epoch that are left, as far as --max-steps allows."""
        progress, every = self.progress, self.args.checkpoint_every
        bar = tqdm(
            total=progress.steps_per_epoch,
            initial=progress.step,
            desc=f"epoch {progress.epoch}",
            unit="step",
            disable=None if dist.get_rank() == 0 else True,
        )
        batches = self.batches("train", epoch=progress.epoch, first_batch=progress.step)
        started = time.perf_counter()
        for count, (loss, _, _) in enumerate(_outputs(self.pipeline, batches)):
            loss_sum, terminate = self._over_ranks(loss.detach(), self._terminate)  # waits for the device
            progress.loss_sum += loss_sum / dist.get_world_size()
            progress.step += 1
            progress.steps += 1
            if count >= 5:  # the first steps allocate and warm up
                self.step_seconds.append(time.perf_counter() - started)
            bar.update()
            if terminate:
                self._save_and_stop()
            if self._out_of_steps():
                break
            if every is not None and progress.step % every == 0 and progress.step < progress.steps_per_epoch:
                self.save(progress, False)
            started = time.perf_counter()
        bar.close()

    def _finish_epoch(self) -> None:
        progress = self.progress
        entry: dict[str, Any] = {"epoch": progress.epoch, "train_loss": progress.loss_sum / progress.steps_per_epoch}
        entry["validation"] = self._evaluate("validation")
        best = progress.best
        if best is None or entry["validation"]["auc"] > best["validation"]["auc"]:
            entry["test"] = self._evaluate("test")
            progress.best = entry
        progress.epochs.append(entry)
        say(
            f"epoch {progress.epoch}: train loss {entry['train_loss']:.4f}, "
            f"validation AUC {entry['validation']['auc']:.4f}"
            + (f", test AUC {entry['test']['auc']:.4f}" if "test" in entry else "")
        )
        progress.epoch, progress.step, progress.loss_sum = progress.epoch + 1, 0, 0.0
        self.save(progress, True)

    def _evaluate(self, split: str) -> dict[str, float]:
        """AUC and log-loss over the rows of all ranks."""
        auc, log_loss = BinaryAUROC().to(self.device), MeanMetric().to(self.device)
        self.model.eval()
        for _, logits, labels in _outputs(self.pipeline, self.batches(split)):
            auc.update(logits.sigmoid(), labels.int())
            losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
            log_loss.update(losses)
            if self._over_ranks(self._terminate)[0]:
                self._save_and_stop()
        self.model.train()
        return {"auc": auc.compute().item(), "log_loss": log_loss.compute().item()}

    def _save_and_stop(self) -> NoReturn:
        self.save(self.progress, False)
        raise Terminated

    def _over_ranks(self, *values: float | torch.Tensor) -> list[float]:
        """The sum over ranks of each; what one rank alone knows, such as a signal, all act on at the same step."""
        sums = torch.stack([torch.as_tensor(value, dtype=torch.float64).to(self.device) for value in values])
        dist.all_reduce(sums)
        return sums.tolist()


def _outputs(pipeline: TrainPipelineSparseDist, batches: Iterator[Batch]) -> Iterator[tuple[torch.Tensor, ...]]:
    while True:
        try:
            yield pipeline.progress(batches)
        except StopIteration:
            return


def say(message: str) -> None:
    if dist.get_rank() == 0:
        print(message, flush=True)


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


def main(args: argparse.Namespace) -> dict[str, Any]:
    device = init_distributed()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dataset = open_dataset(args)
    checkpoints = Checkpoints(args.checkpoint_dir, args.keep) if args.checkpoint_dir is not None else None
    resume_from = checkpoints.newest() if checkpoints is not None else None
    for split in ("validation", "test"):
        dataset.num_rows(split)  # raises now, and not after an epoch, if there is none
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    settings: dict[str, Any] = {"arguments": arguments, "train_rows": dataset.num_rows("train")}
    vocabulary, trained = None, None
    if resume_from is not None:
        if not (args.resume or _restarted(device)):
            raise ValueError(
                f"{args.checkpoint_dir} holds {resume_from.name}; go on from it with --resume, or empty it"
            )
        trained = read_settings(resume_from)
        check_settings(trained, settings, resume_from)
        num_embeddings, vocabulary = trained["num_embeddings"], read_vocabulary(resume_from)
    elif args.table == "full" and args.num_embeddings is None:
        vocabulary = Vocabulary(dataset.distinct_ids())
        num_embeddings = vocabulary.num_embeddings
    else:
        num_embeddings = count_embeddings(args, dataset)
    settings |= {
        "categorical": dataset.schema.categorical,
        "numeric": dataset.schema.numeric,
        "num_embeddings": num_embeddings,
    }

    ebc, prepare = make_collection(args, dataset, num_embeddings, vocabulary, resume_from)
    # Ranks draw different numbers, so that the shards of a table do not start equal; DDP broadcasts the layers.
    torch.manual_seed(args.seed * world_size + rank)
    model = make_model(args, ebc, len(dataset.schema.numeric), device)
    sharding_types = allowed_sharding_types(args, device)
    if sharding_types != ["data_parallel"]:
        apply_optimizer_in_backward(OPTIMIZERS[args.optimizer], ebc.parameters(), {"lr": args.lr})
    plan = make_plan(model, device, sharding_types, args.batch_size, trained)
    settings["world_size"] = world_size
    settings["plan"] = {
        name: {"sharding_type": p.sharding_type, "compute_kernel": p.compute_kernel, "ranks": p.ranks}
        for name, p in plan.plan["model.sparse_arch.embedding_bag_collection"].items()
    }
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

    steps_per_epoch = dataset.num_batches("train", args.batch_size, world_size, drop_last=True)
    progress = Progress(steps_per_epoch)
    if checkpoints is not None and resume_from is not None:
        saved = Progress(**checkpoints.load(resume_from, dmp, optimizer))
        progress = saved.with_steps_per_epoch(steps_per_epoch)
        say(f"going on from {resume_from}: epoch {progress.epoch}, step {progress.step} of {steps_per_epoch}")
        if progress is not saved:
            say(f"    the run had {saved.steps_per_epoch} steps in an epoch: some rows of this one come twice or not")
    for name, table in settings["plan"].items():
        say(f"{name}: {table['sharding_type']}, {table['compute_kernel']}, ranks {table['ranks']}")

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
        return map(prepare, read)

    def save(progress: Progress, epoch_finished: bool) -> None:
        if checkpoints is not None:
            # Named by the steps of all epochs: those of this epoch are fewer after a resume on more ranks, and the
            # newest checkpoint is the one with the highest number.
            epoch, step = (progress.epoch - 1, None) if epoch_finished else (progress.epoch, progress.steps)
            best_epoch = progress.best["epoch"] if progress.best is not None else None
            checkpoints.save(epoch, step, dmp, optimizer, asdict(progress), settings, vocabulary, best_epoch)

    trainer = Trainer(args, device, dmp, optimizer, batches, progress, save)
    try:
        trainer.run()
    except Terminated:
        say(f"SIGTERM: saved in {args.checkpoint_dir} at epoch {progress.epoch}, step {progress.step}")
        dist.destroy_process_group()
        raise

    record = {
        "arguments": arguments,
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "device": device.type,
        "world_size": world_size,
        "plan": settings["plan"],
        "memory": memory_use(ebc, args.optimizer, settings["plan"]),
        "median_step_ms": 1000 * statistics.median(trainer.step_seconds) if trainer.step_seconds else None,
        "steps": progress.steps,
        "epochs": progress.epochs,
        "best": progress.best,
    }
    if progress.best is not None:
        best = progress.best
        say(f"best epoch {best['epoch']}: test AUC {best['test']['auc']:.4f}, log-loss {best['test']['log_loss']:.4f}")
    if args.json is not None and rank == 0:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        temporary = args.json.with_name(f".{args.json.name}.tmp")
        temporary.write_text(json.dumps(record, indent=1))
        os.replace(temporary, args.json)
    dist.barrier()
    dist.destroy_process_group()
    return record


def memory_use(ebc: EmbeddingBagCollection, optimizer: str, plan: dict[str, Any]) -> dict[str, int]:
    """Bytes of the tables, their optimizer state and their allocation; once, however many ranks replicate them."""
    lma = isinstance(ebc, LMAEmbeddingBagCollection)
    weight_bytes = state_values = 0
    for table in ebc.embedding_bag_configs():
        weights = table.num_embeddings * table.embedding_dim
        weight_bytes += weights * data_type_to_dtype(table.data_type).itemsize
        # FBGEMM's rows are chunks; the dense optimizer sees whole rows.
        row_dim = ebc.config.chunk_dim if lma and plan[table.name]["compute_kernel"] != "dense" else table.embedding_dim
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
    try:
        main(parse_args())
    except Terminated:
        sys.exit(EXIT_TERMINATED)
