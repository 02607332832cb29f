"""Quantized LMA tables against their stored bytes, decoded and pooled by hand; scripts against eager modules."""

import copy
import functools

import numpy as np
import pytest
import test_modules
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_reference import decode, largest_error
from test_modules import FEATURES, TABLE_OF
from torch import Tensor, nn
from torchrec.inference.modules import quantize_inference_model
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection
from torchrec_lma.allocation import RowsMinHash
from torchrec_lma.inference import (
    DTYPES,
    QUANTIZATION_MAPPING,
    QuantLMAEmbeddingBagCollection,
    chunk_bytes,
    quantize,
    script,
)
from torchrec_lma.inference.rows import finer_dtypes

CONFIG = LMAConfig(compression=6, chunk_dim=8, seed=2)
BATCH_SIZE = 5
make_tables = functools.partial(test_modules.make_tables, dims=(16, 32))


def make_batch(
    is_weighted: bool = False, seed: int = 0, order: list[str] = FEATURES, **kwargs: int
) -> KeyedJaggedTensor:
    """Bags of 0 to 3 ids; raw ids of any size."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(order) * BATCH_SIZE,), generator=generator, dtype=torch.int32)
    ids = int(lengths.sum())
    values = torch.randint(kwargs.get("low", -(2**62)), kwargs.get("high", 2**62), (ids,), generator=generator)
    values[::3] = torch.arange(len(values[::3])) % 50  # ids that an allocation knows
    weights = torch.rand(ids, generator=generator) if is_weighted else None
    return KeyedJaggedTensor(keys=order, values=values, lengths=lengths, weights=weights)


def make_allocation(tables: list[EmbeddingBagConfig], config: LMAConfig) -> Allocation:
    """With dedicated ids and signatures."""
    builder = AllocationBuilder(tables, config, RowsMinHash(power=1, min_support=1))
    generator = torch.Generator().manual_seed(0)
    rows = 300
    values = torch.randint(0, 50, (len(FEATURES) * rows,), generator=generator)
    builder.update(KeyedJaggedTensor(keys=FEATURES, values=values, lengths=torch.ones_like(values)))
    return builder.build()


def collection(
    tables: list[EmbeddingBagConfig], config: LMAConfig = CONFIG, is_weighted: bool = False
) -> LMAEmbeddingBagCollection:
    torch.manual_seed(1)
    ebc = LMAEmbeddingBagCollection(tables, config, make_allocation(tables, config), is_weighted)
    assert all(memory.dedicated_rows and memory.signatures.numel() for memory in ebc.allocation.memories)
    return ebc


class Model(nn.Module):
    """A collection and what a model makes of its output."""

    def __init__(self, ebc: nn.Module) -> None:
        super().__init__()
        self.ebc = ebc

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        pooled: KeyedTensor = self.ebc(features)
        return pooled.to_dict()


def quantized(ebc: LMAEmbeddingBagCollection, dtype: str) -> nn.Module:
    return quantize(Model(copy.deepcopy(ebc)), DTYPES[dtype])


def decoded_memories(model: nn.Module, dtype: str, chunk_dim: int) -> dict[str, np.ndarray]:
    """float32 [rows, dim] of each memory, from the bytes in the state_dict."""
    memories = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("ebc.embedding_bags."):
            memory = name.split(".")[2]
            rows, n_chunks = len(tensor), int(memory.removeprefix("memory_")) // chunk_dim
            chunks = decode(tensor.numpy().reshape(rows * n_chunks, -1), dtype, model.ebc.exponent_bias[memory])
            memories[memory] = chunks.reshape(rows, -1)
    return memories


def pooled_by_hand(
    memories: dict[str, np.ndarray],
    ebc: LMAEmbeddingBagCollection,
    features: KeyedJaggedTensor,
    pooling: PoolingType,
) -> dict[str, np.ndarray]:
    """Bag by bag, chunk by chunk, from the decoded memories at the addresses of the float module."""
    out = {}
    for feature, jagged in features.to_dict().items():
        dim = next(t.embedding_dim for t in ebc.tables if t.name == TABLE_OF[feature])
        memory, chunk_dim = memories[f"memory_{dim}"], ebc.config.chunk_dim
        bags, first = np.zeros((BATCH_SIZE, dim)), 0
        for row, length in enumerate(jagged.lengths().tolist()):
            for position in range(first, first + length):
                addresses = ebc.addresses(feature, jagged.values()[position : position + 1])[0].tolist()
                weight = jagged.weights()[position].item() if ebc.is_weighted() else 1.0
                for j, address in enumerate(addresses):
                    columns = slice(j * chunk_dim, (j + 1) * chunk_dim)
                    bags[row, columns] += weight * memory[address, columns]
            if pooling is PoolingType.MEAN and length:
                bags[row] /= length
            first += length
        out[feature] = bags
    return out


@pytest.mark.parametrize("is_weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN], ids=["sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lookups_pool_the_stored_chunks_at_the_addresses_of_training(
    dtype: str, pooling: PoolingType, is_weighted: bool
) -> None:
    ebc = collection(make_tables(pooling), is_weighted=is_weighted)
    model = quantized(ebc, dtype)
    memories = decoded_memories(model, dtype, CONFIG.chunk_dim)
    for name, memory in memories.items():
        weight = ebc.embedding_bags[name].weight.detach().view(-1, CONFIG.chunk_dim).numpy()
        assert (np.abs(memory.reshape(weight.shape) - weight) <= largest_error(weight, dtype)).all()
    features = make_batch(is_weighted)
    expected = pooled_by_hand(memories, ebc, features, pooling)
    out = model(features)
    assert set(out) == set(FEATURES)
    for feature in FEATURES:
        np.testing.assert_allclose(out[feature].numpy(), expected[feature], rtol=1e-5, atol=1e-6)


def test_float32_is_bit_for_bit_what_the_float_module_gives() -> None:
    ebc = collection(make_tables())
    values = make_batch().values()[: 4 * (make_batch().values().numel() // 4)]
    features = KeyedJaggedTensor(keys=FEATURES, values=values, lengths=torch.ones_like(values))  # one id in each bag
    out, expected = quantized(ebc, "fp32")(features), ebc(features)
    assert all(torch.equal(out[feature], expected[feature]) for feature in FEATURES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scripts_give_what_the_eager_module_gives(dtype: str) -> None:
    for is_weighted in (False, True):
        model = quantized(collection(make_tables(PoolingType.MEAN), is_weighted=is_weighted), dtype)
        scripted = script(model)
        for seed in range(3):  # other lengths and ids than any that a trace saw
            features = make_batch(is_weighted, seed, low=-(2**31), high=2**31)
            narrow = KeyedJaggedTensor(
                keys=FEATURES,
                values=features.values().int(),
                lengths=features.lengths().long(),
                weights=features.weights_or_none(),
            )
            expected = model(features)
            for batch in (features, narrow):
                out = scripted(batch)
                assert all(torch.equal(out[feature], expected[feature]) for feature in FEATURES)


@functools.cache
def scripted_and_float() -> tuple[nn.Module, LMAEmbeddingBagCollection]:
    ebc = collection(make_tables())
    return script(quantized(ebc, "fp32")), ebc


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_any_id_is_served_from_the_addresses_of_training(ids: list[int]) -> None:
    scripted, ebc = scripted_and_float()
    values = torch.tensor(ids)
    lengths = torch.ones(len(FEATURES) * len(ids), dtype=torch.int32)
    out = scripted(KeyedJaggedTensor(keys=FEATURES, values=values.repeat(len(FEATURES)), lengths=lengths))
    for feature in FEATURES:
        assert torch.equal(out[feature], ebc.materialize(TABLE_OF[feature], values))


def test_features_come_in_any_order() -> None:
    model = quantized(collection(make_tables()), "int8")
    features = make_batch()
    expected, order = model(features), ["last_item", "place", "user", "item"]
    shuffled = features.permute([FEATURES.index(feature) for feature in order])
    for out in (model(shuffled), script(model)(shuffled)):
        assert all(torch.equal(out[feature], expected[feature]) for feature in FEATURES)


def test_empty_batches_and_empty_bags() -> None:
    model = quantized(collection(make_tables(PoolingType.MEAN)), "int8")
    for run in (model, script(model)):
        empty = run(
            KeyedJaggedTensor(keys=FEATURES, values=torch.tensor([], dtype=torch.int64), lengths=torch.zeros(8).int())
        )
        assert all(torch.equal(empty[f], torch.zeros(2, 32 if f == "place" else 16)) for f in FEATURES)


def test_wrong_features_are_named() -> None:
    model = quantized(collection(make_tables(), is_weighted=True), "int8")
    scripted = script(model)
    with pytest.raises(ValueError, match="lacks feature item"):
        model(make_batch(True, order=["user", "place", "last_item"]))
    with pytest.raises(torch.jit.Error, match="lacks feature item"):
        scripted(make_batch(True, order=["user", "place", "last_item"]))
    with pytest.raises(ValueError, match="has none"):
        model(make_batch())


@pytest.mark.parametrize(
    ("dtype", "chunk_dim", "on_cpu", "on_cuda"),
    [  # values, and float16 scale and bias where there are any; rows of 16 bytes on the GPU
        ("fp32", 4, 16, 16),
        ("fp16", 4, 8, 16),
        ("int8", 4, 8, 16),
        ("fp8", 4, 4, 16),
        ("int4", 4, 6, 16),
        ("int8", 16, 20, 32),
        ("fp16", 16, 32, 32),
        ("fp8", 16, 16, 16),
        ("int4", 16, 12, 16),
        ("int2", 16, 8, 16),
        ("int8", 2, 6, 16),
    ],
)
def test_bytes_of_a_chunk(dtype: str, chunk_dim: int, on_cpu: int, on_cuda: int) -> None:
    assert chunk_bytes(DTYPES[dtype], chunk_dim) == on_cpu
    assert chunk_bytes(DTYPES[dtype], chunk_dim, "cuda") == on_cuda


@pytest.mark.parametrize(
    ("dtype", "chunk_dim", "device_type", "finer"),
    [
        ("int8", 4, "cpu", ["fp16"]),
        ("int8", 8, "cpu", []),
        ("int4", 4, "cpu", ["fp8"]),
        ("int8", 4, "cuda", ["fp32", "fp16"]),
        ("fp32", 4, "cpu", []),
        ("fp8", 1, "cpu", []),
    ],
)
def test_dtypes_that_are_finer_in_no_more_bytes(dtype: str, chunk_dim: int, device_type: str, finer: list[str]) -> None:
    assert finer_dtypes(DTYPES[dtype], chunk_dim, device_type) == finer


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_bytes_are_the_bytes_that_fbgemm_holds(dtype: str) -> None:
    model = quantized(collection(make_tables()), dtype)
    for memory, lookup in zip(model.ebc.embedding_bag_configs(), model.ebc.lookups):
        held = lookup.tbe.weights_host.numel()
        counted = memory.num_embeddings * model.ebc.row_bytes()[memory.name]
        assert 0 <= held - counted < 128  # FBGEMM rounds a table up to a cache line
        assert model.ebc.row_bytes()[memory.name] == memory.embedding_dim // 8 * chunk_bytes(DTYPES[dtype], 8)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 3e4])
def test_fp8_fits_its_range_to_the_weights(scale: float) -> None:
    ebc = collection(make_tables())
    for bag in ebc.embedding_bags.values():
        bag.weight.data.mul_(scale / bag.weight.abs().max())
    memories = decoded_memories(quantized(ebc, "fp8"), "fp8", CONFIG.chunk_dim)
    for name, bag in ebc.embedding_bags.items():
        difference = memories[name] - bag.weight.detach().numpy()
        assert np.linalg.norm(difference) < 0.04 * bag.weight.norm().item()


def test_half_and_bfloat16_memories_quantize() -> None:
    for data_type in (DataType.FP16, DataType.BF16):
        ebc = collection(make_tables(data_type=data_type))
        model = quantized(ebc, "fp32")
        for name, memory in decoded_memories(model, "fp32", CONFIG.chunk_dim).items():
            np.testing.assert_array_equal(memory, ebc.embedding_bags[name].weight.detach().float().numpy())


def test_each_memory_can_have_a_dtype_of_its_own() -> None:
    model = quantize_inference_model(
        Model(collection(make_tables())),
        quantization_mapping=QUANTIZATION_MAPPING,
        per_table_weight_dtype={"memory_32": torch.float16},
    )
    assert isinstance(model.ebc, QuantLMAEmbeddingBagCollection)
    assert model.ebc.row_bytes() == {"memory_16": 2 * 12, "memory_32": 32 * 2}


def test_quantized_weights_load_from_a_state_dict() -> None:
    ebc = collection(make_tables())
    trained = quantized(ebc, "int8")
    for bag in ebc.embedding_bags.values():
        bag.weight.data.zero_()
    model = quantized(ebc, "int8")
    features = make_batch()
    assert not model(features)["user"].any()
    model.load_state_dict(trained.state_dict())
    out, expected = model(features), trained(features)
    assert all(torch.equal(out[feature], expected[feature]) for feature in FEATURES)
    hashed = quantize(Model(LMAEmbeddingBagCollection(make_tables(), CONFIG)), torch.int8)
    with pytest.raises(ValueError, match="was written with allocation"):
        hashed.load_state_dict(trained.state_dict())


@pytest.mark.parametrize(("dtype", "chunk_dim", "least"), [("int2", 4, 8), ("int4", 2, 4), ("int8", 1, 2)])
def test_chunks_that_a_dtype_cannot_store_are_refused(dtype: str, chunk_dim: int, least: int) -> None:
    ebc = LMAEmbeddingBagCollection(make_tables(), LMAConfig(compression=6, chunk_dim=chunk_dim))
    with pytest.raises(ValueError, match=f"chunk_dim={chunk_dim} .* multiple of {least}"):
        quantized(ebc, dtype)


def test_what_cannot_be_quantized_is_refused() -> None:
    tables = make_tables()
    with pytest.raises(ValueError, match="torch.bool"):
        quantize(Model(collection(tables)), torch.bool)
    with pytest.raises(ValueError, match="meta device"):
        quantize(Model(LMAEmbeddingBagCollection(tables, CONFIG, device=torch.device("meta"))), torch.int8)
    with pytest.raises(ValueError, match="full tables to FP8"):
        quantize(Model(EmbeddingBagCollection(tables=tables)), DTYPES["fp8"])
    with pytest.raises(ValueError, match="'tpu'"):
        chunk_bytes(torch.int8, 4, "tpu")
