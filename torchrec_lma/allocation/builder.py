"""Builds an allocation from training data."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma.allocation.artifact import Allocation, all_tables
from torchrec_lma.allocation.frequency import IdFrequency
from torchrec_lma.allocation.ids import Ids, as_ids
from torchrec_lma.allocation.layout import KERNEL_WIDTH, check_rows, lay_out
from torchrec_lma.allocation.memories import MemoryBuilder
from torchrec_lma.allocation.ownership import SHARED_FRACTION
from torchrec_lma.allocation.sample import Rows, RowSample
from torchrec_lma.allocation.sources import ContextMinHash, RowsMinHash, RowsSource, SimHash, Source
from torchrec_lma.allocation.vectors import TableVectors, check_vectors
from torchrec_lma.config import LMAConfig, check_int
from torchrec_lma.features import check_batch, slots_of, to_int64
from torchrec_lma.hashing import mix64, table_salt

Sources = Source | Mapping[str, Source | None] | None


class AllocationBuilder:
    """Collects training rows and builds the allocation of their ids.

    The result depends on which rows were seen, not on their order, their batches, or how they were spread over
    builders that were merged.

    Args:
        tables: the logical tables, as given to the collection.
        config: the LMAConfig, as given to it.
        source: what similarity of ids that share rows is measured on, for all tables or by table name; None, or a table
            left out, gives no signatures: they share by hash. SimHash needs vectors: see `from_vectors`.
        shared_fraction: share of the bytes of rows for those that ids share, in [0, 1]. None: an eighth where not every
            id that was seen has an own row, else a row for each table's ids that were not, or none where all ids of the
            vocabularies own one, as they do unless the others could own twice the columns. With 1 no id owns a row,
            all levels are shared and have equally many rows: with levels of equal width and a source that is the
            paper's LMA. So they are too where nothing is known of ids, or telling owners from others would take all
            bytes there are.
        signature_fraction: share of the budget for signatures, in [0, 1). The most frequent ids that share rows get
            them, as many as fit. Not used without a source.
        max_ids: distinct ids of all tables together that are counted exactly, at 24 bytes each and 2 MiB at most. Where
            there are more, and more rows than a source samples, only ids in the sampled rows are told apart, by counts
            that a sketch estimates, and the provenance says so. Of a vocabulary the others own a row of the first level
            with all, if that fits in the budget; else they share rows.
    Raises:
        ValueError: fractions out of range; a source for a table that does not exist, or that looks at one; a source of
            a table's own that gives its ids no context; tables that cannot share a memory; a budget that holds not one
            row of some memory.

    Example::

        builder = AllocationBuilder(tables, LMAConfig(compression=16))
        for batch in loader:
            builder.update(batch.sparse_features)
        builder.build().save("allocation.safetensors")
    """

    SHARED_FRACTION = SHARED_FRACTION
    SIGNATURE_FRACTION = 0.125
    MAX_IDS = 1 << 24

    def __init__(
        self,
        tables: Sequence[BaseEmbeddingConfig],
        config: LMAConfig,
        source: Sources = None,
        shared_fraction: float | None = None,
        signature_fraction: float = SIGNATURE_FRACTION,
        max_ids: int = MAX_IDS,
    ) -> None:
        for name, value, most in (
            ("shared_fraction", shared_fraction, 1),
            ("signature_fraction", signature_fraction, 0.99),
        ):
            if value is not None and not 0 <= value <= most:
                raise ValueError(f"{name} must be in [0, {most}], got {value}")
        check_int("max_ids", max_ids, minimum=1)
        self.config = config
        self._layouts = lay_out(tables, config)
        least = KERNEL_WIDTH * self._layouts[0].value_bytes  # no table has a row of less
        if sum(layout.budget_bytes for layout in self._layouts) < least:  # said before a pass over the data
            check_rows(self._layouts[0], 0)
        self._tables = all_tables(tables, self._layouts)
        self._slots = slots_of(tables)
        self._features = [slot.feature for slot in self._slots]
        self._table_names = [table.name for layout in self._layouts for table in layout.tables]
        self._salts = {name: table_salt(config.seed, name) for name in self._table_names}
        self.sources = _by_table(source, self._table_names)
        self.shared_fraction = shared_fraction
        self.signature_fraction = signature_fraction if any(self.sources.values()) else 0.0
        samples = [source.max_rows for source in self.sources.values() if isinstance(source, RowsSource)]
        samples = samples or [RowsMinHash.max_rows]
        self._sample = RowSample(None if None in samples else max(filter(None, samples)))
        self._frequency = IdFrequency(len(self._table_names), max_ids)
        self._vectors = {
            name: TableVectors(
                name, torch.empty(0, dtype=torch.int64), torch.empty(0, source.num_values, dtype=torch.int32)
            )
            for name, source in self.sources.items()
            if isinstance(source, SimHash)
        }

    @classmethod
    def from_vectors(
        cls,
        tables: Sequence[BaseEmbeddingConfig],
        config: LMAConfig,
        vectors: Mapping[str, tuple[Any, Any]],
        source: SimHash | Mapping[str, Source | None] = SimHash(),  # noqa: B008 (frozen)
        **options: Any,
    ) -> "AllocationBuilder":
        """A builder whose ids are similar if their vectors are: embeddings of content, or of a previous model.

        `update` it with training rows as well, so that it knows which ids are frequent: they get own rows. Without any
        row no id does.

        Args:
            vectors: for each table its ids, integer [n], and their vectors, float [n, d]; see `add_vectors`.
            source: the SimHash of these tables, or the sources of all tables by name.
            options: as in AllocationBuilder.

        Example::

            vectors = {"t_item": (item_ids, item_embeddings)}
            sources = {"t_item": SimHash(bits=8), "t_user": ContextMinHash()}
            builder = AllocationBuilder.from_vectors(tables, LMAConfig(compression=16), vectors, sources)
        """
        by_table = source if isinstance(source, Mapping) else dict.fromkeys(vectors, source)
        builder = cls(tables, config, by_table, **options)
        for table, (ids, of_ids) in vectors.items():
            builder.add_vectors(table, ids, of_ids)
        return builder

    def add_vectors(self, table: str, ids: Any, vectors: Any) -> "AllocationBuilder":
        """Give the vectors of some ids of a table whose source is SimHash.

        Args:
            table: name of the table.
            ids: integer [n], tensor, array or sequence, each id once.
            vectors: float [n, d], tensor, array or sequence, of one d for the table. Only signatures of them are kept.
        Raises:
            TypeError: ids that are not integers, or vectors that are not real numbers.
            ValueError: no such table, or one with another source; ids beyond int64; no array of numbers; shapes that do
                not fit, or another d than the table's vectors have; a vector that is zero or has NaN or infinity; an
                id that already has another vector.
        """
        source = self.sources.get(table)
        if not isinstance(source, SimHash):
            raise ValueError(
                f"vectors are for {table!r}, which has source {source!r}; give that table a SimHash, or vectors of "
                f"one of {sorted(self._vectors)}"
            )
        ids = as_ids(ids, f"the vectors of {table!r}")
        vectors = check_vectors(table, ids, vectors)
        keys, order = torch.sort(mix64(ids ^ self._salts[table]))
        signatures = source.signatures(vectors, self.config.seed)[order]
        given = TableVectors(table, keys, signatures, vectors.size(1))
        self._vectors[table] = self._vectors[table].merged(given)
        return self

    def update(self, features: KeyedJaggedTensor) -> "AllocationBuilder":
        """Add a batch of training rows.

        Args:
            features: the batch as the collection takes it, with one bag per row.
        Raises:
            TypeError: ids that are not integers.
            ValueError: a feature is missing, the batch has a batch size for each feature (VBE), lengths that do not add
                up, or ids beyond int64.
        """
        check_batch(features, self._features, is_weighted=False)
        if features.variable_stride_per_key():
            raise ValueError(
                "the KeyedJaggedTensor has a variable batch size per feature (VBE), and an allocation is built from "
                "whole rows: give the batch as it is before it is deduplicated, with one bag per row"
            )
        values = to_int64(features.values().cpu(), "the KeyedJaggedTensor")
        # (features, rows), and where each feature's ids begin and end
        lengths = features.lengths().cpu().to(torch.int64).view(len(features.keys()), features.stride())
        ends = [0, *lengths.sum(1).cumsum(0).tolist()]
        row_numbers = torch.arange(features.stride())
        keys, tables, rows = [], [], []
        for slot in self._slots:
            at = features.keys().index(slot.feature)
            index = self._table_names.index(slot.table)
            keys.append(mix64(values[ends[at] : ends[at + 1]] ^ self._salts[slot.table]))
            tables.append(torch.full((keys[-1].numel(),), index, dtype=torch.int16))
            rows.append(torch.repeat_interleave(row_numbers, lengths[at]))
            self._frequency.add(index, keys[-1].numpy())
        self._sample.add(torch.cat(keys), torch.cat(tables), torch.cat(rows), features.stride())
        return self

    def add_counts(self, table: str, ids: Any, counts: Any) -> "AllocationBuilder":
        """Add occurrences that were counted elsewhere, such as with the vocabulary, without the rows they stand in.

        Args:
            table: name of the table.
            ids: integer [n], tensor, array or sequence, each id once.
            counts: integer [n], how often each occurs, >= 1.
        Raises:
            TypeError: ids or counts that are not integers.
            ValueError: no such table; shapes that do not fit; an id twice; a count below 1.
        """
        if table not in self._salts:
            raise ValueError(f"no table {table!r}; the tables are {self._table_names}")
        keys = mix64(as_ids(ids, f"the ids of {table!r}") ^ self._salts[table])
        of_key = as_ids(counts, f"the counts of {table!r}")
        if keys.dim() != 1 or of_key.shape != keys.shape:
            raise ValueError(
                f"ids of shape {list(keys.shape)} and counts of shape {list(of_key.shape)} for table {table!r}; "
                "expected [n] and [n]"
            )
        if of_key.numel() and int(of_key.min()) < 1:
            raise ValueError(f"{table!r} has a count of {int(of_key.min())}; leave ids that do not occur out")
        keys, order = torch.sort(keys)
        if bool((keys[1:] == keys[:-1]).any()):
            raise ValueError(f"an id of table {table!r} is given twice; add its counts up")
        self._frequency.add_counts(self._table_names.index(table), keys.numpy(), of_key[order].numpy())
        return self

    def merge(self, other: "AllocationBuilder") -> "AllocationBuilder":
        """Add the rows and vectors another builder has seen. In any order and grouping, the result is the same.

        Raises ValueError if it was made for other tables or with other settings, or has other vectors for an id, or
        vectors of another length for a table.
        """
        if self._settings() != other._settings():
            mine, theirs = self._settings(), other._settings()
            changed = ", ".join(f"{k}: {mine[k]!r} and {theirs[k]!r}" for k in mine if mine[k] != theirs[k])
            raise ValueError(f"builders with other settings cannot be merged ({changed}); make them alike")
        # Nothing is taken unless everything can be.
        self._vectors = {table: mine.merged(other._vectors[table]) for table, mine in self._vectors.items()}
        self._sample.merge(other._sample)
        self._frequency.merge(other._frequency)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A builder travels between workers: sampled rows that others have replaced and uncounted ids stay behind."""
        self._sample.rows()
        self._frequency.settle()
        return self.__dict__

    def build(self) -> Allocation:
        """The allocation of the rows and vectors given so far.

        Raises ValueError if there was nothing, if a table has no id, or if the budget holds not one row of some memory.
        """
        self._frequency.settle()
        rows = self._sample.rows()
        row_of_key = rows.row_of_key()
        with_vectors = {name for name, vectors in self._vectors.items() if vectors.keys.numel()}
        if rows.hash.numel() == 0 and not with_vectors and not any(self._frequency.occurrences):
            raise ValueError("no training row was given; call update first, or use Allocation.hashed(tables, config)")
        for name, occurrences in zip(self._table_names, self._frequency.occurrences):
            if self.sources[name] is not None and not occurrences and name not in with_vectors:
                features = [slot.feature for slot in self._slots if slot.table == name]
                raise ValueError(
                    f"table {name!r} has no id in any of the {self._sample.rows_seen} rows; check that its features "
                    f"{features} are filled, or leave it out of the sources: source={{other: ..., ...}}"
                )
        parts = {name: self._ids_of_table(index, rows, row_of_key) for index, name in enumerate(self._table_names)}
        ids: dict[str, dict[str, Any]] = {name: {"seen": int((part.count > 0).sum())} for name, part in parts.items()}
        exact = self._frequency.exact or self._sample_is_whole(rows)
        memory_builder = MemoryBuilder(
            self.config,
            self._salts,
            self.sources,
            self._vectors,
            rows,
            exact,
            self.shared_fraction,
            self.signature_fraction,
        )
        memories = [memory_builder.build(layout, parts, ids) for layout in self._layouts]
        provenance = {
            "source": self._source_record(),
            "signature_fraction": self.signature_fraction,
            "shared_fraction": self.shared_fraction,
            "frequency": "counted" if exact else "sketched",
            "rows_seen": self._sample.rows_seen,
            "rows_sampled": rows.hash.numel(),
            "ids": ids,
        }
        return Allocation(self.config, self._tables, tuple(memories), provenance)

    def _ids_of_table(self, table: int, rows: Rows, row_of_key: Tensor) -> Ids:
        """All ids of a table, and who may have a signature."""
        name, source = self._table_names[table], self.sources[self._table_names[table]]
        in_table = (rows.tables == table).nonzero().squeeze(1)
        sampled, row = rows.keys[in_table], row_of_key[in_table]
        if self._frequency.exact:
            keys, count = (torch.from_numpy(array) for array in self._frequency.of_table(table))
        else:
            keys, item = torch.unique(sampled, return_inverse=True)
            in_sample = torch.zeros_like(keys).index_add_(0, item, rows.count[row])
            if self._sample_is_whole(rows):
                count = in_sample
            else:
                count = torch.maximum(torch.from_numpy(self._frequency.estimates(keys.numpy())), in_sample)
        eligible = torch.zeros_like(keys, dtype=torch.bool)
        if isinstance(source, SimHash):
            given = self._vectors[name].keys
            unseen = given[~torch.isin(given, keys)]
            keys, order = torch.sort(torch.cat([keys, unseen]))
            count = torch.cat([count, torch.zeros_like(unseen)])[order]
            eligible = torch.isin(keys, given)
        elif isinstance(source, RowsSource):
            if source.max_rows is not None:
                used = row < source.max_rows
                sampled, row = sampled[used], row[used]
            item = torch.searchsorted(keys, sampled)
            if row.numel() and int(torch.bincount(row).max()) > 1:
                # In a bag or in two features an id may stand in one row twice; its support is the rows.
                item = torch.unique(row * keys.numel() + item) % keys.numel()
            eligible = torch.bincount(item, minlength=keys.numel()) >= source.min_support
        return Ids(keys, count, torch.full_like(keys, table), eligible)

    def _sample_is_whole(self, rows: Rows) -> bool:
        return int(rows.count.sum()) == self._sample.rows_seen

    def _source_record(self) -> dict[str, Any] | None:
        """The settings of the source, or of each table's where they differ."""
        records = {name: source.to_dict() if source else None for name, source in self.sources.items()}
        one = next(iter(records.values()))
        return one if all(record == one for record in records.values()) else {"name": "by table", "tables": records}

    def _settings(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "tables": self._tables,
            "source": self.sources,
            "shared_fraction": self.shared_fraction,
            "signature_fraction": self.signature_fraction,
            "max_ids": self._frequency.max_ids,
        }


def _by_table(source: Sources, tables: Sequence[str]) -> dict[str, Source | None]:
    by_table = source if isinstance(source, Mapping) else dict.fromkeys(tables, source)
    unknown = sorted(set(by_table) - set(tables))
    if unknown:
        raise ValueError(f"source names tables {unknown}, which do not exist; the tables are {list(tables)}")
    for name, one in by_table.items():
        if one is not None and not isinstance(one, Source):
            raise TypeError(f"the source of table {name!r} is {one!r}; expected RowsMinHash(...) or another source")
        if isinstance(one, ContextMinHash):
            # One source for all tables may name one of them: that one is the context of the others.
            one.check_fields(tables, name if isinstance(source, Mapping) else None)
    return {name: by_table.get(name) for name in tables}
