"""The training loop: steps, evaluations several times an epoch, early stopping, and what a restart needs."""

import argparse
import itertools
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAUROC
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardedTensor
from torchrec.optim.keyed import CombinedOptimizer
from tqdm import tqdm


@dataclass
class Progress:
    """Where a run is and what it has reached; JSON in a checkpoint.

    Attributes:
        steps_per_epoch: with this data, batch size and world size.
        epoch: the one under way, from 1.
        step: how many of its steps are done.
        evaluated: how many of its evaluations are done.
        steps: how many steps of all epochs are done.
        losses: since the last evaluation: the sum over steps of the loss's mean over ranks, and how many steps.
        evaluations: what each one found.
        best: the one of them with the best validation AUC, where that is defined.
    """

    steps_per_epoch: int
    epoch: int = 1
    step: int = 0
    evaluated: int = 0
    steps: int = 0
    losses: tuple[float, int] = (0.0, 0)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None

    def with_steps_per_epoch(self, steps: int) -> "Progress":
        """At the same share of the epoch, for another world size. Ranks' shares of the rows are cut elsewhere there, so
        the rest of this one epoch has some rows again and others not at all."""
        if steps == self.steps_per_epoch:
            return self
        return replace(self, steps_per_epoch=steps, step=self.step * steps // self.steps_per_epoch)

    def next_evaluation(self, per_epoch: int) -> int:
        """The step of the epoch after which the model is evaluated next."""
        steps = sorted({math.ceil(self.steps_per_epoch * k / per_epoch) for k in range(1, per_epoch + 1)})
        return steps[min(self.evaluated, len(steps) - 1)]


class Terminated(Exception):
    """SIGTERM or Ctrl-C came and the run has been saved."""


class Diverged(Exception):
    """A loss or a weight is NaN or infinite; the checkpoints are from before."""


class Trainer:
    """Trains, evaluates and saves. `run` is collective; ranks call it together.

    Args:
        args: of train.py.
        device, model, optimizer: of this rank.
        batches: yields this rank's batches of a split; for "train" of an epoch, from a batch of it on.
        progress: where to continue.
        save: writes a checkpoint; None where none are kept.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        device: torch.device,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        batches: Callable[..., Iterator[Batch]],
        progress: Progress,
        save: Callable[[Progress], None] | None,
    ) -> None:
        self.args = args
        self.device = device
        self.model = model
        self.pipeline = TrainPipelineSparseDist(model, optimizer, device)
        self.batches = batches
        self.progress = progress
        self.step_seconds: deque[float] = deque(maxlen=1000)
        self._save_checkpoint = save
        self._epoch_batches: Iterator[Batch] | None = None
        self._terminate = False
        if save is not None:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP
                    signal.signal(number, self._on_signal)

    def _on_signal(self, *_: Any) -> None:
        self._terminate = True  # the ranks agree about it after their step: see _over_ranks
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # which may pass one Ctrl-C on more than once
            signal.signal(signal.SIGINT, signal.default_int_handler)  # who presses Ctrl-C twice will not wait

    def run(self) -> None:
        """Until the epochs, the steps or the patience are used up. Raises Terminated after a signal, and Diverged."""
        progress, args = self.progress, self.args
        while progress.epoch <= args.epochs and not self._out_of_patience():
            evaluate_at = progress.next_evaluation(args.evaluations_per_epoch)
            if progress.step < evaluate_at:
                if self._steps_left() == 0:
                    return
                self._train(int(min(evaluate_at - progress.step, self._steps_left())))
            if progress.step >= evaluate_at:
                self._evaluate_and_save()
            else:
                self._save()

    def _out_of_patience(self) -> bool:
        best = self.progress.best
        return best is not None and len(self.progress.evaluations) - best["evaluation"] >= self.args.patience

    def _steps_left(self) -> float:
        return math.inf if self.args.max_steps is None else max(0, self.args.max_steps - self.progress.steps)

    def _train(self, steps: int) -> None:
        """So many steps of the epoch. The pipeline ends with them, so that none is under way during an evaluation."""
        progress, every = self.progress, self.args.checkpoint_every
        evaluate_at = progress.next_evaluation(self.args.evaluations_per_epoch)
        if self._epoch_batches is None:
            self._epoch_batches = self.batches("train", epoch=progress.epoch, first_batch=progress.step)
        bar = tqdm(
            total=progress.steps_per_epoch,
            initial=progress.step,
            desc=f"epoch {progress.epoch}",
            unit="step",
            leave=False,
            disable=None if dist.get_rank() == 0 else True,
        )
        started = time.perf_counter()
        for count, (loss, _, _) in enumerate(self._outputs(itertools.islice(self._epoch_batches, steps))):
            loss_sum, terminate = self._over_ranks(loss.detach(), self._terminate)  # waits for the device
            self._check_finite("the loss", loss_sum)
            before, losses = progress.losses
            progress.losses = (before + loss_sum / dist.get_world_size(), losses + 1)
            progress.step += 1
            progress.steps += 1
            if count >= 5:  # the first steps allocate and warm up
                self.step_seconds.append(time.perf_counter() - started)
            bar.update()
            if terminate:
                self._save_and_stop()
            if every is not None and progress.step % every == 0 and count < steps - 1 and progress.step < evaluate_at:
                self._save()
            started = time.perf_counter()
        bar.close()

    def _evaluate_and_save(self) -> None:
        progress = self.progress
        loss_sum, losses = progress.losses
        entry: dict[str, Any] = {
            "evaluation": len(progress.evaluations) + 1,
            "epoch": progress.epoch,
            "steps": progress.steps,
            "train_loss": loss_sum / losses if losses else None,
            "validation": self._evaluate("validation"),
        }
        best = progress.best
        auc = entry["validation"]["auc"]
        if auc is not None and (best is None or auc > best["validation"]["auc"]):
            entry["test"] = self._evaluate("test")
            progress.best = entry
        progress.evaluations.append(entry)
        progress.evaluated += 1
        progress.losses = (0.0, 0)
        say(
            f"epoch {progress.epoch}, step {progress.step} of {progress.steps_per_epoch}: "
            + (f"train loss {entry['train_loss']:.4f}, " if losses else "")
            + f"validation {format_auc(entry['validation'])}"
            + (f", test {format_auc(entry['test'])}" if "test" in entry else "")
        )
        if progress.step >= progress.steps_per_epoch:
            progress.epoch, progress.step, progress.evaluated = progress.epoch + 1, 0, 0
            self._epoch_batches = None
        self._save()

    def _evaluate(self, split: str) -> dict[str, float | None]:
        """AUC and log-loss over the rows of all ranks, and the share of labels that are 1. Of one class there is no
        AUC: None."""
        auc, log_loss, positive = BinaryAUROC(), MeanMetric(), MeanMetric()
        for metric in (auc, log_loss, positive):
            metric.to(self.device)
        positive.set_dtype(torch.float64)  # counts of float32 end at 2**24
        self.model.eval()
        for _, logits, labels in self._outputs(self.batches(split)):
            losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
            loss_sum, terminate = self._over_ranks(losses.sum(), self._terminate)
            self._check_finite(f"the {split} loss", loss_sum)
            auc.update(logits.sigmoid(), labels.int())
            log_loss.update(losses)
            positive.update(labels)
            if terminate:
                self._save_and_stop()
        self.model.train()
        share, area = positive.compute().item(), auc.compute().item()  # on every rank: they gather
        return {
            "auc": area if 0 < share < 1 else None,
            "log_loss": log_loss.compute().item(),
            "positive_share": share,
        }

    def _outputs(self, batches: Iterator[Batch]) -> Iterator[tuple[Tensor, ...]]:
        while True:
            try:
                yield self.pipeline.progress(batches)
            except StopIteration:
                return

    def _save(self) -> None:
        # A step may ruin the weights and the next one find out. What is saved has to be good to resume.
        (unusable,) = self._over_ranks(_has_non_finite(self.model))
        self._check_finite("a weight", math.nan if unusable else 0.0)
        if self._save_checkpoint is not None:
            self._save_checkpoint(self.progress)

    def _save_and_stop(self) -> NoReturn:
        self._save()
        raise Terminated

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise Diverged(
                f"{what} is NaN or infinite in epoch {self.progress.epoch}, after {self.progress.steps} steps in all: "
                "lower --lr or --dense-lr, or look for huge numbers in the data"
            )

    def _over_ranks(self, *values: float | Tensor) -> list[float]:
        """The sum over ranks of each; what one rank alone knows, such as a signal, all act on at the same step."""
        sums = torch.stack([torch.as_tensor(value, dtype=torch.float64).to(self.device) for value in values])
        dist.all_reduce(sums)
        return sums.tolist()


def _has_non_finite(model: DistributedModelParallel) -> bool:
    for value in model.state_dict().values():
        parts = [shard.tensor for shard in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
        for part in parts:
            if part.is_floating_point() and not bool(part.isfinite().all()):
                return True
    return False


def format_auc(metrics: dict[str, float | None]) -> str:
    """The AUC of an evaluation in words."""
    if metrics["auc"] is None:
        return f"AUC not defined (all labels are {metrics['positive_share']:.0f})"
    return f"AUC {metrics['auc']:.4f}"


def say(message: str) -> None:
    if dist.get_rank() == 0:
        print(message, flush=True)
