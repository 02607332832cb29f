"""What a sharded lookup must know of LMA beside TorchRec's own configuration."""

from dataclasses import dataclass
from typing import Literal, get_args

from torchrec.distributed.embedding_types import ShardedEmbeddingTable

from torchrec_lma.addressing import Addressing

RowWiseInput = Literal["auto", "ids", "addresses"]


@dataclass(frozen=True)
class LMASpecs:
    """Handed from the sharded module through the shardings to their input dists, lookups and kernels.

    Attributes:
        addressing: of all memories, on the lookups' device.
        chunk_dim: columns of a chunk.
        salt_of_feature: `table_salt` of each feature's logical table.
        row_wise_input: what is sent to row shards: raw ids to each, addresses to their owners, or the cheaper of both.
    """

    addressing: Addressing
    chunk_dim: int
    salt_of_feature: dict[str, int]
    row_wise_input: RowWiseInput = "auto"

    def __post_init__(self) -> None:
        if self.row_wise_input not in get_args(RowWiseInput):
            raise ValueError(
                f"row_wise_input must be one of {list(get_args(RowWiseInput))}, got {self.row_wise_input!r}"
            )

    def chunks(self, table: ShardedEmbeddingTable) -> tuple[int, int]:
        """The chunks [first, end) of a shard's columns."""
        first_col = table.local_metadata.shard_offsets[1] if table.local_metadata is not None else 0  # None: replicated
        return first_col // self.chunk_dim, (first_col + table.local_cols) // self.chunk_dim
