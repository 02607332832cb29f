"""What is found of an allocation, and how it is told as text."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torchrec_lma.text_table import text_table


@dataclass(frozen=True)
class InspectedTable:
    """The ids of one logical table.

    Attributes:
        memory: that it shares.
        columns: 0, and the widths of the memory's levels added up: how many columns an id can own.
        ids: for each of these how many ids own so many. Those that own none share rows, or are absent.
        occurrences: for each of these the share of the table's occurrences; None where only data tell.
    """

    table: str
    memory: str
    num_embeddings: int
    columns: tuple[int, ...]
    ids: tuple[int, ...]
    occurrences: tuple[float, ...] | None


@dataclass(frozen=True)
class Crowding:
    """How many of the ids of the data share a row of a level.

    Attributes:
        level: its name; `rows` are its shared ones, `ids` all that share them.
        median, p99, most: ids of a row.
        unused: share of the rows that none has.
    """

    level: str
    rows: int
    ids: int
    median: int
    p99: int
    most: int
    unused: float


@dataclass(frozen=True)
class Sharing:
    """Pairs of ids with a signature, by how similar they truly are.

    Attributes:
        memory: that they share; `source` is their record.
        bins: for each tenth of similarity with pairs: their number, mean similarity, mean share of the levels on which
            they have one row, and the mean that theory says. All pairs see the same K hash functions, so that the
            mean is as far from theory as one pair's: more pairs need not bring it closer.
    """

    memory: str
    source: Mapping[str, Any]
    bins: tuple[dict[str, float], ...]


@dataclass(frozen=True)
class SharedWith:
    """Whom an id shares a row with, on the first level on which it does.

    Attributes:
        rows: of the id, for each level of its memory; -1 where it is absent.
        own: whether they are its own.
        count: its occurrences in the data.
        others: table, id and occurrences of those with the same row, most frequent first, and how many there are.
    """

    table: str
    id: int
    rows: dict[str, int]
    own: tuple[bool, ...]
    count: int
    others: tuple[tuple[str, int, int], ...]
    n_others: int


@dataclass(frozen=True)
class Inspection:
    """`str` gives the report as text, `to_dict` as plain JSON values."""

    fingerprint: str
    config: dict[str, Any]
    provenance: dict[str, Any]
    rows_observed: int | None
    rows_seen: int | None
    bytes_by_part: dict[str, int]
    tables: tuple[InspectedTable, ...]
    crowding: tuple[Crowding, ...]
    sharing: tuple[Sharing, ...]
    shared_with: tuple[SharedWith, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        config = ", ".join(f"{key} {value}" for key, value in self.config.items() if value is not None)
        parts = [f"fingerprint {self.fingerprint}\n{config}\n{self._about_ids()}"]
        lines = [(part, f"{n:,}") for part, n in self.bytes_by_part.items()]
        parts.append(text_table(("part", "bytes"), [*lines, ("total", f"{sum(self.bytes_by_part.values()):,}")]))
        for memory in dict.fromkeys(table.memory for table in self.tables):
            parts.append(_columns_table([table for table in self.tables if table.memory == memory]))
        if self.crowding:
            crowded = [
                (c.level, f"{c.rows:,}", f"{c.ids:,}", str(c.median), str(c.p99), str(c.most), f"{c.unused:.1%}")
                for c in self.crowding
            ]
            header = ("ids at a shared row", "rows", "ids", "median", "p99", "most", "unused")
            parts.append(text_table(header, crowded))
        for sharing in self.sharing:
            bins = [
                (f"{b['similarity']:.3f}", f"{b['pairs']:.0f}", f"{b['shared']:.3f}", f"{b['theory']:.3f}")
                for b in sharing.bins
            ]
            table = text_table(("Jaccard", "pairs", "one row", "theory"), bins, left=0)
            parts.append(f"{sharing.memory}: pairs of ids by {sharing.source['name']}\n{table}")
        parts += [_shared_with_text(asked) for asked in self.shared_with]
        return "\n\n".join(parts)

    def _about_ids(self) -> str:
        if self.rows_observed is None:
            sketched = " in a sample of rows" if self.provenance.get("frequency") == "sketched" else ""
            return f"ids as the builder counted them{sketched}; give data for occurrences and crowding"
        sample = "" if self.rows_observed == self.rows_seen else f" of {self.rows_seen:,}"
        text = f"ids of {self.rows_observed:,} distinct rows{sample} of the data"
        built_from = self.provenance.get("rows_seen")
        if built_from and self.rows_seen != built_from:
            text += f"\nwarning: the allocation was built from {built_from:,} rows, the data have {self.rows_seen:,}"
        return text


def _columns_table(tables: Sequence[InspectedTable]) -> str:
    """How many ids own how many columns of one memory, and what share of occurrences they have."""
    columns = tables[0].columns
    lines = []
    for table in tables:
        lines.append((table.table, f"{sum(table.ids):,}", *(f"{n:,}" for n in table.ids)))
        if table.occurrences is not None:
            lines.append(("  occurrences", "", *(f"{share:.1%}" for share in table.occurrences)))
    return text_table((f"{tables[0].memory}: columns owned", "ids", *(str(n) for n in columns)), lines)


def _shared_with_text(asked: SharedWith) -> str:
    levels = ", ".join(
        f"{name.rpartition('_')[2]}: {'absent' if row < 0 else f'own row {row}' if own else f'shared row {row}'}"
        for (name, row), own in zip(asked.rows.items(), asked.own)
    )
    text = f"{asked.table}={asked.id}, seen {asked.count:,} times; level {levels}; shares with {asked.n_others:,} ids"
    if asked.others:
        text += "\n" + text_table(
            ("table", "id", "seen"), [(table, str(id), f"{count:,}") for table, id, count in asked.others]
        )
    return text
