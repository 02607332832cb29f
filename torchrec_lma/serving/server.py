"""The prediction server: TorchRec's `predictor.Predictor` service over gRPC, for a TorchScript model file.

A request's way: bytes -> message -> `Contract.read` checks it -> `Batcher` puts it together with others ->
`Model.predict` in a thread -> its rows of the batch's predictions. A bad request ends at the check.
"""

import asyncio
import ipaddress
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import torch
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from torchrec_lma.serving.batching import Batcher, Limits, QueueFull, Stopped
from torchrec_lma.serving.contract import FEATURES_KEY, ID_TYPE_KEY, Inputs
from torchrec_lma.serving.metrics import Metrics
from torchrec_lma.serving.model_store import Model, ModelStore
from torchrec_lma.serving.protos.predictor_pb2 import DESCRIPTOR, FloatVec, PredictionRequest, PredictionResponse

SEND_SECONDS = 2.0  # at the end, for answers on their way, for requests being received, and for the last batch
QUIET_SECONDS = 0.05  # without a new request, at the end, before the connections are closed
MAX_STATUS_CHARACTERS = 1000  # clients refuse long ones, and then see another status
STOPPING = "the server is stopping: try another"
SERVICE = DESCRIPTOR.services_by_name["Predictor"].full_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tls:
    """PEM files. With `client_ca`, clients must show a certificate that it signed (mTLS)."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.ssl_server_credentials(
            [(self.key.read_bytes(), self.certificate.read_bytes())],
            root_certificates=self.client_ca.read_bytes() if self.client_ca is not None else None,
            require_client_auth=self.client_ca is not None,
        )


@dataclass(frozen=True)
class Settings:
    """
    Args:
        model: TorchScript file.
        host, port: to listen on; port 0 takes a free one, which the log tells.
        counts: of float, id-list and id-score-list features, for a model that does not say.
        limits: of the batching.
        max_message_bytes: a larger request is refused with RESOURCE_EXHAUSTED.
        device: where to compute.
        threads: that one batch is computed with, on the CPU.
        watch_seconds: how often to look for a new model file; 0 never, SIGHUP still loads it.
        drain_seconds: how long requests in flight may take after SIGTERM; what is computed then is left behind.
        metrics_port: of Prometheus metrics on the same host; None for none.
        tls: None for plain text.
    """

    model: Path
    host: str = "127.0.0.1"
    port: int = 50051
    counts: Sequence[int] | None = None
    limits: Limits = field(default_factory=Limits)
    max_message_bytes: int = 16 << 20
    device: str = "cpu"
    threads: int = 1
    watch_seconds: float = 1.0
    drain_seconds: float = 30.0
    metrics_port: int | None = None
    tls: Tls | None = None

    def __post_init__(self) -> None:
        for name, least in (("watch_seconds", 0), ("drain_seconds", 0), ("threads", 1), ("max_message_bytes", 1)):
            if not getattr(self, name) >= least:  # NaN too
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


@dataclass(frozen=True)
class _Request:
    """What waits in the queue: checked inputs, the model whose contract they fit, and the size of the message."""

    inputs: Inputs
    model: Model
    nbytes: int

    @property
    def rows(self) -> int:
        return self.inputs.rows

    @property
    def ids(self) -> int:
        return self.inputs.ids


@dataclass
class _Outcome:
    code: grpc.StatusCode = grpc.StatusCode.CANCELLED


class _Refused(Exception):
    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class PredictionServer:
    """Serves one model file until it is stopped.

    Args:
        settings: see `Settings`.

    Raises:
        ValueError, OSError: the model, or a TLS file, cannot be used.

    Example::

        server = PredictionServer(Settings(Path("model.pt"), port=0))
        await server.start()
        print(server.port)
        await server.stop()
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.port = 0
        torch.set_num_threads(settings.threads)
        started = time.monotonic()
        self.models = ModelStore(
            settings.model, settings.counts, _usable_device(settings.device), settings.limits.max_rows
        )
        self._loaded(started)
        self._batcher = Batcher(self._compute, settings.limits)
        self.metrics.queue.set_function(lambda: len(self._batcher))
        self._health = health.aio.HealthServicer()
        self._in_flight = 0
        self._arrived = 0
        self._stopping = False
        self._server: grpc.aio.Server | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._metrics_server: Any = None

    async def start(self) -> None:
        """Listens; returns when requests can come.

        Raises:
            OSError: a port cannot be had, or a TLS file cannot be read.
        """
        settings = self.settings
        self._server = server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a second server on the port is a mistake, not a helper
            ]
        )
        # Without a deserializer gRPC hands over the bytes: what is no message is then the client's error, not ours.
        predict = grpc.unary_unary_rpc_method_handler(
            self._predict, response_serializer=PredictionResponse.SerializeToString
        )
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"Predict": predict})])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection([SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        address = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
        try:
            if settings.tls is not None:
                self.port = server.add_secure_port(address, settings.tls.credentials())
            else:
                self.port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}, is the port taken or a TLS file no PEM? ({error})") from error
        if settings.metrics_port is not None:
            self._metrics_server = start_http_server(settings.metrics_port, settings.host, self.metrics.registry)
        self._batcher.start()
        await server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        if settings.watch_seconds:
            self._watcher = asyncio.create_task(self._watch())
        fields = {"host": settings.host, "port": self.port, "tls": settings.tls is not None, "pid": os.getpid()}
        if self._metrics_server is not None:
            fields["metrics_port"] = self._metrics_server[0].server_port
        log.info("serving", extra={"fields": fields})
        if settings.tls is None and not _is_loopback(settings.host):
            log.warning("listening beyond this machine without TLS")

    async def stop(self) -> bool:
        """Refuses new requests, waits for those in flight (up to `drain_seconds`), and ends.

        Returns:
            False if a batch is still being computed: its thread goes on, and would keep the process from ending.
        """
        assert self._server is not None, "start() first"
        log.info("draining", extra={"fields": {"seconds": self.settings.drain_seconds}})
        end = time.monotonic() + self.settings.drain_seconds
        self._stopping = True
        await self._health.enter_graceful_shutdown()  # balancers stop sending
        if self._watcher is not None:
            self._watcher.cancel()
        while self._in_flight and time.monotonic() < end:
            await asyncio.sleep(0.02)
        await self._refuse_what_arrives()
        # Health watches never end by themselves: their streams are not waited for any longer.
        await self._server.stop(SEND_SECONDS if time.monotonic() < end else None)
        finished = True
        try:
            await asyncio.wait_for(self._batcher.stop(), max(SEND_SECONDS, end - time.monotonic()))
        except TimeoutError:
            finished = False
            log.error("a batch is still being computed, it is left behind")
        if self._metrics_server is not None:
            http_server, thread = self._metrics_server
            await asyncio.to_thread(http_server.shutdown)
            http_server.server_close()
            thread.join()
        log.info("stopped")
        return finished

    async def _refuse_what_arrives(self) -> None:
        """Until nothing has come for a while: gRPC cancels what it has received and not handed over when it stops.

        Clients do not try a cancelled request again; what is refused as UNAVAILABLE they may send to another server.
        """
        end = time.monotonic() + SEND_SECONDS
        before = -1
        while before != self._arrived and time.monotonic() < end:
            before = self._arrived
            await asyncio.sleep(QUIET_SECONDS)

    async def reload(self) -> bool:
        """Exchanges the model for what its file now holds. If that is no good, the old one stays: False."""
        started = time.monotonic()
        try:
            await asyncio.to_thread(self.models.load)
        except Exception as error:  # whatever is wrong with the file, the model in use is not
            self.metrics.loads.labels("failed").inc()
            log.error("model refused, the old one stays", extra={"fields": {"error": str(error)}})
            return False
        self._loaded(started)
        return True

    def _loaded(self, started: float) -> None:
        model = self.models.current
        self.metrics.loads.labels("ok").inc()
        self.metrics.loaded.set_to_current_time()
        fields = {
            "path": str(model.path),
            "bytes": model.stamp.size,
            "seconds": round(time.monotonic() - started, 3),
            "features": model.contract.counts,
            "dtype": model.contract.dtype,
            "allocation_fingerprint": model.contract.allocation_fingerprint,
        }
        log.info("model loaded", extra={"fields": fields})

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.settings.watch_seconds)
            if self.models.has_changed():
                await self.reload()

    async def _set_health(self, status: int) -> None:
        for service in ("", SERVICE):
            await self._health.set(service, status)

    async def _predict(self, data: bytes, context: grpc.aio.ServicerContext) -> PredictionResponse:
        with self._counting() as outcome:
            try:
                response = await self._answer(data, dict(context.invocation_metadata() or ()))
                outcome.code = grpc.StatusCode.OK
                return response
            except _Refused as refused:
                outcome.code, message = refused.code, str(refused)
            # gRPC keeps the exception that this raises, and so this frame, in a reference cycle. Here, outside `except`
            # and with the request in another frame, that does not hold on to the model when it is exchanged.
            await context.abort(outcome.code, _shortened(message))
            raise AssertionError("abort raises")

    async def _answer(self, data: bytes, metadata: dict[str, str | bytes]) -> PredictionResponse:
        if self._stopping:
            raise _Refused(grpc.StatusCode.UNAVAILABLE, STOPPING)
        request = self._read(data, metadata)
        predictions = await self._submit(request)
        self.metrics.rows.inc(request.rows)
        return PredictionResponse(
            predictions={task: FloatVec(data=values.tolist()) for task, values in predictions.items()}
        )

    @contextmanager
    def _counting(self) -> Iterator[_Outcome]:
        """Counts a request by how it ended; if nothing is said, it was cancelled: its client left or its time is up."""
        outcome = _Outcome()
        started = time.monotonic()
        self._arrived += 1
        self._in_flight += 1
        try:
            yield outcome
        finally:
            self._in_flight -= 1
            self.metrics.requests.labels(outcome.code.name).inc()
            self.metrics.request_seconds.observe(time.monotonic() - started)

    def _read(self, data: bytes, metadata: dict[str, str | bytes]) -> _Request:
        model = self.models.current
        try:
            features = metadata.get(FEATURES_KEY)
            if features is not None and model.contract.named and features != model.contract.fingerprint:
                raise ValueError(
                    "the client's features are not those of the model, or in another order. The model takes "
                    f"float_features {list(model.contract.float_features)}, "
                    f"id_list_features {list(model.contract.id_list_features)}, "
                    f"id_score_list_features {list(model.contract.id_score_list_features)}"
                )
            message = PredictionRequest.FromString(data)
            inputs = model.contract.read(message, str(metadata.get(ID_TYPE_KEY, "int32")))
            limits = self.settings.limits
            for number, what, most, option in (
                (inputs.rows, "rows", limits.max_request_rows, "--max-request-rows"),
                (inputs.ids, "ids", limits.max_ids, "--max-ids"),
            ):
                if number > most:
                    raise ValueError(
                        f"the request has {number} {what}, more than {most} ({option}): send its rows in several "
                        "requests"
                    )
            return _Request(inputs, model, len(data))
        except DecodeError as error:
            raise _Refused(
                grpc.StatusCode.INVALID_ARGUMENT, f"{len(data)} bytes that are no predictor.PredictionRequest ({error})"
            ) from error
        except ValueError as error:
            raise _Refused(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error

    async def _submit(self, request: _Request) -> dict[str, Any]:
        try:
            return await self._batcher.submit(request)
        except QueueFull as full:
            raise _Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{full}: try again later, or add servers") from None
        except Stopped:
            raise _Refused(grpc.StatusCode.UNAVAILABLE, STOPPING) from None
        except Exception as error:
            log.exception("the model failed on a request", extra={"fields": {"rows": request.rows}})
            cause = str(error).strip().split("\n")[-1]
            raise _Refused(grpc.StatusCode.INTERNAL, f"the model failed on this request: {cause}") from error

    def _compute(self, requests: Sequence[_Request]) -> Sequence[dict[str, Any]]:
        self.metrics.batch_rows.observe(sum(request.rows for request in requests))
        with self.metrics.compute_seconds.time():
            return requests[0].model.predict([request.inputs for request in requests])


def _usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either where there is no CUDA
        cause = str(error).strip().split("\n")[0]
        raise ValueError(
            f"device {name!r} cannot be used ({cause}): choose cpu, or cuda where there is a GPU"
        ) from error
    return device


def _shortened(message: str) -> str:
    return message if len(message) <= MAX_STATUS_CHARACTERS else f"{message[:MAX_STATUS_CHARACTERS]}..."


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT; SIGHUP loads the model file again."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # while the model is being loaded, it would end the process
    server = PredictionServer(settings)
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for end in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(end, ended.set)
    reloads: set[asyncio.Task[bool]] = set()  # a task that nothing refers to may be collected

    def reload() -> None:
        task = loop.create_task(server.reload())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)
    await server.start()
    await ended.wait()
    if not await server.stop():
        logging.shutdown()
        os._exit(1)  # Python would wait for the thread
