"""Quantized LMA tables against their stored bytes, decoded and pooled by hand; scripts against eager modules."""

import copy
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchrec.inference.modules import (
    assign_weights_to_tbe,
    get_table_to_weights_from_tbe,
    quantize_inference_model,
)
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from support.quantized_model import (
    FEATURES,
    NARROW,
    WIDE,
    Model,
    collection,
    make_allocation,
    make_batch,
    make_tables,
    quantized,
    same,
)
from support.quantized_reference import decoded_tables, largest_error, pooled_by_hand
from torchrec_lma import LMAConfig, LMAEmbeddingBagCollection
from torchrec_lma.quant import DTYPES, quantize, script


def test_the_tables_of_these_tests_have_rows_of_all_kinds() -> None:
    ebc = collection()
    levels = [level for memory in ebc.allocation.memories for level in memory.levels]
    assert {level.width for level in levels} == {1, 2, 4, 8}
    assert any(level.own_rows for level in levels) and any(level.shared_rows for level in levels)
    assert all(level.rows > level.pack for level in levels)  # TorchRec cannot shard INT4 tables of a single row
    ids = make_batch()["item"].values()
    rows = torch.stack(list(ebc.rows("t_item", ids).values()))
    assert (rows[-1] < 0).any() and (rows[-1] >= 0).any()


@pytest.mark.parametrize("is_weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN], ids=["sum", "mean"])
@pytest.mark.parametrize("data_type", ["FP32", "FP16", "BF16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lookups_pool_the_stored_rows_at_the_rows_of_training(
    dtype: str, data_type: str, pooling: PoolingType, is_weighted: bool
) -> None:
    ebc = collection(pooling, is_weighted, data_type=data_type, widths=WIDE if dtype == "int2" else NARROW)
    model = quantized(ebc, dtype)
    assert type(model.ebc.levels) is QuantEmbeddingBagCollection
    tables = decoded_tables(model.ebc.levels, dict.fromkeys(ebc.levels.embedding_bags, dtype))
    for name, bag in ebc.levels.embedding_bags.items():
        weight = bag.weight.detach().float().numpy()
        assert (np.abs(tables[name] - weight) <= largest_error(weight, dtype)).all()
    features = make_batch(is_weighted)
    expected = pooled_by_hand(tables, ebc, features)
    out = model(features)
    assert list(out) == FEATURES
    for feature in FEATURES:
        assert out[feature].dtype == torch.float32
        np.testing.assert_allclose(out[feature].numpy(), expected[feature], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("dtype", ["fp16", "int8", "int4"])
def test_scripts_give_what_the_eager_module_gives(dtype: str, is_weighted: bool) -> None:
    model = quantized(collection(PoolingType.MEAN, is_weighted), dtype)
    scripted = script(model)
    for seed in range(3):  # other lengths and ids than any that a trace saw
        features = make_batch(is_weighted, seed)
        narrow = make_batch(is_weighted, seed, torch.int32)
        narrow = KeyedJaggedTensor(FEATURES, narrow.values(), narrow.weights_or_none(), narrow.lengths().long())
        expected = model(features)
        for run in (model, scripted):
            for batch in (features, narrow):
                assert same(run(batch), expected)


@functools.cache
def scripted_and_float(raw_ids: bool) -> tuple[nn.Module, LMAEmbeddingBagCollection]:
    ebc = collection(data_type="FP32", raw_ids=raw_ids)
    return script(quantized(ebc, "fp32")), ebc


@pytest.mark.parametrize("raw_ids", [False, True], ids=["vocabulary", "raw_ids"])
@settings(deadline=None, max_examples=50)
@given(ids=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 450), min_size=1, max_size=20))
def test_any_id_is_served_from_the_rows_of_training(raw_ids: bool, ids: list[int]) -> None:
    scripted, ebc = scripted_and_float(raw_ids)
    values = torch.tensor(ids)
    lengths = torch.ones(len(FEATURES) * len(ids), dtype=torch.int32)
    out = scripted(KeyedJaggedTensor(keys=FEATURES, values=values.repeat(len(FEATURES)), lengths=lengths))
    for table in ebc.embedding_bag_configs():
        for feature in table.feature_names:
            assert torch.equal(out[feature], ebc.materialize(table.name, values))


def test_torchrecs_own_function_quantizes_lma_tables() -> None:
    ebc, features = collection(), make_batch()
    model = quantize_inference_model(Model(copy.deepcopy(ebc)))
    assert type(model.ebc.levels) is QuantEmbeddingBagCollection
    assert same(model(features), quantized(ebc, "int8")(features))  # which has rows without padding
    assert same(script(model)(features), model(features))


def test_features_come_in_any_order_and_among_others() -> None:
    model = quantized(collection(), "int8")
    features = make_batch()
    expected, order = model(features), ["last_item", "place", "day", "user", "item"]
    shuffled = features.permute([FEATURES.index(feature) for feature in order])
    with_others = make_batch(order=[*FEATURES, "unknown"])
    expected_with_others = model(with_others.permute(list(range(len(FEATURES)))))
    for run in (model, script(model)):
        assert same(run(shuffled), expected)
        assert same(run(with_others), expected_with_others)


def test_empty_batches_and_empty_bags() -> None:
    model = quantized(collection(PoolingType.MEAN), "int8")
    none = torch.tensor([], dtype=torch.int64)
    for run in (model, script(model)):
        for rows in (2, 0):
            out = run(KeyedJaggedTensor(FEATURES, none, lengths=torch.zeros(len(FEATURES) * rows).int()))
            assert all(torch.equal(out[f], torch.zeros(rows, 8 if f in ("place", "day") else 16)) for f in FEATURES)


def test_wrong_features_are_named() -> None:
    model = quantized(collection(is_weighted=True), "int8")
    order = ["user", "place", "last_item", "day"]
    with pytest.raises(ValueError, match=r"lacks features \['item'\]"):
        model(make_batch(True, order=order))
    with pytest.raises(torch.jit.Error, match="lacks feature item"):
        script(model)(make_batch(True, order=order))
    with pytest.raises(ValueError, match="has no weights"):
        model(make_batch())


def dtypes_of(model: nn.Module) -> dict[str, DataType]:
    return {table.name: table.data_type for table in model.ebc.levels.embedding_bag_configs()}


def test_tables_can_have_dtypes_of_their_own_by_the_names_of_logical_tables() -> None:
    ebc, features = collection(), make_batch()
    model = quantized(
        ebc,
        "int8",
        per_table_weight_dtype={
            **{"t_place": torch.float16, "t_day": torch.float16},  # all of a memory
            "t_user_lma16_level_4": torch.quint4x2,
        },
    )
    found = dtypes_of(model)
    assert found.pop("t_user_lma16_level_4") is DataType.INT4
    assert {name: found.pop(name) for name in list(found) if name.startswith("t_place")} == {
        f"t_place_lma8_level_{k}": DataType.FP16 for k in range(3)
    }
    assert set(found.values()) == {DataType.INT8} and len(found) == 4
    names = {DataType.FP16: "fp16", DataType.INT8: "int8", DataType.INT4: "int4"}
    tables = decoded_tables(model.ebc.levels, {name: names[found] for name, found in dtypes_of(model).items()})
    expected = pooled_by_hand(tables, ebc, features)
    for run in (model, script(model)):
        for feature, pooled in run(features).items():
            np.testing.assert_allclose(pooled.numpy(), expected[feature], rtol=1e-5, atol=1e-6)


def test_dtypes_of_tables_that_share_a_memory_are_honoured_or_refused() -> None:
    ebc = collection()
    both = {"t_user": torch.float16, "t_item": torch.float16}
    found = dtypes_of(quantized(ebc, "int8", per_table_weight_dtype={**both, "t_user_lma16_level_0": torch.float32}))
    assert found["t_user_lma16_level_0"] is DataType.FP32  # the level's own name goes before
    assert all(found[f"t_user_lma16_level_{k}"] is DataType.FP16 for k in range(1, 5))
    for given_dtypes in ({"t_user": torch.float16}, {**both, "t_item": torch.int8}):
        with pytest.raises(ValueError, match=r"\['t_user', 't_item'\] share their rows.*t_user_lma16_level_0"):
            quantized(ebc, "int8", per_table_weight_dtype=given_dtypes)
    with pytest.raises(ValueError, match=r"names \['t_usr'\], the model has .*'t_day', 't_item'"):
        quantized(ebc, "int8", per_table_weight_dtype={"t_usr": torch.float16})


def test_a_model_with_lma_and_full_tables_of_one_batch() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lma = collection()
            self.full = EmbeddingBagCollection(tables=make_tables(prefix="full"))

        def forward(self, features: KeyedJaggedTensor) -> Tensor:
            return torch.cat([self.lma(features).values(), self.full(features).values()], dim=1)

    model, features = Both(), make_batch(low=0, high=7)
    expected = model(features)
    quantize(model, torch.int8, {"full_day": torch.float32})
    full = {table.name: table.data_type for table in model.full.embedding_bag_configs()}
    assert full.pop("full_day") is DataType.FP32 and set(full.values()) == {DataType.INT8}
    torch.testing.assert_close(model(features), expected, rtol=0, atol=0.03)
    assert torch.equal(script(model)(features), model(features))


def test_weights_go_from_model_to_model_by_the_names_of_tables() -> None:
    """As TorchRec's test_inference.py does around shard_quant_model; two collections of one dim share no name."""
    model = nn.ModuleDict({"user": collection(prefix="u"), "item": collection(prefix="i")})
    quantize(model, torch.int8)
    features = make_batch()
    expected = {name: ebc(features).values() for name, ebc in model.items()}
    weights = get_table_to_weights_from_tbe(model)
    copied = {name: tuple(part.clone() for part in parts) for name, parts in weights.items()}
    for parts in weights.values():
        parts[0].zero_()
    assert not any(torch.equal(ebc(features).values(), expected[name]) for name, ebc in model.items())
    assign_weights_to_tbe(model, copied)
    assert all(torch.equal(ebc(features).values(), expected[name]) for name, ebc in model.items())


def test_quantized_weights_load_from_a_state_dict() -> None:
    trained = quantized(collection(), "int8")
    ebc = collection()
    for bag in ebc.levels.embedding_bags.values():
        bag.weight.data.zero_()
    model = quantized(ebc, "int8")
    features = make_batch()
    assert not model(features)["user"].any()
    model.load_state_dict(trained.state_dict())
    assert same(model(features), trained(features))


def test_weights_of_another_allocation_are_refused() -> None:
    """The same tables and sizes, other rows."""
    ebc, other = collection(), collection(seed=3)
    with pytest.raises(ValueError, match="was written with allocation"):
        quantized(ebc, "int8").load_state_dict(quantized(other, "int8").state_dict())
    read_in_place = copy.deepcopy(ebc)
    for key, tensor in read_in_place.state_dict().items():
        tensor.copy_(other.state_dict()[key])
    with pytest.raises(ValueError, match="was written with allocation"):
        quantize(Model(read_in_place), torch.int8)
    damaged = copy.deepcopy(ebc)
    words = next(buffer for name, buffer in damaged.remap.named_buffers() if name.endswith("owners.1.words"))
    words[0] ^= 0b101  # takes a row from one id and gives it to another, or takes two
    with pytest.raises(ValueError, match=r"its buffers hold|make no allocation"):
        quantize(Model(damaged), torch.int8)


def test_ids_outside_of_the_vocabulary_are_served_even_where_training_was_strict() -> None:
    ebc, features = collection(), make_batch(low=-5, high=2000)
    expected = quantized(ebc, "int8")(features)
    ebc.strict = True
    with pytest.raises(ValueError, match="outside"):
        ebc(features)
    model = quantized(ebc, "int8")
    for run in (model, script(model)):
        assert same(run(features), expected)


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'t_user_lma16_level_0' has 4 columns; torch.quint2x4 needs a multiple of 8"):
        quantized(collection(), "int2")
    odd = EmbeddingBagCollection([EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=3, feature_names=["f"])])
    with pytest.raises(ValueError, match="'t' has 3 columns; torch.int8 needs a multiple of 2"):
        quantize(Model(odd), torch.int8)
    with pytest.raises(ValueError, match=r"cannot be quantized to torch.float8_e4m3fn; choose one of \[torch.float32"):
        quantize(Model(collection()), torch.float8_e4m3fn)
    config = LMAConfig(compression=6)
    on_meta = LMAEmbeddingBagCollection(make_tables(), make_allocation(config), device=torch.device("meta"))
    with pytest.raises(ValueError, match="meta device"):
        quantize(Model(on_meta), torch.int8)
