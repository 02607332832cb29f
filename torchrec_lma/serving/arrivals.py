"""Messages that are still arriving: how many are received at once, which bounds their RAM, and who gives way."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

PATIENCE_SECONDS = 1.0  # that a message may take to arrive while others wait to be received
MAX_OTHER_CALLS = 1024  # of the standard services at the same time


class TooSlow(Exception):
    """A message did not arrive in time."""


class Arrivals(grpc.aio.ServerInterceptor):
    """Receives requests, so many at a time.

    gRPC opens a stream's flow control for the whole of a message as soon as the server asks for it. Until then a stream
    brings 64 KiB at most. So what is asked for at the same time bounds the RAM. While requests wait to be received,
    those that have been arriving for `PATIENCE_SECONDS` give way; else a slow client may take its time.

    As an interceptor it receives the requests of the standard services too. The server's own method is passed through,
    and calls `receive` itself.

    Args:
        at_once: messages that are received at the same time.
        passed: the full name of the method that calls `receive` itself.
    """

    def __init__(self, at_once: int, passed: str) -> None:
        self._passed = passed
        self._slots = asyncio.Semaphore(at_once)
        self._receiving: dict[asyncio.Timeout, float] = {}  # the time at which each has had enough patience
        self._waiting = 0
        self._hurried = False
        self._other_calls = 0
        self._handlers: dict[str, Any] = {}

    @property
    def count(self) -> int:
        """Messages that are being received, or wait for it."""  # no __len__: gRPC skips an interceptor that is falsy
        return len(self._receiving) + self._waiting

    def hurry(self) -> None:
        """From now on messages get no more than `PATIENCE_SECONDS`, also where no others wait."""
        self._hurried = True
        self._hurry()

    async def receive(self, context: grpc.aio.ServicerContext) -> Any:
        """The next message of a call; grpc.aio.EOF where there is none, and where it was larger than is allowed.

        Raises:
            TooSlow: it took longer than `PATIENCE_SECONDS`, and others wait, or `hurry` was called.
        """
        if self._slots.locked():
            self._hurry()
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        try:
            async with asyncio.timeout(None) as limit:
                self._receiving[limit] = asyncio.get_running_loop().time() + PATIENCE_SECONDS
                if self._waiting or self._hurried:
                    self._hurry()
                try:
                    return await context.read()
                finally:
                    del self._receiving[limit]
        except TimeoutError:
            raise TooSlow(
                f"the message did not arrive within {PATIENCE_SECONDS:g} s, and other messages wait to be received"
            ) from None
        finally:
            self._slots.release()

    def _hurry(self) -> None:
        for limit, end in self._receiving.items():
            if limit.when() is None:
                limit.reschedule(end)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        method = handler_call_details.method
        if method == self._passed:
            return await continuation(handler_call_details)
        if method not in self._handlers:
            handler = await continuation(handler_call_details)
            if handler is None:  # not kept: clients may send any name
                return None
            self._handlers[method] = self._bounded(handler)
        return self._handlers[method]

    def _bounded(self, handler: Any) -> Any:
        """A handler of another service that gets its messages by `receive`; on the wire it is the same."""
        serializers = handler.request_deserializer, handler.response_serializer

        async def check(_: Any, context: grpc.aio.ServicerContext) -> Any:
            return await handler.unary_unary(await self._first(context), context)

        async def watch(_: Any, context: grpc.aio.ServicerContext) -> None:
            await handler.unary_stream(await self._first(context), context)

        async def reflect(_: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            await self._admit(context)
            async for answer in handler.stream_stream(self._messages(context), context):
                yield answer

        if handler.unary_unary is not None:
            return grpc.stream_unary_rpc_method_handler(check, *serializers)
        return grpc.stream_stream_rpc_method_handler(watch if handler.unary_stream else reflect, *serializers)

    async def _admit(self, context: grpc.aio.ServicerContext) -> None:
        if self._other_calls >= MAX_OTHER_CALLS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_OTHER_CALLS} calls of this kind are running")
        self._other_calls += 1
        context.add_done_callback(self._leave)

    def _leave(self, _: grpc.aio.ServicerContext) -> None:
        self._other_calls -= 1

    async def _first(self, context: grpc.aio.ServicerContext) -> Any:
        await self._admit(context)
        async for message in self._messages(context):
            return message
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")

    async def _messages(self, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            while (message := await self.receive(context)) is not grpc.aio.EOF:
                yield message
        except TooSlow as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
