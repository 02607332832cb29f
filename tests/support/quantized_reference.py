"""FBGEMM's row formats decoded byte by byte, and bags pooled id by id: what quantized lookups are compared with."""

import numpy as np
import torch
from torchrec.modules.embedding_configs import PoolingType
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma import LMAEmbeddingBagCollection

BITS = {"int8": 8, "int4": 4, "int2": 2}
STORED_BYTES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5, "int2": 0.25}  # of a value


def row_bytes(columns: int, dtype: str) -> int:
    """Of a row without padding: the values, and a float16 scale and bias for the integers."""
    return int(columns * STORED_BYTES[dtype]) + (4 if dtype in BITS else 0)


def decode(rows: np.ndarray, dtype: str) -> np.ndarray:
    """uint8 [N, bytes of an unpadded row] -> float32 [N, columns]."""
    rows = np.ascontiguousarray(rows)
    if dtype == "fp32":
        return rows.view("<f4")
    if dtype == "fp16":
        return rows.view("<f2").astype(np.float32)
    scale_bias, packed = np.ascontiguousarray(rows[:, :4]).view("<f2").astype(np.float32), rows[:, 4:]
    bits = BITS[dtype]
    values = np.stack([packed >> shift & (2**bits - 1) for shift in range(0, 8, bits)], axis=2).reshape(len(rows), -1)
    return values * scale_bias[:, :1] + scale_bias[:, 1:]


def decoded_tables(levels: QuantEmbeddingBagCollection, dtypes: dict[str, str]) -> dict[str, np.ndarray]:
    """float32 [rows, columns] of each table that TorchRec stores, from the bytes that FBGEMM holds."""
    tables = {}
    for tbe in levels.tbes:
        rows_of_tables = tbe.split_embedding_weights(split_scale_shifts=False)
        for (name, _, columns, _, _), (rows, _) in zip(tbe.embedding_specs, rows_of_tables, strict=True):
            assert rows.size(1) == row_bytes(columns, dtypes[name]), f"{name} is padded"
            tables[name] = decode(rows.numpy(), dtypes[name])
    return tables


def largest_error(weight: np.ndarray, dtype: str) -> np.ndarray:
    """How far a stored value may be from a weight: float32 [N, columns] -> the same shape."""
    if dtype == "fp32":
        return np.zeros_like(weight)
    if dtype == "fp16":  # half a step of a normal number, or of a subnormal one
        return np.abs(weight) * 2**-11 + 2**-25
    span = weight.max(1, keepdims=True) - weight.min(1, keepdims=True)
    # Half a step, and the rounding of scale and bias to float16.
    return np.broadcast_to(0.5 * span / (2 ** BITS[dtype] - 1) + 2e-3 * np.abs(weight).max(), weight.shape)


def pooled_by_hand(
    tables: dict[str, np.ndarray], ebc: LMAEmbeddingBagCollection, features: KeyedJaggedTensor
) -> dict[str, np.ndarray]:
    """Bag by bag, id by id, level by level, from decoded tables at the rows of the float module: float [B, dim]."""
    memory_of = {table: memory for memory in ebc.allocation.memories for table in memory.tables}
    out = {}
    for config in ebc.embedding_bag_configs():
        for feature in config.feature_names:
            ids, lengths = features[feature].values(), features[feature].lengths().tolist()
            bags, first = np.zeros((len(lengths), config.embedding_dim)), 0
            for bag, length in enumerate(lengths):
                for at in range(first, first + length):
                    found = ebc.rows(config.name, ids[at : at + 1])
                    vector = _embedding(tables, found, memory_of[config.name])
                    bags[bag] += vector * (features[feature].weights()[at].item() if ebc.is_weighted() else 1.0)
                if config.pooling is PoolingType.MEAN and length:
                    bags[bag] /= length
                first += length
            out[feature] = bags
    return out


def _embedding(tables: dict[str, np.ndarray], found: dict[str, torch.Tensor], memory) -> np.ndarray:
    """float [dim] of one id: its rows of the levels side by side, zeros where it has none."""
    parts = []
    for level, (name, row) in zip(memory.levels, found.items(), strict=True):
        # A table has 4 columns or more: narrower levels have several rows in one of its rows.
        side_by_side = max(1, 4 // level.width)
        table_row, place = divmod(row.item(), side_by_side)
        columns = slice(place * level.width, (place + 1) * level.width)
        parts.append(tables[name][table_row, columns] if row.item() >= 0 else np.zeros(level.width))
    return np.concatenate(parts)
