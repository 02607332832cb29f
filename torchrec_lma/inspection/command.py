"""The command `torchrec-lma inspect`."""

import argparse
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from torchrec_lma.allocation import Allocation
from torchrec_lma.inspection.measure import inspect, source_of
from torchrec_lma.inspection.observed import MAX_ROWS, ObservedIds
from torchrec_lma.inspection.page import write_page
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
        metavar="TABLE=ID",
        help="list the ids that share most memory with this one; may be given several times; needs --data",
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many of them (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots; needs matplotlib")
    add_data_options(parser, default=None)
    parser.set_defaults(run=run_inspect)


def run_inspect(args: argparse.Namespace) -> None:
    ids = [_table_and_id(text) for text in args.id]
    allocation = Allocation.load(args.allocation)
    observed = _observe(args, allocation) if args.data is not None else None
    inspection = inspect(allocation, observed, ids, args.top)
    if args.html is not None:
        write_page(inspection, str(args.allocation), args.html)
    print(json.dumps(inspection.to_dict()) if args.json else inspection)


def _table_and_id(text: str) -> tuple[str, int]:
    table, _, id = text.rpartition("=")
    try:
        return table, int(id)
    except ValueError:
        raise ValueError(f"--id {text!r} is not TABLE=ID with an integer, such as t_user=17") from None


def _observe(args: argparse.Namespace, allocation: Allocation) -> ObservedIds:
    """The ids of the training rows; a table is fed by the column of its own name, or without the `t_`."""
    dataset = open_dataset(args)
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
    # As many rows as the signatures were made from, so that the similarities are theirs.
    sources = [source_of(allocation, spec.name) or {} for spec in allocation.tables]
    limits = [source["max_rows"] for source in sources if "max_rows" in source]
    max_rows = None if None in limits else max(limits, default=MAX_ROWS)
    batches = dataset.batches("train", batch_size=8192)
    bar = tqdm(batches, total=dataset.num_batches("train", 8192), unit="batch", disable=None)
    return ObservedIds((batch.sparse_features for batch in bar), table_of_column, allocation.config.seed, max_rows)
