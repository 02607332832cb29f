"""Which memories a set of logical tables needs, and how many bytes each may use."""

from collections.abc import Sequence
from dataclasses import dataclass

from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, data_type_to_dtype

from torchrec_lma.config import LMAConfig

WEIGHT_TYPES = (DataType.FP32, DataType.FP16, DataType.BF16)
# An address is computed as int64 and TBE takes physical row ids of rows * n_chunks; both stay far from overflow.
MAX_ROWS = 2**31 - 1


@dataclass(frozen=True)
class TableSpec:
    """What the allocation knows of a logical table."""

    name: str
    num_embeddings: int
    embedding_dim: int
    data_type: str  # a DataType name: FP32, FP16, BF16

    @property
    def row_bytes(self) -> int:
        return self.embedding_dim * data_type_to_dtype(DataType[self.data_type]).itemsize

    @property
    def full_bytes(self) -> int:
        """Bytes of the uncompressed table."""
        return self.num_embeddings * self.row_bytes


@dataclass(frozen=True)
class MemoryLayout:
    """The logical tables that share one memory, and its budget (weights and allocation) in bytes."""

    name: str
    tables: tuple[TableSpec, ...]
    chunk_dim: int
    budget_bytes: int

    @property
    def dim(self) -> int:
        return self.tables[0].embedding_dim

    @property
    def n_chunks(self) -> int:
        return self.dim // self.chunk_dim

    @property
    def row_bytes(self) -> int:
        return self.tables[0].row_bytes

    @property
    def full_bytes(self) -> int:
        return sum(table.full_bytes for table in self.tables)

    def rows_beside(self, allocation_bytes: int) -> int:
        """How many rows fit in the budget beside an allocation.

        Raises ValueError when not one does.
        """
        rows = (self.budget_bytes - allocation_bytes) // self.row_bytes
        if rows < 1:
            raise ValueError(
                f"the budget of {self.name!r} is {self.budget_bytes} bytes; its allocation takes {allocation_bytes} "
                f"and one row of dim {self.dim} takes {self.row_bytes}, which does not fit. Lower the compression or "
                "raise memory_bytes; for a smaller allocation lower signature_fraction or dedicated_fraction"
            )
        if rows > MAX_ROWS:
            raise ValueError(
                f"{self.name!r} would have {rows} rows, the most is {MAX_ROWS}; raise the compression or give some of "
                f"its tables another embedding_dim (each dim has a memory of its own)"
            )
        return rows


def lay_out(tables: Sequence[EmbeddingBagConfig], config: LMAConfig) -> tuple[MemoryLayout, ...]:
    """Group tables by dim into memories and share the budget between them in proportion to their full bytes.

    Raises:
        ValueError: no table; a name twice; `chunk_dim` that does not divide a dim; tables of one memory with different
            pooling or data type; a data type that cannot be trained.
    """
    if not tables:
        raise ValueError("tables is empty; give at least one EmbeddingBagConfig")
    by_dim: dict[int, list[EmbeddingBagConfig]] = {}
    names: set[str] = set()
    for table in tables:
        if not table.name or table.name in names:
            raise ValueError(f"table name {table.name!r} is empty or given twice; every table needs a name of its own")
        names.add(table.name)
        if table.num_embeddings < 1 or table.embedding_dim < 1:
            raise ValueError(
                f"table {table.name!r} has num_embeddings={table.num_embeddings} and "
                f"embedding_dim={table.embedding_dim}; both must be at least 1"
            )
        if table.embedding_dim % config.chunk_dim != 0:
            raise ValueError(
                f"chunk_dim={config.chunk_dim} does not divide embedding_dim={table.embedding_dim} of table "
                f"{table.name!r}; choose a chunk_dim that divides every table's dim"
            )
        if table.data_type not in WEIGHT_TYPES:
            raise ValueError(
                f"table {table.name!r} has data_type {table.data_type}; LMA tables train in "
                f"{', '.join(t.name for t in WEIGHT_TYPES)} (quantize after training)"
            )
        by_dim.setdefault(table.embedding_dim, []).append(table)

    for dim, members in by_dim.items():
        for field in ("pooling", "data_type"):
            values = {getattr(table, field) for table in members}
            if len(values) > 1:
                described = ", ".join(f"{table.name}: {getattr(table, field).name}" for table in members)
                raise ValueError(
                    f"tables of dim {dim} share one memory and so one {field}, got {described}; make them equal or "
                    "put the others in an LMAEmbeddingBagCollection of their own"
                )

    specs: dict[int, tuple[TableSpec, ...]] = {
        dim: tuple(
            TableSpec(table.name, table.num_embeddings, table.embedding_dim, table.data_type.name) for table in members
        )
        for dim, members in by_dim.items()
    }
    full_bytes = {dim: sum(table.full_bytes for table in spec) for dim, spec in specs.items()}
    total = sum(full_bytes.values())
    layouts = []
    for dim, spec in specs.items():
        if config.memory_bytes is not None:
            budget = config.memory_bytes * full_bytes[dim] // total
        else:
            assert config.compression is not None
            budget = int(full_bytes[dim] / config.compression)
        layouts.append(MemoryLayout(f"memory_{dim}", spec, config.chunk_dim, budget))
    return tuple(layouts)
