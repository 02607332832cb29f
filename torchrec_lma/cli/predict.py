"""The command `torchrec-lma predict`."""

import argparse
import contextlib
import sys
from pathlib import Path

import numpy as np
import torch

from torchrec_lma.cli.outputs import check_writable
from torchrec_lma.files import replacing
from torchrec_lma.options import add_data_options, open_dataset, positive, positive_number


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
    predict.add_argument("--limit", type=positive, metavar="N", help="only the first N of them")
    predict.add_argument("--batch-size", type=positive, default=512, help="rows of a request (default: %(default)s)")
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
    predict.add_argument(
        "--timeout-seconds", type=positive_number, default=10.0, metavar="S", help="default: %(default)s"
    )
    predict.add_argument("--tls-ca", type=Path, metavar="PEM", help="what signed the server's certificate; means TLS")
    predict.add_argument("--tls-cert", type=Path, metavar="PEM", help="this client's certificate")
    predict.add_argument("--tls-key", type=Path, metavar="PEM", help="key of --tls-cert")
    add_data_options(predict)
    predict.set_defaults(run=run_predict)


def run_predict(args: argparse.Namespace) -> None:
    import grpc
    from torchmetrics.classification import BinaryAUROC

    from torchrec_lma.serving.client import PredictionClient

    if args.out is not None:
        check_writable("--out", args.out)
    dataset = open_dataset(args, needs_label=args.auc)
    names = None if args.any_features else dataset.schema.numeric
    auc, left = BinaryAUROC(), args.limit
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(
            PredictionClient(args.address, args.id_type, args.timeout_seconds, args.tls_ca, args.tls_cert, args.tls_key)
        )
        out = sys.stdout
        if args.out is not None:
            out = stack.enter_context(stack.enter_context(replacing(args.out)).open("w"))
        first = positives = 0
        for batch in dataset.batches(args.rows, batch_size=args.batch_size):
            try:
                probabilities = client.predict(batch.dense_features, batch.sparse_features, float_names=names)
            except grpc.RpcError as error:
                raise ValueError(f"{args.address}: {error.code().name}: {error.details()}") from error
            except ValueError as error:
                raise ValueError(f"in the batch that starts at row {first}: {error}") from error
            probabilities = probabilities[:left]
            if not np.isfinite(probabilities).all():
                row = first + int(np.flatnonzero(~np.isfinite(probabilities))[0])
                raise ValueError(f"{args.address} answered row {row} with a NaN or infinity: its model has diverged")
            out.writelines(f"{probability:.6f}\n" for probability in probabilities)
            if args.auc:
                labels = batch.labels[: len(probabilities)].int()
                auc.update(torch.from_numpy(probabilities), labels)
                positives += int(labels.sum())
            first += len(probabilities)
            if left is not None:
                left -= len(probabilities)
                if not left:
                    break
    if args.auc:
        value = f"{auc.compute().item():.6f}"
        if positives in (0, first):  # torchmetrics says 0
            value = f"is not defined: all labels are {int(positives > 0)}"
        print(f"AUC {value} over {first:,} rows", file=sys.stderr)
