"""LMA-compressed embedding tables for TorchRec."""

from importlib import import_module
from typing import TYPE_CHECKING

from torchrec_lma.requirements import check_torchrec

if TYPE_CHECKING:
    from torchrec_lma.allocation import Allocation, AllocationBuilder
    from torchrec_lma.config import LMAConfig
    from torchrec_lma.conversion import Reallocation, reallocate
    from torchrec_lma.distributed import (
        LMAEmbeddingBagCollectionSharder,
        LMAEmbeddingCollectionSharder,
        get_default_sharders,
    )
    from torchrec_lma.modules import LMAEmbeddingBagCollection
    from torchrec_lma.sequences import LMAEmbeddingCollection

__version__ = "0.1.0"
__all__ = [
    "Allocation",
    "AllocationBuilder",
    "LMAConfig",
    "LMAEmbeddingBagCollection",
    "LMAEmbeddingBagCollectionSharder",
    "LMAEmbeddingCollection",
    "LMAEmbeddingCollectionSharder",
    "Reallocation",
    "get_default_sharders",
    "reallocate",
]
_MODULES = {
    "Allocation": "allocation",
    "AllocationBuilder": "allocation",
    "LMAConfig": "config",
    "LMAEmbeddingBagCollection": "modules",
    "LMAEmbeddingBagCollectionSharder": "distributed",
    "LMAEmbeddingCollection": "sequences",
    "LMAEmbeddingCollectionSharder": "distributed",
    "Reallocation": "conversion",
    "get_default_sharders": "distributed",
    "reallocate": "conversion",
}

check_torchrec()


def __getattr__(name: str) -> object:
    """Imports a public name at its first use: a server, and the help of a command, need none of them."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
