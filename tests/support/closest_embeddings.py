"""The embeddings closest to given vectors that rows allow, by numpy's least squares on the problem written out."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from torchrec_lma import LMAEmbeddingBagCollection


def closest(
    lma: LMAEmbeddingBagCollection,
    vectors: Mapping[str, Tensor],
    ids: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
) -> dict[str, np.ndarray]:
    """table -> the embeddings of its ids at the optimum, one lstsq for each level and column block.

    Rows are of `lma.rows`; an id that is absent on a level has zeros there.
    """
    best = {name: np.zeros(tuple(v.shape)) for name, v in vectors.items()}
    for tables in (memory.tables for memory in lma.allocation.memories):
        counts = [ids[table].numel() for table in tables]
        wanted = np.concatenate([vectors[table].detach().double().numpy() for table in tables])
        scale = np.sqrt(np.concatenate([weights[table].double().numpy() for table in tables]))[:, None]
        widths = [width for width, _ in lma.level_weights(tables[0])]
        of_tables = [list(lma.rows(table, ids[table]).values()) for table in tables]
        for level, (start, width) in enumerate(zip(np.cumsum([0, *widths]), widths)):
            rows = np.concatenate([levels[level].numpy() for levels in of_tables])
            columns = slice(start, start + width)
            design = np.zeros((rows.size, rows.max(initial=0) + 1))
            design[np.flatnonzero(rows >= 0), rows[rows >= 0]] = 1
            solution = np.linalg.lstsq(design * scale, wanted[:, columns] * scale, rcond=None)[0]
            for table, part in zip(tables, np.split(design @ solution, np.cumsum(counts)[:-1])):
                best[table][:, columns] = part
    return best
