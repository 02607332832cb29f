"""How a chunk is stored once quantized: FBGEMM's row formats, and what they really take."""

import math

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import rounded_row_size_in_bytes
from torch import Tensor

# What `--dtype` and TorchRec's QuantConfig may say, the most exact first (docs/serving.md has the measured errors).
# torch has no other name for FBGEMM's 8-bit floats (the "hybrid FP8" with a free exponent bias) than its own E4M3.
DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "int4": torch.quint4x2,
    "int2": torch.quint2x4,
}
_SPARSE_TYPES = {
    torch.float32: SparseType.FP32,
    torch.float16: SparseType.FP16,
    torch.int8: SparseType.INT8,
    torch.qint8: SparseType.INT8,
    torch.quint8: SparseType.INT8,
    torch.float8_e4m3fn: SparseType.FP8,
    torch.quint4x2: SparseType.INT4,
    torch.quint2x4: SparseType.INT2,
}
# FBGEMM's kernels on the GPU read rows in units of 16 bytes; those on the CPU read bytes.
ROW_ALIGNMENT = {"cpu": 1, "cuda": 16}
FP8_EXPONENT_BITS = 4


def sparse_type(dtype: torch.dtype) -> SparseType:
    """FBGEMM's name for the row format of a quantization dtype.

    Raises ValueError for one that FBGEMM cannot store.
    """
    if dtype not in _SPARSE_TYPES:
        raise ValueError(f"tables cannot be quantized to {dtype}; choose one of {[str(d) for d in DTYPES.values()]}")
    return _SPARSE_TYPES[dtype]


def chunk_bytes(dtype: torch.dtype, chunk_dim: int, device_type: str = "cpu") -> int:
    """Bytes of one stored chunk, scale, bias and padding included.

    The integer formats keep a float16 scale and bias beside each chunk: 4 bytes, as much as an INT8 chunk of 4. On
    the GPU every chunk is padded to 16 bytes.

    Args:
        dtype: one of the values of DTYPES.
        chunk_dim: values in a chunk.
        device_type: "cpu" or "cuda".
    Raises:
        ValueError: an unknown dtype or device type, or a chunk that does not fill whole bytes.
    """
    kind = sparse_type(dtype)
    if device_type not in ROW_ALIGNMENT:
        raise ValueError(f"quantized tables live on one of {list(ROW_ALIGNMENT)}, not on {device_type!r}")
    least = 1 if kind.is_float() else 16 // kind.bit_rate()  # the float16 scale beside them has to stay aligned
    if chunk_dim % least != 0:
        raise ValueError(
            f"chunk_dim={chunk_dim} cannot be stored as {kind.value}, which needs a multiple of {least}; quantize to "
            "another dtype, or train with such a chunk_dim"
        )
    return rounded_row_size_in_bytes(chunk_dim, kind, ROW_ALIGNMENT[device_type])


def finer_dtypes(dtype: torch.dtype, chunk_dim: int, device_type: str = "cpu") -> list[str]:
    """Names of dtypes that store chunks more exactly than `dtype` in no more bytes, the most exact first."""
    most = chunk_bytes(dtype, chunk_dim, device_type)
    kind = sparse_type(dtype)
    finer = []
    for name, other in DTYPES.items():
        if sparse_type(other) is kind:
            break
        try:
            if chunk_bytes(other, chunk_dim, device_type) <= most:
                finer.append(name)
        except ValueError:  # this chunk_dim cannot be stored so
            continue
    return finer


def fp8_exponent_bias(weight: Tensor) -> int:
    """The exponent bias whose range just covers the weights: FBGEMM's default of 15 would clip values over 0.94."""
    largest = weight.abs().max().item() if weight.numel() else 0.0
    if largest == 0.0:
        return 15
    fraction, exponent = math.frexp(largest / _fp8_max(0))  # largest / max = fraction * 2**exponent
    return -(exponent - (fraction == 0.5))


def _fp8_max(exponent_bias: int) -> float:
    """Largest value, as in FBGEMM's quantize_utils."""
    return 2.0 ** ((1 << FP8_EXPONENT_BITS) - 2 - exponent_bias) * (2 - 2.0 ** (FP8_EXPONENT_BITS - 7))


def quantize_chunks(weight: Tensor, kind: SparseType, exponent_bias: int) -> tuple[Tensor, Tensor | None]:
    """Chunks as FBGEMM's IntNBit TBE takes them in `weight_lists`.

    Args:
        weight: float32, float16 or bfloat16 [N, chunk_dim].
        kind: the row format.
        exponent_bias: from `fp8_exponent_bias`, for FP8 alone.
    Returns:
        uint8 [N, bytes of the values], and uint8 [N, 4] scale and bias for the integer formats, else None.
    """
    if kind is SparseType.FP32:
        return weight.float().contiguous().view(torch.uint8), None
    if kind is SparseType.FP16:
        return weight.half().contiguous().view(torch.uint8), None
    weight = weight.float().contiguous()
    if kind is SparseType.FP8:
        largest = _fp8_max(exponent_bias)
        return torch.ops.fbgemm.FloatToHFP8Quantized(weight, FP8_EXPONENT_BITS, exponent_bias, largest), None
    rows = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(weight, kind.bit_rate())
    return rows[:, :-4], rows[:, -4:]
