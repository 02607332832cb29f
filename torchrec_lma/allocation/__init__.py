"""What decides addresses, how it is built, and where similarity comes from."""

from torchrec_lma.allocation.allocation import Allocation, MemoryAllocation
from torchrec_lma.allocation.builder import AllocationBuilder
from torchrec_lma.allocation.sources import RowsMinHash

__all__ = ["Allocation", "AllocationBuilder", "MemoryAllocation", "RowsMinHash"]
