"""Runs a function on several gloo ranks, in processes kept between tests (importing torchrec takes seconds)."""

import atexit
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_TIMEOUT_SECONDS = 120


def _serve(rank: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, args, world_size, local_world_size, store = connection.recv()
        except EOFError:
            return
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank % local_world_size),
            "LOCAL_WORLD_SIZE": str(local_world_size),
        }
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
            result = function(*args)
            dist.barrier()
            dist.destroy_process_group()
            connection.send((True, result))
        except BaseException as error:
            connection.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


class Ranks:
    def __init__(self) -> None:
        # By world size: TorchRec keeps process-wide state that assumes one world size for a process's life.
        self._workers: dict[int, list[tuple[Any, Connection]]] = {}
        atexit.register(self.stop)

    def run(
        self, function: Callable[..., Any], world_size: int, *args: Any, local_world_size: int | None = None
    ) -> list[Any]:
        """Calls `function(*args)` on every rank of a fresh process group; returns the results in rank order."""
        context = mp.get_context("spawn")
        workers = self._workers.setdefault(world_size, [])
        while len(workers) < world_size:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(len(workers), there), daemon=True)
            process.start()
            there.close()  # so that a dead worker reads as end of file
            workers.append((process, here))
        with tempfile.TemporaryDirectory() as folder:
            for _, connection in workers:
                connection.send((function, args, world_size, local_world_size or world_size, f"{folder}/store"))
            results: list[Any] = []
            for rank, (process, connection) in enumerate(workers):
                try:
                    ok, result = connection.recv() if connection.poll(_TIMEOUT_SECONDS) else (False, "timed out")
                except EOFError:
                    ok, result = False, f"died with exit code {process.exitcode}"
                if not ok:
                    self.stop()  # the others may hang in a collective; the next test starts fresh ones
                    raise AssertionError(f"rank {rank} of {world_size}: {result}")
                results.append(result)
            return results

    def stop(self) -> None:
        for workers in self._workers.values():
            for process, _ in workers:
                process.kill()
        self._workers = {}


RANKS = Ranks()
run = RANKS.run
