"""The trainer's decisions about what it measures: which values count, which end a run."""

import argparse
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainer import Diverged, Progress, Trainer, format_auc

STEPS = 4


class OneRank(Trainer):
    """A trainer of one rank, whose "batches" are what its model gave: (loss, logits, labels)."""

    def _outputs(self, batches: Iterator[Any]) -> Iterator[tuple[Tensor, ...]]:
        yield from batches

    def _over_ranks(self, *values: float | Tensor) -> list[float]:
        return [float(value) for value in values]


def trainer(splits: dict[str, list[tuple[Tensor, ...]]], saves: list[int] | None = None) -> OneRank:
    args = argparse.Namespace(
        epochs=1, evaluations_per_epoch=1, patience=3, max_steps=None, checkpoint_every=None, batch_size=2
    )
    model: Any = nn.Linear(2, 1)
    made = OneRank(
        args,
        torch.device("cpu"),
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),  # type: ignore[arg-type]
        lambda split, **_: iter(splits[split]),
        Progress(steps_per_epoch=STEPS),
        None if saves is None else lambda progress: saves.append(progress.steps),
    )
    return made


def outputs(logits: list[float], labels: list[float], loss: float = 0.5) -> tuple[Tensor, ...]:
    return torch.tensor(loss), torch.tensor(logits), torch.tensor(labels, dtype=torch.float32)


GOOD = outputs([1.0, -1.0, 0.5], [1, 0, 0])  # the positive is above both others
ZEROS, ONES = outputs([1.0, -1.0], [0, 0]), outputs([1.0, -1.0], [1, 1])


@pytest.mark.parametrize(
    ("batches", "auc", "said"),
    [
        ([GOOD], 1.0, "AUC 1.0000"),
        ([outputs([0.0, 1.0], [1, 0])], 0.0, "AUC 0.0000"),
        ([ZEROS, ZEROS], None, "AUC not defined (all labels are 0)"),
        ([ONES], None, "AUC not defined (all labels are 1)"),
        ([ZEROS, ONES], 0.5, "AUC 0.5000"),
    ],
)
def test_the_auc_of_one_class_is_none(batches: list[tuple[Tensor, ...]], auc: float | None, said: str) -> None:
    found = trainer({"validation": batches})._evaluate("validation")
    assert found["auc"] == (pytest.approx(auc) if auc is not None else None)
    assert format_auc(found) == said
    logits, labels = (torch.cat([batch[i] for batch in batches]) for i in (1, 2))
    expected = -(labels * logits.sigmoid().log() + (1 - labels) * (1 - logits.sigmoid()).log()).mean()
    assert found["log_loss"] == pytest.approx(float(expected), rel=1e-5)
    json.dumps(found, allow_nan=False)


def test_an_undefined_auc_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.say", lambda _: None)
    splits = {"validation": [ZEROS], "test": [GOOD]}
    made, saves = trainer(splits, []), []
    made._save_checkpoint = lambda progress: saves.append(progress.best)
    for validation in ([ZEROS], [GOOD], [ZEROS], [ONES]):
        splits["validation"] = validation
        made._evaluate_and_save()
    assert [best and best["evaluation"] for best in saves] == [None, 2, 2, 2]
    assert "test" not in made.progress.evaluations[0]  # which is scored where a model is the best
    assert not made._out_of_patience()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "logit", "weight"])
def test_what_is_no_number_ends_the_run_and_is_not_saved(
    bad: float, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.say", lambda _: None)
    monkeypatch.setattr("trainer.dist.get_rank", lambda: 0)
    monkeypatch.setattr("trainer.dist.get_world_size", lambda: 1)
    train = [GOOD] * STEPS
    validation = GOOD
    if where == "loss":
        train[2] = outputs([0.0], [1], loss=bad)
    if where == "logit":
        validation = outputs([bad, 0.0], [1, 0])
    splits = {"train": train, "validation": [validation], "test": [GOOD]}
    either: list[list[int] | None] = [[], None]  # with checkpoints and without
    for saves in either:
        made = trainer(splits, saves)
        if where == "weight":
            nn.init.constant_(made.model.weight, bad)
        if where == "logit" and math.isinf(bad):
            continue  # a probability of 1 or 0, of which the loss says whether it is right
        with pytest.raises(
            Diverged, match=f"is NaN or infinite in epoch [12], after {2 if where == 'loss' else STEPS} steps"
        ):
            made.run()
        assert not saves
