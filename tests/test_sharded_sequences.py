"""Sharded unpooled collections against one process, in plain torch: forward, optimizer steps, checkpoints."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run
from sequence_model import (
    DIM,
    SLOTS,
    Reference,
    build,
    build_allocation,
    initial_state,
    level_shapes,
    train_reference,
    train_sharded,
)
from sharded_model import assert_close, batch, features, train, whole
from torch import Tensor
from torchrec.datasets.utils import Batch

from torchrec_lma import Allocation
from torchrec_lma.distributed import ShardedLMAEmbeddingCollection

TYPES = ["table_wise", "column_wise", "row_wise"]
# sharding, optimizer, pipelined
CASES: list[tuple[str, str, bool]] = [
    *[(sharding, "rowwise_adagrad", False) for sharding in TYPES],
    *[(sharding, "adagrad", False) for sharding in ("table_wise", "row_wise")],
    *[(sharding, "sgd", True) for sharding in ("table_wise", "mixed")],
    ("replicated", "adam", False),
    ("mixed", "rowwise_adagrad", False),
    ("planner", "rowwise_adagrad", True),
]


@pytest.mark.parametrize(("sharding", "optimizer", "pipeline"), CASES)
def test_training_equals_one_process(sharding: str, optimizer: str, pipeline: bool) -> None:
    allocation = build_allocation()
    results = run(train_sharded, 2, allocation, sharding, optimizer, pipeline)
    first = results[0]
    expected, sums = train_reference(allocation, 2, optimizer, column_shards=first.column_shards)
    start = initial_state(allocation)
    for name, value in expected.items():
        assert not torch.equal(value, start[name]), f"{name} did not train"
    assert_close(first.weights, expected)
    assert set(sums) == (set(level_shapes(allocation)) if "adagrad" in optimizer else set())
    for table, expected_sums in sums.items():
        if table in first.types:
            assert_sums_close([result.sums.get(table, []) for result in results], expected_sums, first, table)
    assert first.pipelined == (["ec"] if pipeline else [])


def assert_sums_close(of_ranks, expected: Tensor, first, table: str) -> None:
    """The ranks' shards together are the whole running sums."""
    if expected.size(1) == first.column_shards[table]:  # row-wise state: the rows of one column shard, then the next
        expected = expected.t().flatten()
    found = torch.full_like(expected, torch.nan)
    for shards in of_ranks:
        for offsets, values in shards:
            found[tuple(slice(start, start + size) for start, size in zip(offsets, values.size()))] = values
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
