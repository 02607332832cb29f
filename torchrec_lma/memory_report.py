"""Where the bytes of a collection go."""

from collections.abc import Mapping
from dataclasses import dataclass

from fbgemm_gpu.split_embedding_configs import EmbOptimType as OptimType

from torchrec_lma.allocation.artifact import Allocation
from torchrec_lma.allocation.layout import bytes_per_value
from torchrec_lma.text_table import text_table


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one memory, or of the whole collection, over all ranks together.

    Attributes:
        name: of the memory, or "total".
        rows: of the TorchRec tables, all levels together.
        weight_bytes: the tables themselves.
        optimizer_bytes: state of the fused or in-backward optimizer; 0 where the optimizer is not the collection's.
        allocation_bytes: bitmaps, index of ids and signatures; every rank holds a copy.
        full_bytes: what the uncompressed tables would take, weights only.
    """

    name: str
    rows: int
    weight_bytes: int
    optimizer_bytes: int
    allocation_bytes: int
    full_bytes: int

    @property
    def compression(self) -> float:
        """Full tables over weights and allocation."""
        return self.full_bytes / (self.weight_bytes + self.allocation_bytes)


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of each memory; the properties are totals. `print(report)` shows a table."""

    memories: tuple[MemoryUse, ...]

    @property
    def total(self) -> MemoryUse:
        columns = ("rows", "weight_bytes", "optimizer_bytes", "allocation_bytes", "full_bytes")
        return MemoryUse("total", *(sum(getattr(memory, column) for memory in self.memories) for column in columns))

    @property
    def weight_bytes(self) -> int:
        return self.total.weight_bytes

    @property
    def optimizer_bytes(self) -> int:
        return self.total.optimizer_bytes

    @property
    def allocation_bytes(self) -> int:
        return self.total.allocation_bytes

    @property
    def full_bytes(self) -> int:
        return self.total.full_bytes

    @property
    def compression(self) -> float:
        return self.total.compression

    def __str__(self) -> str:
        header = ("memory", "rows", "weights", "optimizer", "allocation", "full tables", "compression")
        lines = [
            (
                use.name,
                f"{use.rows:,}",
                *(f"{n:,} B" for n in (use.weight_bytes, use.optimizer_bytes, use.allocation_bytes, use.full_bytes)),
                f"{use.compression:.2f}x",
            )
            for use in (*self.memories, self.total)
        ]
        return text_table(header, lines)


# fp32 state tensors that FBGEMM keeps for each weight, and for each row.
_STATES = {
    OptimType.EXACT_ADAGRAD: (1, 0),
    OptimType.EXACT_ROWWISE_ADAGRAD: (0, 1),
    OptimType.ADAM: (2, 0),
    OptimType.LAMB: (2, 0),
    OptimType.PARTIAL_ROWWISE_ADAM: (1, 1),
    OptimType.PARTIAL_ROWWISE_LAMB: (1, 1),
    OptimType.LARS_SGD: (1, 0),
}


def optimizer_state_bytes(optimizer: OptimType | None, rows: int, dim: int) -> int:
    """Bytes that FBGEMM keeps beside the weights [rows, dim] of a table.

    None is an optimizer that is not fused; its state is not FBGEMM's, so it counts as 0, as does one without state.
    """
    per_weight, per_row = _STATES.get(optimizer, (0, 0))
    return 4 * rows * (per_weight * dim + per_row)


def report_memory(allocation: Allocation, optimizers: Mapping[str, OptimType | None]) -> MemoryReport:
    """The report of tables that train with the given FBGEMM optimizers, by name (None: the optimizer is not fused)."""
    value_bytes = bytes_per_value(allocation.config.weight_type)
    uses = []
    for memory in allocation.memories:
        levels = {memory.level_name(k): (level.table_rows, level.table_width) for k, level in enumerate(memory.levels)}
        use = MemoryUse(
            name=memory.name,
            rows=sum(rows for rows, _ in levels.values()),
            weight_bytes=sum(rows * width for rows, width in levels.values()) * value_bytes,
            optimizer_bytes=sum(
                optimizer_state_bytes(optimizers.get(name), rows, width) for name, (rows, width) in levels.items()
            ),
            allocation_bytes=memory.nbytes,
            full_bytes=sum(table.full_bytes for table in allocation.tables if table.name in memory.tables),
        )
        uses.append(use)
    return MemoryReport(tuple(uses))
