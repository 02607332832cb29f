"""The rows of a level that are closest to the vectors of its ids; knows rows and vectors, and no collection.

The rows M that minimize the sum over ids v of w_v * |e_v - M[r(v)]|^2, with e_v the level's columns of the vector of v
and r(v) its row, fall apart into one problem for each row, whose solution is a weighted mean:

    M[r] = sum of w_v * e_v / sum of w_v, both over the ids v with r(v) = r
"""

import torch
from torch import Tensor


class LeastSquares:
    """Collects the vectors of ids, then writes the rows that they share. Rows of one id are written at once.

    Holds 8 bytes for each weight of a shared row, and 8 for each shared row.

    Args:
        weights: float [rows, width], what is written.
        own_rows: how many of the rows, the first ones, have one id each: they get that id's very vector.
    """

    def __init__(self, weights: Tensor, own_rows: int) -> None:
        self._weights, self._own_rows = weights, own_rows
        shared = weights[own_rows:]
        # A product of two float32 is exact in float64, so a shared row with one id gets that id's very vector as well.
        self._sums = torch.zeros(shared.shape, dtype=torch.float64, device=weights.device)
        self._total = torch.zeros(shared.size(0), dtype=torch.float64, device=weights.device)

    def add(self, rows: Tensor, vectors: Tensor, id_weights: Tensor | None = None) -> None:
        """
        Args:
            rows: int64 [N], -1 for ids without a row.
            vectors: float [N, width].
            id_weights: float [N], of shared rows; None for 1.
        """
        own = (rows >= 0) & (rows < self._own_rows)
        self._weights[rows[own]] = vectors[own].to(self._weights.dtype)
        shared = rows >= self._own_rows
        cells, columns = rows[shared] - self._own_rows, vectors[shared].to(torch.float64)
        each = torch.ones_like(cells, dtype=torch.float64) if id_weights is None else id_weights[shared].double()
        self._sums.index_add_(0, cells, columns * each.unsqueeze(1))
        self._total.index_add_(0, cells, each)

    def write(self) -> None:
        """Sets the shared rows; those that no id of positive weight has stay as they are. Call once."""
        used = (self._total > 0).nonzero().squeeze(1)
        means = self._sums[used] / self._total[used].unsqueeze(1)
        self._weights[self._own_rows + used] = means.to(self._weights.dtype)
