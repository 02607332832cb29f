"""What a user chooses about the compression of a set of tables."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class LMAConfig:
    """Budget and address configuration of LMA tables (arXiv 2103.06124, section 4).

    Exactly one of `compression` and `memory_bytes` sets the budget. The budget covers the weights *and* the
    allocation (signatures and the index of ids), for all tables of the collection together. Optimizer state comes on
    top, as it does for full tables.

    Args:
        compression: full size over compressed size, >= 1. The full size is `num_embeddings * embedding_dim` weights of
            the table's own data type, summed over the tables.
        memory_bytes: the budget itself, in bytes. Several memories (tables of several dims) share it in proportion to
            their full sizes.
        chunk_dim: columns per chunk; must divide every `embedding_dim`. Smaller is more accurate at equal memory and
            costs `embedding_dim / chunk_dim` lookups per id. Fused kernels take multiples of 4.
        seed: of every hash. Two collections with the same seed, tables and allocation have the same addresses.

    Example::

        LMAConfig(compression=16)
        LMAConfig(memory_bytes=8 << 30, chunk_dim=8)
    """

    compression: float | None = None
    memory_bytes: int | None = None
    chunk_dim: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.compression is None) == (self.memory_bytes is None):
            raise ValueError(
                f"LMAConfig needs exactly one of compression and memory_bytes, got compression={self.compression!r} "
                f"and memory_bytes={self.memory_bytes!r}; give the one you want to hold"
            )
        if self.compression is not None:
            if isinstance(self.compression, bool) or not isinstance(self.compression, int | float):
                raise TypeError(f"compression must be a number, got {self.compression!r}")
            if not (math.isfinite(self.compression) and self.compression >= 1):
                raise ValueError(f"compression must be a finite number >= 1, got {self.compression!r}")
            # 16 and 16.0 are the same configuration, so they must compare, hash and serialise alike.
            object.__setattr__(self, "compression", float(self.compression))
        if self.memory_bytes is not None:
            _check_int("memory_bytes", self.memory_bytes, minimum=1)
        _check_int("chunk_dim", self.chunk_dim, minimum=1)
        _check_int("seed", self.seed, minimum=0)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LMAConfig":
        """Raises ValueError for fields that this version does not know, naming them."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"unknown LMAConfig fields {unknown}; this version knows {sorted(f.name for f in fields(cls))}. "
                "Was it written by a newer torchrec_lma?"
            )
        return cls(**values)


def _check_int(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}")
