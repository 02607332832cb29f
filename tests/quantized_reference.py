"""FBGEMM's row formats decoded byte by byte, and pooling written out: what quantized lookups are compared with."""

import numpy as np

BITS = {"int8": 8, "int4": 4, "int2": 2}
MOST_PER_CHUNK = {"fp32": 0.0, "fp16": 2**-11, "fp8": 2**-4}  # relative to each value


def decode(rows: np.ndarray, dtype: str, fp8_bias: int) -> np.ndarray:
    """uint8 [N, bytes] of unpadded chunks -> float32 [N, chunk_dim]."""
    rows = np.ascontiguousarray(rows)
    if dtype == "fp32":
        return rows.view("<f4")
    if dtype == "fp16":
        return rows.view("<f2").astype(np.float32)
    if dtype == "fp8":  # sign, 4 bits of exponent, 3 of mantissa; exponent 0 is subnormal
        sign = np.where(rows & 0x80, -1.0, 1.0)
        exponent, mantissa = (rows >> 3 & 0xF).astype(int), (rows & 7) / 8.0
        normal = (1 + mantissa) * 2.0 ** (exponent - fp8_bias)
        return (sign * np.where(exponent == 0, mantissa * 2.0 ** (1 - fp8_bias), normal)).astype(np.float32)
    scale_bias, packed = np.ascontiguousarray(rows[:, :4]).view("<f2").astype(np.float32), rows[:, 4:]
    bits = BITS[dtype]
    values = np.stack([packed >> shift & (2**bits - 1) for shift in range(0, 8, bits)], axis=2).reshape(len(rows), -1)
    return values * scale_bias[:, :1] + scale_bias[:, 1:]


def largest_error(weight: np.ndarray, dtype: str) -> np.ndarray:
    """How far a stored value may be from a weight: float32 [N, chunk_dim] -> the same shape."""
    if dtype in MOST_PER_CHUNK:
        return np.abs(weight) * MOST_PER_CHUNK[dtype] + 1e-3 * np.abs(weight).max()
    span = weight.max(1, keepdims=True) - weight.min(1, keepdims=True)
    # Half a step, and the rounding of scale and bias to float16.
    return np.broadcast_to(0.5 * span / (2 ** BITS[dtype] - 1) + 2e-3 * np.abs(weight).max(), weight.shape)
