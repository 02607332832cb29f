"""What an allocation does: ids by kind, load of the memory's rows, bytes by part, and who shares memory with whom."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchrec_lma.addressing import Addressing, MemoryAddressing
from torchrec_lma.allocation import Allocation, MemoryAllocation
from torchrec_lma.allocation.index import IdIndex
from torchrec_lma.hashing import mix64, table_salt, unmix64
from torchrec_lma.inspection.observed import ObservedIds, Similarity
from torchrec_lma.inspection.report import (
    InspectedMemory,
    InspectedTable,
    Inspection,
    Load,
    Neighbours,
    Pairs,
    SimilarId,
)

BLOCK_IDS = 1 << 16
COUNTERS = 1 << 25  # of chunks that are counted at once: 128 MiB
CANDIDATE_PAIRS, PAIRS_PER_BIN, BINS = 6000, 150, 10
HASHED, SIGNATURE, DEDICATED = range(3)
KINDS = ("hashed", "signature", "dedicated")

# Yields ids, int64 [n], and the salts of their tables, int64 [n] or [1].
IdBlocks = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def expected_sharing(similarity: Tensor, power: int, shared_rows: int) -> Tensor:
    """Probability that two ids with signatures have a chunk at the same address (arXiv 2103.06124, theorem 2)."""
    agree = similarity**power
    return agree + (1 - agree) / shared_rows


def inspect(
    allocation: Allocation,
    observed: ObservedIds | None = None,
    ids: Sequence[tuple[str, int]] = (),
    top: int = 10,
    seed: int = 0,
) -> Inspection:
    """
    Args:
        allocation: what to look into.
        observed: the ids of (a sample of) the rows of each table of the allocation. Without it ids by kind are those
            that the builder recorded, loads are of the ids with a signature, and there are no pairs. Of a sample, ids
            by kind are those that the builder recorded where these are more, and loads those of the sample.
        ids: (table, id) to list the most similar ids of; needs `observed`.
        top: how many of these.
        seed: of the sampled pairs.
    Raises:
        ValueError: no such table, an id that is no int64, ids without `observed` or observed for another allocation,
            top below 1.
    """
    for table, id in ids:
        _check_id(allocation, table, id)
    if observed is not None and (
        observed.seed != allocation.config.seed or set(observed.tables) != {spec.name for spec in allocation.tables}
    ):
        raise ValueError(
            f"the ids were observed for tables {observed.tables} and seed {observed.seed}, the allocation has "
            f"{[spec.name for spec in allocation.tables]} and seed {allocation.config.seed}; observe them for these"
        )
    if ids and observed is None:
        raise ValueError(
            "similar ids are looked for among the ids of the data, which an allocation does not keep: give the data"
        )
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    addressing = Addressing(allocation)
    memories, tables = [], []
    for memory in allocation.memories:
        one = addressing[memory.name]
        if observed is None:
            load = _load(one, partial(_entries, one))
            pairs: tuple[Pairs, ...] = ()
        else:
            load = _load(one, _blocks(observed, _items_of(observed, memory.tables)))
            pairs = tuple(_pairs(allocation, memory, one, observed, seed))
        memories.append(
            InspectedMemory(memory.name, memory.dim, one.n_chunks, memory.rows, _parts(allocation, memory), load, pairs)
        )
        tables += [_table(allocation, memory, one, name, observed) for name in memory.tables]
    order = {spec.name: position for position, spec in enumerate(allocation.tables)}
    return Inspection(
        fingerprint=allocation.fingerprint,
        config=allocation.config.to_dict(),
        provenance=allocation.provenance,
        rows_observed=observed.rows_sampled if observed is not None else None,
        rows_seen=observed.rows_seen if observed is not None else None,
        is_sample=observed is not None and observed.is_sample,
        tables=tuple(sorted(tables, key=lambda table: order[table.table])),
        memories=tuple(memories),
        neighbours=tuple(
            _neighbours(allocation, addressing, observed, *one, top) for one in ids if observed is not None
        ),
    )


def _check_id(allocation: Allocation, table: str, id: int) -> None:
    names = [spec.name for spec in allocation.tables]
    if table not in names:
        raise ValueError(f"no table {table!r} in the allocation; it has {', '.join(names)}")
    if not -(2**63) <= id < 2**63:
        raise ValueError(f"id {id} of table {table!r} is no int64; give an integer in [-2**63, 2**63)")


def _parts(allocation: Allocation, memory: MemoryAllocation) -> dict[str, int]:
    row_bytes = next(spec.row_bytes for spec in allocation.tables if spec.name in memory.tables)
    return {
        "shared rows": (memory.rows - memory.dedicated_rows) * row_bytes,
        "dedicated rows": memory.dedicated_rows * row_bytes,
        "signatures": memory.signatures.nbytes,
        "index of ids": memory.nbytes - memory.signatures.nbytes,
    }


def _items_of(observed: ObservedIds, tables: Sequence[str]) -> Tensor:
    """int64, which of the observed ids are of the tables."""
    wanted = torch.tensor([observed.tables.index(table) for table in tables])
    return torch.isin(observed.table, wanted).nonzero().squeeze(1)


def _blocks(observed: ObservedIds, items: Tensor) -> IdBlocks:
    return lambda: ((observed.ids[part], observed.salts[observed.table[part]]) for part in items.split(BLOCK_IDS))


def _entries(addressing: MemoryAddressing) -> Iterator[tuple[Tensor, Tensor]]:
    """An id for each entry of the index of signatures, which does not keep ids: one that it takes for that entry."""
    if addressing.has_signatures:
        index = addressing.signature_index
        for positions in torch.arange(index.low.numel()).split(BLOCK_IDS):
            yield unmix64(index_keys(index, positions)), torch.zeros(1, dtype=torch.int64)


def index_keys(index: IdIndex, positions: Tensor) -> Tensor:
    """int64 [n], a mixed key that the index finds at each of the positions, int64 [n]."""
    bucket = torch.searchsorted(index.starts, positions.to(index.starts.dtype), right=True) - 1
    return (bucket << index.shift) | (index.low[positions].to(torch.int64) & 0xFFFFFFFF)


def _kinds(addressing: MemoryAddressing, ids: Tensor, salts: Tensor) -> Tensor:
    """int64 [n], a position in KINDS for each id."""
    keys = mix64(ids ^ salts)
    kinds = torch.zeros_like(keys)
    if addressing.has_signatures:
        kinds[addressing.signature_index(keys) >= 0] = SIGNATURE
    if addressing.has_dedicated:
        kinds[addressing.dedicated(keys) >= 0] = DEDICATED
    return kinds


def _load(addressing: MemoryAddressing, blocks: IdBlocks) -> Load:
    """The load of shared rows, some chunk positions at a time so that the counters stay bounded."""
    rows, n_chunks = addressing.shared_rows, addressing.n_chunks
    step = max(1, min(n_chunks, COUNTERS // rows))
    histogram = torch.zeros(1, dtype=torch.int64)
    for first in range(0, n_chunks, step):
        end = min(n_chunks, first + step)
        counts = torch.zeros((end - first) * rows, dtype=torch.int32)
        for ids, salts in blocks():
            found = addressing(ids, salts, first, end) - addressing.dedicated_rows  # (chunks, n)
            cells = (found + torch.arange(end - first).unsqueeze(1) * rows)[found >= 0]
            counts.index_add_(0, cells, torch.ones(1, dtype=torch.int32).expand(cells.numel()))
        some = torch.bincount(counts)
        longer, shorter = (some, histogram) if some.numel() > histogram.numel() else (histogram, some)
        histogram = longer.clone()
        histogram[: shorter.numel()] += shorter
    return Load.of(histogram)


def _table(
    allocation: Allocation,
    memory: MemoryAllocation,
    addressing: MemoryAddressing,
    name: str,
    observed: ObservedIds | None,
) -> InspectedTable:
    recorded = allocation.provenance.get("ids", {}).get(memory.name, {}).get(name, {})
    seen = recorded.get("seen", 0)
    kinds = [0, recorded.get("with_signature", 0), recorded.get("dedicated", 0)]
    kinds[HASHED] = max(0, seen - sum(kinds))
    load = None
    if observed is not None:
        items = _items_of(observed, [name])
        load = _load(addressing, _blocks(observed, items))
        if not observed.is_sample or items.numel() > seen:  # else the builder knew more ids than a sample of rows does
            counted = torch.zeros(len(KINDS), dtype=torch.int64)
            for ids, salts in _blocks(observed, items)():
                counted += torch.bincount(_kinds(addressing, ids, salts), minlength=len(KINDS))
            seen, kinds = items.numel(), counted.tolist()
    entries = max(1, memory.signature_low.numel())
    each = (memory.signatures.nbytes + memory.signature_low.nbytes + memory.signature_starts.nbytes) / entries
    return InspectedTable(
        table=name,
        memory=memory.name,
        num_embeddings=next(spec.num_embeddings for spec in allocation.tables if spec.name == name),
        seen=seen,
        dedicated=kinds[DEDICATED],
        with_signature=kinds[SIGNATURE],
        hashed=kinds[HASHED],
        signature_bytes=round(each * recorded.get("with_signature", kinds[SIGNATURE])),
        load=load,
    )


def source_of(allocation: Allocation, table: str) -> dict[str, Any] | None:
    """The record of a table's source."""
    source = allocation.provenance.get("source")
    if not isinstance(source, dict):
        return None
    return source["tables"].get(table) if "tables" in source else source


def _pairs(
    allocation: Allocation,
    memory: MemoryAllocation,
    addressing: MemoryAddressing,
    observed: ObservedIds,
    seed: int,
) -> Iterator[Pairs]:
    """Sampled pairs of ids with a signature, for each source of the memory's tables whose similarity the data tell."""
    sources: list[tuple[dict[str, Any], list[str]]] = []  # with the tables that have it
    for table in memory.tables:
        record = source_of(allocation, table)
        if record is not None and Similarity.known(record):
            same = next((tables for source, tables in sources if source == record), None)
            if same is None:
                sources.append((record, [table]))
            else:
                same.append(table)
    for source, tables in sources:
        items = _items_of(observed, tables)
        kinds = [_kinds(addressing, ids, salts) for ids, salts in _blocks(observed, items)()]
        items = items[torch.cat(kinds) == SIGNATURE] if kinds else items
        if items.numel() < 2:
            continue
        pairs = _candidates(observed, items, torch.Generator().manual_seed(seed))
        if source.get("within_table"):
            pairs = pairs[observed.table[pairs[:, 0]] == observed.table[pairs[:, 1]]]
        measure = Similarity(observed, source)
        similarity = torch.tensor([measure(a, b) for a, b in pairs.tolist()], dtype=torch.float64)
        bin_of = (similarity * BINS).long().clamp(max=BINS - 1)
        chosen = torch.cat([(bin_of == b).nonzero().squeeze(1)[:PAIRS_PER_BIN] for b in range(BINS)])
        if not chosen.numel():
            continue
        pairs, similarity, bin_of = pairs[chosen], similarity[chosen], bin_of[chosen]
        num_values = min(source["num_values"], memory.signatures.size(1))
        a, b = (_rows(addressing, observed, pairs[:, side]) for side in (0, 1))
        shared = (a == b).to(torch.float64).mean(0)
        yield Pairs(
            source=source,
            similarity=tuple(similarity.tolist()),
            shared=tuple(shared.tolist()),
            bins=tuple(_bins(similarity, shared, bin_of, source["power"], num_values, addressing.shared_rows)),
            shared_rows=addressing.shared_rows,
        )


def _bins(
    similarity: Tensor, shared: Tensor, bin_of: Tensor, power: int, num_values: int, shared_rows: int
) -> Iterator[dict[str, float]]:
    expected = expected_sharing(similarity, power, shared_rows)
    for b in bin_of.unique().tolist():
        in_bin = bin_of == b
        n, theory = int(in_bin.sum()), expected[in_bin]
        yield {
            "pairs": n,
            "similarity": similarity[in_bin].mean().item(),
            "shared": shared[in_bin].mean().item(),
            # Chunks of one signature value agree together, so a pair is num_values coins, not n_chunks.
            "error": (theory * (1 - theory) / num_values).sum().sqrt().item() / n,
            "theory": theory.mean().item(),
        }


def _rows(addressing: MemoryAddressing, observed: ObservedIds, items: Tensor) -> Tensor:
    """int64 [n_chunks, n], the addresses of observed ids."""
    return addressing(observed.ids[items], observed.salts[observed.table[items]], 0, addressing.n_chunks)


def _candidates(observed: ObservedIds, items: Tensor, random: torch.Generator) -> Tensor:
    """int64 [P, 2], distinct pairs of different ids: from one row, from two rows with an id in common, at random."""

    def draw(starts: Tensor, ends: Tensor) -> Tensor:
        """For each range a position in it."""
        return starts + (torch.rand(starts.numel(), generator=random, dtype=torch.float64) * (ends - starts)).long()

    def occurrence(item: Tensor) -> Tensor:
        """For each id the position of one of its occurrences."""
        return observed.occurrences[draw(observed.starts[item], observed.starts[item + 1])]

    def in_row(row: Tensor) -> Tensor:
        """For each row an id in it."""
        return observed.item[draw(observed.row_starts[row], observed.row_starts[row + 1])]

    # Each id as often as any other, so that rare ids, which have the higher similarities, are among them.
    first = items[torch.randint(items.numel(), (3 * CANDIDATE_PAIRS,), generator=random)]
    row = observed.row[occurrence(first)]
    one_row, two_rows, anywhere = torch.arange(first.numel()).chunk(3)
    second = torch.empty_like(first)
    second[one_row] = in_row(row[one_row])
    second[two_rows] = in_row(observed.row[occurrence(in_row(row[two_rows]))])
    second[anywhere] = items[torch.randint(items.numel(), (anywhere.numel(),), generator=random)]
    kept = torch.isin(second, items) & (first != second)
    pairs = torch.stack([torch.minimum(first, second), torch.maximum(first, second)], dim=1)[kept]
    pairs = torch.unique(pairs, dim=0)
    return pairs[torch.randperm(pairs.size(0), generator=random)][:CANDIDATE_PAIRS]


def _neighbours(
    allocation: Allocation, addressing: Addressing, observed: ObservedIds, table: str, id: int, top: int
) -> Neighbours:
    memory = next(memory for memory in allocation.memories if table in memory.tables)
    one = addressing[memory.name]
    ids, salts = torch.tensor([id]), torch.tensor([table_salt(allocation.config.seed, table)])
    wanted, kind = one(ids, salts, 0, one.n_chunks), KINDS[int(_kinds(one, ids, salts))]
    item = observed.find(table, id)
    items = _items_of(observed, memory.tables)
    if item is not None:
        items = items[items != item]
    best, shares = items[:0], torch.empty(0)
    for part in items.split(BLOCK_IDS):
        shared = (_rows(one, observed, part) == wanted).float().mean(0)
        best, shares = torch.cat([best, part]), torch.cat([shares, shared])
        # The most shared memory first; of equal ones the most frequent id.
        order = torch.argsort(observed.count[best], descending=True, stable=True)
        order = order[torch.argsort(shares[order], descending=True, stable=True)][:top]
        best, shares = best[order], shares[order]
    best, shares = best[shares > 0], shares[shares > 0]
    source = source_of(allocation, table)
    measure = Similarity(observed, source) if source is not None and Similarity.known(source) else None
    similar = []
    for other, share in zip(best.tolist(), shares.tolist()):
        found = torch.tensor([other])
        other_table = observed.tables[int(observed.table[other])]
        similar.append(
            SimilarId(
                table=other_table,
                id=int(observed.ids[other]),
                kind=KINDS[int(_kinds(one, observed.ids[found], observed.salts[observed.table[found]]))],
                count=int(observed.count[other]),
                shared=share,
                similarity=measure(item, other) if measure is not None and item is not None else None,
            )
        )
    return Neighbours(table, id, kind, int(observed.count[item]) if item is not None else 0, tuple(similar))
