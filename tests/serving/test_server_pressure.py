"""More than the server can take: bursts, resets, messages that never end, and clients that go on while it stops."""

import asyncio
import collections
import concurrent.futures
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.raw_http2 import RawConnection
from support.running_server import Rows, Running, running, save_model
from torchrec_lma.serving import arrivals, metrics, settings
from torchrec_lma.serving.settings import Settings

PREDICT, CHECK = "/predictor.Predictor/Predict", "/grpc.health.v1.Health/Check"
MIB = 1 << 20


@contextmanager
def channel_of_its_own(server: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield channel


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Running]:
    with running(Settings(save_model(tmp_path / "model.pt"), port=0)) as server:
        yield server


async def burst(address: str, channels: int, each: int) -> collections.Counter[str]:
    """How the requests ended that were sent at the same time."""
    own = [grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(channels)]
    data = Rows(2).request().SerializeToString()
    ended: collections.Counter[str] = collections.Counter()

    async def send(channel: grpc.aio.Channel) -> None:
        try:
            await channel.unary_unary(PREDICT)(data, timeout=60)
            ended["OK"] += 1
        except grpc.RpcError as error:
            ended[error.code().name] += 1

    for channel in own:
        await channel.channel_ready()
    await asyncio.gather(*(send(channel) for channel in own for _ in range(each)))
    for channel in own:
        await channel.close()
    return ended


@pytest.mark.parametrize(("channels", "each"), [(1, 1500), (4, 500)])
def test_a_burst_is_answered_or_refused_and_all_of_it_is_counted(served: Running, channels: int, each: int) -> None:
    opened = threading.Event()
    model = served.server.models.current
    predict = model.predict

    def held(batch):
        assert opened.wait(60)
        return predict(batch)

    model.predict = held  # type: ignore[method-assign]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        sent = pool.submit(lambda: asyncio.run(burst(served.address, channels, each)))
        while not served.metric("requests_total", code="RESOURCE_EXHAUSTED"):
            assert not sent.done()
            time.sleep(0.01)
        opened.set()
        ended = sent.result()
    assert set(ended) == {"OK", "RESOURCE_EXHAUSTED"}
    assert ended.total() == channels * each
    for code, count in ended.items():
        assert served.metric("requests_total", code=code) == count


def test_resets_of_one_client_do_not_cancel_the_requests_of_another(served: Running) -> None:
    hostile = [RawConnection(served.server.port) for _ in range(2)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        floods = [pool.submit(connection.flood_with_resets, 6000) for connection in hostile]
        data = Rows(2)
        for _ in range(8):
            np.testing.assert_allclose(served.send(data.request(), timeout=60), data.expected(), rtol=1e-5)
        assert sum(flood.result() for flood in floods) == 12_000
    for connection in hostile:
        connection.close()


@contextmanager
def four_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience_seconds: float) -> Iterator[Running]:
    """A server that receives 4 messages of up to 1 MiB at a time."""
    monkeypatch.setattr(settings, "ARRIVING_BYTES", 4 * MIB)
    monkeypatch.setattr(arrivals, "PATIENCE_SECONDS", patience_seconds)
    with running(Settings(save_model(tmp_path / "model.pt"), port=0, max_message_bytes=MIB)) as server:
        yield server


@contextmanager
def unfinished(server: Running, count: int, path: str) -> Iterator[list[int]]:
    """Messages of so many connections that lack their last byte: how many bytes of each the server let in."""
    connections = [RawConnection(server.server.port) for _ in range(count)]
    try:
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            yield list(pool.map(lambda each: each.send_message(each.open(path), MIB - 1, MIB, 1.5), connections))
    finally:
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("path", [PREDICT, CHECK])
def test_messages_are_let_in_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    with four_at_once(tmp_path, monkeypatch, patience_seconds=60) as server, unfinished(server, 12, path) as sent:
        assert sum(size >= MIB - 1 for size in sent) == 4
        assert sum(sent) < 4 * MIB + 8 * 70_000  # of the others what comes before it is asked for
        assert server.metric("arriving_requests") == 12


def test_messages_that_do_not_end_give_way_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with four_at_once(tmp_path, monkeypatch, patience_seconds=0.1) as server, unfinished(server, 6, PREDICT):
        data = Rows(2)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: server.send(data.request()), range(8)))
        for answer in answers:
            np.testing.assert_allclose(answer, data.expected(), rtol=1e-5)
        assert server.metric("requests_total", code="RESOURCE_EXHAUSTED") >= 2


def test_a_slow_message_may_take_its_time_where_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with four_at_once(tmp_path, monkeypatch, patience_seconds=0.1) as server, unfinished(server, 4, PREDICT):
        time.sleep(0.5)
        assert server.metric("arriving_requests") == 4
        assert server.metric("requests_total", code="RESOURCE_EXHAUSTED") == 0


def test_a_small_message_that_unpacks_to_a_large_one_is_refused(served: Running) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        served.send_bytes(bytes(64 * MIB), timeout=20, compression=grpc.Compression.Gzip)
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_connections_beyond_the_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "MAX_CONNECTIONS", 3)
    with running(Settings(save_model(tmp_path / "model.pt"), port=0)) as server:
        server.send(Rows(1).request())
        others = [RawConnection(server.server.port) for _ in range(2)]
        for other in others:
            other.open()
        with channel_of_its_own(server) as channel, pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(PREDICT)(Rows(1).request().SerializeToString(), timeout=20)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        for other in others:
            other.close()
        with channel_of_its_own(server) as channel:
            channel.unary_unary(PREDICT)(Rows(1).request().SerializeToString(), timeout=20, wait_for_ready=True)


def test_calls_of_the_standard_services_are_limited(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "MAX_OTHER_CALLS", 2)
    stub = health_pb2_grpc.HealthStub(served.channel)
    watches = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=30) for _ in range(2)]
    for watch in watches:
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as refused:
        stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    for watch in watches:
        watch.cancel()
    until_answered = time.monotonic() + 30
    while True:
        try:
            assert stub.Check(health_pb2.HealthCheckRequest(), timeout=20).status
            break
        except grpc.RpcError:
            assert time.monotonic() < until_answered


def test_clients_that_go_on_while_it_stops_see_unavailable_and_nothing_else(served: Running) -> None:
    ended = threading.Event()
    answered = threading.Event()
    seen: collections.Counter[str] = collections.Counter()

    async def client(channel: grpc.aio.Channel, data: bytes) -> None:
        while not ended.is_set():
            try:
                await channel.unary_unary(PREDICT)(data, timeout=30)
                answered.set()
            except grpc.RpcError as error:
                seen[error.code().name] += 1
                await asyncio.sleep(0.001)

    async def clients() -> None:
        channels = [
            grpc.aio.insecure_channel(served.address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(10)
        ]
        data = Rows(2).request().SerializeToString()
        await asyncio.gather(*(client(channel, data) for channel in channels for _ in range(10)))
        for channel in channels:
            await channel.close()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asking = pool.submit(lambda: asyncio.run(clients()))
        try:
            assert answered.wait(30)
            assert served.run(served.server.stop())
            while seen.total() < 200:
                time.sleep(0.01)
        finally:
            ended.set()
        asking.result()
    assert set(seen) == {"UNAVAILABLE"}


def test_metrics_are_there_for_many_at_once_and_silent_clients_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "SCRAPE_SECONDS", 0.2)
    with running(Settings(save_model(tmp_path / "model.pt"), port=0, metrics_port=0)) as server:
        address = ("127.0.0.1", server.server._metrics_server.port)

        def scrape(_: int) -> bytes:
            with socket.create_connection(address, timeout=30) as client:
                client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                return b"".join(iter(lambda: client.recv(1 << 16), b""))

        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            assert all(b"torchrec_lma_rows_total" in page for page in pool.map(scrape, range(80)))
        with socket.create_connection(address, timeout=30) as silent:
            assert silent.recv(1) == b""
        # Of a socket that listens, the kernel gives the longest queue of new connections at this place of tcp_info.
        info = server.server._metrics_server._server.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
        assert struct.unpack_from("I", info, 28) == (metrics.BACKLOG,)
