"""What every semantic source has: a locality-sensitive hash of an id, which says who shares rows with whom.

A source gives every chosen id K 32-bit values. Two ids agree on a value with the probability that the source's theorem
states; their rows on a level where both share are the same exactly when they agree on its value, or by chance.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchrec_lma.allocation.sample import Rows
from torchrec_lma.config import check_int
from torchrec_lma.hashing import mix64, salt

LARGEST = torch.iinfo(torch.int64).max


class Source(ABC):
    """What every source has. Subclasses are frozen dataclasses, so that builders can compare and record them.

    Tables of one memory store as many values as the largest K among them, at most one for each level that has shared
    rows; a table of a smaller K repeats its values. Ids of different tables share by signature if their tables'
    sources have the same kind and power.

    Attributes:
        num_values: K, how many 32-bit values a signature has.
        within_table: share by signature only between ids of the same table.
    """

    NAME: ClassVar[str]
    num_values: int
    within_table: bool

    def to_dict(self) -> dict[str, Any]:
        """Name and settings as plain JSON values."""
        return {"name": self.NAME, **asdict(self)}  # type: ignore[call-overload]  # subclasses are dataclasses


@dataclass(frozen=True)
class RowsSource(Source):
    """A source that hashes sets taken from the sampled training rows. See RowsMinHash for the arguments."""

    SALT: ClassVar[str]
    power: int = 2
    num_values: int = 4
    min_support: int = 2
    max_rows: int | None = 1 << 20
    within_table: bool = False
    weighted: bool = False

    def __post_init__(self) -> None:
        for name in ("power", "num_values", "min_support"):
            check_int(name, getattr(self, name), minimum=1)
        if self.max_rows is not None:
            check_int("max_rows", self.max_rows, minimum=1)
        for name in ("within_table", "weighted"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def signatures(
        self, rows: Rows, item: Tensor, item_keys: Tensor, num_values: int, seed: int, tables: Sequence[str]
    ) -> Tensor:
        """The signatures of chosen ids.

        Args:
            rows: the sampled rows, N keys in R rows.
            item: int64 [N], which chosen id each key is, -1 for the others.
            item_keys: int64 [S], the mixed keys of the chosen ids; each occurs in at least one row.
            num_values: values wanted, the first of the `num_values` that this source has.
            seed: of the hash functions.
            tables: names of the tables, by the index in `rows.tables`.
        Returns:
            int32 [S, num_values].
        """
        salts = [salt(self.SALT, seed, k, p) for k in range(num_values) for p in range(self.power)]
        elements = iter(self._sampled(rows, item, item_keys, salts, tables))
        values = []
        for _ in range(num_values):
            value = torch.zeros_like(item_keys)
            for _ in range(self.power):
                value = mix64(value ^ next(elements))
            values.append((value >> 32).to(torch.int32))
        return torch.stack(values, dim=1)

    @abstractmethod
    def _sampled(
        self, rows: Rows, item: Tensor, item_keys: Tensor, salts: Sequence[int], tables: Sequence[str]
    ) -> Sequence[Tensor]:
        """For each salt int64 [S]: a hash of the one element of each id's set that comes first in that salt's order."""


def smallest(values: Tensor, group: Tensor, n_groups: int) -> Tensor:
    """int64 [n_groups], the smallest value of each group; the largest int64 where a group is empty."""
    return torch.full((n_groups,), LARGEST).scatter_reduce_(0, group, values, "amin")


def uniform(mixed: Tensor) -> Tensor:
    """float64 in (0, 1), from 52 bits of mixed keys."""
    return (((mixed >> 12) & 0xFFFFFFFFFFFFF).to(torch.float64) + 0.5) * 2.0**-52
