"""Where the bytes of a collection go."""

from collections.abc import Mapping
from dataclasses import dataclass

from fbgemm_gpu.split_embedding_configs import EmbOptimType as OptimType

from torchrec_lma.allocation import Allocation


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one memory, or of the whole collection, over all ranks together.

    Attributes:
        name: of the memory, or "total".
        rows: rows of the memory.
        weight_bytes: the memory itself.
        optimizer_bytes: state of the fused or in-backward optimizer; 0 where the optimizer is not the collection's.
        allocation_bytes: signatures and index of ids; a rank that looks up the memory holds a copy.
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
        lines = [header] + [
            (
                use.name,
                f"{use.rows:,}",
                *(f"{n:,} B" for n in (use.weight_bytes, use.optimizer_bytes, use.allocation_bytes, use.full_bytes)),
                f"{use.compression:.2f}x",
            )
            for use in (*self.memories, self.total)
        ]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        return "\n".join(
            "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
            for line in lines
        )


# fp32 state tensors that FBGEMM keeps for each weight, and for each physical row (here: for each chunk of a row).
_STATES = {
    OptimType.EXACT_ADAGRAD: (1, 0),
    OptimType.EXACT_ROWWISE_ADAGRAD: (0, 1),
    OptimType.ADAM: (2, 0),
    OptimType.LAMB: (2, 0),
    OptimType.PARTIAL_ROWWISE_ADAM: (1, 1),
    OptimType.PARTIAL_ROWWISE_LAMB: (1, 1),
    OptimType.LARS_SGD: (1, 0),
}


def report_memory(allocation: Allocation, optimizers: Mapping[str, OptimType | None]) -> MemoryReport:
    """The report of memories that train with the given FBGEMM optimizers (None: the optimizer is not fused)."""
    uses = []
    for memory in allocation.memories:
        tables = [table for table in allocation.tables if table.name in memory.tables]
        per_weight, per_chunk = _STATES.get(optimizers.get(memory.name), (0, 0))
        uses.append(
            MemoryUse(
                name=memory.name,
                rows=memory.rows,
                weight_bytes=memory.rows * tables[0].row_bytes,
                optimizer_bytes=4 * memory.rows * (per_weight * memory.dim + per_chunk * memory.n_chunks),
                allocation_bytes=memory.nbytes,
                full_bytes=sum(table.full_bytes for table in tables),
            )
        )
    return MemoryReport(tuple(uses))
