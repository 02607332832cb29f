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
        salts = self.salts.repeat_interleave(lengths.size(1), output_size=lengths.numel())  # (F * B)
        salts = salts.repeat_interleave(lengths.reshape(-1), output_size=ids.numel())  # (L)
        chunk_rows = self._chunk_rows(ids, salts)  # (n * L), chunk-major
        bags = lengths.repeat(self.n_chunks, 1)  # (n * F, B)
        weights = weights.repeat(self.n_chunks) if weights is not None else None
        # Before the permutation: in a script its weights are optional, and nothing could select from them.
        chunk_rows, bags, weights = self._in_block(chunk_rows, bags, weights)
        if self.n_features > 1:
            bags, chunk_rows, weights = torch.ops.fbgemm.permute_2D_sparse_data(
                self.feature_major, bags, chunk_rows, weights, chunk_rows.numel()
            )
        return chunk_rows, bags.reshape(-1), weights

    def ragged(
        self, ids: Tensor, bags: Tensor, bags_per_feature: Sequence[int], weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `forward`, for features with different numbers of bags: the chunks of a bag come one after another.

        Args:
            ids: integer [L], the bags of feature 0, then of feature 1, ...
            bags: integer [sum of bags_per_feature], their lengths.
            bags_per_feature: [n_features].
            weights: float [L] per-sample weights, or None.
        Returns:
            chunk rows, int64 [M]; lengths, [sum of bags_per_feature * n_chunks]; weights, [M], or None.
        """
        chunk_rows = self._chunk_rows(ids, id_salts(self.salts, bags, bags_per_feature, ids.numel()))
        weights = weights.repeat(self.n_chunks) if weights is not None else None
        return self._in_block(*bag_major(bags.repeat(self.n_chunks), chunk_rows, weights, self.n_chunks))

    def _chunk_rows(self, ids: Tensor, salts: Tensor) -> Tensor:
        rows = self.addressing(ids, salts, self.first_chunk, self.end_chunk)  # (n, L)
        chunk = torch.arange(self.n_chunks, device=ids.device).unsqueeze(1)
        return ((rows - self.first_row) * self.n_chunks + chunk).reshape(-1)

    def _in_block(
        self, chunk_rows: Tensor, bags: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Without what lies in other rows than the block's. `bags` keeps its shape."""
        if self.all_rows:
            return chunk_rows, bags, weights
        here = (chunk_rows >= 0) & (chunk_rows < (self.end_row - self.first_row) * self.n_chunks)
        ends = torch.cumsum(bags.reshape(-1), 0).view_as(bags)
        kept = torch.nn.functional.pad(torch.cumsum(here, 0), (1, 0))  # how many are here before each position
        index = here.nonzero().squeeze(1)  # once: on a GPU it waits for the device
        return (
            chunk_rows[index],
            (kept[ends] - kept[ends - bags]).to(bags.dtype),
            weights[index] if weights is not None else None,
        )


def id_salts(salts: Tensor, bags: Tensor, bags_per_feature: Sequence[int], n_ids: int) -> Tensor:
    """The salt of each id's table, [n_ids], from [n_features], with the lengths of all bags."""
    counts = torch.tensor(bags_per_feature).to(salts.device, non_blocking=True)
    return salts.repeat_interleave(counts, output_size=bags.numel()).repeat_interleave(bags, output_size=n_ids)


def bag_major(
    bags: Tensor, chunk_rows: Tensor, weights: Tensor | None, n_chunks: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """From all bags of chunk 0, then of chunk 1, ... to all chunks of bag 0, then of bag 1, ...

    Pooled, they are rows [chunk_dim] that make the embeddings [bags, n_chunks * chunk_dim].

    Args:
        bags: integer [n_chunks * bags], their lengths.
        chunk_rows, weights: [M], of the bags one after another; weights may be None.
    Returns:
        chunk rows, lengths and weights in the new order.
    """
    order = torch.arange(bags.numel(), dtype=torch.int32, device=bags.device).view(n_chunks, -1).t().reshape(-1)
    bags, chunk_rows, weights = torch.ops.fbgemm.permute_1D_sparse_data(
        order, bags, chunk_rows, weights, chunk_rows.numel()
    )
    return chunk_rows, bags, weights
