"""A compact read-only index from mixed 64-bit keys to positions."""

import torch
from torch import Tensor, nn

# Buckets hold 2 to 4 keys on average: one cache line, and 1 to 2 bytes a key for the table of bucket starts.
_KEYS_PER_BUCKET = 4


def build_index(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort mixed keys into buckets by their high bits; keep only 32 low bits of each.

    Args:
        keys: int64 [N], outputs of `mix64`, in any order, N >= 1.
    Returns:
        low: int32 [M], the low 32 bits, sorted within each bucket;
        starts: int32 [n_buckets + 1], where each bucket begins in `low`;
        order: int64 [M], the position in `keys` of each entry. M < N only if two keys agree in bucket and low bits (for
        a million keys this happens with probability 0.0005); the one with the larger value is then left out, and
        `IdIndex` takes it for the other.
    """
    n_buckets = 2
    while n_buckets * _KEYS_PER_BUCKET < keys.numel():
        n_buckets *= 2
    bits = n_buckets.bit_length() - 1
    keys, original = torch.sort(keys)
    bucket = (keys >> (64 - bits)) & (n_buckets - 1)
    low = _low32(keys)
    composite, order = torch.sort((bucket << 32) + low + 2**31, stable=True)
    kept = torch.ones_like(composite, dtype=torch.bool)
    kept[1:] = composite[1:] != composite[:-1]
    order = order[kept]
    starts = torch.zeros(n_buckets + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(bucket[order], minlength=n_buckets), 0, out=starts[1:])
    return low[order].to(torch.int32), starts.to(torch.int32), original[order]


def _low32(keys: Tensor) -> Tensor:
    """The low 32 bits as a signed number, int64: casting to int32 would rely on how a device overflows."""
    low = keys & 0xFFFFFFFF
    return low - ((low >> 31) << 32)


def index_bytes(n: int) -> int:
    """Bytes of an `IdIndex` of n keys, at most: 4 a key, and 4 for each start of at most n / 2 + 2 buckets."""
    return 6 * n + 12 if n else 0


class IdIndex(nn.Module):
    """Finds the position of mixed keys: 5 to 6 bytes a key, and one cache line of keys for each look-up.

    A key that is not in the index is found all the same with probability below bucket size / 2**32, about 1e-9.
    Scripts and traces; `low` and `starts` are persistent buffers made by `build_index`.
    """

    low: Tensor
    starts: Tensor

    def __init__(self, low: Tensor, starts: Tensor) -> None:
        super().__init__()
        self.register_buffer("low", low)
        self.register_buffer("starts", starts)
        n_buckets = starts.numel() - 1
        self.shift = 64 - (n_buckets.bit_length() - 1)
        self.bucket_mask = n_buckets - 1
        self.last = low.numel() - 1
        self.steps = int((starts[1:] - starts[:-1]).max()).bit_length()

    def find(self, keys: Tensor) -> Tensor:
        """
        Args:
            keys: int64 [L], outputs of `mix64`.
        Returns:
            int32 [L], positions in the order of `low`, -1 where the key is not in the index.
        """
        bucket = (keys >> self.shift) & self.bucket_mask
        wanted = keys & 0xFFFFFFFF
        wanted = (wanted - ((wanted >> 31) << 32)).to(torch.int32)
        first = self.starts.index_select(0, bucket)
        end = self.starts.index_select(0, bucket + 1)
        after = end
        for _ in range(self.steps):  # binary search for the first entry >= wanted in [first, end)
            middle = first + ((after - first) >> 1)
            less = (self.low.index_select(0, middle.clamp(max=self.last)) < wanted) & (first < after)
            first = torch.where(less, middle + 1, first)
            after = torch.where(less, after, middle)
        found = (first < end) & (self.low.index_select(0, first.clamp(max=self.last)) == wanted)
        return torch.where(found, first, -1)
