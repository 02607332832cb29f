"""memory_report against bytes counted by hand."""

from dataclasses import replace

import pytest
import torch
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection


def table(name: str, num_embeddings: int, dim: int, data_type: DataType = DataType.FP32) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=name, num_embeddings=num_embeddings, embedding_dim=dim, feature_names=[f"f_{name}"], data_type=data_type
    )


# Full: (1000 + 600) * 32 * 4 = 204,800 bytes of dim 32 and 500 * 8 * 4 = 16,000 of dim 8.
TABLES = [table("user", 1000, 32), table("item", 600, 32), table("day", 500, 8)]
CONFIG = LMAConfig(compression=16, data_type="FP32")
# 204,800 / 16 = 12,800 bytes are 100 rows of 128; 16,000 / 16 = 1,000 bytes are 31 rows of 32 (and 8 bytes over).
ROWS_32, ROWS_8 = 100, 31


def collection(config: LMAConfig = CONFIG) -> LMAEmbeddingBagCollection:
    return LMAEmbeddingBagCollection(TABLES, Allocation.hashed(TABLES, config))


def learned() -> LMAEmbeddingBagCollection:
    """A level of two columns (packed), one of four with a bitmap, and one that nobody owns."""
    tables = [table("user", 1000, 8)]
    widths, ids = (2, 4, 2), torch.arange(1000)
    # 1000 + 1 rows of 4 bytes, filled up to 501 of 8; a bitmap of 1000 ids; 100 rows of 8.
    config = LMAConfig(memory_bytes=501 * 8 + 32 * 8 + 100 * 8, widths=widths, skew=0)
    builder = AllocationBuilder(tables, config)
    allocation = builder.update(
        # User 5 occurs twice, so that they are not in order of frequency.
        KeyedJaggedTensor(["f_user"], torch.cat([ids, torch.tensor([5])]), lengths=1 + (ids == 999).long())
    ).build()
    (memory,) = allocation.memories
    assert [(level.own_rows, level.shared_rows) for level in memory.levels] == [(1000, 1), (100, 0), (0, 0)]
    return LMAEmbeddingBagCollection(tables, allocation)


def test_weights_and_full_tables_of_every_memory() -> None:
    report = collection().memory_report()
    assert [(m.name, m.rows, m.weight_bytes, m.full_bytes) for m in report.memories] == [
        ("user_lma32", ROWS_32, 12_800, 204_800),
        ("day_lma8", ROWS_8, 31 * 32, 16_000),
    ]
    assert report.weight_bytes == 12_800 + 992
    assert report.full_bytes == 220_800
    assert report.allocation_bytes == 0 and report.optimizer_bytes == 0
    assert report.compression == pytest.approx(220_800 / 13_792)
    assert report.memories[0].compression == 16.0


def test_levels_and_bitmaps() -> None:
    ebc = learned()
    apply_optimizer_in_backward(RowWiseAdagrad, ebc.parameters(), {"lr": 0.1})
    report = ebc.memory_report()
    # One fp32 of the optimizer for each row of a TorchRec table.
    assert [(m.name, m.rows, m.weight_bytes, m.optimizer_bytes, m.allocation_bytes, m.full_bytes)
            for m in report.memories] == [
        ("user_lma8", 601, 501 * 8 + 100 * 8, 601 * 4, 32 * 8, 32_000),
    ]  # fmt: skip
    assert report.weight_bytes + report.allocation_bytes <= ebc.config.memory_bytes
    assert report.weight_bytes == sum(p.numel() * p.element_size() for p in ebc.parameters())


@pytest.mark.parametrize("data_type", ["FP16", "BF16", "FP32"])
def test_weight_bytes_are_those_of_the_parameters(data_type: str) -> None:
    ebc = collection(replace(CONFIG, data_type=data_type, widths={32: (1, 2, 1, 28), 8: (2, 2, 4)}))
    report = ebc.memory_report()
    assert report.weight_bytes == sum(p.numel() * p.element_size() for p in ebc.parameters())
    assert report.full_bytes == 220_800


def test_full_bytes_are_of_the_tables_as_declared() -> None:
    tables = [table("user", 1000, 32, DataType.FP16)]
    ebc = LMAEmbeddingBagCollection(tables, Allocation.hashed(tables, LMAConfig(compression=16)))
    report = ebc.memory_report()
    assert report.full_bytes == 1000 * 32 * 2
    assert report.weight_bytes == 62 * 32 * 2  # 64,000 / 16 = 4,000 bytes are 62 rows of 64


@pytest.mark.parametrize(
    "optimizer, bytes_32, bytes_8",
    [
        (torch.optim.SGD, 0, 0),
        (torch.optim.Adagrad, 4 * ROWS_32 * 32, 4 * ROWS_8 * 8),  # one fp32 for each weight
        (RowWiseAdagrad, 4 * ROWS_32, 4 * ROWS_8),  # one fp32 for each row
        (torch.optim.Adam, 2 * 4 * ROWS_32 * 32, 2 * 4 * ROWS_8 * 8),  # two fp32 for each weight
    ],
)
def test_state_of_an_optimizer_in_backward(optimizer: type, bytes_32: int, bytes_8: int) -> None:
    ebc = collection()
    apply_optimizer_in_backward(optimizer, ebc.parameters(), {"lr": 0.1})
    report = ebc.memory_report()
    assert [m.optimizer_bytes for m in report.memories] == [bytes_32, bytes_8]
    assert report.optimizer_bytes == bytes_32 + bytes_8
    assert report.weight_bytes == 13_792  # as without


def test_each_table_counts_its_own_optimizer() -> None:
    ebc = collection()
    apply_optimizer_in_backward(RowWiseAdagrad, ebc.levels.embedding_bags["day_lma8_level_0"].parameters(), {"lr": 0.1})
    assert [m.optimizer_bytes for m in ebc.memory_report().memories] == [0, 4 * ROWS_8]


def test_optimizer_state_is_fp32_for_half_precision_weights() -> None:
    ebc = collection(LMAConfig(compression=16))
    apply_optimizer_in_backward(RowWiseAdagrad, ebc.parameters(), {"lr": 0.1})
    assert ebc.memory_report().optimizer_bytes == 4 * (200 + 62)


def test_report_of_a_collection_on_meta_is_the_same() -> None:
    allocation = Allocation.hashed(TABLES, CONFIG)
    on_meta = LMAEmbeddingBagCollection(TABLES, allocation, device=torch.device("meta"))
    assert on_meta.memory_report() == collection().memory_report()


def test_report_prints_as_a_table() -> None:
    ebc = collection()
    apply_optimizer_in_backward(RowWiseAdagrad, ebc.parameters(), {"lr": 0.1})
    header, *lines = str(ebc.memory_report()).splitlines()
    assert header.split() == ["memory", "rows", "weights", "optimizer", "allocation", "full", "tables", "compression"]
    assert [line.replace(" B", "").split() for line in lines] == [
        ["user_lma32", "100", "12,800", "400", "0", "204,800", "16.00x"],
        ["day_lma8", "31", "992", "124", "0", "16,000", "16.13x"],
        ["total", "131", "13,792", "524", "0", "220,800", "16.01x"],
    ]
    assert len({len(line) for line in (header, *lines)}) == 1  # aligned
