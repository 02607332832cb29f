"""LMA-compressed embedding tables for TorchRec."""

import torchrec as _torchrec

_SUPPORTED = "1.8"
if not _torchrec.__version__.startswith(f"{_SUPPORTED}."):
    # Sharded lookups subclass TorchRec internals that move between minor versions.
    raise ImportError(
        f"torchrec_lma works with torchrec {_SUPPORTED}.x, found {_torchrec.__version__}; "
        f"install torchrec {_SUPPORTED}.x or a torchrec_lma made for yours"
    )

from torchrec_lma.allocation import Allocation, AllocationBuilder  # noqa: E402
from torchrec_lma.config import LMAConfig  # noqa: E402
from torchrec_lma.distributed import (  # noqa: E402
    LMAEmbeddingBagCollectionSharder,
    LMAEmbeddingShardingPlanner,
    get_default_sharders,
)
from torchrec_lma.modules import LMAEmbeddingBagCollection  # noqa: E402
from torchrec_lma.reallocation import Reallocation, reallocate  # noqa: E402

__all__ = [
    "Allocation",
    "AllocationBuilder",
    "LMAConfig",
    "LMAEmbeddingBagCollection",
    "LMAEmbeddingBagCollectionSharder",
    "LMAEmbeddingShardingPlanner",
    "Reallocation",
    "get_default_sharders",
    "reallocate",
]
