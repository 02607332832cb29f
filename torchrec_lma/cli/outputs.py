"""Files that a command will write: whether it can, before hours of work."""

import tempfile
from pathlib import Path


def check_writable(option: str, path: Path) -> None:
    """Raises OSError if a file cannot be written at `path`. Leaves nothing there.

    Folders that are missing are made when the file is written.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path} is a directory: give the name of a file to write in it")
    if path.exists() and not path.is_file():  # a device or a pipe
        return
    _check_takes_files(option, path, path.absolute().parent)


def check_folder(option: str, path: Path) -> None:
    """Raises OSError if `path` cannot be a folder that files are written in. Leaves nothing there."""
    _check_takes_files(option, path, path.absolute())


def _check_takes_files(option: str, path: Path, folder: Path) -> None:
    while not folder.exists():  # it is made when it is needed
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{option} {path} cannot be written: {folder} takes no file ({error.strerror})") from error
