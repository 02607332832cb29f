"""The memory that is closest to given vectors; the one place that writes weights from vectors.

The memory M that minimizes the sum over ids v of w_v * |e_v - concat_j M[a(v, j), chunk j]|^2, with a(v, j) the address
of chunk j of v, falls apart into one problem for each chunk of each row, whose solution is a weighted mean:

    M[r, chunk j] = sum of w_v * e_v[chunk j] / sum of w_v, both over the ids v with a(v, j) = r
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchrec_lma.addressing import MemoryAddressing
from torchrec_lma.hashing import table_salt

if TYPE_CHECKING:
    from torchrec_lma.modules import LMAEmbeddingBagCollection

_BLOCK_VALUES = 1 << 21  # of one block of vectors: 16 MiB as float64


class LeastSquares:
    """Sums up vectors of ids, then writes a memory: 8 bytes for each of its weights, and 8 for each of its chunks.

    Args:
        addressing: of the memory.
        memory: float [rows, dim], what `write` changes.
    """

    def __init__(self, addressing: MemoryAddressing, memory: Tensor) -> None:
        self._addressing = addressing
        self._memory = memory
        n_cells = memory.size(0) * addressing.n_chunks  # a cell is a chunk of a row
        # A product of two float32 is exact in float64, so a cell with one id gets that id's very vector.
        self._sums = torch.zeros(n_cells, memory.numel() // n_cells, dtype=torch.float64, device=memory.device)
        self._weights = torch.zeros(n_cells, dtype=torch.float64, device=memory.device)

    def add(self, salt: int, ids: Tensor, vectors: Tensor, weights: Tensor | None) -> None:
        """
        Args:
            salt: `table_salt` of the ids' table.
            ids: integer [N].
            vectors: float [N, dim].
            weights: [N], or None for 1.
        """
        device, n_chunks = self._sums.device, self._addressing.n_chunks
        rows = self._addressing(ids.to(device), torch.tensor([salt], device=device), 0, n_chunks)  # (n, N)
        cells = (rows * n_chunks + torch.arange(n_chunks, device=device).unsqueeze(1)).t().reshape(-1)  # (N * n)
        vectors = vectors.to(device, torch.float64)
        if weights is None:
            weights = torch.ones(ids.numel(), device=device)
        weights = weights.to(device, torch.float64).unsqueeze(1)  # (N, 1)
        self._sums.index_add_(0, cells, (vectors * weights).reshape(cells.numel(), -1))
        self._weights.index_add_(0, cells, weights.expand(-1, n_chunks).reshape(-1))

    def write(self) -> None:
        """Sets the memory; chunks that no id of positive weight uses stay as they are. Call once."""
        cells = self._memory.view_as(self._sums)
        unused = self._weights == 0
        self._weights[unused] = 1
        means = self._sums.div_(self._weights.unsqueeze(1))
        for block in blocks(*cells.shape):  # so that no second copy of the memory is made
            cells[block] = torch.where(unused[block].unsqueeze(1), cells[block], means[block].to(cells.dtype))


@torch.no_grad()
def fit(
    ebc: "LMAEmbeddingBagCollection",
    ids: Mapping[str, Tensor],
    vectors: Callable[[str, slice], Tensor],
    id_weights: Mapping[str, Tensor] | None,
) -> None:
    """Writes all memories of a collection, reading the vectors block by block.

    Args:
        ids: for each logical table, integer [N].
        vectors: called with a table and a slice of its ids; returns float [n, dim].
        id_weights: for any of the tables, [N] >= 0; 1 for the others.
    Raises:
        ValueError: ids or weights that do not fit the tables, naming the table.
        TypeError: ids that are not integers.
    """
    id_weights = id_weights or {}
    check_ids(ebc, ids)
    check_id_weights(ids, id_weights)
    for memory in ebc.allocation.memories:
        solver = LeastSquares(ebc.addressing[memory.name], ebc.embedding_bags[memory.name].weight)
        for table in memory.tables:
            for block in blocks(ids[table].numel(), memory.dim):
                weights = id_weights[table][block] if table in id_weights else None
                solver.add(table_salt(ebc.config.seed, table), ids[table][block], vectors(table, block), weights)
        solver.write()


def blocks(n: int, dim: int) -> Iterator[slice]:
    """Slices of n vectors of a dim, each of bounded size."""
    step = max(1, _BLOCK_VALUES // dim)
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def check_ids(ebc: "LMAEmbeddingBagCollection", ids: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless there are ids for each table of the collection, TypeError unless they are integers."""
    names = [table.name for table in ebc.tables]
    if set(ids) != set(names):
        raise ValueError(
            f"ids are needed for each of the tables {names}; missing {sorted(set(names) - set(ids))}, unknown "
            f"{sorted(set(ids) - set(names))}. Give an empty tensor for a table whose ids do not matter"
        )
    for name, values in ids.items():
        if not isinstance(values, Tensor):
            raise TypeError(f"ids of {name!r} are {type(values).__name__}; give an integer tensor of shape [N]")
        if values.dim() != 1 or values.is_floating_point() or values.is_complex() or values.dtype is torch.bool:
            raise TypeError(
                f"ids of {name!r} are {values.dtype} of shape {list(values.shape)}; give an integer tensor of shape [N]"
            )


def check_id_weights(ids: Mapping[str, Tensor], id_weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless the weights are one finite number >= 0 for each id, TypeError unless in a tensor."""
    for name, weights in id_weights.items():
        if name not in ids:
            raise ValueError(f"id_weights has a table {name!r}; the tables are {list(ids)}")
        if not isinstance(weights, Tensor):
            raise TypeError(f"id_weights of {name!r} are {type(weights).__name__}; give a tensor of shape [N]")
        if weights.shape != ids[name].shape:
            raise ValueError(
                f"id_weights of {name!r} has shape {list(weights.shape)}, expected one weight for each of its "
                f"{ids[name].numel()} ids"
            )
        if not bool(((weights >= 0) & torch.isfinite(weights)).all()):
            raise ValueError(
                f"id_weights of {name!r} has a value that is negative or not finite; give counts or other weights >= 0"
            )
