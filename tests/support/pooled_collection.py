"""A small LMAEmbeddingBagCollection, its tables and batches."""

from typing import Any

import torch
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, PoolingType

from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection

SIZES = {"user": 300, "item": 120, "day": 3}
DIM = 16
FEATURES = ["user", "item", "day"]
KINDS = {
    "own": {"compression": 4, "data_type": "FP32"},
    "narrow": {"compression": 32, "data_type": "FP32"},
    "raw ids": {"compression": 4, "data_type": "FP32", "raw_ids": ("user",)},
}


def tables(pooling: PoolingType = PoolingType.SUM, **options: Any) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(
            name=f"t_{name}", num_embeddings=n, embedding_dim=DIM, feature_names=[name], pooling=pooling, **options
        )
        for name, n in SIZES.items()
    ]


def batch(seed: int = 0, rows: int = 8, weighted: bool = False) -> KeyedJaggedTensor:
    """Bags of 0 to 3 ids, the small ones often."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(SIZES), rows), generator=generator)
    values = [
        (size * torch.rand(int(n), generator=generator) ** 3).long() for size, n in zip(SIZES.values(), lengths.sum(1))
    ]
    weights = torch.rand(int(lengths.sum()), generator=generator) if weighted else None
    return KeyedJaggedTensor(FEATURES, torch.cat(values), weights=weights, lengths=lengths.flatten())


def allocation(kind: str = "own", seed: int = 0) -> Allocation:
    settings = {**KINDS[kind], "seed": seed}
    if settings.get("raw_ids"):
        settings["raw_ids"] = ("t_user",)
    builder = AllocationBuilder(tables(), LMAConfig(**settings))
    for i in range(20):
        builder.update(batch(100 + i, rows=64))
    return builder.build()


def collection(kind: str = "own", **options: Any) -> LMAEmbeddingBagCollection:
    pooling = options.pop("pooling", PoolingType.SUM)
    torch.manual_seed(0)
    return LMAEmbeddingBagCollection(tables(pooling), allocation(kind), **options)
