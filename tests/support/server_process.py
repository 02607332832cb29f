"""`torchrec-lma serve` in a process of its own, what it logs, and waiting for it."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Waits for what must come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


@contextmanager
def serve_process(*options: str) -> Iterator[tuple[subprocess.Popen, list[dict]]]:
    """`torchrec-lma serve` in a process of its own, and its log, which grows."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "torchrec_lma.cli", "serve", *options], stderr=subprocess.PIPE, text=True
    )
    lines: list[dict] = []
    reader = threading.Thread(target=lambda: lines.extend(map(json.loads, process.stderr)))
    reader.start()
    try:
        yield process, lines
    finally:
        process.kill()
        process.wait()
        reader.join()


def event(process: subprocess.Popen, log: list[dict], name: str, count: int = 1, seconds: float = 60) -> dict:
    until(lambda: sum(line["event"] == name for line in log) >= count or process.poll() is not None, seconds)
    return [line for line in log if line["event"] == name][-1]
