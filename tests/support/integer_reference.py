"""Hash functions and rows of ids in Python's unbounded integers: the independent reference of the tests of rows."""

import bisect
import hashlib
from dataclasses import dataclass, field

MASK = 2**64 - 1

Id = tuple[str, int]  # of a table


def signed(x: int) -> int:
    x &= MASK
    return x - 2**64 if x >= 2**63 else x


def reference_mix64(x: int) -> int:
    """The finalizer of splitmix64, https://prng.di.unimi.it/splitmix64.c."""
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return signed(x ^ (x >> 31))


def reference_unmix64(y: int) -> int:
    """The inverse of `reference_mix64`."""
    y = _undo_xor_shift(y & MASK, 31)
    y = _undo_xor_shift(y * pow(0x94D049BB133111EB, -1, 2**64) & MASK, 27)
    return signed(_undo_xor_shift(y * pow(0xBF58476D1CE4E5B9, -1, 2**64) & MASK, 30))


def _undo_xor_shift(y: int, shift: int) -> int:
    x = y
    for _ in range(64 // shift):
        x = y ^ (x >> shift)
    return x


def reference_salt(*parts: object) -> int:
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def reference_key(seed: int, id: Id) -> int:
    """The mixed key of an id."""
    return reference_mix64(id[1] ^ reference_salt("table", seed, id[0]))


def reference_to_row(x: int, multiplier: int, rows: int) -> int:
    product = signed(x * multiplier)
    return ((product ^ (product >> 32)) & (2**63 - 1)) % rows


def index_order(keys: list[int]) -> list[int]:
    """Keys in the order of an index: buckets by high bits, inside them the low halves as signed numbers ascending."""
    n_buckets = 2
    while n_buckets * 4 < len(keys):
        n_buckets *= 2

    def place(key: int) -> tuple[int, int]:
        low = key & 0xFFFFFFFF
        return (key & MASK) * n_buckets >> 64, low - 2**32 if low >= 2**31 else low

    return sorted(keys, key=place)


@dataclass
class PlannedMemory:
    """A memory in plain Python.

    Attributes:
        sizes: num_embeddings of its tables, in order.
        raw_ids: else ids are a vocabulary.
        widths: of the levels.
        owners: for each level the ids with a row of their own there, each level a subset of the one before.
        shared: for each level its shared rows.
        signatures: the values of the ids that have a signature.
    """

    sizes: dict[str, int]
    raw_ids: bool = False
    widths: list[int] = field(default_factory=lambda: [4])
    owners: list[list[Id]] = field(default_factory=lambda: [[]])
    shared: list[int] = field(default_factory=lambda: [10])
    signatures: dict[Id, list[int]] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        # For each level the row of each owner: its rank among the rows that owners have on the level before.
        self.own_rows: list[dict[Id, int]] = []
        places: dict[Id, int] = {}
        if self.raw_ids:
            in_order = index_order([reference_key(self.seed, id) for id in self.owners[0]])
            places = {id: in_order.index(reference_key(self.seed, id)) for id in self.owners[0]}
        else:
            places = {id: self.position(id) for id in self.owners[0]}
        for owners in self.owners:
            ranks = sorted(places[id] for id in owners)
            places = {id: bisect.bisect_left(ranks, places[id]) for id in owners}
            self.own_rows.append(places)

    def position(self, id: Id) -> int:
        """Where an id of a vocabulary is among those of all tables, one after another; -1 outside."""
        table, value = id
        before = 0
        for name, size in self.sizes.items():
            if name == table:
                return before + value if 0 <= value < size else -1
            before += size
        raise KeyError(table)

    def row(self, level: int, id: Id) -> int:
        """The row of an id on a level, -1 where it is absent."""
        own = self.own_rows[level]
        if not self.raw_ids and self.shared[0] == 0 and len(self.own_rows[0]) == sum(self.sizes.values()):
            id = id if self.position(id) >= 0 else (id[0], 0)  # no row is for those outside
        if id in own:
            return own[id]
        if self.shared[level] == 0:
            return -1
        if self.shared[level] <= len(self.sizes) and not self.signatures:
            return len(own) + list(self.sizes).index(id[0]) % self.shared[level]
        mixed = reference_key(self.seed, id)
        if id in self.signatures:
            values = self.signatures[id]
            mixed = reference_mix64(values[level % len(values)] ^ reference_salt("signature", self.seed))
        multiplier = reference_salt("level", self.seed, level) | 1
        return len(own) + reference_to_row(mixed, multiplier, self.shared[level])
