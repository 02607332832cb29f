"""What `torchrec-lma inspect` says, against counts and sets in plain Python."""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection, cli
from torchrec_lma.allocation import ContextMinHash, RowsMinHash, Source
from torchrec_lma.inspection import Inspection, ObservedIds, inspect
from torchrec_lma.inspection.observed import Similarity

TABLES = [
    EmbeddingBagConfig(name="t_user", num_embeddings=1000, embedding_dim=16, feature_names=["user"]),
    EmbeddingBagConfig(name="t_item", num_embeddings=1000, embedding_dim=16, feature_names=["item"]),
    EmbeddingBagConfig(name="t_day", num_embeddings=30, embedding_dim=16, feature_names=["day"]),
    EmbeddingBagConfig(name="t_tag", num_embeddings=900, embedding_dim=16, feature_names=["tag"]),
]
TABLE_OF = {table.feature_names[0]: table.name for table in TABLES}
CONFIG = LMAConfig(memory_bytes=4500, skew=1, seed=5, raw_ids=("t_user", "t_item"))
SOURCE = RowsMinHash(power=2, num_values=2, min_support=1)
Row = dict[str, list[int]]


def some_rows(n: int = 500) -> list[Row]:
    """Items of a user come in runs, so that ids are similar; some bags are empty, some rows come twice."""
    random = torch.Generator().manual_seed(1)
    draws = torch.randint(0, 1000, (n, 3), generator=random).tolist()
    rows = [
        {
            "user": [a % 200 - 5],
            "item": [a % 200 % 90 * 2**40 if b % 4 else c % 190],
            "day": [c % 30] if c % 7 else [],
            "tag": sorted({a % 12, b % 300}),
        }
        for a, b, c in draws
    ]
    return rows + rows[: n // 5]


ROWS = some_rows()


def kjt(rows: list[Row]) -> KeyedJaggedTensor:
    bags = [row[feature] for feature in TABLE_OF for row in rows]
    return KeyedJaggedTensor(
        keys=list(TABLE_OF),
        values=torch.tensor([id for bag in bags for id in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for bag in bags], dtype=torch.int32),
    )


def built(source: Source | None = SOURCE, config: LMAConfig = CONFIG, **options: Any) -> Allocation:
    builder = AllocationBuilder(TABLES, config, source, **{"signature_fraction": 0.3} | options)
    return builder.update(kjt(ROWS)).build()


def observed(max_rows: int | None = None) -> ObservedIds:
    return ObservedIds(
        (kjt(ROWS[start : start + 64]) for start in range(0, len(ROWS), 64)), TABLE_OF, CONFIG.seed, max_rows
    )


def occurrences() -> Counter:
    return Counter((TABLE_OF[feature], id) for row in ROWS for feature, ids in row.items() for id in ids)


@pytest.fixture(scope="module")
def allocation() -> Allocation:
    made = built()
    assert len(made.memories) == 2
    for memory in made.memories:
        assert len(memory.levels) > 1 and memory.levels[1].own_rows and memory.levels[0].shared_rows
        assert "signatures" in memory.tensors
    return made


@pytest.fixture(scope="module")
def inspection(allocation: Allocation) -> Inspection:
    return inspect(allocation, observed())


def level_rows(allocation: Allocation, table: str, id: int) -> list[int]:
    found = LMAEmbeddingBagCollection(TABLES, allocation).rows(table, torch.tensor([id]))
    return [int(rows) for rows in found.values()]


# What is observed.


def distinct_rows() -> list[tuple[Row, int]]:
    """Rows and how often each came."""
    return [(json.loads(row), count) for row, count in Counter(json.dumps(row) for row in ROWS).items()]


def test_ids_are_counted_by_table() -> None:
    ids = observed()
    tables = [ids.tables[index] for index in ids.table.tolist()]
    assert dict(zip(zip(tables, ids.ids.tolist()), ids.count.tolist())) == occurrences()
    assert (ids.rows_seen, ids.rows_sampled, ids.is_sample) == (len(ROWS), len(distinct_rows()), False)


def test_a_sample_of_rows_is_bounded() -> None:
    ids = observed(max_rows=20)
    assert (ids.rows_sampled, ids.is_sample) == (20, True)
    assert 0 < ids.count.sum() < sum(occurrences().values())


def plain_sets(name: str, fields: tuple[str, ...], weighted: bool) -> dict[tuple[str, int], Counter]:
    """The set of each id whose similarity a source is about."""
    sets: dict[tuple[str, int], Counter] = defaultdict(Counter)
    for number, (row, count) in enumerate(distinct_rows()):
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
def test_similarity_is_the_jaccard_of_sets_in_plain_python(name: str, fields: tuple[str, ...], weighted: bool) -> None:
    sets = plain_sets(name, fields, weighted)
    ids = observed()
    similarity = Similarity(ids, {"name": name, "weighted": weighted, "fields": list(fields)})
    members = [(ids.tables[table], id) for table, id in zip(ids.table.tolist(), ids.ids.tolist())]
    random = torch.Generator().manual_seed(0)
    above = 0
    for a in range(0, len(members), 17):
        beside = similarity.beside(a, random).tolist()
        for b in [*range(0, len(members), 29), *beside[:5]]:
            expected = plain_jaccard(sets[members[a]], sets[members[b]])
            assert similarity(a, b) == pytest.approx(expected)
            above += 0 < expected < 1
    assert above > 50


def test_similarity_is_that_of_the_rows_that_the_source_takes() -> None:
    """As many rows are observed as the table that takes most of them needs; each source has its own first ones."""
    few, many = observed(max_rows=20), observed()
    measure_few = Similarity(few, SOURCE.to_dict())
    measure_many = Similarity(many, replace(SOURCE, max_rows=20).to_dict())
    in_many = [
        int(((many.ids == id) & (many.table == table)).nonzero())
        for table, id in zip(few.table.tolist(), few.ids.tolist())
    ]
    found = [(measure_few(a, b), measure_many(in_many[a], in_many[b])) for a in range(20) for b in range(len(in_many))]
    assert [one for one, _ in found] == [other for _, other in found]
    assert sum(one > 0 for one, _ in found) > 20


# The report.


def owned(allocation: Allocation, table: str, id: int) -> int:
    """How many columns an id owns."""
    memory = next(memory for memory in allocation.memories if table in memory.tables)
    rows = level_rows(allocation, table, id)
    return sum(level.width for level, row in zip(memory.levels, rows) if 0 <= row < level.own_rows)


def test_columns_are_those_that_ids_own(allocation: Allocation, inspection: Inspection) -> None:
    assert [table.table for table in inspection.tables] == [table.name for table in TABLES]
    for table in inspection.tables:
        counts = {id: n for (name, id), n in occurrences().items() if name == table.table}
        of_ids = {id: owned(allocation, table.table, id) for id in counts}
        by_columns = Counter(of_ids.values())
        assert sum(table.ids) == len(counts)
        assert dict(zip(table.columns, table.ids)) == {n: by_columns[n] for n in table.columns}
        assert table.occurrences is not None
        for n, share in zip(table.columns, table.occurrences):
            assert share == pytest.approx(sum(counts[id] for id in counts if of_ids[id] == n) / sum(counts.values()))
        assert table.memory == next(m.name for m in allocation.memories if table.table in m.tables)


def test_without_data_ids_are_as_the_builder_counted_them(allocation: Allocation, inspection: Inspection) -> None:
    without = inspect(allocation)
    assert [(t.table, t.columns, t.ids) for t in without.tables] == [
        (t.table, t.columns, t.ids) for t in inspection.tables
    ]
    assert all(table.occurrences is None for table in without.tables)
    assert (without.crowding, without.sharing, without.rows_seen) == ((), (), None)
    assert "as the builder counted them" in str(without)


def test_an_allocation_without_a_record_of_ids_says_what_it_can() -> None:
    allocation = Allocation.hashed(TABLES, replace(CONFIG, memory_bytes=9000))
    assert [sum(table.ids) for table in inspect(allocation).tables] == [0] * 4
    with_data = inspect(allocation, observed())
    assert [table.ids for table in with_data.tables] == [
        (len({id for name, id in occurrences() if name == table.name}), 0) for table in TABLES
    ]


def test_bytes_are_those_of_weights_and_allocation(allocation: Allocation, inspection: Inspection) -> None:
    report = LMAEmbeddingBagCollection(TABLES, allocation).memory_report()
    assert sum(inspection.bytes_by_part.values()) == report.weight_bytes + report.allocation_bytes
    signatures = sum(n for part, n in inspection.bytes_by_part.items() if part.endswith(": signatures"))
    assert signatures == sum(memory.tensors["signatures"].nbytes for memory in allocation.memories)


def test_crowding_counts_the_ids_of_each_shared_row(allocation: Allocation, inspection: Inspection) -> None:
    paper = built(config=replace(CONFIG, widths={16: (4, 12), 8: (8,)}), shared_fraction=1.0)
    for one, said in ((allocation, inspection), (paper, inspect(paper, observed()))):
        names = []
        for memory in one.memories:
            for k, level in enumerate(memory.levels):
                if not level.shared_rows:
                    continue
                names.append(memory.level_name(k))
                found = next(c for c in said.crowding if c.level == names[-1])
                rows = [level_rows(one, t, id)[k] for t, id in occurrences() if t in memory.tables]
                at_row = Counter(row for row in rows if row >= level.own_rows)
                loads = sorted(at_row[level.own_rows + r] for r in range(level.shared_rows))
                assert (found.rows, found.ids) == (level.shared_rows, sum(loads))
                assert found.median == loads[len(loads) // 2] and found.p99 == loads[int(0.99 * len(loads))]
                assert found.most == loads[-1] and found.unused == pytest.approx(loads.count(0) / len(loads))
        assert [c.level for c in said.crowding] == names


@pytest.mark.parametrize(
    "source",
    [SOURCE, ContextMinHash(power=1, num_values=4, min_support=1), RowsMinHash(power=1, min_support=1, weighted=True)],
    ids=["rows", "context", "weighted"],
)
@pytest.mark.parametrize("widths", [(16,), (4,) * 4], ids=["one level", "four levels"])
def test_similar_ids_share_as_theory_says(source: Source, widths: tuple[int, ...]) -> None:
    tables = [table for table in TABLES if table.name != "t_day"]
    config = LMAConfig(memory_bytes=20_000, widths=widths, seed=5, raw_ids=True)
    features = kjt(ROWS)
    builder = AllocationBuilder(tables, config, source, shared_fraction=1.0, signature_fraction=0.7)
    allocation = builder.update(features).build()
    table_of = {feature: table for feature, table in TABLE_OF.items() if feature != "day"}
    # The rows as the builder saw them: what stands in no table is not looked at.
    said = inspect(allocation, ObservedIds([features], table_of, config.seed, None))
    (sharing,) = said.sharing
    assert sharing.source["name"] == source.NAME
    pairs = sum(one["pairs"] for one in sharing.bins)
    assert pairs > 300 and len(sharing.bins) > 2
    for one in sharing.bins:
        # All pairs see the same functions, at most 4 of them: no more than a coarse bound can be asked for.
        assert 0 <= one["shared"] <= 1
        assert abs(one["shared"] - one["theory"]) < 0.45
    total = sum(one["pairs"] * (one["shared"] - one["theory"]) for one in sharing.bins) / pairs
    assert abs(total) < 0.15
    assert "Jaccard" in str(said)


def test_sharing_is_not_measured_where_the_data_do_not_tell_similarity() -> None:
    assert inspect(built(source=None), observed()).sharing == ()
    assert not Similarity.known({"name": "simhash"})


def test_ids_that_share_a_row_are_listed(allocation: Allocation) -> None:
    asked = [("t_user", -5), ("t_day", 3), ("t_tag", 0), ("t_user", 10**12)]
    asked += [("t_tag", id) for id in range(250, 300)]
    said = inspect(allocation, observed(), asked, top=1)
    n_others = []
    for (table, id), one in zip(asked, said.shared_with, strict=True):
        rows = level_rows(allocation, table, id)
        assert (one.table, one.id, one.count) == (table, id, occurrences()[table, id])
        assert list(one.rows.values()) == rows
        memory = next((memory for memory in allocation.memories if table in memory.tables), None)
        if memory is None:
            assert one.own == (True,) and one.others == ()
            continue
        assert list(one.own) == [row < level.own_rows for row, level in zip(rows, memory.levels)]
        others = []
        if rows[0] >= memory.levels[0].own_rows:
            others = [
                (name, other, n)
                for (name, other), n in occurrences().items()
                if name in memory.tables and (name, other) != (table, id)
                and level_rows(allocation, name, other)[0] == rows[0]
            ]  # fmt: skip
        assert one.n_others == len(others)
        assert sorted(n for *_, n in one.others) == sorted((n for *_, n in others), reverse=True)[:1]
        assert set(one.others) <= set(others)
        n_others.append(len(others))
    assert max(n_others) > 1 and min(n_others) == 0


def test_the_report_survives_json(inspection: Inspection, allocation: Allocation) -> None:
    said = json.loads(json.dumps(inspect(allocation, observed(), [("t_user", 3)]).to_dict()))
    assert said["fingerprint"] == allocation.fingerprint
    assert said["tables"][0]["ids"] == list(inspection.tables[0].ids)
    assert said["shared_with"][0]["table"] == "t_user"


def test_the_report_prints_every_table_and_level(allocation: Allocation, inspection: Inspection) -> None:
    text = str(inspection)
    for table in TABLES:
        assert table.name in text
    for memory in allocation.memories:
        columns = [0, *accumulate(level.width for level in memory.levels)]
        header = next(line for line in text.splitlines() if line.startswith(f"{memory.name}: columns owned"))
        assert [int(word) for word in header.split()[4:]] == columns
        assert all(memory.level_name(k) in text for k in range(len(memory.levels)))
    assert allocation.fingerprint in text


def test_other_data_than_the_allocation_was_built_from_is_said(allocation: Allocation, inspection: Inspection) -> None:
    assert "warning" not in str(inspection)
    other = inspect(allocation, ObservedIds([kjt(ROWS[:100])], TABLE_OF, CONFIG.seed))
    assert f"warning: the allocation was built from {len(ROWS)} rows, the data have 100" in str(other)


def test_what_cannot_be_inspected_is_refused(allocation: Allocation) -> None:
    with pytest.raises(ValueError, match="no table 'color'.*t_user, t_item"):
        inspect(allocation, observed(), [("color", 1)])
    with pytest.raises(ValueError, match="give the data"):
        inspect(allocation, ids=[("t_user", 1)])
    with pytest.raises(ValueError, match=r"observed for tables \['t_user'\]"):
        inspect(allocation, ObservedIds([kjt(ROWS)], {"user": "t_user"}, CONFIG.seed))
    with pytest.raises(ValueError, match="no row with an id"):
        ObservedIds([kjt([{feature: [] for feature in TABLE_OF}])], TABLE_OF, CONFIG.seed)


# The command.


@pytest.fixture(scope="module")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(1)
    n = 3000
    frame = pd.DataFrame(
        {
            "user": random.zipf(1.4, n) % 500 + 1000,
            "item": [f"item-{i}" for i in random.zipf(1.3, n) % 300],
            "day": random.integers(0, 3, n),
        }
    )
    path = tmp_path_factory.mktemp("clicks") / "clicks.parquet"
    frame.to_parquet(path)
    return path


def data_options(path: Path) -> list[str]:
    return ["--data", str(path), "--categorical", "user", "item", "day"]


@pytest.mark.parametrize("options", [[], ["--raw-ids"]], ids=["vocabulary", "raw"])
def test_the_command_looks_into_what_allocate_wrote(
    clicks: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a"
    built_with = ["--dim", "8", "--compression", "30", "--source", "context-minhash", *options]
    assert cli.main(["allocate", *data_options(clicks), *built_with, "--out", str(out)]) == 0
    allocation = Allocation.load(out)
    capsys.readouterr()
    assert cli.main(["inspect", str(out)]) == 0
    assert "t_user" in capsys.readouterr().out

    ids = ["--id", "t_user=1001", "--id", "t_item=item-1", "--id", "t_user=7"]
    assert cli.main(["inspect", str(out), *data_options(clicks), *ids, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rows_seen"] == allocation.provenance["rows_seen"]
    for table in said["tables"]:
        assert sum(table["ids"]) == allocation.provenance["ids"][table["table"]]["seen"]
    frame = pd.read_parquet(clicks)
    seen = [one["count"] for one in said["shared_with"]]
    # Eight tenths of the rows are for training.
    assert 0.7 * (frame["user"] == 1001).sum() < seen[0] < (frame["user"] == 1001).sum()
    assert 0.7 * (frame["item"] == "item-1").sum() < seen[1] < (frame["item"] == "item-1").sum()
    assert seen[2] == 0


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--id", "t_user"], "'t_user' is not TABLE=VALUE"),
        (["--id", "t_color=1"], "no table 't_color'"),
        (["--id", "t_user=1"], "give the data"),
        (["--data", "{clicks}", "--categorical", "user", "item"], "'t_day' of the allocation has no column"),
    ],
)
def test_the_command_says_what_is_wrong(
    clicks: Path, tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", num_embeddings=500, embedding_dim=8, feature_names=[name])
        for name in ("user", "item", "day")
    ]
    Allocation.hashed(tables, LMAConfig(compression=4)).save(tmp_path / "a")
    assert cli.main(["inspect", str(tmp_path / "a"), *(a.format(clicks=clicks) for a in arguments)]) == 2
    assert said in capsys.readouterr().err


def test_criteos_ids_are_given_as_hexadecimal() -> None:
    from torchrec_lma.cli.inspect import _id

    assert _id("t", "ff", "criteo") == 255 and _id("t", "f" * 16, "criteo") == -1
    assert _id("t", "-7", "parquet") == -7
    with pytest.raises(ValueError, match="t=xyz is not hexadecimal"):
        _id("t", "xyz", "criteo")


def test_the_installed_command_runs(allocation: Allocation, tmp_path: Path) -> None:
    allocation.save(tmp_path / "a")
    command = [sys.executable, "-m", "torchrec_lma.cli", "inspect", str(tmp_path / "a")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-2000:]
    assert allocation.fingerprint in process.stdout
