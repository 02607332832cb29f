"""Where ids live, against addresses computed with Python's integers; their statistics; the paper's theorem."""

import functools
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_reference import MASK, reference_mix64, reference_salt, signed
from scipy import stats
from torch import Tensor, fx, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma import AllocationBuilder, LMAConfig
from torchrec_lma.addressing import MemoryAddressing
from torchrec_lma.allocation import MemoryAllocation, RowsMinHash
from torchrec_lma.allocation.index import IdIndex, build_index
from torchrec_lma.hashing import mix64, table_salt

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
EXTREMES = [0, 1, -1, INT64_MIN, INT64_MIN + 1, INT64_MAX, INT64_MAX - 1, 2**31, -(2**31), 2**32, 2**53 + 1]
int64s = st.integers(INT64_MIN, INT64_MAX) | st.sampled_from(EXTREMES)


def holds_for_every_input(max_examples: int) -> settings:
    return settings(derandomize=True, deadline=None, max_examples=max_examples)


# The reference: plain integers, one id and one chunk at a time.


@dataclass
class Memory:
    """A memory described in plain Python: which ids of which tables are dedicated, which have which signature."""

    rows: int
    n_chunks: int = 8
    dedicated: list[tuple[str, int]] = field(default_factory=list)
    signatures: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    seed: int = 0

    def key(self, table: str, id: int) -> int:
        return reference_mix64(id ^ reference_salt("table", self.seed, table))

    def dedicated_row(self, table: str, id: int) -> int:
        """Buckets of keys by their high bits, low bits ascending inside: the order in which rows are given out."""
        n_buckets = 2
        while n_buckets * 4 < len(self.dedicated):
            n_buckets *= 2

        def place(key: int) -> tuple[int, int]:
            low = key & 0xFFFFFFFF
            return (key & MASK) * n_buckets >> 64, low - 2**32 if low >= 2**31 else low

        return sorted(place(self.key(*entry)) for entry in self.dedicated).index(place(self.key(table, id)))

    def reference_address(self, table: str, id: int, chunk: int) -> int:
        if (table, id) in self.dedicated:
            return self.dedicated_row(table, id)
        mixed = self.key(table, id)
        if (table, id) in self.signatures:
            signature = self.signatures[table, id]
            value = signature[chunk % len(signature)] ^ reference_salt("signature", self.seed)
            mixed = reference_mix64(value)
        product = signed(mixed * (reference_salt("chunk", self.seed, chunk) | 1))
        product = (product ^ (product >> 32)) & (2**63 - 1)
        return len(self.dedicated) + product % (self.rows - len(self.dedicated))

    def addressing(self) -> MemoryAddressing:
        tensors = {}
        if self.dedicated:
            keys = torch.tensor([self.key(*entry) for entry in self.dedicated])
            tensors["dedicated_low"], tensors["dedicated_starts"], _ = build_index(keys)
        if self.signatures:
            keys = torch.tensor([self.key(*entry) for entry in self.signatures])
            values = torch.tensor(list(self.signatures.values()), dtype=torch.int32)
            tensors["signature_low"], tensors["signature_starts"], order = build_index(keys)
            tensors["signatures"] = values[order]
        allocation = MemoryAllocation("memory", 4 * self.n_chunks, 4, self.rows, ("a", "b"), **tensors)
        return MemoryAddressing(allocation, self.seed)


def addresses(addressing: MemoryAddressing, table: str, ids: Tensor, seed: int = 0) -> Tensor:
    """int64 [n_chunks, L]"""
    return addressing(ids, torch.tensor([table_salt(seed, table)]), 0, addressing.n_chunks)


def random_ids(n: int, seed: int = 0) -> Tensor:
    ids = torch.randint(INT64_MIN, INT64_MAX, (n,), generator=torch.Generator().manual_seed(seed))
    return torch.cat([ids, torch.tensor(EXTREMES)])


def random_signatures(ids: Sequence[int], table: str, num_values: int, seed: int) -> dict[tuple[str, int], list[int]]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-(2**31), 2**31, (len(ids), num_values), generator=generator).tolist()
    return {(table, id): value for id, value in zip(ids, values)}


MEMORIES = {
    "hashed": Memory(rows=1000),
    "power of two": Memory(rows=1024, seed=3),
    "one row": Memory(rows=1),
    "one chunk": Memory(rows=77, n_chunks=1),
    "dedicated": Memory(rows=50, dedicated=[("a", 7), ("b", 7), ("a", -1), ("a", INT64_MIN), ("b", INT64_MAX)]),
    "many dedicated": Memory(rows=300, dedicated=[("a", i * i) for i in range(100)], seed=5),
    "all but one dedicated": Memory(rows=6, dedicated=[("a", i) for i in range(5)]),
    "signatures": Memory(
        rows=1000,
        signatures=random_signatures([*range(100), *EXTREMES[2:]], "a", 4, 0)
        | {("b", 3): [-(2**31), -1, 0, 2**31 - 1]},
    ),
    "more signature values than chunks": Memory(rows=99, n_chunks=2, signatures=random_signatures([1, 2], "b", 4, 1)),
    "all kinds": Memory(
        rows=500,
        n_chunks=6,
        dedicated=[("a", 0), ("b", 1), ("b", 2)],
        signatures=random_signatures(range(1, 40), "a", 4, 2) | random_signatures(range(3, 30), "b", 4, 3),
        seed=11,
    ),
}
every_kind_of_memory = pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES.keys())


@every_kind_of_memory
@pytest.mark.parametrize("table", ["a", "b"])
def test_addresses_are_those_of_plain_integers(memory: Memory, table: str) -> None:
    ids = [*range(-5, 50), *EXTREMES, 2500, 9801]
    expected = [[memory.reference_address(table, id, chunk) for id in ids] for chunk in range(memory.n_chunks)]
    assert addresses(memory.addressing(), table, torch.tensor(ids), memory.seed).tolist() == expected


@every_kind_of_memory
def test_every_int64_has_an_address_in_range(memory: Memory) -> None:
    addressing = memory.addressing()

    @holds_for_every_input(100)
    @given(st.lists(int64s, min_size=1, max_size=10), st.sampled_from(["a", "b", "another table"]))
    def check(ids: list[int], table: str) -> None:
        rows = addresses(addressing, table, torch.tensor(ids), memory.seed)
        assert rows.dtype is torch.int64 and rows.shape == (memory.n_chunks, len(ids))
        assert 0 <= int(rows.min()) and int(rows.max()) < memory.rows
        for column, id in enumerate(ids):
            if (table, id) not in memory.dedicated:
                assert int(rows[:, column].min()) >= len(memory.dedicated)

    check()


@every_kind_of_memory
def test_int32_ids_have_the_addresses_of_int64_ids(memory: Memory) -> None:
    ids = torch.tensor([*range(-50, 200), 2**31 - 1, -(2**31)])
    addressing = memory.addressing()
    assert torch.equal(addresses(addressing, "a", ids.int()), addresses(addressing, "a", ids))


@every_kind_of_memory
def test_addresses_do_not_depend_on_the_batch(memory: Memory) -> None:
    addressing = memory.addressing()
    ids = torch.cat([torch.arange(60), random_ids(100)])
    together = addresses(addressing, "a", ids)
    alone = torch.cat([addresses(addressing, "a", id.view(1)) for id in ids], dim=1)
    assert torch.equal(together, alone)
    order = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(0))
    assert torch.equal(addresses(addressing, "a", ids[order]), together[:, order])
    assert torch.equal(addresses(addressing, "a", ids.repeat(3)), together.repeat(1, 3))


@every_kind_of_memory
def test_a_salt_for_each_id_is_the_same_as_one_salt(memory: Memory) -> None:
    addressing = memory.addressing()
    ids = random_ids(50)
    salts = torch.tensor([table_salt(memory.seed, "ab"[i % 2]) for i in range(ids.numel())])
    mixed = addressing(ids, salts, 0, memory.n_chunks)
    for i, table in enumerate("ab"):
        assert torch.equal(mixed[:, i::2], addresses(addressing, table, ids[i::2], memory.seed))


@every_kind_of_memory
def test_no_ids_have_no_addresses(memory: Memory) -> None:
    for dtype in (torch.int32, torch.int64):
        assert addresses(memory.addressing(), "a", torch.empty(0, dtype=dtype)).shape == (memory.n_chunks, 0)


@every_kind_of_memory
def test_a_range_of_chunks_is_a_slice_of_all_chunks(memory: Memory) -> None:
    addressing, ids = memory.addressing(), torch.cat([torch.arange(60), random_ids(60)])
    salts = torch.tensor([table_salt(memory.seed, "a")])
    every = addressing(ids, salts, 0, memory.n_chunks)
    for first, end in itertools.combinations(range(memory.n_chunks + 1), 2):
        assert torch.equal(addressing(ids, salts, first, end), every[first:end])


@every_kind_of_memory
def test_scripted_saved_and_loaded_addresses_are_bit_equal(memory: Memory) -> None:
    addressing, ids = memory.addressing(), torch.cat([torch.arange(60), random_ids(500)])
    eager = addresses(addressing, "a", ids, memory.seed)
    scripted = torch.jit.script(addressing)
    assert torch.equal(addresses(scripted, "a", ids, memory.seed), eager)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for _ in range(3):  # the profiling executor compiles after the first calls
        assert torch.equal(addresses(loaded, "a", ids, memory.seed), eager)
    assert torch.equal(loaded(ids.int(), torch.tensor([5]), 0, 1), addressing(ids.int(), torch.tensor([5]), 0, 1))


class AllChunks(nn.Module):
    """As a lookup calls it: which chunks is a constant of the module, not an input of its graph."""

    def __init__(self, addressing: MemoryAddressing) -> None:
        super().__init__()
        self.addressing = addressing
        self.n_chunks = addressing.n_chunks

    def forward(self, ids: Tensor, salts: Tensor) -> Tensor:
        return self.addressing(ids, salts, 0, self.n_chunks)


@pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning")
@every_kind_of_memory
def test_traced_addresses_are_bit_equal(memory: Memory) -> None:
    module, ids = AllChunks(memory.addressing()), torch.cat([torch.arange(60), random_ids(500)])
    salts = torch.tensor([table_salt(memory.seed, "a")])
    eager = module(ids, salts)
    graph = fx.symbolic_trace(module)
    assert torch.equal(graph(ids, salts), eager)
    assert torch.equal(graph(ids[:3], salts), eager[:, :3])
    assert torch.equal(torch.jit.script(graph)(ids, salts), eager)


@every_kind_of_memory
def test_meta_ids_have_meta_addresses(memory: Memory) -> None:
    addressing = memory.addressing().to("meta")
    ids = torch.arange(10, device="meta")
    rows = addressing(ids, torch.zeros(1, dtype=torch.int64, device="meta"), 0, memory.n_chunks)
    assert rows.device.type == "meta" and rows.shape == (memory.n_chunks, 10) and rows.dtype is torch.int64


@pytest.mark.parametrize("n_dedicated, rows", [(1, 2), (5, 8), (64, 100), (1000, 1001)])
def test_dedicated_ids_have_a_row_of_their_own(n_dedicated: int, rows: int) -> None:
    dedicated = [("a", 3 * i) for i in range(n_dedicated)]
    addressing = Memory(rows=rows, dedicated=dedicated).addressing()
    own = addresses(addressing, "a", torch.tensor([id for _, id in dedicated]))
    assert torch.equal(own, own[:1].expand_as(own))  # on all chunks the same
    assert own[0].sort().values.tolist() == list(range(n_dedicated))  # each another
    every_id = torch.cat([torch.arange(20_000), random_ids(20_000)])
    for table, ids in (("a", every_id[~torch.isin(every_id, 3 * torch.arange(n_dedicated))]), ("b", every_id)):
        assert int(addresses(addressing, table, ids).min()) >= n_dedicated


def test_one_address_in_the_other_table_is_by_chance() -> None:
    for memory in (Memory(rows=1000), Memory(rows=1024)):
        addressing, ids = memory.addressing(), torch.arange(20_000)
        equal = addresses(addressing, "a", ids) == addresses(addressing, "b", ids)
        assert abs(equal.double().mean() - 1 / memory.rows) < 5 * (1 / memory.rows / equal.numel()) ** 0.5


@pytest.mark.parametrize("kind", ["hashed", "signatures"])
def test_another_seed_gives_other_addresses(kind: str) -> None:
    ids = torch.arange(5000)
    signatures = random_signatures(ids.tolist(), "a", 4, 0) if kind == "signatures" else {}
    one, other = (
        addresses(Memory(rows=1000, signatures=signatures, seed=seed).addressing(), "a", ids, seed) for seed in (0, 1)
    )
    equal = one == other
    assert abs(equal.double().mean() - 1 / 1000) < 5 * (1 / 1000 / equal.numel()) ** 0.5


ID_PATTERNS = {
    "sequential": lambda n: torch.arange(n),
    "negative": lambda n: -torch.arange(n),
    "multiples of 2**32": lambda n: (torch.arange(n) - n // 2) << 32,
    "high bits only": lambda n: torch.arange(n) << 47,
    "random": lambda n: torch.randint(INT64_MIN, INT64_MAX, (n,), generator=torch.Generator().manual_seed(n)),
}
every_id_pattern = pytest.mark.parametrize("ids", [p(30_000) for p in ID_PATTERNS.values()], ids=ID_PATTERNS.keys())


def hashed_or_signed(kind: str, ids: Tensor, rows: int) -> Tensor:
    """Addresses [8, L] of ids that are all hashed, or that all have a signature of 4 values."""
    if kind == "hashed":
        return addresses(Memory(rows=rows).addressing(), "a", ids)
    keys = mix64(ids ^ table_salt(0, "a"))
    low, starts, order = build_index(keys)
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-(2**31), 2**31, (ids.numel(), 4), generator=generator).int()[order]
    memory = MemoryAllocation("m", 32, 4, rows, ("a",), signature_low=low, signature_starts=starts, signatures=values)
    return addresses(MemoryAddressing(memory, 0), "a", ids)


@pytest.mark.parametrize("rows", [2, 3, 16, 100, 1000, 1024])
@pytest.mark.parametrize("kind", ["hashed", "signatures"])
@every_id_pattern
def test_addresses_are_uniform_over_the_rows(ids: Tensor, kind: str, rows: int) -> None:
    n_chunks = 8
    counts = [torch.bincount(chunk, minlength=rows) for chunk in hashed_or_signed(kind, ids, rows)]
    p = min(stats.chisquare(count.numpy()).pvalue for count in counts)
    assert p * n_chunks > 1e-3


@pytest.mark.parametrize("rows", [2, 16, 15])
@pytest.mark.parametrize("kind", ["hashed", "signatures"])
@every_id_pattern
def test_chunks_are_independent_of_each_other(ids: Tensor, kind: str, rows: int) -> None:
    chunks = hashed_or_signed(kind, ids, rows)
    pairs = list(itertools.combinations(range(chunks.size(0)), 2))
    p = 1.0
    for i, j in pairs:
        table = torch.bincount(chunks[i] * rows + chunks[j], minlength=rows * rows).view(rows, rows)
        p = min(p, stats.chi2_contingency(table.numpy(), correction=False).pvalue)
    assert p * len(pairs) > 1e-3


@pytest.mark.parametrize("rows", [64, 101])
@pytest.mark.parametrize("kind", ["hashed", "signatures"])
@every_id_pattern
def test_two_ids_meet_on_two_chunks_at_once_with_probability_one_over_rows_squared(
    ids: Tensor, kind: str, rows: int
) -> None:
    chunks = hashed_or_signed(kind, ids, rows)
    pairs_of_ids = ids.numel() * (ids.numel() - 1) / 2
    for i, j in itertools.combinations(range(chunks.size(0)), 2):
        count = torch.bincount(chunks[i] * rows + chunks[j]).double()
        met = float((count * (count - 1) / 2).sum())
        expected = pairs_of_ids / rows**2
        assert abs(met - expected) < 5 * expected**0.5


# The index of ids, against a dict.


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
def test_index_finds_what_a_dict_finds(keys: list[int], others: list[int]) -> None:
    low, starts, order = build_index(torch.tensor(keys))
    kept = [keys[i] for i in order.tolist()]
    reference = {key: position for position, key in enumerate(kept)}
    assert len(reference) == low.numel() and reference.keys() <= set(keys)
    # Keys next to those in the index, and keys with their low or high half, are the hardest to tell from them.
    near = [signed(key ^ (1 << bit)) for key in keys[:20] for bit in (0, 31, 32, 63)]
    wanted = [*keys, *others, *near]
    found = IdIndex(low, starts)(torch.tensor(wanted)).tolist()
    for key, position in zip(wanted, found):
        if key in reference:
            assert position == reference[key]
        elif position != -1:  # documented: one that agrees in the 32 low bits may be taken for it
            assert low32(kept[position]) == low32(key)
    for key in set(keys) - reference.keys():  # left out only for a smaller one with the same low bits
        assert any(low32(other) == low32(key) and other < key for other in kept)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 9, 16, 17, 1000, 4096, 5000, 100_000])
def test_index_finds_every_mixed_key_and_no_other(n: int) -> None:
    keys = mix64(torch.arange(n))
    low, starts, order = build_index(keys)
    index = IdIndex(low, starts)
    assert torch.equal(order[index(keys)], torch.arange(n))
    assert index(mix64(torch.arange(n, 2 * n))).unique().tolist() == [-1]
    assert low.nbytes + starts.nbytes <= 6 * n + 16


@holds_for_every_input(30)
@given(st.integers(1, 2000), st.randoms(use_true_random=False))
def test_index_does_not_depend_on_the_order_of_the_keys(n: int, random) -> None:
    keys = mix64(torch.arange(n))
    order = torch.tensor(random.sample(range(n), n))
    low, starts, position = build_index(keys)
    shuffled_low, shuffled_starts, shuffled_position = build_index(keys[order])
    assert torch.equal(low, shuffled_low) and torch.equal(starts, shuffled_starts)
    assert torch.equal(keys[position], keys[order][shuffled_position])


# The paper's theorem: ids of similarity J agree on a chunk with probability J**power, or else by chance.

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
    apart = 1_000_000 if first == second else 0  # ids of one feature differ, those of two features need not
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
    EmbeddingBagConfig(name="t_user", num_embeddings=10_000, embedding_dim=32, feature_names=["user"]),
    EmbeddingBagConfig(name="t_item", num_embeddings=10_000, embedding_dim=32, feature_names=["item", "last_item"]),
    EmbeddingBagConfig(name="t_tag", num_embeddings=10_000, embedding_dim=32, feature_names=["tags"]),
    EmbeddingBagConfig(name="t_row", num_embeddings=10_000, embedding_dim=32, feature_names=["row"]),
]
TABLE_OF = {feature: table.name for table in TABLES for feature in table.feature_names}


def learned_addressing(rows: list[RowOfIds], power: int, within_table: bool = False) -> MemoryAddressing:
    tables = [table for table in TABLES if any(row.get(name) for row in rows for name in table.feature_names)]
    builder = AllocationBuilder(
        tables,
        LMAConfig(memory_bytes=8 << 20, chunk_dim=4, seed=1),
        source=RowsMinHash(power=power, num_values=NUM_VALUES, max_rows=None, within_table=within_table),
        dedicated_fraction=0.0,
        signature_fraction=0.5,
    )
    features = [name for table in tables for name in table.feature_names]
    (memory,) = builder.update(kjt_of(rows, features)).build().memories
    assert memory.signatures.shape == (2 * PAIRS * len(JACCARDS), NUM_VALUES)
    return MemoryAddressing(replace(memory, rows=SHARED_ROWS), seed=1)


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


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
@pytest.mark.parametrize("power", [1, 2, 3])
def test_ids_agree_on_a_chunk_with_the_probability_of_the_theorem(fields: tuple[str, str], power: int) -> None:
    if TABLE_OF[fields[0]] == TABLE_OF[fields[1]] and fields[0] != fields[1]:
        # Two features of one table have one set of ids: make theirs disjoint, as ids of one table are one id.
        rows, pairs = theorem_rows("tags", "tags")
        rows = [
            {
                fields[0]: [id for id in row["tags"] if id < 1_000_000],
                fields[1]: [id for id in row["tags"] if id >= 1_000_000],
                "row": row["row"],
            }
            for row in rows
        ]
    else:
        rows, pairs = theorem_rows(*fields)
    addressing = learned_addressing(rows, power)
    for jaccard, (first, second) in pairs.items():
        equal = addresses(addressing, TABLE_OF[fields[0]], first, 1) == addresses(
            addressing, TABLE_OF[fields[1]], second, 1
        )  # (n_chunks, pairs)
        probability = jaccard**power + (1 - jaccard**power) / SHARED_ROWS
        # Chunks j and j + K follow the same value and agree together: each K of them are a sample of their own.
        for chunks in equal.split(NUM_VALUES):
            assert_agreement(chunks, probability)
        for chunk in equal:
            assert_agreement(chunk, probability)


def test_agreement_on_different_values_is_independent() -> None:
    rows, pairs = theorem_rows("user", "item")
    addressing = learned_addressing(rows, power=1)
    for jaccard, (first, second) in pairs.items():
        equal = addresses(addressing, "t_user", first, 1) == addresses(addressing, "t_item", second, 1)
        probability = jaccard + (1 - jaccard) / SHARED_ROWS
        for i, j in itertools.combinations(range(NUM_VALUES), 2):
            assert_agreement(equal[i] & equal[j], probability**2)


@pytest.mark.parametrize("power", [1, 2])
def test_sharing_within_a_table_leaves_only_chance_between_tables(power: int) -> None:
    rows, pairs = theorem_rows("user", "item")
    addressing = learned_addressing(rows, power, within_table=True)
    for first, second in pairs.values():
        equal = addresses(addressing, "t_user", first, 1) == addresses(addressing, "t_item", second, 1)
        for chunks in equal.split(NUM_VALUES):
            assert_agreement(chunks, 1 / SHARED_ROWS)


@pytest.mark.parametrize("power", [1, 2])
def test_sharing_within_a_table_follows_the_theorem_inside_it(power: int) -> None:
    rows, pairs = theorem_rows("tags", "tags")
    addressing = learned_addressing(rows, power, within_table=True)
    for jaccard, (first, second) in pairs.items():
        equal = addresses(addressing, "t_tag", first, 1) == addresses(addressing, "t_tag", second, 1)
        probability = jaccard**power + (1 - jaccard**power) / SHARED_ROWS
        for chunks in equal.split(NUM_VALUES):
            assert_agreement(chunks, probability)
