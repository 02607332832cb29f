"""Serving: quantized tables, their export, and the prediction server (`server` and `client`, which need extras)."""

from torchrec_lma.inference.export import Exported, ServableModel, export, load_checkpoint, request
from torchrec_lma.inference.modules import QuantLMAEmbeddingBagCollection
from torchrec_lma.inference.rows import DTYPES, chunk_bytes
from torchrec_lma.inference.sharding import QuantLMAEmbeddingBagCollectionSharder, get_inference_sharders
from torchrec_lma.inference.transforms import QUANTIZATION_MAPPING, quantize, script

__all__ = [
    "DTYPES",
    "QUANTIZATION_MAPPING",
    "Exported",
    "QuantLMAEmbeddingBagCollection",
    "QuantLMAEmbeddingBagCollectionSharder",
    "ServableModel",
    "chunk_bytes",
    "export",
    "get_inference_sharders",
    "load_checkpoint",
    "quantize",
    "request",
    "script",
]
