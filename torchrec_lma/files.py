"""Files that are whole or not there, whatever happens while they are written."""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path


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
