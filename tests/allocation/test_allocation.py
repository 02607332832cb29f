"""Building allocations from rows: who owns rows, who shares, what it costs; and that only the rows decide."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from support.integer_reference import index_order, reference_key, reference_mix64, reference_salt, reference_unmix64
from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection
from torchrec_lma.allocation import RowsMinHash
from torchrec_lma.allocation.bitmap import build_bitmap
from torchrec_lma.allocation.layout import Level, default_widths
from torchrec_lma.allocation.ownership import Costs, choose_owners
from torchrec_lma.allocation.sample import RowSample
from torchrec_lma.owners import RangeOwners

Row = dict[str, list[int]]  # feature -> ids


def holds_for_every_input(max_examples: int) -> settings:
    return settings(derandomize=True, deadline=None, max_examples=max_examples)


def table(name: str, dim: int = 8, features: Sequence[str] = (), num_embeddings: int = 1000, **options):
    names = list(features) or [name]
    return EmbeddingBagConfig(
        name=name, num_embeddings=num_embeddings, embedding_dim=dim, feature_names=names, **options
    )


TABLES = [table("user"), table("item", features=["item", "last_item"]), table("day", dim=16), table("tag")]
FEATURES = ["user", "item", "last_item", "day", "tag"]
TABLE_OF = {feature: t.name for t in TABLES for feature in t.feature_names}
CONFIG = LMAConfig(compression=100)
SOURCE = RowsMinHash(power=1, num_values=2, min_support=1)
every_kind_of_ids = pytest.mark.parametrize("raw_ids", [False, True], ids=["vocabulary", "raw"])


def kjt(rows: Sequence[Row], features: Sequence[str] = FEATURES, dtype: torch.dtype = torch.int64) -> KeyedJaggedTensor:
    bags = [row.get(feature, []) for feature in features for row in rows]
    return KeyedJaggedTensor(
        keys=list(features),
        values=torch.tensor([id for bag in bags for id in bag], dtype=dtype),
        lengths=torch.tensor([len(bag) for bag in bags], dtype=torch.int32),
    )


def some_rows(n: int, seed: int = 0) -> list[Row]:
    """Rows with few ids, so that many occur often; some bags empty or of several ids; some rows twice."""
    random = torch.Generator().manual_seed(seed)

    def ids(most: int, bag: int) -> list[int]:
        size = int(torch.randint(0, bag + 1, (1,), generator=random))
        return (torch.rand(size, generator=random) ** 2 * most).long().tolist()

    rows = [
        {"user": ids(80, 1), "item": ids(30, 1), "last_item": ids(30, 2), "day": ids(8, 1), "tag": ids(40, 3)}
        for _ in range(n)
    ]
    return rows + rows[: n // 4]


def build(rows: Sequence[Row], tables=TABLES, config: LMAConfig = CONFIG, **options) -> Allocation:
    features = list(dict.fromkeys(feature for t in tables for feature in t.feature_names))
    return AllocationBuilder(tables, config, **options).update(kjt(rows, features)).build()


def level_rows(allocation: Allocation, table: str, ids: Sequence[int], tables=TABLES) -> torch.Tensor:
    """int64 [levels, N]"""
    ebc = LMAEmbeddingBagCollection(tables, allocation)
    return torch.stack(list(ebc.rows(table, torch.tensor(ids, dtype=torch.int64)).values()))


# References in plain integers.


def keys_of(row: Row, seed: int = 0) -> list[int]:
    """The mixed keys of a row, repeated ones included."""
    return [reference_key(seed, (TABLE_OF[feature], id)) for feature, ids in row.items() for id in ids]


def content_hash(row: Row, seed: int = 0) -> int:
    return reference_mix64(sum(reference_mix64(key) for key in keys_of(row, seed)))


def counted(rows: Sequence[Row], tables: Sequence[str]) -> Counter:
    """How often each (table, id) occurs, of some tables."""
    return Counter(
        (TABLE_OF[feature], id)
        for row in rows
        for feature, ids in row.items()
        if TABLE_OF[feature] in tables
        for id in ids
    )


# What the result depends on.


@st.composite
def ways_to_see_rows(draw: st.DrawFn, n: int) -> tuple[list[list[list[int]]], list[str]]:
    """A partition of shuffled row numbers into builders and their batches, and an order of the features."""
    order = draw(st.permutations(range(n)))
    cuts = sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=6))})
    batches = [order[a:b] for a, b in itertools.pairwise(cuts)]
    owners = draw(st.lists(st.integers(0, 2), min_size=len(batches), max_size=len(batches)))
    builders = [[batch for batch, owner in zip(batches, owners) if owner == k] for k in range(3)]
    return builders, draw(st.permutations(FEATURES))


@pytest.mark.parametrize("max_ids", [1 << 24, 20], ids=["counted", "sketched"])
@pytest.mark.parametrize("max_rows", [None, 1, 7, 40])
@every_kind_of_ids
def test_the_order_of_rows_batches_and_merges_does_not_matter(
    raw_ids: bool, max_rows: int | None, max_ids: int
) -> None:
    rows = some_rows(48)
    config = replace(CONFIG, raw_ids=raw_ids)
    options: dict[str, Any] = {"source": replace(SOURCE, max_rows=max_rows), "max_ids": max_ids}
    expected = build(rows, config=config, **options)
    sampled = max_rows is not None and max_ids == 20
    assert expected.provenance["frequency"] == ("sketched" if sampled else "counted")

    @holds_for_every_input(10)
    @given(ways_to_see_rows(len(rows)), st.permutations(range(3)), st.booleans())
    def check(way: tuple[list[list[list[int]]], list[str]], merge_order: list[int], backwards: bool) -> None:
        plan, features = way
        builders = []
        for batches in plan:
            builder = AllocationBuilder(TABLES, config, **options)
            for batch in batches:
                seen = [{f: ids[::-1] if backwards else ids for f, ids in rows[number].items()} for number in batch]
                builder.update(kjt(seen, features))
            builders.append(builder)
        first, second, third = (builders[k] for k in merge_order)
        allocation = first.merge(second.merge(third)).build()
        assert allocation.fingerprint == expected.fingerprint
        assert allocation.provenance == expected.provenance

    check()


def test_updates_after_a_merge_count_as_well() -> None:
    rows = some_rows(60)
    source = replace(SOURCE, max_rows=20)
    one, other = (AllocationBuilder(TABLES, CONFIG, source=source) for _ in range(2))
    one.update(kjt(rows[:20]))
    other.update(kjt(rows[20:50]))
    one.merge(other).update(kjt(rows[50:]))
    assert one.build().fingerprint == build(rows, source=source).fingerprint
    assert other.build().fingerprint == build(rows[20:50], source=source).fingerprint  # the other is left as it was


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.uint64]
)
def test_ids_of_any_integer_type_build_the_same_allocation(dtype: torch.dtype) -> None:
    rows = some_rows(40)
    builder = AllocationBuilder(TABLES, CONFIG, source=SOURCE).update(kjt(rows, dtype=dtype))
    assert builder.build().fingerprint == build(rows, source=SOURCE).fingerprint


def test_building_twice_gives_the_same_and_goes_on() -> None:
    rows = some_rows(40)
    builder = AllocationBuilder(TABLES, CONFIG, source=SOURCE).update(kjt(rows[:10]))
    assert builder.build().fingerprint == builder.build().fingerprint
    assert builder.update(kjt(rows[10:])).build().fingerprint == build(rows, source=SOURCE).fingerprint


def test_a_batch_without_rows_changes_nothing() -> None:
    rows = some_rows(20)
    nothing = KeyedJaggedTensor(
        keys=FEATURES, values=torch.empty(0, dtype=torch.int64), lengths=torch.empty(0, dtype=torch.int32)
    )
    builder = AllocationBuilder(TABLES, CONFIG).update(nothing).update(kjt(rows)).update(nothing)
    allocation = builder.merge(AllocationBuilder(TABLES, CONFIG).update(nothing)).build()
    assert allocation.fingerprint == build(rows).fingerprint
    assert allocation.provenance == build(rows).provenance


def test_rows_without_ids_are_not_counted() -> None:
    rows = some_rows(20)
    empty: Row = {feature: [] for feature in FEATURES}
    with_empty = build([empty, *rows, empty])
    assert with_empty.fingerprint == build(rows).fingerprint
    assert with_empty.provenance["rows_seen"] == sum(any(row.values()) for row in rows)


def test_features_of_no_table_are_not_looked_at() -> None:
    rows = some_rows(30)
    with_more = [{**row, "color": [5, -7]} for row in rows]
    builder = AllocationBuilder(TABLES, CONFIG, source=SOURCE).update(kjt(with_more, [*FEATURES[::-1], "color"]))
    assert builder.build().fingerprint == build(rows, source=SOURCE).fingerprint


def test_a_feature_of_two_tables_counts_for_both() -> None:
    tables = [table("small", features=["user"]), table("large", features=["user", "item"])]
    rows: list[Row] = [{"user": [i % 7], "item": [i]} for i in range(40)]
    ids = build(rows, tables).provenance["ids"]
    assert (ids["small"]["seen"], ids["large"]["seen"]) == (7, 40)


@pytest.mark.parametrize("max_rows", [1, 10, 50, 10_000])
def test_the_sample_is_the_distinct_rows_of_smallest_hash_with_their_counts(max_rows: int) -> None:
    rows = some_rows(100, seed=1)
    count = Counter(content_hash(row) for row in rows if any(row.values()))
    reference = sorted(count)[:max_rows]
    keys = {content_hash(row): sorted(keys_of(row)) for row in rows}
    sample = RowSample(max_rows)
    for start in range(0, len(rows), 9):
        batch = rows[start : start + 9]
        numbered = [(key, number) for number, row in enumerate(batch) for key in keys_of(row)]
        sample.add(
            torch.tensor([key for key, _ in numbered]),
            torch.zeros(len(numbered), dtype=torch.int16),
            torch.tensor([number for _, number in numbered]),
            len(batch),
        )
    held = sample.rows()
    assert held.hash.tolist() == reference
    assert held.count.tolist() == [count[h] for h in reference]
    assert [sorted(part.tolist()) for part in held.keys.split(held.lengths.tolist())] == [keys[h] for h in reference]
    assert sample.rows_seen == sum(count.values())


def test_batches_of_which_no_row_is_sampled_take_no_memory() -> None:
    sample = RowSample(max_rows=1000)
    row = torch.zeros(1, dtype=torch.int64)
    for _ in range(100):
        sample.add(row[:0], row[:0].to(torch.int16), row[:0], n_rows=1)
    assert len(sample._parts) <= 5


# Who owns rows.


def reference_bytes(own: Sequence[int], widths: Sequence[int], value_bytes: int, positions: int | None) -> int:
    """Rows, narrow ones filled up to 4 columns together, and 6 bytes an id and 12 of an index, or 8 bytes for each 32
    ids that a bitmap is about."""
    total = sum(-(-n * width // 4) * 4 * value_bytes for n, width in zip(own, widths))
    for k, n in enumerate(own):
        within = own[k - 1] if k else positions
        if within is None:
            total += 6 * n + 12 if n else 0
        elif 0 < n < within:
            total += -(-within // 32) * 8
    return total


some_counts = st.lists(st.integers(1, 60) | st.integers(1, 10**6), min_size=1, max_size=40)
some_widths = st.sampled_from([(4,), (1, 1, 2, 4), (2, 2, 4), (4, 4, 8, 48), (8, 4, 4)])


@holds_for_every_input(300)
@given(some_counts, some_widths, st.sampled_from([0, 1, 2]), st.sampled_from([2, 4]), st.floats(0, 1.2))
def test_columns_are_earned_in_proportion_to_a_power_of_the_frequency(
    counts: list[int], widths: tuple[int, ...], skew: int, value_bytes: int, share: float
) -> None:
    counts = sorted(counts, reverse=True)
    n, ends = len(counts), list(itertools.accumulate(widths))
    budget = int(share * n * (sum(widths) * value_bytes + 6))

    def cost(own: Sequence[int]) -> int:
        return reference_bytes(own, widths, value_bytes, None)

    def earned(c: float) -> list[int]:
        """How many ids earn each level: those with c * count ** skew >= its end."""
        return [sum(c >= end / count**skew for count in counts) for end in ends]

    steps = [[0] * len(widths), *(earned(c) for c in sorted({end / count**skew for count in counts for end in ends}))]
    fit = [own for own in steps if cost(own) <= budget]
    expected = fit[-1]
    if len(fit) < len(steps):  # what is left goes to ids that the next step would reach, first level first
        for k, most in enumerate(steps[len(fit)]):
            # As many as fit, and all before all but one: a level that all those before own needs no bitmap.
            for rows in range(min(most, expected[k - 1] if k else n), expected[k], -1):
                more = [*expected[:k], rows, *expected[k + 1 :]]
                if cost(more) <= budget:
                    expected = more
                    break
    assert choose_owners(np.array(counts), widths, skew, budget, Costs(widths, value_bytes, None)) == expected


@holds_for_every_input(300)
@given(some_counts, some_widths, st.floats(0, 3), st.floats(-0.1, 1.2), st.none() | st.integers(40, 500))
def test_owners_are_nested_and_within_the_budget(
    counts: list[int], widths: tuple[int, ...], skew: float, share: float, positions: int | None
) -> None:
    counts = sorted(counts, reverse=True)
    budget = int(share * len(counts) * (sum(widths) * 2 + 6))
    own = choose_owners(np.array(counts), widths, skew, budget, Costs(widths, 2, positions))
    assert all(0 <= b <= a for a, b in itertools.pairwise([len(counts), *own]))
    assert reference_bytes(own, widths, 2, positions) <= max(budget, 0)


def by_frequency(rows: Sequence[Row], tables: Sequence[str], raw_ids: bool, seed: int = 0) -> list[tuple[str, int]]:
    """The (table, id) of some tables, most frequent first; equally frequent ones in the order of their keys, or of a
    vocabulary of their values and then of the tables."""
    count = counted(rows, tables)

    def place(entry: tuple[str, int]) -> tuple[int, int, int]:
        table, id = entry
        return -count[entry], reference_key(seed, entry) if raw_ids else id, list(tables).index(table)

    return sorted(count, key=place)


@every_kind_of_ids
@pytest.mark.parametrize("skew", [0, 0.5, 1.5])
def test_the_most_frequent_ids_own_rows(raw_ids: bool, skew: float) -> None:
    rows = some_rows(400, seed=2)
    compression = 150 if raw_ids else 100
    allocation = build(rows, config=LMAConfig(compression, skew=skew, seed=3, raw_ids=raw_ids))
    owned = 0
    for memory in allocation.memories:
        in_order = by_frequency(rows, memory.tables, raw_ids, seed=3)
        for k, level in enumerate(memory.levels):
            owners = set()
            for name in memory.tables:
                found = level_rows(allocation, name, range(100))[k]
                owners |= {(name, id) for id, row in enumerate(found.tolist()) if 0 <= row < level.own_rows}
            assert owners == set(in_order[: level.own_rows])
            owned += len(owners)
        of_table = allocation.provenance["ids"]
        for name in memory.tables:
            own = [sum(t == name for t, _ in in_order[: level.own_rows]) for level in memory.levels]
            assert of_table[name]["own"] == own
    assert owned > 20


def test_more_skew_gives_more_columns_to_fewer_ids() -> None:
    rows: list[Row] = [{"user": [i % (1 + i % 40)]} for i in range(4000)]
    widths = (4, 4, 8, 16)
    tables = [table("user", dim=32, num_embeddings=40)]

    def own(skew: float) -> list[int]:
        config = LMAConfig(compression=8, widths=widths, skew=skew)
        (memory,) = build(rows, tables, config).memories
        return [level.own_rows for level in memory.levels]

    assert own(0)[0] == 40 and own(0)[2:] == [0, 0]  # all ids the same, and what is left to as many as it gives more
    assert own(2)[0] == own(0.5)[0] == 40 and own(2)[1] < own(0.5)[1] and own(2)[-1] > own(0.5)[-1]


def test_equal_ids_of_different_tables_are_counted_apart() -> None:
    # 7 is frequent as a user and rare as an item, so that only user 7 owns a row.
    rows: list[Row] = [{"user": [7], "item": [100 + i]} for i in range(20)] + [{"user": [8], "item": [7]}]
    tables = [table("user"), table("item")]
    config = LMAConfig(memory_bytes=64, widths=(8,), raw_ids=True)
    allocation = build(rows, tables, config)
    (level,) = allocation.memories[0].levels
    assert level.own_rows == 1
    assert level_rows(allocation, "user", [7], tables).item() == 0
    assert level_rows(allocation, "item", [7], tables).item() > 0


def test_own_rows_of_a_vocabulary_sorted_by_frequency_are_the_ids_themselves() -> None:
    rows: list[Row] = [{"user": [i]} for i in range(200) for _ in range(1 + 2000 // (i + 1))]
    tables = [table("user", dim=16)]
    allocation = build(rows, tables, LMAConfig(compression=32, skew=0.5))
    (memory,) = allocation.memories
    found = level_rows(allocation, "user", range(200), tables)
    assert memory.levels[0].own_rows > 100 and memory.levels[1].own_rows > 2
    for k, level in enumerate(memory.levels):
        assert found[k, : level.own_rows].tolist() == list(range(level.own_rows))


@pytest.mark.parametrize("compression", [8, 40, 200])
@pytest.mark.parametrize("unseen_first", [0, 1, 3])
def test_vocabularies_sorted_by_frequency_need_no_bitmap(compression: float, unseen_first: int) -> None:
    """Their rows are those that bitmaps of the same owners would give."""
    tables = [
        table(name, dim=16, num_embeddings=size) for name, size in (("user", 3000), ("item", 2000), ("tag", 1000))
    ]
    builder = AllocationBuilder(tables, LMAConfig(compression, skew=1))
    for i, each in enumerate(tables):
        ids = np.arange(unseen_first, each.num_embeddings - 20)
        counts = 1 + 50000 * (i + 1) // (ids + 1)
        counts[ids == 0] = (1, 40, 9000)[i]  # id 0 stands for all that is unknown
        builder.add_counts(each.name, ids, counts)
    allocation = builder.build()
    (memory,) = allocation.memories
    assert memory.tensors and all(name.endswith(".ranges") for name in memory.tensors)
    assert memory.nbytes == 3 * 16 * len(memory.tensors)

    members = torch.arange(sum(t.num_embeddings for t in tables))
    words = {}
    for k, level in enumerate(memory.levels):
        ranges = memory.tensors.get(f"owners.{k}.ranges")
        if ranges is not None:
            chosen = torch.cat([members[a:b] for a, b in ranges.tolist()])
            words[f"owners.{k}.words"] = build_bitmap(chosen, members.numel())
        members = torch.arange(level.own_rows)
    with_bitmaps = replace(allocation, memories=(replace(memory, tensors=words),))
    assert with_bitmaps.nbytes > allocation.nbytes
    for each in tables:
        ids = range(-5, each.num_embeddings + 5)
        assert torch.equal(
            level_rows(allocation, each.name, ids, tables), level_rows(with_bitmaps, each.name, ids, tables)
        )


def test_ids_outside_of_the_vocabulary_own_nothing_and_share_what_the_unseen_share() -> None:
    rows: list[Row] = [{"user": [-3, 5000, 5000, 5000, i % 50]} for i in range(300)]
    tables = [table("user")]
    allocation = build(rows, tables, LMAConfig(compression=60))
    ids = allocation.provenance["ids"]["user"]
    assert (ids["seen"], ids["out_of_vocabulary"], ids["own"][0]) == (52, 2, 50)
    (level, *_) = allocation.memories[0].levels
    first = level_rows(allocation, "user", [-3, 5000, -(2**63), 2**63 - 1], tables)[0]
    assert all(level.own_rows <= row < level.rows for row in first.tolist())


@pytest.mark.parametrize("compression, widths", [(2, (16,)), (4, (8,)), (8, (4,)), (16, (2,)), (32, (1,))])
def test_the_first_level_is_as_wide_as_the_budget_allows_to_all(compression: int, widths: tuple[int, ...]) -> None:
    """Of FP32 tables of dim 16 half is due to FP16; where all ids of the vocabularies are seen no byte is left over."""
    tables = [table("user", dim=16, num_embeddings=60), table("item", dim=16, num_embeddings=20)]
    rows: list[Row] = [{"user": [i], "item": [i % 20]} for i in range(60)]
    (memory,) = build(rows, tables, LMAConfig(compression)).memories
    assert [level.width for level in memory.levels if level.rows] == list(widths)
    assert memory.levels[0] == Level(widths[0], own_rows=80, shared_rows=0) and memory.nbytes == 0
    # With a byte less they have the next narrower one, and what is left goes to the most frequent.
    (memory,) = build(rows, tables, LMAConfig(memory_bytes=80 * 64 // compression - 1)).memories
    first, second, *_ = memory.levels
    if widths[0] > 1:
        assert first.width < widths[0] and first.own_rows == 80 and 0 < second.own_rows < 80
    else:
        assert first.own_rows < 80 and first.shared_rows > 0 == second.own_rows


@pytest.mark.parametrize(
    "seen, first", [(49, Level(8, own_rows=100, shared_rows=0)), (48, Level(16, own_rows=48, shared_rows=1))]
)
def test_ids_that_were_not_seen_own_a_row_unless_the_others_would_own_twice_as_much(seen: int, first: Level) -> None:
    rows: list[Row] = [{"user": [2 * i]} for i in range(seen)]
    tables = [table("user", dim=16, num_embeddings=100)]
    allocation = build(rows, tables, LMAConfig(compression=4))
    assert allocation.memories[0].levels[0] == first
    found = level_rows(allocation, "user", [1, 3, 99], tables)[0].tolist()
    assert found == ([1, 3, 99] if first.shared_rows == 0 else [48] * 3)
    assert allocation.provenance["ids"]["user"]["present"][0] == 1.0  # also of ids that may come


def test_a_table_of_which_nothing_was_seen_is_present_on_the_level_of_all() -> None:
    tables = [table("user", dim=16, num_embeddings=60), table("item", dim=16, num_embeddings=20)]
    allocation = build([{"user": [i]} for i in range(60)], tables, LMAConfig(compression=4))
    assert allocation.memories[0].levels[0].own_rows == 80
    assert [allocation.provenance["ids"][name]["present"][0] for name in ("user", "item")] == [1.0, 1.0]


@pytest.mark.parametrize("seen", [60, 50, 10])
@pytest.mark.parametrize("widths", [None, {16: (4, 12), 6: (4, 2)}])
def test_a_budget_of_full_tables_is_full_tables(seen: int, widths: Any) -> None:
    tables = [table("user", dim=16, num_embeddings=60), table("item", dim=6, num_embeddings=20)]
    rows: list[Row] = [{"user": [i], "item": [i % 15]} for i in range(seen)]
    for memory in build(rows, tables, LMAConfig(compression=1, widths=widths)).memories:
        assert all(level.own_rows == (60 if memory.dim == 16 else 20) for level in memory.levels)
        assert all(level.width == 16 for level in memory.levels if memory.dim == 16 and widths is None)


def test_two_raw_ids_with_one_key_in_the_index_share_its_row() -> None:
    """Two ids whose mixed keys agree in bucket and low bits: the index knows one of them."""
    keys = [0x0123_4567_0000_0005, 0x0765_4321_0000_0005, 0x0100_0000_0000_0006]
    ids = [reference_unmix64(key) ^ reference_salt("table", 0, "user") for key in keys]
    rows: list[Row] = [{"user": [id]} for id in ids for _ in range(9)] + [{"user": [i]} for i in range(3)]
    tables = [table("user", dim=16)]
    config = LMAConfig(compression=1, widths=(4, 4, 8), raw_ids=True)
    allocation = build(rows, tables, config)
    (memory,) = allocation.memories
    assert [level.own_rows for level in memory.levels] == [5, 5, 5]
    found = level_rows(allocation, "user", [*ids, 0, 1, 2], tables)
    assert torch.equal(found[:, 0], found[:, 1])
    assert sorted(found[0, 1:].tolist()) == list(range(5))
    skewed = build(rows, tables, replace(config, compression=None, memory_bytes=200))
    (memory,) = skewed.memories
    assert [memory.tensors["owners.0.low"].numel()] == [memory.levels[0].own_rows]
    assert level_rows(skewed, "user", ids, tables)[0].max() < memory.levels[0].own_rows


def test_provenance_tells_where_the_allocation_came_from() -> None:
    rows: list[Row] = [{"user": [i % 3], "item": [i], "day": [0]} for i in range(12)]
    tables = [table("user", num_embeddings=100_000), table("item"), table("day", dim=16)]
    source, config = replace(SOURCE, min_support=2), LMAConfig(compression=8)
    allocation = build(rows, tables, config, source=source, shared_fraction=1.0)
    assert allocation.provenance == {
        "source": {
            "name": "rows-minhash",
            "power": 1,
            "num_values": 2,
            "min_support": 2,
            "max_rows": 1 << 20,
            "within_table": False,
            "weighted": False,
        },
        "signature_fraction": 0.125,
        "shared_fraction": 1.0,
        "frequency": "counted",
        "rows_seen": 12,
        "rows_sampled": 12,
        "ids": {
            name: {
                "seen": seen,
                "out_of_vocabulary": 0,
                "own": [0],
                "present": [1.0],
                "with_signature": with_signature,
                "sharing_by_signature": 0,
            }
            for name, seen, with_signature in (("user", 3, 3), ("item", 12, 0), ("day", 1, 1))
        },
    }


def test_counts_come_from_a_sketch_beyond_max_ids() -> None:
    rows: list[Row] = [{"user": [i % 5]} for i in range(400)] + [{"user": [100 + i]} for i in range(400)]
    source = replace(SOURCE, max_rows=200)
    allocation = build(rows, [table("user")], LMAConfig(memory_bytes=700), source=source, max_ids=50)
    assert allocation.provenance["frequency"] == "sketched"
    assert allocation.provenance["rows_sampled"] == 200
    found = level_rows(allocation, "user", range(5), [table("user")])
    assert found[-1].max() < allocation.memories[0].levels[-1].own_rows  # the frequent ones have all levels


@pytest.mark.parametrize("raw_ids", [False, True])
def test_ids_that_the_sample_lacks_do_not_share_a_row_with_all_others(raw_ids: bool) -> None:
    n = 2000
    rows: list[Row] = [{"user": [i]} for i in range(n) for _ in range(1 + 300 // (i + 1))]
    tables, config = [table("user", dim=16, num_embeddings=n)], LMAConfig(compression=8, raw_ids=raw_ids)
    allocation = build(rows, tables, config, source=replace(SOURCE, max_rows=200), max_ids=50)
    assert allocation.provenance["frequency"] == "sketched" and allocation.provenance["ids"]["user"]["seen"] == 200
    first = level_rows(allocation, "user", range(n), tables)[0].tolist()
    if raw_ids:  # an eighth of the budget is for them
        assert max(Counter(first).values()) < 200
    else:
        assert len(set(first)) == n


# Signatures.


def signed_ids(rows: Sequence[Row], min_support: int, tables: Sequence[EmbeddingBagConfig]) -> dict[str, int]:
    allocation = build(
        rows, tables, LMAConfig(compression=1), source=replace(SOURCE, min_support=min_support), shared_fraction=1.0
    )
    return {name: ids["with_signature"] for name, ids in allocation.provenance["ids"].items()}


@pytest.mark.parametrize("min_support", [1, 2, 3, 5, 100])
def test_ids_in_fewer_rows_than_min_support_have_no_signature(min_support: int) -> None:
    # user i is in i + 1 rows, every item in one
    rows: list[Row] = [{"user": [i], "item": [100 * i + k]} for i in range(10) for k in range(i + 1)]
    expected = {"user": sum(i + 1 >= min_support for i in range(10)), "item": len(rows) if min_support == 1 else 0}
    assert signed_ids(rows, min_support, [table("user"), table("item")]) == expected


def test_an_id_twice_in_one_row_is_in_one_row() -> None:
    tables = [table("user"), table("item", features=["item", "last_item"])]
    in_one_bag: list[Row] = [{"user": [i % 2], "item": [100 + i, 100 + i], "last_item": []} for i in range(10)]
    in_two_features: list[Row] = [{"user": [i % 2], "item": [100 + i], "last_item": [100 + i]} for i in range(10)]
    for rows in (in_one_bag, in_two_features):
        assert signed_ids(rows, 2, tables) == {"user": 2, "item": 0}


@every_kind_of_ids
def test_signatures_are_minhashes_of_the_rows_with_the_id(raw_ids: bool) -> None:
    rows = some_rows(60, seed=3)
    tables = {dim: [t.name for t in TABLES if t.embedding_dim == dim] for dim in (8, 16)}
    for power, num_values in ((1, 2), (2, 1), (3, 2)):
        source = RowsMinHash(power=power, num_values=num_values, min_support=1)
        config = LMAConfig(compression=2, widths={8: (4, 4), 16: (4, 12)}, seed=5, raw_ids=raw_ids)
        allocation = build(rows, config=config, source=source, shared_fraction=1.0, signature_fraction=0.9)
        hashes_with: dict[tuple[str, int], set[int]] = {}
        for row in rows:
            for feature, ids in row.items():
                for id in ids:
                    hashes_with.setdefault((TABLE_OF[feature], id), set()).add(content_hash(row, seed=5))
        for memory in allocation.memories:
            assert list(memory.tables) == tables[memory.dim]
            expected: dict[Any, Any] = {}
            for (name, id), hashes in hashes_with.items():
                if name in memory.tables:
                    expected[name, id] = []
                    for k in range(num_values):
                        value = 0
                        for p in range(power):
                            salt = reference_salt("minhash", 5, k, p)
                            value = reference_mix64(value ^ min(reference_mix64(h ^ salt) for h in hashes))
                        expected[name, id].append(value >> 32)
            if raw_ids:
                by_key = {reference_key(5, entry): entry for entry in expected}
                order = [by_key[key] for key in index_order(list(by_key))]
            else:
                order = sorted(expected, key=lambda entry: (memory.tables.index(entry[0]), entry[1]))
            signatures = memory.tensors["signatures"]
            assert signatures.dtype is torch.int32
            assert signatures.tolist() == [expected[entry] for entry in order]


@pytest.mark.parametrize("widths, expected", [((16,), 1), ((8, 8), 2), ((2,) * 8, 4)])
def test_no_more_values_are_stored_than_there_are_shared_levels(widths: tuple[int, ...], expected: int) -> None:
    rows: list[Row] = [{"user": [i % 5]} for i in range(20)]
    source = RowsMinHash(num_values=4, min_support=1)
    config = LMAConfig(compression=8, widths=widths)
    (memory,) = build(rows, [table("user", dim=16)], config, source=source, shared_fraction=1.0).memories
    assert memory.tensors["signatures"].shape == (5, expected)


def test_only_ids_that_share_have_signatures_the_frequent_first() -> None:
    rows = some_rows(400, seed=2)
    tables = [t for t in TABLES if t.name != "day"]
    config = LMAConfig(compression=150, raw_ids=True)
    allocation = build(rows, tables, config, source=SOURCE, signature_fraction=0.3)
    for memory in allocation.memories:
        in_order = by_frequency(rows, memory.tables, raw_ids=True)
        own, n = memory.levels[0].own_rows, memory.tensors["signatures"].size(0)
        assert 0 < own < own + n <= len(in_order)
        for name in memory.tables:
            ids = allocation.provenance["ids"][name]
            assert ids["with_signature"] == sum(t == name for t, _ in in_order[own : own + n])


@every_kind_of_ids
def test_bytes_that_no_signature_takes_go_to_rows(raw_ids: bool) -> None:
    """Ids in three rows or more have signatures, but those all own rows."""
    rows: list[Row] = [{"user": [i % 60]} for i in range(600)] + [{"user": [100 + i], "item": [i]} for i in range(400)]
    config = LMAConfig(compression=60, raw_ids=raw_ids)
    tables = [table("user", num_embeddings=3000), table("item")]
    without = build(rows, tables, config)
    (level, *_) = without.memories[0].levels
    assert 60 < level.own_rows < 460 and level.shared_rows
    with_source = build(rows, tables, config, source=RowsMinHash(min_support=3), signature_fraction=0.5)
    assert with_source.fingerprint == without.fingerprint


def test_without_a_source_there_are_no_signatures() -> None:
    for source in (None, {}, {"user": None}):
        allocation = build(some_rows(50), config=LMAConfig(compression=700), source=source, signature_fraction=0.9)
        assert allocation.provenance["signature_fraction"] == 0.0
        for memory in allocation.memories:
            assert memory.levels[0].shared_rows and not any(name.startswith("sign") for name in memory.tensors)


# What nobody owns.


@every_kind_of_ids
def test_with_only_shared_rows_every_id_is_hashed(raw_ids: bool) -> None:
    for widths in (None, {8: (4, 2, 2), 16: (1, 1, 2, 12)}):
        config = replace(CONFIG, widths=widths, raw_ids=raw_ids)
        allocation = build(some_rows(50), config=config, shared_fraction=1.0)
        assert allocation.fingerprint == Allocation.hashed(TABLES, config).fingerprint
        assert allocation.nbytes == 0
    assert [len(m.levels) for m in Allocation.hashed(TABLES, CONFIG).memories] == [1, 1]


def test_a_memory_of_which_nothing_is_known_is_hashed() -> None:
    rows: list[Row] = [{"user": [i % 9]} for i in range(50)]
    tables = [table("user"), table("day", dim=16), table("tag", dim=4)]
    allocation = build(rows, tables)
    hashed = {memory.dim: memory.header() for memory in Allocation.hashed(tables, CONFIG).memories}
    assert [m.header() == hashed[m.dim] for m in allocation.memories] == [False, True, True]


def test_where_a_bitmap_takes_all_bytes_everything_is_shared() -> None:
    tables = [table("user", dim=4, num_embeddings=1_000_000)]  # whose bitmap is 187,500 bytes
    rows: list[Row] = [{"user": [2 * (i % 50)]} for i in range(500)]
    config = LMAConfig(memory_bytes=100_000)
    allocation = build(rows, tables, config)
    assert allocation.fingerprint == Allocation.hashed(tables, config).fingerprint


# Budgets.

WEIGHT_BYTES = {"FP32": 4, "FP16": 2, "BF16": 2}
DATA = some_rows(300, seed=4)
some_tables = st.lists(
    st.tuples(
        st.integers(1, 100) | st.integers(1, 5000),
        st.sampled_from([1, 2, 3, 4, 6, 8, 16, 30, 64]),
        st.sampled_from([DataType.FP32, DataType.FP16, DataType.BF16]),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


@holds_for_every_input(250)
@given(
    some_tables,
    st.floats(1, 1000) | st.sampled_from([1.0, 2.0, 16.0]),
    st.booleans(),
    st.sampled_from([None, *WEIGHT_BYTES]),
    st.floats(0, 2),
    st.none() | st.floats(0, 1) | st.just(1.0),
    st.floats(0, 0.99),
    st.sampled_from([None, RowsMinHash(num_values=1, min_support=1), RowsMinHash(num_values=9, min_support=1)]),
)
def test_weights_and_allocation_are_within_the_budget(
    parts: list[tuple[int, int, DataType, bool]],
    compression: float,
    in_bytes: bool,
    data_type: str | None,
    skew: float,
    shared_fraction: float | None,
    signature_fraction: float,
    source: RowsMinHash | None,
) -> None:
    features = ["user", "item", "last_item", "tag"]
    tables = [
        table(name, dim, num_embeddings=size, data_type=of_table)
        for name, (size, dim, of_table, _) in zip(features, parts)
    ]
    full = {t.name: t.num_embeddings * t.embedding_dim * WEIGHT_BYTES[t.data_type.name] for t in tables}
    total = sum(full.values())
    raw = tuple(t.name for t, (*_, raw_ids) in zip(tables, parts) if raw_ids)
    config = LMAConfig(
        None if in_bytes else compression,
        max(1, int(total / compression)) if in_bytes else None,
        data_type=data_type,
        skew=skew,
        raw_ids=raw,
    )
    options = {
        "source": source,
        "shared_fraction": shared_fraction,
        "signature_fraction": signature_fraction,
    }
    try:
        allocation = AllocationBuilder(tables, config, **options).update(kjt(DATA)).build()  # type: ignore[arg-type]
    except ValueError as error:
        assert "not one row" in str(error)
        return
    # What is really held: tensors of the module and of its remap, buffers that follow from the allocation included.
    ebc = LMAEmbeddingBagCollection(tables, allocation)
    weights = {name: bag.weight.nbytes for name, bag in ebc.levels.embedding_bags.items()}
    for memory in allocation.memories:
        of_memory = [name for name in weights if name.startswith(f"{memory.name}_level_")]
        sets = [*ebc.remap.memories[memory.name].owners, getattr(ebc.remap.memories[memory.name], "signed", None)]
        held = sum(
            one.ranges.nbytes if isinstance(one, RangeOwners) else sum(buffer.nbytes for buffer in one.buffers())
            for one in sets
            if one is not None
        )
        held += memory.tensors["signatures"].nbytes if "signatures" in memory.tensors else 0
        assert memory.nbytes == held
        # Shared in proportion to full bytes.
        part = (config.memory_bytes or total / compression) * sum(full[name] for name in memory.tables) / total
        assert sum(weights[name] for name in of_memory) + held <= part * (1 + 1e-12)
    report = ebc.memory_report()
    assert report.weight_bytes == sum(weights.values())
    assert report.weight_bytes + report.allocation_bytes <= (config.memory_bytes or total / compression)
    assert report.full_bytes == total and report.allocation_bytes == allocation.nbytes


@holds_for_every_input(60)
@given(st.floats(2, 60), st.sampled_from([0.0, 0.5, 1.0]), st.booleans(), st.none() | st.just((4, 4, 8)))
def test_the_budget_is_used(compression: float, skew: float, raw_ids: bool, widths: tuple[int, ...] | None) -> None:
    n = 3000
    rows: list[Row] = [{"user": [i]} for i in range(n) for _ in range(1 + 300 // (i + 1))]
    config = LMAConfig(compression=compression, widths=widths, skew=skew, raw_ids=raw_ids)
    allocation = build(rows, [table("user", dim=16, num_embeddings=n)], config)
    report = LMAEmbeddingBagCollection([table("user", dim=16, num_embeddings=n)], allocation).memory_report()
    (memory,) = allocation.memories
    if all(level.own_rows >= n for level in memory.levels):
        return
    used = report.weight_bytes + report.allocation_bytes
    # An index is budgeted 6 bytes a key and 12, and takes 5 at least; a level that is not begun would need a bitmap.
    spare = memory.levels[0].own_rows + 12 if raw_ids else n / 64 * 12
    assert used > n * 16 * 4 / compression - spare - n / 64 * 12 - 16 * 2 - 12


@pytest.mark.parametrize("config", [LMAConfig(memory_bytes=15), LMAConfig(compression=1001)], ids=["bytes", "ratio"])
def test_a_budget_below_one_row_is_refused_with_the_numbers(config: LMAConfig) -> None:
    tables = [table("user", num_embeddings=500)]  # 16,000 bytes; a row of 8 columns of FP16 is 16
    said = r"'user_lma8' is 15 bytes, .*one row of 8 columns of 2 bytes.*(compression|memory_bytes)"
    with pytest.raises(ValueError, match=said):
        Allocation.hashed(tables, config)
    with pytest.raises(ValueError, match=said):
        build([{"user": [1]}], tables, config)


def test_a_level_of_too_many_rows_is_refused() -> None:
    tables = [table("user", dim=4, num_embeddings=2**32)]
    with pytest.raises(ValueError, match=f"{2**31} rows, the most is {2**31 - 1}"):
        Allocation.hashed(tables, LMAConfig(compression=4))
    fits = Allocation.hashed(tables, LMAConfig(memory_bytes=8 * (2**31 - 1)))
    assert fits.memories[0].levels[0].rows == 2**31 - 1
    # Not for each id of such a vocabulary, whatever the budget.
    assert build([{"user": [1]}], tables, LMAConfig(compression=1)).memories[0].levels[0] == Level(4, 1, 1)


@holds_for_every_input(200)
@given(st.integers(1, 300), st.integers(0, 9).map(lambda power: 2**power))
def test_default_widths_add_up_and_fit_kernels(dim: int, first: int) -> None:
    widths = default_widths(dim, min(first, dim))
    assert sum(widths) == dim
    assert all(width % 4 == 0 or width in (1, 2) for width in widths)


@holds_for_every_input(60)
@given(st.integers(1, 70), st.floats(1, 40), st.floats(0, 2), st.booleans())
def test_chosen_widths_fit_kernels(dim: int, compression: float, skew: float, raw_ids: bool) -> None:
    config = LMAConfig(compression=compression, skew=skew, raw_ids=raw_ids)
    try:
        allocation = build(DATA, [table("user", dim=dim, num_embeddings=100)], config)
    except ValueError as error:
        assert "not one row" in str(error)
        return
    for memory in allocation.memories:
        assert sum(level.width for level in memory.levels) == dim
        assert all(level.width % 4 == 0 or level.width in (1, 2) for level in memory.levels)


# What is refused.


@pytest.mark.parametrize(
    "keys, said", [(FEATURES[:-1], r"lacks features \['tag'\]"), (["color"], r"lacks features \['day', .*\['color'\]")]
)
def test_update_names_missing_features(keys: list[str], said: str) -> None:
    builder = AllocationBuilder(TABLES, CONFIG)
    rows: list[Row] = [{key: [1] for key in keys}]
    with pytest.raises(ValueError, match=said):
        builder.update(kjt(rows, keys))
    with pytest.raises(ValueError, match="no training row"):  # nothing of it was taken
        builder.build()


@pytest.mark.parametrize("inverse_indices", [None, (["user", "item"], torch.tensor([[0, 1], [0, 0]]))])
def test_update_refuses_a_batch_size_for_each_feature(inverse_indices: tuple[list[str], torch.Tensor] | None) -> None:
    features = KeyedJaggedTensor(
        keys=["user", "item"],
        values=torch.tensor([1, 2, 3]),
        lengths=torch.tensor([1, 1, 1]),
        stride_per_key_per_rank=[[2], [1]],
        inverse_indices=inverse_indices,
    )
    with pytest.raises(ValueError, match="VBE"):
        AllocationBuilder([table("user"), table("item")], CONFIG).update(features)


def test_update_refuses_lengths_that_do_not_add_up() -> None:
    features = KeyedJaggedTensor(keys=["user"], values=torch.tensor([1, 2, 3]), lengths=torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="add up to 2 and 3 values"):
        AllocationBuilder([table("user")], CONFIG).update(features)


def test_a_build_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="no training row.*update.*Allocation.hashed"):
        AllocationBuilder(TABLES, CONFIG).build()
    empty = AllocationBuilder(TABLES, CONFIG).update(kjt([{}, {}]))
    with pytest.raises(ValueError, match="no training row"):
        empty.build()


@pytest.mark.parametrize(
    "tables, config, options, said",
    [
        (TABLES, replace(CONFIG, seed=1), {}, "config.*seed=0.*seed=1"),
        (TABLES[:-1], CONFIG, {}, "tables.*'tag'"),
        (TABLES, CONFIG, {"source": replace(SOURCE, power=3)}, "source.*power=1.*power=3"),
        (TABLES, CONFIG, {"source": None}, "source.*None"),
        (TABLES, CONFIG, {"shared_fraction": 0.1}, "shared_fraction: None and 0.1"),
        (TABLES, CONFIG, {"signature_fraction": 0.1}, "signature_fraction: 0.125 and 0.1"),
        (TABLES, CONFIG, {"max_ids": 5}, "max_ids: 16777216 and 5"),
    ],
)
def test_merging_other_settings_names_the_differences(tables, config, options, said: str) -> None:
    rows = some_rows(10)
    builder = AllocationBuilder(TABLES, CONFIG, source=SOURCE).update(kjt(rows))
    other = AllocationBuilder(tables, config, **{"source": SOURCE, **options})
    with pytest.raises(ValueError, match=said):
        builder.merge(other)
    assert builder.build().fingerprint == build(rows, source=SOURCE).fingerprint


@pytest.mark.parametrize(
    "options, said",
    [
        ({"shared_fraction": 1.1}, "shared_fraction must be in"),
        ({"shared_fraction": -0.1}, "shared_fraction.*-0.1"),
        ({"signature_fraction": 1.0}, "signature_fraction.*1.0"),
        ({"signature_fraction": float("nan")}, "signature_fraction.*nan"),
        ({"source": None, "signature_fraction": 2.0}, "signature_fraction.*2.0"),
        ({"max_ids": 0}, "max_ids must be >= 1"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AllocationBuilder(TABLES, CONFIG, **options)


@pytest.mark.parametrize("name", ["power", "num_values", "min_support", "max_rows"])
def test_bad_source_settings_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        RowsMinHash(**{name: 0})
    with pytest.raises(TypeError, match=f"{name} must be an int, got 1.5"):
        RowsMinHash(**{name: 1.5})


@pytest.mark.parametrize(
    "tables, config, said",
    [
        ([], CONFIG, "tables is empty"),
        ([table("a"), table("a")], CONFIG, "'a'.*twice"),
        ([table("")], CONFIG, "empty"),
        ([table("a", dim=6)], replace(CONFIG, widths=(4, 4)), "add up to 8.*embedding_dim 6"),
        ([table("a", dim=6)], replace(CONFIG, widths=(6,)), "width 6 fits no kernel"),
        ([table("a", dim=6)], replace(CONFIG, widths=(3, 3)), "width 3 fits no kernel"),
        ([table("a", data_type=DataType.INT8)], CONFIG, "'a'.*INT8.*FP32, FP16, BF16"),
        ([table("a", num_embeddings=0, weight_init_min=-1.0, weight_init_max=1.0)], CONFIG, "'a'.*num_embeddings=0"),
        ([table("a")], replace(CONFIG, raw_ids=("a", "b")), r"\['b'\], which do not exist.*\['a'\]"),
    ],
)
def test_tables_that_cannot_be_are_refused(tables, config: LMAConfig, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AllocationBuilder(tables, config)
    with pytest.raises(ValueError, match=said):
        Allocation.hashed(tables, config)


def test_tables_of_one_memory_may_pool_and_be_declared_differently() -> None:
    tables = [table("a"), table("b", pooling=PoolingType.MEAN, data_type=DataType.FP16), table("c", dim=16)]
    config = replace(CONFIG, raw_ids=("c",))
    assert [(m.name, m.tables) for m in Allocation.hashed(tables, config).memories] == [
        ("a_lma8", ("a", "b")),
        ("c_lma16", ("c",)),
    ]
    apart = replace(CONFIG, raw_ids=("b",))  # their rows are found in different ways
    assert [m.name for m in Allocation.hashed(tables, apart).memories] == ["a_lma8", "b_lma8", "c_lma16"]
