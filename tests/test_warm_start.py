"""Full tables into LMA tables and back, against numpy's least squares on the written-out problem."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_lma.conversion as conversion
from support.closest_embeddings import closest
from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection
from torchrec_lma.allocation import RowsMinHash
from torchrec_lma.least_squares import LeastSquares

SIZES = {"t_user": 60, "t_item": 40, "t_day": 30, "t_hour": 5}
ALL_IDS = {name: torch.arange(n) for name, n in SIZES.items()}
CONFIG = LMAConfig(compression=6, data_type="FP32", seed=3)


def make_tables(data_type: DataType = DataType.FP32) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=SIZES[name],
            embedding_dim=dim,
            feature_names=[name[2:]],
            data_type=data_type,
            pooling=PoolingType.MEAN,
        )
        for name, dim in (("t_user", 8), ("t_item", 8), ("t_day", 16), ("t_hour", 8))
    ]


def full_tables(data_type: DataType = DataType.FP32) -> EmbeddingBagCollection:
    torch.manual_seed(1)
    ebc = EmbeddingBagCollection(make_tables(data_type))
    with torch.no_grad():
        for weight in ebc.parameters():
            weight.normal_()
    return ebc


def learned(config: LMAConfig = CONFIG, data_type: DataType = DataType.FP32, **options) -> Allocation:
    """Ids with rows of their own on some levels, with a shared row by signature or hash, and absent ones."""
    source = RowsMinHash(power=1, num_values=2, min_support=1)
    options = {"source": source, "signature_fraction": 0.3, **options}
    builder = AllocationBuilder(make_tables(data_type), config, **options)
    for i in range(80):
        builder.update(
            KeyedJaggedTensor(
                keys=["user", "item", "day", "hour"],
                values=torch.tensor([i % (1 + i % 50), i % 9, i % 35, i % 29, i % 5]),
                lengths=torch.tensor([1, 2, 1, 1]),
            )
        )
    return builder.build()


KINDS = {
    "hashed": lambda: Allocation.hashed(make_tables(), CONFIG),
    "levels": lambda: learned(),
    "packed levels": lambda: learned(LMAConfig(6, widths={8: (1, 1, 2, 4), 16: (2, 2, 12)}, data_type="FP32")),
    "the paper's": lambda: learned(
        LMAConfig(6, widths={8: (4, 4), 16: (4, 4, 4, 4)}, data_type="FP32"), shared_fraction=1.0
    ),
    "raw ids": lambda: learned(LMAConfig(4, data_type="FP32", raw_ids=("t_user", "t_item"))),
}


def test_the_kinds_have_what_they_are_about() -> None:
    allocations = {name: make() for name, make in KINDS.items()}
    levels = [level for a in allocations.values() for memory in a.memories for level in memory.levels]
    assert any(level.own_rows and level.shared_rows for level in levels)
    assert any(level.own_rows and not level.shared_rows for level in levels)
    assert {level.pack for memory in allocations["packed levels"].memories for level in memory.levels} == {4, 2, 1}
    assert any("signatures" in memory.tensors for a in allocations.values() for memory in a.memories)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("chunk_values", [1 << 21, 56], ids=["one chunk", "small chunks"])
def test_compression_is_the_weighted_least_squares_solution(kind, weighted, chunk_values, monkeypatch) -> None:
    monkeypatch.setattr(conversion, "_CHUNK_VALUES", chunk_values)
    ebc = full_tables()
    random = torch.Generator().manual_seed(0)
    weights = {name: torch.randint(1, 9, (n,), generator=random) for name, n in SIZES.items()}
    ones = {name: torch.ones(n) for name, n in SIZES.items()}
    lma = LMAEmbeddingBagCollection.from_embedding_bag_collection(ebc, kind(), weights if weighted else None)
    vectors = {name: ebc.embedding_bags[name].weight.detach() for name in SIZES}
    expected = closest(lma, vectors, ALL_IDS, weights if weighted else ones)
    for name in SIZES:
        got = lma.materialize(name, ALL_IDS[name]).numpy()
        np.testing.assert_allclose(got, expected[name], atol=2e-6)
    assert np.abs(lma.materialize("t_user", ALL_IDS["t_user"]).numpy() - vectors["t_user"].numpy()).max() > 0.1


def test_own_rows_hold_the_very_columns_of_their_ids_and_the_others_are_lost() -> None:
    ebc = full_tables()
    lma = LMAEmbeddingBagCollection.from_embedding_bag_collection(ebc, learned())
    for memory in lma.allocation.memories:
        for table in memory.tables:
            vectors, found = ebc.embedding_bags[table].weight.detach(), lma.materialize(table, ALL_IDS[table])
            start = 0
            for level, rows in zip(memory.levels, lma.rows(table, ALL_IDS[table]).values()):
                columns = slice(start, start + level.width)
                own = (rows >= 0) & (rows < level.own_rows)
                assert torch.equal(found[own, columns], vectors[own, columns])
                assert not found[rows < 0, columns].any()
                start += level.width


@pytest.mark.parametrize("data_type", [DataType.FP32, DataType.FP16])
@pytest.mark.parametrize("raw_ids", [False, True])
def test_both_directions_are_exact_where_each_id_has_all_columns(data_type: DataType, raw_ids: bool) -> None:
    ebc = full_tables(data_type)
    config = LMAConfig(memory_bytes=1 << 20, data_type=data_type.name, raw_ids=raw_ids)
    builder = AllocationBuilder(make_tables(data_type), config)
    ids = torch.cat(list(ALL_IDS.values()))
    lengths = torch.zeros(4, 60, dtype=torch.int64)
    for at, n in enumerate(SIZES.values()):
        lengths[at, :n] = 1
    builder.update(KeyedJaggedTensor(keys=[name[2:] for name in SIZES], values=ids, lengths=lengths.view(-1)))
    weights = {name: torch.arange(n) % 7 for name, n in SIZES.items()}
    lma = LMAEmbeddingBagCollection.from_embedding_bag_collection(ebc, builder.build(), weights)
    assert all(len(memory.levels) == 1 for memory in lma.allocation.memories)
    back = lma.to_embedding_bag_collection()
    for name in SIZES:
        original = ebc.embedding_bags[name].weight
        assert torch.equal(lma.materialize(name, ALL_IDS[name]), original)
        assert torch.equal(back.embedding_bags[name].weight, original)
        assert back.embedding_bags[name].weight.dtype is original.dtype


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_full_tables_made_from_lma_tables_pool_as_they_do(kind) -> None:
    torch.manual_seed(0)
    lma = LMAEmbeddingBagCollection(make_tables(), kind())
    full = lma.to_embedding_bag_collection()
    assert type(full) is EmbeddingBagCollection
    features = KeyedJaggedTensor(
        keys=["user", "item", "day", "hour"],
        values=torch.tensor([5, 59, 3, 39, 0, 29, 29, 4, 0]),
        lengths=torch.tensor([2, 0, 1, 1, 2, 1, 1, 1]),
    )
    assert full(features).keys() == lma(features).keys()
    torch.testing.assert_close(full(features).values(), lma(features).values())


@pytest.mark.parametrize("data_type", [DataType.FP16, DataType.BF16, DataType.FP32])
@pytest.mark.parametrize("of_weights", ["FP16", "BF16", "FP32"])
def test_tables_leave_in_the_type_they_were_declared_in(data_type: DataType, of_weights: str) -> None:
    tables = make_tables(data_type)
    lma = LMAEmbeddingBagCollection(tables, Allocation.hashed(tables, LMAConfig(4, data_type=of_weights)))
    back = lma.to_embedding_bag_collection()
    for name, ids in ALL_IDS.items():
        weight = back.embedding_bags[name].weight
        assert weight.dtype is {"FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32}[data_type.name]
        assert torch.equal(weight, lma.materialize(name, ids).to(weight.dtype))


def test_weights_are_rounded_to_the_type_of_the_memory() -> None:
    ebc = full_tables()
    lma = LMAEmbeddingBagCollection.from_embedding_bag_collection(ebc, learned(LMAConfig(1)))
    assert all(memory.levels[0].width == memory.dim for memory in lma.allocation.memories)
    for name in SIZES:
        assert torch.equal(lma.materialize(name, ALL_IDS[name]), ebc.embedding_bags[name].weight.half())


def test_rows_may_stand_for_other_ids() -> None:
    ebc = full_tables()
    raw = {name: (torch.arange(n) - 7) * 2**40 for name, n in SIZES.items()}  # what the model is fed from now on
    allocation = learned(LMAConfig(4, data_type="FP32", raw_ids=True))
    lma = LMAEmbeddingBagCollection.from_embedding_bag_collection(ebc, allocation, ids=raw)
    vectors = {name: ebc.embedding_bags[name].weight for name in SIZES}
    expected = closest(lma, vectors, raw, {name: torch.ones(n) for name, n in SIZES.items()})
    back = lma.to_embedding_bag_collection(ids=raw)
    for name in SIZES:
        np.testing.assert_allclose(lma.materialize(name, raw[name]).numpy(), expected[name], atol=2e-6)
        assert torch.equal(back.embedding_bags[name].weight, lma.materialize(name, raw[name]))


def test_rows_that_no_counted_id_has_keep_their_initial_values() -> None:
    ebc = full_tables()
    hashed = Allocation.hashed(make_tables(), CONFIG)
    torch.manual_seed(5)
    untouched = LMAEmbeddingBagCollection(make_tables(), hashed)
    weights = {name: torch.zeros(n) for name, n in SIZES.items()}
    weights["t_item"][4] = 2
    torch.manual_seed(5)
    lma = LMAEmbeddingBagCollection.from_embedding_bag_collection(ebc, hashed, id_weights=weights)
    (name,) = lma.rows("t_item", torch.tensor([4]))
    expected = untouched.levels.embedding_bags[name].weight.detach().clone()
    expected[lma.rows("t_item", torch.tensor([4]))[name]] = ebc.embedding_bags["t_item"].weight[4].detach()
    assert torch.equal(lma.levels.embedding_bags[name].weight, expected)
    (other,) = lma.rows("t_day", torch.tensor([4]))
    assert torch.equal(lma.levels.embedding_bags[other].weight, untouched.levels.embedding_bags[other].weight)


def test_compressed_tables_train_and_leave_the_full_ones_alone() -> None:
    ebc = full_tables()
    before = [weight.clone() for weight in ebc.parameters()]
    lma = LMAEmbeddingBagCollection.from_embedding_bag_collection(ebc, learned())
    features = KeyedJaggedTensor(
        keys=["user", "item", "day", "hour"], values=torch.tensor([1, 2, 3, 4]), lengths=torch.tensor([1, 1, 1, 1])
    )
    lma(features).values().sum().backward()
    assert all(weight.grad is not None for weight in lma.parameters())
    assert sum(weight.grad.abs().sum() > 0 for weight in lma.parameters()) >= 3
    assert all(torch.equal(a, b) for a, b in zip(ebc.parameters(), before))
    assert [t.feature_names for t in ebc.embedding_bag_configs()] == [["user"], ["item"], ["day"], ["hour"]]


def test_the_solver_knows_rows_and_vectors_only() -> None:
    weights = torch.full((5, 2), 9.0)
    solver = LeastSquares(weights, own_rows=2)
    vectors = torch.arange(12.0).view(6, 2)
    solver.add(torch.tensor([1, 2, 2, -1]), vectors[:4], torch.tensor([0.0, 1.0, 3.0, 1.0]))
    solver.add(torch.tensor([4, 3]), vectors[4:], torch.tensor([2, 0]))
    solver.write()
    mean = (vectors[1] + 3 * vectors[2]) / 4
    nine = torch.full((2,), 9.0)  # rows of nobody, or of nobody who counts
    assert torch.equal(weights, torch.stack([nine, vectors[0], mean, nine, vectors[4]]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"id_weights": {"t_nobody": torch.ones(3)}}, "id_weights has a table 't_nobody'"),
        ({"id_weights": {"t_user": torch.ones(3)}}, r"'t_user' has shape \[3\], expected one weight .* 60 ids"),
        ({"id_weights": {"t_day": -torch.ones(30)}}, "'t_day' has a value that is negative"),
        ({"id_weights": {"t_day": torch.full((30,), float("nan"))}}, "'t_day' has a value that is negative or not"),
        ({"ids": {"t_user": torch.arange(60)}}, r"missing \['t_day', 't_hour', 't_item'\]"),
        ({"ids": {name: torch.arange(n - 1) for name, n in SIZES.items()}}, "'t_user' has 59 values, expected .* 60"),
    ],
)
def test_weights_and_ids_that_do_not_fit_are_refused(options: Mapping[str, Mapping[str, Tensor]], message: str) -> None:
    hashed = Allocation.hashed(make_tables(), CONFIG)
    with pytest.raises(ValueError, match=message):
        LMAEmbeddingBagCollection.from_embedding_bag_collection(full_tables(), hashed, **options)


def test_ids_must_be_integers() -> None:
    hashed = Allocation.hashed(make_tables(), CONFIG)
    lma = LMAEmbeddingBagCollection(make_tables(), hashed)
    with pytest.raises(TypeError, match="'t_user' has ids of torch.float32"):
        lma.to_embedding_bag_collection({name: torch.rand(n) for name, n in SIZES.items()})
    with pytest.raises(TypeError, match="'t_user' are list"):
        lma.to_embedding_bag_collection({n: [1] for n in SIZES})  # type: ignore[misc]
    with pytest.raises(TypeError, match="id_weights of 't_day' are list"):
        LMAEmbeddingBagCollection.from_embedding_bag_collection(full_tables(), hashed, {"t_day": [1] * 30})  # type: ignore[dict-item]


def test_only_plain_collections_with_values_are_compressed() -> None:
    hashed, meta = Allocation.hashed(make_tables(), CONFIG), torch.device("meta")
    with pytest.raises(TypeError, match="use reallocate for LMA tables"):
        LMAEmbeddingBagCollection.from_embedding_bag_collection(
            LMAEmbeddingBagCollection(make_tables(), hashed),  # type: ignore[arg-type]
            hashed,
        )
    with pytest.raises(ValueError, match="EmbeddingBagCollection are on the meta device"):
        LMAEmbeddingBagCollection.from_embedding_bag_collection(
            EmbeddingBagCollection(make_tables(), device=meta), hashed
        )
    with pytest.raises(ValueError, match="LMAEmbeddingBagCollection are on the meta device"):
        LMAEmbeddingBagCollection(make_tables(), hashed, device=meta).to_embedding_bag_collection()
    with pytest.raises(ValueError, match="made for other tables"):
        LMAEmbeddingBagCollection.from_embedding_bag_collection(
            full_tables(), Allocation.hashed(make_tables()[:2], CONFIG)
        )
