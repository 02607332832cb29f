"""The hash functions in Python's unbounded integers: the independent reference of the address tests."""

import hashlib

MASK = 2**64 - 1


def signed(x: int) -> int:
    x &= MASK
    return x - 2**64 if x >= 2**63 else x


def reference_mix64(x: int) -> int:
    """The finalizer of splitmix64, https://prng.di.unimi.it/splitmix64.c."""
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return signed(x ^ (x >> 31))


def reference_salt(*parts: object) -> int:
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
