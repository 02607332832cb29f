"""The next film on MovieLens-100K, by self-attention: full tables, and in a 16th of their bytes two others.

Run it as `python examples/sequence/train.py`, 90 s of one core. Figures are in docs/measurements/sequences.md.

The films of a history and those that the model chooses between have vectors of one table. Of each user the last 10
films are for testing and the 10 before for validation; each is predicted from the films before it, among all films.
"""

import argparse
import logging
import time
from collections.abc import Callable

import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import DataType, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.modules.embedding_modules import EmbeddingCollectionInterface
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_lma import AllocationBuilder, LMAConfig, LMAEmbeddingCollection, get_default_sharders
from torchrec_lma.datasets import movielens

LENGTH, HELD_OUT, HIDDEN, K = 50, 10, 64, 10


def histories(users: int | None) -> tuple[list[Tensor], int]:
    """Of each user the films 0, 1, ... in the order in which they were rated; and how many films there are."""
    rows = pd.read_parquet(movielens.prepare(), columns=["user_id", "item_id"])  # in the order of time
    rows["film"], films = rows["item_id"].factorize()
    return [torch.tensor(seen.to_numpy()) for _, seen in list(rows.groupby("user_id")["film"])[:users]], len(films)


def windows(history: Tensor) -> list[Tensor]:
    """A history cut into pieces of at most LENGTH + 1, each of which begins where the one before ends."""
    return [history[i : i + LENGTH + 1] for i in range(0, len(history) - 1, LENGTH)]


def features(sequences: list[Tensor], films: int) -> KeyedJaggedTensor:
    """`history`, a sequence in each row, and `candidates`: all films in the first row, none in the others."""
    lengths = torch.tensor([*map(len, sequences), films, *[0] * (len(sequences) - 1)])
    return KeyedJaggedTensor(["history", "candidates"], torch.cat([*sequences, torch.arange(films)]), lengths=lengths)


class NextFilm(nn.Module):
    """Scores of all films at each place of each history, in the manner of SASRec (arXiv 1808.09781)."""

    def __init__(self, ec: EmbeddingCollectionInterface) -> None:
        super().__init__()
        dim = ec.embedding_dim()
        self.ec = ec
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH + HELD_OUT, HIDDEN))
        self.into, self.out = nn.Linear(dim, HIDDEN), nn.Linear(HIDDEN, dim)
        self.attention = nn.TransformerEncoderLayer(HIDDEN, 2, 2 * HIDDEN, 0.2, batch_first=True, norm_first=True)

    def forward(self, batch: KeyedJaggedTensor) -> Tensor:
        """Returns float [films of all histories, films to choose from]."""
        found = self.ec(batch)
        lengths = found["history"].lengths()
        longest = int(lengths.max())
        x = self.into(found["history"].to_padded_dense(longest)) + self.places[:longest]  # (B, longest, HIDDEN)
        not_yet = torch.ones(longest, longest, dtype=torch.bool).triu(1)
        x = self.attention(x, src_mask=not_yet, is_causal=True)
        there = torch.arange(longest) < lengths.unsqueeze(1)
        return self.out(x[there]) @ found["candidates"].values().t()


def measure(model: nn.Module, histories: list[Tensor], films: int) -> tuple[float, float]:
    """Recall@K and NDCG@K of the last HELD_OUT films of the histories, each among all films."""
    model.eval()
    hits, gains = [], []
    with torch.no_grad():
        for of_users in (histories[i : i + 256] for i in range(0, len(histories), 256)):
            cut = [history[-LENGTH - HELD_OUT :] for history in of_users]
            held_out = torch.cat([torch.arange(len(c) - 1) >= len(c) - 1 - HELD_OUT for c in cut])
            scores = model(features([c[:-1] for c in cut], films))[held_out]
            next_films = torch.cat([c[1:] for c in cut])[held_out].unsqueeze(1)
            ranks = (scores > scores.gather(1, next_films)).sum(1)
            hits.append(ranks < K)
            gains.append((ranks < K) / (ranks + 2).log2())
    model.train()
    return torch.cat(hits).float().mean().item(), torch.cat(gains).mean().item()


def train(
    ec: EmbeddingCollectionInterface, seen: list[Tensor], films: int, epochs: int, lr: float
) -> tuple[float, float, float]:
    """Validation NDCG@K at its best epoch, and the test recall@K and NDCG@K of that epoch. Any type of tables."""
    apply_optimizer_in_backward(RowWiseAdagrad, ec.parameters(), {"lr": lr})
    fused = ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"])
    names = [name.split(".")[-2] for name, _ in ec.named_parameters()]
    planner = EmbeddingShardingPlanner(Topology(1, "cpu"), constraints=dict.fromkeys(names, fused))
    next_film = NextFilm(ec)
    plan = planner.plan(next_film, get_default_sharders())
    model = DistributedModelParallel(next_film, device=torch.device("cpu"), plan=plan, sharders=get_default_sharders())
    layers = torch.optim.Adam((w for _, w in in_backward_optimizer_filter(model.named_parameters())), lr=0.002)
    pieces = [piece for history in seen for piece in windows(history[: -2 * HELD_OUT])]

    results = []
    for _ in range(epochs):
        for chosen in torch.randperm(len(pieces)).split(64):
            batch = [pieces[i] for i in chosen]
            layers.zero_grad()
            scores = model(features([piece[:-1] for piece in batch], films))
            nn.functional.cross_entropy(scores, torch.cat([piece[1:] for piece in batch])).backward()
            layers.step()
        validation = measure(model, [history[:-HELD_OUT] for history in seen], films)
        results.append((validation[1], *measure(model, seen, films)))
    return max(results)


def tables(films: int, dim: int, data_type: DataType = DataType.FP32) -> list[EmbeddingConfig]:
    names = ["history", "candidates"]
    return [EmbeddingConfig(films, dim, name="t_film", feature_names=names, data_type=data_type)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--users", type=int, help="take only so many")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lr", type=float, nargs="+", help="of these the one with the best validation NDCG of a seed")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # TorchRec's planner has much to say
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    seen, films = histories(args.users)

    def lma() -> LMAEmbeddingCollection:
        """In a 16th of the bytes of full tables of FP32."""
        builder = AllocationBuilder(tables(films, 64), LMAConfig(compression=16))
        for history in seen:
            builder.update(features([history[: -2 * HELD_OUT]], 0))  # counts which films are frequent
        return LMAEmbeddingCollection(tables(films, 64), builder.build())

    def trained(make: Callable[[], EmbeddingCollectionInterface], lr: float, seed: int) -> tuple[float, float, float]:
        torch.manual_seed(seed)
        return train(make(), seen, films, args.epochs, lr)

    for name, make, best in (
        # Each with the best of a few learning rates: docs/measurements/sequences.md.
        ("full, dim 64", lambda: EmbeddingCollection(tables(films, 64)), 0.05),
        ("full, dim 8, FP16", lambda: EmbeddingCollection(tables(films, 8, DataType.FP16)), 0.4),
        ("LMA, dim 64, FP16", lma, 0.4),
    ):
        start, ec = time.monotonic(), make()
        size = sum(weight.nbytes for weight in ec.parameters())
        if isinstance(ec, LMAEmbeddingCollection):
            size += ec.allocation.nbytes
        of_lr = {lr: trained(make, lr, seed=0) for lr in args.lr or [best]}
        best = max(of_lr, key=lambda lr: of_lr[lr][0])
        if args.lr:
            print(f"{name:<20}validation NDCG@{K}", {lr: round(of_lr[lr][0], 4) for lr in args.lr})
        runs = torch.tensor([of_lr[best], *(trained(make, best, seed) for seed in range(1, args.seeds))])
        print(f"{name:<20}{size:>9,} bytes   lr {best}", end="")
        for metric, values in zip(("recall", "NDCG"), runs[:, 1:].t()):
            error = f" ± {values.std() / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
            print(f"   {metric}@{K} {values.mean():.4f}{error}", end="")
        print(f"   {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
