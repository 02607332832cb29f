"""What an inspection found, and how it prints."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from torchrec_lma.text_table import text_table


@dataclass(frozen=True)
class Load:
    """How many ids share a chunk of a shared row. A dedicated row has one id and is not counted.

    Attributes:
        mean, median, p99, max: over the chunks of all shared rows.
        unused: share of these chunks that no id has.
        histogram: how many chunks have 0, 1, 2, ... ids.
    """

    mean: float
    median: int
    p99: int
    max: int
    unused: float
    histogram: tuple[int, ...]

    @classmethod
    def of(cls, histogram: Tensor) -> "Load":
        n = int(histogram.sum())
        upto = histogram.cumsum(0)
        return cls(
            mean=int((histogram * torch.arange(histogram.numel())).sum()) / n,
            median=int(torch.searchsorted(upto, math.ceil(0.5 * n))),
            p99=int(torch.searchsorted(upto, math.ceil(0.99 * n))),
            max=histogram.numel() - 1,
            unused=int(histogram[0]) / n,
            histogram=tuple(histogram.tolist()),
        )


@dataclass(frozen=True)
class InspectedTable:
    """The ids of one logical table. `hashed` are those seen that are neither dedicated nor have a signature.

    Attributes:
        signature_bytes: of its ids' signatures with their part of the index.
        load: of its ids alone; None without data.
    """

    table: str
    memory: str
    num_embeddings: int
    seen: int
    dedicated: int
    with_signature: int
    hashed: int
    signature_bytes: int
    load: Load | None


@dataclass(frozen=True)
class Pairs:
    """Shared memory against true similarity, over sampled pairs of ids of one source.

    Attributes:
        source: the source's record.
        num_values: K, values stored for each id: no more than the memory has chunks.
        similarity, shared: of each pair; `shared` is the share of chunks at equal addresses.
        bins: for each tenth of similarity with pairs: their number, mean similarity and mean shared; the mean p that
            theory says, and `error_at_most`, sqrt(p (1 - p) / K), the standard error of one pair. That of the mean is
            no larger, and can be as large: all pairs of one allocation see the same K hash functions.
        shared_rows: where chance agreements fall.
    """

    source: Mapping[str, Any]
    num_values: int
    similarity: tuple[float, ...]
    shared: tuple[float, ...]
    bins: tuple[dict[str, float], ...]
    shared_rows: int


@dataclass(frozen=True)
class InspectedMemory:
    """One memory. `load` is of all its ids seen, or without data of the ids that have a signature."""

    memory: str
    dim: int
    n_chunks: int
    rows: int
    bytes_by_part: dict[str, int]
    load: Load
    pairs: tuple[Pairs, ...]


@dataclass(frozen=True)
class SimilarId:
    """An id beside another: the share of its memory that they have in common, and their similarity, None where the
    data do not tell it."""

    table: str
    id: int
    kind: str
    count: int
    shared: float
    similarity: float | None


@dataclass(frozen=True)
class Neighbours:
    """The ids that are most similar to a given one.

    Attributes:
        compared: how many ids were looked at; with similarity those that may have some.
        by_similarity: else the data do not tell it, and these are the ids that share most memory.
    """

    table: str
    id: int
    kind: str
    count: int
    compared: int
    by_similarity: bool
    similar: tuple[SimilarId, ...]


@dataclass(frozen=True)
class Inspection:
    """`str` gives the report as text, `to_dict` as plain JSON values.

    Attributes:
        rows_observed, rows_seen: the distinct rows that ids and loads are from, and all rows of the data that were
            read; None without data.
        is_sample: whether there are rows of the data that are not among the observed ones.
    """

    fingerprint: str
    config: dict[str, Any]
    provenance: dict[str, Any]
    rows_observed: int | None
    rows_seen: int | None
    is_sample: bool
    tables: tuple[InspectedTable, ...]
    memories: tuple[InspectedMemory, ...]
    neighbours: tuple[Neighbours, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "warning": self.warning()}

    def __str__(self) -> str:
        parts = [self._head(), self.memory_table(), self.table_table(), self.load_table()]
        parts += [pairs_table(memory.memory, pairs) for memory in self.memories for pairs in memory.pairs]
        parts += [neighbours_table(one) for one in self.neighbours]
        return "\n\n".join(parts)

    def _head(self) -> str:
        values = {key: value for key, value in self.config.items() if value is not None}
        settings = ", ".join(
            f"{key} {value:,}" if key != "compression" else f"{key} {value:g}" for key, value in values.items()
        )
        lines = [f"fingerprint {self.fingerprint}", settings, self.about_source(), self.about_data()]
        return "\n".join(lines + [f"warning: {one}" for one in (self.warning(),) if one])

    def about_source(self) -> str:
        source = self.provenance.get("source")
        if not isinstance(source, Mapping):
            return "no source of similarity"
        return f"source {describe_source(source)}"

    def about_data(self) -> str:
        if self.rows_observed is not None:
            observed = f"ids and loads from {self.rows_observed:,} distinct rows of the data"
            if not self.is_sample:
                return observed
            return (
                f"{observed}, a sample of its {self.rows_seen:,} rows: loads and counts of all ids are higher; ids by "
                "kind are as the builder counted them where it saw more"
            )
        counted = "as the builder counted them"
        if self.provenance.get("frequency") == "sketched":
            counted += f" in a sample of {self.provenance['rows_sampled']:,} distinct rows, of all rows there are more"
        return f"no data given: ids {counted}, loads of ids with a signature only"

    def warning(self) -> str | None:
        """What is wrong with the data for this allocation, if anything can be told."""
        built_from = self.provenance.get("rows_seen")
        if not built_from or self.rows_seen in (None, built_from):
            return None
        return (
            f"the data have {self.rows_seen:,} training rows, the allocation was built from {built_from:,}: with other "
            "data or another split, loads and similarities are not those that it was built for"
        )

    def memory_table(self) -> str:
        parts = list(self.memories[0].bytes_by_part)
        lines = [
            (m.memory, f"{m.rows:,}", str(m.dim), str(m.n_chunks), *(f"{m.bytes_by_part[part]:,} B" for part in parts))
            for m in self.memories
        ]
        return text_table(("memory", "rows", "dim", "chunks", *parts), lines)

    def table_table(self) -> str:
        lines = [
            (t.table, t.memory, *(f"{n:,}" for n in (t.seen, t.dedicated, t.with_signature, t.hashed)))
            + (f"{t.signature_bytes:,} B",)
            for t in self.tables
        ]
        header = ("table", "memory", "ids seen", "dedicated", "signature", "hashed", "signature bytes")
        return text_table(header, lines, left=2)

    def load_table(self) -> str:
        loads = [(memory.memory, memory.load) for memory in self.memories]
        loads += [(table.table, table.load) for table in self.tables if table.load is not None]
        lines = [
            (name, f"{load.mean:.2f}", *(str(n) for n in (load.median, load.p99, load.max)), f"{load.unused:.1%}")
            for name, load in loads
        ]
        return text_table(("ids at a chunk of a shared row", "mean", "median", "p99", "max", "unused"), lines)


def describe_source(source: Mapping[str, Any]) -> str:
    if "tables" in source:
        return "; ".join(
            f"{table}: {describe_source(one or {'name': 'none'})}" for table, one in source["tables"].items()
        )
    settings = ", ".join(f"{key} {value}" for key, value in sorted(source.items()) if key != "name")
    return f"{source['name']} ({settings})" if settings else str(source["name"])


def pairs_table(memory: str, pairs: Pairs) -> str:
    lines = [
        (f"{b['similarity']:.3f}", f"{b['pairs']:.0f}")
        + tuple(f"{b[key]:.3f}" for key in ("shared", "theory", "error_at_most"))
        for b in pairs.bins
    ]
    table = text_table(("Jaccard", "pairs", "shared", "theory", "std. error at most"), lines, left=0)
    return f"{memory}: memory that pairs of ids share, by {pairs.source['name']}\n{table}\n{about_error(pairs)}"


def about_error(pairs: Pairs) -> str:
    return (
        f"The error is that of one pair, sqrt(p (1 - p) / {pairs.num_values}) for theory p: all pairs see the same "
        f"{pairs.num_values} hash functions, so more pairs need not bring their mean closer."
    )


def neighbours_table(one: Neighbours) -> str:
    lines = [
        (s.table, str(s.id), s.kind, f"{s.count:,}", f"{s.shared:.1%}")
        + ("" if s.similarity is None else f"{s.similarity:.3f}",)
        for s in one.similar
    ]
    seen = f"seen {one.count:,} times" if one.count else "not seen in the data"
    table = text_table(("table", "id", "kind", "seen", "shared memory", "Jaccard"), lines, left=2)
    found = "is most similar to" if one.by_similarity else "shares most memory, its similarity is not known, with"
    return f"{one.table}={one.id} ({one.kind}, {seen}) {found}, of {one.compared:,} ids compared:\n{table}"
