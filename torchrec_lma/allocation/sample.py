"""A sample of training rows that depends only on which rows there were, not on their order or on who saw them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_lma.hashing import mix64


@dataclass
class Rows:
    """Jagged rows of mixed keys.

    Attributes:
        hash: int64 [R], hash of the row's content.
        count: int64 [R], how often that content was seen.
        lengths: int64 [R], keys in each row.
        keys: int64 [N], mixed keys of (table, id), N = lengths.sum().
        tables: int16 [N], index of each key's table.
    """

    hash: Tensor
    count: Tensor
    lengths: Tensor
    keys: Tensor
    tables: Tensor

    @classmethod
    def concatenate(cls, parts: "list[Rows]") -> "Rows":
        names = ("hash", "count", "lengths", "keys", "tables")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def select(self, rows: Tensor) -> "Rows":
        """The given rows (int64 indices), in the given order."""
        lengths = self.lengths[rows]
        starts = (self.lengths.cumsum(0) - self.lengths)[rows]
        ends = lengths.cumsum(0)
        positions = torch.repeat_interleave(starts - (ends - lengths), lengths) + torch.arange(int(lengths.sum()))
        return Rows(self.hash[rows], self.count[rows], lengths, self.keys[positions], self.tables[positions])

    def first(self, n: int | None) -> "Rows":
        """The first n rows; all of them for None."""
        lengths = self.lengths[:n]
        keys = int(lengths.sum())
        return Rows(self.hash[:n], self.count[:n], lengths, self.keys[:keys], self.tables[:keys])

    def row_of_key(self) -> Tensor:
        """int64 [N], the row each key stands in."""
        return torch.repeat_interleave(torch.arange(self.lengths.numel()), self.lengths)


class RowSample:
    """The `max_rows` distinct rows with the smallest content hashes: a uniform sample of the distinct rows.

    A bottom-k sketch (Cohen and Kaplan, PODC 2007): the sample of a union is the sample of the samples' union, so
    any number of workers in any order end with the same rows. Rows with equal content are one row with a count.
    """

    def __init__(self, max_rows: int | None) -> None:
        self.max_rows = max_rows
        self.rows_seen = 0
        empty = torch.empty(0, dtype=torch.int64)
        self._parts = [Rows(empty, empty, empty, empty, torch.empty(0, dtype=torch.int16))]
        self._pending = 0
        self._threshold: int | None = None  # the largest hash that can still enter

    def add(self, keys: Tensor, tables: Tensor, row: Tensor, n_rows: int) -> None:
        """Add a batch of rows.

        Args:
            keys: int64 [N], mixed keys.
            tables: int16 [N].
            row: int64 [N], the row in [0, n_rows) of each key; rows without a key are not counted.
            n_rows: rows in the batch.
        """
        lengths = torch.bincount(row, minlength=n_rows)
        # A sum is the same in any order of features, and two equal ids do not cancel as they would under xor.
        content = mix64(torch.zeros(n_rows, dtype=torch.int64).index_add_(0, row, mix64(keys)))
        wanted = lengths > 0
        self.rows_seen += int(wanted.sum())
        if self._threshold is not None:
            wanted &= content <= self._threshold
        kept = wanted[row]
        in_row_order = torch.sort(row[kept], stable=True).indices
        keys, tables = keys[kept][in_row_order], tables[kept][in_row_order]
        content, lengths = content[wanted], lengths[wanted]
        self._parts.append(Rows(content, torch.ones_like(content), lengths, keys, tables))
        self._pending += max(content.numel(), 256)  # a part without rows takes RAM as well
        if self.max_rows is not None and self._pending > self.max_rows:
            self.rows()

    def merge(self, other: "RowSample") -> None:
        self.rows_seen += other.rows_seen
        self._parts.append(other.rows())
        self.rows()

    def rows(self) -> Rows:
        """The sample, in order of content hash."""
        rows = Rows.concatenate(self._parts)
        order = torch.sort(rows.hash, stable=True)
        first = torch.ones_like(order.values, dtype=torch.bool)
        first[1:] = order.values[1:] != order.values[:-1]
        group = first.cumsum(0) - 1
        count = torch.zeros(int(first.sum()), dtype=torch.int64).index_add_(0, group, rows.count[order.indices])
        chosen = order.indices[first][: self.max_rows]
        rows = rows.select(chosen)
        rows.count = count[: self.max_rows]
        if self.max_rows is not None and rows.hash.numel() == self.max_rows:
            self._threshold = int(rows.hash[-1])
        self._parts = [rows]
        self._pending = 0
        return rows
