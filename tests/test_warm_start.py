"""Full tables into LMA tables and back, against numpy's least squares on the written-out problem."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_lma.least_squares as least_squares
from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection
from torchrec_lma.allocation import MemoryAllocation, RowsMinHash
from torchrec_lma.allocation.index import build_index
from torchrec_lma.hashing import mix64, table_salt

CONFIG = LMAConfig(compression=6, chunk_dim=4, seed=3)
SIZES = {"t_user": 60, "t_item": 40, "t_day": 30}


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
        for name, dim in (("t_user", 8), ("t_item", 8), ("t_day", 16))
    ]


def full_tables(data_type: DataType = DataType.FP32) -> EmbeddingBagCollection:
    torch.manual_seed(1)
    ebc = EmbeddingBagCollection(make_tables(data_type))
    with torch.no_grad():
        for weight in ebc.parameters():
            weight.normal_()
    return ebc


def learned(tables: list[EmbeddingBagConfig], config: LMAConfig = CONFIG) -> Allocation:
    """Ids of all kinds: the first of each table dedicated or with a signature, the others hashed."""
    builder = AllocationBuilder(tables, config, source=RowsMinHash(power=1, num_values=2, min_support=1))
    for i in range(50):
        builder.update(
            KeyedJaggedTensor(
                keys=["user", "item", "day"],
                values=torch.tensor([i % 20, i % 9, i % 3, i % 7]),
                lengths=torch.tensor([1, 2, 1]),
            )
        )
    allocation = builder.build()
    assert all(m.dedicated_rows and m.signatures.numel() for m in allocation.memories)
    return allocation


def every_id_dedicated(tables: list[EmbeddingBagConfig]) -> Allocation:
    """A row for each id and one to share, at compression 1: the builder always keeps something to share."""
    empty = Allocation.hashed(tables, LMAConfig(compression=1, chunk_dim=4))
    memories = []
    for memory in empty.memories:
        keys = torch.cat([mix64(torch.arange(SIZES[t]) ^ table_salt(0, t)) for t in memory.tables])
        low, starts, _ = build_index(keys)
        header = {"name": memory.name, "dim": memory.dim, "chunk_dim": memory.chunk_dim, "tables": memory.tables}
        memories.append(MemoryAllocation(**header, rows=keys.numel() + 1, dedicated_low=low, dedicated_starts=starts))
    return replace(empty, memories=tuple(memories))


def numpy_least_squares(
    lma: LMAEmbeddingBagCollection, vectors: dict[str, Tensor], ids: dict[str, Tensor], weights: dict[str, Tensor]
) -> dict[str, np.ndarray]:
    """table -> embeddings at the optimum, from the design matrix of each chunk position and np.linalg.lstsq."""
    embeddings = {name: np.zeros(tuple(v.shape)) for name, v in vectors.items()}
    for memory in lma.allocation.memories:
        features = {table: next(t.feature_names[0] for t in lma.tables if t.name == table) for table in memory.tables}
        for j in range(memory.n_chunks):
            columns = slice(j * memory.chunk_dim, (j + 1) * memory.chunk_dim)
            design, wanted, scale = [], [], []
            for table in memory.tables:
                for row, vector, weight in zip(
                    lma.addresses(features[table], ids[table])[:, j].tolist(), vectors[table], weights[table]
                ):
                    design.append(np.eye(1, memory.rows, row)[0])
                    wanted.append(vector[columns].double().numpy())
                    scale.append(float(weight) ** 0.5)
            a, y, s = np.array(design), np.array(wanted), np.array(scale)[:, None]
            solution = np.linalg.lstsq(a * s, y * s, rcond=None)[0]
            start = 0
            for table in memory.tables:
                n = ids[table].numel()
                embeddings[table][:, columns] = a[start : start + n] @ solution
                start += n
    return embeddings


@pytest.mark.parametrize("kind", ["hashed", "learned"])
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("block_values", [1 << 21, 56], ids=["one block", "small blocks"])
def test_compression_is_the_weighted_least_squares_solution(kind, weighted, block_values, monkeypatch) -> None:
    monkeypatch.setattr(least_squares, "_BLOCK_VALUES", block_values)
    ebc = full_tables()
    random = torch.Generator().manual_seed(0)
    weights = {name: torch.randint(1, 9, (n,), generator=random) for name, n in SIZES.items()}
    ones = {name: torch.ones(n) for name, n in SIZES.items()}
    allocation = learned(make_tables()) if kind == "learned" else None
    lma = LMAEmbeddingBagCollection.from_embedding_bag_collection(
        ebc, CONFIG, allocation, id_weights=weights if weighted else None
    )
    ids = {name: torch.arange(n) for name, n in SIZES.items()}
    vectors = {name: ebc.embedding_bags[name].weight.detach() for name in SIZES}
    expected = numpy_least_squares(lma, vectors, ids, weights if weighted else ones)
    for name in SIZES:
        got = lma.materialize(name, ids[name]).numpy()
        np.testing.assert_allclose(got, expected[name], atol=2e-6)
        assert np.abs(got - vectors[name].numpy()).max() > 0.1  # something was compressed


@pytest.mark.parametrize("data_type", [DataType.FP32, DataType.FP16])
def test_both_directions_are_exact_at_compression_1_with_a_row_for_each_id(data_type: DataType) -> None:
    ebc = full_tables(data_type)
    allocation = every_id_dedicated(make_tables(data_type))
    weights = {name: torch.arange(n) % 7 + 1 for name, n in SIZES.items()}
    lma = LMAEmbeddingBagCollection.from_embedding_bag_collection(ebc, allocation.config, allocation, weights)
    back = lma.to_embedding_bag_collection()
    for name in SIZES:
        original = ebc.embedding_bags[name].weight
        assert torch.equal(lma.materialize(name, torch.arange(SIZES[name])), original)
        assert torch.equal(back.embedding_bags[name].weight, original)
        assert back.embedding_bags[name].weight.dtype is original.dtype


def test_full_tables_made_from_lma_tables_pool_as_they_do() -> None:
    torch.manual_seed(0)
    lma = LMAEmbeddingBagCollection(make_tables(), CONFIG, learned(make_tables()))
    full = lma.to_embedding_bag_collection()
    assert type(full) is EmbeddingBagCollection
    features = KeyedJaggedTensor(
        keys=["user", "item", "day"],
        values=torch.tensor([5, 59, 3, 39, 0, 29, 29]),
        lengths=torch.tensor([2, 0, 1, 1, 2, 1]),
    )
    for feature in ("user", "item", "day"):
        torch.testing.assert_close(full(features)[feature], lma(features)[feature])


def test_bf16_tables_leave_as_bf16() -> None:
    lma = LMAEmbeddingBagCollection(make_tables(DataType.BF16), CONFIG)
    back = lma.to_embedding_bag_collection()
    for name, n in SIZES.items():
        assert back.embedding_bags[name].weight.dtype is torch.bfloat16
        assert torch.equal(back.embedding_bags[name].weight, lma.materialize(name, torch.arange(n)))


def test_rows_may_stand_for_raw_ids() -> None:
    ebc = full_tables()
    raw = {name: (torch.arange(n) - 7) * 2**40 for name, n in SIZES.items()}  # what the model is fed from now on
    allocation = learned(make_tables())
    lma = LMAEmbeddingBagCollection.from_embedding_bag_collection(ebc, CONFIG, allocation, ids=raw)
    vectors = {name: ebc.embedding_bags[name].weight.detach() for name in SIZES}
    ones = {name: torch.ones(n) for name, n in SIZES.items()}
    expected = numpy_least_squares(lma, vectors, raw, ones)
    back = lma.to_embedding_bag_collection(ids=raw)
    for name in SIZES:
        np.testing.assert_allclose(lma.materialize(name, raw[name]).numpy(), expected[name], atol=2e-6)
        assert torch.equal(back.embedding_bags[name].weight, lma.materialize(name, raw[name]))


def test_chunks_that_no_counted_id_uses_keep_their_initial_values() -> None:
    ebc = full_tables()
    torch.manual_seed(5)
    untouched = LMAEmbeddingBagCollection(make_tables(), CONFIG)
    weights = {name: torch.zeros(n) for name, n in SIZES.items()}
    weights["t_item"][4] = 2
    torch.manual_seed(5)
    lma = LMAEmbeddingBagCollection.from_embedding_bag_collection(ebc, CONFIG, id_weights=weights)
    rows = lma.addresses("item", torch.tensor([4]))[0].tolist()
    expected = untouched.embedding_bags["memory_8"].weight.detach().clone()
    for j, row in enumerate(rows):
        columns = slice(4 * j, 4 * j + 4)
        expected[row, columns] = ebc.embedding_bags["t_item"].weight[4, columns].detach()
    assert torch.equal(lma.embedding_bags["memory_8"].weight, expected)
    assert torch.equal(lma.embedding_bags["memory_16"].weight, untouched.embedding_bags["memory_16"].weight)


def test_compressed_tables_train_and_leave_the_full_ones_alone() -> None:
    ebc = full_tables()
    before = [weight.clone() for weight in ebc.parameters()]
    lma = LMAEmbeddingBagCollection.from_embedding_bag_collection(ebc, CONFIG)
    features = KeyedJaggedTensor(
        keys=["user", "item", "day"], values=torch.tensor([1, 2, 3]), lengths=torch.tensor([1, 1, 1])
    )
    lma(features).values().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in lma.parameters())
    assert all(torch.equal(a, b) for a, b in zip(ebc.parameters(), before))
    assert [t.feature_names for t in ebc.embedding_bag_configs()] == [["user"], ["item"], ["day"]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"id_weights": {"t_nobody": torch.ones(3)}}, "id_weights has a table 't_nobody'"),
        ({"id_weights": {"t_user": torch.ones(3)}}, r"'t_user' has shape \[3\], expected one weight .* 60 ids"),
        ({"id_weights": {"t_day": -torch.ones(30)}}, "'t_day' has a value that is negative"),
        ({"id_weights": {"t_day": torch.full((30,), float("nan"))}}, "'t_day' has a value that is negative or not"),
        ({"ids": {"t_user": torch.arange(60)}}, r"missing \['t_day', 't_item'\]"),
        ({"ids": {name: torch.arange(n - 1) for name, n in SIZES.items()}}, "'t_user' has 59 values, expected .* 60"),
    ],
)
def test_weights_and_ids_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LMAEmbeddingBagCollection.from_embedding_bag_collection(full_tables(), CONFIG, **options)


def test_ids_must_be_integers() -> None:
    ids = {name: torch.rand(n) for name, n in SIZES.items()}
    with pytest.raises(TypeError, match="'t_user' are torch.float32"):
        LMAEmbeddingBagCollection(make_tables(), CONFIG).to_embedding_bag_collection(ids)
    with pytest.raises(TypeError, match="'t_user' are list"):
        LMAEmbeddingBagCollection(make_tables(), CONFIG).to_embedding_bag_collection({n: [1] for n in SIZES})
    with pytest.raises(TypeError, match="id_weights of 't_day' are list"):
        LMAEmbeddingBagCollection.from_embedding_bag_collection(full_tables(), CONFIG, id_weights={"t_day": [1] * 30})


def test_only_plain_collections_with_values_are_compressed() -> None:
    with pytest.raises(TypeError, match="use reallocate for LMA tables"):
        LMAEmbeddingBagCollection.from_embedding_bag_collection(
            LMAEmbeddingBagCollection(make_tables(), CONFIG), CONFIG
        )
    with pytest.raises(ValueError, match="meta device"):
        LMAEmbeddingBagCollection.from_embedding_bag_collection(
            EmbeddingBagCollection(make_tables(), device=torch.device("meta")), CONFIG
        )
