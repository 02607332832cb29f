"""MovieLens-100K as one parquet file that `torchrec_lma.datasets.ParquetDataset` reads.

    python -m torchrec_lma.datasets.movielens --cache DIR

The data come with the recbole wheel on PyPI. Where there is no network, put that wheel into the cache directory.
"""

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_lma.datasets.schema import Schema
from torchrec_lma.files import replacing

RECBOLE = "recbole==1.2.1"
WHEEL = "recbole-1.2.1-py3-none-any.whl"
SHA256 = {
    "inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
    "item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}
SCHEMA = Schema(
    label="label",
    categorical=(
        "user_id",
        "item_id",
        "age",
        "gender",
        "occupation",
        "zip_code",
        "release_year",
        "genre",
        "hour",
        "weekday",
    ),
    numeric=("years_since_release",),
)
TIME = "timestamp"  # the column to split by


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/torchrec_lma`, or `~/.cache/torchrec_lma`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchrec_lma"


def prepare(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Writes `movielens-100k.parquet` in `cache_dir` unless it is there, and returns its path.

    100,000 rows in order of time: `label` int8 (a rating of 4 or 5), the columns of `SCHEMA` (`genre` is a list of
    strings) and `timestamp` int64, seconds. Several processes may prepare the same directory at once.

    Args:
        cache_dir: default `default_cache()`.

    Raises:
        ConnectionError: the wheel could not be downloaded.
        ValueError: the wheel is damaged, or not the one that this was written for.
    """
    cache = default_cache() if cache_dir is None else Path(cache_dir)
    target = cache / "movielens-100k.parquet"
    if not target.exists():
        with replacing(target) as written, tempfile.TemporaryDirectory() as scratch:
            wheel = cache / WHEEL
            pq.write_table(_join(*_extract(wheel if wheel.exists() else _download(Path(scratch)))), written)
    return target


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", RECBOLE]
    done = subprocess.run([*command, "--dest", str(directory)], capture_output=True, text=True)
    if done.returncode:
        raise ConnectionError(
            f"{' '.join(command)} failed: {done.stderr.strip()}\n"
            f"Without a network, fetch {WHEEL} elsewhere and put it into the cache directory."
        )
    return directory / WHEEL


def _extract(wheel: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The interactions, users and items as RecBole's atomic files have them, all columns strings."""
    tables = []
    try:
        with zipfile.ZipFile(wheel) as archive:
            contents = {suffix: archive.read(f"recbole/dataset_example/ml-100k/ml-100k.{suffix}") for suffix in SHA256}
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel} is not a complete wheel of {RECBOLE} ({error}): remove it") from error
    for suffix, content in contents.items():
        found = hashlib.sha256(content).hexdigest()
        if found != SHA256[suffix]:
            raise ValueError(f"ml-100k.{suffix} in {wheel} has sha256 {found}, not {SHA256[suffix]}: remove the wheel")
        table = pd.read_csv(io.BytesIO(content), sep="\t", dtype=str, quoting=3, keep_default_na=False)
        tables.append(table.rename(columns=lambda header: header.split(":")[0]))  # "user_id:token" -> "user_id"
    interactions, users, items = tables
    return interactions, users, items


def _join(interactions: pd.DataFrame, users: pd.DataFrame, items: pd.DataFrame) -> pa.Table:
    rows = interactions.merge(users, on="user_id", validate="many_to_one")
    rows = rows.merge(items, on="item_id", validate="many_to_one")
    rows[TIME] = rows[TIME].astype("int64")
    rows = rows.sort_values(TIME, kind="stable")
    rated_at = pd.to_datetime(rows[TIME], unit="s")  # UTC
    release_year = pd.to_numeric(rows["release_year"], errors="coerce")  # two films have none
    return pa.table(
        {
            "label": (rows["rating"].astype(float) >= 4).astype("int8"),
            "user_id": rows["user_id"].astype("int64"),
            "item_id": rows["item_id"].astype("int64"),
            "age": rows["age"].astype("int64"),
            "gender": rows["gender"],
            "occupation": rows["occupation"],
            "zip_code": rows["zip_code"],
            "release_year": release_year.astype("Int64"),
            "genre": rows["class"].str.split(" "),
            "hour": rated_at.dt.hour.astype("int64"),
            "weekday": rated_at.dt.day_of_week.astype("int64"),
            "years_since_release": (rated_at.dt.year - release_year).astype("float32"),
            TIME: rows[TIME],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch MovieLens-100K and write it as one parquet file.")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="directory to write to (%(default)s)")
    print(prepare(parser.parse_args().cache))


if __name__ == "__main__":
    main()
