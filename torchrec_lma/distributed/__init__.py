"""LMA tables under TorchRec's DistributedModelParallel."""

from torchrec_lma.distributed.constraints import level_constraints
from torchrec_lma.distributed.embedding import LMAEmbeddingCollectionSharder, ShardedLMAEmbeddingCollection
from torchrec_lma.distributed.embeddingbag import (
    LMAEmbeddingBagCollectionSharder,
    ShardedLMAEmbeddingBagCollection,
)
from torchrec_lma.distributed.fp_embeddingbag import FeatureProcessedSharder
from torchrec_lma.distributed.sharding_plan import get_default_sharders

__all__ = [
    "FeatureProcessedSharder",
    "LMAEmbeddingBagCollectionSharder",
    "LMAEmbeddingCollectionSharder",
    "ShardedLMAEmbeddingBagCollection",
    "ShardedLMAEmbeddingCollection",
    "get_default_sharders",
    "level_constraints",
]
