"""The command `torchrec-lma serve`. What it runs is imported when it runs, so that its help is there at once."""

import argparse
import asyncio
import logging
from pathlib import Path
from typing import Any


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Serves a TorchScript model with TorchRec's inference contract, such as torchrec-lma export "
        "writes, by TorchRec's gRPC protocol. SIGTERM drains and ends, SIGHUP loads the file again."
    )
    parser.add_argument("model", type=Path, help="TorchScript file. Replace it (by a rename) to exchange the model.")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s).")
    parser.add_argument(
        "--log-level",
        default="info",
        choices=("debug", "info", "warning", "error"),
        help="What is logged on stderr, as JSON lines (default: %(default)s).",
    )
    where = parser.add_argument_group("where it listens")
    where.add_argument("--host", default="127.0.0.1", help="Address; 0.0.0.0 is all of them (default: %(default)s).")
    where.add_argument(
        "--port", type=int, default=50051, help="Port; 0 takes a free one and logs it (default: %(default)s)."
    )
    where.add_argument("--metrics-port", type=int, metavar="PORT", help="Port for Prometheus metrics over HTTP.")
    where.add_argument("--tls-cert", type=Path, metavar="PEM", help="Certificate; with it the server speaks TLS only.")
    where.add_argument("--tls-key", type=Path, metavar="PEM", help="The key of --tls-cert.")
    where.add_argument(
        "--client-ca", type=Path, metavar="PEM", help="Clients must show a certificate that this authority signed."
    )
    _add_load_options(parser.add_argument_group("load (docs/server.md)"))
    parser.set_defaults(run=run_serve)


def _add_load_options(load: Any) -> None:
    load.add_argument(
        "--max-batch",
        type=int,
        default=1024,
        metavar="ROWS",
        help="Rows that are computed together at most (default: %(default)s).",
    )
    load.add_argument(
        "--max-delay-ms",
        type=float,
        default=2.0,
        metavar="MS",
        help="How long a row waits for others at most (default: %(default)s).",
    )
    load.add_argument(
        "--replicas",
        type=int,
        default=1,
        help="How many batches are computed at a time, with the same weights (default: %(default)s).",
    )
    load.add_argument("--threads", type=int, default=1, help="CPU threads that compute a batch (default: %(default)s).")
    load.add_argument(
        "--max-message-mib",
        type=int,
        default=16,
        metavar="MIB",
        help="Size of a request; larger ones are refused (default: %(default)s).",
    )
    load.add_argument(
        "--drain-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="How long requests in flight have at the end (default: %(default)s).",
    )


def run_serve(args: argparse.Namespace) -> None:
    from torchrec_lma.serving.batching import Limits
    from torchrec_lma.serving.metrics import JsonFormatter
    from torchrec_lma.serving.server import serve
    from torchrec_lma.serving.settings import Settings, Tls

    if (args.tls_cert is None) != (args.tls_key is None):
        raise ValueError("--tls-cert and --tls-key go together: give both or neither")
    if args.client_ca is not None and args.tls_cert is None:
        raise ValueError("--client-ca needs --tls-cert and --tls-key")
    for name in ("port", "metrics_port"):
        port = getattr(args, name)
        if port is not None and not 0 <= port < 1 << 16:
            raise ValueError(f"--{name.replace('_', '-')} {port} must be between 0 and 65535")
    for name in ("threads", "max_message_mib"):
        if not 1 <= getattr(args, name) < 2048:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be between 1 and 2047")
    settings = Settings(
        model=args.model,
        host=args.host,
        port=args.port,
        limits=Limits(
            max_rows=args.max_batch,
            max_delay_seconds=args.max_delay_ms / 1000,
            replicas=args.replicas,
        ),
        max_message_bytes=args.max_message_mib << 20,
        device=args.device,
        threads=args.threads,
        drain_seconds=args.drain_seconds,
        metrics_port=args.metrics_port,
        tls=Tls(args.tls_cert, args.tls_key, args.client_ca) if args.tls_cert is not None else None,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=args.log_level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    asyncio.run(serve(settings))
