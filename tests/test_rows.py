"""Which rows ids have, against rows computed with Python's integers; what is looked up there; the paper's theorem."""

import copy
import functools
import io
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from support.integer_reference import MASK, Id, PlannedMemory, index_order, reference_key, reference_unmix64, signed
from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection
from torchrec_lma.allocation import MemoryAllocation, RowsMinHash
from torchrec_lma.allocation.bitmap import RankBitmap, bitmap_bytes, build_bitmap, popcount
from torchrec_lma.allocation.index import IdIndex, build_index, index_bytes
from torchrec_lma.allocation.layout import Level, TableSpec
from torchrec_lma.hashing import mix64
from torchrec_lma.quant import quantize, script

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
EXTREMES = [0, 1, -1, INT64_MIN, INT64_MIN + 1, INT64_MAX, INT64_MAX - 1, 2**31, -(2**31), 2**32, 2**53 + 1]
int64s = st.integers(INT64_MIN, INT64_MAX) | st.sampled_from(EXTREMES)


def holds_for_every_input(max_examples: int) -> settings:
    return settings(derandomize=True, deadline=None, max_examples=max_examples)


# From plans in plain Python to allocations.


def tensors_of(plan: PlannedMemory) -> dict[str, Tensor]:
    """The tensors of a memory, made by the library's own packing of sets."""

    def as_set(name: str, ids: Sequence[Id]) -> tuple[dict[str, Tensor], list[Id]]:
        """The set, and its members in its order."""
        if plan.raw_ids:
            by_key = {reference_key(plan.seed, id): id for id in ids}
            low, starts, _ = build_index(torch.tensor(list(by_key)))
            return {f"{name}.low": low, f"{name}.starts": starts}, [by_key[key] for key in index_order(list(by_key))]
        positions = {plan.position(id): id for id in ids}
        words = build_bitmap(torch.tensor(list(positions)), sum(plan.sizes.values()))
        return {f"{name}.words": words}, [positions[at] for at in sorted(positions)]

    tensors: dict[str, Tensor] = {}
    before = None if plan.raw_ids else sum(plan.sizes.values())
    for k, owners in enumerate(plan.owners):
        if owners and k == 0 and len(owners) != before:
            tensors |= as_set("owners.0", owners)[0]
        elif owners and k > 0 and len(owners) < len(plan.owners[k - 1]):
            places = [plan.own_rows[k - 1][id] for id in owners]
            tensors[f"owners.{k}.words"] = build_bitmap(torch.tensor(places), len(plan.owners[k - 1]))
    if plan.signatures:
        signed_ids, in_order = as_set("signed", list(plan.signatures))
        values = torch.tensor([plan.signatures[id] for id in in_order], dtype=torch.int32)
        tensors |= signed_ids | {"signatures": values}
    return tensors


def memory_of(plan: PlannedMemory) -> MemoryAllocation:
    dim = sum(plan.widths)
    levels = tuple(Level(w, len(own), s) for w, own, s in zip(plan.widths, plan.owners, plan.shared, strict=True))
    name = f"{next(iter(plan.sizes))}_lma{dim}"
    return MemoryAllocation(name, dim, plan.raw_ids, tuple(plan.sizes), levels, tensors_of(plan))


def collection_of(
    plans: Sequence[PlannedMemory],
    features: Mapping[str, Sequence[str]] = {},
    means: Sequence[str] = (),
    is_weighted: bool = False,
    data_type: str = "FP32",
) -> LMAEmbeddingBagCollection:
    """A collection with the rows of the plans, random weights."""
    raw = tuple(name for plan in plans if plan.raw_ids for name in plan.sizes)
    config = LMAConfig(memory_bytes=1, data_type=data_type, seed=plans[0].seed if plans else 0, raw_ids=raw)
    sizes = {name: (size, sum(plan.widths)) for plan in plans for name, size in plan.sizes.items()}
    tables = [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=size,
            embedding_dim=dim,
            feature_names=list(features.get(name, [name])),
            pooling=PoolingType.MEAN if name in means else PoolingType.SUM,
        )
        for name, (size, dim) in sorted(sizes.items())
    ]
    specs = tuple(TableSpec(t.name, t.num_embeddings, t.embedding_dim, "FP32", t.name in raw) for t in tables)
    memories = tuple(memory_of(plan) for plan in plans)
    allocation = Allocation(config, specs, memories)
    ebc = LMAEmbeddingBagCollection(tables, allocation, is_weighted)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in ebc.parameters():
            weight.normal_(generator=generator)
    return ebc


def level_rows(ebc: LMAEmbeddingBagCollection, table: str, ids: Sequence[int] | Tensor) -> Tensor:
    """int64 [levels, N]"""
    return torch.stack(list(ebc.rows(table, torch.as_tensor(ids, dtype=torch.int64)).values()))


def some_signatures(ids: Sequence[Id], num_values: int, seed: int = 0) -> dict[Id, list[int]]:
    draw = random.Random(seed)
    return {id: [draw.randrange(-(2**31), 2**31) for _ in range(num_values)] for id in ids}


def nested(ids: Sequence[Id], *sizes: int, seed: int = 0) -> list[list[Id]]:
    """The first of some shuffled ids, ever fewer."""
    ids = random.Random(seed).sample(list(ids), len(ids))
    return [ids[:size] for size in sizes]


ALL = [("a", i) for i in range(100)] + [("b", i) for i in range(70)]
RAW = [("a", i) for i in [7, -1, INT64_MIN, *range(100, 160)]] + [
    ("b", i) for i in [7, INT64_MAX, *(x << 40 for x in range(50))]
]
SIZES = {"a": 100, "b": 70}
PLANS = {
    "hashed": PlannedMemory(SIZES, shared=[1000]),
    "a power of two of shared rows": PlannedMemory(SIZES, shared=[1024], seed=3),
    "one row": PlannedMemory(SIZES, shared=[1]),
    "several hashed levels": PlannedMemory(SIZES, widths=[4, 1, 2], owners=[[], [], []], shared=[7, 8, 9], seed=4),
    "all own": PlannedMemory(SIZES, owners=[ALL], shared=[0]),
    "all own, some more, the others share": PlannedMemory(
        SIZES, widths=[4, 4, 2], owners=nested(ALL, 170, 60, 9), shared=[0, 6, 0], seed=5
    ),
    "all own, a row for the unseen": PlannedMemory(SIZES, owners=[ALL], shared=[2]),
    "some own, the others are absent": PlannedMemory(SIZES, owners=nested(ALL, 40), shared=[0]),
    "some own, the others share": PlannedMemory(SIZES, owners=nested(ALL, 64), shared=[11]),
    "levels": PlannedMemory(
        SIZES, widths=[2, 2, 4, 8], owners=nested(ALL, 170, 129, 64, 1), shared=[1, 0, 0, 0], seed=1
    ),
    "levels of equal owners": PlannedMemory(
        SIZES, widths=[1, 1, 2, 4], owners=nested(ALL, 99, 99, 50, 50), shared=[5, 0, 0, 0]
    ),
    "levels without rows": PlannedMemory(
        SIZES, widths=[4, 4, 8], owners=nested(ALL, 30, 0, 0), shared=[5, 0, 0], seed=2
    ),
    "shared rows on later levels": PlannedMemory(
        SIZES, widths=[4, 4, 4, 2], owners=nested(ALL, 90, 50, 20, 10), shared=[0, 6, 0, 8]
    ),
    "signatures": PlannedMemory(
        SIZES, widths=[4, 4, 4], owners=[[], [], []], shared=[9, 10, 11], signatures=some_signatures(ALL[::3], 2)
    ),
    "own rows and signatures": PlannedMemory(
        SIZES, owners=nested(ALL, 50), shared=[20], signatures=some_signatures(nested(ALL, 170)[0][50:120], 4), seed=9
    ),
    "raw ids, hashed": PlannedMemory(SIZES, raw_ids=True, shared=[1000]),
    "raw ids": PlannedMemory(
        SIZES, True, [2, 1, 1, 4], nested(RAW, 80, 80, 30, 2), [17, 0, 0, 0], some_signatures(RAW[:9], 1), seed=6
    ),
    "raw ids, one owner": PlannedMemory({"a": 1, "b": 1}, True, owners=[[("b", 7)]], shared=[3]),
    "raw ids, some are absent": PlannedMemory(SIZES, True, [4, 8], nested(RAW, 50, 20), [0, 0]),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
SOME_IDS = [*range(-5, 110), *(x << 40 for x in range(50)), *EXTREMES]


@every_plan
@pytest.mark.parametrize("table", ["a", "b"])
def test_rows_are_those_of_plain_integers(plan: PlannedMemory, table: str) -> None:
    found = collection_of([plan]).rows(table, torch.tensor(SOME_IDS))
    name = f"a_lma{sum(plan.widths)}"
    assert list(found) == [f"{name}_level_{k}" for k in range(len(plan.widths))]
    for k, rows in enumerate(found.values()):
        assert rows.dtype is torch.int64
        assert rows.tolist() == [plan.row(k, (table, id)) for id in SOME_IDS]


@every_plan
def test_every_int64_has_rows_in_range(plan: PlannedMemory) -> None:
    ebc = collection_of([plan])
    # No row is for those outside of a vocabulary: they look at those of id 0.
    outside_is_0 = len(plan.owners[0]) == sum(plan.sizes.values()) and not plan.shared[0] and not plan.raw_ids

    @holds_for_every_input(30)
    @given(st.lists(int64s, min_size=1, max_size=10), st.sampled_from(["a", "b"]))
    def check(ids: list[int], table: str) -> None:
        for k, rows in enumerate(level_rows(ebc, table, ids)):
            own, every = len(plan.owners[k]), len(plan.owners[k]) + plan.shared[k]
            for id, row in zip(ids, rows.tolist()):
                id = 0 if outside_is_0 and plan.position((table, id)) < 0 else id
                if (table, id) in plan.own_rows[k]:
                    assert 0 <= row < own
                else:
                    assert own <= row < every if plan.shared[k] else row == -1

    check()


@every_plan
def test_rows_do_not_depend_on_the_batch(plan: PlannedMemory) -> None:
    ebc, ids = collection_of([plan]), torch.tensor(SOME_IDS)
    together = level_rows(ebc, "a", ids)
    assert torch.equal(torch.cat([level_rows(ebc, "a", id.view(1)) for id in ids], dim=1), together)
    order = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(0))
    assert torch.equal(level_rows(ebc, "a", ids[order]), together[:, order])
    assert torch.equal(level_rows(ebc, "a", ids.repeat(3)), together.repeat(1, 3))
    assert level_rows(ebc, "a", ids[:0]).shape == (len(plan.widths), 0)


@every_plan
def test_own_rows_are_each_of_one_id(plan: PlannedMemory) -> None:
    ebc = collection_of([plan])
    for k, owners in enumerate(plan.owners):
        rows = [int(level_rows(ebc, table, [id])[k]) for table, id in owners]
        assert sorted(rows) == list(range(len(owners)))


INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]


class Quantized(torch.nn.Module):
    def __init__(self, ebc: LMAEmbeddingBagCollection) -> None:
        super().__init__()
        self.ebc = ebc

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.ebc(features).values()


@pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")
@pytest.mark.parametrize("name", ["levels", "raw ids"])
def test_integers_of_any_width_are_the_same_ids_everywhere_and_others_refused(name: str) -> None:
    ebc = collection_of([PLANS[name]])
    ids = torch.arange(0, 127)
    lengths = torch.full((2,), 127, dtype=torch.int32)
    quantized = quantize(Quantized(copy.deepcopy(ebc)))
    paths = {"float": Quantized(ebc), "quantized": quantized}
    if name == "levels":
        paths["scripted"] = script(quantized)

    def batch(order: str, dtype: torch.dtype) -> KeyedJaggedTensor:
        return KeyedJaggedTensor(keys=list(order), values=torch.cat([ids, ids]).to(dtype), lengths=lengths)

    for dtype in INTEGERS:
        assert torch.equal(torch.stack(list(ebc.rows("a", ids.to(dtype)).values())), level_rows(ebc, "a", ids))
        for order in ("ab", "ba"):  # one of them is permuted
            for path, model in paths.items():
                with torch.no_grad():
                    wide, narrow = model(batch(order, torch.int64)), model(batch(order, dtype))
                assert torch.equal(wide, narrow), (dtype, order, path)
    for dtype in (torch.float32, torch.float16, torch.bool):
        for path, model in paths.items():
            error = torch.jit.Error if path == "scripted" else TypeError
            with pytest.raises(error, match="expected integers"):
                model(batch("ba", dtype))
    beyond = KeyedJaggedTensor(
        keys=["a", "b"], values=torch.tensor([2**63 + 5], dtype=torch.uint64), lengths=torch.tensor([1, 0])
    )
    for path, model in paths.items():
        error = torch.jit.Error if path == "scripted" else ValueError
        with pytest.raises(error, match="beyond int64"):
            model(beyond)
        for wrong in ([127, 128], [127, 126], [-1, 255]):
            with pytest.raises(error, match="lengths"):
                model(KeyedJaggedTensor(keys=["b", "a"], values=torch.cat([ids, ids]), lengths=torch.tensor(wrong)))


@pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")
@every_plan
def test_a_scripted_saved_and_loaded_remap_gives_the_same_rows(plan: PlannedMemory) -> None:
    remap = collection_of([plan]).remap
    ids = torch.tensor(SOME_IDS)
    lengths = torch.tensor([ids.numel() - 3, 0, 3, 1, ids.numel() - 1, 0])
    features = KeyedJaggedTensor(keys=["b", "a"], values=torch.cat([ids, ids]), lengths=lengths)
    eager = remap(features)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(remap), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for _ in range(3):  # the profiling executor compiles after the first calls
        rows = loaded(features)
        assert rows.keys() == eager.keys()
        assert torch.equal(rows.values(), eager.values()) and torch.equal(rows.lengths(), eager.lengths())


def test_another_seed_gives_other_shared_rows() -> None:
    one, other = (
        level_rows(collection_of([PlannedMemory(SIZES, shared=[1000], seed=seed)]), "a", torch.arange(20_000))
        for seed in (0, 1)
    )
    assert abs((one == other).double().mean() - 1 / 1000) < 5 * (1 / 1000 / one.numel()) ** 0.5


def test_equal_ids_of_two_tables_meet_by_chance() -> None:
    ebc = collection_of([PlannedMemory({"a": 20_000, "b": 20_000}, shared=[1000])])
    a, b = (level_rows(ebc, table, torch.arange(20_000)) for table in "ab")
    assert abs((a == b).double().mean() - 1 / 1000) < 5 * (1 / 1000 / a.numel()) ** 0.5


# What is looked up: embeddings of any collection are those of its weights at the rows of the plan.


@st.composite
def collections(draw: st.DrawFn) -> tuple[list[PlannedMemory], dict[str, list[str]]]:
    """Plans of memories, and the features of each table; some features feed several tables."""
    seed, names = draw(st.integers(0, 5)), iter("abcdefgh")
    plans = []
    for raw_ids in draw(st.lists(st.booleans(), min_size=1, max_size=2, unique=True)):
        dim_widths = draw(st.sampled_from([[4], [1], [2, 2, 4], [1, 1, 2], [4, 4], [1, 2], [8, 4, 2]]))
        sizes = {next(names): draw(st.integers(1, 70)) for _ in range(draw(st.integers(1, 2)))}
        ids = [(table, id) for table, size in sizes.items() for id in range(size)]
        if raw_ids:
            ids = [(table, id * 2**35 - 3) for table, id in ids]
        counts = sorted((draw(st.integers(0, len(ids)) | st.just(len(ids))) for _ in dim_widths), reverse=True)
        shared = [draw(st.integers(0, 9)) for _ in dim_widths]
        if counts[0] + sum(shared) == 0:
            shared[0] = 1
        owners = nested(ids, *counts, seed=draw(st.integers(0, 99)))
        with_signature = ids[:: draw(st.integers(2, 5))] if draw(st.booleans()) else []
        signatures = some_signatures(with_signature, draw(st.integers(1, 3)))
        plans.append(PlannedMemory(sizes, raw_ids, dim_widths, owners, shared, signatures, seed))
    tables = [name for plan in plans for name in plan.sizes]
    pool = [f"f{i}" for i in range(4)]
    features = {table: draw(st.lists(st.sampled_from(pool), min_size=1, max_size=3, unique=True)) for table in tables}
    return plans, features


@holds_for_every_input(150)
@given(collections(), st.data())
def test_embeddings_are_the_weights_at_the_rows(
    parts: tuple[list[PlannedMemory], dict[str, list[str]]], data: st.DataObject
) -> None:
    plans, features = parts
    means = data.draw(st.lists(st.sampled_from(sorted(features)), unique=True))
    is_weighted = data.draw(st.booleans())
    ebc = collection_of(plans, features, means, is_weighted)
    keys = data.draw(st.permutations(sorted({f for names in features.values() for f in names} | {"unused"})))
    ids = st.integers(-4, 80) | st.sampled_from([i * 2**35 - 3 for i in range(70)]) | int64s
    batch = data.draw(st.integers(1, 3))
    bags = {key: [data.draw(st.lists(ids, max_size=4)) for _ in range(batch)] for key in keys}
    values = [id for key in keys for bag in bags[key] for id in bag]
    sample_weights = {key: [[(i % 5 - 1) / 2 for i, _ in enumerate(bag)] for bag in bags[key]] for key in keys}
    kjt = KeyedJaggedTensor(
        keys=keys,
        values=torch.tensor(values, dtype=torch.int64),
        lengths=torch.tensor([len(bag) for key in keys for bag in bags[key]]),
        weights=torch.tensor([w for key in keys for bag in sample_weights[key] for w in bag], dtype=torch.float32)
        if is_weighted
        else None,
    )
    out = ebc(kjt)

    weights = {name: bag.weight.detach().double().numpy() for name, bag in ebc.levels.embedding_bags.items()}

    def embedding(table: str, id: int) -> np.ndarray:
        plan = next(plan for plan in plans if table in plan.sizes)
        columns = []
        for k, width in enumerate(plan.widths):
            row = plan.row(k, (table, id))
            pack = {1: 4, 2: 2}.get(width, 1)  # rows that lie side by side in one row of the TorchRec table
            name = f"{next(iter(plan.sizes))}_lma{sum(plan.widths)}_level_{k}"
            columns.append(weights[name][row // pack, row % pack * width :][:width] if row >= 0 else np.zeros(width))
        return np.concatenate(columns)

    tables = ebc.embedding_bag_configs()
    expected: dict[str, np.ndarray] = {}
    for table, names in zip(tables, get_embedding_names_by_table(tables), strict=True):
        for name, feature in zip(names, table.feature_names, strict=True):
            rows = []
            for bag, of_bag in zip(bags[feature], sample_weights[feature]):
                total = np.zeros(table.embedding_dim)
                for id, weight in zip(bag, of_bag):
                    total += embedding(table.name, id) * (weight if is_weighted else 1)
                rows.append(total / max(len(bag), 1) if table.name in means else total)
            expected[name] = np.array(rows)
    assert out.keys() == list(expected) and out.length_per_key() == [e.shape[1] for e in expected.values()]
    for name, one in expected.items():
        np.testing.assert_allclose(out[name].detach().numpy(), one, atol=1e-5)
    for table in tables:
        some = torch.tensor([*range(-2, 12), INT64_MIN])
        vectors = ebc.materialize(table.name, some).double().numpy()
        np.testing.assert_array_equal(vectors, np.array([embedding(table.name, id) for id in some.tolist()]))


@pytest.mark.parametrize("data_type", ["FP16", "BF16"])
def test_half_precision_weights_are_looked_up_at_the_same_rows(data_type: str) -> None:
    ebc = collection_of([PLANS["levels"], PLANS["raw ids"]][:1], data_type=data_type)
    rows = level_rows(ebc, "a", [3, 50, 99])
    columns = [
        torch.where((row >= 0).unsqueeze(1), weights[row.clamp(min=0)], 0)
        for row, (_, weights) in zip(rows, ebc.level_weights("a"))
    ]
    out = ebc(
        KeyedJaggedTensor(keys=["a", "b"], values=torch.tensor([3, 50, 99]), lengths=torch.tensor([1, 1, 1, 0, 0, 0]))
    )
    torch.testing.assert_close(out["a"], torch.cat(columns, dim=1).float(), rtol=0, atol=0)


# Statistics of shared rows.

ID_PATTERNS = {
    "sequential": lambda n: torch.arange(n),
    "negative": lambda n: -torch.arange(n),
    "multiples of 2**32": lambda n: (torch.arange(n) - n // 2) << 32,
    "high bits only": lambda n: torch.arange(n) << 47,
    "random": lambda n: torch.randint(INT64_MIN, INT64_MAX, (n,), generator=torch.Generator().manual_seed(n)),
}
every_id_pattern = pytest.mark.parametrize("ids", [p(30_000) for p in ID_PATTERNS.values()], ids=ID_PATTERNS.keys())
N_LEVELS = 8


def shared(kind: str, ids: Tensor, rows: int) -> Tensor:
    """Shared rows [8, L] of ids that are all hashed, or that all have a signature of 4 values."""
    levels = tuple(Level(4, 0, rows) for _ in range(N_LEVELS))
    tensors = {}
    if kind == "signatures":
        low, starts, order = build_index(mix64(ids ^ torch.tensor(reference_key_salt("a"))))
        generator = torch.Generator().manual_seed(0)
        values = torch.randint(-(2**31), 2**31, (ids.numel(), 4), generator=generator).int()[order]
        tensors = {"signed.low": low, "signed.starts": starts, "signatures": values}
    dim = 4 * N_LEVELS
    table = EmbeddingBagConfig(name="a", num_embeddings=9, embedding_dim=dim, feature_names=["a"])
    memory = MemoryAllocation(f"a_lma{dim}", dim, True, ("a",), levels, tensors)
    config = LMAConfig(memory_bytes=1, raw_ids=True)
    allocation = Allocation(config, (TableSpec("a", 9, dim, "FP32", True),), (memory,))
    return level_rows(LMAEmbeddingBagCollection([table], allocation), "a", ids)


def reference_key_salt(table: str) -> int:
    return reference_unmix64(reference_key(0, (table, 0)))


@pytest.mark.parametrize("rows", [2, 3, 16, 100, 1000, 1024])
@pytest.mark.parametrize("kind", ["hashed", "signatures"])
@every_id_pattern
def test_shared_rows_are_uniform(ids: Tensor, kind: str, rows: int) -> None:
    counts = [torch.bincount(level, minlength=rows) for level in shared(kind, ids, rows)]
    p = min(stats.chisquare(count.numpy()).pvalue for count in counts)
    assert p * N_LEVELS > 1e-3


@pytest.mark.parametrize("rows", [2, 16, 15])
@pytest.mark.parametrize("kind", ["hashed", "signatures"])
@every_id_pattern
def test_levels_are_independent_of_each_other(ids: Tensor, kind: str, rows: int) -> None:
    levels = shared(kind, ids, rows)
    pairs = list(itertools.combinations(range(N_LEVELS), 2))
    p = 1.0
    for i, j in pairs:
        table = torch.bincount(levels[i] * rows + levels[j], minlength=rows * rows).view(rows, rows)
        p = min(p, stats.chi2_contingency(table.numpy(), correction=False).pvalue)
    assert p * len(pairs) > 1e-3


@pytest.mark.parametrize("rows", [64, 101])
@pytest.mark.parametrize("kind", ["hashed", "signatures"])
@every_id_pattern
def test_two_ids_meet_on_two_levels_with_probability_one_over_rows_squared(ids: Tensor, kind: str, rows: int) -> None:
    levels = shared(kind, ids, rows)
    pairs_of_ids = ids.numel() * (ids.numel() - 1) / 2
    for i, j in itertools.combinations(range(N_LEVELS), 2):
        count = torch.bincount(levels[i] * rows + levels[j]).double()
        met = float((count * (count - 1) / 2).sum())
        expected = pairs_of_ids / rows**2
        assert abs(met - expected) < 5 * expected**0.5


# The bitmap, against a sorted list.


@holds_for_every_input(200)
@given(st.data(), st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 500]))
def test_a_bitmap_knows_members_and_their_ranks(data: st.DataObject, n: int) -> None:
    members = data.draw(st.lists(st.integers(0, n - 1), unique=True) | st.just(list(range(n))))
    words = build_bitmap(torch.tensor(members, dtype=torch.int64), n)
    assert words.dtype is torch.int32 and words.numel() == -(-n // 32)
    packed = sum((word & 2**32 - 1) << 32 * i for i, word in enumerate(words.tolist()))
    assert packed == sum(1 << member for member in members)
    bitmap = RankBitmap(words)
    in_order = sorted(members)
    asked = [*range(n), -1, INT64_MIN]
    expected = [in_order.index(value) if value in set(members) else -1 for value in asked]
    assert bitmap.find(torch.tensor(asked)).tolist() == expected
    assert words.nbytes + bitmap.before.nbytes == bitmap_bytes(n)


@holds_for_every_input(100)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20))
def test_popcount_counts_bits(words: list[int]) -> None:
    counted = popcount(torch.tensor(words, dtype=torch.int32))
    assert counted.tolist() == [(word & 2**32 - 1).bit_count() for word in words]


# The index of raw ids, against a dict.


def low32(key: int) -> int:
    return key & 0xFFFFFFFF


def bits(n: int, seed: int, mask: int, value: int) -> list[int]:
    """n random 64-bit keys whose bits under `mask` are those of `value`."""
    random = torch.randint(INT64_MIN, INT64_MAX, (n,), generator=torch.Generator().manual_seed(seed))
    return list(dict.fromkeys(((random & ~signed(mask)) | signed(value & mask)).tolist()))


key_sets = st.lists(int64s, min_size=1, max_size=30, unique=True) | st.builds(
    bits,
    st.integers(1, 5000),
    st.integers(0, 2**31),
    # random keys; equal high bits; equal low bits; both equal; equal high bits and a varying sign of the low half
    st.sampled_from([0, 0xFFFFFFFF << 32, 0xFFFFFFFF, 0xFFFFFF << 40 | 0xFFFF, 0xFFFFFFFF << 32 | 0x7FFFFFF0]),
    st.integers(0, MASK),
)


@holds_for_every_input(150)
@given(key_sets, st.lists(int64s, max_size=20))
def test_an_index_finds_what_a_dict_finds(keys: list[int], others: list[int]) -> None:
    low, starts, order = build_index(torch.tensor(keys))
    kept = [keys[i] for i in order.tolist()]
    reference = {key: position for position, key in enumerate(kept)}
    assert len(reference) == low.numel() and reference.keys() <= set(keys)
    # Keys next to those in the index, and keys with their low or high half, are the hardest to tell from them.
    near = [signed(key ^ (1 << bit)) for key in keys[:20] for bit in (0, 31, 32, 63)]
    wanted = [*keys, *others, *near]
    found = IdIndex(low, starts).find(torch.tensor(wanted)).tolist()
    for key, position in zip(wanted, found):
        if key in reference:
            assert position == reference[key]
        elif position != -1:  # documented: one that agrees in the 32 low bits may be taken for it
            assert low32(kept[position]) == low32(key)
    for key in set(keys) - reference.keys():  # left out only for a smaller one with the same low bits
        assert any(low32(other) == low32(key) and other < key for other in kept)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 9, 16, 17, 1000, 4096, 5000, 100_000])
def test_an_index_finds_every_mixed_key_and_no_other(n: int) -> None:
    keys = mix64(torch.arange(n))
    low, starts, order = build_index(keys)
    index = IdIndex(low, starts)
    assert torch.equal(order[index.find(keys)], torch.arange(n))
    assert index.find(mix64(torch.arange(n, 2 * n))).unique().tolist() == [-1]
    assert low.nbytes + starts.nbytes <= index_bytes(n) <= 6 * n + 12


@holds_for_every_input(30)
@given(st.integers(1, 2000), st.randoms(use_true_random=False))
def test_an_index_does_not_depend_on_the_order_of_the_keys(n: int, random) -> None:
    keys = mix64(torch.arange(n))
    order = torch.tensor(random.sample(range(n), n))
    low, starts, position = build_index(keys)
    shuffled_low, shuffled_starts, shuffled_position = build_index(keys[order])
    assert torch.equal(low, shuffled_low) and torch.equal(starts, shuffled_starts)
    assert torch.equal(keys[position], keys[order][shuffled_position])


# The paper's theorem: ids of similarity J share the row of a level with probability J ** power, or else by chance.

PAIRS = 1500
NUM_VALUES = 4
SHARED_ROWS = 37  # few, so that agreement by chance is part of what is measured
# J: (rows with both ids, rows with the first only, rows with the second only)
JACCARDS = {0.0: (0, 3, 4), 0.25: (2, 3, 3), 0.5: (4, 1, 3), 0.8: (4, 0, 1), 1.0: (3, 0, 0)}
RowOfIds = dict[str, list[int]]


@functools.cache
def theorem_rows(first: str, second: str) -> tuple[list[RowOfIds], dict[float, tuple[Tensor, Tensor]]]:
    """Rows of features in which pairs of ids (first's, second's) have a known Jaccard similarity, and those pairs."""
    rows: list[RowOfIds] = []
    pairs = {}
    apart = 10_000 if first == second else 0  # ids of one feature differ, those of two features need not
    for group, (jaccard, (both, only_first, only_second)) in enumerate(JACCARDS.items()):
        ids = range(group * PAIRS, (group + 1) * PAIRS)
        pairs[jaccard] = (torch.tensor(ids), torch.tensor(ids) + apart)
        for id in ids:
            for has_first, has_second, times in ((1, 0, only_first), (0, 1, only_second), (1, 1, both)):
                for _ in range(times):
                    row: RowOfIds = {first: [], second: [], "row": [len(rows)]}  # "row" makes every row another
                    row[first] += [id] * has_first
                    row[second] += [id + apart] * has_second
                    rows.append(row)
    return rows, pairs


def kjt_of(rows: list[RowOfIds], features: list[str]) -> KeyedJaggedTensor:
    bags = [row.get(feature, []) for feature in features for row in rows]
    return KeyedJaggedTensor(
        keys=features,
        values=torch.tensor([id for bag in bags for id in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for bag in bags]),
    )


TABLES = [
    EmbeddingBagConfig(name="t_user", num_embeddings=10_000, embedding_dim=64, feature_names=["user"]),
    EmbeddingBagConfig(name="t_item", num_embeddings=20_000, embedding_dim=64, feature_names=["item", "last_item"]),
    EmbeddingBagConfig(name="t_tag", num_embeddings=20_000, embedding_dim=64, feature_names=["tags"]),
    EmbeddingBagConfig(name="t_row", num_embeddings=100_000, embedding_dim=64, feature_names=["row"]),
]
TABLE_OF = {feature: table.name for table in TABLES for feature in table.feature_names}


def learned(rows: list[RowOfIds], power: int, raw_ids: bool, within_table: bool = False) -> LMAEmbeddingBagCollection:
    """The paper's LMA: levels of equal width on which nobody owns a row."""
    tables = [table for table in TABLES if any(row.get(name) for row in rows for name in table.feature_names)]
    builder = AllocationBuilder(
        tables,
        LMAConfig(memory_bytes=600_000, widths=(4,) * 16, seed=1, raw_ids=raw_ids),
        source={
            table.name: RowsMinHash(power=power, num_values=NUM_VALUES, max_rows=None, within_table=within_table)
            for table in tables
            if table.name != "t_row"
        },
        shared_fraction=1.0,
        signature_fraction=0.9,
    )
    features = [name for table in tables for name in table.feature_names]
    allocation = builder.update(kjt_of(rows, features)).build()
    (memory,) = allocation.memories
    assert memory.tensors["signatures"].shape == (2 * PAIRS * len(JACCARDS), NUM_VALUES)
    assert {(level.width, level.own_rows) for level in memory.levels} == {(4, 0)} and len(memory.levels) == 16
    levels = tuple(Level(4, 0, SHARED_ROWS) for _ in memory.levels)
    return LMAEmbeddingBagCollection(tables, replace(allocation, memories=(replace(memory, levels=levels),)))


def assert_agreement(equal: Tensor, probability: float) -> None:
    """`equal` is of independent trials: one for each pair of ids and signature value."""
    standard_error = (probability * (1 - probability) / equal.numel()) ** 0.5
    assert abs(float(equal.double().mean()) - probability) <= 4 * standard_error


FIELDS = {
    "two tables of one memory": ("user", "item"),
    "two features of one table": ("item", "last_item"),
    "one feature, bags of several ids": ("tags", "tags"),
}


def test_the_pairs_have_the_similarity_they_are_said_to_have() -> None:
    for first, second in FIELDS.values():
        rows, pairs = theorem_rows(first, second)
        rows_with: dict[tuple[str, int], set[int]] = {}
        for number, row in enumerate(rows):
            for feature in (first, second):
                for id in row[feature]:
                    rows_with.setdefault((feature, id), set()).add(number)
        for jaccard, (a, b) in pairs.items():
            for i, j in zip(a.tolist(), b.tolist()):
                one, other = rows_with[first, i], rows_with[second, j]
                assert len(one & other) / len(one | other) == jaccard


def agreement(ebc: LMAEmbeddingBagCollection, first: tuple[str, Tensor], second: tuple[str, Tensor]) -> Tensor:
    """bool [levels, pairs], whether two ids share the row of a level."""
    return level_rows(ebc, *first) == level_rows(ebc, *second)


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
@pytest.mark.parametrize("power, raw_ids", [(1, False), (1, True), (2, False), (3, True)])
def test_ids_share_a_row_with_the_probability_of_the_theorem(
    fields: tuple[str, str], power: int, raw_ids: bool
) -> None:
    if TABLE_OF[fields[0]] == TABLE_OF[fields[1]] and fields[0] != fields[1]:
        # Two features of one table have one set of ids: make theirs disjoint, as ids of one table are one id.
        rows, pairs = theorem_rows("tags", "tags")
        rows = [
            {
                fields[0]: [id for id in row["tags"] if id < 10_000],
                fields[1]: [id for id in row["tags"] if id >= 10_000],
                "row": row["row"],
            }
            for row in rows
        ]
    else:
        rows, pairs = theorem_rows(*fields)
    ebc = learned(rows, power, raw_ids)
    for jaccard, (first, second) in pairs.items():
        equal = agreement(ebc, (TABLE_OF[fields[0]], first), (TABLE_OF[fields[1]], second))
        probability = jaccard**power + (1 - jaccard**power) / SHARED_ROWS
        # Levels k and k + K follow the same value and agree together: each K of them are a sample of their own.
        for levels in equal.split(NUM_VALUES):
            assert_agreement(levels, probability)
        for level in equal:
            assert_agreement(level, probability)


def test_agreement_on_different_values_is_independent() -> None:
    rows, pairs = theorem_rows("user", "item")
    ebc = learned(rows, power=1, raw_ids=False)
    for jaccard, (first, second) in pairs.items():
        equal = agreement(ebc, ("t_user", first), ("t_item", second))
        probability = jaccard + (1 - jaccard) / SHARED_ROWS
        for i, j in itertools.combinations(range(NUM_VALUES), 2):
            assert_agreement(equal[i] & equal[j], probability**2)


@pytest.mark.parametrize("power", [1, 2])
def test_sharing_within_a_table_leaves_only_chance_between_tables(power: int) -> None:
    rows, pairs = theorem_rows("user", "item")
    ebc = learned(rows, power, raw_ids=True, within_table=True)
    for first, second in pairs.values():
        equal = agreement(ebc, ("t_user", first), ("t_item", second))
        for levels in equal.split(NUM_VALUES):
            assert_agreement(levels, 1 / SHARED_ROWS)


@pytest.mark.parametrize("power", [1, 2])
def test_sharing_within_a_table_follows_the_theorem_inside_it(power: int) -> None:
    rows, pairs = theorem_rows("tags", "tags")
    ebc = learned(rows, power, raw_ids=False, within_table=True)
    for jaccard, (first, second) in pairs.items():
        equal = agreement(ebc, ("t_tag", first), ("t_tag", second))
        probability = jaccard**power + (1 - jaccard**power) / SHARED_ROWS
        for levels in equal.split(NUM_VALUES):
            assert_agreement(levels, probability)
