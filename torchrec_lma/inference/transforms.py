"""From a trained float model to a quantized one, and from an eager model to TorchScript, as TorchRec does it."""

import warnings

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import nn
from torchrec.fx import Tracer
from torchrec.inference.modules import DEFAULT_QUANT_MAPPING, quantize_inference_model
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.quant.embedding_modules import quant_prep_customize_row_alignment

from torchrec_lma.inference.modules import QuantLMAEmbeddingBagCollection
from torchrec_lma.inference.rows import ROW_ALIGNMENT, sparse_type
from torchrec_lma.modules import LMAEmbeddingBagCollection

# For `quantize_inference_model(quantization_mapping=...)`.
QUANTIZATION_MAPPING: dict[str, type[nn.Module]] = {
    **DEFAULT_QUANT_MAPPING,
    torch.typename(LMAEmbeddingBagCollection): QuantLMAEmbeddingBagCollection,
}
# Modules that a trace calls and does not look into.
LEAF_MODULES = ["IntNBitTableBatchedEmbeddingBagsCodegen"]


def quantize(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`quantize_inference_model` for models with LMA tables, full tables or both.

    Args:
        model: trained; its tables are replaced in place.
        dtype: one of `torchrec_lma.inference.DTYPES`. Full tables cannot have FP8, which TorchRec does not quantize to.
    Raises:
        ValueError: a dtype that the tables cannot be stored in.
    """
    full = [module for module in model.modules() if type(module) is EmbeddingBagCollection]
    if full and sparse_type(dtype) is SparseType.FP8:
        raise ValueError("TorchRec does not quantize full tables to FP8; choose another dtype for a model with them")
    for collection in full:
        if all(weight.device.type == "cpu" for weight in collection.parameters()):
            # TorchRec pads rows for the GPU everywhere.
            quant_prep_customize_row_alignment(collection, [EmbeddingBagCollection], ROW_ALIGNMENT["cpu"])
    return quantize_inference_model(model, quantization_mapping=QUANTIZATION_MAPPING, quantization_dtype=dtype)


def script(model: nn.Module) -> torch.jit.ScriptModule:
    """TorchScript of a quantized model, sharded or not, that loads where only fbgemm_gpu is imported.

    A sharded stock collection must have seen a batch before: it makes its output dist at the first one.
    """
    model.eval()
    graph = Tracer(leaf_modules=LEAF_MODULES).trace(model)
    with warnings.catch_warnings():  # about annotations in TorchRec's and FBGEMM's classes
        warnings.filterwarnings("ignore", "The TorchScript type system|TorchScript will treat type", UserWarning)
        return torch.jit.script(torch.fx.GraphModule(model, graph))
