"""A collection with levels of 1 to 8 columns, a batch for it, and quantized models of it."""

import copy
import functools

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection
from torchrec_lma.quant import DTYPES, quantize

FEATURES = ["user", "place", "item", "last_item", "day"]
BATCH_SIZE = 5
# Levels of 1 and 2 columns share rows of 4. INT2 takes multiples of 8 columns.
NARROW = {16: (1, 1, 2, 4, 8), 8: (2, 2, 4)}
WIDE = {16: (8, 8), 8: (8,)}


def make_tables(pooling: PoolingType = PoolingType.SUM, prefix: str = "t") -> list[EmbeddingBagConfig]:
    """One with two features, and one of few ids."""
    return [
        EmbeddingBagConfig(
            name=f"{prefix}_{name}",
            num_embeddings=size,
            embedding_dim=dim,
            feature_names=features,
            pooling=pooling,
        )
        for name, size, dim, features in (
            ("user", 900, 16, ["user"]),
            ("place", 300, 8, ["place"]),
            ("item", 400, 16, ["item", "last_item"]),
            ("day", 7, 8, ["day"]),
        )
    ]


def make_batch(
    is_weighted: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.int64,
    low: int = -3,
    high: int = 1000,
    order: list[str] = FEATURES,
) -> KeyedJaggedTensor:
    """Bags of 0 to 3 ids, some of them outside of the vocabularies."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(order) * BATCH_SIZE,), generator=generator, dtype=torch.int32)
    ids = int(lengths.sum())
    values = torch.randint(low, high, (ids,), generator=generator)
    values[::2] = torch.arange(len(values[::2])) % 7  # frequent ones
    weights = torch.rand(ids, generator=generator) if is_weighted else None
    return KeyedJaggedTensor(keys=order, values=values.to(dtype), lengths=lengths, weights=weights)


@functools.cache
def make_allocation(config: LMAConfig, prefix: str = "t") -> Allocation:
    """With own rows of the frequent ids, and shared ones of the others."""
    builder = AllocationBuilder(make_tables(prefix=prefix), config)
    generator = torch.Generator().manual_seed(0)
    rows = 2000
    for feature in FEATURES:
        values = (400 * torch.rand(rows, generator=generator) ** 3).long() % (7 if feature == "day" else 400)
        builder.update(
            KeyedJaggedTensor(
                keys=FEATURES,
                values=values,
                lengths=torch.cat([torch.full((rows,), int(key == feature)) for key in FEATURES]),
            )
        )
    return builder.build()


def collection(
    pooling: PoolingType = PoolingType.SUM, is_weighted: bool = False, prefix: str = "t", **config
) -> LMAEmbeddingBagCollection:
    """Weights like trained ones: normal, levels of different spread."""
    config = LMAConfig(**{"compression": 5, "seed": 2, "widths": NARROW, "skew": 0.25, **config})
    allocation = make_allocation(config, prefix)
    ebc = LMAEmbeddingBagCollection(make_tables(pooling, prefix), allocation, is_weighted)
    generator = torch.Generator().manual_seed(1)
    for i, bag in enumerate(ebc.levels.embedding_bags.values()):
        bag.weight.data.copy_(torch.randn(bag.weight.shape, generator=generator) * 0.1 * (i + 1))
    return ebc


class Model(nn.Module):
    """A collection and what a model makes of its output."""

    def __init__(self, ebc: nn.Module) -> None:
        super().__init__()
        self.ebc = ebc

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        pooled: KeyedTensor = self.ebc(features)
        return pooled.to_dict()


def quantized(ebc: LMAEmbeddingBagCollection, dtype: str, **options) -> nn.Module:
    return quantize(Model(copy.deepcopy(ebc)), DTYPES[dtype], **options)


def same(out: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(out) == list(expected) and all(torch.equal(out[key], expected[key]) for key in expected)
