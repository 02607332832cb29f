"""The model of a file, and its exchange when the file changes."""

import asyncio
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import torch

from torchrec_lma.serving.loading import seconds_to_load, source_of, try_model
from torchrec_lma.serving.model import FileChanged, Model, Stamp

ATTEMPTS = 3  # to read a file that is written meanwhile
LOOK_SECONDS = 1.0  # between two looks at the file while it is tried
REPLACE_SECONDS = 30.0  # after which it is no longer tried if another has taken its place


class ModelStore:
    """The current model of a file, and its exchange when the file changes.

    `load` makes the new model ready before it takes the old one's place; if that fails, the old one stays. Requests
    hold on to the model they were checked against, so none of them notices.

    Args: see `Model`.

    Raises: as `Model`. The first model is loaded here and now, in the caller's thread.
    """

    def __init__(
        self, path: Path, counts: Sequence[int] | None, device: torch.device, warm_up_rows: int = 1024
    ) -> None:
        self._path = path
        self._arguments = (counts, device, warm_up_rows)
        self._loading = asyncio.Lock()
        self._seen: Stamp | None = None  # at the last look
        self.current = Model(path, *self._arguments)
        self._tried = self.current.stamp

    def has_changed(self) -> bool:
        """Whether there is another file than the one last tried, and it has not changed since the last call.

        A file that is being copied changes between two looks; only then is it worth reading.
        """
        try:
            stamp = Stamp.of(self._path)
        except OSError:  # between removal and replacement; the loaded model does not need it
            self._seen = None
            return False
        settled, self._seen = stamp == self._seen, stamp
        return settled and stamp != self._tried

    async def load(self) -> Model:
        """Tries the file in another process, then reads it and makes it the current model, which is returned.

        Raises:
            ValueError: as `Model` and `try_model`; the current model is then the same as before.
            OSError: the file cannot be read.
        """
        async with self._loading:
            for again in reversed(range(ATTEMPTS)):
                self._tried = Stamp.of(self._path)
                descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would let it wait
                try:
                    await self._try(descriptor)
                    self.current = await self._read(descriptor)
                    break
                except FileChanged:
                    if not again:
                        raise
                finally:
                    os.close(descriptor)
            return self.current

    async def _try(self, descriptor: int) -> None:
        """Gives up where it takes long and the file is replaced: the next one shall not wait for what may never end."""
        trying = asyncio.create_task(try_model(self._path, *self._arguments, descriptor))
        started = time.monotonic()
        try:
            while not trying.done():
                await asyncio.wait({trying}, timeout=LOOK_SECONDS)
                if time.monotonic() > started + REPLACE_SECONDS and self._is_replaced():
                    raise FileChanged(f"{self._path} took long to load and was replaced meanwhile")
        finally:
            trying.cancel()
            await asyncio.gather(trying, return_exceptions=True)  # until its process is gone
        trying.result()

    def _is_replaced(self) -> bool:
        try:
            return Stamp.of(self._path) != self._tried
        except OSError:  # between removal and replacement
            return False

    async def _read(self, descriptor: int) -> Model:
        """The file's model. Should it not end here, unlike where it was tried, its thread is left behind."""
        seconds = seconds_to_load(self._tried.size)
        result: Future[Model] = Future()
        result.set_running_or_notify_cancel()

        def read() -> None:
            try:
                result.set_result(Model(self._path, *self._arguments, source_of(descriptor)))
            except BaseException as error:
                result.set_exception(error)

        # Not an executor's thread: Python would wait for it at its end.
        threading.Thread(target=read, name="load", daemon=True).start()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(result), seconds)
        except TimeoutError:
            raise ValueError(f"{self._path} did not load within {seconds:.0f} s") from None
