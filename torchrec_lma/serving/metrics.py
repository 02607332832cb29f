"""What the server counts, for Prometheus, and its log: one JSON object a line."""

import json
import logging
import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
BACKLOG = 128  # connections to the metrics port that wait to be accepted
SCRAPE_SECONDS = 10.0  # for a client of the metrics port to send its request
ROWS = tuple(float(1 << power) for power in range(0, 17, 2))


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        prefix: dict[str, Any] = {"namespace": "torchrec_lma", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered, by gRPC status", ["code"], **prefix)
        self.rows = Counter("rows", "Rows predicted", **prefix)
        self.request_seconds = Histogram(
            "request_seconds", "From a request's arrival to its answer", buckets=SECONDS, **prefix
        )
        self.compute_seconds = Histogram("compute_seconds", "Computing a batch", buckets=SECONDS, **prefix)
        self.batch_rows = Histogram("batch_rows", "Rows of a batch", buckets=ROWS, **prefix)
        self.queue = Gauge("queue_requests", "Requests that wait for a batch", **prefix)
        self.arriving = Gauge("arriving_requests", "Requests whose message is still to arrive", **prefix)
        self.loads = Counter("model_loads", "Models loaded, and refused (ok, failed)", ["result"], **prefix)
        self.loaded = Gauge("model_loaded_timestamp_seconds", "When the current model was loaded", **prefix)
        for result in ("ok", "failed"):
            self.loads.labels(result)  # present from the start, so that a rate over it is defined


class MetricsServer:
    """Serves metrics over HTTP, in threads of its own.

    Args:
        host, port: to listen on; port 0 takes a free one.

    Raises:
        OSError: the port cannot be had.
    """

    def __init__(self, host: str, port: int, metrics: Metrics) -> None:
        self._server, self._thread = start_http_server(port, host, metrics.registry)
        self._server.socket.listen(BACKLOG)  # not socketserver's 5, beyond which clients wait a second and more
        handler: Any = self._server.RequestHandlerClass
        # A client that sends nothing would keep its thread for ever.
        self._server.RequestHandlerClass = type(handler.__name__, (handler,), {"timeout": SCRAPE_SECONDS})
        self.port: int = self._server.server_port

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time (UTC), level, event, and what `extra={"fields": {...}}` adds."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
