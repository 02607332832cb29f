"""Files that are whole or not there, whatever happens while they are written, and folders with one writer."""

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from weakref import WeakValueDictionary

LOCK = ".lock"

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name for a file that takes the place of `path`, on the disk, when the block ends.

    If the block raises, `path` is as it was and the temporary file is gone. The temporary name begins with a dot, so
    readers of the folder pass it by, is of no other writer, and ends as `path` does, for writers that look at that. A
    link is followed. Where `path` is a device or a pipe, such as /dev/stdout, the block writes to that itself.

    Args:
        path: its folder is made if it is not there.
    Raises:
        IsADirectoryError: `path` is a folder.
        OSError: the folder cannot be made or written to, or the disk is full.

    Example::

        with replacing("record.json") as temporary:
            temporary.write_text(json.dumps(record))
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file in it")
    if target.exists() and not target.is_file():
        yield target
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{secrets.token_hex(4)}.{target.name}")
    try:
        temporary.touch(exist_ok=False)
        # Of the file that it replaces, else what the umask gives a new one: some writers make theirs private.
        mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
        yield temporary
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FolderInUse(OSError):
    """Another process writes in the folder."""


class FolderLock:
    """This process writes in a folder, and no other one, while an object of this lives; see `lock_folder`."""

    def __init__(self, folder: Path, file: IO[str]) -> None:
        self.path = folder / LOCK
        self._file = file  # the lock is that of the open file, and ends with it

    def holds(self) -> bool:
        """False once the folder, or the file in it, was removed: then others lock another file."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False


_held: WeakValueDictionary[Path, FolderLock] = WeakValueDictionary()


def lock_folder(folder: Path, wait_seconds: float = 0) -> FolderLock:
    """Makes this process the only writer in `folder`, which is made if it is not there.

    The system lets go of the lock when the process ends, however it ends; the file `.lock` stays and means nothing. On
    shared file systems it holds between machines where they support flock. Where a file system has no locks at all,
    the log says so.

    Args:
        wait_seconds: for another process to end.
    Raises:
        FolderInUse: another process has the lock, naming it.
        OSError: the folder cannot be written in.
    """
    folder = Path(os.path.realpath(folder))
    held = _held.get(folder)
    if held is not None and held.holds():
        return held
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + wait_seconds
    while True:
        file = open(folder / LOCK, "a+")  # noqa: SIM115 (it is the lock, and stays open)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < end:
                file.close()
                time.sleep(0.2)
                continue
            file.seek(0)
            raise FolderInUse(
                f"another run writes in {folder}: {file.read().strip() or 'it does not say which'}; wait for it, end "
                "it, or give another folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            logger.warning("%s: the file system has no locks (%s); no two runs may write there", folder, error)
        lock = FolderLock(folder, file)
        if lock.holds():  # and nobody removed the file in between
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n")
    file.flush()
    _held[folder] = lock
    return lock
