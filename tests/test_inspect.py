"""What `torchrec-lma inspect` says, against counts and sets in plain Python."""

import base64
import errno
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from integer_reference import reference_mix64
from safetensors.torch import save_file
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_lma.inspection.measure as measure
import torchrec_lma.inspection.observed as observed_module
from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection, cli
from torchrec_lma.addressing import Addressing
from torchrec_lma.allocation import ContextMinHash, RowsMinHash
from torchrec_lma.hashing import unmix64
from torchrec_lma.inspection import Inspection, ObservedIds, command, inspect, write_page
from torchrec_lma.inspection.observed import Similarity

TABLES = [
    EmbeddingBagConfig(name="t_user", num_embeddings=4000, embedding_dim=16, feature_names=["user"]),
    EmbeddingBagConfig(name="t_item", num_embeddings=2000, embedding_dim=16, feature_names=["item"]),
    EmbeddingBagConfig(name="t_day", num_embeddings=900, embedding_dim=8, feature_names=["day"]),
    EmbeddingBagConfig(name="t_tag", num_embeddings=900, embedding_dim=16, feature_names=["tag"]),
]
TABLE_OF = {table.feature_names[0]: table.name for table in TABLES}
FEATURE_OF = {table: feature for feature, table in TABLE_OF.items()}
CONFIG = LMAConfig(compression=40, chunk_dim=4, seed=5)
SOURCE = RowsMinHash(power=2, num_values=2, min_support=1)
Row = dict[str, list[int]]


def some_rows(n: int = 500) -> list[Row]:
    """Items of a user come in runs, so that ids are similar; some bags are empty, some rows come twice."""
    random = torch.Generator().manual_seed(1)
    draws = torch.randint(0, 1000, (n, 3), generator=random).tolist()
    rows = [
        {
            "user": [a % 60 - 5],
            "item": [a % 60 % 40 * 2**40 if b % 4 else c % 90],
            "day": [c % 30] if c % 7 else [],
            "tag": sorted({a % 12, b % 12}),
        }
        for a, b, c in draws
    ]
    return rows + rows[: n // 5]


ROWS = some_rows()


def kjt(rows: list[Row]) -> KeyedJaggedTensor:
    bags = [row[feature] for feature in TABLE_OF for row in rows]
    return KeyedJaggedTensor(
        keys=list(TABLE_OF),
        values=torch.tensor([id for bag in bags for id in bag]),
        lengths=torch.tensor([len(bag) for bag in bags], dtype=torch.int32),
    )


def built(source: RowsMinHash | None = SOURCE, rows: list[Row] = ROWS, config: LMAConfig = CONFIG) -> Allocation:
    return AllocationBuilder(TABLES, config, source=source, signature_fraction=0.3).update(kjt(rows)).build()


def observed(rows: list[Row] = ROWS) -> ObservedIds:
    return ObservedIds((kjt(rows[start : start + 64]) for start in range(0, len(rows), 64)), TABLE_OF, CONFIG.seed)


def observed_sample(max_rows: int | None) -> ObservedIds:
    return ObservedIds([kjt(ROWS)], TABLE_OF, CONFIG.seed, max_rows)


def occurrences(rows: list[Row] = ROWS) -> Counter:
    return Counter((TABLE_OF[feature], id) for row in rows for feature, ids in row.items() for id in ids)


def distinct_rows(rows: list[Row] = ROWS) -> list[tuple[Row, int]]:
    """Rows and how often each came."""
    counted = Counter(json.dumps(row) for row in rows)
    return [(json.loads(row), count) for row, count in counted.items()]


@pytest.fixture(scope="module")
def allocation() -> Allocation:
    made = built()
    assert all(memory.dedicated_rows and memory.signatures.numel() for memory in made.memories)
    return made


@pytest.fixture(scope="module")
def inspection(allocation: Allocation) -> Inspection:
    return inspect(allocation, observed())


def addresses(allocation: Allocation, table: str, id: int) -> list[int]:
    ebc = LMAEmbeddingBagCollection(TABLES, allocation.config, allocation)
    return ebc.addresses(FEATURE_OF[table], torch.tensor([id]))[0].tolist()


# What is observed.


@given(st.integers(-(2**63), 2**63 - 1))
def test_an_id_comes_back_from_its_mixed_key(id: int) -> None:
    assert unmix64(torch.tensor([reference_mix64(id)])).item() == id


def test_ids_are_counted_by_table() -> None:
    ids = observed()
    tables = [ids.tables[index] for index in ids.table.tolist()]
    assert dict(zip(zip(tables, ids.ids.tolist()), ids.count.tolist())) == occurrences()
    assert (ids.rows_seen, ids.rows_sampled) == (len(ROWS), len(distinct_rows()))


def test_a_sample_of_rows_is_bounded() -> None:
    ids = observed_sample(20)
    assert ids.rows_sampled == 20
    assert set(ids.count.tolist()) - {0} and ids.count.sum() < sum(occurrences().values())


def plain_sets(
    name: str, fields: tuple[str, ...] = (), weighted: bool = False, rows: list[Row] = ROWS
) -> dict[tuple[str, int], Counter]:
    """The set of each id whose similarity a source is about."""
    sets: dict[tuple[str, int], Counter] = defaultdict(Counter)
    for number, (row, count) in enumerate(distinct_rows(rows)):
        members = [(TABLE_OF[feature], id) for feature, ids in row.items() for id in ids]
        for member in members:
            context = [o for o in members if o[0] != member[0] and (not fields or o[0] in fields)]
            for element in [number] if name == "rows-minhash" else context:
                sets[member][element] += count
    if not weighted:
        for member, elements in sets.items():
            sets[member] = Counter(dict.fromkeys(elements, 1))
    return sets


def plain_jaccard(a: Counter, b: Counter) -> float:
    return (a & b).total() / (a | b).total() if a | b else 0.0


@pytest.mark.parametrize("weighted", [False, True], ids=["sets", "weighted"])
@pytest.mark.parametrize(
    "name, fields", [("rows-minhash", ()), ("context-minhash", ()), ("context-minhash", ("t_tag",))]
)
def test_similarity_is_the_jaccard_of_sets_in_plain_python(
    name: str, fields: tuple[str, ...], weighted: bool, monkeypatch
) -> None:
    sets = plain_sets(name, fields, weighted)
    monkeypatch.setattr(observed_module, "BLOCK_KEYS", 50)
    ids = observed()
    similarity = Similarity(ids, {"name": name, "weighted": weighted, "fields": list(fields)})
    members = [(ids.tables[table], id) for table, id in zip(ids.table.tolist(), ids.ids.tolist())]
    above = 0
    for a in range(0, len(members), 7):
        others = torch.arange(0, len(members), 5)
        expected = [plain_jaccard(sets[members[a]], sets[members[b]]) for b in others.tolist()]
        assert similarity(a, others).tolist() == pytest.approx(expected)
        above += sum(0 < one < 1 for one in expected)
    assert above > 20


def test_similarity_is_that_of_the_rows_that_the_source_takes() -> None:
    """As many rows are observed as the table that takes most of them needs; each source has its own first ones."""
    few, many = observed_sample(20), observed_sample(None)
    measure_few = Similarity(few, SOURCE.to_dict())
    measure_many = Similarity(many, replace(SOURCE, max_rows=20).to_dict())
    members = [(few.tables[table], id) for table, id in zip(few.table.tolist(), few.ids.tolist())]
    in_many = torch.tensor([many.find(*member) for member in members])
    above = 0
    for a in range(len(members)):
        expected = measure_few(a, torch.arange(len(members)))
        assert torch.equal(measure_many(int(in_many[a]), in_many), expected)
        above += int((expected > 0).sum())
    assert above > len(members)


# The report.


def test_ids_by_kind_are_those_of_the_builder(allocation: Allocation, inspection: Inspection) -> None:
    without_data = inspect(allocation)
    kinds = [(t.table, t.memory, t.seen, t.dedicated, t.with_signature, t.hashed) for t in inspection.tables]
    assert kinds == [(t.table, t.memory, t.seen, t.dedicated, t.with_signature, t.hashed) for t in without_data.tables]
    assert [t.table for t in inspection.tables] == [spec.name for spec in allocation.tables]
    for table in inspection.tables:
        recorded = allocation.provenance["ids"][table.memory][table.table]
        assert (table.dedicated, table.with_signature) == (recorded["dedicated"], recorded["with_signature"])
        assert table.seen == len([1 for name, _ in occurrences() if name == table.table])
        assert table.dedicated + table.with_signature + table.hashed == table.seen


def plain_histogram(allocation: Allocation, ids: list[tuple[str, int]], memory) -> list[int]:
    cells: Counter = Counter()
    for table, id in ids:
        for chunk, row in enumerate(addresses(allocation, table, id)):
            if row >= memory.dedicated_rows:
                cells[chunk, row] += 1
    all_cells = (memory.rows - memory.dedicated_rows) * memory.n_chunks
    counted = Counter(cells.values())
    counted[0] = all_cells - len(cells)
    return [counted[load] for load in range(max(counted) + 1)]


@pytest.mark.parametrize("counters", [1 << 25, 1], ids=["all chunks at once", "one chunk at a time"])
def test_loads_are_counts_of_addresses(allocation: Allocation, counters: int, monkeypatch) -> None:
    monkeypatch.setattr(measure, "COUNTERS", counters)
    monkeypatch.setattr(measure, "BLOCK_IDS", 13)
    inspection = inspect(allocation, observed())
    for memory, described in zip(allocation.memories, inspection.memories):
        ids = [(table, id) for table, id in occurrences() if table in memory.tables]
        histogram = plain_histogram(allocation, ids, memory)
        assert list(described.load.histogram) == histogram
        for table in inspection.tables:
            if table.table in memory.tables:
                own = [(name, id) for name, id in ids if name == table.table]
                assert table.load is not None
                assert list(table.load.histogram) == plain_histogram(allocation, own, memory)


def test_statistics_of_a_load() -> None:
    loads = [0, 0, 1, 1, 1, 2, 3, 3, 9, 9]
    load = measure.Load.of(torch.bincount(torch.tensor(loads)))
    assert (load.mean, load.median, load.p99, load.max, load.unused) == (2.9, 1, 9, 9, 0.2)


def test_without_data_loads_are_of_the_ids_with_a_signature(allocation: Allocation) -> None:
    addressing = Addressing(allocation)
    for memory, described in zip(allocation.memories, inspect(allocation).memories):
        one = addressing[memory.name]
        ids = observed()
        with_signature = [
            (ids.tables[table], id)
            for table, id in zip(ids.table.tolist(), ids.ids.tolist())
            if ids.tables[table] in memory.tables
            and measure._kinds(one, torch.tensor([id]), ids.salts[[table]]).item() == measure.SIGNATURE
        ]
        assert len(with_signature) == memory.signatures.size(0)
        assert list(described.load.histogram) == plain_histogram(allocation, with_signature, memory)


def test_every_entry_of_an_index_is_found_by_its_key(allocation: Allocation) -> None:
    index = Addressing(allocation)["memory_16"].signature_index
    positions = torch.arange(index.low.numel())
    assert torch.equal(index(measure.index_keys(index, positions)), positions)


def test_bytes_by_part_are_the_budget(allocation: Allocation, inspection: Inspection) -> None:
    for memory, described in zip(allocation.memories, inspection.memories):
        parts = described.bytes_by_part
        assert parts["shared rows"] + parts["dedicated rows"] == memory.rows * memory.dim * 4
        assert parts["signatures"] + parts["index of ids"] == memory.nbytes
    of_tables = sum(table.signature_bytes for table in inspection.tables)
    of_memories = sum(
        m.signatures.nbytes + m.signature_low.nbytes + m.signature_starts.nbytes for m in allocation.memories
    )
    assert of_tables == pytest.approx(of_memories, abs=len(TABLES))


ASKED = [("t_user", 3), ("t_item", 5 * 2**40), ("t_tag", 4), ("t_item", -77)]


@pytest.mark.parametrize("table, id", ASKED)
@pytest.mark.parametrize(
    "source",
    [SOURCE, ContextMinHash(min_support=1), replace(SOURCE, within_table=True)],
    ids=["rows", "context", "own"],
)
def test_most_similar_ids_are_those_of_the_highest_jaccard(source, table: str, id: int) -> None:
    allocation = built(source)
    (found,) = inspect(allocation, observed(), [(table, id)], top=8).neighbours
    memory = next(memory for memory in allocation.memories if table in memory.tables)
    sets, expected = plain_sets(source.NAME), []
    for other in occurrences():
        compared = other[0] == table if source.within_table else other[0] in memory.tables
        jaccard = plain_jaccard(sets[table, id], sets[other])
        if compared and other != (table, id) and jaccard > 0:
            expected.append(jaccard)
    if found.count:
        assert found.by_similarity
        assert [one.similarity for one in found.similar] == pytest.approx(sorted(expected, reverse=True)[:8])
    own = addresses(allocation, table, id)
    for one in found.similar:
        row = addresses(allocation, one.table, one.id)
        assert sum(a == b for a, b in zip(own, row)) / len(own) == one.shared
        if one.similarity is not None:
            assert one.similarity == pytest.approx(plain_jaccard(sets[table, id], sets[one.table, one.id]))


@pytest.mark.parametrize("table, id", ASKED)
def test_where_similarity_is_not_known_ids_that_share_most_memory_are_listed(table: str, id: int) -> None:
    allocation = built(source=None)
    inspection = inspect(allocation, observed(), [(table, id)], top=8)
    (found,) = inspection.neighbours
    memory = next(memory for memory in allocation.memories if table in memory.tables)
    own = addresses(allocation, table, id)
    expected = []
    for (other_table, other), count in occurrences().items():
        if other_table in memory.tables and (other_table, other) != (table, id):
            shared = sum(a == b for a, b in zip(own, addresses(allocation, other_table, other))) / len(own)
            if shared:
                expected.append((-shared, -count))
    assert [(-s.shared, -s.count) for s in found.similar] == sorted(expected)[:8]
    assert all(s.similarity is None for s in found.similar) and not found.by_similarity
    assert "its similarity is not known" in str(inspection)
    assert found.count == occurrences()[table, id]
    assert (found.kind == "dedicated") == (len(found.similar) == 0)


BY_TABLE = {"t_user": ContextMinHash(power=2, num_values=16), "t_item": ContextMinHash(power=1, num_values=8)}


@pytest.mark.parametrize(
    "source, n_sources",
    [
        (RowsMinHash(power=1, num_values=16), 1),
        (RowsMinHash(power=2, num_values=16, within_table=True), 0),  # a row has one user, one item and one tag
        (ContextMinHash(power=1, num_values=16, fields=("t_user", "t_item", "t_tag")), 1),
        (ContextMinHash(power=2, num_values=16, fields=("t_user",), weighted=True, within_table=True), 1),
        (BY_TABLE, 2),
    ],
    ids=["rows", "rows within a table", "context", "context within a table", "by table"],
)
def test_shared_memory_follows_the_theorem(source, n_sources: int) -> None:
    """Enough signatures for pairs of every similarity: their mean is J ** power + (1 - J ** power) / rows."""
    rows = grouped_rows()
    config = LMAConfig(memory_bytes=1 << 20, chunk_dim=1, seed=CONFIG.seed)
    builder = AllocationBuilder(TABLES, config, source=source, dedicated_fraction=0.0, signature_fraction=0.5)
    allocation = builder.update(kjt(rows)).build()
    found = [pairs for pairs in inspect(allocation, observed(rows)).memories[0].pairs if max(pairs.similarity) > 0]
    assert len(found) == n_sources
    for pairs in found:
        power, num_values = pairs.source["power"], pairs.source["num_values"]
        similarity, shared = torch.tensor(pairs.similarity), torch.tensor(pairs.shared)
        agree = similarity**power
        expected = agree + (1 - agree) / allocation.memories[0].rows
        # Ten standard errors of independent pairs: those here have ids in common.
        error = (expected * (1 - expected) / num_values).sum().sqrt() / len(expected)
        assert abs((shared - expected).mean()) < 10 * error
        assert len(pairs.bins) >= 2
        for one in pairs.bins:
            assert abs(one["shared"] - one["theory"]) < 3 * one["error_at_most"] + 1e-9


def grouped_rows(n: int = 3000) -> list[Row]:
    """Users, items and tags of 40 groups that stay together more or less often, in pairs of twins."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(n):
        group = int(torch.randint(0, 40, (1,), generator=generator))
        loyal = torch.rand(3, generator=generator) < torch.tensor([0.9, 0.7, 0.5])
        other = torch.randint(0, 40, (3,), generator=generator).tolist()
        user, item, tag = (group if stays else stray for stays, stray in zip(loyal.tolist(), other))
        # Pairs of twins, so that ids of one table are similar as well.
        rows.append({"user": [user + 40 * (number % 2)], "item": [item], "day": [number], "tag": [tag]})
    return rows


def test_pairs_are_of_every_similarity_there_is() -> None:
    """Most ids are without a signature, and those that have one share nothing with most others."""
    rows = grouped_rows(1500)
    rows += [{"user": [1000 + n], "item": [1000 + n], "day": [], "tag": [5000 + 7 * n]} for n in range(1500)]
    source = RowsMinHash(power=1, num_values=2, min_support=2)
    config = LMAConfig(memory_bytes=1 << 20, seed=CONFIG.seed)
    builder = AllocationBuilder(TABLES, config, source=source, dedicated_fraction=0.0)
    inspection = inspect(builder.update(kjt(rows)).build(), observed(rows))
    (pairs,) = inspection.memories[0].pairs
    sets = {member: elements for member, elements in plain_sets(source.NAME, rows=rows).items() if len(elements) > 1}
    members = [member for member in sets if member[0] != "t_day"]
    there = [plain_jaccard(sets[a], sets[b]) for n, a in enumerate(members) for b in members[:n]]
    for low in range(10):
        in_data = sum(low <= 10 * one < low + 1 for one in there)
        sampled = sum(low <= 10 * one < low + 1 for one in pairs.similarity)
        assert min(in_data, 40) <= sampled <= measure.PAIRS_PER_BIN
    assert sum(one < 0.1 for one in pairs.similarity) < len(pairs.similarity) / 2


def test_the_error_of_a_mean_is_no_larger_than_said_over_allocations() -> None:
    """All pairs of one allocation see the same K hash functions, so only over seeds can the error be measured."""
    rows, deviations = grouped_rows(500), defaultdict(list)
    source = RowsMinHash(power=1, num_values=4)
    for seed in range(12):
        config = LMAConfig(memory_bytes=1 << 20, seed=seed)
        allocation = (
            AllocationBuilder(TABLES, config, source, dedicated_fraction=0.0, signature_fraction=0.5)
            .update(kjt(rows))
            .build()
        )
        for one in inspect(allocation, ObservedIds([kjt(rows)], TABLE_OF, seed)).memories[0].pairs[0].bins:
            theory = one["theory"]
            assert one["error_at_most"] <= (theory * (1 - theory) / 4) ** 0.5 + 1e-9
            deviations[int(10 * one["similarity"])].append((one["shared"] - theory) / one["error_at_most"])
    for several in deviations.values():
        if len(several) > 6:
            assert (sum(one**2 for one in several) / len(several)) ** 0.5 < 1.3


def test_there_are_no_pairs_without_a_source_or_without_data(allocation: Allocation) -> None:
    assert not any(memory.pairs for memory in inspect(allocation).memories)
    hashed = inspect(built(source=None), observed())
    assert not any(memory.pairs for memory in hashed.memories)
    assert "no source of similarity" in str(hashed)


def test_an_allocation_without_bytes_is_described(tmp_path: Path) -> None:
    hashed = Allocation.hashed(TABLES, CONFIG)
    alone, with_data = inspect(hashed), inspect(hashed, observed(), [("t_user", 3)])
    assert [memory.load.unused for memory in alone.memories] == [1.0, 1.0]
    assert [(t.seen, t.hashed) for t in alone.tables] == [(0, 0)] * 4
    assert all(table.hashed == table.seen > 0 and table.signature_bytes == 0 for table in with_data.tables)
    for number, inspection in enumerate((alone, with_data)):
        write_page(inspection, "hashed", tmp_path / f"{number}.html")
        assert "no source of similarity" in (tmp_path / f"{number}.html").read_text()


def test_ids_observed_for_another_allocation_are_refused(allocation: Allocation) -> None:
    fewer = {feature: table for feature, table in TABLE_OF.items() if feature != "tag"}
    with pytest.raises(ValueError, match=r"observed for tables \['t_user', 't_item', 't_day'\] and seed 5"):
        inspect(allocation, ObservedIds([kjt(ROWS)], fewer, CONFIG.seed))
    with pytest.raises(ValueError, match="and seed 6, the allocation has .* and seed 5"):
        inspect(allocation, ObservedIds([kjt(ROWS)], TABLE_OF, seed=6))
    with pytest.raises(ValueError, match="no row with an id"):
        ObservedIds([kjt([{feature: [] for feature in TABLE_OF}])], TABLE_OF, CONFIG.seed)


def test_a_sample_is_not_reported_as_the_data(allocation: Allocation, inspection: Inspection) -> None:
    sample = observed_sample(20)
    sampled = inspect(allocation, sample)
    of_all = [(t.table, t.seen, t.dedicated, t.with_signature, t.hashed) for t in inspection.tables]
    assert [(t.table, t.seen, t.dedicated, t.with_signature, t.hashed) for t in sampled.tables] == of_all
    assert f"from 20 distinct rows of the data, a sample of its {len(ROWS)} rows: loads" in str(sampled)
    assert (sampled.rows_observed, sampled.rows_seen, sampled.is_sample) == (20, len(ROWS), True)
    assert not inspection.is_sample and "sample of" not in inspection.about_data()
    # An allocation that counted no ids: those of the sample.
    hashed = inspect(Allocation.hashed(TABLES, CONFIG), sample)
    assert sum(table.seen for table in hashed.tables) == sum(table.hashed for table in hashed.tables) == len(sample.ids)


def test_ids_counted_in_a_sample_are_said_to_be(allocation: Allocation) -> None:
    builder = AllocationBuilder(TABLES, CONFIG, replace(SOURCE, max_rows=20), max_ids=5)
    assert "counted them in a sample of 20 distinct rows" in str(inspect(builder.update(kjt(ROWS)).build()))
    assert "sample of" not in inspect(allocation).about_data()


# The command.


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def files(tmp_path_factory, allocation: Allocation) -> tuple[str, list[str]]:
    """An allocation file and the options that give its data."""
    folder = tmp_path_factory.mktemp("inspect")
    allocation.save(folder / "allocation.safetensors")
    frame = pd.DataFrame(
        {"label": [i % 2 for i in range(len(ROWS))]} | {feature: [row[feature] for row in ROWS] for feature in TABLE_OF}
    )
    frame.to_parquet(folder / "data.parquet")
    data = ["--data", str(folder / "data.parquet"), "--label", "label", "--categorical", *TABLE_OF]
    return str(folder / "allocation.safetensors"), [*data, "--test-fraction", "0.1", "--validation-fraction", "0"]


def test_the_command_prints_the_report(files, allocation: Allocation, capsys) -> None:
    path, data = files
    assert cli.main(["inspect", path]) == 0
    assert capsys.readouterr().out.rstrip("\n") == str(inspect(allocation))
    assert cli.main(["inspect", path, *data, "--id", "t_tag=4", "--id", "t_user=-5", "--top", "3"]) == 0
    out = capsys.readouterr().out
    for said in (allocation.fingerprint, "rows-minhash (", "t_tag=4 (", "t_user=-5 (", "Jaccard", "p99"):
        assert said in out
    assert "compression 40" in out


def test_json_has_all_of_it(files, capsys) -> None:
    path, data = files
    assert cli.main(["inspect", path, *data, "--json", "--id", "t_user=3"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {memory["memory"] for memory in record["memories"]} == {"memory_16", "memory_8"}
    assert [table["table"] for table in record["tables"]] == [spec.name for spec in Allocation.load(path).tables]
    assert record["neighbours"][0]["id"] == 3
    assert record["memories"][0]["pairs"][0]["source"]["name"] == "rows-minhash"


def test_the_page_needs_nothing_else(files, tmp_path: Path, capsys) -> None:
    path, data = files
    page = tmp_path / "page.html"
    assert cli.main(["inspect", path, *data, "--html", str(page), "--id", "t_user=3"]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    text = page.read_text()
    parser = Tags()
    parser.feed(text)
    assert not parser.open
    sources = [attributes["src"] for tag, attributes in parser.seen if tag == "img"]
    pairs = len(re.findall("memory that pairs of ids share", text))
    assert pairs and len(sources) == 1 + 2 + pairs  # the budget, the load of two memories, the pairs
    for source in sources:
        assert source is not None
        kind, _, image = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(image)[:8] == b"\x89PNG\r\n\x1a\n"
    assert not {tag for tag, _ in parser.seen} & {"script", "link", "iframe"}
    assert "http" not in re.sub('src="[^"]*"', "", text)


def test_a_page_that_cannot_be_written_leaves_nothing(files, tmp_path: Path, capsys) -> None:
    path, _ = files
    (tmp_path / "page.html").mkdir()
    assert cli.main(["inspect", path, "--html", str(tmp_path / "page.html")]) == 2
    assert str(tmp_path / "page.html") in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


@pytest.fixture
def no_pass(monkeypatch) -> None:
    def observe(*_) -> None:
        raise AssertionError("the data were read")

    monkeypatch.setattr(command, "_observe", observe)


def test_a_page_that_cannot_be_written_is_refused_before_the_data_are_read(
    files, tmp_path: Path, no_pass, monkeypatch, capsys
) -> None:
    path, data = files
    page = tmp_path / "none" / "page.html"
    assert cli.main(["inspect", path, *data, "--html", str(page)]) == 2
    assert f"{page} cannot be written: there is no directory" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["inspect", path, *data, "--html", str(tmp_path / "page.html")]) == 2
    assert "torchrec_lma[plot]" in capsys.readouterr().err


def test_the_report_is_printed_even_if_the_page_fails(files, tmp_path: Path, monkeypatch, capsys) -> None:
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "temporary name")

    monkeypatch.setattr(Path, "write_bytes", full)
    page = tmp_path / "page.html"
    assert cli.main(["inspect", files[0], "--html", str(page)]) == 2
    out, err = capsys.readouterr()
    assert "fingerprint" in out and f"No space left on device: '{page}'" in err


def test_a_name_that_ends_in_png_gets_the_plots(files, tmp_path: Path, capsys) -> None:
    path, data = files
    assert cli.main(["inspect", path, *data, "--html", str(tmp_path / "plots.png")]) == 0
    assert (tmp_path / "plots.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_labels_are_not_looked_at(tmp_path: Path, files, capsys) -> None:
    frame = pd.DataFrame({"label": ["no label"] * len(ROWS)} | {f: [row[f] for row in ROWS] for f in TABLE_OF})
    frame.to_parquet(tmp_path / "data.parquet")
    data = ["--data", str(tmp_path / "data.parquet"), "--categorical", *TABLE_OF]
    for label in ([], ["--label", "label"]):
        assert cli.main(["inspect", files[0], *data, *label]) == 0, capsys.readouterr().err


def test_other_rows_than_the_allocation_was_built_from_are_said(files, allocation: Allocation, capsys) -> None:
    path, data = files
    assert inspect(allocation, observed()).warning() is None and inspect(allocation).warning() is None
    assert cli.main(["inspect", path, *data]) == 0
    said = rf"warning: the data have \d+ training rows, the allocation was built from {len(ROWS)}: "
    assert re.search(said, capsys.readouterr().out)
    assert "warning: " in str(inspect(allocation, observed(ROWS[:100])))
    assert "other data" in inspect(allocation, observed(ROWS[:100])).to_dict()["warning"]


STRINGS = ["F", "M", "85711", "40"]


def test_ids_are_asked_for_as_they_stand_in_the_data(tmp_path: Path, capsys) -> None:
    """The text of a string column, digits included, and of an integer column the integer."""
    frame = pd.DataFrame({"text": STRINGS * 50, "number": [40, 50] * 100})
    frame.to_parquet(tmp_path / "data.parquet")
    data = ["--data", str(tmp_path / "data.parquet"), "--categorical", "text", "number"]
    out = str(tmp_path / "allocation.safetensors")
    frame.assign(label=0).to_parquet(tmp_path / "data.parquet")
    assert cli.main(["allocate", *data, "--label", "label", "--compression", "1", "--out", out]) == 0
    capsys.readouterr()
    asked = [f"t_text={text}" for text in STRINGS] + ["t_number=50", "t_text=none"]
    assert cli.main(["inspect", out, *data, "--json", *(f"--id={one}" for one in asked)]) == 0
    found = json.loads(capsys.readouterr().out)["neighbours"]
    hashes = pd.util.hash_array(np.array([*STRINGS, "none"], object)).view(np.int64).tolist()
    assert [one["id"] for one in found] == [*hashes[:4], 50, hashes[4]]
    assert [one["count"] > 0 for one in found] == [True] * 5 + [False]


def test_ids_of_criteo_are_asked_for_in_hexadecimal(tmp_path: Path, capsys) -> None:
    values = ["68fd1e64", "10203040", "fedcba9876543210"]
    lines = ["\t".join(["0"] + ["1"] * 13 + [values[n % 3]] * 26) for n in range(60)]
    (tmp_path / "day").write_text("\n".join(lines) + "\n")
    data, out = ["--data", str(tmp_path / "day"), "--format", "criteo"], str(tmp_path / "allocation.safetensors")
    assert cli.main(["allocate", *data, "--compression", "1", "--out", out]) == 0
    capsys.readouterr()
    asked = [*(f"--id=t_C1={value}" for value in values), f"--id=t_C1={0x68FD1E64}"]
    assert cli.main(["inspect", out, *data, "--json", *asked]) == 0
    found = json.loads(capsys.readouterr().out)["neighbours"]
    assert [one["id"] % 2**64 for one in found] == [int(value, 16) for value in values] + [0x68FD1E64]
    assert all(one["count"] for one in found)
    assert cli.main(["inspect", out, *data, "--id", "t_C1=xyz"]) == 2
    assert "neither hexadecimal" in capsys.readouterr().err


def test_without_matplotlib_the_page_is_refused(files, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["inspect", files[0], "--html", str(tmp_path / "page.html")]) == 2
    assert "torchrec_lma[plot]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--id", "t_nobody=4"], "no table 't_nobody' in the allocation; it has t_user, t_item, t_tag, t_day"),
        (["--id", f"t_user={2**63}"], f"id {2**63} of table 't_user' is no int64"),
        (["--id", "t_user"], "--id 't_user' is not TABLE=VALUE"),
        (["--id", "t_user=4", "--top", "0"], "top must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(files, options: list[str], message: str, capsys) -> None:
    path, data = files
    assert cli.main(["inspect", path, *data, *options]) == 2
    assert message in capsys.readouterr().err


def test_ids_without_data_and_other_data_are_refused(files, capsys) -> None:
    path, data = files
    assert cli.main(["inspect", path, "--id", "t_user=4"]) == 2
    assert "give the data" in capsys.readouterr().err
    fewer = [option for option in data if option != "tag"]
    assert cli.main(["inspect", path, *fewer]) == 2
    assert "table 't_tag' of the allocation has no column in the data" in capsys.readouterr().err


def test_what_is_no_allocation_is_refused(tmp_path: Path, capsys) -> None:
    other = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(3)}, other)
    (tmp_path / "text").write_text("hello")
    for name, message in (
        ("none.safetensors", "no allocation file at"),
        ("weights.safetensors", "not an allocation"),
        ("text", "not a whole safetensors file"),
    ):
        assert cli.main(["inspect", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_installed_command_says_the_same(files, allocation: Allocation) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "torchrec_lma.cli", "inspect", files[0]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.rstrip("\n") == str(inspect(allocation))
