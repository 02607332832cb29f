"""What must be true of an allocation read from a file, whoever wrote it: else rows would be looked up out of range."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import DataType

from torchrec_lma.allocation.bitmap import popcount
from torchrec_lma.allocation.layout import MAX_ROWS, Level, TableSpec, kernel_takes
from torchrec_lma.config import check_int


def check_tables(tables: Sequence[TableSpec], of_memories: Sequence[str]) -> None:
    """Raises ValueError or TypeError unless these can be tables, each in one memory."""
    for table in tables:
        for name in ("num_embeddings", "embedding_dim"):
            check_int(f"{name} of table {table.name!r}", getattr(table, name), minimum=1)
        DataType[table.data_type]  # a KeyError names it
        _require(isinstance(table.raw_ids, bool), f"raw_ids of table {table.name!r} is {table.raw_ids!r}")
    names = [table.name for table in tables]
    _require(len(set(names)) == len(names), f"tables {names} have a name twice")
    _require(sorted(of_memories) == sorted(names), f"tables {names} are not those of the memories: {of_memories}")


def check_memory(
    name: str,
    dim: int,
    raw_ids: bool,
    tables: Sequence[TableSpec],
    levels: Sequence[Level],
    tensors: Mapping[str, Tensor],
) -> None:
    """Raises ValueError or TypeError, naming the memory, unless its levels and tensors fit each other and its tables.

    Args:
        name, dim, raw_ids, levels, tensors: see MemoryAllocation.
        tables: that share it.
    """
    for table in tables:
        same = table.embedding_dim == dim and table.raw_ids is raw_ids
        _require(same, f"memory {name!r} has dim {dim} and raw_ids {raw_ids}, unlike {table}")
    for k, level in enumerate(levels):
        which = f"of level {k} of {name!r}"
        check_int(f"width {which}", level.width, minimum=1)
        _require(kernel_takes(level.width), f"width {level.width} {which} fits no kernel")
        for rows in (level.own_rows, level.shared_rows):
            check_int(f"a number of rows {which}", rows, minimum=0)
        _require(level.rows <= MAX_ROWS, f"{level.rows} rows {which}, the most is {MAX_ROWS}")
    _require(
        sum(level.width for level in levels) == dim, f"the levels of {name!r} do not add up to {dim} columns: {levels}"
    )
    _require(any(level.rows for level in levels), f"memory {name!r} has no rows: {levels}")

    left = dict(tensors)
    before = None if raw_ids else sum(table.num_embeddings for table in tables)
    for k, level in enumerate(levels):
        own = level.own_rows
        _require(before is None or own <= before, f"{own} own rows of level {k} of {name!r}, the most is {before}")
        if before is None:
            if own:
                _check_index(name, f"owners.{k}", own, left)
        elif 0 < own < before and f"owners.{k}.ranges" in left:
            _check_ranges(name, f"owners.{k}.ranges", own, before, len(tables), left)
        elif 0 < own < before:
            _check_bitmap(name, f"owners.{k}", own, before, left)
        before = own
    if "signatures" in left:
        signatures = _take(name, "signatures", torch.int32, 2, left)
        _require(signatures.numel() > 0, f"signatures of {name!r} are of shape {list(signatures.shape)}")
        if raw_ids:
            _check_index(name, "signed", signatures.size(0), left)
        else:
            size = sum(table.num_embeddings for table in tables)
            _check_bitmap(name, "signed", signatures.size(0), size, left)
    _require(not left, f"memory {name!r} has tensors that its levels do not need: {sorted(left)}")


def _check_bitmap(name: str, of: str, members: int, n: int, left: dict[str, Tensor]) -> None:
    words = _take(name, f"{of}.words", torch.int32, 1, left)
    _require(words.numel() == -(-n // 32), f"{of}.words of {name!r} has {words.numel()} words for {n} ids")
    counted = int(popcount(words).sum())
    beyond = n % 32 and int(popcount(words[-1:] & (-1 << n % 32)))
    _require(
        counted == members and not beyond,
        f"{of}.words of {name!r} has {counted} members of {n}, {beyond} of them beyond; expected {members}",
    )


def _check_ranges(name: str, of: str, members: int, n: int, tables: int, left: dict[str, Tensor]) -> None:
    ranges = _take(name, of, torch.int64, 2, left)
    fits = ranges.shape == (tables, 2) and bool((ranges >= 0).all()) and bool((ranges <= n).all())
    if fits:
        lengths = ranges[:, 1] - ranges[:, 0]
        some = ranges[lengths > 0]
        apart = bool((some[1:, 0] >= some[:-1, 1]).all())
        fits = apart and bool((lengths >= 0).all()) and int(lengths.sum()) == members
    _require(
        fits,
        f"{of} of {name!r} are {ranges.tolist()}; expected for each of {tables} tables a range of [0, {n}], of "
        f"{members} ids together",
    )


def _check_index(name: str, of: str, keys: int, left: dict[str, Tensor]) -> None:
    low = _take(name, f"{of}.low", torch.int32, 1, left)
    starts = _take(name, f"{of}.starts", torch.int32, 1, left)
    _require(low.numel() == keys, f"{of}.low of {name!r} has {low.numel()} keys, expected {keys}")
    buckets = starts.numel() - 1
    in_order = (
        buckets >= 2
        and buckets & (buckets - 1) == 0
        and int(starts[0]) == 0
        and int(starts[-1]) == keys
        and not bool((starts[1:] < starts[:-1]).any())
    )
    _require(in_order, f"{of}.starts of {name!r} are not the starts of 2 ** n buckets of {keys} keys")
    ascending = low[1:] > low[:-1]
    first = starts[(starts > 0) & (starts < keys)].long()
    ascending[first - 1] = True  # from the last key of a bucket to the first of another
    _require(
        bool(ascending.all()), f"{of}.low of {name!r} is not sorted within its buckets, where ids are searched for"
    )


def _take(name: str, tensor: str, dtype: torch.dtype, dims: int, left: dict[str, Tensor]) -> Tensor:
    _require(tensor in left, f"memory {name!r} lacks {tensor}")
    values = left.pop(tensor)
    _require(
        values.dtype == dtype and values.dim() == dims,
        f"{tensor} of {name!r} is {values.dtype} of shape {list(values.shape)}, expected {dims} dimensions of {dtype}",
    )
    return values


def _require(true: bool, otherwise: str) -> None:
    if not true:
        raise ValueError(otherwise)
