"""The example of sequences: what it measures, and that both kinds of tables learn in it."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torchrec import EmbeddingCollection, KeyedJaggedTensor

from support.paths import EXAMPLES
from support.ranks import run
from torchrec_lma import AllocationBuilder, LMAConfig, LMAEmbeddingCollection

FILMS = 60


def example() -> ModuleType:
    path = EXAMPLES / "sequence" / "train.py"
    spec = importlib.util.spec_from_file_location("sequence_example", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def histories(users: int = 40) -> list[Tensor]:
    """Each film is followed by the one of the next number, but for some leaps."""
    generator = torch.Generator().manual_seed(0)
    steps = 1 + 6 * (torch.rand(users, 70, generator=generator) < 0.05).long()
    return list((torch.arange(users).unsqueeze(1) + steps.cumsum(1)) % FILMS)


class Known(nn.Module):
    """Scores that are the same at each place of a history of the same film."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = torch.rand(FILMS, FILMS, generator=torch.Generator().manual_seed(1))

    def forward(self, batch: KeyedJaggedTensor) -> Tensor:
        return self.scores[batch["history"].values()]


def test_metrics_are_those_of_a_loop_over_the_last_films() -> None:
    module, model, given = example(), Known(), histories()
    recall, gain, n = 0, 0.0, 0
    for history in given:
        for before, film in list(zip(history[:-1].tolist(), history[1:].tolist()))[-module.HELD_OUT :]:
            order = model.scores[before].argsort(descending=True).tolist()
            rank = order.index(film)
            n += 1
            if rank < module.K:
                recall += 1
                gain += 1 / torch.tensor(rank + 2.0).log2().item()
    assert module.measure(model, given, FILMS) == pytest.approx((recall / n, gain / n))


def trained(kind: str) -> tuple[float, float, float]:
    module, given = example(), histories()
    torch.manual_seed(0)
    tables = module.tables(FILMS, 16)
    if kind == "full":
        return module.train(EmbeddingCollection(tables), given, FILMS, epochs=6, lr=0.1)
    builder = AllocationBuilder(tables, LMAConfig(compression=4)).update(module.features(given, 0))
    return module.train(LMAEmbeddingCollection(tables, builder.build()), given, FILMS, epochs=6, lr=0.1)


@pytest.mark.parametrize("kind", ["full", "LMA"])
def test_tables_of_both_kinds_learn_what_comes_next(kind: str) -> None:
    _, recall, gain = run(trained, 1, kind)[0]
    assert recall > 2 * 10 / FILMS and gain > 0.2
