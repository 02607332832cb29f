"""The command `torchrec-lma serve`. What it runs is imported when it runs, so that its help is there at once."""

import argparse
import asyncio
import logging
from pathlib import Path

COUNT_OPTIONS = ("num_float_features", "num_id_list_features", "num_id_score_list_features")


def add_serve(commands: argparse._SubParsersAction) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a model over gRPC",
        description="Serves a TorchScript model with TorchRec's inference contract, such as torchrec-lma export "
        "writes, by TorchRec's gRPC protocol. SIGTERM drains and ends, SIGHUP loads the file again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    serve.add_argument("model", type=Path, help="TorchScript file; replace it (by a rename) to exchange the model")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    serve.add_argument("--port", type=int, default=50051, help="0 takes a free one and logs it")
    serve.add_argument("--metrics-port", type=int, metavar="PORT", help="of Prometheus metrics over HTTP")
    serve.add_argument("--max-batch", type=int, default=1024, metavar="ROWS", help="rows computed together at most")
    serve.add_argument(
        "--max-ids", type=int, default=1 << 20, metavar="IDS", help="of a batch; requests with more are refused"
    )
    serve.add_argument(
        "--max-request-rows", type=int, default=1 << 14, metavar="ROWS", help="of a request; larger ones are refused"
    )
    serve.add_argument("--max-delay-ms", type=float, default=2.0, metavar="MS", help="that a row waits for others")
    serve.add_argument(
        "--queue", type=int, default=1024, metavar="REQUESTS", help="that may wait before more are refused"
    )
    serve.add_argument("--queue-mib", type=int, default=1024, metavar="MIB", help="of requests that may wait together")
    serve.add_argument("--replicas", type=int, default=1, help="batches computed at once; they share the weights")
    serve.add_argument("--threads", type=int, default=1, help="CPU threads that compute one batch")
    serve.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    serve.add_argument("--max-message-mib", type=int, default=16, metavar="MIB", help="larger requests are refused")
    serve.add_argument(
        "--watch-seconds", type=float, default=1.0, metavar="S", help="how often to look for a new file; 0 never"
    )
    serve.add_argument(
        "--drain-seconds", type=float, default=30.0, metavar="S", help="for requests in flight at the end"
    )
    serve.add_argument("--tls-cert", type=Path, metavar="PEM", help="certificate; with it the server speaks TLS only")
    serve.add_argument("--tls-key", type=Path, metavar="PEM", help="key of --tls-cert")
    serve.add_argument("--client-ca", type=Path, metavar="PEM", help="clients must show a certificate that this signed")
    for option in COUNT_OPTIONS:
        serve.add_argument(
            f"--{option.replace('_', '-')}", type=int, metavar="N", help="for a model file that does not say"
        )
    serve.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"), help="on stderr")
    serve.set_defaults(run=run_serve)


def run_serve(args: argparse.Namespace) -> None:
    from torchrec_lma.serving.batching import Limits
    from torchrec_lma.serving.metrics import JsonFormatter
    from torchrec_lma.serving.server import Settings, Tls, serve

    counts = [getattr(args, option) for option in COUNT_OPTIONS]
    for option, count in zip(COUNT_OPTIONS, counts):
        if count is not None and count < 0:
            raise ValueError(f"--{option.replace('_', '-')} {count} must be at least 0")
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
        counts=None if counts == [None] * 3 else [count or 0 for count in counts],
        limits=Limits(
            max_rows=args.max_batch,
            max_delay_seconds=args.max_delay_ms / 1000,
            max_queue=args.queue,
            replicas=args.replicas,
            max_ids=args.max_ids,
            max_request_rows=args.max_request_rows,
            max_queue_bytes=args.queue_mib << 20,
        ),
        max_message_bytes=args.max_message_mib << 20,
        device=args.device,
        threads=args.threads,
        watch_seconds=args.watch_seconds,
        drain_seconds=args.drain_seconds,
        metrics_port=args.metrics_port,
        tls=Tls(args.tls_cert, args.tls_key, args.client_ca) if args.tls_cert is not None else None,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=args.log_level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    asyncio.run(serve(settings))
