"""Upstream's own code around a collection: what it does for a plain one, it does for one of LMA tables.

Expected values are those of a plain EmbeddingBagCollection of the same tables, or of `materialize`, which has tests of
its own against plain torch.
"""

import copy
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchrec
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.datasets.random import RandomRecDataset
from torchrec.distributed.embedding_tower_sharding import EmbeddingTowerSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.model_tracker.types import DeltaTrackerConfig
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.shard import shard, shard_modules
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.sharding_plan import get_default_sharders as get_torchrec_sharders
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.inference.modules import (
    assign_weights_to_tbe,
    get_table_to_weights_from_tbe,
    quantize_inference_model,
)
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_tower import EmbeddingTower
from torchrec.modules.feature_processor_ import PositionWeightedModule
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection, fuse_embedding_optimizer
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from support.ranks import run
from support.sharded_model import Model as ShardedModel
from support.sharded_model import assert_close as assert_weights_close
from support.sharded_model import batch, build_allocation, initial_state, optimizer_of, train, train_reference, whole
from support.sharded_model import tables as sharded_tables
from torchrec_lma import (
    Allocation,
    AllocationBuilder,
    LMAConfig,
    LMAEmbeddingBagCollection,
    LMAEmbeddingBagCollectionSharder,
    get_default_sharders,
)
from torchrec_lma.distributed import level_constraints

CPU = torch.device("cpu")
META = torch.device("meta")
ROWS, DIM, B = 1000, 8, 6


def table(name: str, features: Sequence[str], dim: int = DIM) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(name=name, num_embeddings=ROWS, embedding_dim=dim, feature_names=list(features))


def tables(first: int = 0, n: int = 2) -> list[EmbeddingBagConfig]:
    """t<i> for feature f<i>."""
    return [table(f"t{i}", [f"f{i}"]) for i in range(first, first + n)]


def features(n: int = 4, seed: int = 0, b: int = B, weighted: bool = False) -> KeyedJaggedTensor:
    """f0, ..., small ids more often."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (n * b,), generator=generator)
    ids = (ROWS * torch.rand(int(lengths.sum()), generator=generator) ** 3).long()
    weights = torch.rand(ids.numel(), generator=generator) if weighted else None
    return KeyedJaggedTensor(keys=[f"f{i}" for i in range(n)], values=ids, lengths=lengths, weights=weights)


@cache
def allocation_of(specs: tuple[tuple[str, tuple[str, ...], int], ...]) -> Allocation:
    configs = [table(*spec) for spec in specs]
    builder = AllocationBuilder(configs, LMAConfig(compression=4, data_type="FP32"))
    for seed in range(20):
        builder.update(features(seed=100 + seed, b=32))
    return builder.build()


def lma(configs: list[EmbeddingBagConfig], device: torch.device = CPU, **options: Any) -> LMAEmbeddingBagCollection:
    """With weights that depend on the tables' names only."""
    specs = tuple((c.name, tuple(c.feature_names), c.embedding_dim) for c in configs)
    ebc = LMAEmbeddingBagCollection(configs, allocation_of(specs), device=device, **options)
    if device == CPU:
        generator = torch.Generator().manual_seed(7)
        for parameter in ebc.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return ebc


def pooled(
    ebc: LMAEmbeddingBagCollection, given: KeyedJaggedTensor, weights: dict[str, Tensor] | None = None
) -> Tensor:
    """[B, sum of dims], the sums of what `materialize` gives."""
    columns = []
    for config in ebc.embedding_bag_configs():
        for feature in config.feature_names:
            vectors = ebc.materialize(config.name, given[feature].values())
            if weights is not None:
                vectors = vectors * weights[feature].unsqueeze(1)
            ends = given[feature].offsets().tolist()
            columns.append(torch.stack([vectors[start:end].sum(0) for start, end in itertools.pairwise(ends)]))
    return torch.cat(columns, 1)


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-4, atol=1e-5)


def sharded(model: nn.Module, sharders: list[Any] | None = None, **options: Any) -> DistributedModelParallel:
    """In a process group, with the weights that the model has."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    dmp = DistributedModelParallel(
        model, device=CPU, sharders=sharders if sharders is not None else get_default_sharders(), **options
    )
    dmp.load_state_dict(state)
    return dmp


# --- 01: batches ----------------------------------------------------------------------------------------------------


class TwoCollections(nn.Module):
    def __init__(self, big: nn.Module, small: nn.Module) -> None:
        super().__init__()
        self.big, self.small, self.over = big, small, nn.Linear(4 * DIM, 1)

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        given = batch if isinstance(batch, KeyedJaggedTensor) else batch.sparse_features
        both = torch.cat([self.big(given).values(), self.small(given).values()], 1)
        return self.over(both).mean(), both


def share_a_batch(small_is_lma: bool) -> tuple[Tensor, Tensor, list[str]]:
    big = lma(tables(0))
    small = lma(tables(2)) if small_is_lma else EmbeddingBagCollection(tables(2))
    expected = torch.cat(
        [pooled(big, features()), pooled(small, features()) if small_is_lma else small(features()).values()], 1
    )
    dmp = sharded(TwoCollections(big, small))
    found = dmp(features())[1]
    pipeline = TrainPipelineSparseDist(dmp, torch.optim.SGD(dmp.parameters(), lr=0.1), CPU)
    data = RandomRecDataset([f"f{i}" for i in range(4)], batch_size=8, hash_size=ROWS, num_batches=4)
    pipeline.progress(iter(data))
    return found.detach(), expected.detach(), sorted(m.forward.name for m in pipeline._pipelined_modules)


@pytest.mark.parametrize("small_is_lma", [False, True])
def test_collections_share_a_batch_and_are_pipelined(small_is_lma: bool) -> None:
    found, expected, pipelined = run(share_a_batch, 1, small_is_lma)[0]
    near(found, expected)
    assert pipelined == ["big", "small"]


def with_ids_of_each_type() -> list[bool]:
    configs = [replace(config, pooling=PoolingType.MEAN) for config in tables()]
    dmp = sharded(nn.Sequential(LMAEmbeddingBagCollection(configs, Allocation.hashed(configs, LMAConfig(4)))))
    given = features(2)
    given = KeyedJaggedTensor(keys=["f1", "f0"], values=given.values() % 100, lengths=given.lengths())
    expected = dmp(given).values()
    types = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.uint64]
    same = []
    for dtype in types:
        narrow = KeyedJaggedTensor(keys=given.keys(), values=given.values().to(dtype), lengths=given.lengths())
        same.append(torch.equal(dmp(narrow).values(), expected))
    return same


def test_sharded_tables_take_integers_of_any_width() -> None:
    assert run(with_ids_of_each_type, 1)[0] == [True] * 7


# --- 02, 03: modules that test for EmbeddingBagCollection -----------------------------------------------------------


def processed_weights(given: KeyedJaggedTensor) -> dict[str, Tensor]:
    """PositionWeightedModule's, by hand: the weight of the place in the bag."""
    places = torch.cat([torch.arange(int(n)) for n in given.lengths()])
    ends = given.offset_per_key()
    return {key: 0.5 + 0.1 * places[ends[i] : ends[i + 1]] for i, key in enumerate(given.keys())}


def feature_processed() -> FeatureProcessedEmbeddingBagCollection:
    processors = {f"f{i}": PositionWeightedModule(4) for i in range(2)}
    for processor in processors.values():
        processor.position_weight.data.copy_(0.5 + 0.1 * torch.arange(4))
    return FeatureProcessedEmbeddingBagCollection(lma(tables(), is_weighted=True), processors)


def test_feature_processors_around_a_collection() -> None:
    module = feature_processed()
    given = features(2)
    near(module(given).values(), pooled(module._embedding_bag_collection, given, processed_weights(given)))


def shard_feature_processed() -> tuple[list[str], Tensor, Tensor, list[str]]:
    given = features(2)
    model = nn.Sequential(feature_processed())
    expected = pooled(model[0]._embedding_bag_collection, given, processed_weights(given))
    said = []
    for sharders in (None, get_torchrec_sharders()):
        with pytest.raises((NotImplementedError, AttributeError)) as error:
            sharded(model, sharders)
        said.append(str(error.value))
    dmp = sharded(model, [LMAEmbeddingBagCollectionSharder()])
    with pytest.raises(ValueError, match="weights that require gradients") as refused:
        dmp(given)
    dmp.module[0]._feature_processors.requires_grad_(False)
    return [*said, str(refused.value)], dmp(given).values().detach(), expected, sharded_types(dmp)


def sharded_types(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules() if type(m).__name__.startswith("Sharded")]


def test_feature_processors_around_a_sharded_collection_are_not_left_untrained() -> None:
    said, found, expected, types = run(shard_feature_processed, 1)[0]
    assert "would not be trained" in said[0] and "get_default_sharders()" in said[1]
    near(found, expected)
    assert types == ["ShardedLMAEmbeddingBagCollection", "ShardedEmbeddingBagCollection"]


def test_feature_processors_around_a_plain_collection_stay_torchrecs() -> None:
    plain = get_torchrec_sharders()
    ours = {sharder.module_type: sharder for sharder in get_default_sharders()}
    assert {sharder.module_type for sharder in plain} < set(ours)
    processors = {"f0": PositionWeightedModule(4)}
    module = FeatureProcessedEmbeddingBagCollection(EmbeddingBagCollection(tables(0, 1), is_weighted=True), processors)
    assert list(ours[type(module)].shardable_parameters(module)) == ["t0"]


def test_managed_collisions_around_a_collection_are_refused() -> None:
    modules = {
        "t0": MCHManagedCollisionModule(ROWS, CPU, eviction_interval=2, eviction_policy=DistanceLFU_EvictionPolicy())
    }
    with pytest.raises(AttributeError, match=r"LMAConfig\(raw_ids=True\) takes any ids"):
        ManagedCollisionEmbeddingBagCollection(
            lma(tables(0, 1)),
            ManagedCollisionCollection(modules, tables(0, 1)),  # type: ignore[arg-type]
        )


def test_fuse_embedding_optimizer_fuses_the_levels() -> None:
    model = nn.Sequential(lma(tables()))
    reference = copy.deepcopy(model[0])
    given = features(2)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model = fuse_embedding_optimizer(model, torchrec.optim.RowWiseAdagrad, {"learning_rate": 0.1}, CPU)
    assert isinstance(model[0], LMAEmbeddingBagCollection)
    assert isinstance(model[0].levels, FusedEmbeddingBagCollection)
    model.load_state_dict(state)  # TorchRec fuses into new tables, of plain collections too
    near(model(given).values(), pooled(reference, given))

    target = torch.randn(B, 2 * DIM, generator=torch.Generator().manual_seed(3))
    (model(given).values() * target).sum().backward()
    (reference(given).values() * target).sum().backward()
    for name, bag in reference.levels.embedding_bags.items():
        gradient = bag.weight.grad
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        sums = gradient.pow(2).mean(1, keepdim=True)
        expected = bag.weight.detach() - 0.1 * gradient / (sums.sqrt() + 1e-8)
        near(model.state_dict()[f"0.levels.embedding_bags.{name}.weight"], expected)


class Interaction(nn.Module):
    def forward(self, pooled: KeyedTensor) -> Tensor:
        return 2 * pooled.values()


def shard_tower() -> tuple[Tensor, Tensor, list[str], str]:
    tower = EmbeddingTower(lma(tables()), Interaction())
    given = features(2)
    expected = 2 * pooled(tower.embedding, given)
    near(tower(given), expected)
    dmp = sharded(nn.Sequential(tower))
    try:
        sharded(nn.Sequential(EmbeddingTower(lma(tables()), Interaction())), [EmbeddingTowerSharder()])
        said = "no error"
    except RuntimeError as error:
        said = str(error)
    return dmp(given).detach(), expected, sharded_types(dmp), said


def test_towers_hold_a_collection() -> None:
    found, expected, types, said = run(shard_tower, 1)[0]
    near(found, expected)
    assert types == ["ShardedLMAEmbeddingBagCollection", "ShardedEmbeddingBagCollection"]
    assert "nsupported embedding type" in said  # TorchRec's words: its tower sharder takes its own collections only


# --- TorchRec's own sharders alone ----------------------------------------------------------------------------------


def train_without_our_sharder(allocation: Allocation) -> tuple[dict[str, Tensor], list[str], list[str], list[str]]:
    ebc = LMAEmbeddingBagCollection(sharded_tables(), allocation, device=META)
    apply_optimizer_in_backward(torch.optim.SGD, ebc.parameters(), {"lr": 0.1})
    model = ShardedModel(ebc)
    topology = Topology(dist.get_world_size(), "cpu", local_world_size=dist.get_world_size())
    names = [t.name for t in ebc.levels.embedding_bag_configs()]
    planner = EmbeddingShardingPlanner(
        topology=topology, constraints={n: ParameterConstraints(sharding_types=["table_wise"]) for n in names}
    )
    plan = planner.collective_plan(model, get_torchrec_sharders(), dist.GroupMember.WORLD)
    dmp = DistributedModelParallel(model, device=CPU, plan=plan)
    dmp.load_state_dict(initial_state(allocation), strict=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        train(dmp, optimizer_of(dmp, "sgd"), [batch(step, dist.get_rank()) for step in range(3)], pipeline=False)
    said = [str(w.message) for w in caught if "get_default_sharders" in str(w.message)]
    return whole(dmp.state_dict()), list(plan.plan), said, sharded_types(dmp)


def test_torchrec_sharders_alone_train_right_and_a_warning_says_what_to_do() -> None:
    allocation = build_allocation()
    weights, planned_paths, said, types = run(train_without_our_sharder, 2, allocation)[0]
    assert planned_paths == ["ebc.levels"]
    assert types == ["ShardedEmbeddingBagCollection"]
    assert_weights_close(weights, train_reference(allocation, 2, "sgd", steps=3)[0])
    assert len(said) == 1 and "sharders=torchrec_lma.get_default_sharders()" in said[0]


# --- 04: names ------------------------------------------------------------------------------------------------------


def test_weights_of_two_collections_travel_by_table_name() -> None:
    model = nn.ModuleList([lma(tables(0)), lma(tables(2))])
    given = features()
    expected = [pooled(ebc, given) for ebc in model]
    quantized = quantize_inference_model(copy.deepcopy(model), per_table_weight_dtype=None)
    names = [t.name for ebc in model for t in ebc.levels.embedding_bag_configs()]
    assert len(set(names)) == len(names)
    weights = get_table_to_weights_from_tbe(quantized)
    assert list(weights) == names
    others = nn.ModuleList([lma(tables(0)), lma(tables(2))])
    for parameter in others.parameters():
        parameter.data.zero_()
    others = quantize_inference_model(others)
    assert float(others[0](given).values().abs().max()) == 0
    assign_weights_to_tbe(others, weights)
    for ebc, quant, value in zip(others, quantized, expected):
        assert torch.equal(ebc(given).values(), quant(given).values())
        torch.testing.assert_close(ebc(given).values(), value, rtol=0.02, atol=0.1)  # of INT8


# --- 05, 10: what model code reads ----------------------------------------------------------------------------------

SHAPES: dict[str, Callable[[], list[EmbeddingBagConfig]]] = {
    "one feature in two tables": lambda: [table("t0", ["f0"]), table("t1", ["f0"])],
    "several features, one shared": lambda: [table("t0", ["f0", "f2"]), table("t1", ["f1", "f0"])],
    "mixed dims": lambda: [table("t0", ["f0"], 8), table("t1", ["f1"], 16), table("t2", ["f2"], 8)],
    "not in the order of the batch": lambda: [table("t3", ["f3"]), table("t1", ["f1"], 4), table("t0", ["f0"])],
    "tables without feature names": lambda: [table("f1", []), table("f0", [])],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_keys_dims_and_configs_are_those_of_a_plain_collection(shape: str) -> None:
    configs = SHAPES[shape]()
    plain = EmbeddingBagCollection(SHAPES[shape]())
    ebc = LMAEmbeddingBagCollection(configs, Allocation.hashed(configs, LMAConfig(compression=4)))
    expected, found = plain(features()), ebc(features())
    assert found.keys() == expected.keys()
    assert found.length_per_key() == expected.length_per_key()
    assert found.values().shape == expected.values().shape and found.values().dtype == expected.values().dtype
    assert [(c.name, c.feature_names) for c in ebc.embedding_bag_configs()] == [
        (c.name, c.feature_names) for c in plain.embedding_bag_configs()
    ]
    assert ebc.is_weighted() == plain.is_weighted() and ebc.device == plain.device


def test_tables_have_no_weights_of_their_own_and_it_says_where_they_are() -> None:
    ebc = lma(tables())
    assert not hasattr(ebc, "embedding_bags")
    with pytest.raises(AttributeError, match="levels.embedding_bags"):
        ebc.embedding_bags  # noqa: B018


# --- 06: settings by logical table ----------------------------------------------------------------------------------


def plan_with(ebc: nn.Module, constraints: dict[str, ParameterConstraints]) -> dict[str, Any]:
    planner = EmbeddingShardingPlanner(topology=Topology(2, "cpu", local_world_size=2), constraints=constraints)
    return planner.plan(nn.Sequential(ebc), get_default_sharders()).plan["0"]


def data_parallel() -> ParameterConstraints:
    return ParameterConstraints(sharding_types=["data_parallel"], compute_kernels=["dense"])


def test_constraints_by_logical_table_hold_for_its_levels() -> None:
    ebc = lma(tables(), META)
    given = {"t0": data_parallel(), "t1": data_parallel(), "another": ParameterConstraints(min_partition=32)}
    constraints = level_constraints(nn.Sequential(ebc), given)
    levels = [t.name for t in ebc.levels.embedding_bag_configs()]
    assert list(constraints) == ["another", *levels] and constraints["another"] is given["another"]
    plan = plan_with(ebc, constraints)
    assert {name: one.sharding_type for name, one in plan.items()} == dict.fromkeys(levels, "data_parallel")
    # The planner's own choice is another one.
    free = plan_with(lma(tables(), META), level_constraints(ebc))
    assert "data_parallel" not in {one.sharding_type for one in free.values()} or len(set(free)) > 1


def test_constraints_by_logical_table_are_not_dropped_by_the_planner() -> None:
    with pytest.raises(ValueError, match=r"constraints for \['t0'\].*level_constraints"):
        plan_with(lma(tables(), META), {"t0": data_parallel()})
    plain = plan_with(EmbeddingBagCollection(tables(), device=META), {"t0": data_parallel()})
    assert plain["t0"].sharding_type == "data_parallel"


def test_constraints_of_a_memory_are_joined() -> None:
    configs = [table("t0", ["f0", "f2"]), table("t1", ["f1"])]
    ebc = LMAEmbeddingBagCollection(configs, allocation_of((("t0", ("f0", "f2"), DIM), ("t1", ("f1",), DIM))))
    (memory,) = ebc.allocation.memories
    constraints = level_constraints(
        ebc,
        {
            "t0": ParameterConstraints(
                sharding_types=["row_wise", "table_wise"], pooling_factors=[3.0, 5.0], enforce_hbm=True
            ),
            "t1": ParameterConstraints(sharding_types=["table_wise", "column_wise"], num_poolings=[2.0]),
        },
    )
    for k, level in enumerate(memory.levels):
        if not level.rows:
            continue
        one = constraints[memory.level_name(k)]
        assert one.sharding_types == ["table_wise"] and one.compute_kernels is None
        assert one.enforce_hbm is True and one.stochastic_rounding is None
        # By place in a packed row, then by feature, as the level's table has them.
        shares = [share_of(ebc, "t0", k), share_of(ebc, "t0", k), share_of(ebc, "t1", k)]
        expected = [factor * share / level.pack for factor, share in zip([3.0, 5.0, 1.0], shares)] * level.pack
        assert one.pooling_factors == pytest.approx(expected, abs=1e-9)
        assert one.num_poolings == [1.0, 1.0, 2.0] * level.pack


def share_of(ebc: LMAEmbeddingBagCollection, name: str, level: int) -> float:
    """Of the ids in the training rows of a table, how many have a row on a level."""
    ids = torch.cat(
        [
            features(seed=100 + seed, b=32)[feature].values()
            for config in ebc.embedding_bag_configs()
            if config.name == name
            for feature in config.feature_names
            for seed in range(20)
        ]
    )
    return float((list(ebc.rows(name, ids).values())[level] >= 0).double().mean())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"t0": {"sharding_types": ["row_wise"]}, "t1": {"sharding_types": ["table_wise"]}},
            "no sharding_types in common",
        ),
        ({"t0": {"min_partition": 4}, "t1": {"min_partition": 8}}, "different min_partition"),
        ({"t0": {"pooling_factors": [1.0, 2.0]}}, r"table 't0' have 2 pooling_factors, and it has 1 features"),
        ({"t0": {"batch_sizes": [64]}}, r"batch_sizes of \['t0'\] and none of \['t1'\]"),
    ],
)
def test_constraints_that_cannot_be_joined_are_refused(given: dict[str, dict[str, Any]], said: str) -> None:
    constraints = {name: ParameterConstraints(**values) for name, values in given.items()}
    with pytest.raises(ValueError, match=said):
        level_constraints(lma(tables(), META), constraints)


# --- 07: the delta tracker ------------------------------------------------------------------------------------------


def track() -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    ebc = lma(tables())
    given = features(2)
    expected = {}
    (memory,) = ebc.allocation.memories
    for k, level in enumerate(memory.levels):
        rows = torch.cat([ebc.rows(f"t{i}", given[f"f{i}"].values())[memory.level_name(k)] for i in range(2)])
        table_rows = (rows[rows >= 0] // level.pack).unique().tolist()
        expected[f"ebc.levels.embedding_bags.{memory.level_name(k)}"] = table_rows
    names = [t.name for t in ebc.levels.embedding_bag_configs()]
    constraints = {name: ParameterConstraints(sharding_types=["table_wise"]) for name in names}
    module = nn.ModuleDict({"ebc": ebc, "over": nn.Linear(1, 1)})
    plan = EmbeddingShardingPlanner(constraints=constraints).collective_plan(module, get_default_sharders())
    dmp = sharded(module, plan=plan)
    tracker = dmp.init_torchrec_delta_tracker(DeltaTrackerConfig())
    tracker.step()
    dmp.module["ebc"](given).values()
    assert {f"{name}.weight" for name in expected} <= set(dmp.state_dict())
    return {name: rows.ids.tolist() for name, rows in tracker.get_unique().items()}, expected


def test_delta_tracker_gives_rows_of_levels_under_their_names() -> None:
    found, expected = run(track, 1)[0]
    assert found == expected
    assert sum(len(rows) for rows in expected.values()) > 10


# --- 08: traces -----------------------------------------------------------------------------------------------------


class Values(nn.Module):
    def __init__(self, ebc: nn.Module) -> None:
        super().__init__()
        self.ebc = ebc

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self.ebc(features).values()


@pytest.mark.parametrize(
    "trace",
    [
        lambda model, given: torch.fx.symbolic_trace(model),
        lambda model, given: torch.jit.script(model),
        lambda model, given: torch.jit.script(torch.fx.symbolic_trace(model)),
        lambda model, given: torch.export.export(model, (given,), strict=False).module(),
        lambda model, given: torch.compile(model, backend="eager", fullgraph=True),
    ],
    ids=["fx", "script", "fx and script", "export", "compile"],
)
@pytest.mark.parametrize("kind", ["plain", "own rows", "hashed", "raw ids"])
def test_model_code_traces_as_with_a_plain_collection(trace: Callable[..., Any], kind: str) -> None:
    ebc: nn.Module
    if kind == "plain":
        ebc = EmbeddingBagCollection(tables())
    elif kind == "own rows":
        ebc = lma(tables())
    else:
        config = LMAConfig(compression=4, raw_ids=kind == "raw ids")
        if kind == "hashed":
            ebc = LMAEmbeddingBagCollection(tables(), Allocation.hashed(tables(), config))
        else:
            ebc = LMAEmbeddingBagCollection(tables(), AllocationBuilder(tables(), config).update(features()).build())
    model, given = Values(ebc), features(2)
    assert torch.equal(trace(model, given)(given), model(given))


# --- what else reads a module ---------------------------------------------------------------------------------------


def test_buffers_and_parameters_are_of_their_own_modules() -> None:
    ebc = lma(tables())
    assert all(name.startswith("remap.") for name, _ in ebc.named_buffers())
    assert [name for name, _ in ebc.named_parameters()] == [
        f"levels.embedding_bags.{t.name}.weight" for t in ebc.levels.embedding_bag_configs()
    ]


def names_of(module: nn.Module) -> list[list[str]]:
    return [sorted(module.state_dict()), sorted(dict(module.named_buffers())), sorted(dict(module.named_parameters()))]


def shard_by_hand() -> list[tuple[list[list[str]], list[list[str]]]]:
    result = []
    given = features(2)
    kinds: list[tuple[nn.Module, Any]] = [
        (EmbeddingBagCollection(tables()), EmbeddingBagCollectionSharder()),
        (lma(tables()), LMAEmbeddingBagCollectionSharder()),
    ]
    for module, sharder in kinds:
        before = names_of(module)
        plan = construct_module_sharding_plan(
            module,
            {name: row_wise(compute_kernel="fused") for name in sharder.shardable_parameters(module)},
            sharder=sharder,
            local_size=1,
            world_size=1,
            device_type="cpu",
        )
        state, expected = module.state_dict(), module(given).values()
        done = shard(module, plan=plan, device=CPU, sharder=sharder)
        after = names_of(done)
        done.load_state_dict({name: value.clone() for name, value in state.items()})
        near(done(given).values(), expected)
        result.append((before, after))
    return result


def test_torchrec_shard_keeps_names_as_of_a_plain_collection() -> None:
    for before, after in run(shard_by_hand, 1)[0]:
        assert after == before


def shard_a_model() -> tuple[list[str], list[str]]:
    """With the sharders of LMA, and with those of TorchRec, whose plan has the levels."""
    given = features(2)
    result = []
    for sharders in (get_default_sharders(), None):
        model = nn.Sequential(lma(tables()))
        state, expected = model.state_dict(), model(given).values()
        done = shard_modules(model, device=CPU, sharders=sharders)
        done.load_state_dict({name: value.clone() for name, value in state.items()})
        near(done(given).values(), expected)
        result.append(sharded_types(done))
    return result[0], result[1]


def test_torchrec_shard_modules() -> None:
    ours, theirs = run(shard_a_model, 1)[0]
    assert ours == ["ShardedLMAEmbeddingBagCollection", "ShardedEmbeddingBagCollection"]
    assert theirs == ["ShardedEmbeddingBagCollection"]


def meta_model() -> tuple[list[str], dict[str, str], bool]:
    """A model on meta, sharded onto the CPU, and onto meta."""

    def model() -> nn.Module:
        return nn.ModuleDict({"lma": lma(tables(), META), "plain": EmbeddingBagCollection(tables(2), device=META)})

    names = list(dict(model().named_parameters()))
    constraints = {name.split(".")[-2]: ParameterConstraints(sharding_types=["table_wise"]) for name in names}
    planner = EmbeddingShardingPlanner(topology=Topology(1, "cpu"), constraints=constraints)
    plan = planner.plan(model(), get_default_sharders())
    dmp = DistributedModelParallel(model(), device=CPU, plan=copy.deepcopy(plan), sharders=get_default_sharders())
    out = dmp.module["lma"](features(2)).wait().values()
    on_meta = DistributedModelParallel(model(), device=META, plan=plan, sharders=get_default_sharders())
    devices = {name: parameter.device.type for name, parameter in on_meta.named_parameters()}
    return list(dmp.state_dict()), devices, bool(torch.isfinite(out).all() and out.abs().max() > 0)


def test_models_on_meta() -> None:
    names, devices, initialised = run(meta_model, 1)[0]
    assert initialised
    model = nn.ModuleDict({"lma": lma(tables()), "plain": EmbeddingBagCollection(tables(2))})
    assert set(names) == set(model.state_dict())
    assert devices == dict.fromkeys(dict(model.named_parameters()), "meta")
