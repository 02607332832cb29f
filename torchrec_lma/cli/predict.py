"""The command `torchrec-lma predict`."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from torchrec_lma.cli.outputs import check_writable
from torchrec_lma.datasets import RowDataset
from torchrec_lma.files import replacing
from torchrec_lma.options import add_data_options, open_dataset, positive, positive_number

if TYPE_CHECKING:  # an extra
    from torchrec_lma.serving.client import PredictionClient


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
    from torchmetrics.classification import BinaryAUROC

    from torchrec_lma.serving.client import PredictionClient

    if args.out is not None:
        check_writable("--out", args.out)
    dataset = open_dataset(args, needs_label=args.auc)
    auc, rows, positives = BinaryAUROC(), 0, 0
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(
            PredictionClient(args.address, args.id_type, args.timeout_seconds, args.tls_ca, args.tls_cert, args.tls_key)
        )
        out = sys.stdout
        if args.out is not None:
            out = stack.enter_context(stack.enter_context(replacing(args.out)).open("w"))
        for probabilities, labels in _predictions(args, dataset, client):
            out.writelines(f"{probability:.6f}\n" for probability in probabilities)
            rows += len(probabilities)
            if args.auc:
                auc.update(torch.from_numpy(probabilities), labels.int())
                positives += int(labels.sum())
    if args.auc:
        value = f"{auc.compute().item():.6f}"
        if positives in (0, rows):  # torchmetrics says 0
            value = f"is not defined: all labels are {int(positives > 0)}"
        print(f"AUC {value} over {rows:,} rows", file=sys.stderr)


def _predictions(
    args: argparse.Namespace, dataset: RowDataset, client: "PredictionClient"
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Probabilities and labels of the asked rows, batch by batch. Raises ValueError saying which rows went wrong."""
    import grpc

    names = None if args.any_features else dataset.schema.numeric
    strings = [column for column, kind in dataset.id_types.items() if kind == "strings"]
    first = 0
    for batch in dataset.batches(args.rows, batch_size=args.batch_size):
        features = (batch.dense_features, batch.sparse_features)
        try:
            probabilities = client.predict(*features, float_names=names, string_features=strings)
        except grpc.RpcError as error:
            said = f"{args.address}: {error.code().name}: {error.details()}"
            if "features are not those of the model" in said:
                said += f"; here the ids of {', '.join(strings) or 'no column'} are strings, the others integers"
            raise ValueError(said) from error
        except ValueError as error:
            raise ValueError(f"in the batch that starts at row {first}: {error}") from error
        wrong = np.flatnonzero(~np.isfinite(probabilities))
        if wrong.size:
            raise ValueError(
                f"{args.address} answered row {first + wrong[0]} with {probabilities[wrong[0]]}, no number"
            )
        left = None if args.limit is None else args.limit - first
        yield probabilities[:left], batch.labels[:left]
        first += len(probabilities)
        if args.limit is not None and first >= args.limit:
            return
