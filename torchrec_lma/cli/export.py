"""The command `torchrec-lma export`."""

import argparse
from pathlib import Path

from torchrec_lma.allocation import Allocation
from torchrec_lma.cli.outputs import check_writable
from torchrec_lma.options import positive_number
from torchrec_lma.quant.export import DEVICES, TOLERANCES, CheckFailed, export, load_factory
from torchrec_lma.quant.transforms import DTYPES


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
        help="module:function or file.py:function that makes a torchrec_lma.quant.ServableModel of the checkpoint, "
        "such as examples/dlrm/serving.py:dlrm",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the model")
    parser.add_argument("--dtype", choices=DTYPES, default="int8", help="of the tables (default: %(default)s)")
    parser.add_argument("--allocation", type=Path, metavar="FILE", help="where the checkpoint does not hold its own")
    parser.add_argument(
        "--tolerance",
        type=positive_number,
        metavar="DIFFERENCE",
        help=f"of probabilities from the float model's (default: by dtype, {TOLERANCES})",
    )
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="that the model is for (default: %(default)s)")
    parser.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> None:
    check_writable("--out", args.out)
    factory = load_factory(args.model)
    if not args.checkpoint.is_dir():
        raise FileNotFoundError(f"--checkpoint {args.checkpoint} is not a folder")
    allocation = Allocation.load(args.allocation) if args.allocation is not None else None
    try:
        exported = export(factory(args.checkpoint, allocation), args.out, args.dtype, args.tolerance, args.device)
    except CheckFailed as error:
        raise ValueError(str(error)) from error
    print(
        f"checked on {exported.rows:,} rows: equal to the quantized model in a new process, probabilities within "
        f"{exported.difference:.2g} of the float model's (tolerance {exported.tolerance})"
    )
    print(f"{exported.path}: {exported.nbytes:,} bytes")
