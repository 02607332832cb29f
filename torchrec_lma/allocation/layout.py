"""Which memories a set of logical tables needs, how many bytes each may use, and how columns are cut into levels."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, DataType, data_type_to_dtype

from torchrec_lma.config import WEIGHT_TYPES, LMAConfig

# TorchRec and FBGEMM number the rows of a table in int32 in several places.
MAX_ROWS = 2**31 - 1
# FBGEMM's fused kernels take rows of a multiple of 4 columns. A level of 1 or 2 columns is stored with several of its
# rows in one row of 4: see `Level.pack`.
KERNEL_WIDTH = 4


@dataclass(frozen=True)
class TableSpec:
    """What the allocation knows of a logical table.

    Attributes:
        name, num_embeddings, embedding_dim: as in its EmbeddingBagConfig or EmbeddingConfig.
        data_type: of the table as declared, a DataType name: what the full size is counted in.
        raw_ids: its ids are any 64-bit integers; else a vocabulary, 0 <= id < num_embeddings.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    data_type: str
    raw_ids: bool

    @property
    def full_bytes(self) -> int:
        """Bytes of the uncompressed table."""
        return self.num_embeddings * self.embedding_dim * bytes_per_value(DataType[self.data_type])


@dataclass(frozen=True)
class Level:
    """A block of columns of a memory with its own number of rows: one TorchRec table.

    Attributes:
        width: columns of an id's row.
        own_rows: rows that one id each has for itself, the first ones.
        shared_rows: rows that the other ids share. With none of these, ids without an own row are absent.
    """

    width: int
    own_rows: int
    shared_rows: int

    @property
    def rows(self) -> int:
        return self.own_rows + self.shared_rows

    @property
    def pack(self) -> int:
        """How many rows lie side by side in one row of the TorchRec table, so that a fused kernel takes its width.

        Row r is in columns [r % pack * width, ...) of table row r // pack.
        """
        return max(1, KERNEL_WIDTH // self.width)

    @property
    def table_rows(self) -> int:
        return -(-self.rows // self.pack)

    @property
    def table_width(self) -> int:
        return self.width * self.pack


@dataclass(frozen=True)
class MemoryLayout:
    """The logical tables that share one memory, and its budget (weights and allocation) in bytes."""

    tables: tuple[TableSpec, ...]
    budget_bytes: int
    value_bytes: int
    widths: tuple[int, ...] | None

    @property
    def name(self) -> str:
        """Begins with the name of a logical table, which is unique in a model, and so is this."""
        return f"{self.tables[0].name}_lma{self.dim}"

    @property
    def dim(self) -> int:
        return self.tables[0].embedding_dim

    @property
    def raw_ids(self) -> bool:
        return self.tables[0].raw_ids

    @property
    def full_bytes(self) -> int:
        """Bytes of the uncompressed tables."""
        return sum(table.full_bytes for table in self.tables)


def bytes_per_value(data_type: DataType) -> int:
    return data_type_to_dtype(data_type).itemsize


def kernel_takes(width: int) -> bool:
    """Whether a level can have this width: a multiple of 4, or 2 or 1, which are packed into rows of 4."""
    return width % KERNEL_WIDTH == 0 or width in (1, 2)


def padding_bytes(widths: Sequence[int], value_bytes: int) -> int:
    """The most that levels of these widths take beyond their rows: a packed table is filled up to a whole row."""
    return sum(KERNEL_WIDTH - width for width in widths if width < KERNEL_WIDTH) * value_bytes


def default_widths(dim: int, first: int) -> tuple[int, ...]:
    """Level widths that add up to `dim`: from `first` on twice the columns with each.

    Of 64 columns from 8: 8, 8, 16, 32; from 1: 1, 1, 2, 4, 8, 16, 32. All are widths that a kernel takes. A level
    more is a look-up more for the ids that have it.
    """
    widths: list[int] = []
    left = dim
    while left:
        width = min(sum(widths) or first, left)
        if width > KERNEL_WIDTH:
            width -= width % KERNEL_WIDTH
        elif width == 3:
            width = 2
        widths.append(width)
        left -= width
    return tuple(widths)


def first_widths(dim: int, most: float) -> list[int]:
    """What the first level's columns can be, widest first: up to `most` and `dim`, and at least the narrowest."""
    widths = [width for width in range(1, dim + 1) if kernel_takes(width) and width <= most]
    return widths[::-1] or [1]


def shared_levels(layout: MemoryLayout, budget: int) -> tuple[Level, ...]:
    """Levels without own rows, all with as many shared ones as fit in `budget` bytes.

    Without widths one level as wide as the dim, or as few as a kernel takes: the hashing trick.
    """
    widths = layout.widths or default_widths(layout.dim, layout.dim)
    rows = (budget - padding_bytes(widths, layout.value_bytes)) // (layout.dim * layout.value_bytes)
    return tuple(Level(width, 0, check_rows(layout, rows)) for width in widths)


def check_rows(layout: MemoryLayout, rows: int) -> int:
    """`rows`. Raises ValueError where a level of a memory cannot have as many."""
    if rows < 1:
        raise ValueError(
            f"the budget of {layout.name!r} is {layout.budget_bytes} bytes, in which not one row of {layout.dim} "
            f"columns of {layout.value_bytes} bytes fits beside its allocation; lower the compression or raise "
            "memory_bytes"
        )
    if rows > MAX_ROWS:
        raise ValueError(
            f"a level of {layout.name!r} would have {rows} rows, the most is {MAX_ROWS}; raise the compression, or "
            "spread the tables over several collections"
        )
    return rows


def lay_out(tables: Sequence[BaseEmbeddingConfig], config: LMAConfig) -> tuple[MemoryLayout, ...]:
    """Group tables into memories and share the budget between them in proportion to their full bytes.

    Tables of one dim share a memory; raw ids and vocabularies do not, since their rows are found in different ways.

    Raises:
        ValueError: no table; a name twice; a size below 1; a data type that cannot be trained; widths that do not add
            up to a dim, or that no kernel takes; `raw_ids` of a table that does not exist.
    """
    if not tables:
        raise ValueError("tables is empty; give at least one EmbeddingBagConfig or EmbeddingConfig")
    names: set[str] = set()
    groups: dict[tuple[int, bool], list[TableSpec]] = {}
    for table in tables:
        _check_table(table, names)
        names.add(table.name)
        raw_ids = config.raw_ids if isinstance(config.raw_ids, bool) else table.name in config.raw_ids
        spec = TableSpec(table.name, table.num_embeddings, table.embedding_dim, table.data_type.name, raw_ids)
        groups.setdefault((spec.embedding_dim, raw_ids), []).append(spec)
    if not isinstance(config.raw_ids, bool) and not names.issuperset(config.raw_ids):
        unknown = sorted(set(config.raw_ids) - names)
        raise ValueError(f"raw_ids names tables {unknown}, which do not exist; the tables are {sorted(names)}")

    full_bytes = {key: sum(spec.full_bytes for spec in specs) for key, specs in groups.items()}
    total = sum(full_bytes.values())
    layouts = []
    for (dim, raw_ids), specs in groups.items():
        if config.memory_bytes is not None:
            budget = config.memory_bytes * full_bytes[dim, raw_ids] // total
        else:
            assert config.compression is not None
            budget = int(full_bytes[dim, raw_ids] / config.compression)
        widths = config.widths_of(dim)
        for width in widths or ():
            if not kernel_takes(width):
                raise ValueError(
                    f"a level of width {width} fits no kernel: fused kernels take multiples of {KERNEL_WIDTH}, and "
                    f"levels of 1 and 2 columns are packed into rows of {KERNEL_WIDTH}; change widths={widths}"
                )
        layouts.append(MemoryLayout(tuple(specs), budget, bytes_per_value(config.weight_type), widths))
    return tuple(layouts)


def _check_table(table: BaseEmbeddingConfig, names: set[str]) -> None:
    if not isinstance(table, BaseEmbeddingConfig):
        raise TypeError(f"tables must be EmbeddingBagConfig or EmbeddingConfig, got a {type(table).__name__}: {table}")
    if not table.name or table.name in names:
        raise ValueError(f"table name {table.name!r} is empty or given twice; every table needs a name of its own")
    # The collection holds tables as torch modules by name, and makes keys of "/": said before a pass over the data.
    if "." in table.name or "/" in table.name or hasattr(nn.ModuleDict(), table.name):
        raise ValueError(
            f"table name {table.name!r} cannot name a torch module: it has a '.' or '/', or torch.nn.ModuleDict has an "
            "attribute of that name; rename the table, features may have any name"
        )
    if table.num_embeddings < 1 or table.embedding_dim < 1:
        raise ValueError(
            f"table {table.name!r} has num_embeddings={table.num_embeddings} and "
            f"embedding_dim={table.embedding_dim}; both must be at least 1"
        )
    if table.data_type not in WEIGHT_TYPES:
        raise ValueError(
            f"table {table.name!r} has data_type {table.data_type}; LMA tables stand for tables of "
            f"{', '.join(t.name for t in WEIGHT_TYPES)} (quantize after training)"
        )
