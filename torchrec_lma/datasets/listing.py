"""Which files are the data, and in which order."""

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from urllib.parse import unquote

import pyarrow.fs

from torchrec_lma.datasets.schema import SPLITS, Path

# Names that writers give what is no data yet, or no data at all.
NO_DATA = (".tmp", ".temp", ".part", ".partial", ".inprogress", "._copying_", ".crc", ".log", ".lock", ".bak", "~")
# A word of a file's name that says which split it is.
_SPLIT_WORDS = {"train": 0, "training": 0, "valid": 1, "validation": 1, "val": 1, "dev": 1, "test": 2, "testing": 2}


def list_files(path: Path, endings: Sequence[str] = ("",)) -> tuple[pyarrow.fs.FileSystem, list[str]]:
    """The filesystem of `path`, and there the files that it stands for, in natural order: day_2 before day_10.

    A path is a file; a directory, of which all files with one of the endings are data, at any depth; or a pattern with
    *, ? or [], of which all are. Files are left out if they, or folders on the way, are hidden (`.name`, `_name`), or
    are called like a writer's temporary or log.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a directory has files of several splits, by their names.
    """
    text, pattern = os.fspath(path), None
    wild = re.search(r"[*?[]", text)
    if wild and ("://" in text or not os.path.exists(text)):
        folder, slash, first = text[: wild.start()].rpartition("/")
        filesystem, root = _filesystem(folder or slash or ".")
        pattern = first + text[wild.start() :]
    else:
        filesystem, root = _filesystem(text)
        file_type = filesystem.get_file_info(root).type
        if file_type == pyarrow.fs.FileType.NotFound:
            raise FileNotFoundError(f"{text} does not exist: give the path of a file or a directory of files")
        if file_type == pyarrow.fs.FileType.File:
            return filesystem, [root]
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(root, recursive=True, allow_not_found=True))
    names = [info.path[len(root) :].lstrip("/") for info in found if info.is_file]
    if pattern is not None:
        names = [name for name in names if fnmatchcase(name, pattern)]
    names = sorted((name for name in names if _is_data(name, endings)), key=natural_order)
    if not names:
        what = " or ".join(f"*{ending}" for ending in endings)
        raise FileNotFoundError(f"{text} holds no {what} file")
    if pattern is None:
        _refuse_splits(text, names)
    return filesystem, [f"{root.rstrip('/')}/{name}" for name in names]


def natural_order(path: str) -> tuple[list[list[str | int]], str]:
    """A key to sort by: folder by folder, numbers by their value."""
    parts = [re.split("([0-9]+)", part) for part in path.split("/")]
    return [[int(text) if i % 2 else text for i, text in enumerate(part)] for part in parts], path


def columns_of_folders(path: str) -> dict[str, str | None]:
    """Columns that the folders of a file carry in their names: `day=2/hour=7/a.parquet`; null where it says so."""
    pairs = (folder.partition("=") for folder in path.split("/")[:-1] if "=" in folder)
    return {
        unquote(name): None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value) for name, _, value in pairs
    }


def _filesystem(text: str) -> tuple[pyarrow.fs.FileSystem, str]:
    return pyarrow.fs.FileSystem.from_uri(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def _is_data(name: str, endings: Sequence[str]) -> bool:
    *folders, file = name.lower().split("/")
    hidden = any(part.startswith((".", "_")) and "=" not in part for part in (*folders, file))
    return not hidden and file.endswith(tuple(endings)) and not file.endswith(NO_DATA)


def _refuse_splits(text: str, names: Sequence[str]) -> None:
    of_split: dict[int, str] = {}
    for name in names:
        for word in re.split("[^a-z]+", name.lower()):
            if word in _SPLIT_WORDS:
                of_split.setdefault(_SPLIT_WORDS[word], name)
    if len(of_split) > 1:
        raise ValueError(
            f"{text} holds files of several splits by their names: "
            + ", ".join(f"{name} ({SPLITS[split]})" for split, name in sorted(of_split.items()))
            + f"; give one of them, or a pattern such as {text.rstrip('/')}/* to read them all as one stream"
        )
