"""What is given to the collectives, compared with TorchRec's own tables under the same sharding."""

from functools import cache

import pytest
import torch
from speed import Workload, build
from wire_bytes import SHARDING_TYPES, SIZES, Sent, parts, step

from support.ranks import run
from torchrec_lma import Allocation, LMAConfig, LMAEmbeddingBagCollection

WORLD_SIZE, LOCAL_SIZE = 4, 2


@cache
def workload_of(name: str, pooling: int, compression: float = 16) -> tuple[Workload, Allocation]:
    """Small tables of the benchmark's proportions: 26 of equal size, or Criteo's. With 12x there are two levels."""
    sizes = tuple(max(2, size // 4) for size in SIZES[name])
    workload = Workload(sizes, pooling, batch_size=32)
    allocation = build(workload, LMAConfig(compression=compression))
    (memory,) = allocation.memories
    assert sum(level.rows > 0 for level in memory.levels) == (1 if compression == 16 else 2)
    return workload, allocation


@cache
def sent(name: str, pooling: int, sharding: str, lma: bool, qcomm: str = "fp32", compression: float = 16) -> Sent:
    """By all ranks together."""
    workload, allocation = workload_of(name, pooling, compression)
    args = (workload, allocation if lma else None, sharding, LOCAL_SIZE, qcomm)
    by_rank: list[Sent] = run(step, WORLD_SIZE, *args, local_world_size=LOCAL_SIZE)
    return Sent(*(sum(getattr(one, what) for one in by_rank) for what in ("input", "output", "backward")))


@pytest.mark.parametrize("compression", [16, 12])
@pytest.mark.parametrize("name", ["criteo", "equal"])
def test_a_row_of_a_level_is_sent_once_in_32_bits(name: str, compression: float) -> None:
    workload, allocation = workload_of(name, 3, compression)
    ebc = LMAEmbeddingBagCollection(workload.tables(), allocation, device=torch.device("meta"))
    expected, full = 0, 0
    for rank in range(WORLD_SIZE):
        batch = workload.batch(rank)
        full += 8 * batch.values().numel() + 4 * batch.lengths().numel()
        for i, table in enumerate(workload.tables()):
            of_level = ebc.rows(table.name, batch[f"f{i}"].values())
            expected += sum(4 * int((rows >= 0).sum()) for rows in of_level.values())
            keys = sum(level.pack for level in allocation.memories[0].levels if level.rows)
            expected += 4 * workload.batch_size * keys  # lengths
    # Beside these each rank tells each how much is coming, of any table alike.
    splits = sent(name, 3, "table_wise", False).input - full
    assert 0 <= splits < 1000
    assert sent(name, 3, "table_wise", True, compression=compression).input == expected + splits


def test_parts_add_up_to_what_a_rank_sends() -> None:
    workload, allocation = workload_of("criteo", 3)
    found = parts(workload, allocation)
    ids = workload.batch(0).values().numel()
    total = sum(part.rows + part.lengths for name, part in found.items() if name != "full tables")
    sent_by_rank_0: Sent = run(
        step, WORLD_SIZE, workload, allocation, "table_wise", LOCAL_SIZE, local_world_size=LOCAL_SIZE
    )[0]
    assert sent_by_rank_0.input == pytest.approx(total * ids, abs=300)
    assert found["full tables"].rows == 8 and found["full tables"].keys == 26


@pytest.mark.parametrize("sharding", SHARDING_TYPES)
@pytest.mark.parametrize(("name", "pooling"), [("criteo", 1), ("criteo", 20), ("equal", 1), ("equal", 20)])
def test_input_is_at_most_half_more_than_that_of_full_tables(name: str, pooling: int, sharding: str) -> None:
    assert sent(name, pooling, sharding, True).input <= 1.5 * sent(name, pooling, sharding, False).input


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
@pytest.mark.parametrize("qcomm", ["fp32", "fp16"])
def test_output_is_as_large_as_that_of_full_tables(sharding: str, qcomm: str) -> None:
    """But for the columns of levels on which nobody has a row."""
    full, lma = (sent("equal", 1, sharding, kind, qcomm) for kind in (False, True))
    (memory,) = workload_of("equal", 1)[1].memories
    columns = sum(level.width for level in memory.levels if level.rows)
    assert (lma.output, lma.backward) == (full.output * columns // 64, full.backward * columns // 64)
    if qcomm == "fp16":
        assert lma.output < 0.7 * sent("equal", 1, sharding, True).output
