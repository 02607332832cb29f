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
from torchrec_lma.options import add_data_options, open_dataset, positive

if TYPE_CHECKING:  # an extra
    from torchrec_lma.serving.client import PredictionClient


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "Sends rows to a prediction server and prints their probabilities, each on a line."
    parser.add_argument(
        "--address",
        default="127.0.0.1:50051",
        metavar="HOST:PORT",
        help="Address of the server (default: %(default)s).",
    )
    parser.add_argument(
        "--part",
        choices=("all", "train", "validation", "test"),
        default="all",
        help="The part of the data to score, as --split divides it (default: %(default)s).",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="Score the first N rows of it only.")
    parser.add_argument("--batch-size", type=positive, default=512, help="Rows in a request (default: %(default)s).")
    parser.add_argument("--out", type=Path, metavar="FILE", help="Write the probabilities there instead.")
    parser.add_argument("--auc", action="store_true", help="Compare with the labels, and print the AUC on stderr.")
    parser.add_argument(
        "--id-type",
        choices=("int32", "int64"),
        default="int32",
        help="Type of ids in requests. TorchRec's protocol has int32; int64 is for ids that do not fit, such as hashes "
        "of strings. torchrec-lma's server takes both (default: %(default)s).",
    )
    tls = parser.add_argument_group("TLS")
    tls.add_argument("--tls-ca", type=Path, metavar="PEM", help="What signed the server's certificate; turns TLS on.")
    tls.add_argument("--tls-cert", type=Path, metavar="PEM", help="The certificate of this client.")
    tls.add_argument("--tls-key", type=Path, metavar="PEM", help="The key of --tls-cert.")
    add_data_options(parser)
    parser.set_defaults(run=run_predict)


def run_predict(args: argparse.Namespace) -> None:
    from torchmetrics.classification import BinaryAUROC

    from torchrec_lma.serving.client import PredictionClient

    if args.out is not None:
        check_writable("--out", args.out)
    dataset = open_dataset(args, needs_label=args.auc)
    auc, rows, positives = BinaryAUROC(), 0, 0
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(
            PredictionClient(
                args.address, args.id_type, root_certificate=args.tls_ca, certificate=args.tls_cert, key=args.tls_key
            )
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

    names = dataset.schema.numeric
    strings = [column for column, id_type in dataset.id_types.items() if id_type == "strings"]
    first = 0
    for batch in dataset.batches(args.part, batch_size=args.batch_size):
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
