"""A stream of rows in windows of one size, each of them shuffled."""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from torchrec_lma.datasets.columns import as_bags


def shuffled(
    batches: Iterable[pa.RecordBatch], window_rows: int, random: np.random.Generator | None
) -> Iterator[pa.RecordBatch]:
    """The same rows in windows of `window_rows`, the last of which may be smaller; permuted where `random` is given."""
    for window in _rechunk(batches, window_rows):
        yield window if random is None else window.take(pa.array(random.permutation(window.num_rows)))


def _rechunk(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of `rows`; the last may be smaller."""
    held: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        held.append(batch)
        size += batch.num_rows
        if size >= rows:
            joined = _concat(held)
            full = size - size % rows
            for start in range(0, full, rows):
                yield joined.slice(start, rows)
            held, size = [joined.slice(full)], size - full
    if size:
        yield _concat(held)


def _concat(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    """The rows of `_encoded` batches, a column of which may have single ids in one file and lists in another."""
    if any(batch.schema != batches[0].schema for batch in batches):
        lists = {field.name for batch in batches for field in batch.schema if pa.types.is_large_list(field.type)}
        batches = [
            pa.RecordBatch.from_pydict(
                {
                    name: as_bags(batch.column(name)) if name in lists else batch.column(name)
                    for name in batch.schema.names
                }
            )
            for batch in batches
        ]
    return pa.concat_batches(batches)
