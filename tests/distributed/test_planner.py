"""TorchRec's own planner, unmodified, on level tables: what it plans, what it counts, and what it is told."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.types import ShardingOption
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from support.paths import BENCHMARKS
from support.sharded_model import META, TABLES, build_allocation, features, level_shapes, tables
from torchrec_lma import Allocation, LMAEmbeddingBagCollection, get_default_sharders
from torchrec_lma.distributed import level_constraints

pytestmark = pytest.mark.filterwarnings("ignore:HeuristicalStorageReservation:FutureWarning")


@pytest.fixture(scope="module")
def allocation() -> Allocation:
    return build_allocation()


def options(
    allocation: Allocation, topology: Topology, constraints: dict[str, ParameterConstraints] | None = None
) -> Iterator[ShardingOption]:
    """What the planner could choose from, for a collection with fused row-wise Adagrad, batches of 100 rows."""
    ebc = LMAEmbeddingBagCollection(tables(), allocation, device=META)
    apply_optimizer_in_backward(RowWiseAdagrad, ebc.parameters(), {"lr": 0.1})
    planner = EmbeddingShardingPlanner(
        topology=topology, batch_size=100, constraints=level_constraints(ebc, constraints)
    )
    plan = planner.plan(nn.Sequential(ebc), get_default_sharders())
    assert set(plan.plan) == {"0"} and set(plan.plan["0"]) == set(level_shapes(allocation))
    yield from planner._enumerator.last_stored_search_space


def test_levels_are_planned_as_tables(allocation: Allocation) -> None:
    topology = Topology(world_size=4, local_world_size=2, compute_device="cuda")
    types: dict[str, set[str]] = {}
    for option in options(allocation, topology):
        types.setdefault(option.name, set()).add(option.sharding_type)
        assert tuple(option.tensor.shape) == tuple(level_shapes(allocation)[option.name])
    every = {"data_parallel", "table_wise", "column_wise", "table_column_wise", "row_wise", "table_row_wise"}
    assert set(map(frozenset, types.values())) == {frozenset(every)}  # grid where constraints name it, as for any table


def test_bytes_are_those_of_weights_and_row_wise_state(allocation: Allocation) -> None:
    nothing_read = {name: ParameterConstraints(pooling_factors=[1e-9] * len(t[2])) for name, t in TABLES.items()}
    topology = Topology(world_size=2, local_world_size=2, compute_device="cuda")
    found = {
        option.name: option.shards[0].storage.hbm
        for option in options(allocation, topology, nothing_read)
        if (option.sharding_type, option.compute_kernel) == ("table_wise", "fused")
    }
    for name, (rows, width) in level_shapes(allocation).items():
        assert found[name] == pytest.approx(4 * rows * width + 4 * rows, abs=8)


def level_constraints_of(allocation: Allocation) -> dict[str, ParameterConstraints]:
    return level_constraints(LMAEmbeddingBagCollection(tables(), allocation, device=META))


def test_levels_are_looked_up_as_often_as_their_ids_occur(allocation: Allocation) -> None:
    """Of the training rows, by each feature and place in a packed row."""
    ebc = LMAEmbeddingBagCollection(tables(), allocation)
    constraints = level_constraints(
        ebc, {name: ParameterConstraints(pooling_factors=[2.0] * len(t[2])) for name, t in TABLES.items()}
    )
    batches = [features(1000 + i, batch=32) for i in range(20)]
    for memory in allocation.memories:
        for k, level in enumerate(memory.levels):
            expected = []
            for table in memory.tables:
                ids = torch.cat([batch[feature].values() for feature in TABLES[table][2] for batch in batches])
                share = float((ebc.rows(table, ids)[memory.level_name(k)] >= 0).double().mean())
                expected += [2 * share / level.pack] * len(TABLES[table][2])
            found = constraints[memory.level_name(k)].pooling_factors
            assert found == pytest.approx(expected * level.pack, abs=1e-6)


def test_an_allocation_without_a_record_counts_every_id_on_every_level(allocation: Allocation) -> None:
    bare = Allocation(allocation.config, allocation.tables, allocation.memories)
    for memory in bare.memories:
        for k, level in enumerate(memory.levels):
            factors = level_constraints_of(bare)[memory.level_name(k)].pooling_factors
            assert set(factors) == {1 / level.pack}


@pytest.mark.slow
def test_criteo_terabyte_fits_on_8_devices_of_40_gb(tmp_path: Path) -> None:
    program = BENCHMARKS / "criteo_plan.py"
    subprocess.run([sys.executable, program, "--json", tmp_path / "plan.json"], check=True, capture_output=True)
    full, lma = json.loads((tmp_path / "plan.json").read_text())["results"]
    assert not full["fits"] and full["weight_bytes"] == 882_774_559 * 128 * 4
    assert lma["fits"] and max(lma["device_bytes"]) < 40 << 30
    assert lma["weight_bytes"] + lma["allocation_bytes"] == pytest.approx(full["weight_bytes"] / 16, rel=0.01)
    memory_rows = [rows for name, (rows, _) in lma["rows"].items() if "_lma128_" in name]
    assert memory_rows == sorted(memory_rows, reverse=True) and memory_rows[0] > 500_000_000
