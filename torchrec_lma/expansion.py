"""From a batch of raw ids to the chunk rows that an ordinary embedding-bag kernel reads."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Registers torch.ops.fbgemm.*
import fbgemm_gpu  # noqa: F401  isort: skip

from torchrec_lma.addressing import MemoryAddressing


class ChunkExpansion(nn.Module):
    """Expands the features that read one block (chunks and rows, all by default) of a memory.

    A memory [rows, dim] is, byte for byte, a table [rows * n_chunks, chunk_dim] in which chunk j of row r is row
    r * n_chunks + j. Every feature becomes one feature for each chunk, in feature-major order, so that the kernel's
    pooled output [B, n_features * n_chunks * chunk_dim] already is [B, n_features * dim].

    Args:
        addressing: of the memory. Shared with other expansions, not copied.
        salts: `table_salt` of each feature's table.
        chunks: [first, end) of the chunks in the block.
        rows: [first, end) of the rows in the block; ids whose chunk lies elsewhere are dropped from their bags.
        device: of the input.
    """

    salts: Tensor
    feature_major: Tensor

    def __init__(
        self,
        addressing: MemoryAddressing,
        salts: Sequence[int],
        chunks: tuple[int, int] | None = None,
        rows: tuple[int, int] | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.addressing = addressing
        self.n_features = len(salts)
        self.first_chunk, self.end_chunk = chunks or (0, addressing.n_chunks)
        self.first_row, self.end_row = rows or (0, addressing.rows)
        self.n_chunks = self.end_chunk - self.first_chunk
        self.all_rows = (self.first_row, self.end_row) == (0, addressing.rows)
        self.register_buffer("salts", torch.tensor(salts, dtype=torch.int64, device=device), persistent=False)
        chunk_major = torch.arange(self.n_chunks * self.n_features, dtype=torch.int32)
        feature_major = chunk_major.view(self.n_chunks, self.n_features).t().reshape(-1)
        self.register_buffer("feature_major", feature_major.to(device), persistent=False)

    def forward(self, ids: Tensor, lengths: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """
        Args:
            ids: integer [L], the bags of feature 0, then of feature 1, ...
            lengths: integer [n_features, B].
            weights: float [L] per-sample weights, or None.
        Returns:
            chunk rows, int64 [M], counted from the block's first row; M = n_chunks * L if the block has all rows;
            lengths, [n_features * n_chunks * B];
            weights, [M], or None.
        """
        batch_size = lengths.size(1)
        bags = lengths.reshape(-1)  # (F * B)
        salts = torch.repeat_interleave(
            self.salts.repeat_interleave(batch_size, output_size=bags.numel()), bags, output_size=ids.numel()
        )  # (L)
        rows = self.addressing(ids, salts, self.first_chunk, self.end_chunk)  # (n, L)
        chunk = torch.arange(self.n_chunks, device=ids.device).unsqueeze(1)
        chunk_rows = ((rows - self.first_row) * self.n_chunks + chunk).reshape(-1)  # (n * L), chunk-major
        bags = lengths.repeat(self.n_chunks, 1)  # (n * F, B)
        weights = weights.repeat(self.n_chunks) if weights is not None else None
        if self.n_features > 1:
            bags, chunk_rows, weights = torch.ops.fbgemm.permute_2D_sparse_data(
                self.feature_major, bags, chunk_rows, weights, chunk_rows.numel()
            )
        bags = bags.reshape(-1)  # (F * n * B)
        if self.all_rows:
            return chunk_rows, bags, weights
        here = (chunk_rows >= 0) & (chunk_rows < (self.end_row - self.first_row) * self.n_chunks)
        ends = torch.cumsum(bags, 0)
        kept = torch.nn.functional.pad(torch.cumsum(here, 0), (1, 0))  # how many are here before each position
        return (
            chunk_rows[here],
            (kept[ends] - kept[ends - bags]).to(bags.dtype),
            weights[here] if weights is not None else None,
        )
