"""The commands `torchrec-lma export`, `torchrec-lma serve` and `torchrec-lma predict`.

The modules of the last two need the `serve` extra, so they are imported when a command runs: the others do without it.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch

from torchrec_lma.allocation import Allocation
from torchrec_lma.inference.export import TOLERANCES, export, load_factory
from torchrec_lma.inference.rows import DTYPES
from torchrec_lma.options import add_data_options, open_dataset

COUNT_OPTIONS = ("num_float_features", "num_id_list_features", "num_id_score_list_features")


def add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export",
        help="make a quantized TorchScript model of a checkpoint",
        description="Quantizes the tables of a trained model and writes it as TorchScript for TorchRec's inference "
        "contract. The file is checked on real rows in a new process before it gets its name.",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="given to the factory")
    parser.add_argument(
        "--model",
        required=True,
        metavar="FACTORY",
        help="module:function or file.py:function that makes a torchrec_lma.inference.ServableModel of the checkpoint, "
        "such as examples/dlrm/serving.py:dlrm",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the model")
    parser.add_argument("--dtype", choices=DTYPES, default="int8", help="of the tables (default: %(default)s)")
    parser.add_argument("--allocation", type=Path, metavar="FILE", help="where the checkpoint does not hold its own")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="DIFFERENCE",
        help=f"of probabilities from the float model's (default: by dtype, {TOLERANCES})",
    )
    parser.add_argument(
        "--aot", type=Path, metavar="FILE", help="an AOTInductor package (.pt2) as well, compiled for this processor"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="that the model is for (default: %(default)s)"
    )
    parser.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> None:
    factory = load_factory(args.model)
    if not args.checkpoint.is_dir():
        raise FileNotFoundError(f"--checkpoint {args.checkpoint} is not a folder")
    allocation = Allocation.load(args.allocation) if args.allocation is not None else None
    exported = export(factory(args.checkpoint, allocation), args.out, args.dtype, args.tolerance, args.aot, args.device)
    for memory, nbytes in exported.row_bytes.items():
        finer = exported.finer_dtypes[memory]
        hint = f"; {finer[0]} is more exact and takes no more" if finer else ""
        print(f"{memory}: {nbytes} bytes a row in {args.dtype}{hint}")
    print(
        f"checked on {exported.rows:,} rows: equal to the quantized model in a new process, probabilities within "
        f"{exported.difference:.2g} of the float model's (tolerance {exported.tolerance})"
    )
    print(f"{exported.path}: {exported.nbytes:,} bytes")


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
    from torchrec_lma.inference.batching import Limits
    from torchrec_lma.inference.metrics import JsonFormatter
    from torchrec_lma.inference.server import Settings, Tls, serve

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


def add_predict(commands: argparse._SubParsersAction) -> None:
    predict = commands.add_parser(
        "predict",
        help="score the rows of a file with a server",
        description="Sends rows to a prediction server and prints their probabilities, one a line.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    predict.add_argument("--address", default="127.0.0.1:50051", metavar="HOST:PORT", help="default: %(default)s")
    predict.add_argument(
        "--rows",
        choices=("all", "train", "validation", "test"),
        default="all",
        help="which rows (default: %(default)s)",
    )
    predict.add_argument("--limit", type=int, metavar="N", help="only the first N of them")
    predict.add_argument("--batch-size", type=int, default=512, help="rows of a request (default: %(default)s)")
    predict.add_argument("--out", type=Path, metavar="FILE", help="write the probabilities there instead of printing")
    predict.add_argument("--auc", action="store_true", help="compare with the labels; printed on stderr")
    predict.add_argument(
        "--id-type",
        choices=("int32", "int64"),
        default="int32",
        help="int32 is the protocol's; int64 for ids that do not fit, such as hashes of strings; torchrec-lma's server "
        "takes both (default: %(default)s)",
    )
    predict.add_argument("--any-features", action="store_true", help="do not compare feature names with the model's")
    predict.add_argument("--timeout-seconds", type=float, default=10.0, metavar="S", help="default: %(default)s")
    predict.add_argument("--tls-ca", type=Path, metavar="PEM", help="what signed the server's certificate; means TLS")
    predict.add_argument("--tls-cert", type=Path, metavar="PEM", help="this client's certificate")
    predict.add_argument("--tls-key", type=Path, metavar="PEM", help="key of --tls-cert")
    add_data_options(predict)
    predict.set_defaults(run=run_predict)


def run_predict(args: argparse.Namespace) -> None:
    import grpc
    from torchmetrics.classification import BinaryAUROC

    from torchrec_lma.inference.client import PredictionClient

    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit} must be at least 1")
    dataset = open_dataset(args, needs_label=args.auc)
    names = None if args.any_features else dataset.schema.numeric
    auc, left = BinaryAUROC(), args.limit
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(
            PredictionClient(args.address, args.id_type, args.timeout_seconds, args.tls_ca, args.tls_cert, args.tls_key)
        )
        out = stack.enter_context(_replacing(args.out)) if args.out is not None else sys.stdout
        first = 0
        for batch in dataset.batches(args.rows, batch_size=args.batch_size):
            try:
                probabilities = client.predict(batch.dense_features, batch.sparse_features, float_names=names)
            except grpc.RpcError as error:
                raise ValueError(f"{args.address}: {error.code().name}: {error.details()}") from error
            except ValueError as error:
                raise ValueError(f"in the batch that starts at row {first}: {error}") from error
            probabilities = probabilities[:left]
            out.writelines(f"{probability:.6f}\n" for probability in probabilities)
            if args.auc:
                auc.update(torch.from_numpy(probabilities), batch.labels[: len(probabilities)].int())
            first += len(probabilities)
            if left is not None:
                left -= len(probabilities)
                if not left:
                    break
    if args.auc:
        print(f"AUC {auc.compute().item():.6f} over {first:,} rows", file=sys.stderr)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """A text file that takes the name `path` when it is complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
