"""LMA tables under TorchRec's DistributedModelParallel."""

from torchrec_lma.distributed.embeddingbag import (
    LMAEmbeddingBagCollectionSharder,
    ShardedLMAEmbeddingBagCollection,
    get_default_sharders,
)
from torchrec_lma.distributed.planner import LMAEmbeddingShardingPlanner, LMAEmbeddingStats, LMAStorageReservation
from torchrec_lma.distributed.shard_estimators import LMAPerfEstimator, LMAStorageEstimator

__all__ = [
    "LMAEmbeddingBagCollectionSharder",
    "LMAEmbeddingShardingPlanner",
    "LMAEmbeddingStats",
    "LMAPerfEstimator",
    "LMAStorageEstimator",
    "LMAStorageReservation",
    "ShardedLMAEmbeddingBagCollection",
    "get_default_sharders",
]
