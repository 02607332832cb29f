"""A set of small integers that knows the rank of each member: 2 bits for each integer of the range."""

import numpy as np
import torch
from torch import Tensor, nn

_WORD = 32  # bits; int32 takes half the time of int64, and its ranks take as many bits as the set itself


def build_bitmap(members: Tensor, n: int) -> Tensor:
    """Pack a set.

    Args:
        members: int64 [M], the members, each once, in [0, n).
        n: size of the range.
    Returns:
        int32 [ceil(n / 32)], bit i % 32 of word i // 32 is member i.
    """
    words = torch.zeros(-(-n // _WORD), dtype=torch.int32)
    # Members are distinct, so no sum carries, and the one that reaches the sign bit is as good as an or.
    bits = torch.ones_like(members, dtype=torch.int32) << (members & 31).to(torch.int32)
    return words.index_add_(0, members >> 5, bits)


@torch.fx.wrap
def popcount(words: Tensor) -> Tensor:
    """How many bits are set, int32 of any shape."""
    if not torch.jit.is_scripting() and not torch.compiler.is_compiling():
        if words.device.type == "cpu":  # one instruction a word; torch has none
            return torch.from_numpy(np.bitwise_count(words.numpy().view(np.uint32)).astype(np.int32))
    # By halves (Warren, Hacker's Delight, section 5-1). The masks make torch's arithmetic shifts logical.
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


def bitmap_bytes(n: int) -> int:
    """Bytes of a `RankBitmap` of a range of n."""
    return -(-n // _WORD) * 8


class RankBitmap(nn.Module):
    """Finds the rank of a member among all members, -1 for the others. Scripts and traces.

    Args:
        words: int32 [W] from `build_bitmap`; persistent, the ranks of the words are not, for they follow from it.
    """

    words: Tensor
    before: Tensor

    def __init__(self, words: Tensor) -> None:
        super().__init__()
        counts = popcount(words)
        self.register_buffer("words", words)
        self.register_buffer("before", (counts.cumsum(0) - counts).to(torch.int32), persistent=False)  # [W]

    def find(self, values: Tensor) -> Tensor:
        """
        Args:
            values: integer [L], in the range of the set, or negative for what is no member.
        Returns:
            int32 [L], the number of members below each member; -1 for what is no member.
        """
        inside = values.clamp(min=0)
        word_index = inside >> 5
        # The member's own bit goes to the top, where it is the sign, and those below it along.
        up_to_it = self.words.index_select(0, word_index) << (~inside & 31).to(torch.int32)
        rank = self.before.index_select(0, word_index) + popcount(up_to_it) - 1
        return torch.where((up_to_it < 0) & (values >= 0), rank, -1)
