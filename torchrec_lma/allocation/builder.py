"""Builds an allocation from training data."""

from collections.abc import Sequence
from typing import Any

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma.allocation.allocation import Allocation, MemoryAllocation, _specs
from torchrec_lma.allocation.index import build_index
from torchrec_lma.allocation.layout import MemoryLayout, lay_out
from torchrec_lma.allocation.sample import Rows, RowSample
from torchrec_lma.allocation.sources import RowsMinHash
from torchrec_lma.config import LMAConfig
from torchrec_lma.features import check_features, feature_tables
from torchrec_lma.hashing import mix64, table_salt


class AllocationBuilder:
    """Collects training rows and builds the allocation of their ids.

    The result depends on which rows were seen, not on their order, their batches, or how they were spread over
    builders that were merged.

    Args:
        tables: the logical tables, as given to LMAEmbeddingBagCollection.
        config: the LMAConfig, as given to it.
        source: what similarity is measured on; None gives no signatures.
        dedicated_fraction: share of the budget for rows of their own for the most frequent ids, in [0, 1).
        signature_fraction: share of the budget for signatures, in [0, 1). The most frequent ids after the dedicated
            ones get them, as many as fit.

    Example::

        builder = AllocationBuilder(tables, LMAConfig(compression=16), source=RowsMinHash(power=2))
        for batch in loader:
            builder.update(batch.sparse_features)
        builder.build().save("allocation.safetensors")
    """

    DEDICATED_FRACTION = 0.25
    SIGNATURE_FRACTION = 0.125

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        config: LMAConfig,
        source: RowsMinHash | None = RowsMinHash(),  # noqa: B008 (frozen)
        dedicated_fraction: float = DEDICATED_FRACTION,
        signature_fraction: float = SIGNATURE_FRACTION,
    ) -> None:
        for name, value in (("dedicated_fraction", dedicated_fraction), ("signature_fraction", signature_fraction)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        if dedicated_fraction + signature_fraction >= 1:
            raise ValueError(
                f"dedicated_fraction={dedicated_fraction} and signature_fraction={signature_fraction} leave nothing of "
                "the budget to share; make their sum less than 1"
            )
        self.config = config
        self.source = source
        self.dedicated_fraction = dedicated_fraction
        self.signature_fraction = signature_fraction if source is not None else 0.0
        self._layouts = lay_out(tables, config)
        self._table_of_feature = feature_tables(tables)
        self._table_names = [table.name for layout in self._layouts for table in layout.tables]
        self._salts = {name: table_salt(config.seed, name) for name in self._table_names}
        self._sample = RowSample(source.max_rows if source is not None else RowsMinHash.max_rows)

    def update(self, features: KeyedJaggedTensor) -> "AllocationBuilder":
        """Add a batch of training rows.

        Args:
            features: the batch as the collection takes it, every feature with one bag per row.
        Raises:
            ValueError: a feature is missing or unknown, or batch sizes differ between features.
        """
        check_features(features, self._table_of_feature)
        keys, tables, rows = [], [], []
        for feature, jagged in features.to_dict().items():
            table = self._table_of_feature[feature]
            ids = jagged.values().cpu().to(torch.int64)
            keys.append(mix64(ids ^ self._salts[table]))
            tables.append(torch.full_like(ids, self._table_names.index(table), dtype=torch.int16))
            lengths = jagged.lengths().cpu().to(torch.int64)
            rows.append(torch.repeat_interleave(torch.arange(lengths.numel()), lengths))
        self._sample.add(torch.cat(keys), torch.cat(tables), torch.cat(rows), features.stride())
        return self

    def merge(self, other: "AllocationBuilder") -> "AllocationBuilder":
        """Add the rows another builder has seen.

        Raises ValueError if it was made for other tables or with other settings.
        """
        if self._settings() != other._settings():
            mine, theirs = self._settings(), other._settings()
            changed = ", ".join(f"{k}: {mine[k]!r} and {theirs[k]!r}" for k in mine if mine[k] != theirs[k])
            raise ValueError(f"builders with other settings cannot be merged ({changed}); make them alike")
        self._sample.merge(other._sample)
        return self

    def build(self) -> Allocation:
        """The allocation of the rows seen so far.

        Raises ValueError if there was no row, or if the budget holds not one row of some memory.
        """
        rows = self._sample.rows()
        if rows.hash.numel() == 0:
            raise ValueError("no training row was given; call update first, or use Allocation.hashed(tables, config)")
        memories, ids = [], {}
        for layout in self._layouts:
            memory, counts = self._build_memory(layout, rows)
            memories.append(memory)
            ids[layout.name] = counts
        provenance = {
            "source": self.source.to_dict() if self.source is not None else None,
            "dedicated_fraction": self.dedicated_fraction,
            "signature_fraction": self.signature_fraction,
            "rows_seen": self._sample.rows_seen,
            "rows_sampled": rows.hash.numel(),
            "ids": ids,
        }
        return Allocation(self.config, _specs(self._layouts), tuple(memories), provenance)

    def _build_memory(self, layout: MemoryLayout, rows: Rows) -> tuple[MemoryAllocation, dict[str, dict[str, int]]]:
        members = [self._table_names.index(table.name) for table in layout.tables]
        in_memory = torch.isin(rows.tables, torch.tensor(members, dtype=rows.tables.dtype))
        keys, item = torch.unique(rows.keys[in_memory], return_inverse=True)  # (V) distinct ids, (N) which one
        row = rows.row_of_key()[in_memory]
        frequency = torch.zeros_like(keys).index_add_(0, item, rows.count[row])
        # An id may stand in one row twice, in a bag or in two features; its support is the rows.
        pairs = torch.unique(row * keys.numel() + item)
        support = torch.bincount(pairs % keys.numel(), minlength=keys.numel())
        table_of = torch.zeros(keys.numel(), dtype=rows.tables.dtype).scatter_(0, item, rows.tables[in_memory])
        # Descending frequency; ids of equal frequency in the order of their keys, which no input order changes.
        by_frequency = torch.sort(frequency, descending=True, stable=True).indices

        n_dedicated = _how_many(self.dedicated_fraction * layout.budget_bytes, layout.row_bytes, keys.numel())
        dedicated, by_frequency = by_frequency[:n_dedicated], by_frequency[n_dedicated:]
        tensors = {}
        if n_dedicated:
            tensors["dedicated_low"], tensors["dedicated_starts"], _ = build_index(keys[dedicated])

        with_signature = by_frequency[:0]
        if self.source is not None:
            supported = by_frequency[support[by_frequency] >= self.source.min_support]
            num_values = min(self.source.num_values, layout.n_chunks)
            n_signatures = _how_many(self.signature_fraction * layout.budget_bytes, 4 * num_values, supported.numel())
            with_signature = supported[:n_signatures]
            if n_signatures:
                low, starts, order = build_index(keys[with_signature])
                with_signature = with_signature[order]
                slot = torch.full_like(keys, -1)
                slot[with_signature] = torch.arange(with_signature.numel())
                item_of_key = torch.full_like(rows.keys, -1)
                item_of_key[in_memory] = slot[item]
                tensors |= {
                    "signature_low": low,
                    "signature_starts": starts,
                    "signatures": self.source.signatures(
                        rows, item_of_key, with_signature.numel(), num_values, self.config.seed
                    ),
                }
        allocation_bytes = sum(tensor.nbytes for tensor in tensors.values())
        memory = MemoryAllocation(
            name=layout.name,
            dim=layout.dim,
            chunk_dim=layout.chunk_dim,
            rows=layout.rows_beside(allocation_bytes),
            tables=tuple(table.name for table in layout.tables),
            within_table=self.source is not None and self.source.within_table,
            **tensors,
        )
        if memory.rows <= memory.dedicated_rows:
            raise ValueError(
                f"{layout.name!r} has {memory.rows} rows in its budget of {layout.budget_bytes} bytes, all of them "
                "dedicated; lower dedicated_fraction or the compression so that one row is left to share"
            )
        return memory, {
            self._table_names[table]: {
                "seen": int((table_of == table).sum()),
                "dedicated": int((table_of[dedicated] == table).sum()),
                "with_signature": int((table_of[with_signature] == table).sum()),
            }
            for table in members
        }

    def _settings(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "tables": _specs(self._layouts),
            "source": self.source,
            "dedicated_fraction": self.dedicated_fraction,
            "signature_fraction": self.signature_fraction,
        }


def _how_many(budget_bytes: float, bytes_each: int, at_most: int) -> int:
    """How many ids fit in a budget, with their index: 4 bytes a key, and up to 2 for its bucket's start."""
    return min(at_most, int(budget_bytes // (bytes_each + 6)))
