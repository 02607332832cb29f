"""`replacing`: a file is whole, or as it was, and nothing else stays in the folder."""

import os
import resource
import stat
from pathlib import Path

import pytest

from torchrec_lma.files import replacing


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("existing", [False, True])
def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path, existing: bool) -> None:
    path = tmp_path / "made" / "record.json"
    if existing:
        path.parent.mkdir()
        path.write_text("old")
    with replacing(path) as temporary:
        assert temporary.parent == path.parent and temporary.name.startswith(".") and temporary.suffix == ".json"
        temporary.write_text("new")
        assert path.exists() == existing and (not existing or path.read_text() == "old")
    assert contents(path.parent) == {"record.json": b"new"}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: type[BaseException], existing: bool) -> None:
    if existing:
        (tmp_path / "a").write_text("old")
    before = contents(tmp_path)

    def write() -> None:
        with replacing(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert contents(tmp_path) == before


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"), replacing(tmp_path / "a") as temporary:
            temporary.write_text("new" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == {"a": b"old"}


def test_two_writers_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        first.write_text("1")
        second.write_text("2")
    assert contents(tmp_path) == {"a": b"1"}


@pytest.mark.parametrize("mode", [0o640, 0o600])
def test_a_replaced_file_keeps_its_mode_and_a_new_one_has_that_of_the_umask(tmp_path: Path, mode: int) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.touch()
    old.chmod(mode)
    before = os.umask(0o027)
    try:
        for path in (old, new):
            with replacing(path) as temporary:
                temporary.unlink()
                os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))  # a writer of private files
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (old, new)] == [mode, 0o640]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "a")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "disk") == {"a": b"new"}


def test_a_device_is_written_to_and_not_replaced() -> None:
    with replacing("/dev/null") as temporary:
        temporary.write_text("anything")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=f"{tmp_path} is a folder"), replacing(tmp_path):
        pass
