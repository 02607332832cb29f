"""LMA-compressed embedding tables for TorchRec."""

from torchrec_lma.allocation import Allocation, AllocationBuilder
from torchrec_lma.config import LMAConfig
from torchrec_lma.distributed import LMAEmbeddingBagCollectionSharder, get_default_sharders
from torchrec_lma.modules import LMAEmbeddingBagCollection

__all__ = [
    "Allocation",
    "AllocationBuilder",
    "LMAConfig",
    "LMAEmbeddingBagCollection",
    "LMAEmbeddingBagCollectionSharder",
    "get_default_sharders",
]
