"""Readers that turn click logs into TorchRec batches; used by the command line and the DLRM example."""

from torchrec_lma.datasets.columns import encode_ids, encode_numeric
from torchrec_lma.datasets.criteo import CriteoDataset
from torchrec_lma.datasets.numpy_columns import NumpyDataset
from torchrec_lma.datasets.parquet import ParquetDataset
from torchrec_lma.datasets.rows import RowDataset
from torchrec_lma.datasets.schema import Schema, Split
from torchrec_lma.datasets.vocabulary import Vocabulary

__all__ = [
    "CriteoDataset",
    "NumpyDataset",
    "ParquetDataset",
    "RowDataset",
    "Schema",
    "Split",
    "Vocabulary",
    "encode_ids",
    "encode_numeric",
]
