"""The unsharded unpooled collection: outputs as TorchRec's, gradients, its life, conversion, serving, bad input."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.global_settings import set_propogate_device
from torchrec.distributed.planner import ParameterConstraints
from torchrec.inference.modules import shard_quant_model
from torchrec.quant.embedding_modules import EmbeddingCollection as QuantEmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor

from support.sequence_collection import CONFIGS, DIM, FEATURES, SLOTS, TABLES, allocation, batch, collection, tables
from torchrec_lma import (
    AllocationBuilder,
    LMAConfig,
    LMAEmbeddingBagCollection,
    LMAEmbeddingCollection,
    reallocate,
)
from torchrec_lma.quant import DTYPES, quantize, script


def assert_as_plain(found: dict[str, JaggedTensor], features: KeyedJaggedTensor, need_indices: bool = False) -> None:
    """Keys, order, lengths, ids and dtypes are those of an EmbeddingCollection of the same tables."""
    inside = KeyedJaggedTensor(features.keys(), features.values().clamp(0, 2), lengths=features.lengths())
    plain = EmbeddingCollection(tables(), need_indices=need_indices)(inside)
    assert list(found) == list(plain) == list(SLOTS)
    for name, expected in plain.items():
        assert torch.equal(found[name].lengths(), expected.lengths())
        assert found[name].values().shape == expected.values().shape
        assert found[name].values().dtype == expected.values().dtype
        weights = found[name].weights_or_none()
        assert (weights is None) == (not need_indices)
        assert weights is None or torch.equal(weights, features[name.split("@")[0]].values())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("need_indices", [False, True])
def test_forward_is_a_vector_for_each_id(kind: str, need_indices: bool) -> None:
    ec, features = collection(kind, need_indices=need_indices), batch(1)
    found = ec(features)
    assert_as_plain(found, features, need_indices)
    for name, table in SLOTS.items():
        ids = features[name.split("@")[0]].values()
        assert torch.equal(found[name].values(), ec.materialize(table, ids))


def test_the_levels_are_collections_of_one_width_each() -> None:
    ec = collection("narrow")
    assert set(ec.levels) == {"4", "8"}
    for width, levels in ec.levels.items():
        assert type(levels) is EmbeddingCollection and levels.embedding_dim() == int(width)
    names = [config.name for config in ec.level_configs()]
    assert len(ec.levels["4"].embeddings) == 4 and set(ec.stored_tables()) == set(names)


def test_features_come_in_any_order() -> None:
    ec, features = collection(), batch(2)
    shuffled = features.permute([3, 1, 4, 0, 2])
    expected = ec(features)
    for name, found in ec(shuffled).items():
        assert torch.equal(found.values(), expected[name].values())


@pytest.mark.parametrize("rows", [0, 2])
def test_a_batch_without_ids_gives_no_vectors(rows: int) -> None:
    none = torch.empty(0, dtype=torch.int64)
    features = KeyedJaggedTensor(list(FEATURES), none, lengths=torch.zeros(rows * 4).long())
    for found in collection()(features).values():
        assert found.values().shape == (0, DIM) and found.lengths().tolist() == [0] * rows


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint64])
def test_ids_may_be_integers_of_any_width(dtype: torch.dtype) -> None:
    ec, features = collection(), batch(3)
    ids = features.values() % 100
    expected = ec(KeyedJaggedTensor(features.keys(), ids, lengths=features.lengths()))
    found = ec(KeyedJaggedTensor(features.keys(), ids.to(dtype), lengths=features.lengths()))
    assert all(torch.equal(found[name].values(), expected[name].values()) for name in SLOTS)


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_reach_the_rows_that_were_read_and_no_others(kind: str) -> None:
    ec, features = collection(kind), batch(5)
    upstream = {name: torch.randn_like(found.values()) for name, found in ec(features).items()}
    sum((ec(features)[name].values() * up).sum() for name, up in upstream.items()).backward()
    # The same through explicit indexing of copies of the weights.
    leaves = {name: table.weight.detach().clone().requires_grad_() for name, table in ec.stored_tables().items()}
    widths = {m.level_name(k): level.width for m in ec.allocation.memories for k, level in enumerate(m.levels)}
    for slot, up in upstream.items():
        rows_of_levels = ec.rows(SLOTS[slot], features[slot.split("@")[0]].values())
        start = 0
        for name, rows in rows_of_levels.items():
            width = widths.get(name, DIM)
            if name in leaves:
                of_rows = leaves[name].view(-1, width)[rows.clamp(min=0)] * (rows >= 0).unsqueeze(1)
                (of_rows * up[:, start : start + width]).sum().backward()
            start += width
    for name, leaf in leaves.items():
        gradient = ec.stored_tables()[name].weight.grad
        torch.testing.assert_close(gradient, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)


@pytest.mark.parametrize("data_type", ["FP16", "BF16"])
def test_half_precision_weights_give_single_precision_vectors(data_type: str) -> None:
    made = AllocationBuilder(tables(), LMAConfig(compression=8, data_type=data_type)).update(batch(3, 256)).build()
    ec, features = LMAEmbeddingCollection(tables(), made), batch(4)
    assert {p.dtype for p in ec.parameters()} == {torch.float16 if data_type == "FP16" else torch.bfloat16}
    found = ec(features)
    assert_as_plain(found, features)
    for name, table in SLOTS.items():
        ids = features[name.split("@")[0]].values()
        assert torch.equal(found[name].values(), ec.materialize(table, ids).float())


# One allocation for pooled and unpooled tables.


def test_the_allocation_is_that_of_a_pooled_collection_of_the_same_tables() -> None:
    made = AllocationBuilder(tables(EmbeddingBagConfig), CONFIGS["narrow"]).update(batch(3, 512)).build()
    ebc, ec = LMAEmbeddingBagCollection(tables(EmbeddingBagConfig), made), LMAEmbeddingCollection(tables(), made)
    unpooled = AllocationBuilder(tables(), CONFIGS["narrow"]).update(batch(3, 512)).build()
    assert unpooled.fingerprint == made.fingerprint
    with torch.no_grad():
        for name, table in ec.stored_tables().items():
            table.weight.copy_(ebc.stored_tables()[name].weight)
    features = batch(6)
    pooled, sequences = ebc(features), ec(features)
    for name, found in sequences.items():
        sums = torch.stack([part.sum(0) for part in found.to_dense()])
        torch.testing.assert_close(sums, pooled[name])


# Its life: meta, copies, state_dicts.


def test_a_collection_made_on_meta_comes_to_life() -> None:
    ec = LMAEmbeddingCollection(tables(), allocation(), device=torch.device("meta"))
    assert all(p.is_meta for p in ec.parameters()) and not any(b.is_meta for b in ec.buffers())
    ec.to_empty(device="cpu")
    ec.reset_parameters()
    features, trained = batch(7), collection()
    assert all(p.abs().sum() > 0 for p in ec.parameters())
    ec.load_state_dict(trained.state_dict())
    expected = trained(features)
    for found in (ec(features), copy.deepcopy(trained)(features)):
        assert all(torch.equal(found[name].values(), expected[name].values()) for name in SLOTS)


def test_weights_of_another_allocation_are_refused() -> None:
    ec, other = collection(), LMAEmbeddingCollection(tables(), allocation(seed=1))
    with pytest.raises(ValueError, match="was written with allocation"):
        ec.load_state_dict(other.state_dict())
    ec.remap.fingerprint.copy_(other.remap.fingerprint)  # as torch.distributed.checkpoint does
    with pytest.raises(ValueError, match="was written with allocation"):
        ec(batch())


def test_the_report_counts_what_is_stored() -> None:
    ec = collection("narrow")
    report = ec.memory_report()
    assert report.weight_bytes == sum(p.numel() * 4 for p in ec.parameters())
    assert report.full_bytes == sum(rows for rows, _ in TABLES.values()) * DIM * 4


# Conversion.


def full_tables() -> EmbeddingCollection:
    torch.manual_seed(1)
    ec = EmbeddingCollection(tables(), need_indices=True)
    for weight in ec.parameters():
        nn.init.normal_(weight)
    return ec


def test_trained_tables_become_lma_tables_and_full_ones_again() -> None:
    full, features = full_tables(), batch(8)
    lma = LMAEmbeddingCollection.from_embedding_collection(full, allocation())
    assert lma.need_indices()
    ebc = LMAEmbeddingBagCollection(tables(EmbeddingBagConfig), allocation())
    memory = lma.allocation.memories[0]
    vectors = full.embeddings["t_item"].weight.detach()
    found, start = lma.materialize("t_item", torch.arange(200)), 0
    for level, rows in zip(memory.levels, ebc.rows("t_item", torch.arange(200)).values()):
        columns = slice(start, start + level.width)
        own = (rows >= 0) & (rows < level.own_rows)
        assert own.any() or not level.own_rows
        assert torch.equal(found[own, columns], vectors[own, columns]) and not found[rows < 0, columns].any()
        start += level.width
    again = lma.to_embedding_collection()
    inside = KeyedJaggedTensor(features.keys(), features.values() % 3, lengths=features.lengths())
    expected = lma(inside)
    assert type(again) is EmbeddingCollection
    assert all(torch.equal(each.values(), expected[name].values()) for name, each in again(inside).items())
    with pytest.raises(TypeError, match="ec is a LMAEmbeddingCollection, expected an unsharded EmbeddingCollection"):
        LMAEmbeddingCollection.from_embedding_collection(lma, allocation())


def test_vectors_move_to_another_allocation() -> None:
    ec = LMAEmbeddingCollection.from_embedding_collection(full_tables(), allocation())
    ids = {name: torch.arange(rows) for name, (rows, _) in TABLES.items()}
    config = LMAConfig(memory_bytes=1 << 20, data_type="FP32")
    full = AllocationBuilder(tables(), config).update(batch()).build()
    result = reallocate(ec, full, ids)
    assert type(result.module) is LMAEmbeddingCollection and result.module.need_indices()
    assert [[level.width for level in m.levels] for m in full.memories] == [[DIM]]  # so that nothing is lost
    for name, of_table in ids.items():
        assert torch.equal(result.module.materialize(name, of_table), ec.materialize(name, of_table))


# Serving.


class Model(nn.Module):
    def __init__(self, ec: nn.Module) -> None:
        super().__init__()
        self.ec = ec

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        found: dict[str, JaggedTensor] = self.ec(features)
        out = {"values_" + name: found[name].values() for name in list(SLOTS)}
        out["lengths"] = found["buys"].lengths()
        return out


@pytest.mark.parametrize(("dtype", "kind"), [("fp32", "own"), ("int8", "raw ids"), ("int4", "own")])
def test_quantized_and_scripted_vectors_are_those_of_the_stored_rows(dtype: str, kind: str) -> None:
    ec, features = collection(kind), batch(9)
    expected = Model(ec)(features)
    model = quantize(Model(copy.deepcopy(ec)), DTYPES[dtype])
    assert all(type(levels) is QuantEmbeddingCollection for levels in model.ec.levels.values())
    found = model(features)
    most = float(max(p.abs().max() for p in ec.parameters()))
    off = {"fp32": 0.0, "int8": 2 * most / 255, "int4": 2 * most / 15}[dtype]
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=0, atol=off + (1e-3 if off else 0))  # of scales in FP16
    scripted = script(model)
    for seed in range(3):  # other lengths and ids than any that a trace saw
        wanted = model(batch(seed))
        given = scripted(batch(seed))
        assert all(torch.equal(given[name], value) for name, value in wanted.items())


@pytest.fixture
def on_the_cpu() -> Iterator[None]:
    """What TorchRec's sharded quantized tables need on the CPU."""
    set_propogate_device(True)
    yield
    set_propogate_device(False)


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_quantized_vectors_are_sharded_as_torchrec_shards_them(sharding: str) -> None:
    model = quantize(Model(collection()), torch.int8)
    expected = [model(batch(seed)) for seed in range(3)]
    only = ParameterConstraints(sharding_types=[sharding], compute_kernels=["quant"])
    weights = {key: value for key, value in model.state_dict().items() if ".tbes." not in key}
    sharded, plan = shard_quant_model(
        model,
        world_size=2,
        compute_device="cpu",
        sharding_device="cpu",
        constraints=dict.fromkeys(model.ec.stored_tables(), only),
    )
    sharded.load_state_dict(weights, strict=False)
    assert {each.sharding_type for of_levels in plan.plan.values() for each in of_levels.values()} == {sharding}
    found = [sharded(batch(seed)) for seed in range(3)]
    scripted = script(sharded)
    for seed, wanted in enumerate(expected):
        for out in (found[seed], scripted(batch(seed))):
            assert all(torch.equal(out[name], value) for name, value in wanted.items())


# Errors.


def test_what_cannot_be_is_named() -> None:
    odd = [*tables(), EmbeddingConfig(name="t_odd", num_embeddings=9, embedding_dim=8, feature_names=["odd"])]
    made = allocation()
    with pytest.raises(ValueError, match="must have one embedding_dim.*'t_odd': 8"):
        LMAEmbeddingCollection(odd, made)
    with pytest.raises(TypeError, match="tables of an LMAEmbeddingCollection must be EmbeddingConfig"):
        LMAEmbeddingCollection(tables(EmbeddingBagConfig), made)
    with pytest.raises(TypeError, match="tables of an LMAEmbeddingBagCollection must be EmbeddingBagConfig"):
        LMAEmbeddingBagCollection(tables(), made)
    with pytest.raises(ValueError, match="made for other tables"):
        LMAEmbeddingCollection(tables()[:2], made)


def test_bad_batches_are_named() -> None:
    ec, features = collection(strict=True), batch()
    with pytest.raises(ValueError, match=r"lacks features \['buys'\]"):
        ec(features.permute([0, 1, 3, 4]))
    with pytest.raises(TypeError, match="has ids of torch.float32"):
        ec(KeyedJaggedTensor(features.keys(), features.values().float(), lengths=features.lengths()))
    vbe = KeyedJaggedTensor(
        list(FEATURES),
        torch.tensor([1, 2, 1, 1, 1]),
        lengths=torch.ones(5).long(),
        stride_per_key_per_rank=[[2], [1], [1], [1]],
        inverse_indices=(list(FEATURES), torch.zeros(4, 2).long()),
    )
    with pytest.raises(ValueError, match="variable batch size per feature"):
        ec(vbe)
    outside = KeyedJaggedTensor(list(FEATURES), torch.tensor([1, 1, 200, 1]), lengths=torch.ones(4).long())
    with pytest.raises(ValueError, match="1 ids of the batch are outside"):
        ec(outside)
    ec.strict = False
    assert ec(outside)["item"].values().shape == (1, DIM)
