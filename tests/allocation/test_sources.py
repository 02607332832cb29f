"""Semantic sources: each theorem against similarities computed in plain Python, mixtures of sources, and bad input."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection
from torchrec_lma.allocation import ContextMinHash, RowsMinHash, SimHash, Source
from torchrec_lma.allocation.sources import context_minhash

Row = dict[str, list[int]]  # feature -> ids; every feature is a table of its own here
Id = tuple[str, int]

K = 4
FIELDS = ("user", "item", "tag", "day")
TABLES = [
    EmbeddingBagConfig(name=name, num_embeddings=25_000, embedding_dim=32, feature_names=[name]) for name in FIELDS
]
# As in the paper: levels of equal width, on which all ids share.
CONFIG = LMAConfig(compression=4, widths=(8,) * K, seed=3)


def kjt(rows: Sequence[Row]) -> KeyedJaggedTensor:
    bags = [row.get(name, []) for name in FIELDS for row in rows]
    return KeyedJaggedTensor(
        keys=list(FIELDS),
        values=torch.tensor([id for bag in bags for id in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for bag in bags]),
    )


def build(rows: Sequence[Row], source: Any, tables=TABLES, config: LMAConfig = CONFIG, **options: Any) -> Allocation:
    options = {"shared_fraction": 1.0, "signature_fraction": 0.5, **options}
    return AllocationBuilder(tables, config, source, **options).update(kjt(rows)).build()


def signature_of(allocation: Allocation, table: str, ids: Sequence[int]) -> list[list[int] | None]:
    """The stored values of ids of a vocabulary, None where one has no signature."""
    (memory,) = allocation.memories
    if "signatures" not in memory.tensors:
        return [None] * len(ids)
    members = sum((word & 2**32 - 1) << 32 * i for i, word in enumerate(memory.tensors["signed.words"].tolist()))
    in_order = np.flatnonzero(np.array(list(bin(members)[:1:-1])) == "1").tolist()
    first = 25_000 * FIELDS.index(table)
    signatures = dict(zip(in_order, memory.tensors["signatures"].tolist(), strict=True))
    return [signatures.get(first + id) for id in ids]


def shared_levels(allocation: Allocation, first: Sequence[Id], second: Sequence[Id]) -> Tensor:
    """bool [pairs, K]: on which of the first K levels two ids have one row."""
    ebc = LMAEmbeddingBagCollection(TABLES, allocation)

    def rows(ids: Sequence[Id]) -> Tensor:
        (table,) = {table for table, _ in ids}
        return torch.stack(list(ebc.rows(table, torch.tensor([id for _, id in ids])).values()), dim=1)

    return rows(first)[:, :K] == rows(second)[:, :K]


def assert_theorem(shared: Tensor, similarity: Sequence[float], power: int, rows: int) -> None:
    """The pairs share as many rows as J ** power + (1 - J ** power) / rows says: the similar third of them, the
    dissimilar third and the middle one, each within 4 standard errors."""
    expected = torch.tensor(similarity, dtype=torch.float64) ** power
    expected = (expected + (1 - expected) / rows).unsqueeze(1).expand(-1, K)
    for third in torch.argsort(expected[:, 0]).chunk(3):
        p = expected[third]
        standard_error = float((p * (1 - p)).sum().sqrt())
        assert abs(float(shared[third].sum() - p.sum())) <= 4 * standard_error + 1e-9


# Data: blocks of rows with ids of their own, so that one pair of ids from each block makes independent trials.

BLOCKS = 240


def blocks_of_rows() -> list[list[Row]]:
    draw = random.Random(0)
    blocks = []
    for block in range(BLOCKS):

        def one(most: int, first: int = 100 * block) -> list[int]:
            return [first + draw.randrange(most)]

        alike = draw.random()  # how often the two items of a block come with the same user and tags
        rows: list[Row] = []
        for _ in range(draw.randrange(3, 9)):
            user, tags = one(20), sorted({*one(9), *one(9)})
            for item in (0, 1):
                same = draw.random() < alike
                row = {"user": user if same else one(20), "item": [100 * block + item], "tag": tags if same else one(9)}
                row["day"] = one(2)
                rows += [row] * draw.choice([1, 1, 1, 2, 5])  # equal rows count where weights do
        blocks.append(rows)
    return blocks


DATA = blocks_of_rows()
ROWS = [row for block in DATA for row in block]
ITEMS = [("item", 100 * block) for block in range(BLOCKS)], [("item", 100 * block + 1) for block in range(BLOCKS)]
ITEMS_AND_DAYS = ITEMS[0], [("day", 100 * block) for block in range(BLOCKS)]


def jaccard(one: set, other: set) -> float:
    return len(one & other) / len(one | other)


def weighted_jaccard(one: Counter, other: Counter) -> float:
    return sum((one & other).values()) / sum((one | other).values())


def rows_with(rows: Sequence[Row], id: Id) -> Counter:
    return Counter(str(row) for row in rows if id[1] in row[id[0]])


def context(rows: Sequence[Row], id: Id, fields: Sequence[str]) -> Counter:
    return Counter(
        (field, other)
        for row in rows
        if id[1] in row[id[0]]
        for field in fields
        if field != id[0]
        for other in row[field]
    )


def seen_in(rows: Sequence[Row], id: Id) -> bool:
    return any(id[1] in row[id[0]] for row in rows)


def check_theorem(source: Any, pairs: tuple[list[Id], list[Id]], of: Callable[[Sequence[Row], Id, Id], float]) -> None:
    present = [i for i, rows in enumerate(DATA) if all(seen_in(rows, side[i]) for side in pairs)]
    assert len(present) > 0.8 * BLOCKS
    first, second = ([side[i] for i in present] for side in pairs)
    similarity = [of(DATA[i], pairs[0][i], pairs[1][i]) for i in present]
    assert max(similarity) - min(similarity) > 0.5  # the data has what the theorem is about
    allocation = build(ROWS, source)
    (memory,) = allocation.memories
    assert_theorem(shared_levels(allocation, first, second), similarity, source.power, memory.levels[0].rows)


@pytest.mark.parametrize("power", [1, 2])
def test_ids_share_by_the_rows_they_have_in_common(power: int) -> None:
    source = RowsMinHash(power=power, min_support=1)
    check_theorem(source, ITEMS_AND_DAYS, lambda rows, a, b: jaccard(set(rows_with(rows, a)), set(rows_with(rows, b))))


@pytest.mark.parametrize("power", [1, 2])
def test_ids_share_by_the_occurrences_they_have_in_common(power: int) -> None:
    source = RowsMinHash(power=power, min_support=1, weighted=True)
    check_theorem(source, ITEMS_AND_DAYS, lambda rows, a, b: weighted_jaccard(rows_with(rows, a), rows_with(rows, b)))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("fields", [(), ("user",), ("user", "tag")])
def test_ids_of_one_field_share_by_the_context_they_have_in_common(power: int, fields: tuple[str, ...]) -> None:
    source = ContextMinHash(power=power, min_support=1, fields=fields)
    used = fields or FIELDS
    check_theorem(source, ITEMS, lambda rows, a, b: jaccard(set(context(rows, a, used)), set(context(rows, b, used))))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("fields", [(), ("tag",)])
def test_ids_share_by_how_often_they_meet_the_same_context(power: int, fields: tuple[str, ...]) -> None:
    source = ContextMinHash(power=power, min_support=1, weighted=True, fields=fields)
    used = fields or FIELDS
    check_theorem(source, ITEMS, lambda rows, a, b: weighted_jaccard(context(rows, a, used), context(rows, b, used)))


def test_counts_make_a_difference() -> None:
    """Else the tests of weights would pass without weights."""
    contexts = [[context(rows, id, FIELDS) for id in pair] for rows, *pair in zip(DATA, *ITEMS)]
    plain = [jaccard(set(a), set(b)) for a, b in contexts]
    weighted = [weighted_jaccard(a, b) for a, b in contexts]
    assert np.abs(np.subtract(plain, weighted)).mean() > 0.05


@pytest.mark.parametrize("weighted", [False, True])
def test_an_id_twice_in_a_bag_meets_its_context_once(weighted: bool) -> None:
    rows = ROWS[:400]
    twice = [{**row, "item": row["item"] * (1 + n % 3)} for n, row in enumerate(rows)]
    source = ContextMinHash(power=1, min_support=1, weighted=weighted)
    items = sorted({id for row in rows for id in row["item"]})
    once, again = (signature_of(build(data, source), "item", items) for data in (rows, twice))
    assert None not in once
    assert again == once


def test_an_id_without_context_shares_with_none() -> None:
    rows: list[Row] = [{"user": [], "item": [i], "tag": [1], "day": [1]} for i in range(20)]
    rows.append({"user": [1], "item": [99], "tag": [1], "day": [1]})
    for weighted in (False, True):
        allocation = build(rows, ContextMinHash(min_support=1, fields=("user",), weighted=weighted))
        signatures = signature_of(allocation, "item", range(20))
        assert None not in signatures
        assert len({tuple(signature) for signature in signatures if signature}) == 20


@pytest.mark.parametrize("pairs", [1, 50, 700])
def test_weighted_contexts_are_sampled_from_few_pairs_at_a_time(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ROWS[:500]
    source = ContextMinHash(power=1, min_support=1, weighted=True)
    expected = build(rows, source).fingerprint
    of_one_id = max(
        sum(len(row[field]) for row in rows if id in row[name])  # no less than its pairs with one table
        for name in FIELDS
        for id in {id for row in rows for id in row[name]}
        for field in FIELDS
    )
    held = []

    def sample(keys: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        held.append(keys.numel())
        return in_full(keys, *others)

    in_full = context_minhash._consistent_weighted_sample
    monkeypatch.setattr(context_minhash, "_consistent_weighted_sample", sample)
    monkeypatch.setattr(context_minhash, "_PAIRS", pairs)
    assert build(rows, source).fingerprint == expected
    assert 0 < max(held) <= max(pairs, of_one_id) < sum(held) / (2 * len(FIELDS))


def vectors_at(angle: float, pairs: int, length: int = 16) -> tuple[Tensor, Tensor]:
    """float64 [pairs, length] twice, with that angle between the two of a pair."""
    generator = torch.Generator().manual_seed(1)
    one, other = torch.randn(2, pairs, length, generator=generator, dtype=torch.float64)
    one = one / one.norm(dim=1, keepdim=True)
    other = other - (other * one).sum(1, keepdim=True) * one
    other = other / other.norm(dim=1, keepdim=True)
    return 3 * one, math.cos(angle) * one + math.sin(angle) * other  # lengths do not matter


@pytest.mark.parametrize("bits", [1, 8])
@pytest.mark.parametrize("angle", [0.0, 0.2, math.pi / 4, math.pi / 2, math.pi])
def test_ids_share_by_the_angle_between_their_vectors(bits: int, angle: float) -> None:
    pairs = 300
    one, other = vectors_at(angle, pairs)
    ids = torch.arange(2 * pairs)
    allocation = AllocationBuilder.from_vectors(
        TABLES,
        CONFIG,
        {"item": (ids, torch.cat([one, other]).float())},
        SimHash(bits=bits),
        shared_fraction=1.0,
        signature_fraction=0.5,
    ).build()
    shared = shared_levels(allocation, [("item", i) for i in range(pairs)], [("item", pairs + i) for i in range(pairs)])
    assert_theorem(shared, [1 - angle / math.pi] * pairs, bits, allocation.memories[0].levels[0].rows)


@pytest.mark.parametrize("within_table, expected", [(False, 1.0), (True, 0.0)])
def test_equal_vectors_share_across_tables_where_asked(within_table: bool, expected: float) -> None:
    ids, vectors = torch.arange(200), torch.randn(200, 8)
    given = {"item": (ids, vectors), "user": (ids, 2 * vectors), "tag": (ids, torch.cat([vectors, vectors], 1))}
    allocation = AllocationBuilder.from_vectors(TABLES, CONFIG, given, SimHash(within_table=within_table)).build()
    share = lambda table: shared_levels(  # noqa: E731
        allocation, [("item", i) for i in range(200)], [(table, i) for i in range(200)]
    ).double()
    assert float(share("user").mean()) == pytest.approx(expected, abs=0.01)
    assert float(share("tag").mean()) < 0.01  # vectors of another length


def test_tables_of_another_number_of_values_agree_on_those_they_have_in_common() -> None:
    vectors = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    two, four = (SimHash(num_values=n).signatures(vectors, seed=3) for n in (2, 4))
    assert torch.equal(two, four[:, :2])
    assert all((four[:, k] != four[:, 0]).any() for k in (1, 2, 3))


# Within a table; mixtures.


@pytest.mark.parametrize("kind", [RowsMinHash, ContextMinHash])
def test_sharing_within_a_table_leaves_signatures_of_tables_apart(kind: type[RowsMinHash]) -> None:
    # A user and an item that are always together have equal rows, a tag and a day with them equal contexts.
    rows: list[Row] = [{"user": [i], "item": [i], "tag": [i], "day": [i]} for i in range(40) for _ in range(2)]
    for within_table in (False, True):
        allocation = build(rows, kind(min_support=1, within_table=within_table))
        together = [signature_of(allocation, name, range(40)) for name in FIELDS]
        if kind is RowsMinHash:
            assert (together[0] == together[1]) is not within_table
        for one, other in itertools.combinations(together, 2):
            if within_table:
                assert not any(a == b for a, b in zip(one, other))


def test_each_table_may_have_its_own_source() -> None:
    item, user = ContextMinHash(power=1, num_values=4, min_support=1), RowsMinHash(power=3, num_values=2, min_support=2)
    ids = torch.arange(0, 24_000, 100)
    vectors = torch.randn(ids.numel(), 4, generator=torch.Generator().manual_seed(0))
    builder = AllocationBuilder.from_vectors(
        TABLES,
        CONFIG,
        {"day": (ids, vectors)},
        {"item": item, "user": user, "day": SimHash(num_values=3), "tag": None},
        shared_fraction=1.0,
        signature_fraction=0.5,
    )
    mixture = builder.update(kjt(ROWS)).build()
    (memory,) = mixture.memories
    assert memory.tensors["signatures"].size(1) == 4  # the largest K
    some = range(0, 1000)
    assert signature_of(mixture, "tag", some) == [None] * 1000
    assert signature_of(mixture, "item", some) == signature_of(build(ROWS, {"item": item}), "item", some)
    two_values = signature_of(build(ROWS, {"user": user}), "user", some)
    assert signature_of(mixture, "user", some) == [value and value * 2 for value in two_values]
    support = Counter(id for row in {str(row): row for row in ROWS}.values() for id in row["user"])
    assert [value is not None for value in two_values] == [support[id] >= 2 for id in some]
    days = signature_of(mixture, "day", ids[:9].tolist())
    assert all(value is not None and value[3] == value[0] for value in days)
    ids_with_signature = mixture.provenance["ids"]
    assert {name: kinds["with_signature"] > 0 for name, kinds in ids_with_signature.items()} == {
        "user": True,
        "item": True,
        "tag": False,
        "day": True,
    }
    recorded = mixture.provenance["source"]["tables"]
    assert recorded == {
        "user": user.to_dict(),
        "item": item.to_dict(),
        "day": SimHash(num_values=3).to_dict(),
        "tag": None,
    }


def test_a_source_that_samples_fewer_rows_sees_those_it_would_see_alone() -> None:
    few = RowsMinHash(max_rows=300, min_support=1)
    alone = signature_of(build(ROWS, {"user": few}), "user", range(500))
    beside = signature_of(build(ROWS, {"user": few, "item": RowsMinHash(max_rows=None)}), "user", range(500))
    assert alone == beside and any(alone) and not all(alone)


SOURCES = {
    "rows weighted": RowsMinHash(min_support=1, weighted=True, max_rows=30),
    "context": ContextMinHash(min_support=1, max_rows=30),
    "context weighted": ContextMinHash(min_support=1, weighted=True, within_table=True, max_rows=40),
    "mixture": {
        "user": RowsMinHash(num_values=2, max_rows=45),
        "item": ContextMinHash(fields=("user",), max_rows=50),
        "tag": None,
    },
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
@pytest.mark.parametrize("max_ids", [1 << 24, 25])
def test_the_order_and_spread_of_rows_do_not_matter(source: Any, max_ids: int) -> None:
    rows = ROWS[:150]
    options = {"config": LMAConfig(memory_bytes=30_000), "shared_fraction": None, "max_ids": max_ids}
    expected = build(rows, source, **options)
    assert expected.provenance["frequency"] == ("counted" if max_ids > 25 else "sketched")

    @settings(derandomize=True, deadline=None, max_examples=12)
    @given(st.permutations(range(len(rows))), st.lists(st.integers(0, len(rows)), max_size=4), st.booleans())
    def check(order: list[int], cuts: list[int], left_first: bool) -> None:
        edges = sorted({0, *cuts, len(rows)})
        parts = [[rows[i] for i in order[a:b]] for a, b in itertools.pairwise(edges)]
        builders = [
            AllocationBuilder(TABLES, options["config"], source, max_ids=max_ids, signature_fraction=0.5).update(
                kjt(part)
            )
            for part in parts
        ]
        while len(builders) > 1:
            one, other = builders.pop(0 if left_first else -1), builders.pop(0)
            builders.append(one.merge(other))
        allocation = builders[0].build()
        assert allocation.fingerprint == expected.fingerprint
        assert allocation.provenance == expected.provenance

    check()


# Vectors: frequency, merging, bad input.

ONE_VECTOR = {"item": (torch.tensor([5]), torch.ones(1, 3))}


def test_rows_tell_which_ids_with_vectors_are_frequent() -> None:
    ids = torch.arange(50)
    vectors = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    # One own row of 64 bytes beside a bitmap of 25,000, as much for ten signatures, 8 shared rows.
    own, signed, shared = 64 + 25_000, 10 * 4 + 25_000, 8 * 64
    config = LMAConfig(memory_bytes=own + signed + shared, widths=(32,))
    builder = AllocationBuilder.from_vectors(
        TABLES,
        config,
        {"item": (ids, vectors)},
        signature_fraction=signed / config.memory_bytes,
        shared_fraction=shared / (own + shared),
    )
    rows: list[Row] = [{"item": [i]} for i in (7, 7, 7, 7, *range(20, 30), *range(20, 30))] + [{"item": [100]}] * 3
    allocation = builder.update(kjt(rows)).build()
    expected = {"seen": 12, "own": [1], "with_signature": 10}
    assert expected.items() <= allocation.provenance["ids"]["item"].items()
    with_signature = [i for i, s in enumerate(signature_of(allocation, "item", range(101))) if s]
    assert with_signature == list(range(20, 30))


def test_vectors_may_come_in_parts_and_builders() -> None:
    ids, vectors = torch.randperm(500), torch.randn(500, 6)
    whole = AllocationBuilder.from_vectors(TABLES, CONFIG, {"item": (ids, vectors)})
    one, other = (AllocationBuilder(TABLES, CONFIG, {"item": SimHash()}) for _ in range(2))
    one.add_vectors("item", ids[300:].tolist(), vectors[300:].tolist())
    other.add_vectors("item", ids[:200].numpy(), vectors[:200].numpy()).add_vectors(
        "item", ids[100:300], vectors[100:300]
    )
    expected = whole.build().fingerprint
    assert one.merge(other).build().fingerprint == expected
    assert one.merge(whole).build().fingerprint == expected  # the same vectors again change nothing


def test_two_vectors_for_one_id_are_refused() -> None:
    builder = AllocationBuilder.from_vectors(TABLES, CONFIG, ONE_VECTOR)
    other = AllocationBuilder.from_vectors(TABLES, CONFIG, {"item": (torch.tensor([5]), -torch.ones(1, 3))})
    with pytest.raises(ValueError, match="'item'.*two vectors"):
        builder.add_vectors("item", [5], -torch.ones(1, 3))
    with pytest.raises(ValueError, match="'item'.*two vectors"):
        builder.merge(other)
    with pytest.raises(ValueError, match="'item'.*two vectors"):
        AllocationBuilder.from_vectors(TABLES, CONFIG, {"item": (torch.tensor([5, 5]), torch.randn(2, 9))})


@pytest.mark.parametrize(
    "ids, vectors, error, said",
    [
        ([1, 2], [[1.0], [math.nan]], ValueError, "id 2 of table 'item' has NaN or infinity"),
        ([1, 2], [[math.inf], [1.0]], ValueError, "id 1 of table 'item' has NaN"),
        ([1, 2], [[1.0, 0.0], [0.0, 0.0]], ValueError, "id 2 of table 'item' is zero"),
        ([1, 2], [[1.0]], ValueError, r"\[2\].*\[1, 1\].*one vector for each id"),
        ([1], [1.0], ValueError, r"expected \[n\] and \[n, d\]"),
        ([1], [[]], ValueError, r"\[1, 0\]"),
        ([1], [[2]], TypeError, "int64, expected floating-point"),
        ([1.5], [[1.0]], TypeError, "float32; expected integers"),
        ([2**63], [[1.0]], ValueError, "are not int64|beyond int64"),
        (np.array([2**63 + 9], np.uint64), [[1.0]], ValueError, f"id {2**63 + 9}, beyond int64"),
        (["a"], [[1.0]], ValueError, "are not int64"),
        ([1, 2], [[1.0], [1.0, 2.0]], ValueError, r"vectors of 'item' are not an array of numbers .*expected \[n, d\]"),
        ([1], [["a"]], ValueError, "vectors of 'item' are not an array of numbers"),
        ([1], np.array([["a"]]), ValueError, "vectors of 'item' are not an array of numbers"),
        ([1], None, ValueError, "vectors of 'item' are not an array of numbers"),
    ],
)
def test_bad_vectors_are_refused(ids: Any, vectors: Any, error: type[Exception], said: str) -> None:
    builder = AllocationBuilder(TABLES, CONFIG, {"item": SimHash()})
    with pytest.raises(error, match=said):
        builder.add_vectors("item", ids, vectors)
    with pytest.raises(ValueError, match="no training row"):  # nothing of it was taken
        builder.build()


def test_vectors_of_different_lengths_for_one_table_are_refused() -> None:
    tables = {"item": SimHash(), "user": SimHash()}
    builder, other = (AllocationBuilder(TABLES, CONFIG, tables) for _ in range(2))
    builder.add_vectors("item", [1], [[1.0, 2.0]]).add_vectors("user", [1], [[1.0]])
    expected = builder.build().fingerprint
    with pytest.raises(ValueError, match="'item' was given vectors of length 2 and of length 3"):
        builder.add_vectors("item", [2], [[1.0, 2.0, 3.0]])
    other.add_vectors("user", [2], [[2.0]]).add_vectors("item", [2], [[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match="'item' was given vectors of length 2 and of length 3"):
        builder.merge(other)
    assert builder.build().fingerprint == expected
    empty = AllocationBuilder(TABLES, CONFIG, tables).merge(builder)  # which tells it the lengths
    with pytest.raises(ValueError, match="'item' was given vectors of length 2 and of length 3"):
        empty.merge(other)


@pytest.mark.parametrize("table", ["user", "color"])
def test_vectors_of_a_table_without_simhash_are_refused(table: str) -> None:
    with pytest.raises(ValueError, match=f"{table!r}.*SimHash"):
        AllocationBuilder(TABLES, CONFIG, {"item": SimHash(), "user": RowsMinHash()}).add_vectors(table, [1], [[1.0]])


@pytest.mark.parametrize("values", [torch.tensor([1.5, 2.0]), torch.tensor([True, False])])
def test_ids_that_are_no_integers_are_refused(values: Tensor) -> None:
    features = KeyedJaggedTensor(keys=list(FIELDS), values=values, lengths=torch.tensor([1, 1, 0, 0]))
    with pytest.raises(TypeError, match="KeyedJaggedTensor has ids of torch.(float32|bool); expected integers"):
        AllocationBuilder(TABLES, CONFIG).update(features)


def test_unsigned_ids_beyond_int64_are_refused() -> None:
    def features(ids: list[int]) -> KeyedJaggedTensor:
        values = torch.from_numpy(np.array(ids, np.uint64))
        return KeyedJaggedTensor(keys=list(FIELDS), values=values, lengths=torch.tensor([1, 1, 1, 1]))

    with pytest.raises(ValueError, match=f"id {2**64 - 1}, beyond int64"):
        AllocationBuilder(TABLES, CONFIG).update(features([1, 2**64 - 1, 3, 4]))
    small = AllocationBuilder(TABLES, CONFIG, None).update(features([1, 2, 3, 4])).build()
    rows: list[Row] = [{"user": [1], "item": [2], "tag": [3], "day": [4]}]
    assert small.fingerprint == AllocationBuilder(TABLES, CONFIG, None).update(kjt(rows)).build().fingerprint


def test_a_table_without_any_id_is_refused_unless_it_has_no_source() -> None:
    rows: list[Row] = [{"user": [i % 3], "item": [i], "tag": [1]} for i in range(9)]
    with pytest.raises(ValueError, match=r"'day' has no id in any of the 9 rows.*\['day'\].*leave it out"):
        build(rows, RowsMinHash())
    assert build(rows, None).provenance["ids"]["day"]["seen"] == 0
    allocation = build(rows, {"user": RowsMinHash(), "item": RowsMinHash()})
    assert allocation.provenance["ids"]["user"]["with_signature"] == 3


def test_sources_of_unknown_tables_or_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\['color'\], which do not exist; the tables are .*user"):
        AllocationBuilder(TABLES, CONFIG, {"color": RowsMinHash()})
    with pytest.raises(TypeError, match="'user' is 'rows'"):
        AllocationBuilder(TABLES, CONFIG, {"user": "rows"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"fields \['color'\].*are not tables.*user"):
        AllocationBuilder(TABLES, CONFIG, ContextMinHash(fields=("color",)))


@pytest.mark.parametrize(
    "tables, source",
    [
        (TABLES, {"user": ContextMinHash(fields=("user",)), "item": RowsMinHash()}),
        (TABLES[:1], {"user": ContextMinHash()}),
    ],
)
def test_a_source_that_gives_no_id_a_context_is_refused(tables: Sequence[EmbeddingBagConfig], source: Any) -> None:
    with pytest.raises(ValueError, match="table 'user' would have no context.*another table in fields"):
        AllocationBuilder(tables, CONFIG, source)


def test_provenance_tells_how_many_signatures_agree_with_another() -> None:
    # A user and an item are in one row, which no other of them is in; tags come in twos.
    rows: list[Row] = [{"user": [i], "item": [i], "tag": [i, 100 + i], "day": [i]} for i in range(40)]
    within = build(rows, {name: RowsMinHash(min_support=1, within_table=True) for name in FIELDS})
    ids = within.provenance["ids"]
    assert {name: of_table["sharing_by_signature"] for name, of_table in ids.items()} == {
        "user": 0,
        "item": 0,
        "tag": 80,
        "day": 0,
    }
    across = build(rows, RowsMinHash(min_support=1)).provenance["ids"]
    assert all(of_table["sharing_by_signature"] == of_table["with_signature"] for of_table in across.values())


@pytest.mark.parametrize(
    "make, error, said",
    [
        (lambda: SimHash(bits=33), ValueError, "bits must be at most 32, got 33"),
        (lambda: SimHash(bits=0), ValueError, "bits must be >= 1"),
        (lambda: SimHash(num_values=0), ValueError, "num_values"),
        (lambda: ContextMinHash(fields="user"), TypeError, "sequence of table names"),
        (lambda: ContextMinHash(weighted=1), TypeError, "weighted must be True or False"),
        (lambda: ContextMinHash(power=0), ValueError, "power"),
    ],
)
def test_bad_settings_of_sources_are_refused(make: Callable[[], Source], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        make()


def test_builders_of_other_sources_cannot_be_merged() -> None:
    builder = AllocationBuilder(TABLES, CONFIG, {"item": SimHash(bits=8)})
    with pytest.raises(ValueError, match="source: .*bits=8.* and .*bits=9"):
        builder.merge(AllocationBuilder(TABLES, CONFIG, {"item": SimHash(bits=9)}))
    with pytest.raises(ValueError, match="max_ids: 16777216 and 5"):
        builder.merge(AllocationBuilder(TABLES, CONFIG, {"item": SimHash(bits=8)}, max_ids=5))
