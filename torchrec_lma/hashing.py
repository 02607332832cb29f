"""Integer hashing on int64 tensors: the arithmetic under every row.

Only torch ops that exist on CPU and CUDA, trace under torch.fx and compile under TorchScript, so that training and
scripted serving run this same code. int64 multiplication wraps modulo 2**64 on both devices; torch's `>>` on int64 is
arithmetic (it copies the sign bit), which is masked where it matters.
"""

import hashlib

from torch import Tensor


def mix64(x: Tensor) -> Tensor:
    """The splitmix64 finalizer (Steele, Lea, Flood, OOPSLA 2014, with Stafford's "Mix13" constants).

    A bijection on 64 bits in which every input bit flips every output bit with probability close to 1/2.

    Args:
        x: int64, any shape.
    Returns:
        int64, the same shape.
    """
    # The masks make the arithmetic shifts logical: 2**34 - 1, 2**37 - 1, 2**33 - 1.
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def unmix64(x: Tensor) -> Tensor:
    """The inverse of `mix64`, int64 of any shape: an id from its mixed key. Not part of any address."""
    x = x ^ ((x >> 31) & 0x1FFFFFFFF) ^ ((x >> 62) & 0x3)
    x = x * 3573116690164977347  # 0x319642B2D24D8EC3, of 0x94D049BB133111EB modulo 2**64
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF) ^ ((x >> 54) & 0x3FF)) * -7575587736534282103  # 0x96DE1B173F119089
    return x ^ ((x >> 30) & 0x3FFFFFFFF) ^ ((x >> 60) & 0xF)


def to_row(x: Tensor, multiplier: int, rows: int) -> Tensor:
    """A row from already mixed keys, independent of those of other multipliers.

    Multiply by the level's own odd constant, fold the well-mixed high half onto the low half, and reduce modulo `rows`.
    The fold is what makes levels independent: without it, keys that agree modulo a power of two would agree on every
    level with that many rows. The reduction of 63 bits is biased by at most rows / 2**63.

    Args:
        x: int64 [L], outputs of `mix64`.
        multiplier: odd.
        rows: number of rows to choose from, >= 1.
    Returns:
        int64 [L] in [0, rows).
    """
    x = x * multiplier
    x = x ^ (x >> 32)
    return (x & 0x7FFFFFFFFFFFFFFF) % rows


def salt(*parts: object) -> int:
    """A signed 64-bit constant that depends on every part and on nothing else (not on the process or machine)."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def table_salt(seed: int, table: str) -> int:
    """The constant that tells equal ids of different logical tables apart."""
    return salt("table", seed, table)


def level_multiplier(seed: int, level: int) -> int:
    """The odd constant of a level."""
    return salt("level", seed, level) | 1
