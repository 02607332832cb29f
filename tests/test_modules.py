"""LMAEmbeddingBagCollection against loops over single ids, bags and chunks."""

import copy
import hashlib
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection
from torchrec_lma.allocation import RowsMinHash

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
Bags = dict[str, list[list[int]]]  # feature -> bags of ids


def make_tables(
    pooling: PoolingType = PoolingType.SUM, data_type: DataType = DataType.FP32, dims: tuple[int, ...] = (8, 16)
) -> list[EmbeddingBagConfig]:
    """Two tables of the first dim (one with two features) around one of the last."""
    return [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=size,
            embedding_dim=dim,
            feature_names=features,
            pooling=pooling,
            data_type=data_type,
        )
        for name, size, dim, features in (
            ("t_user", 900, dims[0], ["user"]),
            ("t_place", 300, dims[-1], ["place"]),
            ("t_item", 400, dims[0], ["item", "last_item"]),
        )
    ]


FEATURES = ["user", "place", "item", "last_item"]
TABLE_OF = {"user": "t_user", "place": "t_place", "item": "t_item", "last_item": "t_item"}
CONFIG = LMAConfig(compression=10, chunk_dim=4, seed=2)
BAGS: Bags = {
    "user": [[5], [], [-3, -3, INT64_MIN]],
    "place": [[INT64_MAX, 1, 2], [0], []],
    "item": [[], [5, 6], [7]],
    "last_item": [[5], [5], [1 << 40, 8, 9, 10]],
}


def kjt(bags: Bags, keys: Sequence[str] = (), weights: bool = False, dtype: torch.dtype = torch.int64):
    keys = list(keys) or list(bags)
    values = [id for key in keys for bag in bags[key] for id in bag]
    # A weight depends on where its id stands in the bags, not on the order of the features.
    scale = [
        0.25 + 0.05 * len(key) + 0.1 * b + 0.07 * i
        for key in keys
        for b, bag in enumerate(bags[key])
        for i, _ in enumerate(bag)
    ]
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.tensor(values, dtype=dtype),
        lengths=torch.tensor([len(bag) for key in keys for bag in bags[key]], dtype=torch.int32),
        weights=torch.tensor(scale, dtype=torch.float32) if weights else None,
    )


def collection(tables: list[EmbeddingBagConfig] | None = None, **options) -> LMAEmbeddingBagCollection:
    torch.manual_seed(0)
    return LMAEmbeddingBagCollection(tables or make_tables(), **{"config": CONFIG, **options})


def learned(tables: list[EmbeddingBagConfig], config: LMAConfig = CONFIG) -> Allocation:
    """An allocation with ids of all kinds: dedicated, with a signature, hashed."""
    builder = AllocationBuilder(tables, config, source=RowsMinHash(power=1, num_values=2, min_support=1))
    for i in range(60):
        builder.update(kjt({f: [[i % 40], [i % 7, i % 9]] for f in FEATURES}))
    allocation = builder.build()
    assert all(m.dedicated_rows and m.signatures.numel() for m in allocation.memories)
    return allocation


def reference_embedding(ebc: LMAEmbeddingBagCollection, feature: str, id: int) -> Tensor:
    """One id's vector, chunk by chunk from the memory's weights."""
    config = next(c for c in ebc.embedding_bag_configs() if feature in c.feature_names)
    weight = ebc.embedding_bags[config.name].weight.detach()
    (rows,) = ebc.addresses(feature, torch.tensor([id])).tolist()
    width = config.embedding_dim // len(rows)
    return torch.cat([weight[row, j * width : (j + 1) * width] for j, row in enumerate(rows)])


def reference_pooled(ebc: LMAEmbeddingBagCollection, features: KeyedJaggedTensor, pooling: PoolingType) -> dict:
    """feature -> [B, dim] by loops over bags and ids: sum(w_i * e_i), divided by the number of ids for MEAN."""
    pooled = {}
    for key, jagged in features.to_dict().items():
        table = TABLE_OF[key]
        bags, start = [], 0
        for length in jagged.lengths().tolist():
            total = torch.zeros(ebc.materialize(table, torch.tensor([0])).size(1))
            for i in range(start, start + length):
                weight = float(jagged.weights()[i]) if ebc.is_weighted() else 1.0
                total += weight * ebc.materialize(table, jagged.values()[i : i + 1])[0].float()
            if pooling is PoolingType.MEAN and length:
                total /= length
            bags.append(total)
            start += length
        pooled[key] = torch.stack(bags)
    return pooled


def assert_pooled(output, expected: dict[str, Tensor], **tolerance: float) -> None:
    assert sorted(output.keys()) == sorted(expected)
    for key, value in expected.items():
        assert output[key].dtype is torch.float32
        torch.testing.assert_close(output[key].detach(), value, **tolerance)


every_pooling = pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
weighted_or_not = pytest.mark.parametrize("is_weighted", [False, True], ids=["unweighted", "weighted"])
with_or_without_allocation = pytest.mark.parametrize("kind", ["hashed", "learned"])


# Forward.


@with_or_without_allocation
def test_an_embedding_is_its_chunks_side_by_side(kind: str) -> None:
    tables = make_tables()
    ebc = collection(tables, allocation=learned(tables) if kind == "learned" else None)
    ids = [*range(45), -1, INT64_MIN, INT64_MAX]
    for feature, table in TABLE_OF.items():
        expected = torch.stack([reference_embedding(ebc, feature, id) for id in ids])
        assert torch.equal(ebc.materialize(table, torch.tensor(ids)), expected)


@every_pooling
@weighted_or_not
@with_or_without_allocation
@pytest.mark.parametrize("chunk_dim", [1, 4, 8])
def test_forward_is_a_loop_over_bags(pooling: PoolingType, is_weighted: bool, kind: str, chunk_dim: int) -> None:
    tables = make_tables(pooling)
    config = LMAConfig(compression=4, chunk_dim=chunk_dim)
    allocation = learned(tables, config) if kind == "learned" else None
    ebc = collection(tables, config=config, allocation=allocation, is_weighted=is_weighted)
    features = kjt(BAGS, weights=is_weighted)
    assert_pooled(ebc(features), reference_pooled(ebc, features, pooling))


bags_of_ids = st.integers(0, 4).flatmap(
    lambda batch_size: st.fixed_dictionaries(
        {
            feature: st.lists(
                st.lists(st.integers(INT64_MIN, INT64_MAX) | st.integers(0, 9), max_size=4),
                min_size=batch_size,
                max_size=batch_size,
            )
            for feature in FEATURES
        }
    )
)


@every_pooling
@weighted_or_not
def test_forward_of_any_batch_is_a_loop_over_bags(pooling: PoolingType, is_weighted: bool) -> None:
    ebc = collection(make_tables(pooling), is_weighted=is_weighted)

    @settings(derandomize=True, deadline=None, max_examples=25)
    @given(bags_of_ids.filter(lambda bags: bags["user"]), st.permutations(FEATURES))
    def check(bags: Bags, keys: list[str]) -> None:
        features = kjt(bags, keys, weights=is_weighted)
        assert_pooled(ebc(features), reference_pooled(ebc, features, pooling))

    check()


def test_columns_are_those_of_the_keys() -> None:
    ebc = collection()
    output = ebc(kjt(BAGS))
    assert sum(([f] for c in ebc.embedding_bag_configs() for f in c.feature_names), []) == output.keys()
    assert dict(zip(output.keys(), output.length_per_key())) == {"user": 8, "place": 16, "item": 8, "last_item": 8}
    assert output.values().shape == (3, 40)


@every_pooling
@weighted_or_not
def test_the_order_of_features_does_not_matter(pooling: PoolingType, is_weighted: bool) -> None:
    ebc = collection(make_tables(pooling), is_weighted=is_weighted)
    expected = ebc(kjt(BAGS, weights=is_weighted))
    for keys in (FEATURES[::-1], ["item", "user", "last_item", "place"]):
        output = ebc(kjt(BAGS, keys, weights=is_weighted))
        assert output.keys() == expected.keys()
        assert torch.equal(output.values(), expected.values())


@every_pooling
@weighted_or_not
def test_a_batch_of_no_rows_gives_no_rows(pooling: PoolingType, is_weighted: bool) -> None:
    ebc = collection(make_tables(pooling), is_weighted=is_weighted)
    output = ebc(kjt({feature: [] for feature in FEATURES}, weights=is_weighted)).values()
    assert output.shape == (0, 40) and output.dtype is torch.float32
    output.sum().backward()


@every_pooling
@weighted_or_not
def test_a_batch_without_ids_gives_zeros(pooling: PoolingType, is_weighted: bool) -> None:
    ebc = collection(make_tables(pooling), is_weighted=is_weighted)
    output = ebc(kjt({feature: [[], []] for feature in FEATURES}, weights=is_weighted)).values()
    assert output.tolist() == [[0.0] * 40] * 2
    output.sum().backward()
    assert all(not p.grad.to_dense().any() for p in ebc.parameters() if p.grad is not None)


def test_a_single_feature_is_enough() -> None:
    ebc = collection(make_tables()[:1])
    features = kjt({"user": BAGS["user"]})
    assert_pooled(ebc(features), reference_pooled(ebc, features, PoolingType.SUM))


def test_a_table_without_feature_names_is_its_own_feature() -> None:
    ebc = collection([EmbeddingBagConfig(name="user", num_embeddings=100, embedding_dim=8)])
    output = ebc(KeyedJaggedTensor(keys=["user"], values=torch.tensor([3]), lengths=torch.tensor([1])))
    assert torch.equal(output["user"], ebc.materialize("user", torch.tensor([3])))


@with_or_without_allocation
def test_int32_ids_give_what_int64_ids_give(kind: str) -> None:
    tables = make_tables()
    ebc = collection(tables, allocation=learned(tables) if kind == "learned" else None)
    bags: Bags = {feature: [[1, -2], [], [2**31 - 1, -(2**31)]] for feature in FEATURES}
    assert torch.equal(ebc(kjt(bags, dtype=torch.int32)).values(), ebc(kjt(bags)).values())


def test_int64_lengths_give_what_int32_lengths_give() -> None:
    ebc, features = collection(), kjt(BAGS)
    wide = KeyedJaggedTensor(keys=features.keys(), values=features.values(), lengths=features.lengths().long())
    assert torch.equal(ebc(wide).values(), ebc(features).values())


@every_pooling
@weighted_or_not
@pytest.mark.parametrize("data_type", [DataType.FP16, DataType.BF16])
def test_half_precision_weights(pooling: PoolingType, is_weighted: bool, data_type: DataType) -> None:
    ebc = collection(make_tables(pooling, data_type), is_weighted=is_weighted)
    dtype = {DataType.FP16: torch.float16, DataType.BF16: torch.bfloat16}[data_type]
    assert all(p.dtype is dtype for p in ebc.parameters())
    assert ebc.materialize("t_user", torch.tensor([1])).dtype is dtype
    features = kjt(BAGS, weights=is_weighted)
    error = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert_pooled(ebc(features), reference_pooled(ebc, features, pooling), rtol=error, atol=error)
    ebc(features).values().sum().backward()
    assert all(p.grad.dtype is dtype and p.grad.any() for p in ebc.parameters())


def test_weights_start_in_the_range_of_their_tables() -> None:
    tables = make_tables()
    for table in tables:
        table.weight_init_min, table.weight_init_max = 0.25, 0.5
    for weight in collection(tables).parameters():
        assert 0.25 <= weight.min().item() < 0.27 and 0.48 < weight.max().item() <= 0.5


def test_forward_does_not_change_its_input() -> None:
    for is_weighted in (False, True):
        ebc = collection(make_tables(PoolingType.MEAN), is_weighted=is_weighted)
        features, untouched = (kjt(BAGS, FEATURES[::-1], weights=is_weighted) for _ in range(2))
        ebc(features)
        assert features.keys() == untouched.keys() and torch.equal(features.values(), untouched.values())
        assert torch.equal(features.lengths(), untouched.lengths())
        assert not is_weighted or torch.equal(features.weights(), untouched.weights())


# Backward.


@every_pooling
@weighted_or_not
@with_or_without_allocation
def test_gradients_are_added_chunk_by_chunk(pooling: PoolingType, is_weighted: bool, kind: str) -> None:
    tables = make_tables(pooling)
    ebc = collection(tables, allocation=learned(tables) if kind == "learned" else None, is_weighted=is_weighted)
    bags: Bags = {feature: [[1, 1, 2], [], [3, -4]] for feature in FEATURES}  # the same ids meet in all features
    features = kjt(bags, weights=is_weighted)
    output = ebc(features)
    upstream = {key: torch.randn_like(output[key]) for key in output.keys()}  # noqa: SIM118
    sum((output[key] * value).sum() for key, value in upstream.items()).backward()

    expected = {name: torch.zeros_like(bag.weight) for name, bag in ebc.embedding_bags.items()}
    for key, jagged in features.to_dict().items():
        config = next(c for c in ebc.embedding_bag_configs() if key in c.feature_names)
        position = 0
        for b, bag in enumerate(bags[key]):
            for id in bag:
                scale = float(jagged.weights()[position]) if is_weighted else 1.0
                if pooling is PoolingType.MEAN:
                    scale /= len(bag)
                for chunk, row in enumerate(ebc.addresses(key, torch.tensor([id]))[0].tolist()):
                    columns = slice(4 * chunk, 4 * chunk + 4)
                    expected[config.name][row, columns] += scale * upstream[key][b, columns]
                position += 1
    for name, bag in ebc.embedding_bags.items():
        torch.testing.assert_close(bag.weight.grad, expected[name])


@every_pooling
def test_gradients_of_the_per_sample_weights(pooling: PoolingType) -> None:
    ebc = collection(make_tables(pooling), is_weighted=True)
    given_features = kjt(BAGS, weights=True)
    weights = given_features.weights().clone().requires_grad_()
    features = KeyedJaggedTensor(
        keys=given_features.keys(),
        values=given_features.values(),
        lengths=given_features.lengths(),
        weights=weights,
    )
    output = ebc(features)
    upstream = {key: torch.randn_like(output[key]) for key in output.keys()}  # noqa: SIM118
    sum((output[key] * value).sum() for key, value in upstream.items()).backward()
    expected = []
    for key in features.keys():  # noqa: SIM118
        for b, bag in enumerate(BAGS[key]):
            for id in bag:
                dot = torch.dot(reference_embedding(ebc, key, id), upstream[key][b])
                expected.append(dot / len(bag) if pooling is PoolingType.MEAN else dot)
    assert weights.grad is not None, "no gradient reached the per-sample weights"
    torch.testing.assert_close(weights.grad, torch.stack(expected))


def test_a_step_of_an_optimizer_moves_only_what_was_read() -> None:
    ebc = collection()
    before = {name: bag.weight.detach().clone() for name, bag in ebc.embedding_bags.items()}
    optimizer = torch.optim.SGD(ebc.parameters(), lr=0.5)
    ebc(kjt(BAGS)).values().sum().backward()
    optimizer.step()
    for config in ebc.embedding_bag_configs():
        moved = {
            (row, chunk)
            for row, chunk in (ebc.embedding_bags[config.name].weight != before[config.name])
            .view(config.num_embeddings, -1, 4)
            .any(dim=2)
            .nonzero()
            .tolist()
        }
        read = {
            (row, chunk)
            for feature in config.feature_names
            for bag in BAGS[feature]
            for id in bag
            for chunk, row in enumerate(ebc.addresses(feature, torch.tensor([id]))[0].tolist())
        }
        assert moved == read


# Addresses and vectors.


def test_addresses_have_a_row_for_each_id_and_a_column_for_each_chunk() -> None:
    ebc = collection()
    for feature, n_chunks, memory in (("user", 2, "memory_8"), ("place", 4, "memory_16")):
        rows = ebc.addresses(feature, torch.arange(100))
        assert rows.shape == (100, n_chunks) and rows.dtype is torch.int64
        assert 0 <= int(rows.min()) and int(rows.max()) < ebc.embedding_bags[memory].num_embeddings


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_no_ids_have_no_addresses_and_no_vectors(dtype: torch.dtype) -> None:
    ebc, no_ids = collection(), torch.empty(0, dtype=dtype)
    assert ebc.addresses("user", no_ids).shape == (0, 2)
    assert ebc.materialize("t_user", no_ids).shape == (0, 8)


def test_addresses_are_those_of_plain_integers() -> None:
    def salt(*parts: object) -> int:
        digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
        return int.from_bytes(digest[:8], "little")

    def mix64(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    ebc = collection()
    ids = [0, 1, -1, 12345, INT64_MIN, INT64_MAX]
    for feature, table, memory in (("user", "t_user", "memory_8"), ("last_item", "t_item", "memory_8")):
        rows = ebc.embedding_bags[memory].num_embeddings
        expected = []
        for id in ids:
            key = mix64((id % 2**64) ^ salt("table", CONFIG.seed, table))
            products = [key * (salt("chunk", CONFIG.seed, j) | 1) % 2**64 for j in range(2)]
            # an arithmetic shift copies the sign into the high half, of which only bit 63 is then dropped
            folded = [p ^ (p >> 32) ^ (0xFFFFFFFF << 32 if p >> 63 else 0) for p in products]
            expected.append([f % 2**63 % rows for f in folded])
        assert ebc.addresses(feature, torch.tensor(ids)).tolist() == expected


def test_features_of_one_table_have_the_same_addresses_and_others_do_not() -> None:
    ebc, ids = collection(), torch.arange(500)
    assert torch.equal(ebc.addresses("item", ids), ebc.addresses("last_item", ids))
    assert not torch.equal(ebc.addresses("item", ids), ebc.addresses("user", ids))


def test_materialize_gives_a_copy_without_gradient() -> None:
    ebc = collection()
    vectors = ebc.materialize("t_user", torch.arange(5))
    assert not vectors.requires_grad
    before = ebc.embedding_bags["memory_8"].weight.detach().clone()
    vectors.zero_()
    assert torch.equal(ebc.embedding_bags["memory_8"].weight, before)


@pytest.mark.parametrize(
    "ids",
    [torch.tensor([1.0]), torch.tensor([True]), torch.tensor([[1]]), torch.tensor(1), torch.tensor([1j])],
    ids=["float", "bool", "matrix", "scalar", "complex"],
)
def test_ids_that_are_not_a_list_of_integers_are_refused(ids: Tensor) -> None:
    ebc = collection()
    with pytest.raises(TypeError, match=f"integer tensor.*{ids.dtype}"):
        ebc.addresses("user", ids)
    with pytest.raises(TypeError, match=f"integer tensor.*{ids.dtype}"):
        ebc.materialize("t_user", ids)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    ebc, ids = collection(), torch.tensor([1])
    with pytest.raises(ValueError, match="unknown feature 't_user'.*'user', 'place', 'item', 'last_item'"):
        ebc.addresses("t_user", ids)
    with pytest.raises(ValueError, match="unknown table 'user'.*'t_user', 't_place', 't_item'"):
        ebc.materialize("user", ids)


# What TorchRec sees.


def test_it_is_an_embedding_bag_collection_with_one_table_for_each_memory() -> None:
    ebc = collection()
    assert isinstance(ebc, EmbeddingBagCollection) and not ebc.is_weighted()
    memories = ebc.embedding_bag_configs()
    assert [(c.name, c.embedding_dim, c.feature_names) for c in memories] == [
        ("memory_8", 8, ["user", "item", "last_item"]),
        ("memory_16", 16, ["place"]),
    ]
    # (900 + 400) * 32 / 10 bytes are 130 rows of 32, 300 * 64 / 10 are 30 rows of 64
    assert [tuple(bag.weight.shape) for bag in ebc.embedding_bags.values()] == [(130, 8), (30, 16)]
    assert [name for name, _ in ebc.named_parameters()] == [f"embedding_bags.{c.name}.weight" for c in memories]
    assert [table.name for table in ebc.tables] == ["t_user", "t_place", "t_item"]
    assert ebc.config == CONFIG


def test_the_given_tables_are_not_changed() -> None:
    tables = make_tables()
    before = copy.deepcopy(tables)
    collection(tables)
    assert [str(table) for table in tables] == [str(table) for table in before]


@weighted_or_not
def test_a_deep_copy_is_alike_and_apart(is_weighted: bool) -> None:
    tables = make_tables()
    ebc = collection(tables, allocation=learned(tables), is_weighted=is_weighted)
    features = kjt(BAGS, weights=is_weighted)
    other = copy.deepcopy(ebc)
    expected = ebc(features).values().detach().clone()
    assert torch.equal(other(features).values(), expected)
    assert other.allocation.fingerprint == ebc.allocation.fingerprint
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(ebc(features).values(), expected)
    with pytest.raises(ValueError, match="allocation"):  # the copy checks what it loads
        other.load_state_dict(collection().state_dict())


def test_a_pickled_collection_is_alike() -> None:
    tables = make_tables()
    ebc = collection(tables, allocation=learned(tables))
    other = pickle.loads(pickle.dumps(ebc))
    assert torch.equal(other(kjt(BAGS)).values(), ebc(kjt(BAGS)).values())


def test_dlrm_trains_with_it() -> None:
    torch.manual_seed(0)
    ebc = collection(make_tables(dims=(8,)))
    model = DLRM(
        embedding_bag_collection=ebc,
        dense_in_features=3,
        dense_arch_layer_sizes=[16, 8],
        over_arch_layer_sizes=[16, 1],
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    dense, labels = torch.randn(3, 3), torch.tensor([1.0, 0.0, 1.0])
    losses = []
    for _ in range(20):
        loss = nn.functional.binary_cross_entropy_with_logits(model(dense, kjt(BAGS)).squeeze(1), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[1] < losses[0]


# The meta device.


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
@pytest.mark.parametrize("data_type", [DataType.FP32, DataType.BF16])
def test_a_collection_made_on_meta_comes_to_life(device, data_type: DataType) -> None:
    tables = make_tables(data_type=data_type)
    allocation = learned(tables)
    ebc = collection(tables, allocation=allocation, device=device)
    assert all(p.is_meta for p in ebc.parameters())
    ebc.to_empty(device="cpu")
    with torch.no_grad():  # what `to_empty` leaves may be anything: make it the worst
        for tensor in (*ebc.parameters(), *ebc.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 77)
    ebc.reset_parameters()
    normal = collection(tables, allocation=allocation)
    for feature in FEATURES:
        ids = torch.arange(-20, 50)
        assert torch.equal(ebc.addresses(feature, ids), normal.addresses(feature, ids))
    for config in ebc.embedding_bag_configs():
        weight, bound = ebc.embedding_bags[config.name].weight, config.num_embeddings**-0.5
        assert weight.isfinite().all(), "reset_parameters left the weights as to_empty made them"
        assert 0.8 * bound < weight.abs().max().item() <= 1.01 * bound
    assert_pooled(ebc(kjt(BAGS)), reference_pooled(ebc, kjt(BAGS), PoolingType.SUM), rtol=1e-2, atol=1e-2)
    assert {name: t.shape for name, t in ebc.state_dict().items()} == {
        name: t.shape for name, t in normal.state_dict().items()
    }


def test_a_state_dict_brings_a_collection_on_meta_to_life() -> None:
    source = collection()
    ebc = collection(device=torch.device("meta"))
    ebc.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(ebc(kjt(BAGS)).values(), source(kjt(BAGS)).values())


def test_reset_parameters_gives_other_weights_and_the_same_addresses() -> None:
    ebc = collection()
    weights, rows = ebc.embedding_bags["memory_8"].weight.detach().clone(), ebc.addresses("user", torch.arange(9))
    ebc.reset_parameters()
    assert not torch.equal(ebc.embedding_bags["memory_8"].weight, weights)
    assert torch.equal(ebc.addresses("user", torch.arange(9)), rows)


# State dicts and checkpoints.


@with_or_without_allocation
def test_a_state_dict_carries_everything(kind: str) -> None:
    tables = make_tables()
    allocation = learned(tables) if kind == "learned" else None
    ebc, other = (collection(tables, allocation=allocation) for _ in range(2))
    other.reset_parameters()
    assert not torch.equal(other(kjt(BAGS)).values(), ebc(kjt(BAGS)).values())
    result = other.load_state_dict(ebc.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(other(kjt(BAGS)).values(), ebc(kjt(BAGS)).values())


def test_a_state_dict_survives_a_file(tmp_path: Path) -> None:
    tables = make_tables()
    ebc, other = (collection(tables, allocation=learned(tables)) for _ in range(2))
    other.reset_parameters()
    torch.save(ebc.state_dict(), tmp_path / "state")
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert torch.equal(other(kjt(BAGS)).values(), ebc(kjt(BAGS)).values())


class Tower(nn.Module):
    def __init__(self, ebc: LMAEmbeddingBagCollection) -> None:
        super().__init__()
        self.sparse = ebc


def other_collection(what_differs: str) -> LMAEmbeddingBagCollection:
    tables = make_tables()
    return {
        "seed": lambda: collection(config=LMAConfig(compression=10, chunk_dim=4, seed=3)),
        "allocation": lambda: collection(tables, allocation=learned(tables)),
        "rows": lambda: collection(config=LMAConfig(compression=11, chunk_dim=4, seed=2)),
        "chunk_dim": lambda: collection(config=LMAConfig(compression=10, chunk_dim=8, seed=2)),
    }[what_differs]()


@pytest.mark.parametrize("what_differs", ["seed", "allocation", "rows", "chunk_dim"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("nested", [False, True])
def test_a_state_dict_of_other_addresses_is_refused_before_anything_is_loaded(
    what_differs: str, strict: bool, nested: bool
) -> None:
    ebc, other = collection(), other_collection(what_differs)
    before = {name: tensor.clone() for name, tensor in ebc.state_dict().items()}
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(9.0)
    module, state = (Tower(ebc), Tower(other).state_dict()) if nested else (ebc, other.state_dict())
    with pytest.raises(ValueError) as raised:
        module.load_state_dict(state, strict=strict)
    assert ebc.allocation.fingerprint in str(raised.value)
    assert other.allocation.fingerprint in str(raised.value)
    for name, tensor in ebc.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    ebc(kjt(BAGS))  # still usable


def test_a_checkpoint_of_the_same_addresses_loads_in_place(tmp_path: Path) -> None:
    tables = make_tables()
    ebc, other = (collection(tables, allocation=learned(tables)) for _ in range(2))
    other.reset_parameters()
    dcp.save(ebc.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    dcp.load(other.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(other(kjt(BAGS)).values(), ebc(kjt(BAGS)).values())


def test_a_checkpoint_of_other_addresses_read_in_place_is_caught_at_the_next_forward(tmp_path: Path) -> None:
    ebc, other = collection(), other_collection("seed")
    dcp.save(ebc.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    other(kjt(BAGS))
    dcp.load(other.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    for _ in range(2):  # not only once
        with pytest.raises(ValueError) as raised:
            other(kjt(BAGS))
        assert ebc.allocation.fingerprint in str(raised.value)
        assert collection(config=other.config).allocation.fingerprint in str(raised.value)


def test_materialize_and_addresses_catch_a_checkpoint_of_other_addresses_too(tmp_path: Path) -> None:
    ebc, other = collection(), other_collection("seed")
    dcp.save(ebc.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    dcp.load(other.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    for read in (
        lambda: other.materialize("t_user", torch.arange(3)),
        lambda: other.addresses("user", torch.arange(3)),
    ):
        with pytest.raises(ValueError, match=ebc.allocation.fingerprint):
            read()


def test_a_state_dict_kept_over_a_forward_is_checked_as_well(tmp_path: Path) -> None:
    ebc, other = collection(), other_collection("seed")
    dcp.save(ebc.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    kept = other.state_dict()
    other(kjt(BAGS))
    dcp.load(kept, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match=ebc.allocation.fingerprint):
        other(kjt(BAGS))


# Bad input.


@pytest.mark.parametrize(
    "keys, said",
    [
        (["user", "place", "item"], r"missing \['last_item'\]"),
        ([*FEATURES, "color"], r"unknown \['color'\]"),
        (["user", "place", "item", "color"], r"missing \['last_item'\], unknown \['color'\]"),
        (["user", "place", "item", "item"], r"missing \['last_item'\]"),
        ([*FEATURES, "item"], r"expected each of .* once"),
    ],
)
def test_missing_unknown_and_repeated_features_are_named(keys: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        collection()(kjt({key: [[1]] for key in keys} | {"color": [[1]]}, keys))


def test_a_batch_size_for_each_feature_needs_inverse_indices() -> None:
    features = KeyedJaggedTensor(
        keys=FEATURES,
        values=torch.arange(5),
        lengths=torch.ones(5, dtype=torch.int32),
        stride_per_key_per_rank=[[2], [1], [1], [1]],
    )
    with pytest.raises(ValueError, match="VBE.*inverse_indices"):
        collection()(features)


def test_missing_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="is_weighted=True.*no weights"):
        collection(is_weighted=True)(kjt(BAGS))


def test_weights_for_an_unweighted_collection_are_not_used() -> None:
    ebc = collection()
    assert torch.equal(ebc(kjt(BAGS, weights=True)).values(), ebc(kjt(BAGS)).values())


def test_an_unsupported_torchrec_is_refused_at_import() -> None:
    code = """if True:
        import torchrec
        for version in ("1.7.0", "1.9.0", "1.18.0", "2.8.0"):
            torchrec.__version__ = version
            try:
                import torchrec_lma
            except ImportError as error:
                print(error)
        torchrec.__version__ = "1.8.1"
        import torchrec_lma
        print("imported")
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    *errors, last = run.stdout.splitlines()
    for error, version in zip(errors, ("1.7.0", "1.9.0", "1.18.0", "2.8.0"), strict=True):
        assert error.startswith(f"torchrec_lma works with torchrec 1.8.x, found {version}; install")
    assert last == "imported"


def test_inference_mode() -> None:
    with torch.inference_mode():
        ebc = collection()
        assert ebc(kjt({key: [[1]] for key in FEATURES})).values().shape[0] == 1
