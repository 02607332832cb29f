"""memory_report against bytes counted by hand."""

import pytest
import torch
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma import AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection
from torchrec_lma.allocation import RowsMinHash


def table(name: str, num_embeddings: int, dim: int, data_type: DataType = DataType.FP32) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=name, num_embeddings=num_embeddings, embedding_dim=dim, feature_names=[f"f_{name}"], data_type=data_type
    )


# Full: (1000 + 600) * 32 * 4 = 204,800 bytes of dim 32 and 500 * 8 * 4 = 16,000 of dim 8.
TABLES = [table("user", 1000, 32), table("item", 600, 32), table("day", 500, 8)]
CONFIG = LMAConfig(compression=16, chunk_dim=4)
# 204,800 / 16 = 12,800 bytes are 100 rows of 128; 16,000 / 16 = 1,000 bytes are 31 rows of 32 (and 8 bytes over).
ROWS_32, ROWS_8 = 100, 31


def collection() -> LMAEmbeddingBagCollection:
    return LMAEmbeddingBagCollection(TABLES, CONFIG)


def test_weights_and_full_tables_of_every_memory() -> None:
    report = collection().memory_report()
    assert [(m.name, m.rows, m.weight_bytes, m.full_bytes) for m in report.memories] == [
        ("memory_32", ROWS_32, 12_800, 204_800),
        ("memory_8", ROWS_8, 31 * 32, 16_000),
    ]
    assert report.weight_bytes == 12_800 + 992
    assert report.full_bytes == 220_800
    assert report.allocation_bytes == 0 and report.optimizer_bytes == 0
    assert report.compression == pytest.approx(220_800 / 13_792)
    assert report.memories[0].compression == 16.0


def test_weight_bytes_are_those_of_the_parameters() -> None:
    ebc = collection()
    assert ebc.memory_report().weight_bytes == sum(p.numel() * p.element_size() for p in ebc.parameters())


@pytest.mark.parametrize("data_type", [DataType.FP16, DataType.BF16])
def test_half_precision_weights_count_two_bytes(data_type: DataType) -> None:
    ebc = LMAEmbeddingBagCollection([table("user", 1000, 32, data_type)], CONFIG)
    report = ebc.memory_report()
    assert report.full_bytes == 1000 * 32 * 2
    assert report.weight_bytes == 62 * 32 * 2  # 64,000 / 16 = 4,000 bytes are 62 rows of 64
    assert report.weight_bytes == sum(p.numel() * p.element_size() for p in ebc.parameters())


@pytest.mark.parametrize(
    "optimizer, bytes_32, bytes_8",
    [
        (torch.optim.SGD, 0, 0),
        (torch.optim.Adagrad, 4 * ROWS_32 * 32, 4 * ROWS_8 * 8),  # one fp32 for each weight
        (RowWiseAdagrad, 4 * ROWS_32 * 8, 4 * ROWS_8 * 2),  # one fp32 for each chunk of a row
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


def test_each_memory_counts_its_own_optimizer() -> None:
    ebc = collection()
    apply_optimizer_in_backward(RowWiseAdagrad, ebc.embedding_bags["memory_8"].parameters(), {"lr": 0.1})
    assert [m.optimizer_bytes for m in ebc.memory_report().memories] == [0, 4 * ROWS_8 * 2]


def test_optimizer_state_is_fp32_for_half_precision_weights() -> None:
    ebc = LMAEmbeddingBagCollection([table("user", 1000, 32, DataType.FP16)], CONFIG)
    apply_optimizer_in_backward(RowWiseAdagrad, ebc.parameters(), {"lr": 0.1})
    assert ebc.memory_report().optimizer_bytes == 4 * 62 * 8


def test_allocation_bytes_are_inside_the_budget() -> None:
    tables = [table("user", 4000, 32)]  # 512,000 bytes in full, 32,000 at 16x
    builder = AllocationBuilder(
        tables,
        CONFIG,
        source=RowsMinHash(num_values=2, min_support=1),
        dedicated_fraction=0.25,
        signature_fraction=0.125,
    )
    ids = torch.arange(4000)
    features = KeyedJaggedTensor(keys=["f_user"], values=ids, lengths=torch.ones_like(ids))
    report = LMAEmbeddingBagCollection(tables, CONFIG, builder.update(features).build()).memory_report()
    # A dedicated id is budgeted 128 bytes for its row and 6 for the index, a signature 2 * 4 and 6.
    dedicated, signatures = int(8_000 // 134), int(4_000 // 14)
    # The index: 4 bytes a key, and 4 for the start of each bucket (a power of two, 2 to 4 keys each) and the last end.
    allocation_bytes = 4 * dedicated + 4 * (16 + 1) + (4 + 8) * signatures + 4 * (128 + 1)
    assert report.allocation_bytes == allocation_bytes
    assert report.weight_bytes == (32_000 - allocation_bytes) // 128 * 128
    assert report.weight_bytes + report.allocation_bytes <= 32_000
    assert report.compression == pytest.approx(512_000 / (report.weight_bytes + allocation_bytes))
    assert report.compression >= 16


def test_report_of_a_collection_on_meta_is_the_same() -> None:
    on_meta = LMAEmbeddingBagCollection(TABLES, CONFIG, device=torch.device("meta"))
    assert on_meta.memory_report() == collection().memory_report()


def test_report_prints_as_a_table() -> None:
    ebc = collection()
    apply_optimizer_in_backward(RowWiseAdagrad, ebc.parameters(), {"lr": 0.1})
    header, *lines = str(ebc.memory_report()).splitlines()
    assert header.split() == ["memory", "rows", "weights", "optimizer", "allocation", "full", "tables", "compression"]
    assert [line.replace(" B", "").split() for line in lines] == [
        ["memory_32", "100", "12,800", "3,200", "0", "204,800", "16.00x"],
        ["memory_8", "31", "992", "248", "0", "16,000", "16.13x"],
        ["total", "131", "13,792", "3,448", "0", "220,800", "16.01x"],
    ]
    assert len({len(line) for line in (header, *lines)}) == 1  # aligned
