"""The command `torchrec-lma inspect`."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from torchrec_lma.allocation import Allocation
from torchrec_lma.datasets import encode_ids
from torchrec_lma.inspection.measure import check_table, inspect, source_of
from torchrec_lma.inspection.observed import MAX_ROWS, ObservedIds
from torchrec_lma.inspection.page import check_page, write_page
from torchrec_lma.options import add_data_options, open_dataset


def add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="look into an allocation",
        description="Prints what an allocation does: ids by kind, the load of the memory's rows, bytes by part. With "
        "--data also the true similarity of ids against the memory that they share.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("allocation", type=Path, metavar="ALLOCATION", help="a file from `torchrec-lma allocate`")
    parser.add_argument(
        "--id",
        action="append",
        default=[],
        metavar="TABLE=VALUE",
        help="list the ids most similar to this one and the memory that they share; a value as in the data, or the id "
        "that it is read as; may be given several times; needs --data",
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many of them (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write a page with plots, or to a name that ends in .png the plots alone; needs matplotlib",
    )
    add_data_options(parser, default=None)
    parser.set_defaults(run=run_inspect)


def run_inspect(args: argparse.Namespace) -> None:
    allocation = Allocation.load(args.allocation)
    asked = [_table_and_value(text) for text in args.id]
    # What can be wrong is found before a pass over the data.
    for table, _ in asked:
        check_table(allocation, table)
    if args.html is not None:
        check_page(args.html)
    observed = _observe(args, allocation) if args.data is not None else None
    ids = [(table, _id(table, value, args.format, observed)) for table, value in asked]
    inspection = inspect(allocation, observed, ids, args.top)
    print(json.dumps(inspection.to_dict()) if args.json else inspection, flush=True)
    if args.html is not None:
        write_page(inspection, str(args.allocation), args.html)


def _table_and_value(text: str) -> tuple[str, str]:
    table, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--id {text!r} is not TABLE=VALUE, such as t_user=17")
    return table, value


def _id(table: str, value: str, data_format: str, observed: ObservedIds | None) -> int:
    """The id of a value as the reader encodes it, if the data have that, else the integer that it says."""
    if data_format == "criteo":
        is_hexadecimal = re.fullmatch("[0-9a-fA-F]{1,16}", value)
        read = encode_ids(pa.array([int(value, 16)], pa.uint64())) if is_hexadecimal else None
    else:
        read = encode_ids(pa.array([value]))
    id = None if read is None else read[0].as_py()
    if id is not None and observed is not None and observed.find(table, id) is not None:
        return id
    try:
        return int(value)
    except ValueError:
        if id is None:
            raise ValueError(f"--id {table}={value} is neither hexadecimal, as Criteo's ids, nor an integer") from None
        return id


def _observe(args: argparse.Namespace, allocation: Allocation) -> ObservedIds:
    """The ids of the training rows; a table is fed by the column of its own name, or without the `t_`."""
    only_ids = argparse.Namespace(**(vars(args) | {"label": None, "numeric": []}))
    dataset = open_dataset(only_ids, needs_label=False)
    columns = dataset.schema.categorical
    table_of_column = {}
    for spec in allocation.tables:
        found = [column for column in (spec.name, spec.name.removeprefix("t_")) if column in columns]
        if not found:
            raise ValueError(
                f"table {spec.name!r} of the allocation has no column in the data, which has {', '.join(columns)}; "
                "give the data, and with --categorical the columns, that it was built from"
            )
        table_of_column[found[0]] = spec.name
    # As many rows as the builder sampled, so that the similarities are those of the signatures.
    sources = [source_of(allocation, spec.name) or {} for spec in allocation.tables]
    limits = [source["max_rows"] for source in sources if "max_rows" in source]
    max_rows = None if None in limits else max(limits, default=MAX_ROWS)
    batches = dataset.batches("train", batch_size=8192)
    bar = tqdm(batches, total=dataset.num_batches("train", 8192), unit="batch", disable=None)
    return ObservedIds((batch.sparse_features for batch in bar), table_of_column, allocation.config.seed, max_rows)
