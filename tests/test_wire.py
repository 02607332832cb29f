"""What is given to the collectives, compared with TorchRec's own tables under the same sharding."""

import sys
from functools import cache
from pathlib import Path

import pytest
from ranks import run

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))
from wire_bytes import ROW_TYPES, SHARDING_TYPES, Sent, Workload, step

WORLD_SIZE, LOCAL_SIZE = 4, 2
# Of every row-wise type: over how many ranks the rows are, and how many column shards there are.
ROW_RANKS = {"row_wise": (4, 1), "table_row_wise": (2, 1), "grid_shard": (2, 2)}


@cache
def sent(sharding: str, tables: str | None, chunk_dim: int = 8, qcomm: str = "fp32") -> list[Sent]:
    workload = Workload(features=4, ids_per_bag=3, batch_size=8, dim=32, chunk_dim=chunk_dim, qcomm=qcomm)
    return run(step, WORLD_SIZE, workload, sharding, tables, LOCAL_SIZE, local_world_size=LOCAL_SIZE)


def total(sent_by_rank: list[Sent], what: str) -> int:
    return sum(getattr(one, what) for one in sent_by_rank)


IDS = 4 * 3 * 8 * WORLD_SIZE  # of all ranks


@pytest.mark.parametrize("sharding", ["table_wise", "column_wise", "table_column_wise"])
def test_ids_travel_as_often_as_those_of_full_tables(sharding: str) -> None:
    full, lma = sent(sharding, None), sent(sharding, "auto")
    for what in ("input", "output", "backward"):
        assert total(lma, what) == total(full, what)
    owners = 1 if sharding == "table_wise" else 2
    assert total(lma, "input") > owners * IDS * 8


@pytest.mark.parametrize("sharding", ROW_TYPES)
@pytest.mark.parametrize("chunk_dim", [4, 16], ids=lambda c: f"{32 // c} chunks")
def test_row_wise_sends_the_cheaper_of_ids_and_addresses(sharding: str, chunk_dim: int) -> None:
    ranks, column_shards = ROW_RANKS[sharding]
    n_chunks = 32 // chunk_dim // column_shards  # of a shard
    full = sent(sharding, None)
    as_ids, as_addresses = sent(sharding, "ids", chunk_dim), sent(sharding, "addresses", chunk_dim)
    # Full tables send each id once to each column shard, and the lengths of all bags to every rank with rows.
    assert total(as_ids, "input") == total(full, "input") + (ranks - 1) * column_shards * IDS * 8
    assert total(as_addresses, "input") == total(full, "input") + (n_chunks - 1) * column_shards * IDS * 8
    cheaper = min(total(as_ids, "input"), total(as_addresses, "input"))
    assert total(sent(sharding, "auto", chunk_dim), "input") == cheaper
    for what in ("output", "backward"):
        assert total(as_ids, what) == total(as_addresses, what) == total(full, what)


@pytest.mark.parametrize(
    ("sharding", "qcomm"),
    [(s, q) for s in SHARDING_TYPES for q in ("fp16", "bf16")]
    + [(s, "int8") for s in SHARDING_TYPES if s not in ROW_TYPES],  # no INT8 reduce-scatter
)
def test_quantized_communication_sends_what_full_tables_send(sharding: str, qcomm: str) -> None:
    full, lma, unquantized = sent(sharding, None, 8, qcomm), sent(sharding, "auto", 8, qcomm), sent(sharding, "auto")
    for what in ("output", "backward"):
        assert total(lma, what) == total(full, what)
        assert total(lma, what) < 0.7 * total(unquantized, what)
