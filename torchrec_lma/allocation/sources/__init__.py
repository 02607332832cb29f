"""Where similarity of ids comes from, one source a file."""

from torchrec_lma.allocation.sources.base import RowsSource, Source
from torchrec_lma.allocation.sources.context_minhash import ContextMinHash
from torchrec_lma.allocation.sources.rows_minhash import RowsMinHash
from torchrec_lma.allocation.sources.simhash import SimHash

__all__ = ["ContextMinHash", "RowsMinHash", "RowsSource", "SimHash", "Source"]
