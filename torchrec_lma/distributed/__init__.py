"""LMA tables under TorchRec's DistributedModelParallel."""

from torchrec_lma.distributed.constraints import level_constraints
from torchrec_lma.distributed.embeddingbag import (
    LMAEmbeddingBagCollectionSharder,
    ShardedLMAEmbeddingBagCollection,
    get_default_sharders,
)

__all__ = [
    "LMAEmbeddingBagCollectionSharder",
    "ShardedLMAEmbeddingBagCollection",
    "get_default_sharders",
    "level_constraints",
]
