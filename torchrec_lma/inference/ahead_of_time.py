"""A quantized model through torch.export and AOTInductor: a compiled package instead of TorchScript.

FBGEMM's IntNBit TBE itself does not export in fbgemm-gpu 1.8.0: it owns a TorchScript object, AtomicCounter, for which
no fake class is registered. The operator it calls exports, so the modules here call that.
"""

import json
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchrec.inference.modules import PredictModule
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection

_BUFFERS = (
    "weights_host",
    "weights_dev",
    "weights_uvm",
    "weights_placements",
    "weights_offsets",
    "weights_tys",
    "D_offsets",
    "lxu_cache_weights",
)
_CONSTANTS = (
    "total_D",
    "max_int2_D",
    "max_int4_D",
    "max_int8_D",
    "max_float16_D",
    "max_float32_D",
    "max_float8_D",
    "output_dtype",
    "row_alignment",
    "fp8_exponent_bits",
    "fp8_exponent_bias",
)


class ExportableLookup(nn.Module):
    """What IntNBitTableBatchedEmbeddingBagsCodegen.forward does for tables in memory (no cache, no pruning).

    The arguments of the operator are FBGEMM's own affair and may change between its versions.
    """

    weights_host: Tensor
    weights_dev: Tensor

    def __init__(self, tbe: IntNBitTableBatchedEmbeddingBagsCodegen) -> None:
        super().__init__()
        for name in _BUFFERS:
            self.register_buffer(name, getattr(tbe, name))
        self.register_buffer("lxu_cache_locations", torch.empty(0, dtype=torch.int32, device=tbe.current_device))
        self.constants: dict[str, int] = {name: getattr(tbe, name) for name in _CONSTANTS}
        self.pooling_mode = int(tbe.pooling_mode)

    def forward(self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None) -> Tensor:
        return torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            dev_weights=self.weights_host if self.weights_host.numel() else self.weights_dev,
            uvm_weights=self.weights_uvm,
            weights_placements=self.weights_placements,
            weights_offsets=self.weights_offsets,
            weights_tys=self.weights_tys,
            D_offsets=self.D_offsets,
            indices=indices,
            offsets=offsets,
            pooling_mode=self.pooling_mode,
            indice_weights=per_sample_weights,
            lxu_cache_weights=self.lxu_cache_weights,
            lxu_cache_locations=self.lxu_cache_locations,
            **self.constants,
        )


class _Predict(nn.Module):
    """A model's predict_forward alone: PredictModule.forward enters inference mode, which does not export."""

    def __init__(self, model: PredictModule) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.model.predict_forward(batch)


def to_exported_program(model: PredictModule, sample: dict[str, Tensor]) -> ExportedProgram:
    """torch.export of a quantized, unsharded model, for any number of rows and ids. Ids and lengths are int64.

    Args:
        model: its TBEs are replaced in place by `ExportableLookup`s over the same weights.
        sample: rows under the keys of TorchRec's inference contract, at least 2 of them and 2 ids: torch.export takes
            sizes of 0 and 1 for constants. (The program's Python module refuses a batch of one row for a guard that
            KeyedJaggedTensor's strides leave in it; the compiled package takes it.)
    """
    for module in list(model.modules()):
        if isinstance(module, QuantEmbeddingBagCollection):  # it calls what is in this list
            module._emb_modules = [ExportableLookup(tbe) for tbe in module._emb_modules]
        for name, child in module.named_children():
            if isinstance(child, IntNBitTableBatchedEmbeddingBagsCodegen):
                setattr(module, name, ExportableLookup(child))
    rows = len(sample["float_features"])
    row, shapes = Dim("rows", min=1), dict[str, Any]()
    for key, value in sample.items():
        if key.endswith(".lengths"):
            shapes[key] = {0: value.numel() // rows * row}
        elif key == "float_features":
            shapes[key] = {0: row}
        else:
            shapes[key] = {0: Dim(f"{key.split('.')[0]}_ids", min=0)}
    wide = {key: value if value.is_floating_point() else value.long() for key, value in sample.items()}
    with torch.no_grad():
        return torch.export.export(_Predict(model), (wide,), dynamic_shapes={"batch": shapes})


def compile_package(program: ExportedProgram, path: Path, metadata: dict[str, Any], name: str) -> None:
    """AOTInductor's package (.pt2) of a program, for `torch._inductor.aoti_load_package`.

    Args:
        path: where to write it; must end in .pt2.
        metadata: JSON kept in it under `name`; `get_metadata()` of the loaded package gives it back.
    """
    options = {"aot_inductor.metadata": {name: json.dumps(metadata)}}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
