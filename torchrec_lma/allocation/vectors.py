"""Vectors that ids of a table were given, kept as signatures."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TableVectors:
    """Signatures of the vectors of a table's ids.

    Attributes:
        table: its name.
        keys: int64 [n], mixed ids, ascending.
        signatures: int32 [n, K].
        length: of a vector; None before there is one.
    """

    table: str
    keys: Tensor
    signatures: Tensor
    length: int | None = None

    def merged(self, other: "TableVectors") -> "TableVectors":
        """Both. Raises ValueError for vectors of another length, or another vector of one id."""
        lengths = [each.length for each in (self, other) if each.length is not None]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"table {self.table!r} was given vectors of length {lengths[0]} and of length {lengths[1]}; ids with "
                "vectors of different lengths never agree, so give all of a table's ids vectors of one length"
            )
        keys, order = torch.sort(torch.cat([self.keys, other.keys]), stable=True)
        signatures = torch.cat([self.signatures, other.signatures])[order]
        again = keys[1:] == keys[:-1]
        if (again & (signatures[1:] != signatures[:-1]).any(1)).any():
            raise ValueError(f"an id of table {self.table!r} was given two vectors that differ; give each id one")
        first = torch.cat([torch.ones(keys[:1].numel(), dtype=torch.bool), ~again])
        return TableVectors(self.table, keys[first], signatures[first], next(iter(lengths), None))


def check_vectors(table: str, ids: Tensor, vectors: Any) -> Tensor:
    """The vectors of a table's ids, int64 [n], as floating-point [n, d] on the CPU.

    Raises:
        TypeError: not real numbers.
        ValueError: no array of numbers; shapes that do not fit; a vector that is zero or has NaN or infinity.
    """
    try:
        vectors = torch.as_tensor(vectors)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the vectors of {table!r} are not an array of numbers ({error}); expected [n, d], one vector of length d "
            "for each id"
        ) from error
    if not vectors.is_floating_point():
        raise TypeError(f"the vectors of {table!r} are {vectors.dtype}, expected floating-point numbers")
    if ids.dim() != 1 or vectors.dim() != 2 or ids.numel() != vectors.size(0) or vectors.size(1) == 0:
        raise ValueError(
            f"ids of shape {list(ids.shape)} and vectors of shape {list(vectors.shape)} for table {table!r}; "
            "expected [n] and [n, d], one vector for each id"
        )
    vectors = vectors.detach().cpu()
    for wrong, said in (
        (~vectors.isfinite().all(1), "has NaN or infinity"),
        ((vectors == 0).all(1), "is zero, which points nowhere"),
    ):
        if wrong.any():
            raise ValueError(
                f"the vector of id {int(ids[wrong][0])} of table {table!r} {said} ({int(wrong.sum())} such "
                "vectors); leave these ids out, they are then hashed"
            )
    return vectors
