"""Readers that turn click logs into TorchRec batches; used by the command line and the DLRM example."""

from torchrec_lma.datasets.numpy_columns import NumpyDataset
from torchrec_lma.datasets.readers import (
    CriteoDataset,
    ParquetDataset,
    RowDataset,
    Schema,
    Split,
    Vocabulary,
    encode_ids,
    encode_numeric,
)

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
