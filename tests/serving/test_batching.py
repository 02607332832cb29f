"""The batcher by itself: what it puts together, and callers that leave at the worst moment."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest

from torchrec_lma.serving.batching import Batcher, Limits, QueueFull, Stopped


@dataclass(frozen=True)
class Item:
    rows: int
    model: str = "a"
    ids: int = 0
    nbytes: int = 0


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """In an event loop of a thread: a loop that is blocked cannot end itself."""
    failure: list[BaseException] = []

    def target() -> None:
        try:
            asyncio.run(test())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "the event loop is blocked"
    if failure:
        raise failure[0]


def test_batches_keep_order_size_and_model() -> None:
    async def test() -> None:
        batches: list[list[Item]] = []
        batcher = Batcher(lambda items: (batches.append(list(items)), items)[1], Limits(10, 0.05))
        items = [Item(4), Item(4), Item(4), Item(1, "b"), Item(30, "b"), Item(1, "b"), Item(2)]
        submitted = [asyncio.create_task(batcher.submit(item)) for item in items]
        await asyncio.sleep(0)
        batcher.start()
        assert await asyncio.gather(*submitted) == items
        assert batches == [items[:2], items[2:3], items[3:4], items[4:5], items[5:6], items[6:]]
        await batcher.stop()

    run(test)


def test_batches_are_bounded_in_ids_as_well() -> None:
    async def test() -> None:
        batches: list[list[Item]] = []
        batcher = Batcher(lambda items: (batches.append(list(items)), items)[1], Limits(100, 0.05, max_ids=10))
        items = [Item(1, ids=6), Item(1, ids=4), Item(1, ids=1), Item(1, ids=9)]
        submitted = [asyncio.create_task(batcher.submit(item)) for item in items]
        await asyncio.sleep(0)
        batcher.start()
        await asyncio.gather(*submitted)
        assert batches == [items[:2], items[2:]]
        await batcher.stop()

    run(test)


def test_caller_that_leaves_as_its_turn_comes_does_not_block_the_others() -> None:
    async def test() -> None:
        seen: list[Item] = []
        batcher = Batcher(lambda items: (seen.extend(items), items)[1], Limits(10, 0))
        batcher.start()
        await asyncio.sleep(0)
        leaving = asyncio.create_task(batcher.submit(Item(1)))
        await asyncio.sleep(0)  # queued, and the replica is about to look
        leaving.cancel()
        assert await batcher.submit(Item(2)) == Item(2)
        assert seen == [Item(2)]
        assert leaving.cancelled()
        assert len(batcher) == 0
        await batcher.stop()

    run(test)


def test_stopped_batcher_refuses_what_waits_and_what_comes() -> None:
    async def test() -> None:
        batcher = Batcher(lambda items: items, Limits(10, 60))
        batcher.start()
        waiting, leaving = [asyncio.create_task(batcher.submit(Item(1))) for _ in range(2)]
        await asyncio.sleep(0)
        leaving.cancel()
        await batcher.stop()
        with pytest.raises(Stopped):
            await waiting
        with pytest.raises(Stopped):
            await batcher.submit(Item(1))
        assert len(batcher) == 0

    run(test)


def test_queue_is_bounded_in_bytes_as_well() -> None:
    async def test() -> None:
        batcher = Batcher(lambda items: items, Limits(100, 0, max_queue_bytes=10))
        waiting = [asyncio.create_task(batcher.submit(Item(1, nbytes=nbytes))) for nbytes in (6, 4)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="10 bytes of requests are waiting"):
            await batcher.submit(Item(1, nbytes=1))
        waiting[0].cancel()
        await asyncio.sleep(0)
        waiting.append(asyncio.create_task(batcher.submit(Item(1, nbytes=6))))
        await asyncio.sleep(0)
        batcher.start()
        assert len(await asyncio.gather(*waiting[1:])) == 2
        assert await batcher.submit(Item(1, nbytes=11))  # alone it may be larger
        await batcher.stop()

    run(test)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_rows": 0},
        {"max_ids": 0},
        {"max_request_rows": 0},
        {"max_queue": -1},
        {"max_queue_bytes": 0},
        {"replicas": 0},
        {"max_delay_seconds": -0.1},
    ],
)
def test_limits_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
        Limits(**bad)
