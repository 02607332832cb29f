"""What decides rows, how it is built, and where similarity comes from."""

from torchrec_lma.allocation.artifact import Allocation, MemoryAllocation
from torchrec_lma.allocation.builder import AllocationBuilder
from torchrec_lma.allocation.reduction import reduce_builders
from torchrec_lma.allocation.sources import ContextMinHash, RowsMinHash, SimHash, Source

__all__ = [
    "Allocation",
    "AllocationBuilder",
    "ContextMinHash",
    "MemoryAllocation",
    "RowsMinHash",
    "SimHash",
    "Source",
    "reduce_builders",
]
