"""How often ids occur, in bounded RAM, whatever the order of the rows and however workers share them."""

import numpy as np

from torchrec_lma.hashing import salt

_FLUSH_IDS = 1 << 18  # ids of all tables together that wait to be counted, at least
_PART_IDS = 64  # an array that waits takes the RAM of this many ids, however few it has
_DEPTH = 5  # rows of the sketch
_LEAST_WIDTH = 1 << 10


class IdFrequency:
    """Counts ids: exactly while all tables together have at most `max_ids` distinct ones, else in a Count-Sketch.

    Counter-based sketches of heavy hitters (Space-Saving, Misra-Gries; datasketches' frequent_items_sketch, which
    takes one Python object at a time) keep what the order of the stream and of the merges makes them keep. Here the
    result must depend on the data alone. Counts in sorted arrays do; so does the Count-Sketch (Charikar, Chen,
    Farach-Colton, ICALP 2002), being a sum over all occurrences, and whether there are more than `max_ids` distinct
    ids, whoever notices it first. A sketch cannot list its ids: the caller asks for those in its sample of rows.

    RAM between calls, of all tables together: 16 bytes for each of `max_ids` at most, or 10 in the sketch, and 8 for
    each id that waits to be counted: no more wait than `max_ids`, or 2 MiB where that is more, and the last batch.
    """

    def __init__(self, n_tables: int, max_ids: int) -> None:
        self.max_ids = max_ids
        self.exact = True
        self.occurrences = [0] * n_tables
        self._keys = [np.empty(0, np.int64) for _ in range(n_tables)]  # ascending
        self._counts = [np.empty(0, np.int64) for _ in range(n_tables)]
        self._waiting: list[list[np.ndarray]] = [[] for _ in range(n_tables)]
        self._n_known = self._n_waiting = 0  # of all tables
        # Of all tables, whose keys are mixed apart: int64 [_DEPTH, width].
        self._sketch = np.empty((_DEPTH, 0), np.int64)

    def add(self, table: int, keys: np.ndarray) -> None:
        """Count the ids of a table. `keys`: int64 [n], mixed keys."""
        self.occurrences[table] += keys.size
        self._waiting[table].append(keys)
        self._n_waiting += max(keys.size, _PART_IDS)
        counted = self._n_known if self.exact else self.max_ids
        if self._n_waiting > max(_FLUSH_IDS, counted):  # seldom enough: O(n log n) in all
            self.settle()

    def add_counts(self, table: int, keys: np.ndarray, counts: np.ndarray) -> None:
        """Add counts, int64 [n] >= 1, of distinct mixed keys, int64 [n] ascending."""
        self.occurrences[table] += int(counts.sum())
        self._insert(table, keys, counts)

    def merge(self, other: "IdFrequency") -> None:
        """Add what another one counted, leaving that as it is."""
        for table, occurrences in enumerate(other.occurrences):
            self.occurrences[table] += occurrences
        self.settle()
        other.settle()
        if not other.exact:
            self._start_sketch()
            self._sketch += other._sketch
        for table, (keys, counts) in enumerate(zip(other._keys, other._counts)):
            self._insert(table, keys, counts)

    def settle(self) -> None:
        """Counts what waits, after which `exact` is final for the data so far."""
        for table in range(len(self._keys)):
            self._flush(table)
        self._n_waiting = 0

    def of_table(self, table: int) -> tuple[np.ndarray, np.ndarray]:
        """A table's distinct mixed keys, int64 [V] ascending, and their counts, int64 [V]; none unless `exact`."""
        self.settle()
        return self._keys[table], self._counts[table]

    def estimates(self, keys: np.ndarray) -> np.ndarray:
        """Counts of some keys, int64 [n], when not `exact`; off by about sqrt(sum of squared counts / width)."""
        cells, signs = self._cells(keys)
        of_rows = [row[cell] * sign for row, cell, sign in zip(self._sketch, cells, signs)]
        return np.median(of_rows, axis=0).astype(np.int64)

    def _flush(self, table: int) -> None:
        if self._waiting[table]:
            keys = np.sort(np.concatenate(self._waiting[table]))
            self._waiting[table] = []
            first = np.flatnonzero(np.diff(keys, prepend=~keys[:1]))
            self._insert(table, keys[first], np.diff(first, append=keys.size))

    def _insert(self, table: int, keys: np.ndarray, counts: np.ndarray) -> None:
        """Adds counts to distinct ascending keys."""
        if not self.exact:
            self._add_to_sketch(keys, counts)
            return
        known = self._keys[table]
        position = np.searchsorted(known, keys)
        is_known = np.zeros(keys.size, bool)
        inside = position < known.size
        is_known[inside] = known[position[inside]] == keys[inside]
        # A copy: other objects may hold the array that of_table gave them.
        total = self._counts[table].copy()
        total[position[is_known]] += counts[is_known]
        new = ~is_known
        self._keys[table] = np.insert(known, position[new], keys[new])
        self._counts[table] = np.insert(total, position[new], counts[new])
        self._n_known += int(new.sum())
        if self._n_known > self.max_ids:
            self._start_sketch()

    def _start_sketch(self) -> None:
        """Moves the counts so far into a sketch."""
        if self.exact:
            self.exact = False
            width = max(_LEAST_WIDTH, 1 << (self.max_ids // 4).bit_length() >> 1)
            self._sketch = np.zeros((_DEPTH, width), np.int64)
            for keys, counts in zip(self._keys, self._counts):
                self._add_to_sketch(keys, counts)
            empty = np.empty(0, np.int64)
            self._keys, self._counts = [empty] * len(self._keys), [empty] * len(self._keys)

    def _add_to_sketch(self, keys: np.ndarray, counts: np.ndarray) -> None:
        cells, signs = self._cells(keys)
        for row, cell, sign in zip(self._sketch, cells, signs):
            np.add.at(row, cell, counts * sign)

    def _cells(self, keys: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """For each row of the sketch the cells of keys and their signs, int64 [n], by multiply-shift hashing."""
        bits = self._sketch.shape[1].bit_length() - 1
        mixed = [keys.view(np.uint64) * np.uint64((salt("count-sketch", d) | 1) % 2**64) for d in range(_DEPTH)]
        cells = [(hashed >> np.uint64(64 - bits)).view(np.int64) for hashed in mixed]
        signs = [((hashed >> np.uint64(63 - bits)) & np.uint64(1)).view(np.int64) * 2 - 1 for hashed in mixed]
        return cells, signs
