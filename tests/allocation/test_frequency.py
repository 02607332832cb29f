"""Counts of ids: exact or sketched in bounded memory, and the same in any order."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import torchrec_lma.allocation.frequency as frequency
from torchrec_lma.allocation.frequency import IdFrequency

ID = st.integers(-4, 4) | st.sampled_from([-(2**63), -(2**63) + 1, 2**63 - 1]) | st.integers(-(2**63), 2**63 - 1)
BATCHES = st.lists(st.tuples(st.integers(0, 1), st.lists(ID, max_size=20)), max_size=12)


def counted(batches: list[tuple[int, list[int]]], max_ids: int) -> IdFrequency:
    ids = IdFrequency(2, max_ids)
    for table, batch in batches:
        ids.add(table, np.array(batch, np.int64))
    return ids


@pytest.mark.parametrize("waiting", [1, 10, 1 << 18])
@pytest.mark.parametrize("max_ids", [5, 10_000])
def test_counts_are_the_same_in_any_order(waiting: int, max_ids: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frequency, "_FLUSH_IDS", waiting)

    @settings(derandomize=True, deadline=None, max_examples=100)
    @given(BATCHES, st.randoms(use_true_random=False), st.integers(0, 12))
    def check(batches: list[tuple[int, list[int]]], random: object, cut: int) -> None:
        expected = Counter((table, id) for table, batch in batches for id in batch)
        in_order = counted(batches, max_ids)
        in_order.settle()
        random.shuffle(batches)  # type: ignore[attr-defined]
        one, other = counted(batches[:cut], max_ids), counted(batches[cut:], max_ids)
        other.settle()
        other_before = [array.copy() for table in (0, 1) for array in other.of_table(table)]
        one.merge(other)
        one.settle()
        assert one.exact is (len(expected) <= max_ids)
        for table in (0, 1):
            of_table = {id: n for (t, id), n in expected.items() if t == table} if one.exact else {}
            keys, counts = one.of_table(table)
            assert keys.tolist() == sorted(of_table)
            assert dict(zip(keys.tolist(), counts.tolist())) == of_table
            if not one.exact:
                ids = np.array([id for _, id in expected], np.int64)
                assert np.array_equal(one.estimates(ids), in_order.estimates(ids))
            assert one.occurrences[table] == sum(n for (t, _), n in expected.items() if t == table)
        other_after = [array for table in (0, 1) for array in other.of_table(table)]
        assert all(np.array_equal(a, b) for a, b in zip(other_before, other_after, strict=True))

    check()


@pytest.mark.parametrize("n_tables, batch", [(1, 1 << 17), (200, 1 << 13)])
@pytest.mark.parametrize("max_ids", [1 << 13, 1 << 19])
def test_memory_is_bounded_for_all_tables_together(n_tables: int, batch: int, max_ids: int) -> None:
    ids = IdFrequency(n_tables, max_ids)
    for n, start in enumerate(range(0, 1 << 21, batch)):
        ids.add(n % n_tables, np.arange(start, start + batch))
        waiting = [array for of_table in ids._waiting for array in of_table]
        held = sum(array.nbytes for array in (*ids._keys, *ids._counts, *waiting, ids._sketch))
        assert held <= 24 * ids.max_ids + 8 * (1 << 18)
    assert not ids.exact
    assert sum(ids.occurrences) == 1 << 21


def test_batches_of_few_ids_do_not_pile_up() -> None:
    ids = IdFrequency(2, 1000)
    for n in range(20_000):
        ids.add(0, np.arange(n % 2))
        assert sum(len(of_table) for of_table in ids._waiting) <= (1 << 18) / 64
    assert ids.occurrences == [10_000, 0]


def test_the_sketch_knows_who_is_frequent() -> None:
    random = np.random.default_rng(0)
    keys = random.integers(-(2**63), 2**63 - 1, 60_000)
    counts = (3e4 / np.arange(1, keys.size + 1)).astype(np.int64) + 1  # a Zipf law, 390,000 occurrences
    ids = IdFrequency(1, max_ids=20_000)
    stream = random.permutation(np.repeat(keys, counts))
    for batch in np.array_split(stream, 300):
        ids.add(0, batch)
    ids.settle()
    assert not ids.exact
    error = ids.estimates(keys) - counts
    width = ids._sketch.shape[1]
    assert width == 4096
    # What an id meets in its cell of a row has this standard deviation, leaving out the heaviest ids, which are in few
    # cells and which the median passes over (Charikar, Chen, Farach-Colton, section 3).
    deviation = np.sqrt(np.sum(np.sort(counts)[:-width].astype(float) ** 2) / width)
    assert abs(error.mean()) < 0.1 * deviation
    assert np.sqrt(np.mean(np.square(error.astype(float)))) < 2 * deviation
    estimated, true = set(np.argsort(-ids.estimates(keys))[:500]), set(range(500))
    assert len(estimated & true) > 400
