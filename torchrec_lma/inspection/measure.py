"""Measures what an allocation does: who owns how many columns, who shares with whom, and what takes how many bytes."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig

from torchrec_lma.allocation import Allocation, MemoryAllocation
from torchrec_lma.allocation.layout import bytes_per_value
from torchrec_lma.hashing import mix64
from torchrec_lma.inspection.observed import ObservedIds, Similarity
from torchrec_lma.inspection.report import Crowding, InspectedTable, Inspection, SharedWith, Sharing
from torchrec_lma.modules import LMAEmbeddingBagCollection

BINS, PAIRS_PER_BIN = 10, 150  # tenths of similarity, and pairs wanted in each
FIRST_IDS, PARTNERS = 300, 12  # ids whose pairs are measured, and of each how many


def inspect(
    allocation: Allocation,
    observed: ObservedIds | None = None,
    ids: Sequence[tuple[str, int]] = (),
    top: int = 10,
    seed: int = 0,
) -> Inspection:
    """Looks into an allocation.

    Args:
        allocation: built, loaded, or from a checkpoint, which tells nothing of ids without data.
        observed: the ids of training rows, as the allocation's tables are fed them.
        ids: (table, id), for which those that share a row with it are listed; needs `observed`.
        top: how many of these.
        seed: of the pairs that are sampled.
    Raises:
        ValueError: a table that does not exist, or none observed.
    """
    names = [spec.name for spec in allocation.tables]
    for table, _ in ids:
        check_table(allocation, table)
    if observed is not None and not set(names) <= set(observed.tables):
        raise ValueError(f"the ids were observed for tables {observed.tables}, the allocation has {names}")
    if ids and observed is None:
        raise ValueError("those that share a row are looked for among the ids of the data: give the data")
    lookup = _Rows(allocation)
    crowding: list[Crowding] = []
    sharing: list[Sharing] = []
    if observed is not None:
        for memory in allocation.memories:
            crowding += _crowding(memory, lookup, observed)
            sharing += _sharing(allocation, memory, lookup, observed, torch.Generator().manual_seed(seed))
    return Inspection(
        fingerprint=allocation.fingerprint,
        config=allocation.config.to_dict(),
        provenance=allocation.provenance,
        rows_observed=observed.rows_sampled if observed is not None else None,
        rows_seen=observed.rows_seen if observed is not None else None,
        bytes_by_part=_bytes_by_part(allocation),
        tables=tuple(_table(allocation, name, lookup, observed) for name in names),
        crowding=tuple(crowding),
        sharing=tuple(sharing),
        shared_with=tuple(
            _shared_with(allocation, lookup, observed, *asked, top) for asked in ids if observed is not None
        ),
    )


def check_table(allocation: Allocation, table: str) -> None:
    """Raises ValueError if the allocation has no such table."""
    names = [spec.name for spec in allocation.tables]
    if table not in names:
        raise ValueError(f"no table {table!r} in the allocation; it has {', '.join(names)}")


def source_of(allocation: Allocation, table: str) -> dict[str, Any] | None:
    """The record of a table's source."""
    source = allocation.provenance.get("source")
    if not isinstance(source, dict):
        return None
    return source["tables"].get(table) if "tables" in source else source


class _Rows:
    """Rows of ids under an allocation, by a collection without weights."""

    def __init__(self, allocation: Allocation) -> None:
        tables = [
            EmbeddingBagConfig(
                name=spec.name,
                num_embeddings=spec.num_embeddings,
                embedding_dim=spec.embedding_dim,
                feature_names=[spec.name],
                data_type=DataType[spec.data_type],
            )
            for spec in allocation.tables
        ]
        self._ebc = LMAEmbeddingBagCollection(tables, allocation, device=torch.device("meta"))

    def __call__(self, table: str, ids: Tensor) -> Tensor:
        """int64 [levels, n]"""
        return torch.stack(list(self._ebc.rows(table, ids).values()))

    def have_signature(self, memory: MemoryAllocation, observed: ObservedIds) -> Tensor:
        """bool [n], which of the observed ids of a memory have a signature, in the order of `of_memory`."""
        remap: Any = self._ebc.remap.memories[memory.name]
        found = []
        for slot, table in enumerate(memory.tables):
            ids = observed.ids[observed.of_table(table)]
            if memory.raw_ids:
                place = mix64(ids ^ remap.salts[slot])
            else:
                place = torch.where((ids >= 0) & (ids < remap.sizes[slot]), ids + remap.first[slot], -1)
            found.append(remap.signed.find(place) >= 0)
        return torch.cat(found)

    def of_memory(self, memory: MemoryAllocation, observed: ObservedIds) -> tuple[Tensor, Tensor]:
        """Which of the observed ids are of the memory, int64 [n], and their rows, int64 [levels, n]."""
        items = [observed.of_table(table) for table in memory.tables]
        return torch.cat(items), torch.cat(
            [self(table, observed.ids[of_table]) for table, of_table in zip(memory.tables, items)], dim=1
        )


def _bytes_by_part(allocation: Allocation) -> dict[str, int]:
    value_bytes = bytes_per_value(allocation.config.weight_type)
    parts = {}
    for memory in allocation.memories:
        for k, level in enumerate(memory.levels):
            name = f"{memory.level_name(k)}: {level.width} columns of {level.own_rows:,} own"
            parts[f"{name} and {level.shared_rows:,} shared rows"] = level.table_rows * level.table_width * value_bytes
        signatures = memory.tensors["signatures"].nbytes if "signatures" in memory.tensors else 0
        parts[f"{memory.name}: who owns and who has a signature"] = memory.nbytes - signatures
        if signatures:
            parts[f"{memory.name}: signatures"] = signatures
    return parts


def _table(allocation: Allocation, name: str, lookup: _Rows, observed: ObservedIds | None) -> InspectedTable:
    spec = next(spec for spec in allocation.tables if spec.name == name)
    memory = next(memory for memory in allocation.memories if name in memory.tables)
    widths = [level.width for level in memory.levels]
    columns = (0, *accumulate(widths))
    occurrences = None
    if observed is not None:
        items = observed.of_table(name)
        own_rows = torch.tensor([level.own_rows for level in memory.levels]).unsqueeze(1)
        rows = lookup(name, observed.ids[items])
        owns = ((rows >= 0) & (rows < own_rows)).sum(0)  # how many levels each id owns: they are the first ones
        counted = torch.bincount(owns, minlength=len(columns)).tolist()
        of_count = torch.zeros(len(columns), dtype=torch.int64).index_add_(0, owns, observed.count[items])
        occurrences = tuple((of_count / max(1, int(of_count.sum()))).tolist())
    else:
        record = allocation.provenance.get("ids", {}).get(name, {})
        seen = record.get("seen", 0)
        own = [seen, *record.get("own", [0] * len(widths)), 0]
        counted = [more - less for more, less in pairwise(own)]
    return InspectedTable(
        table=name,
        memory=memory.name,
        num_embeddings=spec.num_embeddings,
        columns=columns,
        ids=tuple(counted),
        occurrences=occurrences,
    )


def _crowding(memory: MemoryAllocation, lookup: _Rows, observed: ObservedIds) -> list[Crowding]:
    _, rows = lookup.of_memory(memory, observed)
    crowding = []
    for k, level in enumerate(memory.levels):
        if level.shared_rows:
            shared = rows[k][rows[k] >= level.own_rows] - level.own_rows
            at_row = torch.bincount(shared, minlength=level.shared_rows).sort().values
            median, p99 = (int(at_row[int(q * level.shared_rows)]) for q in (0.5, 0.99))
            unused = float((at_row == 0).double().mean())
            name, most = memory.level_name(k), int(at_row[-1])
            crowding.append(Crowding(name, level.shared_rows, shared.numel(), median, p99, most, unused))
    return crowding


def _sharing(
    allocation: Allocation, memory: MemoryAllocation, lookup: _Rows, observed: ObservedIds, random: torch.Generator
) -> list[Sharing]:
    """Pairs of ids that share by signature, for each source of the memory's tables whose similarity the data tell."""
    if "signatures" not in memory.tensors:
        return []
    shared = [k for k, level in enumerate(memory.levels) if level.shared_rows]
    items, rows = lookup.of_memory(memory, observed)
    have_signature = lookup.have_signature(memory, observed)
    sharing = []
    sources = {repr(source): source for table in memory.tables if (source := source_of(allocation, table))}
    for source in sources.values():
        if not Similarity.known(source):
            continue
        of_source = torch.tensor([source_of(allocation, table) == source for table in observed.tables])
        all_share = torch.stack([rows[k] >= memory.levels[k].own_rows for k in shared]).all(0)
        chosen = (of_source[observed.table[items]] & have_signature & all_share).nonzero().squeeze(1)
        found: list[list[tuple[float, float, float]]] = [[] for _ in range(BINS)]
        for first, second, jaccard in _similar_pairs(Similarity(observed, source), source, items, chosen, random):
            of_bin = found[min(int(jaccard * BINS), BINS - 1)]
            if len(of_bin) < PAIRS_PER_BIN:
                agree = jaccard ** source["power"]
                theory = sum(agree + (1 - agree) / memory.levels[k].shared_rows for k in shared) / len(shared)
                of_bin.append((jaccard, float((rows[:, first] == rows[:, second])[shared].double().mean()), theory))
        bins = [
            {
                "pairs": len(of_bin),
                **dict(zip(("similarity", "shared", "theory"), (sum(x) / len(of_bin) for x in zip(*of_bin)))),
            }
            for of_bin in found
            if of_bin
        ]
        if bins:
            sharing.append(Sharing(memory.name, source, tuple(bins)))
    return sharing


def _similar_pairs(
    similarity: Similarity, source: dict[str, Any], items: Tensor, chosen: Tensor, random: torch.Generator
) -> Iterator[tuple[int, int, float]]:
    """Pairs of ids that a source may have made share, similar ones and some by chance, and how similar they are.

    Args:
        items: int64 [n], the observed ids of a memory.
        chosen: those that share by this source, as positions in `items`; so are the ids of the pairs.
    """
    observed = similarity.observed
    place = torch.full_like(observed.ids, -1)  # of each chosen id, in `items`
    place[items[chosen]] = chosen
    for first in items[chosen[torch.randperm(chosen.numel(), generator=random)[:FIRST_IDS]]].tolist():
        others = similarity.beside(first, random)
        by_chance = chosen[torch.randint(chosen.numel(), (2,), generator=random)]
        others = torch.cat([others[place[others] >= 0], items[by_chance]])
        if source["within_table"]:
            others = others[observed.table[others] == observed.table[first]]
        for second in others[torch.randperm(others.numel(), generator=random)[:PARTNERS]].tolist():
            if second != first:
                yield int(place[first]), int(place[second]), similarity(first, second)


def _shared_with(
    allocation: Allocation, lookup: _Rows, observed: ObservedIds, table: str, id: int, top: int
) -> SharedWith:
    memory = next((memory for memory in allocation.memories if table in memory.tables), None)
    rows = lookup(table, torch.tensor([id])).squeeze(1)
    items = observed.of_table(table)
    count = int(observed.count[items][observed.ids[items] == id].sum())
    if memory is None:
        return SharedWith(table, id, {table: int(rows[0])}, (True,), count, (), 0)
    own = tuple(row < level.own_rows for row, level in zip(rows.tolist(), memory.levels))
    names = [memory.level_name(k) for k in range(len(memory.levels))]
    others: list[tuple[str, int, int]] = []
    shared = next((k for k, row in enumerate(rows.tolist()) if row >= 0 and not own[k]), None)
    if shared is not None:
        every, their_rows = lookup.of_memory(memory, observed)
        for item in every[their_rows[shared] == rows[shared]].tolist():
            entry = (observed.tables[int(observed.table[item])], int(observed.ids[item]), int(observed.count[item]))
            others += [entry] if entry[:2] != (table, id) else []
    others.sort(key=lambda entry: -entry[2])
    return SharedWith(table, id, dict(zip(names, rows.tolist())), own, count, tuple(others[:top]), len(others))
