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
BINS, PAIRS_PER_BIN = 10, 150  # tenths of similarity, and pairs wanted in each
FIRST_IDS, PAIRS_PER_ID, RANDOM_PARTNERS = 200, 5, 2  # ids whose pairs are measured; of each: in a bin, by chance
# Keys of rows that are read: for the pairs of one id, for all pairs, for the most similar ids of one.
PAIR_KEYS, ALL_PAIR_KEYS, NEIGHBOUR_KEYS = 1 << 16, 1 << 26, 1 << 25
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
        check_table(allocation, table)
        if not -(2**63) <= id < 2**63:
            raise ValueError(f"id {id} of table {table!r} is no int64; give an integer in [-2**63, 2**63)")
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


def check_table(allocation: Allocation, table: str) -> None:
    """Raises ValueError if the allocation has no such table."""
    names = [spec.name for spec in allocation.tables]
    if table not in names:
        raise ValueError(f"no table {table!r} in the allocation; it has {', '.join(names)}")


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
        first, second, similarity = _sampled_pairs(observed, source, items, torch.Generator().manual_seed(seed))
        if not first.numel():
            continue
        num_values = min(source["num_values"], memory.signatures.size(1))
        a, b = _rows(addressing, observed, first), _rows(addressing, observed, second)
        shared = (a == b).to(torch.float64).mean(0)
        yield Pairs(
            source=source,
            num_values=num_values,
            similarity=tuple(similarity.tolist()),
            shared=tuple(shared.tolist()),
            bins=tuple(_bins(similarity, shared, source["power"], num_values, addressing.shared_rows)),
            shared_rows=addressing.shared_rows,
        )


def _bin_of(similarity: Tensor) -> Tensor:
    return (similarity * BINS).long().clamp(max=BINS - 1)


def _bins(
    similarity: Tensor, shared: Tensor, power: int, num_values: int, shared_rows: int
) -> Iterator[dict[str, float]]:
    expected, bin_of = expected_sharing(similarity, power, shared_rows), _bin_of(similarity)
    for b in bin_of.unique().tolist():
        in_bin = bin_of == b
        theory = expected[in_bin]
        yield {
            "pairs": int(in_bin.sum()),
            "similarity": similarity[in_bin].mean().item(),
            "shared": shared[in_bin].mean().item(),
            # A pair is num_values coins, not n_chunks: chunks of one signature value agree together. All pairs see
            # the same hash functions, so their mean can be as far off as one pair, and never farther.
            "error_at_most": (theory * (1 - theory) / num_values).mean().sqrt().item(),
            "theory": theory.mean().item(),
        }


def _rows(addressing: MemoryAddressing, observed: ObservedIds, items: Tensor) -> Tensor:
    """int64 [n_chunks, n], the addresses of observed ids."""
    return addressing(observed.ids[items], observed.salts[observed.table[items]], 0, addressing.n_chunks)


def _sampled_pairs(
    observed: ObservedIds, source: dict[str, Any], items: Tensor, random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct pairs of the given ids, int64 [P] and int64 [P], of every similarity that there is, float64 [P]."""
    measure = Similarity(observed, source)
    among = torch.zeros_like(observed.ids, dtype=torch.bool).index_fill_(0, items, True)
    room = [PAIRS_PER_BIN] * BINS
    pairs, similarities, keys = [], [], 0
    # Each id as often as any other, so that rare ids, which have the higher similarities, are among them.
    for first in items[torch.randperm(items.numel(), generator=random)][:FIRST_IDS].tolist():
        if keys > ALL_PAIR_KEYS:
            break
        among[first] = False  # so that no pair comes twice
        unrelated = items[torch.randint(items.numel(), (RANDOM_PARTNERS,), generator=random)]
        if source.get("within_table"):
            unrelated = unrelated[observed.table[unrelated] == observed.table[first]]
        second = torch.cat([measure.related(first, among, PAIR_KEYS), unrelated[among[unrelated]]]).unique()
        second = second[torch.randperm(second.numel(), generator=random)]
        similarity = measure(first, second)
        keys += int(measure.keys[first] + measure.keys[second].sum())
        bin_of = _bin_of(similarity)
        for b in bin_of.unique().tolist():
            # Few of one id, and no more of those that share nothing than of the others.
            chosen = (bin_of == b).nonzero().squeeze(1)[: min(PAIRS_PER_ID, room[b])]
            room[b] -= chosen.numel()
            pairs.append(torch.stack([torch.full_like(chosen, first), second[chosen]]))
            similarities.append(similarity[chosen])
    if not pairs:
        return items[:0], items[:0], torch.empty(0, dtype=torch.float64)
    return *torch.cat(pairs, dim=1), torch.cat(similarities)


def _neighbours(
    allocation: Allocation, addressing: Addressing, observed: ObservedIds, table: str, id: int, top: int
) -> Neighbours:
    """The ids of the same memory that are most similar, or where the data do not tell that, that share most of it."""
    memory = next(memory for memory in allocation.memories if table in memory.tables)
    one = addressing[memory.name]
    ids, salts = torch.tensor([id]), torch.tensor([table_salt(allocation.config.seed, table)])
    wanted = one(ids, salts, 0, one.n_chunks)  # (chunks, 1)
    item = observed.find(table, id)
    items = _items_of(observed, memory.tables)
    if item is not None:
        items = items[items != item]
    source = source_of(allocation, table)
    similarity = None
    if item is not None and source is not None and Similarity.known(source):
        measure = Similarity(observed, source)
        among = torch.zeros_like(observed.ids, dtype=torch.bool).index_fill_(0, items, True)
        items = measure.related(item, among, NEIGHBOUR_KEYS)
        similarity = measure(item, items)
    shares = [(_rows(one, observed, part) == wanted).double().mean(0) for part in items.split(BLOCK_IDS)]
    shared = torch.cat(shares)
    by = shared if similarity is None else similarity
    # Of ids that are alike in this, those that share more memory first, and of these the more frequent.
    best = (by > 0).nonzero().squeeze(1)
    for key in (observed.count[items], shared, by):
        best = best[torch.argsort(key[best], descending=True, stable=True)]
    best = best[:top]
    kinds = _kinds(one, observed.ids[items[best]], observed.salts[observed.table[items[best]]])
    return Neighbours(
        table=table,
        id=id,
        kind=KINDS[int(_kinds(one, ids, salts))],
        count=int(observed.count[item]) if item is not None else 0,
        compared=items.numel(),
        by_similarity=similarity is not None,
        similar=tuple(
            SimilarId(
                table=observed.tables[int(observed.table[items[i]])],
                id=int(observed.ids[items[i]]),
                kind=KINDS[kind],
                count=int(observed.count[items[i]]),
                shared=shared[i].item(),
                similarity=similarity[i].item() if similarity is not None else None,
            )
            for i, kind in zip(best.tolist(), kinds.tolist())
        ),
    )
