"""Runs a function on several gloo ranks, in processes kept between tests (importing torchrec takes seconds)."""

import atexit
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_START_SECONDS = 600  # importing torchrec takes a minute where other processes have the cores
_TIMEOUT_SECONDS = 120


def _serve(rank: int, world_size: int, local_world_size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank % local_world_size),
        "LOCAL_WORLD_SIZE": str(local_world_size),
    }
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    connection.send((True, None))
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            result = function(*args)
            dist.barrier()
            connection.send((True, result))
        except BaseException as error:
            connection.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


@dataclass
class _Group:
    """The ranks of one process group. TorchRec keeps process groups in globals, so a process serves in one only."""

    workers: list[tuple[Any, Connection]]
    folder: str

    def stop(self) -> None:
        for process, _ in self.workers:
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


_groups: dict[tuple[int, int], _Group] = {}


def run(function: Callable[..., Any], world_size: int, *args: Any, local_world_size: int | None = None) -> list[Any]:
    """Calls `function(*args)` on every rank; returns the results in rank order.

    `local_world_size` makes several hosts of them, as torchrun would tell. An exception on a rank fails the test.
    """
    key = (world_size, local_world_size or world_size)
    if key not in _groups:
        _groups[key] = _start(*key)
        _results(key, _START_SECONDS)
    for _, connection in _groups[key].workers:
        connection.send((function, args))
    return _results(key, _TIMEOUT_SECONDS)


def _results(key: tuple[int, int], timeout: float) -> list[Any]:
    """What each rank sends next, in rank order; raises what the first one says that fails."""
    workers = _groups[key].workers
    results: dict[int, Any] = {}
    end = time.monotonic() + timeout
    while len(results) < len(workers):
        waiting = {connection: rank for rank, (_, connection) in enumerate(workers) if rank not in results}
        ready = wait(list(waiting), max(0.0, end - time.monotonic()))
        failed = "" if ready else f"ranks {sorted(waiting.values())} of {len(workers)}: timed out"
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting[connection]
            try:
                ok, results[rank] = connection.recv()
            except (EOFError, ConnectionError):
                workers[rank][0].join(1)
                ok, results[rank] = False, f"died with exit code {workers[rank][0].exitcode}"
            failed = failed or ("" if ok else f"rank {rank} of {len(workers)}: {results[rank]}")
        if failed:
            _groups.pop(key).stop()  # the others may hang in a collective; the next test starts fresh ones
            raise AssertionError(failed)
    return [results[rank] for rank in range(len(workers))]


def _start(world_size: int, local_world_size: int) -> _Group:
    context = mp.get_context("spawn")
    group = _Group([], tempfile.mkdtemp())
    for rank in range(world_size):
        here, there = context.Pipe()
        process = context.Process(
            target=_serve, args=(rank, world_size, local_world_size, f"{group.folder}/store", there), daemon=True
        )
        process.start()
        there.close()  # so that a dead worker reads as end of file
        group.workers.append((process, here))
    return group


@atexit.register
def _stop_all() -> None:
    for group in _groups.values():
        group.stop()
