"""What a server is set to, and the bounds that it keeps whatever it is set to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from torchrec_lma.serving.batching import Limits

ARRIVING_BYTES = 256 << 20  # of messages that are still arriving, of all connections together
MAX_CONNECTIONS = 800  # below the 1,024 files that many systems let a process open
MAX_PENDING = 1 << 15  # streams that gRPC holds for the event loop; those beyond are cancelled, so it is out of reach
PENDING_SECONDS = 3600  # that gRPC holds one; its client has given up long before
SPARE_STREAMS = 128  # of a connection, beyond the queue: so that a single client, too, sees when the queue is full
IDLE_MS = 600_000  # after which a connection without requests is closed; clients open another when they need it
HANDSHAKE_MS = 10_000


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

    @property
    def messages_at_once(self) -> int:
        """That may be received at the same time, so that they take no more than ARRIVING_BYTES."""
        return max(1, ARRIVING_BYTES // self.max_message_bytes)

    @property
    def grpc_options(self) -> list[tuple[str, int]]:
        streams = self.limits.max_queue + SPARE_STREAMS
        return [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # a second server on the port is a mistake, not a helper
            ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
            ("grpc.max_concurrent_streams", streams),
            # Beside the open ones: streams that the client has ended, or reset, and the server has not let go of yet.
            ("grpc.http2.max_deallocating_streams", streams),
            # By default gRPC cancels a share of what it holds beyond 1,000 streams, and what it held for 30 seconds.
            ("grpc.server.max_pending_requests", MAX_PENDING),
            ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING),
            ("grpc.server_max_unrequested_time_in_server", PENDING_SECONDS),
            ("grpc.max_connection_idle_ms", IDLE_MS),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
            ("grpc.http2.bdp_probe", 0),  # else the part of a message that comes before it is read grows beyond 64 KiB
        ]
