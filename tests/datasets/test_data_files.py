"""Folders and files as people have them: which are read, in which order, and what their columns hold."""

import datetime
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torchrec.datasets.utils import Batch

from torchrec_lma.datasets import CriteoDataset, NumpyDataset, ParquetDataset, Schema, Split
from torchrec_lma.datasets.listing import list_files, natural_order

USER = Schema(None, ("user",))


def write(path: Path, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def bags(batches: Iterator[Batch], key: str = "user") -> list[list[int]]:
    return [bag.tolist() for batch in batches for bag in batch.sparse_features[key].to_dense()]


def users(dataset: ParquetDataset | NumpyDataset | CriteoDataset, split: str = "all", key: str = "user") -> list[int]:
    return [id for bag in bags(dataset.batches(split, batch_size=7), key) for id in bag]


# Which files, in which order


@pytest.mark.parametrize(
    "ascending",
    [
        ["day_0", "day_1", "day_2", "day_10", "day_11"],
        ["2/b", "10/a"],
        ["part-00000-f", "part-00001-a", "part-100000-a"],
        ["v1.2.parquet", "v1.10.parquet"],
        ["day=9/a.parquet", "day=10/a.parquet"],
        ["1", "01", "2", "a", "a1", "b"],
        ["2024-01-09", "2024-01-10", "2024-02-01"],
    ],
)
def test_natural_order(ascending: list[str]) -> None:
    wanted = sorted(ascending, key=natural_order)
    if ascending == ["1", "01", "2", "a", "a1", "b"]:
        ascending = ["01", "1", "2", "a", "a1", "b"]  # equal numbers: by the text
    assert wanted == ascending


def test_days_are_read_in_order_of_their_numbers(tmp_path: Path) -> None:
    for day in range(12):
        write(tmp_path / f"day_{day}.parquet", user=[day])
    assert users(ParquetDataset(tmp_path, USER)) == list(range(12))
    assert users(ParquetDataset(tmp_path, USER, Split("time")), "test") == [11]
    assert users(ParquetDataset(f"{tmp_path}/day_1*.parquet", USER)) == [1, 10, 11]
    assert users(ParquetDataset(f"{tmp_path.as_uri()}/day_[23].parquet", USER)) == [2, 3]


def test_what_is_hidden_or_a_writers_own_is_no_data(tmp_path: Path) -> None:
    write(tmp_path / "clicks" / "part-0.parquet", user=[1])
    for name in (
        "_temporary/0/part-1.parquet",
        ".ipynb_checkpoints/part-0-checkpoint.parquet",
        "_delta_log/00000000000000000010.checkpoint.parquet",
        ".part-2.parquet.crc",
        ".hidden.parquet",
        "_metadata",
        "part-3.parquet.tmp",
        "part-4.parquet._COPYING_",
        "part-5.parquet.inprogress",
        "part-6.parquet~",
        "write.log",
        "_SUCCESS",
    ):
        write(tmp_path / "clicks" / name, user=[2])
    assert users(ParquetDataset(tmp_path / "clicks", USER)) == [1]
    _, found = list_files(tmp_path / "clicks")  # of a format without an ending
    assert [Path(path).name for path in found] == ["part-0.parquet"]
    hidden_above = tmp_path / ".cache" / "clicks"
    write(hidden_above / "a.PARQUET", user=[3])
    write(hidden_above / "_day=1" / "b.pq", user=[4])  # a column of folders
    assert users(ParquetDataset(hidden_above, USER)) == [4, 3]


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet", "test.parquet"),
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"),
        ("train/a.parquet", "val/a.parquet"),
        ("clicks_dev.parquet", "clicks_train.parquet"),
    ],
)
def test_splits_in_one_folder_are_not_one_stream_unless_asked(tmp_path: Path, names: tuple[str, str]) -> None:
    for i, name in enumerate(names):
        write(tmp_path / name, user=[i])
    with pytest.raises(ValueError, match="holds files of several splits"):
        ParquetDataset(tmp_path, USER)
    assert sorted(users(ParquetDataset(f"{tmp_path}/*.parquet", USER))) == [0, 1]
    assert users(ParquetDataset(tmp_path / names[0], USER)) == [0]


def test_files_of_one_split_are_one_stream(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "latest", "contest"):  # the last two only seem to be a test
        write(tmp_path / f"{name}.parquet", user=[1])
    assert users(ParquetDataset(tmp_path, USER)) == [1] * 4


def test_a_pattern_of_nothing_is_named(tmp_path: Path) -> None:
    for pattern in ("none_*.parquet", "none/*.parquet", "*"):
        with pytest.raises(FileNotFoundError, match=r"holds no \*.parquet"):
            ParquetDataset(f"{tmp_path}/{pattern}", USER)


# What the columns of different files hold

INTS, STRINGS = [1, 2], ["1", "2"]


@pytest.mark.parametrize(
    "other",
    [
        pa.array(STRINGS),
        pa.array(STRINGS, pa.large_string()),
        pa.array(STRINGS, pa.string_view()),
        pa.array(STRINGS).dictionary_encode(),
        pa.array([b"1", b"2"]),
        pa.array([["1"], ["2"]]),
        pa.array([datetime.date(2024, 1, 1)] * 2),
    ],
)
def test_ids_of_another_type_in_another_file_are_refused(tmp_path: Path, other: pa.Array) -> None:
    write(tmp_path / "a.parquet", user=INTS)
    write(tmp_path / "b.parquet", user=other)
    with pytest.raises(ValueError, match=r"'user' has integers in .*a.parquet and (strings|date32\[day\]) in .*b.pa"):
        ParquetDataset(tmp_path, USER)


def test_what_a_hash_split_keeps_together_has_one_type(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", user=INTS, item=INTS)
    write(tmp_path / "b.parquet", user=STRINGS, item=INTS)
    with pytest.raises(ValueError, match="'user' has integers in .*a.parquet and strings in .*b.parquet"):
        ParquetDataset(tmp_path, Schema(None, ("item",)), Split("hash", ("user",)))


@pytest.mark.parametrize(
    ("other", "ids"),
    [
        (pa.array([1, 3], pa.int16()), [1, 3]),
        (pa.array([1, 3], pa.uint64()), [1, 3]),
        (pa.array([1.0, None]), [1]),  # integers that became float where one is missing
        (pa.array([True, False]), [1, 0]),
        (pa.array([1, 3]).dictionary_encode(), [1, 3]),
        (pa.array([None, None], pa.null()), []),
    ],
)
def test_the_same_ids_in_another_width_are_one_column(tmp_path: Path, other: pa.Array, ids: list[int]) -> None:
    write(tmp_path / "a.parquet", user=INTS)
    write(tmp_path / "b.parquet", user=other)
    dataset = ParquetDataset(tmp_path, USER)
    assert users(dataset) == INTS + ids
    assert dataset.id_types == {"user": "integers"}


def test_types_of_ids_are_known(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", user=INTS, tags=[["a"], None], none=pa.nulls(2))
    assert ParquetDataset(path, Schema(None, ("user", "tags", "none"))).id_types == {
        "user": "integers",
        "tags": "strings",
    }


LISTS = pa.array([[1, 2], None, [3]])


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (pa.nulls(2), [[], []]),
        (pa.array([7, None]), [[7], []]),
        (pa.array([[7], []], pa.large_list(pa.int32())), [[7], []]),
        (pa.array([None, None], pa.list_(pa.null())), [[], []]),
        (pa.array([[7, 8], [9, 9]], pa.list_(pa.int64(), 2)), [[7, 8], [9, 9]]),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_a_shard_of_nulls_or_single_ids_beside_lists(
    tmp_path: Path, other: pa.Array, expected: list[list[int]], first: bool
) -> None:
    write(tmp_path / ("b.parquet" if first else "a.parquet"), user=LISTS, row=[1, 1, 1])
    write(tmp_path / ("a.parquet" if first else "b.parquet"), user=other, row=[2, 2])
    lists = [[1, 2], [], [3]]
    wanted = expected + lists if first else lists + expected
    for shuffle_seed in (None, 0):
        batches = ParquetDataset(tmp_path, Schema(None, ("user", "row"))).batches(
            "all", batch_size=2, shuffle_seed=shuffle_seed
        )
        found = bags(batches)
        assert found == wanted if shuffle_seed is None else sorted(found) == sorted(wanted)


def test_a_column_twice_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table([[1], [2], [3]], names=["user", "user", "item"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet has 2 columns 'user'"):
        ParquetDataset(tmp_path / "a.parquet", USER)
    assert users(ParquetDataset(tmp_path / "a.parquet", Schema(None, ("item",))), key="item") == [3]  # nobody asks


def test_a_csv_is_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("user,item\n1,2\n")
    with pytest.raises(ValueError, match=r"no parquet file .*it is text: write a CSV as parquet"):
        ParquetDataset(tmp_path, USER)


@pytest.mark.parametrize(
    ("strings", "said"),
    [
        (["a|b|c", "a", "b|c", "a|c"], "'a|b|c'"),
        (["1;2", "3;4"], "'1;2'"),
        (["1,2", "3,4"], "'1,2'"),
        (["[1, 2]", "['a']"], "'[1, 2]'"),
        (["Paris, France", "Ulm"], None),
        (["a|b", "c", "d"], None),
        (["||", "|", "a|"], None),
        ([None, ""], None),
    ],
)
def test_strings_that_seem_to_be_lists_are_said_to_be_single_ids(
    tmp_path: Path, strings: list[str | None], said: str | None
) -> None:
    path = write(tmp_path / "a.parquet", user=strings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(ParquetDataset(path, USER).batches("all", batch_size=1))
    assert len(caught) == (said is not None)
    if said is not None:
        assert f"column 'user' has strings such as {said}, each of which is one id" in str(caught[0].message)


# Columns in the names of folders


def test_a_column_in_the_names_of_folders(tmp_path: Path) -> None:
    for day in (9, 10):
        write(tmp_path / f"day={day}" / "country=de" / "a.parquet", user=[day])
    write(tmp_path / "day=11" / "country=__HIVE_DEFAULT_PARTITION__" / "a.parquet", user=[11])
    dataset = ParquetDataset(tmp_path, Schema(None, ("user", "day")), Split("time", ("day",)))
    assert users(dataset, "all", "day") == [9, 10, 11]
    assert users(dataset, "test") == [11]
    countries = ParquetDataset(tmp_path, Schema(None, ("country",)))  # which no file has
    assert countries.id_types == {"country": "strings"}
    assert [len(bag) for bag in bags(countries.batches("all", batch_size=9), "country")] == [1, 1, 0]
    with pytest.raises(ValueError, match=r"no column 'hour', it has user, day, country"):
        ParquetDataset(tmp_path, Schema(None, ("hour",)))


def test_dates_in_the_names_of_folders_are_an_order(tmp_path: Path) -> None:
    for date in ("2024-01-31", "2024-02-01"):
        write(tmp_path / f"date={date}" / "a.parquet", user=[int(date[-2:])])
    dataset = ParquetDataset(tmp_path, USER, Split("time", ("date",), validation_fraction=0, test_fraction=0.5))
    assert users(dataset, "train") == [31] and users(dataset, "test") == [1]


def test_a_column_of_the_file_goes_before_one_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "user=1" / "a.parquet", user=[2])
    assert users(ParquetDataset(tmp_path, USER)) == [2]


# Times at the edges


def latest(tmp_path: Path, times: pa.Array) -> list[int]:
    path = write(tmp_path / "a.parquet", user=list(range(len(times))), time=times)
    return users(ParquetDataset(path, USER, Split("time", ("time",), 0, test_fraction=0.9 / len(times))), "test")


DAY = datetime.datetime(2024, 1, 1)


@pytest.mark.parametrize("unit", ["s", "ms", "us"])
@pytest.mark.parametrize("zone", [None, "Europe/Berlin"])
def test_sentinel_dates_keep_their_side(tmp_path: Path, unit: str, zone: str | None) -> None:
    for sentinel, last in ((datetime.datetime(9999, 12, 30), 1), (datetime.datetime(1, 1, 2), 2)):
        assert latest(tmp_path, pa.array([DAY, sentinel, DAY + datetime.timedelta(1)], pa.timestamp(unit, zone))) == [
            last
        ]


def test_other_times_are_in_order(tmp_path: Path) -> None:
    day = DAY.date()
    for times in (
        pa.array([day, datetime.date(9999, 12, 31), day]),
        pa.array([day, datetime.date(9999, 12, 31), day], pa.date64()),
        pa.array([0, 2**63 - 1, -(2**63)], pa.timestamp("ms")),
        pa.array([-(2**63) + 1, 2**63 - 1, 0], pa.timestamp("ns")),
        pa.array([10**18, 10**18 + 1, 10**18 - 1], pa.timestamp("ns")),
        pa.array(["2023-12-31 23:59:59.9", "2024-01-01T00:00:00", "2023-12-31"]),
        pa.array([2**63, 2**64 - 1, 0], pa.uint64()),
    ):
        assert latest(tmp_path, times) == [1], times.type


def test_years_beyond_nanoseconds_are_one_time(tmp_path: Path) -> None:
    times = pa.array([datetime.date(2500, 1, 1), datetime.date(9999, 1, 1), datetime.date(2024, 1, 1)])
    assert latest(tmp_path, times) == [0, 1]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (pa.array(["monday"]), "ISO 8601"),
        (pa.array([[1]]), "gives no order"),
        (pa.array([datetime.timedelta(1)]), "gives no order"),
        (pa.array([datetime.time(1)]), "gives no order"),
        (pa.array([np.nan]), "NaN"),
        (pa.nulls(1), "1 rows have no time"),
    ],
)
def test_what_gives_no_order_is_refused(tmp_path: Path, times: pa.Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        latest(tmp_path, times)


def test_numbers_beside_dates_are_no_order(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", user=[1], time=[1_700_000_000])
    write(tmp_path / "b.parquet", user=[2], time=pd.to_datetime(["2024-01-01"]))
    with pytest.raises(ValueError, match=r"'time' has numbers in .*a.parquet and times in .*b.parquet"):
        ParquetDataset(tmp_path, USER, Split("time", ("time",)))


# Criteo without labels, NumPy with an axis too many


def criteo_line(row: int, label: str | None) -> str:
    fields = [*([] if label is None else [label]), *map(str, range(13)), *(f"{row:08x}" for _ in range(26))]
    return "\t".join(fields) + "\n"


def test_criteo_lines_without_a_label(tmp_path: Path) -> None:
    (tmp_path / "day_0").write_text("".join(criteo_line(row, "1") for row in range(3)))
    (tmp_path / "day_1").write_text("".join(criteo_line(row, None) for row in range(3, 5)))
    dataset = CriteoDataset(tmp_path, needs_label=False)
    assert users(dataset, key="C26") == [0, 1, 2, 3, 4]
    (batch,) = dataset.batches("all", batch_size=9)
    assert batch.labels.isnan().all()
    assert batch.dense_features.expm1().round().tolist() == [list(range(13))] * 5
    with pytest.raises(ValueError, match="day_1.*got 39.*; lines without a label can be predicted, not trained on"):
        CriteoDataset(tmp_path)
    (tmp_path / "day_1").write_text("1\t2\n")
    with pytest.raises(ValueError, match="day_1 is not Criteo's 40 tab-separated fields"):
        CriteoDataset(tmp_path, needs_label=False)
    with pytest.raises(ValueError, match="a file twice"):
        CriteoDataset([tmp_path / "day_0", tmp_path])


@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (-1, 1, 1)])
def test_numpy_columns_may_have_a_trailing_axis_of_1(tmp_path: Path, shape: tuple[int, ...]) -> None:
    columns = {
        "label": np.array([0, 1, 0]),
        "user": np.array([5, 6, 7]),
        "price": np.array([0.0, 1.0, 2.0]),
        "time": np.array([3, 1, 2]),
    }
    for name, column in columns.items():
        np.save(tmp_path / f"{name}.npy", column.reshape(shape))
    dataset = NumpyDataset(tmp_path, Schema("label", ("user",), ("price",)), Split("time", ("time",), 0, 0.3))
    (batch,) = dataset.batches("all", batch_size=9)
    assert batch.sparse_features.lengths().tolist() == [1, 1, 1] and batch.labels.tolist() == [0, 1, 0]
    assert batch.dense_features.shape == (3, 1)
    assert users(dataset, "test") == [5]
    assert dataset.id_types == {"user": "integers"}
