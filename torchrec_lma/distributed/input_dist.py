"""What row-wise shardings send. An LMA id has a row for each chunk, on different ranks: it cannot be bucketed by row.

Either the raw ids go to every rank, which keeps the chunks whose address it owns (one copy for each rank), or the
sender computes the addresses and each goes to the rank that owns it (one copy for each chunk). The other shardings send
raw ids, once to each rank that owns a part of the memory, and need nothing of their own.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embedding_sharding import bucketize_kjt_before_all2all
from torchrec.distributed.embedding_types import ShardedEmbeddingTable
from torchrec.distributed.sharding.rw_sharding import RwSparseFeaturesDist
from torchrec.distributed.sharding.twrw_sharding import TwRwSparseFeaturesDist
from torchrec.distributed.types import Awaitable
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma.addressing import MemoryAddressing
from torchrec_lma.distributed.specs import LMASpecs, RowWiseInput
from torchrec_lma.expansion import bag_major, id_salts


def sends_addresses(row_wise_input: RowWiseInput, row_ranks: int, n_chunks: int) -> bool:
    """Whether a shard of `n_chunks` chunks, one of `row_ranks` row shards, is fed addresses instead of raw ids."""
    if row_ranks == 1 or row_wise_input == "ids":
        return False
    return row_wise_input == "addresses" or n_chunks < row_ranks


def rows_per_rank(rows: int, row_ranks: int) -> int:
    """Rows of each row shard but the last ones: TorchRec's planner and its own bucketing use the same."""
    return -(-rows // row_ranks)


class AddressedIds(nn.Module):
    """The ids of a memory's features as the chunk rows of all its row shards, so that FBGEMM can bucket them by rank.

    Chunk j at row r is the number `(r // block) * block * n + j * block + r % block` with n chunks and `block` rows per
    rank: divided by block * n it gives the rank, and what is left over is a number on that rank, which `OwnedChunks`
    takes apart.
    """

    salts: Tensor

    def __init__(
        self,
        addressing: MemoryAddressing,
        salts: Sequence[int],
        chunks: tuple[int, int],
        row_ranks: int,
        device: torch.device | None,
    ) -> None:
        super().__init__()
        self.addressing = addressing
        self.n_features = len(salts)
        self.first_chunk, self.end_chunk = chunks
        self.n_chunks = self.end_chunk - self.first_chunk
        self.block = rows_per_rank(addressing.rows, row_ranks)
        self.register_buffer("salts", torch.tensor(salts, dtype=torch.int64, device=device), persistent=False)

    def forward(self, ids: Tensor, bags: Tensor, bags_per_feature: Sequence[int]) -> Tensor:
        """
        Args:
            ids: integer [L], the bags of feature 0, then of feature 1, ...
            bags: integer [sum of bags_per_feature], their lengths.
            bags_per_feature: [n_features].
        Returns:
            int64 [L * n_chunks], the chunks of an id adjacent.
        """
        salts = id_salts(self.salts, bags, bags_per_feature, ids.numel())
        rows = self.addressing(ids, salts, self.first_chunk, self.end_chunk)  # (n, L)
        chunk = torch.arange(self.n_chunks, device=ids.device).unsqueeze(1)
        rank = torch.div(rows, self.block, rounding_mode="floor")
        numbers = (rank * (self.n_chunks - 1) + chunk) * self.block + rows
        return numbers.t().reshape(-1)


class OwnedChunks(nn.Module):
    """ChunkExpansion's counterpart where addresses arrive: only the chunks of the local rows, already addressed.

    Args:
        n_features: of the memory.
        n_chunks: chunks in the shard.
        block: `rows_per_rank` of the memory.
        device: of the input.
    """

    feature_major: Tensor
    block: Tensor

    def __init__(self, n_features: int, n_chunks: int, block: int, device: torch.device | None) -> None:
        super().__init__()
        self.n_features = n_features
        self.n_chunks = n_chunks
        chunk_major = torch.arange(n_chunks * n_features, dtype=torch.int32).view(n_chunks, n_features)
        self.register_buffer("feature_major", chunk_major.t().reshape(-1).to(device), persistent=False)
        self.register_buffer("block", torch.tensor([block], device=device), persistent=False)

    def forward(self, ids: Tensor, lengths: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """
        Args:
            ids: int64 [M], `AddressedIds` less the rank: j * block + local row.
            lengths: integer [n_features, B].
            weights: float [M] per-sample weights, or None.
        Returns:
            as ChunkExpansion: chunk rows, int64 [M]; lengths, [n_features * n_chunks * B]; weights, [M], or None.
        """
        chunk_rows, bags, weights = self._chunk_major(ids, lengths.reshape(-1), weights)
        if self.n_features > 1:
            bags, chunk_rows, weights = torch.ops.fbgemm.permute_2D_sparse_data(
                self.feature_major, bags.view(self.feature_major.numel(), -1), chunk_rows, weights, chunk_rows.numel()
            )
        return chunk_rows, bags.reshape(-1), weights

    def ragged(
        self, ids: Tensor, bags: Tensor, bags_per_feature: Sequence[int], weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As ChunkExpansion's."""
        chunk_rows, bags, weights = self._chunk_major(ids, bags, weights)
        return bag_major(bags, chunk_rows, weights, self.n_chunks)

    def _chunk_major(self, ids: Tensor, bags: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        # To the op the memory is one feature with all the bags, whose buckets are the chunks.
        bags, rows, weights, _, _ = torch.ops.fbgemm.block_bucketize_sparse_features(
            bags.to(ids.dtype),
            ids,
            bucketize_pos=False,
            sequence=False,
            block_sizes=self.block,
            my_size=self.n_chunks,
            weights=weights,
        )  # (n * bags)
        chunk = torch.arange(self.n_chunks, device=ids.device)
        chunk = chunk.repeat_interleave(bags.view(self.n_chunks, -1).sum(1), output_size=rows.numel())
        return rows * self.n_chunks + chunk, bags, weights


class _Buckets(nn.Module):
    """The features of row-wise sharded memories, once for each rank: TorchRec's bucketize_kjt_before_all2all for LMA.

    Args:
        tables: memories in the order of the input's features; column shards of one memory are several of them.
        specs: of the collection.
        row_ranks: ranks that the rows of each are over.
        order: of the result: bucket `rank * n_features + feature` for each position.
        device: of the input.
    """

    block_sizes: Tensor
    permutation: Tensor

    def __init__(
        self,
        tables: Sequence[ShardedEmbeddingTable],
        specs: LMASpecs,
        row_ranks: int,
        order: Sequence[int],
        device: torch.device | None,
    ) -> None:
        super().__init__()
        self._row_ranks = row_ranks
        # A plain list: the addressing belongs to the sharded module.
        self._addressed: list[AddressedIds] = []
        block_sizes: list[int] = []
        addressed: list[int] = []
        raw: list[int] = []
        n_features = 0
        for table in tables:
            first_chunk, end_chunk = specs.chunks(table)
            mine = range(n_features, n_features + table.num_features())
            n_features += table.num_features()
            if not sends_addresses(specs.row_wise_input, row_ranks, end_chunk - first_chunk):
                raw.extend(mine)
                continue
            salts = [specs.salt_of_feature[feature] for feature in table.feature_names]
            ids = AddressedIds(specs.addressing[table.name], salts, (first_chunk, end_chunk), row_ranks, device)
            self._addressed.append(ids)
            block_sizes.extend([ids.block * ids.n_chunks] * ids.n_features)
            addressed.extend(mine)
        self._addressed_features = addressed
        self._raw_features = raw
        # Where each bucket is among all buckets of addressed features, then the raw features once.
        place = {
            rank * n_features + feature: rank * len(addressed) + i
            for rank in range(row_ranks)
            for i, feature in enumerate(addressed)
        } | {
            rank * n_features + feature: row_ranks * len(addressed) + i
            for rank in range(row_ranks)
            for i, feature in enumerate(raw)
        }
        self._order = [place[bucket] for bucket in order]
        self.register_buffer("block_sizes", torch.tensor(block_sizes, dtype=torch.int64, device=device), False)
        self.register_buffer("permutation", torch.tensor(self._order, dtype=torch.int32, device=device), False)

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        if not self._addressed_features:
            buckets = features
        elif not self._raw_features:
            buckets = self._bucketize(features)
        else:
            buckets = KeyedJaggedTensor.concat(
                [self._bucketize(features.permute(self._addressed_features)), features.permute(self._raw_features)]
            )
        if self._order == list(range(len(buckets.keys()))):
            return buckets
        return buckets.permute(self._order, self.permutation)

    def _bucketize(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        bags = features.lengths()
        weights = features.weights_or_none()
        id_ends, strides = features.offset_per_key(), features.stride_per_key()
        bag_ends = [0, *itertools.accumulate(strides)]
        numbers, all_bags, all_weights, first = [], [], [], 0
        for addressed in self._addressed:
            end = first + addressed.n_features
            own_bags = bags[bag_ends[first] : bag_ends[end]]
            ids = slice(id_ends[first], id_ends[end])
            numbers.append(addressed(features.values()[ids], own_bags, strides[first:end]))
            all_bags.append(own_bags * addressed.n_chunks)
            if weights is not None:
                all_weights.append(weights[ids].repeat_interleave(addressed.n_chunks))
            first = end
        vbe = features.variable_stride_per_key()
        return bucketize_kjt_before_all2all(
            KeyedJaggedTensor(
                keys=features.keys(),
                values=torch.cat(numbers),
                weights=torch.cat(all_weights) if weights is not None else None,
                lengths=torch.cat(all_bags),
                stride=None if vbe else features.stride(),
                stride_per_key_per_rank=features.stride_per_key_per_rank() if vbe else None,
            ),
            num_buckets=self._row_ranks,
            block_sizes=self.block_sizes,
        )[0]


class LMARwSparseFeaturesDist(RwSparseFeaturesDist):
    """To every rank: raw ids, or the addresses that it owns."""

    def __init__(
        self,
        pg: dist.ProcessGroup,
        tables: Sequence[ShardedEmbeddingTable],
        specs: LMASpecs,
        feature_hash_sizes: list[int],
        device: torch.device | None,
    ) -> None:
        n_features = len(feature_hash_sizes)
        super().__init__(pg=pg, num_features=n_features, feature_hash_sizes=feature_hash_sizes, device=device)
        # In the order of the base class's buckets: all features for rank 0, then for rank 1, ...
        self._buckets = _Buckets(tables, specs, pg.size(), range(pg.size() * n_features), device)

    def forward(self, sparse_features: KeyedJaggedTensor) -> Awaitable[Awaitable[KeyedJaggedTensor]]:
        return self._dist(self._buckets(sparse_features))


class LMATwRwSparseFeaturesDist(TwRwSparseFeaturesDist):
    """As LMARwSparseFeaturesDist, but to the ranks of the host that owns the memory."""

    def __init__(
        self,
        pg: dist.ProcessGroup,
        tables: Sequence[ShardedEmbeddingTable],
        specs: LMASpecs,
        local_size: int,
        features_per_rank: list[int],
        feature_hash_sizes: list[int],
        device: torch.device | None,
    ) -> None:
        super().__init__(pg, local_size, features_per_rank, feature_hash_sizes, device)
        # The base class's order, so that KJTAllToAll's staggered split fits.
        self._buckets = _Buckets(tables, specs, local_size, self._sf_staggered_shuffle, device)

    def forward(self, sparse_features: KeyedJaggedTensor) -> Awaitable[Awaitable[KeyedJaggedTensor]]:
        return self._dist(self._buckets(sparse_features))
