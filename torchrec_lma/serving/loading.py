"""Trying a model file in a process that can be killed, so that no file can keep a server from its requests."""

import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from torchrec_lma.serving.model import FileChanged, Model, Stamp

LOAD_SECONDS = 120.0  # that a file may take, with the start of the process that tries it, and
LOAD_BYTES_PER_SECOND = 20 << 20  # one second more for each of these
_CHANGED = 3  # exit status
_TRY = """
import json, signal, sys
arguments = json.load(sys.stdin)
# This ends the process even where its parent is gone, or the model never lets Python run again.
signal.setitimer(signal.ITIMER_REAL, arguments.pop("seconds"))
sys.path[:] = arguments.pop("sys_path")
from torchrec_lma.serving.loading import try_here
sys.exit(try_here(**arguments))
"""


def seconds_to_load(nbytes: int) -> float:
    return LOAD_SECONDS + nbytes / LOAD_BYTES_PER_SECOND


def source_of(descriptor: int) -> Path:
    return Path(f"/dev/fd/{descriptor}")


async def try_model(
    path: Path, counts: Sequence[int] | None, device: torch.device, warm_up_rows: int, descriptor: int
) -> None:
    """Loads a model, checks and warms it up in a process of its own, which is gone when this returns or is cancelled.

    Args:
        path: for messages.
        counts, device, warm_up_rows: as of `Model`.
        descriptor: of the file, open for reading.

    Raises:
        FileChanged: it was replaced or written meanwhile.
        ValueError: it cannot be served, took longer than `seconds_to_load`, or made the process crash.
    """
    source = source_of(descriptor)
    seconds = seconds_to_load(Stamp.of(source).check(path).size)
    arguments = {
        "path": str(path),
        "source": str(source),
        "counts": counts,
        "device": str(device),
        "warm_up_rows": warm_up_rows,
        "seconds": seconds,
        "sys_path": sys.path,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-W", "ignore", "-c", _TRY),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        pass_fds=[descriptor],
    )
    try:
        _, output = await process.communicate(json.dumps(arguments).encode())
        status = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    message = output.decode(errors="replace").strip().split("\n")[-1]
    if status == _CHANGED:
        raise FileChanged(message)
    if status == -signal.SIGALRM:
        raise ValueError(f"{path} did not load and answer a few rows within {seconds:.0f} s")
    if status < 0:
        raise ValueError(f"{path} ended the process that tried it by {signal.Signals(-status).name}: {message}")
    if status:
        raise ValueError(message)


def try_here(path: str, source: str, counts: Sequence[int] | None, device: str, warm_up_rows: int) -> int | str:
    """What the process does: exits with 0, or with the message."""
    torch.set_num_threads(1)
    with suppress(OSError):  # if RAM runs out it shall be this process that is killed, and not the server
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        Model(Path(path), counts, torch.device(device), warm_up_rows, Path(source))
    except FileChanged as error:
        print(error, file=sys.stderr)
        return _CHANGED
    except (ValueError, OSError) as error:
        return str(error)
    return 0
