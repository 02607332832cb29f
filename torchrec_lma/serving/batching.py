"""Dynamic batching: requests that wait at the same time are computed together, within a bound on the waiting time."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


class QueueFull(Exception):
    """More requests wait, or larger ones, than the queue may hold."""


class Stopped(Exception):
    """The batcher takes no more requests."""


class Item(Protocol):
    """A request: its size, and the model that it was checked against. A batch has items of one model only."""

    @property
    def rows(self) -> int: ...

    @property
    def ids(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def model(self) -> Any: ...


class _Waiting(NamedTuple):
    item: Item
    since: float  # the event loop's time


@dataclass(frozen=True)
class Limits:
    """
    Args:
        max_rows: of a batch; a larger request is a batch of its own.
        max_ids: of a batch, which bounds the RAM that computing it takes; a larger request is for the caller to
            refuse.
        max_delay_seconds: how long the first request of a batch waits for others.
        max_request_rows: of one request; a larger one is for the caller to refuse.
        max_queue: requests that may wait.
        max_queue_bytes: of all that wait together.
        replicas: batches computed at the same time, each in a thread of its own.
    """

    max_rows: int = 1024
    max_delay_seconds: float = 0.002
    max_queue: int = 512
    replicas: int = 1
    max_ids: int = 1 << 20
    max_request_rows: int = 1 << 14
    max_queue_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_ids", "max_request_rows", "max_queue", "max_queue_bytes", "replicas"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.max_delay_seconds <= 60:
            raise ValueError(f"max_delay_seconds={self.max_delay_seconds} must be between 0 and 60")


class Batcher:
    """Groups awaiting requests into batches and computes them in `limits.replicas` threads.

    One event loop runs all of it but `compute`, so there are no locks. A caller that is cancelled (its client left, or
    its deadline passed) takes its request out of the queue: nothing is computed for it.

    Args:
        compute: items of one model -> as many results, in order; called in a thread. If it raises, the items are
            computed one by one, so that an item only ever fails for its own reasons.
        limits: see `Limits`.
    """

    def __init__(self, compute: Callable[[Sequence[Any]], Sequence[Any]], limits: Limits) -> None:
        self._compute = compute
        self._limits = limits
        self._queue: dict[asyncio.Future[Any], _Waiting] = {}  # in order of arrival
        self._queued_rows = 0
        self._queued_bytes = 0
        self._forming = asyncio.Lock()
        self._wake: asyncio.Future[None] | None = None
        self._wake_rows = 0
        self._stopped = False
        self._threads: Executor = ThreadPoolExecutor(limits.replicas, thread_name_prefix="replica")
        self._replicas: list[asyncio.Task[None]] = []

    def __len__(self) -> int:
        """Requests that wait, the ones being computed not among them."""
        return len(self._queue)

    def start(self) -> None:
        """To be called in the event loop."""
        self._replicas = [asyncio.create_task(self._run_replica()) for _ in range(self._limits.replicas)]

    async def stop(self) -> None:
        """Refuses what waits, and returns when what is being computed is done; may be cancelled before."""
        self._stopped = True
        for future in self._queue:
            if not future.done():
                future.set_exception(Stopped())
        self._wake_up()
        if self._replicas:
            await asyncio.wait(self._replicas)  # not gather, which would cancel them where this is cancelled
        for replica in self._replicas:
            replica.result()
        self._threads.shutdown()

    async def submit(self, item: Item) -> Any:
        """The item's result.

        Raises:
            QueueFull: at once, if `max_queue` requests wait already, or this one would make `max_queue_bytes` more.
            Stopped: the batcher was stopped before the item's turn came.
            Exception: what `compute` raised for this item alone.
        """
        if self._stopped:
            raise Stopped()
        if len(self._queue) >= self._limits.max_queue:
            raise QueueFull(f"{self._limits.max_queue} requests are waiting")
        if self._queue and self._queued_bytes + item.nbytes > self._limits.max_queue_bytes:
            raise QueueFull(f"{self._queued_bytes} bytes of requests are waiting")
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._queue[future] = _Waiting(item, loop.time())
        self._queued_rows += item.rows
        self._queued_bytes += item.nbytes
        if self._queued_rows >= self._wake_rows:
            self._wake_up()
        try:
            return await future
        finally:
            self._dequeue(future)
            del future  # it holds the exception, whose traceback holds this frame: a cycle, and the item's model in it

    def _dequeue(self, future: asyncio.Future[Any]) -> None:
        if future in self._queue:
            item = self._queue.pop(future).item
            self._queued_rows -= item.rows
            self._queued_bytes -= item.nbytes

    async def _run_replica(self) -> None:
        while not self._stopped:
            async with self._forming:  # the other idle replicas wait here
                batch = await self._form()
            if not batch:  # all were cancelled while it waited for more
                continue
            for future, result in zip(batch, await self._results(list(batch.values()))):
                if future.done():  # cancelled while it was computed
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    async def _form(self) -> dict[asyncio.Future[Any], Item]:
        """Takes the next batch out of the queue. Empty if nothing is left of what it waited for, or when stopped."""
        await self._wait_for_rows(1)
        for first in itertools.islice(self._queue.values(), 1):
            await self._wait_for_rows(self._limits.max_rows, until=first.since + self._limits.max_delay_seconds)
        batch: dict[asyncio.Future[Any], Item] = {}
        left: list[asyncio.Future[Any]] = []
        rows = ids = 0
        for future, (item, _) in self._queue.items():
            if future.done():  # its caller was cancelled a moment ago and has not run yet
                left.append(future)
                continue
            first_item = next(iter(batch.values()), item)
            too_large = rows + item.rows > self._limits.max_rows or ids + item.ids > self._limits.max_ids
            if batch and (too_large or item.model is not first_item.model):
                break
            batch[future] = item
            rows += item.rows
            ids += item.ids
        for future in (*batch, *left):  # left too: else this would find them again, and never let their callers run
            self._dequeue(future)
        return batch

    async def _wait_for_rows(self, rows: int, until: float | None = None) -> None:
        """Until so many rows are queued, at most to the event loop's time `until`."""
        loop = asyncio.get_running_loop()
        while self._queued_rows < rows and not self._stopped and (until is None or loop.time() < until):
            self._wake, self._wake_rows = loop.create_future(), rows
            timer = loop.call_at(until, self._wake_up) if until is not None else None
            await self._wake
            if timer is not None:
                timer.cancel()

    def _wake_up(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _results(self, items: list[Item]) -> list[Any]:
        """The items' results; an exception in place of the result of an item that fails by itself."""
        try:
            return list(await self._in_thread(items))
        except Exception as error:
            if len(items) == 1:
                return [error]
        alone = [await self._results([item]) for item in items]
        return list(itertools.chain.from_iterable(alone))

    async def _in_thread(self, items: list[Item]) -> Sequence[Any]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._compute, items)
