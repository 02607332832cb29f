"""Building allocations from rows, and the artifact: saved, damaged, refused, read back from a checkpoint."""

import itertools
import json
import os
import re
import resource
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from integer_reference import MASK, reference_mix64, reference_salt
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_lma.allocation.allocation as allocation_file
from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection
from torchrec_lma.allocation import MemoryAllocation, RowsMinHash
from torchrec_lma.allocation.index import build_index
from torchrec_lma.allocation.sample import RowSample

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
CONFIG = LMAConfig(compression=8, chunk_dim=4)
SOURCE = RowsMinHash(power=1, num_values=2, min_support=1)


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
        return torch.randint(-most, most, (size,), generator=random).tolist()

    rows = [
        {"user": ids(40, 1), "item": ids(15, 1), "last_item": ids(15, 2), "day": ids(4, 1), "tag": ids(20, 3)}
        for _ in range(n)
    ]
    return rows + rows[: n // 4]


def build(rows: Sequence[Row], tables=TABLES, config: LMAConfig = CONFIG, **options) -> Allocation:
    features = [feature for t in tables for feature in t.feature_names]
    return AllocationBuilder(tables, config, **{"source": SOURCE, **options}).update(kjt(rows, features)).build()


def addresses(allocation: Allocation, feature: str, ids: Sequence[int], tables=TABLES) -> torch.Tensor:
    ebc = LMAEmbeddingBagCollection(tables, allocation.config, allocation)
    return ebc.addresses(feature, torch.tensor(ids, dtype=torch.int64))


# References in plain integers.


TABLE_OF = {feature: t.name for t in TABLES for feature in t.feature_names}


def keys_of(row: Row, seed: int = 0) -> list[int]:
    """The mixed keys of a row, repeated ones included."""
    return [
        reference_mix64(id ^ reference_salt("table", seed, TABLE_OF[feature]))
        for feature, ids in row.items()
        for id in ids
    ]


def content_hash(row: Row, seed: int = 0) -> int:
    return reference_mix64(sum(reference_mix64(key) for key in keys_of(row, seed)))


# Building.


@st.composite
def ways_to_see_rows(draw: st.DrawFn, n: int) -> tuple[list[list[list[int]]], list[str]]:
    """A partition of shuffled row numbers into builders and their batches, and an order of the features."""
    order = draw(st.permutations(range(n)))
    cuts = sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=6))})
    batches = [order[a:b] for a, b in itertools.pairwise(cuts)]
    owners = draw(st.lists(st.integers(0, 2), min_size=len(batches), max_size=len(batches)))
    builders = [[batch for batch, owner in zip(batches, owners) if owner == k] for k in range(3)]
    return builders, draw(st.permutations(FEATURES))


@pytest.mark.parametrize("max_rows", [None, 1, 7, 40])
def test_the_order_of_rows_batches_and_merges_does_not_matter(max_rows: int | None) -> None:
    rows = some_rows(48)
    source = replace(SOURCE, max_rows=max_rows)
    expected = build(rows, source=source)

    @holds_for_every_input(25)
    @given(ways_to_see_rows(len(rows)), st.permutations(range(3)), st.booleans())
    def check(way: tuple[list[list[list[int]]], list[str]], merge_order: list[int], backwards: bool) -> None:
        plan, features = way
        builders = []
        for batches in plan:
            builder = AllocationBuilder(TABLES, CONFIG, source=source)
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


def test_int32_ids_build_the_same_allocation() -> None:
    rows = some_rows(40)
    builder = AllocationBuilder(TABLES, CONFIG, source=SOURCE).update(kjt(rows, dtype=torch.int32))
    assert builder.build().fingerprint == build(rows).fingerprint


def test_building_twice_gives_the_same_and_goes_on() -> None:
    rows = some_rows(40)
    builder = AllocationBuilder(TABLES, CONFIG, source=SOURCE).update(kjt(rows[:10]))
    assert builder.build().fingerprint == builder.build().fingerprint
    assert builder.update(kjt(rows[10:])).build().fingerprint == build(rows).fingerprint


def test_a_batch_without_rows_changes_nothing() -> None:
    rows = some_rows(20)
    nothing = KeyedJaggedTensor(
        keys=FEATURES, values=torch.empty(0, dtype=torch.int64), lengths=torch.empty(0, dtype=torch.int32)
    )
    builder = AllocationBuilder(TABLES, CONFIG, source=SOURCE).update(nothing).update(kjt(rows)).update(nothing)
    allocation = builder.merge(AllocationBuilder(TABLES, CONFIG, source=SOURCE).update(nothing)).build()
    assert allocation.fingerprint == build(rows).fingerprint
    assert allocation.provenance == build(rows).provenance


def test_rows_without_ids_are_not_counted() -> None:
    rows = some_rows(20)
    empty: Row = {feature: [] for feature in FEATURES}
    with_empty = build([empty, *rows, empty])
    assert with_empty.fingerprint == build(rows).fingerprint
    assert with_empty.provenance["rows_seen"] == sum(any(row.values()) for row in rows)


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


@pytest.mark.parametrize("max_rows", [1, 10, 50, 10_000])
def test_no_more_than_max_rows_are_kept(max_rows: int) -> None:
    rows = some_rows(100, seed=1)
    distinct = {content_hash(row) for row in rows if any(row.values())}
    provenance = build(rows, source=replace(SOURCE, max_rows=max_rows)).provenance
    assert provenance["rows_sampled"] == min(max_rows, len(distinct))
    assert provenance["rows_seen"] == sum(any(row.values()) for row in rows)


def test_batches_of_which_no_row_is_sampled_take_no_memory() -> None:
    sample = RowSample(max_rows=1000)
    row = torch.zeros(1, dtype=torch.int64)
    for _ in range(100):
        sample.add(row[:0], row[:0].to(torch.int16), row[:0], n_rows=1)
    assert len(sample._parts) <= 5


# Which ids become what.


def dedicated_ids(allocation: Allocation, memory: str, feature: str, ids: Sequence[int], tables=TABLES) -> set[int]:
    """The ids whose chunks are all in one row that is set aside."""
    n = next(m.dedicated_rows for m in allocation.memories if m.name == memory)
    rows = addresses(allocation, feature, ids, tables)
    return {id for id, row in zip(ids, rows.tolist()) if row[0] < n and len(set(row)) == 1}


def test_the_most_frequent_ids_are_the_dedicated_ones() -> None:
    rows = some_rows(400, seed=2)
    allocation = build(rows, dedicated_fraction=0.2)
    for memory in allocation.memories:
        count = Counter(
            (TABLE_OF[feature], id)
            for row in rows
            for feature, ids in row.items()
            if TABLE_OF[feature] in memory.tables
            for id in ids
        )
        dedicated = set()
        for name in memory.tables:
            feature = next(f for f, t in TABLE_OF.items() if t == name)
            ids = sorted(id for t, id in count if t == name)
            dedicated |= {(name, id) for id in dedicated_ids(allocation, memory.name, feature, ids)}
        assert 0 < len(dedicated) == memory.dedicated_rows
        if memory.name == "memory_8":
            assert len(dedicated) < len(count)
        others = [n for entry, n in count.items() if entry not in dedicated]
        assert min(count[entry] for entry in dedicated) >= max(others, default=0)


def test_equal_ids_of_different_tables_are_counted_apart() -> None:
    # 7 is frequent as a user and rare as an item, so only user 7 gets the one dedicated row.
    rows: list[Row] = [{"user": [7], "item": [100 + i]} for i in range(20)] + [{"user": [8], "item": [7]}]
    tables = [table("user"), table("item")]
    config = LMAConfig(memory_bytes=40 * 32, chunk_dim=4)
    allocation = build(rows, tables, config, source=None, dedicated_fraction=40 / (40 * 32))  # one row: 32 + 6 bytes
    assert [m.dedicated_rows for m in allocation.memories] == [1]
    assert dedicated_ids(allocation, "memory_8", "user", [7, 8], tables) == {7}
    assert dedicated_ids(allocation, "memory_8", "item", [7, 100], tables) == set()


def test_provenance_tells_where_the_allocation_came_from() -> None:
    rows: list[Row] = [{"user": [i % 3], "item": [i], "day": [0]} for i in range(12)]
    tables = [table("user", num_embeddings=100_000), table("item"), table("day", dim=16)]
    allocation = build(rows, tables, source=replace(SOURCE, min_support=2), dedicated_fraction=0.0)
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
        "dedicated_fraction": 0.0,
        "signature_fraction": 0.125,
        "frequency": "counted",
        "rows_seen": 12,
        "rows_sampled": 12,
        "ids": {
            "memory_8": {
                "user": {"seen": 3, "dedicated": 0, "with_signature": 3, "sharing": 0},
                "item": {"seen": 12, "dedicated": 0, "with_signature": 0, "sharing": 0},
            },
            "memory_16": {"day": {"seen": 1, "dedicated": 0, "with_signature": 1, "sharing": 0}},
        },
    }


def signed_ids(rows: Sequence[Row], min_support: int, tables: Sequence[EmbeddingBagConfig]) -> dict[str, int]:
    allocation = build(rows, tables, LMAConfig(compression=1), source=replace(SOURCE, min_support=min_support),
                       dedicated_fraction=0.0)  # fmt: skip
    (ids,) = allocation.provenance["ids"].values()
    return {name: kinds["with_signature"] for name, kinds in ids.items()}


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


def test_signatures_are_minhashes_of_the_rows_with_the_id() -> None:
    rows = some_rows(60, seed=3)
    for power, num_values in ((1, 2), (2, 1), (3, 2)):
        source = RowsMinHash(power=power, num_values=num_values, min_support=1)
        config = LMAConfig(compression=1, chunk_dim=4, seed=5)
        allocation = build(rows, config=config, source=source, dedicated_fraction=0.0, signature_fraction=0.9)
        hashes_with: dict[tuple[str, int], set[int]] = {}
        for row in rows:
            for feature, ids in row.items():
                for id in ids:
                    hashes_with.setdefault((TABLE_OF[feature], id), set()).add(content_hash(row, seed=5))
        for memory in allocation.memories:
            expected = {}
            for (name, id), hashes in hashes_with.items():
                if name in memory.tables:
                    key = reference_mix64(id ^ reference_salt("table", 5, name))
                    expected[key] = []
                    for k in range(num_values):
                        value = 0
                        for p in range(power):
                            salt = reference_salt("minhash", 5, k, p)
                            value = reference_mix64(value ^ min(reference_mix64(h ^ salt) for h in hashes))
                        expected[key].append(value >> 32)
            # The order of the index: buckets by high bits, inside them by the signed low half.
            n_buckets = memory.signature_starts.numel() - 1
            order = sorted(
                expected,
                key=lambda key: ((key & MASK) * n_buckets >> 64, ((key & 0xFFFFFFFF) ^ 0x80000000)),
            )
            assert memory.signatures.dtype is torch.int32
            assert memory.signatures.tolist() == [expected[key] for key in order]


@pytest.mark.parametrize("dim, expected", [(4, 1), (8, 2), (32, 4)])
def test_no_more_values_are_stored_than_there_are_chunks(dim: int, expected: int) -> None:
    rows: list[Row] = [{"user": [i % 5]} for i in range(20)]
    allocation = build(
        rows, [table("user", dim=dim)], source=RowsMinHash(num_values=4, min_support=1), dedicated_fraction=0.0
    )
    assert allocation.memories[0].signatures.shape == (5, expected)


def test_without_a_source_there_are_no_signatures() -> None:
    allocation = build(some_rows(50), source=None)
    assert all(memory.signatures.numel() == 0 for memory in allocation.memories)
    assert all(memory.dedicated_rows > 0 for memory in allocation.memories)
    assert allocation.provenance["source"] is None


def test_a_builder_with_nothing_to_give_hashes_every_id() -> None:
    allocation = build(some_rows(50), source=None, dedicated_fraction=0.0)
    assert allocation.fingerprint == Allocation.hashed(TABLES, CONFIG).fingerprint
    assert allocation.nbytes == 0


# Compactness.


@pytest.mark.parametrize("num_values", [1, 2, 4, 8])
def test_a_signature_with_its_index_takes_at_most_four_bytes_a_value_and_eight(num_values: int) -> None:
    rows: list[Row] = [{"user": [i % 700], "item": [i % 64]} for i in range(2100)]
    allocation = build(
        rows,
        [table("user", dim=32, num_embeddings=9000), table("item", dim=32)],
        LMAConfig(compression=1.5),
        source=RowsMinHash(num_values=num_values, min_support=1, power=1),
        dedicated_fraction=0.0,
        signature_fraction=0.5,
    )
    (memory,) = allocation.memories
    n = allocation.provenance["ids"]["memory_32"]
    assert memory.signatures.shape == (764, num_values) == (n["user"]["with_signature"] + 64, num_values)
    assert memory.nbytes == allocation.nbytes <= 764 * (4 * num_values + 8)


@holds_for_every_input(60)
@given(st.integers(3, 5000), st.integers(0, 2**32))
def test_the_index_takes_at_most_eight_bytes_an_id(n: int, seed: int) -> None:
    keys = torch.randint(-(2**63), 2**63 - 1, (n,), generator=torch.Generator().manual_seed(seed))
    low, starts, _ = build_index(keys)
    assert low.nbytes + starts.nbytes <= 8 * n


# Budgets.

WEIGHT_BYTES = {DataType.FP32: 4, DataType.FP16: 2, DataType.BF16: 2}
DATA = some_rows(300, seed=4)


@holds_for_every_input(120)
@given(
    st.builds(LMAConfig, compression=st.floats(1, 60), chunk_dim=st.sampled_from([1, 2, 4, 8]))
    | st.builds(LMAConfig, memory_bytes=st.integers(1, 100_000), chunk_dim=st.sampled_from([1, 4, 8])),
    st.floats(0, 0.99),
    st.floats(0, 0.99),
    st.integers(1, 9),
    st.lists(st.integers(1, 3000), min_size=4, max_size=4),
    st.sampled_from(list(WEIGHT_BYTES)),
)
def test_weights_and_allocation_are_within_the_budget(
    config: LMAConfig,
    dedicated_fraction: float,
    signature_fraction: float,
    num_values: int,
    sizes: list[int],
    data_type: DataType,
) -> None:
    assume(dedicated_fraction + signature_fraction < 1)
    tables = [
        table(t.name, t.embedding_dim, t.feature_names, num_embeddings=size, data_type=data_type)
        for t, size in zip(TABLES, sizes)
    ]
    item_bytes = WEIGHT_BYTES[data_type]
    full = {8: (sizes[0] + sizes[1] + sizes[3]) * 8 * item_bytes, 16: sizes[2] * 16 * item_bytes}
    try:
        builder = AllocationBuilder(
            tables,
            config,
            source=RowsMinHash(num_values=num_values, min_support=1),
            dedicated_fraction=dedicated_fraction,
            signature_fraction=signature_fraction,
        )
        allocation = builder.update(kjt(DATA)).build()
    except ValueError as error:
        assert "budget" in str(error)
        return
    used = 0
    for memory in allocation.memories:
        if config.compression is not None:
            budget = full[memory.dim] / config.compression
        else:
            assert config.memory_bytes is not None
            budget = config.memory_bytes * full[memory.dim] / sum(full.values())
        row_bytes = memory.dim * item_bytes
        allocation_bytes = sum(t.numel() * t.element_size() for t in memory.tensors().values())
        assert memory.nbytes == allocation_bytes
        assert memory.rows * row_bytes + allocation_bytes <= budget
        assert (memory.rows + 1) * row_bytes + allocation_bytes > budget - 1  # and no row is wasted
        assert memory.dedicated_rows * row_bytes <= dedicated_fraction * budget
        assert memory.signatures.nbytes <= signature_fraction * budget
        assert memory.rows > memory.dedicated_rows
        used += memory.rows * row_bytes + allocation_bytes
    assert used <= (config.memory_bytes or sum(full.values()) / (config.compression or 1))


@pytest.mark.parametrize(
    "config",
    [LMAConfig(memory_bytes=31, chunk_dim=4), LMAConfig(compression=1001, chunk_dim=4)],
    ids=["bytes", "ratio"],
)
def test_a_budget_below_one_row_is_refused_with_the_numbers(config: LMAConfig) -> None:
    with pytest.raises(
        ValueError, match=r"'memory_8'.*31 bytes.*one row of dim 8 takes 32.*(compression|memory_bytes)"
    ):
        Allocation.hashed([table("user")], config)
    with pytest.raises(ValueError, match="one row of dim 8 takes 32"):
        AllocationBuilder([table("user")], config)  # before it is given any row
    with pytest.raises(ValueError, match="one row of dim 8 takes 32"):
        LMAEmbeddingBagCollection([table("user")], config)


def test_a_budget_filled_by_dedicated_rows_is_refused() -> None:
    rows: list[Row] = [{"user": [i]} for i in range(100)]
    with pytest.raises(ValueError, match="dedicated_fraction"):
        # 0.99 * 3 rows of 4,096 bytes are 2 dedicated rows, whose index leaves no third one
        build(rows, [table("user", dim=1024)], LMAConfig(memory_bytes=3 * 4096), dedicated_fraction=0.99,
              signature_fraction=0.0)  # fmt: skip


def test_a_memory_of_too_many_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=f"{2**31} rows, the most is {2**31 - 1}"):
        Allocation.hashed([table("user", dim=4, num_embeddings=2**31)], LMAConfig(compression=1))
    fits = Allocation.hashed([table("user", dim=4, num_embeddings=2**31 - 1)], LMAConfig(compression=1))
    assert fits.memories[0].rows == 2**31 - 1


# What the builder refuses.


@pytest.mark.parametrize(
    "keys, said",
    [
        (FEATURES[:-1], r"missing \['tag'\]"),
        ([*FEATURES, "color"], r"unknown \['color'\]"),
        ([*FEATURES[:-1], "color"], r"missing \['tag'\], unknown \['color'\]"),
        ([*FEATURES[:-1], "user"], r"missing \['tag'\]"),
    ],
)
def test_update_names_missing_and_unknown_features(keys: list[str], said: str) -> None:
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
        (TABLES, CONFIG, {"dedicated_fraction": 0.1}, "dedicated_fraction: 0.25 and 0.1"),
        (TABLES, CONFIG, {"signature_fraction": 0.1}, "signature_fraction: 0.125 and 0.1"),
    ],
)
def test_merging_other_settings_names_the_differences(tables, config, options, said: str) -> None:
    rows = some_rows(10)
    builder = AllocationBuilder(TABLES, CONFIG, source=SOURCE).update(kjt(rows))
    other = AllocationBuilder(tables, config, **{"source": SOURCE, **options})
    with pytest.raises(ValueError, match=said):
        builder.merge(other)
    assert builder.build().fingerprint == build(rows).fingerprint


@pytest.mark.parametrize(
    "options, said",
    [
        ({"dedicated_fraction": 1.0}, "dedicated_fraction must be in"),
        ({"dedicated_fraction": -0.1}, "dedicated_fraction.*-0.1"),
        ({"signature_fraction": 1.5}, "signature_fraction.*1.5"),
        ({"signature_fraction": float("nan")}, "signature_fraction.*nan"),
        ({"dedicated_fraction": 0.6, "signature_fraction": 0.4}, "0.6.*0.4.*less than 1"),
        ({"dedicated_fraction": 0.9}, "0.9.*0.125.*less than 1"),
        ({"source": None, "signature_fraction": 2.0}, "signature_fraction.*2.0"),
    ],
)
def test_bad_fractions_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AllocationBuilder(TABLES, CONFIG, **options)


@pytest.mark.parametrize("source", [None, {}, {"user": None}])
def test_without_a_source_the_share_of_signatures_is_not_used(source: dict[str, None] | None) -> None:
    allocation = build(some_rows(50), source=source, dedicated_fraction=0.9)
    assert allocation.provenance["signature_fraction"] == 0.0
    assert all(memory.dedicated_rows > 0 for memory in allocation.memories)


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
        ([table("a", dim=6)], CONFIG, "chunk_dim=4 does not divide embedding_dim=6 of table 'a'"),
        ([table("a"), table("b", pooling=PoolingType.MEAN)], CONFIG, "dim 8.*pooling.*a: SUM, b: MEAN"),
        ([table("a"), table("b", data_type=DataType.FP16)], CONFIG, "dim 8.*data_type.*a: FP32, b: FP16"),
        ([table("a", data_type=DataType.INT8)], CONFIG, "'a'.*INT8.*FP32, FP16, BF16"),
        ([table("a", num_embeddings=0, weight_init_min=-1.0, weight_init_max=1.0)], CONFIG, "'a'.*num_embeddings=0"),
        ([table("a", features=["x"]), table("b", features=["x"])], CONFIG, "'x'.*'a'.*'b'"),
        ([table("a", features=["x", "x"])], CONFIG, "'x'"),
    ],
)
def test_tables_that_cannot_share_are_refused(tables, config: LMAConfig, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AllocationBuilder(tables, config)
    with pytest.raises(ValueError, match=said):
        LMAEmbeddingBagCollection(tables, config)


def test_tables_of_different_dims_may_pool_differently() -> None:
    tables = [table("a", dim=8), table("b", dim=16, pooling=PoolingType.MEAN, data_type=DataType.FP16)]
    assert [m.name for m in Allocation.hashed(tables, CONFIG).memories] == ["memory_8", "memory_16"]


# The artifact.


@pytest.fixture(scope="module")
def allocation() -> Allocation:
    return build(some_rows(100), dedicated_fraction=0.2)


@pytest.fixture
def saved(allocation: Allocation, tmp_path: Path) -> Path:
    path = tmp_path / "allocation.safetensors"
    allocation.save(path)
    return path


def assert_equal_allocations(one: Allocation, other: Allocation) -> None:
    assert one.fingerprint == other.fingerprint and one.header == other.header
    assert one.config == other.config and one.tables == other.tables and one.nbytes == other.nbytes
    for a, b in zip(one.memories, other.memories, strict=True):
        assert a.header() == b.header()
        for name, tensor in a.tensors().items():
            assert tensor.dtype == b.tensors()[name].dtype and torch.equal(tensor, b.tensors()[name])


def test_an_allocation_survives_its_file(allocation: Allocation, saved: Path) -> None:
    for path in (saved, str(saved)):
        loaded = Allocation.load(path)
        assert_equal_allocations(loaded, allocation)
        assert loaded.provenance == allocation.provenance
    assert torch.equal(addresses(loaded, "tag", range(-50, 50)), addresses(allocation, "tag", range(-50, 50)))


def test_an_allocation_without_data_survives_its_file(tmp_path: Path) -> None:
    hashed = Allocation.hashed(TABLES, CONFIG)
    hashed.save(tmp_path / "a")
    assert_equal_allocations(Allocation.load(tmp_path / "a"), hashed)


def test_a_loaded_allocation_can_be_saved_over_its_own_file(allocation: Allocation, saved: Path) -> None:
    loaded = Allocation.load(saved)  # memory-mapped from the file that is replaced
    loaded.save(saved)
    assert_equal_allocations(loaded, allocation)
    assert_equal_allocations(Allocation.load(saved), allocation)


def test_others_may_read_a_saved_allocation_as_any_new_file(saved: Path) -> None:
    ordinary = saved.with_name("ordinary")
    ordinary.write_bytes(b"")
    assert oct(saved.stat().st_mode) == oct(ordinary.stat().st_mode)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.99])
def test_a_truncated_file_is_refused(saved: Path, share: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=re.escape(str(saved))):
        Allocation.load(saved)


@pytest.mark.parametrize("content", [b"\0" * 5000, b"not an allocation\n" * 100, b"{}", b"\xff" * 64])
def test_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "garbage"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*Build it again"):
        Allocation.load(path)


def test_no_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no allocation file at .*nowhere"):
        Allocation.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        Allocation.load(tmp_path)


def write_safetensors(path: Path, metadata: dict[str, str]) -> None:
    """The format in six lines: length of the header, JSON header, data (none here)."""
    header = json.dumps(
        {"__metadata__": metadata, "x": {"dtype": "I32", "shape": [0], "data_offsets": [0, 0]}}
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "weights", {"format": "pt"})
    with pytest.raises(ValueError, match="weights is a safetensors file but not an allocation"):
        Allocation.load(tmp_path / "weights")


def test_another_format_version_is_named(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "new", {"format": "torchrec_lma.allocation", "format_version": "3"})
    with pytest.raises(ValueError, match="new has allocation format version 3, this torchrec_lma reads version 2"):
        Allocation.load(tmp_path / "new")


def test_a_file_with_a_flipped_byte_never_loads(allocation: Allocation, saved: Path) -> None:
    whole = saved.read_bytes()
    (header_length,) = struct.unpack("<Q", whole[:8])
    positions = [*range(0, 8 + header_length, 3), *range(8 + header_length, len(whole), 7), len(whole) - 1]
    undetected, other_errors = [], []
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 7)
        saved.write_bytes(damaged)
        where = f"byte {position} after {whole[max(0, position - 20) : position]!r}"
        try:
            loaded = Allocation.load(saved)
        except Exception as error:
            if type(error) is not ValueError or str(saved) not in str(error):
                other_errors.append(f"{where}: {error!r}")
            continue
        if (loaded.header, loaded.provenance, loaded.fingerprint) != (
            allocation.header,
            allocation.provenance,
            allocation.fingerprint,
        ):
            undetected.append(where)
    assert not undetected, f"{len(undetected)} damaged files were loaded: {undetected[:3]}"
    assert not other_errors, f"{len(other_errors)} do not say which file is damaged: {other_errors[:3]}"


@pytest.mark.parametrize(
    "tables, config, said",
    [
        (TABLES, replace(CONFIG, seed=9), r"seed=0 \(now 9\)"),
        (TABLES, LMAConfig(compression=9, chunk_dim=4), r"compression=8.0 \(now 9.0\)"),
        (TABLES, LMAConfig(compression=8, chunk_dim=2), r"chunk_dim=4 \(now 2\)"),
        (TABLES[:-1], CONFIG, "other tables.*tag.*none"),
        ([*TABLES, table("color")], CONFIG, "other tables.*color.*no such table"),
        ([*TABLES[:-1], table("tag", num_embeddings=7)], CONFIG, "other tables.*tag.*1000.*7"),
        ([*TABLES[:-1], table("tag", dim=16)], CONFIG, "other tables.*tag"),
        ([table(t.name, t.embedding_dim, t.feature_names, data_type=DataType.FP16) for t in TABLES], CONFIG, "FP16"),
    ],
)
def test_an_allocation_made_for_something_else_is_refused(saved: Path, tables, config: LMAConfig, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LMAEmbeddingBagCollection(tables, config, Allocation.load(saved))


def test_the_order_of_the_tables_is_not_part_of_what_it_was_made_for(allocation: Allocation) -> None:
    ebc = LMAEmbeddingBagCollection(TABLES[::-1], CONFIG, allocation)
    assert torch.equal(ebc.addresses("tag", torch.arange(9)), addresses(allocation, "tag", range(9)))


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("fails", ["save_file", "os.replace"])
def test_a_failed_save_leaves_what_was_there(
    allocation: Allocation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, existing: bool
) -> None:
    path = tmp_path / "allocation.safetensors"
    if existing:
        Allocation.hashed(TABLES, CONFIG).save(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def no_space(tensors: object, filename: str, *args: object) -> None:
        if fails == "save_file":
            Path(filename).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((allocation_file, "save_file") if fails == "save_file" else (os, "replace")), no_space)
    with pytest.raises(OSError, match="No space left"):
        allocation.save(path)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As a disk that is full after that many bytes of a file, to the real writer."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [0, 1000, 10_000])
def test_a_full_disk_leaves_no_part_of_a_file(tmp_path: Path, size: int) -> None:
    allocation = build(
        [{"user": [i % 999]} for i in range(4000)], [table("user", num_embeddings=60_000)], dedicated_fraction=0.0
    )
    assert allocation.nbytes > 11_000
    with files_of_at_most(size), pytest.raises(OSError, match=f"{tmp_path}/a was not written .*make room for"):
        allocation.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    allocation.save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    with files_of_at_most(size), pytest.raises(OSError):
        allocation.save(tmp_path / "a")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a": before}


def test_a_loaded_allocation_is_mapped_from_its_file(saved: Path) -> None:
    def is_mapped() -> bool:
        return str(saved) in Path("/proc/self/maps").read_text()

    assert not is_mapped()
    loaded = Allocation.load(saved)
    assert is_mapped()
    del loaded
    assert not is_mapped()


def test_saving_over_a_file_replaces_it(allocation: Allocation, tmp_path: Path) -> None:
    path = tmp_path / "a"
    Allocation.hashed(TABLES, CONFIG).save(path)
    allocation.save(path)
    assert Allocation.load(path).fingerprint == allocation.fingerprint
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


# The fingerprint.


def test_the_fingerprint_is_of_what_decides_addresses() -> None:
    rows = some_rows(100)
    base = build(rows)
    others = {
        "seed": build(rows, config=replace(CONFIG, seed=1)),
        "rows of data": build(rows[:-30]),
        "power": build(rows, source=replace(SOURCE, power=2)),
        "within a table": build(rows, source=replace(SOURCE, within_table=True)),
        "dedicated": build(rows, dedicated_fraction=0.1),
        "signatures": build(rows, signature_fraction=0.01),
        "chunks": build(rows, config=replace(CONFIG, chunk_dim=8)),
        "tables": build(rows, [table(t.name + "2", t.embedding_dim, t.feature_names) for t in TABLES]),
        "hashed": Allocation.hashed(TABLES, CONFIG),
    }
    fingerprints = {base.fingerprint, *(other.fingerprint for other in others.values())}
    assert len(fingerprints) == 1 + len(others)
    assert all(re.fullmatch("[0-9a-f]{64}", fingerprint) for fingerprint in fingerprints)


def test_the_fingerprint_changes_with_every_part_of_a_memory(allocation: Allocation) -> None:
    memory = allocation.memories[0]
    changed: list[MemoryAllocation] = [
        replace(memory, rows=memory.rows + 1),
        replace(memory, tables=memory.tables[::-1]),
    ]
    for name, tensor in memory.tensors().items():
        tensor = tensor.clone()
        tensor.view(-1)[-1] ^= 1
        changed.append(replace(memory, **{name: tensor}))
    fingerprints = {replace(allocation, memories=(m, *allocation.memories[1:])).fingerprint for m in changed}
    assert len(fingerprints | {allocation.fingerprint}) == len(changed) + 1


def test_the_fingerprint_is_not_of_provenance_or_of_the_way_to_the_rows() -> None:
    tables = [table("user")]
    by_ratio, by_bytes = LMAConfig(compression=10, chunk_dim=4), LMAConfig(memory_bytes=3200, chunk_dim=4)
    one, other = Allocation.hashed(tables, by_ratio), Allocation.hashed(tables, by_bytes)
    assert one.memories[0].rows == 100
    assert one.fingerprint == other.fingerprint
    assert replace(one, provenance={"note": "x"}).fingerprint == one.fingerprint


def test_the_fingerprint_of_a_hashed_allocation_never_changes() -> None:
    """Checkpoints carry it: if this fails, they are refused by this version."""
    tables = [EmbeddingBagConfig(name="t_user", num_embeddings=1000, embedding_dim=8, feature_names=["user"])]
    fingerprint = Allocation.hashed(tables, LMAConfig(compression=4)).fingerprint
    assert fingerprint == "d4d3c08365a6341e59cab0e2681d0de541ab9b2d965904530a3e1188846c2c55"


# From a checkpoint.


class Model(nn.Module):
    def __init__(self, *collections: nn.Module) -> None:
        super().__init__()
        self.dense = nn.Linear(3, 2)
        self.sparse = nn.ModuleList(collections)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["built", "hashed"])
def test_a_checkpoint_holds_its_allocation(allocation: Allocation, tmp_path: Path, nested: bool, kind: str) -> None:
    if kind == "hashed":
        allocation = Allocation.hashed(TABLES, CONFIG)
    ebc = LMAEmbeddingBagCollection(TABLES, CONFIG, allocation)
    model = Model(ebc) if nested else ebc
    dcp.save(model.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    restored = Allocation.from_checkpoint(tmp_path)
    assert_equal_allocations(restored, allocation)
    again = LMAEmbeddingBagCollection(TABLES, restored.config, restored)
    assert torch.equal(again.addresses("user", torch.arange(99)), ebc.addresses("user", torch.arange(99)))


def test_a_checkpoint_inside_an_application_state_holds_its_allocation(allocation: Allocation, tmp_path: Path) -> None:
    model = Model(LMAEmbeddingBagCollection(TABLES, CONFIG, allocation))
    dcp.save({"model": model.state_dict(), "step": 7}, checkpoint_id=tmp_path, no_dist=True)
    assert_equal_allocations(Allocation.from_checkpoint(tmp_path), allocation)


def test_a_checkpoint_with_no_or_several_collections_is_refused(allocation: Allocation, tmp_path: Path) -> None:
    dcp.save(Model().state_dict(), checkpoint_id=tmp_path / "none", no_dist=True)
    with pytest.raises(ValueError, match="none holds 0 LMA collections"):
        Allocation.from_checkpoint(tmp_path / "none")
    several = Model(*(LMAEmbeddingBagCollection(TABLES, CONFIG, allocation) for _ in range(2)))
    dcp.save(several.state_dict(), checkpoint_id=tmp_path / "two", no_dist=True)
    with pytest.raises(ValueError, match="two holds 2 LMA collections.*sparse.0.*sparse.1"):
        Allocation.from_checkpoint(tmp_path / "two")


def test_a_checkpoint_with_a_damaged_allocation_is_refused(allocation: Allocation, tmp_path: Path) -> None:
    state = LMAEmbeddingBagCollection(TABLES, CONFIG, allocation).state_dict()
    state["addressing.memories.memory_8.signatures"] = state["addressing.memories.memory_8.signatures"] ^ 1
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match=f"states allocation {allocation.fingerprint} but holds"):
        Allocation.from_checkpoint(tmp_path)
