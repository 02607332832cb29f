"""The server under pressure and over time: full queues, deadlines, clients that leave, new model files, its end."""

import asyncio
import concurrent.futures
import gc
import logging
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from support.running_server import FLOATS, IDS, POISON, Rows, Running, running, save_model
from support.server_process import event, serve_process, until
from torchrec_lma.cli import main
from torchrec_lma.serving.batching import Limits
from torchrec_lma.serving.client import PredictionClient
from torchrec_lma.serving.model_store import ModelStore
from torchrec_lma.serving.settings import Settings, Tls

CPU = torch.device("cpu")


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """New models are not tried in a process of their own, which takes seconds: test_server_loading.py has that."""

    async def nothing(*_: object) -> None: ...

    monkeypatch.setattr("torchrec_lma.serving.model_store.try_model", nothing)


class Gate:
    """Holds the server's model back until it is opened, and notes the rows that reach it."""

    def __init__(self, server: Running) -> None:
        self.opened = threading.Event()
        self.seen: list[int] = []
        model = server.server.models.current
        predict = model.predict

        def held(batch):
            self.seen += [inputs.rows for inputs in batch]
            assert self.opened.wait(30)
            return predict(batch)

        model.predict = held  # type: ignore[method-assign]


@contextmanager
def gated(tmp_path: Path, **limits: float) -> Iterator[tuple[Running, Gate]]:
    settings = Settings(save_model(tmp_path / "model.pt"), port=0, limits=Limits(max_rows=64, **limits))
    with running(settings) as server:
        gate = Gate(server)
        try:
            yield server, gate
        finally:
            gate.opened.set()


def test_full_queue_refuses_more_and_answers_what_it_holds(tmp_path: Path) -> None:
    with gated(tmp_path, max_queue=3) as (server, gate), concurrent.futures.ThreadPoolExecutor(4) as pool:
        requests = [Rows(1 + seed, seed) for seed in range(4)]
        answers = [pool.submit(server.send, requests[0].request())]
        until(lambda: gate.seen == [1])  # computed, no longer queued
        answers += [pool.submit(server.send, rows.request()) for rows in requests[1:]]
        until(lambda: server.metric("queue_requests") == 3)
        code, message = server.refusal(Rows(1).request())
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "3 requests are waiting" in message
        gate.opened.set()
        for rows, answer in zip(requests, answers):
            np.testing.assert_allclose(answer.result(), rows.expected(), rtol=1e-5)
        assert server.metric("requests_total", code="RESOURCE_EXHAUSTED") == 1


def test_expired_and_abandoned_requests_are_not_computed(tmp_path: Path) -> None:
    with gated(tmp_path, max_queue=2) as (server, gate), concurrent.futures.ThreadPoolExecutor(4) as pool:
        first = pool.submit(server.send, Rows(1).request())
        until(lambda: gate.seen == [1])
        with pytest.raises(grpc.RpcError) as expired:
            server.send(Rows(20).request(), timeout=0.2)
        assert expired.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: server.metric("queue_requests") == 0)
        abandoned = server.send_bytes.future(Rows(30).request().SerializeToString(), timeout=20)
        until(lambda: server.metric("queue_requests") == 1)
        abandoned.cancel()
        until(lambda: server.metric("queue_requests") == 0)  # both places are free again
        last = pool.submit(server.send, Rows(3).request())
        until(lambda: server.metric("queue_requests") == 1)
        gate.opened.set()
        assert len(first.result()) == 1
        assert len(last.result()) == 3
        assert gate.seen == [1, 3]
        # On a slow machine the first may have expired before the server saw it.
        assert server.metric("requests_total", code="CANCELLED") in (1, 2)


def test_client_whose_connection_breaks_costs_nothing(tmp_path: Path) -> None:
    with gated(tmp_path) as (server, gate):
        # Connections of its own: grpc would share one between channels of the same options.
        channel = grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)])
        calls = [
            channel.unary_unary("/predictor.Predictor/Predict").future(Rows(2).request().SerializeToString())
            for _ in range(5)
        ]
        until(lambda: len(gate.seen) + server.metric("queue_requests") == 5)
        channel.close()
        until(lambda: server.metric("queue_requests") == 0)
        assert all(call.cancelled() or call.exception() for call in calls)
        gate.opened.set()
        good = Rows(4)
        np.testing.assert_allclose(server.send(good.request()), good.expected(), rtol=1e-5)


def test_replicas_compute_at_the_same_time(tmp_path: Path) -> None:
    replicas = gated(tmp_path, replicas=2, max_delay_seconds=0)
    with replicas as (server, gate), concurrent.futures.ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(server.send, Rows(rows).request()) for rows in (1, 2)]
        until(lambda: sorted(gate.seen) == [1, 2])
        gate.opened.set()
        assert [len(answer.result()) for answer in answers] == [1, 2]


def test_stopping_server_finishes_what_it_computes_and_says_that_it_stops(tmp_path: Path) -> None:
    with gated(tmp_path) as (server, gate), concurrent.futures.ThreadPoolExecutor(3) as pool:
        watch = health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        request = Rows(2)
        answers = [pool.submit(server.send, request.request()) for _ in range(2)]
        until(lambda: len(gate.seen) + server.metric("queue_requests") == 2)
        stopping = pool.submit(server.run, server.server.stop())
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        another = grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)])
        with another as channel, pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/predictor.Predictor/Predict")(request.request().SerializeToString(), timeout=10)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        gate.opened.set()
        for answer in answers:
            np.testing.assert_allclose(answer.result(), request.expected(), rtol=1e-5)
        stopping.result()


def test_a_batch_that_does_not_end_does_not_keep_the_server_from_ending(tmp_path: Path) -> None:
    settings = Settings(save_model(tmp_path / "model.pt"), port=0, drain_seconds=0.1)
    with running(settings) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        gate = Gate(server)
        try:
            answer = pool.submit(server.refusal, Rows(1).request())
            until(lambda: gate.seen == [1])
            assert not server.run(server.server.stop())  # says that the batch was left behind
            assert answer.result()[0] in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
        finally:
            gate.opened.set()


@pytest.mark.usefixtures("untried")
def test_new_model_files_are_taken_over_without_a_failed_request(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model.pt", bias=0)
    with running(Settings(path, port=0, watch_seconds=0.02)) as server:
        data = Rows(3)
        known = np.stack([data.expected(bias) for bias in range(4)])  # [versions, rows]
        ended = threading.Event()
        versions: list[list[int]] = [[], []]

        def ask(into: list[int]) -> None:
            while not ended.is_set():
                (matching,) = np.flatnonzero(np.isclose(known, server.send(data.request()), rtol=1e-5).all(axis=1))
                into.append(int(matching))

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            asking = [pool.submit(ask, into) for into in versions]
            try:
                until(lambda: all(versions))
                for bias in (1, 2):
                    save_model(path, bias=bias)
                    until(lambda bias=bias: versions[0][-1] == versions[1][-1] == bias)
                # A broken file: the old model goes on.
                writing = tmp_path / "broken"
                writing.write_bytes(path.read_bytes()[:5000])
                os.replace(writing, path)
                until(lambda: server.metric("model_loads_total", result="failed") == 1)
                save_model(path, bias=3)
                until(lambda: versions[0][-1] == versions[1][-1] == 3)
            finally:
                ended.set()
            for answered in asking:
                answered.result()
        for seen in versions:
            assert seen == sorted(seen)


@pytest.mark.usefixtures("untried")
def test_waiting_requests_are_computed_with_the_model_that_they_were_checked_against(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model.pt")
    with gated(tmp_path) as (server, gate), concurrent.futures.ThreadPoolExecutor(4) as pool:
        old, new = [Rows(2, seed) for seed in range(3)], Rows(2, 7, floats=1, ids=4)
        answers = [pool.submit(server.send, old[0].request())]
        until(lambda: gate.seen == [2])
        answers += [pool.submit(server.send, rows.request()) for rows in old[1:]]
        until(lambda: server.metric("queue_requests") == 2)
        save_model(path, bias=1, floats=("price",), ids=(*IDS, "shop"))
        assert server.run(server.server.reload())
        assert server.refusal(old[0].request())[0] == grpc.StatusCode.INVALID_ARGUMENT
        newer = pool.submit(server.send, new.request())
        until(lambda: server.metric("queue_requests") == 3)
        gate.opened.set()
        for rows, answer in zip(old, answers):
            np.testing.assert_allclose(answer.result(), rows.expected(), rtol=1e-5)
        np.testing.assert_allclose(newer.result(), new.expected(bias=1), rtol=1e-5)


@pytest.mark.usefixtures("untried")
def test_replaced_model_is_freed_after_good_bad_and_abandoned_requests(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model.pt")
    with running(Settings(path, port=0, watch_seconds=0)) as server:
        gc.collect()
        gc.disable()  # it must go without: the collector comes seldom, and models are large
        logging.disable()  # pytest keeps log records, and in them tracebacks
        try:
            for seed in range(5):
                server.send(Rows(2, seed).request())
                server.refusal(b"garbage")
                poison = Rows(2, seed)
                poison.values[0] = POISON
                assert server.refusal(poison.request())[0] == grpc.StatusCode.INTERNAL
                server.send_bytes.future(Rows(2, seed).request().SerializeToString(), timeout=20).cancel()
            old = weakref.ref(server.server.models.current)
            save_model(path, bias=1)
            assert server.run(server.server.reload())
            server.send(Rows(2).request())  # the replica lets go of its last batch at the next one
            until(lambda: old() is None)
        finally:
            gc.enable()
            logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("untried")
def test_file_that_is_being_written_is_left_alone_until_it_rests(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model.pt")
    store = ModelStore(path, None, CPU, 4)
    assert not store.has_changed()
    assert not store.has_changed()
    content = save_model(tmp_path / "other.pt", bias=1).read_bytes()
    with path.open("wb") as file:  # in place, in two writes
        file.write(content[:1000])
        file.flush()
        assert not store.has_changed()
        file.write(content[1000:])
    os.utime(path, ns=(0, time.time_ns() + 10**9))  # the clock of file times may be coarser than the test
    assert not store.has_changed()
    assert store.has_changed()
    old = store.current
    assert asyncio.run(store.load()) is store.current is not old
    assert not store.has_changed()
    path.unlink()
    assert not store.has_changed()
    assert not store.has_changed()


def test_what_cannot_be_served_with_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(save_model(tmp_path / "model.pt"))
    (tmp_path / "no.pem").write_text("no certificate")
    no_pem = str(tmp_path / "no.pem")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for options, message in (
            (["--port", port], f"cannot listen on 127.0.0.1:{port}"),
            (["--port", "0", "--metrics-port", port], "in use"),
            (["--port", "0", "--tls-cert", no_pem, "--tls-key", no_pem], "cannot listen"),
            (["--port", "0", "--tls-cert", "missing.pem", "--tls-key", no_pem], "missing.pem"),
            (["--tls-cert", no_pem], "--tls-cert and --tls-key go together"),
            (["--client-ca", no_pem], "--client-ca needs"),
            (["--port", "65536"], "--port 65536"),
            (["--device", "abacus"], "device 'abacus' cannot be used"),
            (["--drain-seconds", "-1"], "drain_seconds=-1.0"),
            (["--max-batch", "0"], "max_rows=0"),
        ):
            assert main(["serve", path, *options]) == 2
            assert message in capsys.readouterr().err.splitlines()[-1]


def make_certificates(folder: Path) -> None:
    """ca.pem, and server.pem and client.pem signed by it, with their keys."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test ca")
    for name in ("server", "client"):
        (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signing = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names"]
        openssl("x509", "-req", "-in", f"{name}.csr", *signing, "-out", f"{name}.pem")


def test_tls_with_client_certificates(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    tls = Tls(tmp_path / "server.pem", tmp_path / "server.key", tmp_path / "ca.pem")
    data = Rows(3)
    floats = torch.from_numpy(data.floats)
    features = KeyedJaggedTensor(
        list(IDS), torch.from_numpy(data.values), lengths=torch.from_numpy(data.lengths.flatten())
    )
    with running(Settings(save_model(tmp_path / "model.pt"), port=0, tls=tls)) as server:
        files = {"certificate": tmp_path / "client.pem", "key": tmp_path / "client.key"}
        with PredictionClient(server.address, root_certificate=tmp_path / "ca.pem", **files) as client:
            np.testing.assert_allclose(client.predict(floats, features), data.expected(), rtol=1e-5)
        for options in ({}, {"root_certificate": tmp_path / "ca.pem"}):  # plain text; no certificate of the client's
            with PredictionClient(server.address, timeout_seconds=5, **options) as client:
                with pytest.raises(grpc.RpcError) as refused:
                    client.predict(floats, features)
                assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


def test_serve_command_logs_json_and_obeys_signals(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model.pt")
    options = [str(path), "--port", "0", "--metrics-port", "0"]
    with serve_process(*options) as (process, log):
        serving = event(process, log, "serving")
        data = Rows(3)
        with grpc.insecure_channel(f"127.0.0.1:{serving['port']}") as channel:
            call = channel.unary_unary("/predictor.Predictor/Predict")
            call(data.request().SerializeToString(), timeout=20)
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{serving['metrics_port']}/metrics", timeout=10).read()
        assert b'torchrec_lma_requests_total{code="OK"} 1.0' in metrics
        save_model(path, bias=1, floats=FLOATS[:1])
        process.send_signal(signal.SIGHUP)
        assert event(process, log, "model loaded", 2)["features"] == [1, 3, 0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert [line["event"] for line in log] == [
        "loading",
        "model loaded",
        "serving",
        "model loaded",
        "draining",
        "stopped",
    ]
    assert all({"time", "level"} <= set(line) for line in log)
