"""What a user chooses about the compression of a set of tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torchrec.modules.embedding_configs import DataType

# Weights are trained in these; quantize after training.
WEIGHT_TYPES = (DataType.FP32, DataType.FP16, DataType.BF16)


@dataclass(frozen=True)
class LMAConfig:
    """Budget and shape of LMA tables (arXiv 2103.06124). Hashable and serialisable.

    Exactly one of `compression` and `memory_bytes` sets the budget. It covers the weights *and* the allocation (the
    bitmaps, indices and signatures that say which id has which row), for all tables of a collection together. Optimizer
    state comes on top, as it does for full tables.

    Args:
        compression: full size over budget, >= 1. The full size is `num_embeddings * embedding_dim` weights of the
            tables' own data types, summed over the tables.
        memory_bytes: the budget itself, in bytes. Memories (one for each embedding dim) share it in proportion to their
            full sizes.
        widths: columns of each level, first to last; they add up to the embedding dim. For tables of several dims a
            mapping from dim to widths. None chooses: the first as wide as the budget allows to every id, then twice the
            columns with each. See `torchrec_lma.allocation.layout.default_widths`.
        data_type: of the weights of levels: FP32, FP16 or BF16, a DataType or its name. None is FP16,
            which buys more accuracy at equal bytes than FP32 does.
        skew: an id that occurs n times earns columns in proportion to n ** skew, as in mixed dimension embeddings
            (Ginart et al., arXiv 1909.11810). With 0 all ids earn the same, and what does not suffice for another level
            for all goes to the most frequent. More gives more columns to fewer ids.
        raw_ids: the tables whose ids are any 64-bit integers: their names, or True for all. The ids of the others are a
            vocabulary, 0 <= id < num_embeddings, as TorchRec's tables take them; that costs fewer bytes and less time.
        seed: of every hash. Two collections with the same seed, tables and allocation have the same rows.
    Raises:
        ValueError, TypeError: a setting that cannot be, naming it.

    Example::

        LMAConfig(compression=16)
        LMAConfig(memory_bytes=8 << 30, widths=(8, 56), data_type="FP32", raw_ids=("t_user",))
    """

    compression: float | None = None
    memory_bytes: int | None = None
    widths: tuple[int, ...] | tuple[tuple[int, tuple[int, ...]], ...] | None = None
    data_type: str | None = None
    skew: float = 0.0
    seed: int = 0
    raw_ids: bool | tuple[str, ...] = False

    def __post_init__(self) -> None:
        if (self.compression is None) == (self.memory_bytes is None):
            raise ValueError(
                f"LMAConfig needs exactly one of compression and memory_bytes, got compression={self.compression!r} "
                f"and memory_bytes={self.memory_bytes!r}; give the one you want to hold"
            )
        # Numbers that are equal make configurations that compare, hash and serialise alike: 16 and 16.0.
        if self.compression is not None:
            object.__setattr__(self, "compression", _number("compression", self.compression, 1, math.inf))
        if self.memory_bytes is not None:
            check_int("memory_bytes", self.memory_bytes, minimum=1)
        object.__setattr__(self, "skew", _number("skew", self.skew, 0, 4))
        check_int("seed", self.seed, minimum=0)
        object.__setattr__(self, "widths", _canonical_widths(self.widths))
        object.__setattr__(self, "data_type", _data_type_name(self.data_type))
        if not isinstance(self.raw_ids, bool):
            names = self.raw_ids
            if not isinstance(names, Sequence) or isinstance(names, str) or any(not isinstance(n, str) for n in names):
                raise TypeError(f"raw_ids must be True, False or a sequence of table names, got {self.raw_ids!r}")
            object.__setattr__(self, "raw_ids", tuple(self.raw_ids) or False)

    @property
    def weight_type(self) -> DataType:
        """Of the memories' weights."""
        return DataType.FP16 if self.data_type is None else DataType[self.data_type]

    def widths_of(self, dim: int) -> tuple[int, ...] | None:
        """The widths that were given for tables of a dim; None where they are to be chosen.

        Raises ValueError if they do not add up to it.
        """
        if self.widths is None:
            return None
        by_dim = dict(self.widths) if isinstance(self.widths[0], tuple) else {dim: self.widths}
        widths = by_dim.get(dim)
        if widths is not None and sum(widths) != dim:
            raise ValueError(
                f"widths {widths} add up to {sum(widths)} and there are tables of embedding_dim {dim}: give widths "
                "that add up to it, for tables of several dims as a mapping {dim: widths}"
            )
        return widths

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
                "Was it written by another torchrec_lma?"
            )
        return cls(**values)


def _canonical_widths(widths: Any) -> Any:
    """A tuple of widths, or for a mapping (or its JSON form) a tuple of pairs (dim, widths), dims ascending."""
    if widths is None:
        return None
    if isinstance(widths, Sequence) and widths and all(_is_pair(pair) for pair in widths):
        widths = dict(widths)
    if isinstance(widths, Mapping):
        for dim in widths:
            check_int("a dim of widths", dim, minimum=1)
        return tuple(sorted((dim, _one_dim(of_dim)) for dim, of_dim in widths.items())) or None
    return _one_dim(widths)


def _is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2


def _one_dim(widths: Any) -> tuple[int, ...]:
    if not isinstance(widths, Sequence) or isinstance(widths, str) or not widths:
        raise TypeError(f"widths must be a sequence of integers, or a mapping from dim to such, got {widths!r}")
    for width in widths:
        check_int("a width", width, minimum=1)
    return tuple(widths)


def _data_type_name(data_type: Any) -> str | None:
    if data_type is None:
        return None
    name = data_type.name if isinstance(data_type, DataType) else data_type
    if name not in {each.name for each in WEIGHT_TYPES}:
        raise ValueError(
            f"data_type {data_type!r} cannot be trained; give one of {', '.join(t.name for t in WEIGHT_TYPES)} "
            "(quantize after training)"
        )
    return name


def _number(name: str, value: Any, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and least <= value <= most):
        raise ValueError(
            f"{name} must be a finite number >= {least}"
            + (f" and <= {most}" if math.isfinite(most) else "")
            + f", got {value!r}"
        )
    return float(value)


def check_int(name: str, value: Any, minimum: int) -> None:
    """Raises TypeError or ValueError unless `value` is an int of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}")
