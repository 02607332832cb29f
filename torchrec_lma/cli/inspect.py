"""The command `torchrec-lma inspect`."""

import argparse
import json
import re
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from torchrec_lma.allocation import Allocation
from torchrec_lma.datasets import RowDataset, Vocabulary, encode_ids
from torchrec_lma.inspection import ObservedIds, inspect
from torchrec_lma.inspection.measure import check_table, source_of
from torchrec_lma.inspection.observed import MAX_ROWS
from torchrec_lma.options import add_data_options, check_id_types, load_vocabulary, open_dataset, positive, table_names


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Prints what an allocation does: how many ids own how many columns, and what takes how many bytes. "
        "With --data also their share of the occurrences, how crowded shared rows are, and whether similar ids share."
    )
    parser.add_argument("allocation", type=Path, metavar="ALLOCATION", help="A file from `torchrec-lma allocate`.")
    parser.add_argument(
        "--id",
        action="append",
        default=[],
        metavar="TABLE=VALUE",
        help="List the rows of this id, and the ids with which it shares one. VALUE is as in the data, which --data "
        "gives. May be given several times.",
    )
    parser.add_argument(
        "--top", type=positive, default=10, metavar="N", help="How many to list (default: %(default)s)."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of text.")
    add_data_options(parser, default=None, needs_label=False)
    parser.set_defaults(run=run_inspect)


def run_inspect(args: argparse.Namespace) -> None:
    allocation = Allocation.load(args.allocation)
    asked = [_table_and_value(text) for text in args.id]
    # What can be wrong is found before a pass over the data.
    for table, _ in asked:
        check_table(allocation, table)
    observed, vocabulary = None, None
    if args.data is not None:
        dataset = open_dataset(argparse.Namespace(**(vars(args) | {"numeric": []})), needs_label=False)
        table_of_column = _tables_of_columns(allocation, dataset)
        check_id_types(allocation.provenance.get("id_types", {}), dataset.id_types, args.allocation)
        vocabulary = load_vocabulary(args.allocation, allocation)
        if vocabulary is None:
            vocabulary = _vocabulary(allocation, dataset, table_of_column)
        observed = _observe(allocation, dataset, table_of_column, vocabulary)
        column_of = {table: column for column, table in table_of_column.items()}
    ids = []
    for table, value in asked:
        id = _id(table, value, args.format)
        if vocabulary is not None:
            known = vocabulary.ids[column_of[table]]
            found = (known == id).nonzero()
            id = int(found[0]) + 1 if found.numel() else 0
        ids.append((table, id))
    inspection = inspect(allocation, observed, ids, args.top)
    print(json.dumps(inspection.to_dict()) if args.json else inspection, flush=True)


def _table_and_value(text: str) -> tuple[str, str]:
    table, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--id {text!r} is not TABLE=VALUE, such as t_user=17")
    return table, value


def _id(table: str, value: str, data_format: str) -> int:
    """The id of a value as the reader encodes it: an integer is itself, in Criteo's files as hexadecimal."""
    if data_format == "criteo":
        if not re.fullmatch("[0-9a-fA-F]{1,16}", value):
            raise ValueError(f"--id {table}={value} is not hexadecimal, as Criteo's ids are")
        return encode_ids(pa.array([int(value, 16)], pa.uint64()))[0].as_py()
    try:
        return int(value)
    except ValueError:
        return encode_ids(pa.array([value]))[0].as_py()


def _tables_of_columns(allocation: Allocation, dataset: RowDataset) -> dict[str, str]:
    """A table is fed by the column of its own name, or by the one that the commands name it for."""
    columns = dataset.schema.categorical
    names = table_names(columns)
    table_of_column = {}
    for spec in allocation.tables:
        found = [column for column in columns if spec.name in (column, names[column])]
        if not found:
            raise ValueError(
                f"table {spec.name!r} of the allocation has no column in the data, which has {', '.join(columns)}; "
                "give the data, and with --categorical the columns, that it was built from"
            )
        table_of_column[found[0]] = spec.name
    return table_of_column


def _vocabulary(allocation: Allocation, dataset: RowDataset, table_of_column: dict[str, str]) -> Vocabulary | None:
    """That of the training rows, if the allocation's tables have its sizes; else they take ids as they are."""
    if all(spec.raw_ids for spec in allocation.tables):
        return None
    vocabulary = Vocabulary(dataset.distinct_ids())
    sizes = {spec.name: spec.num_embeddings for spec in allocation.tables}
    same = all(vocabulary.num_embeddings[column] == sizes[table] for column, table in table_of_column.items())
    return vocabulary if same else None


def _observe(
    allocation: Allocation, dataset: RowDataset, table_of_column: dict[str, str], vocabulary: Vocabulary | None
) -> ObservedIds:
    """The ids of the training rows, of as many rows as the builder sampled, so that similarities are those of the
    signatures."""
    sources = [source_of(allocation, spec.name) or {} for spec in allocation.tables]
    limits = [source["max_rows"] for source in sources if "max_rows" in source]
    max_rows = None if None in limits else max(limits, default=MAX_ROWS)
    batches = dataset.batches("train", batch_size=8192)
    bar = tqdm(batches, total=dataset.num_batches("train", 8192), unit="batch", disable=None)
    features = (batch.sparse_features for batch in bar)
    if vocabulary is not None:
        features = (vocabulary(batch) for batch in features)
    return ObservedIds(features, table_of_column, allocation.config.seed, max_rows)
