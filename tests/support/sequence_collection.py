"""A small LMAEmbeddingCollection, its tables and batches."""

from functools import cache
from typing import Any

import torch
from torchrec import EmbeddingConfig, KeyedJaggedTensor

from torchrec_lma import (
    Allocation,
    AllocationBuilder,
    LMAConfig,
    LMAEmbeddingCollection,
)

DIM = 16
FEATURES = {"clicks": 300, "buys": 300, "item": 200, "day": 3}
# `clicks` feeds two tables.
TABLES = {"t_user": (300, ["clicks", "buys"]), "t_item": (200, ["item", "clicks"]), "t_day": (3, ["day"])}
SLOTS = {
    "clicks@t_user": "t_user",
    "buys": "t_user",
    "item": "t_item",
    "clicks@t_item": "t_item",
    "day": "t_day",
}
CONFIGS = {
    "own": LMAConfig(compression=2.5, data_type="FP32"),
    "narrow": LMAConfig(compression=2.5, widths=(1, 1, 2, 4, 8), data_type="FP32", skew=0.25),
    "raw ids": LMAConfig(compression=4, raw_ids=("t_user",), data_type="FP32"),
}


def tables(config: type = EmbeddingConfig, **options: Any) -> list[Any]:
    return [
        config(name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=list(names), **options)
        for name, (rows, names) in TABLES.items()
    ]


def batch(seed: int = 0, rows: int = 8) -> KeyedJaggedTensor:
    """Bags of 0 to 3 ids, the small ones often, some of `clicks` outside of t_item; a feature that no table takes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"other": 9, **FEATURES}
    lengths = torch.randint(0, 4, (len(sizes), rows), generator=generator)
    values = [(n * torch.rand(int(k), generator=generator) ** 3).long() for n, k in zip(sizes.values(), lengths.sum(1))]
    return KeyedJaggedTensor(list(sizes), torch.cat(values), lengths=lengths.flatten())


@cache
def allocation(kind: str = "own", seed: int = 0) -> Allocation:
    builder = AllocationBuilder(tables(), LMAConfig(**{**CONFIGS[kind].to_dict(), "seed": seed}))
    for i in range(20):
        builder.update(batch(100 + i, rows=64))
    return builder.build()


def collection(kind: str = "own", **options: Any) -> LMAEmbeddingCollection:
    torch.manual_seed(0)
    return LMAEmbeddingCollection(tables(), allocation(kind), **options)
