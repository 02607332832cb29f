"""What the server counts, for Prometheus, and its log: one JSON object a line."""

import json
import logging
import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
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
        self.loads = Counter("model_loads", "Models loaded, and refused (ok, failed)", ["result"], **prefix)
        self.loaded = Gauge("model_loaded_timestamp_seconds", "When the current model was loaded", **prefix)
        for result in ("ok", "failed"):
            self.loads.labels(result)  # present from the start, so that a rate over it is defined


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
