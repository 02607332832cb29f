"""What a sharded lookup must know of LMA beside TorchRec's own configuration."""

from dataclasses import dataclass

from torchrec_lma.addressing import Addressing


@dataclass(frozen=True)
class LMASpecs:
    """Handed from the sharded module through the sharding and the lookup to the kernels.

    Attributes:
        addressing: of all memories, on the lookups' device.
        chunk_dim: columns of a chunk.
        salt_of_feature: `table_salt` of each feature's logical table.
    """

    addressing: Addressing
    chunk_dim: int
    salt_of_feature: dict[str, int]
