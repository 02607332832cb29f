"""The planner: bytes and times counted by hand or read off sharded modules, constraints, and what it prints."""

import copy
import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType as OptimType
from hypothesis import given
from hypothesis import strategies as st
from ranks import run
from torch import nn
from torchrec import DataType, EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import GreedyProposer
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, ShardingOption
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets
from torchrec.distributed.types import PipelineType, ShardingEnv, ShardingPlan
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_lma import (
    AllocationBuilder,
    LMAConfig,
    LMAEmbeddingBagCollection,
    LMAEmbeddingBagCollectionSharder,
    LMAEmbeddingShardingPlanner,
    get_default_sharders,
)
from torchrec_lma.distributed import LMAStorageReservation
from torchrec_lma.distributed.planner import memory_constraints, whole_chunks

META = torch.device("meta")
NOTHING_READ = {
    name: ParameterConstraints(pooling_factors=[0.0] * n) for name, n in (("memory_32", 3), ("memory_8", 1))
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:HeuristicalStorageReservation:FutureWarning"),
]


def table(name: str, num_embeddings: int, dim: int, features: list[str], **options: Any) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=name, num_embeddings=num_embeddings, embedding_dim=dim, feature_names=features, **options
    )


# 16x: 160 KB of dim 32, 80 rows of 8 chunks; 16 KB of dim 8, 32 rows of 2 chunks (and 24 bytes over)
TABLES = [table("user", 1000, 32, ["u0", "u1"]), table("item", 280, 32, ["i"]), table("day", 515, 8, ["d"])]
ROWS_32, ROWS_8 = 80, 32


def collection(
    tables: list[EmbeddingBagConfig] = TABLES, chunk_dim: int = 4, optimizer: type | None = None, **options: Any
) -> LMAEmbeddingBagCollection:
    ebc = LMAEmbeddingBagCollection(tables, LMAConfig(compression=16, chunk_dim=chunk_dim), device=META, **options)
    if optimizer is not None:
        apply_optimizer_in_backward(optimizer, ebc.parameters(), {"lr": 0.1})
    return ebc


def gpus(world_size: int = 8, local_world_size: int | None = None, **options: Any) -> Topology:
    return Topology(
        world_size=world_size, local_world_size=local_world_size or world_size, compute_device="cuda", **options
    )


def estimates(
    module: nn.Module,
    topology: Topology,
    constraints: dict[str, ParameterConstraints] | None = None,
    pipeline_type: PipelineType = PipelineType.NONE,
    sharders: list[Any] | None = None,
    batch_size: int = 100,
) -> dict[tuple[str, str], ShardingOption]:
    """The planner's options by table and sharding type (and kernel, where it is neither fused nor dense)."""
    planner = LMAEmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        constraints=constraints,
        pipeline_type=pipeline_type,
        proposer=GreedyProposer(),  # the quickest: plans do not matter here
    )
    planner.plan(module, sharders or get_default_sharders())
    options = planner._enumerator.last_stored_search_space
    return {
        (o.name, o.sharding_type + ("" if o.compute_kernel in ("fused", "dense") else f" {o.compute_kernel}")): o
        for o in options
    }


# --- constraints ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 64), st.integers(1, 32), st.integers(1, 600))
def test_a_column_width_cuts_no_chunk_and_is_what_torchrec_takes(chunk_dim: int, chunks: int, lower_bound: int) -> None:
    dim = chunk_dim * chunks
    width = whole_chunks(dim, chunk_dim, lower_bound)
    sizes, offsets = calculate_shard_sizes_and_offsets(
        torch.empty(10, dim, device=META), 8, 8, "column_wise", col_wise_shard_dim=width
    )
    assert {columns for _, columns in sizes} == {width}
    assert sum(columns for _, columns in sizes) == dim
    assert all(value % chunk_dim == 0 for _, value in sizes + offsets)
    assert width >= min(lower_bound, dim)
    narrower = [w for w in range(4, width, 4) if w >= lower_bound and dim % w == 0 and w % chunk_dim == 0]
    assert not narrower


@pytest.mark.parametrize(
    "dim, chunk_dim, hosts, given_width, widths",  # of column-wise, table-column-wise and grid, on hosts of 8 ranks
    [
        (128, 4, 1, None, (16, 16, None)),  # a shard for each rank, TorchRec's own types on one host
        (128, 4, 2, None, (8, 16, 64)),  # for each of all ranks, for each of one host, for each host
        (128, 4, 16, None, (4, 16, 8)),  # no narrower than a chunk
        (128, 4, 3, None, (8, 16, 64)),  # 24 and 3 do not divide the dim
        (384, 96, 2, None, (96, 96, 192)),
        (384, 96, 2, 128, (192, 192, 192)),  # TorchRec's 128 would cut a chunk
        (128, 32, 2, 33, (64, 64, 64)),
        (128, 4, 16, 4, (4, 4, 4)),  # more column shards than ranks of a host, or hosts: as asked for
        (128, 4, 16, 500, (128, 128, 128)),
        (24, 2, 2, None, (4, 4, 12)),  # TorchRec takes multiples of 4 only
        (6, 2, 2, None, (6, 6, 6)),
    ],
)
def test_columns_are_cut_in_whole_chunks_that_the_sharding_type_can_spread(
    dim: int, chunk_dim: int, hosts: int, given_width: int | None, widths: tuple[int | None, ...]
) -> None:
    ebc = collection([table("t", 10_000, dim, ["f"])], chunk_dim)
    constraints = {"t": ParameterConstraints(min_partition=given_width)}
    options = estimates(ebc, gpus(8 * hosts, 8), constraints)
    for sharding, width in zip(("column_wise", "table_column_wise", "grid_shard"), widths):
        if width is None:
            assert (f"memory_{dim}", sharding) not in options
            continue
        shards = options[f"memory_{dim}", sharding].shards
        places = {shard.offset[1]: shard.size[1] for shard in shards}
        assert places == {offset: width for offset in range(0, dim, width)}, sharding
        assert len(shards) == len(places) * (8 if sharding == "grid_shard" else 1)


def test_grid_is_tried_on_several_hosts_unless_types_or_batch_sizes_are_given() -> None:
    def types(**constraint: Any) -> set[str]:
        constraints = {"user": ParameterConstraints(pooling_factors=[1.0, 1.0], **constraint)}
        return {sharding for name, sharding in estimates(collection(), gpus(4, 2), constraints) if name == "memory_32"}

    assert types(compute_kernels=["fused", "dense"]) == set(LMAEmbeddingBagCollectionSharder().sharding_types("cuda"))
    assert types(compute_kernels=["fused"], sharding_types=["row_wise", "column_wise"]) == {"row_wise", "column_wise"}
    assert "grid_shard" not in types(batch_sizes=[10, 20])  # grid has no VBE


def test_logical_tables_constrain_their_memory() -> None:
    constraints = {
        "item": ParameterConstraints(
            pooling_factors=[7.0], sharding_types=["row_wise", "table_wise", "column_wise"], min_partition=8
        ),
        "user": ParameterConstraints(
            pooling_factors=[2.0, 3.0],
            num_poolings=[1.0, 2.0],
            sharding_types=["column_wise", "row_wise"],
            min_partition=12,
            batch_sizes=[50, 25],
            output_dtype=DataType.FP16,
        ),
    }
    made = memory_constraints(collection(), constraints, 1, 100)
    assert made["memory_32"].pooling_factors == [2.0, 3.0, 7.0]  # in the order of the memory's features
    assert made["memory_32"].num_poolings == [1.0, 2.0, 1.0]
    assert made["memory_32"].batch_sizes == [50, 25, 100]  # the planner's where none is given
    assert made["memory_32"].sharding_types == ["column_wise", "row_wise"]  # what both allow, as the first has them
    assert made["memory_32"].min_partition == 12
    assert made["memory_32"].output_dtype == DataType.FP16
    assert made["memory_8"] == ParameterConstraints(pooling_factors=[1.0], num_poolings=[1.0])


def test_a_memory_is_constrained_by_its_own_name() -> None:
    constraints = {
        "memory_32": ParameterConstraints(sharding_types=["row_wise"], pooling_factors=[1.0, 2.0, 3.0]),
        "item": ParameterConstraints(sharding_types=["row_wise", "table_wise"]),
    }
    plan = LMAEmbeddingShardingPlanner(topology=gpus(), constraints=constraints).plan(
        nn.Sequential(collection()), get_default_sharders()
    )
    assert plan.plan["0"]["memory_32"].sharding_type == "row_wise"


@pytest.mark.parametrize(
    "constraints, said",
    [
        ({"user": {"pooling_factors": [2.0]}}, ["pooling_factors", "'user'", "1 values", "2 features", "u0"]),
        ({"memory_32": {"pooling_factors": [2.0, 2.0]}}, ["'memory_32'", "3 features"]),
        (
            {"memory_32": {"num_poolings": [2.0, 2.0, 2.0]}, "item": {"num_poolings": [3.0]}},
            ["feature 'i'", "2.0", "3.0", "'item'"],
        ),
        (
            {"user": {"sharding_types": ["row_wise"]}, "item": {"sharding_types": ["table_wise"]}},
            ["sharding_types", "memory_32", "row_wise", "table_wise"],
        ),
        (
            {"user": {"enforce_hbm": True, "output_dtype": DataType.FP16}, "item": {"output_dtype": DataType.FP32}},
            ["output_dtype", "memory_32"],
        ),
        ({"item": {"use_virtual_table": True}}, ["memory_32", "no virtual table", "'item'"]),
    ],
)
def test_contradictions_are_named(constraints: dict[str, dict[str, Any]], said: list[str]) -> None:
    planner = LMAEmbeddingShardingPlanner(
        topology=gpus(), constraints={name: ParameterConstraints(**values) for name, values in constraints.items()}
    )
    with pytest.raises(ValueError) as error:
        planner.plan(collection(), get_default_sharders())
    assert all(words in str(error.value) for words in said), error.value


def test_an_enumerator_of_ones_own_is_refused() -> None:
    with pytest.raises(TypeError, match="LMAStorageEstimator"):
        LMAEmbeddingShardingPlanner(topology=gpus(), enumerator=EmbeddingEnumerator(gpus(), 10))


def test_the_planner_leaves_its_callers_constraints_alone() -> None:
    constraints = {"user": ParameterConstraints(pooling_factors=[2.0, 3.0])}
    before = copy.deepcopy(constraints)
    planner = LMAEmbeddingShardingPlanner(topology=gpus(), constraints=constraints)
    planner.plan(collection(), get_default_sharders())
    planner.plan(collection(chunk_dim=8), get_default_sharders())  # and can plan another model
    assert constraints == before


def test_memories_of_one_name_have_the_inputs_of_their_own_collection() -> None:
    model = nn.ModuleDict(
        {
            "user_tower": collection([TABLES[0]]),
            "item_tower": collection([table("item", 2000, 32, ["i"])], chunk_dim=16),
        }
    )
    constraints = {"user": ParameterConstraints(pooling_factors=[2.0, 3.0])}
    planner = LMAEmbeddingShardingPlanner(topology=gpus(), constraints=constraints, batch_size=10)
    planner.plan(model, get_default_sharders())
    inputs = {o.path: o.input_lengths for o in planner._enumerator.last_stored_search_space}
    assert inputs == {"user_tower": [2.0, 3.0], "item_tower": [1.0]}
    widths = {
        o.path: o.shards[0].size[1]
        for o in planner._enumerator.last_stored_search_space
        if o.sharding_type == "column_wise"
    }
    assert widths == {"user_tower": 4, "item_tower": 16}  # whole chunks of its own
    constraints["user"] = ParameterConstraints(pooling_factors=[2.0, 3.0], sharding_types=["row_wise"])
    with pytest.raises(ValueError, match="two collections have a memory 'memory_32'"):
        LMAEmbeddingShardingPlanner(topology=gpus(), constraints=constraints).plan(model, get_default_sharders())


# --- bytes ----------------------------------------------------------------------------------------------------------

# State bytes of a shard [rows, columns]: fp32 for each weight, and for each chunk of 4 columns of a row.
STATE = {
    None: lambda rows, columns: 0,
    torch.optim.SGD: lambda rows, columns: 0,
    torch.optim.Adagrad: lambda rows, columns: 4 * rows * columns,
    RowWiseAdagrad: lambda rows, columns: 4 * rows * (columns // 4),
    torch.optim.Adam: lambda rows, columns: 8 * rows * columns,
}
SHARDS_OF_32 = {  # on 8 ranks of 2 hosts
    "table_wise": [(80, 32)],
    "column_wise": [(80, 4)] * 8,
    "table_column_wise": [(80, 8)] * 4,
    "row_wise": [(10, 32)] * 8,
    "table_row_wise": [(20, 32)] * 4,
    "grid_shard": [(20, 16)] * 8,
}


@pytest.mark.parametrize("optimizer", STATE)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_weights_and_optimizer_state_of_every_shard(optimizer: type | None, device: str) -> None:
    topology = Topology(world_size=8, local_world_size=4, compute_device=device)
    options = estimates(collection(optimizer=optimizer), topology, NOTHING_READ)
    for sharding, shards in SHARDS_OF_32.items():
        storages = [s.storage for s in options["memory_32", sharding].shards]
        expected = [4 * rows * columns + STATE[optimizer](rows, columns) for rows, columns in shards]
        assert [s.hbm if device == "cuda" else s.ddr for s in storages] == expected, sharding
        assert all((s.ddr if device == "cuda" else s.hbm) == 0 for s in storages)


def test_a_torch_optimizer_of_data_parallel_tables_counts_whole_rows() -> None:
    options = estimates(collection(optimizer=RowWiseAdagrad), gpus(), NOTHING_READ)
    assert {s.storage.hbm for s in options["memory_32", "data_parallel"].shards} == {4 * 80 * 32 + 4 * 80}


def test_the_sharders_fused_optimizer_counts_where_no_other_is_set() -> None:
    sharder = LMAEmbeddingBagCollectionSharder(fused_params={"optimizer": OptimType.EXACT_ROWWISE_ADAGRAD})
    options = estimates(collection(), gpus(), NOTHING_READ, sharders=[sharder])
    assert options["memory_32", "table_wise"].shards[0].storage.hbm == 4 * 80 * 32 + 4 * 80 * 8
    options = estimates(collection(optimizer=torch.optim.Adagrad), gpus(), NOTHING_READ, sharders=[sharder])
    assert options["memory_32", "table_wise"].shards[0].storage.hbm == 2 * 4 * 80 * 32


def test_state_of_half_precision_weights_is_fp32() -> None:
    ebc = collection([table("t", 1000, 32, ["f"], data_type=DataType.FP16)], optimizer=RowWiseAdagrad)
    options = estimates(ebc, gpus(), {"t": ParameterConstraints(pooling_factors=[0.0])})
    assert options["memory_32", "table_wise"].shards[0].storage.hbm == 62 * (2 * 32 + 4 * 8)


def test_uvm_kernels_keep_weights_and_state_on_the_host() -> None:
    options = estimates(collection(optimizer=RowWiseAdagrad), gpus(), NOTHING_READ)
    weights, state = 4 * 80 * 32, 4 * 80 * 8
    uvm = options["memory_32", "table_wise fused_uvm"].shards[0].storage
    assert (uvm.hbm, uvm.ddr) == (0, weights + state)
    cached = options["memory_32", "table_wise fused_uvm_caching"].shards[0].storage
    assert cached.ddr == weights + state
    # TorchRec's default share of 20% of both, and the cache's index of FBGEMM's 80 * 8 rows.
    assert cached.hbm == pytest.approx(0.2 * (weights + state) + 80 * 8 * (4 + 0.2 * 16), abs=2)


@pytest.mark.parametrize("copies_in_pipeline, pipeline", [(2, PipelineType.TRAIN_SPARSE_DIST), (1, PipelineType.NONE)])
def test_ids_chunk_rows_and_outputs_are_counted(copies_in_pipeline: int, pipeline: PipelineType) -> None:
    # Each rank has 100 rows with 2 + 3 + 0.5 ids of memory_32 on average, and 8 chunks for each id.
    constraints = {
        "user": ParameterConstraints(pooling_factors=[2.0, 3.0]),
        "item": ParameterConstraints(pooling_factors=[0.5]),
    }
    options = estimates(collection(), gpus(16, 4), constraints, pipeline)
    ids = 16 * 550
    received = {
        "table_wise": ids,
        "column_wise": ids,
        "row_wise": ids * 8 / 16,  # 8 addressed copies over 16 ranks
        "table_column_wise": ids,
        "table_row_wise": ids * 4 / 4,  # raw copies to each of 4 ranks
        "grid_shard": ids * 2 / 4,  # 2 addressed copies over 4 ranks
        "data_parallel": 550,
    }
    lookups = {  # shards of 1 chunk on each rank, 2 on each rank of a host, 2 on each host
        "table_wise": ids * 8,
        "column_wise": ids,
        "row_wise": ids * 8 / 16,
        "table_column_wise": ids * 2,
        "table_row_wise": ids * 8 / 4,
        "grid_shard": ids * 2 / 4,
        "data_parallel": 550 * 8,
    }
    for sharding in received:
        option = options["memory_32", sharding]
        rows, columns = option.shards[0].size
        bags = (250 if sharding == "data_parallel" else 16 * 250) * columns
        expected = 4 * rows * columns + copies_in_pipeline * 8 * received[sharding] + 8 * lookups[sharding]
        expected += 4 * bags * (pipeline is PipelineType.NONE)  # TorchRec: hidden by the peak of the dense layers
        assert option.shards[0].storage.hbm == pytest.approx(expected, abs=3), sharding


def test_a_batch_size_for_each_feature_is_counted() -> None:
    constraints = {"user": ParameterConstraints(pooling_factors=[2.0, 3.0], batch_sizes=[10, 20])}
    option = estimates(collection(), gpus(), constraints, PipelineType.TRAIN_SPARSE_DIST)["memory_32", "table_wise"]
    ids = 8 * (2 * 10 + 3 * 20 + 100)
    assert option.shards[0].storage.hbm == 4 * 80 * 32 + 2 * 8 * ids + 8 * 8 * ids


@pytest.mark.parametrize("row_wise_input, copies", [("auto", 8), ("addresses", 8), ("ids", 16)])
def test_the_sharders_row_wise_input_is_counted(row_wise_input: str, copies: int) -> None:
    sharder = LMAEmbeddingBagCollectionSharder(row_wise_input=row_wise_input)
    constraints = {name: ParameterConstraints(sharding_types=["row_wise"]) for name in NOTHING_READ}
    option = estimates(collection(), gpus(16), constraints, sharders=[sharder])["memory_32", "row_wise"]
    ids = 16 * 100 * 3
    shard = option.shards[0]
    assert shard.storage.hbm == 4 * 5 * 32 + 8 * ids * copies / 16 + 8 * ids * 8 / 16 + 4 * ids * 32
    lookup = 1.75 * (ids * 8 / 16 * (8 + 32 * 4) + ids * 32 * 4)
    addressed = 8 * 8 * (ids if row_wise_input == "ids" else ids / 16)
    assert shard.perf.fwd_compute == pytest.approx((lookup + addressed) / gpus().hbm_mem_bw)


def test_per_sample_weights_are_repeated_for_every_chunk() -> None:
    bytes_of = [
        estimates(collection(is_weighted=weighted), gpus())["memory_32", "table_wise"].shards[0].storage.hbm
        for weighted in (False, True)
    ]
    assert bytes_of[1] - bytes_of[0] == 8 * 100 * 3 * 8 * 4  # ranks, rows, features, chunks, bytes


class Model(nn.Module):
    def __init__(self, optimizer: type = RowWiseAdagrad) -> None:
        super().__init__()
        self.ebc = collection(optimizer=optimizer)
        self.plain = EmbeddingBagCollection(tables=[table("plain", 60, 8, ["p"])], device=META)
        apply_optimizer_in_backward(optimizer, self.plain.parameters(), {"lr": 0.1})

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        lma = self.ebc(features.permute([0, 1, 2, 3]))
        plain = self.plain(features.permute([4]))
        return torch.cat([lma[f] for f in ("u0", "u1", "i", "d")] + [plain["p"]], 1)


def train_by_plan(constraints: dict[str, ParameterConstraints], steps: int) -> dict[str, Any]:
    """On one of the ranks: the plan's types, the bytes here of each memory's weights and state, and the losses."""
    torch.manual_seed(dist.get_rank())
    model = Model()
    world_size = dist.get_world_size()
    planner = LMAEmbeddingShardingPlanner(
        topology=Topology(
            world_size=world_size, local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]), compute_device="cpu"
        ),
        batch_size=16,
        constraints=constraints,
        pipeline_type=PipelineType.TRAIN_SPARSE_DIST,
    )
    plan = planner.collective_plan(model, get_default_sharders())
    dmp = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=get_default_sharders())
    bytes_here: dict[str, int] = {}
    for lookup in dmp.module.ebc._lookups:
        for kernel in lookup._emb_modules:
            tbe = kernel.emb_module
            for config, weight, states in zip(
                kernel.config.embedding_tables, tbe.split_embedding_weights(), tbe.get_optimizer_state()
            ):
                nbytes = weight.nbytes + sum(state.nbytes for state in states.values())
                bytes_here[config.name] = bytes_here.get(config.name, 0) + nbytes
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(0, 60, (5 * 16,), generator=generator)
    features = KeyedJaggedTensor(keys=["u0", "u1", "i", "d", "p"], values=ids, lengths=torch.ones_like(ids))
    losses = []
    for _ in range(steps):
        loss = (dmp(features) - 1).pow(2).mean()
        losses.append(loss.item())
        loss.backward()
    types = {name: sharding.sharding_type for name, sharding in plan.plan["ebc"].items()}
    return {"types": types, "bytes": bytes_here, "losses": losses, "plan": plan}


@pytest.mark.parametrize(
    "sharding, ranks, ranks_of_host",
    [
        ("table_wise", 2, 2),
        ("column_wise", 2, 2),
        ("row_wise", 2, 2),
        ("table_column_wise", 4, 2),
        ("grid_shard", 4, 2),
    ],
)
def test_estimates_are_the_bytes_of_the_sharded_memories(sharding: str, ranks: int, ranks_of_host: int) -> None:
    constraints = {name: dataclasses.replace(c, sharding_types=[sharding]) for name, c in NOTHING_READ.items()}
    done = run(train_by_plan, ranks, constraints, 4, local_world_size=ranks_of_host)
    topology = Topology(world_size=ranks, local_world_size=ranks_of_host, compute_device="cpu")
    options = estimates(Model(), topology, constraints)
    for name in ("memory_32", "memory_8"):
        planned = [0] * ranks
        for rank, shard in zip(done[0]["plan"].plan["ebc"][name].ranks, options[name, sharding].shards):
            planned[rank] += shard.storage.ddr
        assert planned == [rank["bytes"].get(name, 0) for rank in done], name
        assert sum(planned) > 0
    for rank in done:
        assert rank["types"] == {"memory_32": sharding, "memory_8": sharding}
        assert rank["losses"] == sorted(rank["losses"], reverse=True)  # it learns


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_plan_of_ones_own_choice_trains(ranks: int) -> None:
    constraints = {"user": ParameterConstraints(pooling_factors=[3.0, 1.0])}
    done = run(train_by_plan, ranks, constraints, 4, local_world_size=2)
    assert done[0]["types"] == done[1]["types"]
    assert done[0]["losses"] == sorted(done[0]["losses"], reverse=True)


# --- times ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_dim", [4, 32])
@pytest.mark.parametrize("weighted", [False, True])
def test_time_is_that_of_a_lookup_for_every_chunk(chunk_dim: int, weighted: bool) -> None:
    topology = gpus(8, 4)
    options = estimates(collection(TABLES[:2], chunk_dim, is_weighted=weighted), topology)
    ids, n_chunks = 8 * 100 * 3, 32 // chunk_dim  # of all ranks
    columns = {
        "column_wise": max(4, chunk_dim),
        "table_column_wise": max(8, chunk_dim),
        "grid_shard": max(16, chunk_dim),
    }
    in_columns = {sharding: width // chunk_dim for sharding, width in columns.items()}  # chunks of a shard
    rows = {  # FBGEMM's rows that a shard reads; addresses that its rank computes
        "table_wise": (ids * n_chunks, ids * n_chunks),
        "column_wise": (ids * in_columns["column_wise"],) * 2,
        "table_column_wise": (ids * in_columns["table_column_wise"],) * 2,
        "row_wise": (ids * n_chunks / 8, ids * n_chunks if n_chunks >= 8 else ids / 8 * n_chunks),
        "table_row_wise": (ids * n_chunks / 4, ids * n_chunks if n_chunks >= 4 else ids / 8 * n_chunks),
        # 4 chunks: raw ids to each of the 4 ranks that share the rows; 1 chunk: addresses.
        "grid_shard": (ids * 4 / 4, ids * 4) if chunk_dim == 4 else (ids / 4, ids / 8),
        "data_parallel": (ids / 8 * n_chunks, ids / 8 * n_chunks),
    }
    for sharding, (lookups, addressed) in rows.items():
        perf = options["memory_32", sharding].shards[0].perf
        bandwidth = topology.hbm_mem_bw * (0.5 if sharding == "data_parallel" else 1)
        out = (ids / 8 if sharding == "data_parallel" else ids) * columns.get(sharding, 32) * 4
        # TorchRec's kernel model: 8 bytes of index, twice with weights; rows narrower than 32 cost as much as 32
        # columns; a penalty of 1.75 for rows narrower than 64; backward 2 times forward, with weights 1.1 more.
        lookup = 1.75 * (lookups * (8 * (1 + weighted) + 32 * 4) + out) / bandwidth
        assert perf.fwd_compute == pytest.approx(lookup + 8 * addressed / topology.hbm_mem_bw), sharding
        assert perf.bwd_compute == pytest.approx(lookup * (2 + 1.1 * weighted)), sharding


def test_communication_is_a_plain_tables_but_for_the_copies_of_ids() -> None:
    """The plain twin has the memory's shape and features; chunk_dim 8 makes 4 chunks."""
    lma = collection(TABLES[:2], chunk_dim=8)
    # Of the ids of all ranks: 4 addressed copies over 8 ranks, raw copies to both ranks of a host.
    share = {"table_wise": 1, "column_wise": 1, "row_wise": 4 / 8, "table_row_wise": 2 / 2, "data_parallel": 1}
    share |= {"table_column_wise": 1, "grid_shard": 2 / 2}
    constraints = {
        "memory_32": ParameterConstraints(pooling_factors=[1.0, 1.0, 1.0], sharding_types=list(share), min_partition=16)
    }
    plain = EmbeddingBagCollection(tables=[table("memory_32", ROWS_32, 32, ["u0", "u1", "i"])], device=META)
    topology = gpus(8, 2)
    ours, torchrecs = estimates(lma, topology, constraints), estimates(plain, topology, constraints)
    for sharding, part in share.items():
        ours_perf = ours["memory_32", sharding].shards[0].perf
        perf = torchrecs["memory_32", sharding].shards[0].perf
        assert ours_perf.fwd_comms == perf.fwd_comms
        assert ours_perf.bwd_comms == perf.bwd_comms
        assert ours_perf.input_dist_comms == pytest.approx(perf.input_dist_comms * part), sharding


# --- other tables, allocation, plans --------------------------------------------------------------------------------


def test_other_tables_are_estimated_as_torchrec_does() -> None:
    plain = EmbeddingBagCollection(
        tables=[table("p", 5000, 64, ["a", "b"]), table("q", 70_000, 128, ["c"])], device=META
    )
    apply_optimizer_in_backward(RowWiseAdagrad, plain.parameters(), {"lr": 0.1})
    model = nn.ModuleDict({"plain": plain, "lma": collection(optimizer=RowWiseAdagrad)})
    constraints = {"p": ParameterConstraints(pooling_factors=[2.0, 3.0], min_partition=32)}
    topology = gpus(8, 4)
    stock = EmbeddingEnumerator(topology, 100, constraints).enumerate(model, get_default_sharders())
    ours = estimates(model, topology, constraints)
    compared = 0
    for option in stock:
        if option.path == "plain" and option.compute_kernel in ("fused", "dense"):
            twin = ours[option.name, option.sharding_type]
            assert [dataclasses.astuple(s) for s in twin.shards] == [dataclasses.astuple(s) for s in option.shards]
            compared += 1
    assert compared == 12  # two tables, six types


def test_a_model_without_lma_gets_torchrecs_plan() -> None:
    plain = EmbeddingBagCollection(tables=[table(f"t{i}", 10 ** (i + 2), 64, [f"f{i}"]) for i in range(5)], device=META)
    plans = [
        planner(topology=gpus(), batch_size=512).plan(plain, get_default_sharders())
        for planner in (EmbeddingShardingPlanner, LMAEmbeddingShardingPlanner)
    ]
    assert str(plans[0]) == str(plans[1])


def with_signatures() -> LMAEmbeddingBagCollection:
    builder = AllocationBuilder(TABLES, LMAConfig(compression=16))
    ids = torch.arange(200).repeat(4)
    for _ in range(3):
        builder.update(KeyedJaggedTensor(keys=["u0", "u1", "i", "d"], values=ids, lengths=torch.ones_like(ids)))
    allocation = builder.build()
    assert allocation.nbytes > 100
    return LMAEmbeddingBagCollection(TABLES, allocation.config, allocation, device=META)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_rank_holds_the_allocation(device: str) -> None:
    ebc = with_signatures()
    topology = Topology(world_size=3, compute_device=device)
    inner = FixedPercentageStorageReservation(0.1)
    without = inner.reserve(topology, 10, nn.Sequential(ebc), get_default_sharders())
    reservation = LMAStorageReservation(FixedPercentageStorageReservation(0.1))
    reserved = reservation.reserve(topology, 10, nn.Sequential(ebc), get_default_sharders())
    for here, there in zip(reserved.devices, without.devices):
        taken = there.storage - here.storage
        # With a GPU the collection keeps its allocation on the host, beside the device's copy.
        assert (taken.hbm, taken.ddr) == (ebc.allocation.nbytes if device == "cuda" else 0, ebc.allocation.nbytes)
    assert reservation.last_reserved_topology.devices[2].storage == reserved.devices[2].storage
    assert topology.devices[0].storage != reserved.devices[0].storage  # the caller's is left alone


@pytest.mark.parametrize("room", [{"hbm_cap": 100}, {"ddr_cap": 100}])
def test_an_allocation_that_does_not_fit_is_said(room: dict[str, int]) -> None:
    planner = LMAEmbeddingShardingPlanner(
        topology=gpus(**room), storage_reservation=FixedPercentageStorageReservation(0.0)
    )
    with pytest.raises(PlannerError, match="allocation takes .* on every rank"):
        planner.plan(with_signatures(), get_default_sharders())


def test_an_lma_reservation_of_ones_own_is_not_wrapped_again() -> None:
    ebc, reservation = with_signatures(), LMAStorageReservation(FixedPercentageStorageReservation(0.0))
    planner = LMAEmbeddingShardingPlanner(topology=gpus(hbm_cap=10**9), storage_reservation=reservation)
    planner.plan(ebc, get_default_sharders())
    assert planner._storage_reservation.last_reserved_topology.devices[0].storage.hbm == 10**9 - ebc.allocation.nbytes


@pytest.mark.parametrize("reservation", [None, FixedPercentageStorageReservation(0.25)])
def test_a_memory_that_does_not_fit_is_an_error_of_torchrecs_planner(reservation: Any) -> None:
    topology = gpus(hbm_cap=10**6, ddr_cap=10**6)
    planner = LMAEmbeddingShardingPlanner(topology=topology, storage_reservation=reservation)
    with pytest.raises(PlannerError, match="insufficient storage"):
        planner.plan(collection([table("t", 10**7, 64, ["f"])]), get_default_sharders())


def test_a_memory_fits_where_full_tables_do_not() -> None:
    tables = [table(f"t{i}", 50_000_000, 128, [f"f{i}"]) for i in range(4)]  # 102 GB
    topology = gpus(2, hbm_cap=16 << 30, ddr_cap=1 << 30)
    reservation = FixedPercentageStorageReservation(0.1)
    full = EmbeddingBagCollection(tables=tables, device=META)
    with pytest.raises(PlannerError, match="storage"):
        LMAEmbeddingShardingPlanner(topology=topology, storage_reservation=reservation).plan(
            full, get_default_sharders()
        )
    planner = LMAEmbeddingShardingPlanner(topology=topology, storage_reservation=reservation)
    plan = planner.plan(nn.Sequential(collection(tables)), get_default_sharders())
    assert list(plan.plan["0"]) == ["memory_128"]


def test_the_stock_planner_can_cut_a_chunk_and_sharding_says_so() -> None:
    ebc = collection([table("t", 10_000, 384, ["f"])], chunk_dim=96)
    types = {"memory_384": ParameterConstraints(sharding_types=["column_wise"])}

    def columns(plan: ShardingPlan) -> set[int]:
        return {shard.shard_sizes[1] for shard in plan.plan["0"]["memory_384"].sharding_spec.shards}

    stock = EmbeddingShardingPlanner(topology=gpus(3), constraints=types)
    cut = stock.plan(nn.Sequential(ebc), get_default_sharders())
    assert columns(cut) == {128}
    with pytest.raises(ValueError, match="cuts a chunk of 96 columns; plan with LMAEmbeddingShardingPlanner"):
        LMAEmbeddingBagCollectionSharder().shard(ebc, cut.plan["0"], ShardingEnv.from_local(3, 0))
    ours = LMAEmbeddingShardingPlanner(topology=gpus(3), constraints=types)
    assert columns(ours.plan(nn.Sequential(ebc), get_default_sharders())) == {192}


def test_the_planner_can_be_hashed_for_plan_caches() -> None:
    hashes = []
    for chunk_dim in (4, 4, 8):
        planner = LMAEmbeddingShardingPlanner(topology=gpus())
        planner.plan(collection(chunk_dim=chunk_dim, optimizer=RowWiseAdagrad), get_default_sharders())
        hashes.append(planner.hash_planner_context_inputs_str())
    assert hashes[0] == hashes[1] != hashes[2]


# --- the printed table ----------------------------------------------------------------------------------------------


def printed(caplog: pytest.LogCaptureFixture, model: nn.Module, **options: Any) -> list[str]:
    with caplog.at_level(logging.INFO, logger="torchrec.distributed.planner.stats"):
        LMAEmbeddingShardingPlanner(topology=gpus(), batch_size=1024, **options).plan(model, get_default_sharders())
    return [record.getMessage() for record in caplog.records if record.name == "torchrec.distributed.planner.stats"]


def test_the_table_shows_the_logical_tables_of_each_memory(caplog: pytest.LogCaptureFixture) -> None:
    lines = printed(caplog, nn.ModuleDict({"sparse": with_signatures()}))
    start = next(i for i, line in enumerate(lines) if "Logical tables of the memories" in line)
    cells = [re.split(" {2,}", line.strip("# ")) for line in lines[start + 2 : start + 7]]
    memory_32, memory_8 = with_signatures().allocation.memories
    assert cells[0][:2] == ["sparse.memory_32", f"2 in {memory_32.rows} rows of 8 x 4"]
    assert cells[1][:3] == ["user", "u0, u1", "1,000"]
    assert cells[2][:3] == ["item", "i", "280"]
    assert cells[3][:2] == ["sparse.memory_8", f"1 in {memory_8.rows} rows of 2 x 4"]
    assert cells[4][:3] == ["day", "d", "515"]
    assert len({len(line) for line in lines[start - 1 : start + 7]}) == 1  # framed


def test_the_table_shows_state_of_chunks_and_copies_of_ids(caplog: pytest.LogCaptureFixture) -> None:
    tables = [table(f"t{i}", 10_000_000, 64, [f"f{i}"]) for i in range(4)]  # 10.24 GB; 640 MB in 2,500,000 rows
    constraints = {"t0": ParameterConstraints(sharding_types=["row_wise"])}
    lines = printed(caplog, collection(tables, optimizer=RowWiseAdagrad), constraints=constraints)
    state = next(lines[i + 1] for i, line in enumerate(lines) if "Compute Kernels Optimizer State" in line)
    assert f"fused: {round(2_500_000 * 16 * 4 / 2**30, 3)} GB" in state
    first_rank = next(line for line in lines if line.strip("# ").startswith("0 "))
    received = 8 * 1024 * 4 * 8 / 2**20  # MB of raw ids of 8 ranks, 1024 rows, 4 features
    assert f" {round(received, 2)} " in first_rank


def test_the_table_of_plain_tables_is_torchrecs(caplog: pytest.LogCaptureFixture) -> None:
    plain = EmbeddingBagCollection(tables=[table("p", 5_000_000, 64, ["f"])], device=META)
    apply_optimizer_in_backward(RowWiseAdagrad, plain.parameters(), {"lr": 0.1})
    ours = printed(caplog, plain)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="torchrec.distributed.planner.stats"):
        EmbeddingShardingPlanner(topology=gpus(), batch_size=1024).plan(plain, get_default_sharders())
    theirs = [r.getMessage() for r in caplog.records if r.name == "torchrec.distributed.planner.stats"]
    timeless = [[line for line in lines if "ran for" not in line] for lines in (ours, theirs)]
    assert timeless[0] == timeless[1]


# --- Criteo-Terabyte's published sizes ------------------------------------------------------------------------------


def test_criteo_terabyte_fits_eight_devices_of_40_gb_with_lma_alone(tmp_path: Path) -> None:
    record = tmp_path / "plan.json"
    program = Path(__file__).parents[1] / "examples" / "benchmarks" / "criteo_plan.py"
    done = subprocess.run(
        [sys.executable, str(program), "--batch-size", "1000", "--json", str(record)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    full, lma = json.loads(record.read_text())["results"]
    assert full["weight_bytes"] == 882_774_559 * 128 * 4
    assert not full["fits"] and "insufficient storage" in full["error"]
    budget = 882_774_559 * 512 // 16
    rows, allocation = budget * 7 // 8 // 512, budget // 8  # signatures take an eighth, on every device
    assert lma["shardings"] == {"column_wise, fused": 1}
    # Weights and a state for each chunk over 8 ranks; the ids of two batches, and a chunk row for each of 4 chunks.
    ids = 8 * 1000 * 26
    assert lma["device_bytes"] == [allocation + rows * (16 + 4) * 4 + 2 * 8 * ids + 4 * 8 * ids] * 8
    assert "882,774,559 rows" in done.stdout and "none found" in done.stdout


def test_criteo_terabyte_on_16_hosts_uses_every_device(tmp_path: Path) -> None:
    record = tmp_path / "plan.json"
    program = Path(__file__).parents[1] / "examples" / "benchmarks" / "criteo_plan.py"
    done = subprocess.run(
        [sys.executable, str(program), "--devices", "128", "--json", str(record)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    _, lma = json.loads(record.read_text())["results"]
    assert lma["shardings"] == {"grid_shard, fused": 1}
    assert len(lma["device_ms"]) == 128
    assert min(lma["device_ms"]) == pytest.approx(max(lma["device_ms"])) != 0  # 32 column shards would leave 96 idle
