"""The prediction server: TorchRec's `predictor.Predictor` service over gRPC, for a TorchScript model file.

A request's way (`service.py`): `Arrivals` receives its bytes -> `Contract.read` checks the message -> `Batcher` puts it
together with others -> `Model.predict` in a thread -> its rows of the batch's predictions. A bad request ends at the
check.
"""

import asyncio
import faulthandler
import ipaddress
import logging
import os
import signal
import time
from collections.abc import Coroutine
from typing import Any, NoReturn

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from torchrec_lma.serving.connections import hang_up
from torchrec_lma.serving.loading import seconds_to_load
from torchrec_lma.serving.metrics import Metrics, MetricsServer
from torchrec_lma.serving.model import Stamp
from torchrec_lma.serving.model_store import ModelStore
from torchrec_lma.serving.service import SERVICE, PredictionService
from torchrec_lma.serving.settings import Settings

SEND_SECONDS = 2.0  # at the end, for refusals, and for the batch that is being computed when the time is up

log = logging.getLogger(__name__)


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
        self._service = PredictionService(settings, self.models, self.metrics)
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()  # that look for models and load them
        self._metrics_server: MetricsServer | None = None

    async def start(self) -> None:
        """Listens; returns when requests can come.

        Raises:
            OSError: a port cannot be had, or a TLS file cannot be read.
        """
        settings = self.settings
        self._server = server = grpc.aio.server(options=settings.grpc_options, interceptors=[self._service.arrivals])
        server.add_generic_rpc_handlers([self._service.handler])
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
            self._metrics_server = MetricsServer(settings.host, settings.metrics_port, self.metrics)
        self._service.batcher.start()
        await server.start()
        for service in ("", SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        if settings.watch_seconds:
            self._run(self._watch())
        fields = {"host": settings.host, "port": self.port, "tls": settings.tls is not None, "pid": os.getpid()}
        if self._metrics_server is not None:
            fields["metrics_port"] = self._metrics_server.port
        log.info("serving", extra={"fields": fields})
        if settings.tls is None and not _is_loopback(settings.host):
            log.warning("listening beyond this machine without TLS")

    async def stop(self) -> bool:
        """Refuses new requests, waits for those in flight (up to `drain_seconds`), and ends.

        Returns:
            False if a batch is still being computed: its thread runs on, and would keep the process from ending.
        """
        assert self._server is not None, "start() first"
        log.info("draining", extra={"fields": {"seconds": self.settings.drain_seconds}})
        end = time.monotonic() + self.settings.drain_seconds
        self._service.refuse_new()
        await self._health.enter_graceful_shutdown()  # balancers stop sending
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while self._service.in_flight and time.monotonic() < end:
            await asyncio.sleep(0.02)
        finished = True
        try:
            await asyncio.wait_for(self._service.batcher.stop(), max(SEND_SECONDS, end - time.monotonic()))
        except TimeoutError:
            finished = False
            log.error("a batch is still being computed, it is left behind")
        hang_up(self.port)
        await self._server.stop(None)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.stop)
        log.info("stopped")
        return finished

    async def reload(self) -> bool:
        """Exchanges the model for what its file now holds. If that does not load or run, the old one stays: False."""
        started = time.monotonic()
        try:
            await self.models.load()
        except Exception as error:  # whatever is wrong with the file, the model in use is not
            self.metrics.loads.labels("failed").inc()
            log.error("model refused, the old one stays", extra={"fields": {"error": str(error)}})
            return False
        self._loaded(started)
        return True

    def start_reload(self) -> None:
        """Begins a `reload`, which ends with the server at the latest."""
        self._run(self.reload())

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

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)  # a task that nothing refers to may be collected
        task.add_done_callback(self._tasks.discard)


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


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def serve(settings: Settings) -> NoReturn:
    """Serves until SIGTERM or SIGINT, and then ends the process; SIGHUP loads the model file again."""
    server = _load_first(settings)
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for end in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(end, ended.set)
    loop.add_signal_handler(signal.SIGHUP, server.start_reload)
    await server.start()
    await ended.wait()
    finished = await server.stop()
    logging.shutdown()
    os._exit(0 if finished else 1)  # Python would wait for the thread of a batch, or of a model that does not load


def _load_first(settings: Settings) -> PredictionServer:
    """A file that does not load keeps nobody waiting yet: signals, and the time limit, end the process at once."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it would end the process too
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would wait for the model
    seconds = seconds_to_load(Stamp.of(settings.model).check(settings.model).size)
    log.info("loading", extra={"fields": {"path": str(settings.model), "seconds_at_most": round(seconds)}})
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)  # stderr, whatever Python calls so
    try:
        return PredictionServer(settings)
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGINT, interrupt)
