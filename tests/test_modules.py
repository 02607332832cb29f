"""The unsharded collection: pooling, gradients, data types, its life on the meta device, state_dicts, bad input."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec import DataType, KeyedJaggedTensor, PoolingType
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM, DLRMTrain

from support.paths import REPOSITORY
from support.pooled_collection import DIM, FEATURES, KINDS, SIZES, allocation, batch, collection, tables
from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection


def pooled_by_hand(
    vectors: Callable[[str, Tensor], Tensor], features: KeyedJaggedTensor, pooling: PoolingType, weighted: bool
) -> Tensor:
    """[B, sum of dims]: sums of vectors over bags, for MEAN divided by the number of ids, weighted or not."""
    columns = []
    for feature in FEATURES:
        bags = features[feature]
        ends = bags.offsets().tolist()
        of_ids = vectors(f"t_{feature}", bags.values())
        if weighted:
            of_ids = of_ids * bags.weights().unsqueeze(1)
        sums = [of_ids[start:end].sum(0) for start, end in itertools.pairwise(ends)]
        if pooling is PoolingType.MEAN:
            sums = [one / max(end - start, 1) for one, start, end in zip(sums, ends, ends[1:])]
        columns.append(torch.stack(sums))
    return torch.cat(columns, dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("pooling", list(PoolingType)[:2], ids=lambda p: p.name)
def test_forward_is_a_loop_over_bags(pooling: PoolingType, weighted: bool, kind: str) -> None:
    ebc = collection(kind, pooling=pooling, is_weighted=weighted)
    features = batch(1, weighted=weighted)
    before = features.values().clone()
    found = ebc(features)
    assert found.keys() == FEATURES and found.values().dtype is torch.float32
    torch.testing.assert_close(found.values(), pooled_by_hand(ebc.materialize, features, pooling, weighted))
    assert torch.equal(features.values(), before)


@pytest.mark.parametrize("pooling", list(PoolingType)[:2], ids=lambda p: p.name)
def test_a_batch_without_ids_gives_zeros(pooling: PoolingType) -> None:
    ebc = collection(pooling=pooling)
    nothing = torch.empty(0, dtype=torch.int64)
    empty = ebc(KeyedJaggedTensor(FEATURES, nothing, lengths=torch.zeros(6, dtype=torch.int64)))
    assert torch.equal(empty.values(), torch.zeros(2, 3 * DIM))


@pytest.mark.parametrize("data_type", ["FP16", "BF16"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_half_precision_weights(data_type: str, weighted: bool) -> None:
    made = AllocationBuilder(tables(), LMAConfig(compression=8, data_type=data_type)).update(batch(3, 256)).build()
    ebc = LMAEmbeddingBagCollection(tables(), made, is_weighted=weighted)
    assert {p.dtype for p in ebc.parameters()} == {torch.float16 if data_type == "FP16" else torch.bfloat16}
    features = batch(4, weighted=weighted)
    expected = pooled_by_hand(lambda t, ids: ebc.materialize(t, ids).float(), features, PoolingType.SUM, weighted)
    found = ebc(features).values()
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)
    found.sum().backward()
    assert all(p.grad is not None for p in ebc.parameters())
    torch.testing.assert_close(ebc.float()(features).values(), expected, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_rows_that_were_read_and_no_others(kind: str, weighted: bool) -> None:
    ebc = collection(kind, is_weighted=weighted)
    features = batch(5, weighted=weighted)
    upstream = torch.randn(8, 3 * DIM)
    ebc(features).values().backward(upstream)
    # The same through explicit indexing of copies of the weights.
    leaves = {name: bag.weight.detach().clone().requires_grad_() for name, bag in ebc.levels.embedding_bags.items()}
    widths = {m.level_name(k): level.width for m in ebc.allocation.memories for k, level in enumerate(m.levels)}

    def vectors(table: str, ids: Tensor) -> Tensor:
        columns = []
        for name, rows in ebc.rows(table, ids).items():
            width = widths.get(name, DIM)
            if name not in leaves:
                columns.append(torch.zeros(len(ids), width))
                continue
            of_rows = leaves[name].view(-1, width)[rows.clamp(min=0)]
            columns.append(of_rows * (rows >= 0).unsqueeze(1))
        return torch.cat(columns, dim=1)

    pooled_by_hand(vectors, features, PoolingType.SUM, weighted).backward(upstream)
    for name, leaf in leaves.items():
        gradient = ebc.levels.embedding_bags[name].weight.grad
        torch.testing.assert_close(gradient, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)


def test_levels_start_in_the_range_of_their_tables() -> None:
    ebc = collection()
    bounds = {c.name: (c.weight_init_min, c.weight_init_max) for c in ebc.levels.embedding_bag_configs()}
    rows = sum(SIZES.values()) / len(SIZES)
    assert set(bounds.values()) == {(-(rows**-0.5), rows**-0.5)}
    for name, bag in ebc.levels.embedding_bags.items():
        assert bag.weight.abs().max() <= bounds[name][1]
    given = LMAEmbeddingBagCollection(tables(weight_init_min=0.5, weight_init_max=0.75), allocation())
    assert all(p.min().item() >= 0.5 and p.max().item() <= 0.75 for p in given.parameters())


def test_ids_outside_of_the_vocabulary_are_unseen_counted_and_with_strict_an_error() -> None:
    ebc = collection()
    features = KeyedJaggedTensor(FEATURES, torch.tensor([-1, 300, 5, 120, 7, 2**62]), lengths=torch.ones(6).long())
    found = ebc(features)
    assert int(ebc.remap.out_of_vocabulary) == 5
    torch.testing.assert_close(
        found.values(), pooled_by_hand(ebc.materialize, features, PoolingType.SUM, weighted=False)
    )
    # All ids of the vocabularies are seen and no row is left: those outside have the rows of id 0.
    rows = torch.stack(list(ebc.rows("t_day", torch.tensor([0, 7, 2**62, -5])).values()))
    assert (rows == rows[:, :1]).all()
    ebc.strict = True
    with pytest.raises(ValueError, match="5 ids of the batch are outside"):
        ebc(features)


def test_dlrm_trains_with_it() -> None:
    model = DLRMTrain(DLRM(collection(), 4, [8, DIM], [8, 1]))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    torch.manual_seed(1)
    rows = Batch(torch.randn(64, 4), batch(6, 64), torch.randint(0, 2, (64,)).float())
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss, _ = model(rows)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# Its life: meta, copies, state_dicts.


@pytest.mark.parametrize("data_type", [DataType.FP32, DataType.BF16])
def test_a_collection_made_on_meta_comes_to_life(data_type: DataType) -> None:
    made = AllocationBuilder(tables(), LMAConfig(compression=8, data_type=data_type)).update(batch(3, 256)).build()
    ebc = LMAEmbeddingBagCollection(tables(), made, device=torch.device("meta"))
    assert all(p.is_meta for p in ebc.parameters()) and not any(b.is_meta for b in ebc.buffers())
    ebc.to_empty(device="cpu")
    ebc.reset_parameters()
    here = LMAEmbeddingBagCollection(tables(), made)
    assert {name: p.dtype for name, p in ebc.named_parameters()} == {n: p.dtype for n, p in here.named_parameters()}
    ids = torch.arange(SIZES["user"])
    for level, rows in here.rows("t_user", ids).items():
        assert torch.equal(ebc.rows("t_user", ids)[level], rows)
    assert ebc(batch()).values().isfinite().all()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda ebc: pickle.loads(pickle.dumps(ebc))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_alike_and_apart(copied: Callable[[Any], Any]) -> None:
    ebc = collection()
    other = copied(ebc)
    assert torch.equal(other(batch()).values(), ebc(batch()).values())
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert not torch.equal(next(other.parameters()), next(ebc.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_carries_weights_and_allocation(kind: str) -> None:
    ebc, file = collection(kind), io.BytesIO()
    torch.save(ebc.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    read = Allocation.from_state(
        {name.removeprefix("remap."): value for name, value in state.items() if name.startswith("remap.")}, {}
    )
    assert read.fingerprint == ebc.allocation.fingerprint
    other = LMAEmbeddingBagCollection(tables(), read)
    other.load_state_dict(state)
    assert torch.equal(other(batch()).values(), ebc(batch()).values())


def test_a_state_dict_of_another_allocation_is_refused_before_anything_is_loaded() -> None:
    ebc, other = collection(), LMAEmbeddingBagCollection(tables(), allocation(seed=1))
    before = {name: value.clone() for name, value in ebc.state_dict().items()}
    with pytest.raises(ValueError, match="was written with allocation") as error:
        ebc.load_state_dict(other.state_dict())
    assert ebc.allocation.fingerprint in str(error.value) and other.allocation.fingerprint in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in ebc.state_dict().items())


@pytest.mark.parametrize("use", [lambda ebc: ebc(batch()), lambda ebc: ebc.materialize("t_user", torch.arange(3))])
def test_another_allocation_read_in_place_is_caught_at_the_next_use(use: Callable[[Any], Any]) -> None:
    ebc, other = collection(), LMAEmbeddingBagCollection(tables(), allocation(seed=1))
    use(ebc)
    ebc.state_dict()["remap.fingerprint"].copy_(other.state_dict()["remap.fingerprint"])  # as DCP does
    with pytest.raises(ValueError, match="was written with allocation"):
        use(ebc)


# Bad input.


def changed(**changes: Any) -> KeyedJaggedTensor:
    good = batch(weighted=changes.pop("weighted", False))
    given = {"keys": FEATURES, "values": good.values(), "lengths": good.lengths(), "weights": good.weights_or_none()}
    return KeyedJaggedTensor(**{**given, **changes})


@pytest.mark.parametrize(
    ("features", "error", "said"),
    [
        (lambda: changed(keys=["user", "item", "night"]), ValueError, r"lacks features \['day'\]"),
        (lambda: changed(keys=["user", "item", "user"]), ValueError, r"lacks features \['day'\]"),
        (
            lambda: KeyedJaggedTensor([*FEATURES, "user"], torch.arange(4), lengths=torch.ones(4).long()),
            ValueError,
            "twice",
        ),
        (lambda: changed(values=batch().values().float()), TypeError, "ids of torch.float32; expected integers"),
        (lambda: changed(values=batch().values() > 3), TypeError, "torch.bool"),
        (lambda: changed(values=batch().values()[:-1]), ValueError, r"add up to \d+ and \d+ values"),
        (lambda: changed(lengths=batch().lengths() - 1), ValueError, "negative length, -1"),
        (
            lambda: KeyedJaggedTensor(
                FEATURES, torch.arange(3), lengths=torch.ones(3).long(), stride_per_key_per_rank=[[1], [1], [1]]
            ),
            ValueError,
            "inverse_indices",
        ),
    ],
)
def test_bad_batches_are_named(features: Callable[[], KeyedJaggedTensor], error: type, said: str) -> None:
    ebc = collection()
    with pytest.raises(error, match=said):
        ebc(features())


def test_missing_weights_are_refused_and_those_of_an_unweighted_collection_are_not_used() -> None:
    with pytest.raises(ValueError, match="has no weights"):
        collection(is_weighted=True)(batch())
    ebc = collection()
    assert torch.equal(ebc(batch(1, weighted=True)).values(), ebc(batch(1)).values())


@pytest.mark.parametrize("ids", [torch.arange(4.0), torch.zeros(2, 2).long(), torch.tensor(3), torch.ones(3).bool()])
def test_ids_that_are_not_a_list_of_integers_are_refused(ids: Tensor) -> None:
    for use in (collection().rows, collection().materialize):
        with pytest.raises(TypeError, match="integer"):
            use("t_user", ids)


def test_unknown_tables_other_tables_and_other_allocations_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown table 'nobody'.*t_user"):
        collection().materialize("nobody", torch.arange(3))
    with pytest.raises(ValueError, match="made for other tables"):
        LMAEmbeddingBagCollection(tables()[:2], allocation())
    with pytest.raises(TypeError, match="allocation is a LMAConfig"):
        LMAEmbeddingBagCollection(tables(), LMAConfig(compression=4))  # type: ignore[arg-type]


def test_inference_mode() -> None:
    ebc: nn.Module = collection()
    expected = ebc(batch()).values()
    with torch.inference_mode():
        assert torch.equal(ebc(batch()).values(), expected)
        made_here = collection()
        assert torch.equal(made_here(batch()).values(), expected)


def test_the_snippet_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    exec(readme.partition("```python\n")[2].partition("```")[0], {})
    printed = capsys.readouterr().out
    assert "torch.Size([256, 64])" in printed and "total" in printed
