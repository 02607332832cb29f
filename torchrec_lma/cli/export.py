"""The command `torchrec-lma export`."""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

from torchrec_lma.allocation import Allocation
from torchrec_lma.cli.outputs import check_writable
from torchrec_lma.options import positive_number
from torchrec_lma.quant.export import DEVICES, TOLERANCES, CheckFailed, ServableModel, export
from torchrec_lma.quant.transforms import DTYPES

# A checkpoint and, where it does not hold its own, the allocation.
Factory = Callable[[Path, Allocation | None], ServableModel]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Quantizes the tables of a trained model and writes it as TorchScript for TorchRec's inference "
        "contract. The file is checked on real rows in a new process before it gets its name."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="What is given to the factory.")
    parser.add_argument(
        "--model",
        required=True,
        metavar="FACTORY",
        help="A module:function or file.py:function that makes a torchrec_lma.quant.ServableModel of the checkpoint, "
        "such as examples/dlrm/serving.py:dlrm.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="Where to write the model.")
    parser.add_argument("--dtype", choices=DTYPES, default="int8", help="Type of the tables (default: %(default)s).")
    parser.add_argument("--allocation", type=Path, metavar="FILE", help="Allocation of a checkpoint without one.")
    parser.add_argument(
        "--tolerance",
        type=positive_number,
        metavar="DIFFERENCE",
        help=f"How far a probability may be from the float model's (default: by dtype, {TOLERANCES}).",
    )
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="Where it will run (default: %(default)s).")
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


def load_factory(name: str) -> Factory:
    """The factory that `--model module:function` or `--model file.py:function` names.

    Raises ValueError where there is no such thing, saying which part is missing.
    """
    where, colon, function = name.rpartition(":")
    if not (where and colon and function):
        raise ValueError(f"--model {name!r} must be module:function or file.py:function")
    if where.endswith(".py"):
        path = Path(where).resolve()
        # A name of its own: a file called like a package must not take that one's place.
        spec = importlib.util.spec_from_file_location(f"lma_factory_{path.stem}", path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise ValueError(f"--model {name!r}: there is no file {path}")
        sys.path.insert(0, str(path.parent))  # as if the file were run: it may import its neighbours
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module  # dataclasses, for one, look their module up
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(f"--model {name!r} cannot be imported: {error}") from error
    factory = getattr(module, function, None)
    if not callable(factory):
        raise ValueError(f"--model {name!r}: {where} has no function {function!r}")
    return cast(Factory, factory)
