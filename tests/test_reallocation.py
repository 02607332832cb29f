"""Trained weights under a new allocation, against numpy's least squares and changes computed by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from support.closest_embeddings import closest
from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection, reallocate
from torchrec_lma.allocation import RowsMinHash

CONFIG = LMAConfig(compression=5, data_type="FP32", skew=0.25, seed=3, raw_ids=("t_user",))
TABLES = [
    EmbeddingBagConfig(name="t_user", num_embeddings=80, embedding_dim=8, feature_names=["user"]),
    EmbeddingBagConfig(name="t_item", num_embeddings=40, embedding_dim=8, feature_names=["item"]),
    EmbeddingBagConfig(name="t_day", num_embeddings=30, embedding_dim=12, feature_names=["day"]),
]
IDS = {"t_user": torch.arange(-20, 60) * 2**33, "t_item": torch.arange(40), "t_day": torch.arange(30)}


def allocation(shift: int, config: LMAConfig = CONFIG, tables=TABLES) -> Allocation:
    """Learned from ids that depend on `shift`."""
    builder = AllocationBuilder(tables, config, source=RowsMinHash(power=1, num_values=2, min_support=1))
    for i in range(90):
        values = [IDS["t_user"][(i + shift) % 20], IDS["t_item"][(3 * i + shift) % (1 + i % 39)], i * shift % 25]
        builder.update(
            KeyedJaggedTensor(
                keys=["user", "item", "day"], values=torch.tensor(values), lengths=torch.ones(3, dtype=torch.int32)
            )
        )
    return builder.build()


def trained(made_with: Allocation | None = None) -> LMAEmbeddingBagCollection:
    """Weights that no initialisation gives."""
    torch.manual_seed(4)
    module = LMAEmbeddingBagCollection(TABLES, made_with or allocation(1))
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_()
    return module


NEW_CONFIGS = {
    "same config": CONFIG,
    "larger": replace(CONFIG, compression=4.7),
    "other widths": replace(CONFIG, widths={8: (2, 2, 4), 12: (1, 1, 2, 8)}),
    "other kinds of ids": replace(CONFIG, raw_ids=True),
    "other seed": replace(CONFIG, seed=8),
    "half precision": replace(CONFIG, data_type="FP16"),
}


@pytest.mark.parametrize("config", NEW_CONFIGS.values(), ids=NEW_CONFIGS.keys())
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
def test_embeddings_change_as_little_as_least_squares_allows(config: LMAConfig, weighted: bool) -> None:
    module = trained()
    random = torch.Generator().manual_seed(0)
    weights = {name: torch.randint(1, 9, (n.numel(),), generator=random) for name, n in IDS.items()}
    ones = {name: torch.ones(n.numel()) for name, n in IDS.items()}
    result = reallocate(module, allocation(2, config), IDS, weights if weighted else None)
    used = weights if weighted else ones
    before = {name: module.materialize(name, n) for name, n in IDS.items()}
    expected = closest(result.module, before, IDS, used)
    atol = 2e-3 if config.data_type == "FP16" else 2e-6
    for change in result.changes[:-1]:
        name = change.table
        of_table, after = before[name].numpy(), result.module.materialize(name, IDS[name]).float().numpy()
        np.testing.assert_allclose(after, expected[name], atol=atol)
        w = np.broadcast_to(used[name].numpy()[:, None], of_table.shape)
        assert change.ids == IDS[name].numel()
        assert change.rms_before == pytest.approx(np.sqrt(np.average(of_table**2, weights=w)), rel=1e-5)
        assert change.rms_change == pytest.approx(np.sqrt(np.average((after - of_table) ** 2, weights=w)), rel=1e-5)
    assert 0 < result.changes[-1].relative < 1


def test_the_total_is_over_all_values() -> None:
    module = trained()
    result = reallocate(module, allocation(2), IDS)
    before = torch.cat([module.materialize(name, ids).flatten() for name, ids in IDS.items()])
    after = torch.cat([result.module.materialize(name, ids).flatten() for name, ids in IDS.items()])
    total = result.changes[-1]
    assert (total.table, total.ids) == ("total", 150)
    assert total.rms_before == pytest.approx(before.square().mean().sqrt().item(), rel=1e-5)
    assert total.rms_change == pytest.approx((after - before).square().mean().sqrt().item(), rel=1e-5)


def test_the_same_allocation_changes_nothing() -> None:
    module = trained()
    result = reallocate(module, module.allocation, IDS)
    assert result.module is not module
    for name, bag in module.levels.embedding_bags.items():
        torch.testing.assert_close(result.module.levels.embedding_bags[name].weight, bag.weight, rtol=0, atol=1e-6)
    assert all(change.rms_change < 1e-6 for change in result.changes)


def test_hashed_ids_that_were_not_given_keep_their_embeddings() -> None:
    """With the same rows and seed, as far as none of the given ids shares their rows."""
    module = trained(Allocation.hashed(TABLES, CONFIG))
    only = {
        "t_user": torch.tensor([5 * 2**33]),
        "t_item": torch.tensor([], dtype=torch.int64),
        "t_day": torch.arange(0),
    }
    result = reallocate(module, Allocation.hashed(TABLES, CONFIG), only)
    for name, ids in IDS.items():
        assert torch.equal(result.module.materialize(name, ids), module.materialize(name, ids))
    assert [change.ids for change in result.changes] == [1, 0, 0, 1]
    assert result.changes[1].relative == 0.0


def test_the_model_given_is_left_alone_and_the_result_trains() -> None:
    module = trained()
    before = [weight.clone() for weight in module.parameters()]
    new = reallocate(module, allocation(2), IDS).module
    ids = torch.cat([of_table[:30] for of_table in IDS.values()])
    new(
        KeyedJaggedTensor(keys=["user", "item", "day"], values=ids, lengths=torch.ones_like(ids))
    ).values().sum().backward()
    assert all(weight.grad is not None for weight in new.parameters())
    assert sum(weight.grad.abs().sum() > 0 for weight in new.parameters()) > 3
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before))
    assert all(weight.grad is None for weight in module.parameters())


def test_ids_outside_of_a_vocabulary_do_not_overwrite_the_one_they_are_taken_for() -> None:
    table = EmbeddingBagConfig(name="t_item", num_embeddings=40, embedding_dim=8, feature_names=["item"])
    builder = AllocationBuilder([table], LMAConfig(compression=2, data_type="FP32"))
    made = builder.add_counts("t_item", torch.arange(40), torch.ones(40, dtype=torch.int64)).build()
    assert [level.shared_rows for level in made.memories[0].levels if level.rows] == [0]
    module = LMAEmbeddingBagCollection([table], Allocation.hashed([table], LMAConfig(compression=1, data_type="FP32")))
    ids = torch.tensor([0, 3, 40, -1, 99])
    moved = reallocate(module, made, {"t_item": ids}).module
    inside = ids[:2]
    columns = made.memories[0].levels[0].width
    expected = module.materialize("t_item", inside)[:, :columns]
    assert torch.equal(moved.materialize("t_item", inside)[:, :columns], expected)


def test_tables_may_have_grown() -> None:
    grown = [replace(table, num_embeddings=2 * table.num_embeddings) for table in TABLES]
    result = reallocate(trained(), allocation(2, tables=grown), IDS)
    tables = result.module.embedding_bag_configs()
    assert [table.num_embeddings for table in tables] == [160, 80, 60]
    assert tables[0].feature_names == ["user"]


def test_changes_print_as_a_table() -> None:
    header, *lines = str(reallocate(trained(), allocation(2), IDS)).splitlines()
    assert header.split() == ["table", "ids", "RMS", "before", "RMS", "change", "relative"]
    assert [line.split()[0] for line in lines] == ["t_user", "t_item", "t_day", "total"]
    assert len({len(line) for line in (header, *lines)}) == 1


def test_a_model_is_reallocated_through_its_checkpoints(tmp_path: Path) -> None:
    """Those of a sharded model have the same keys and values: see the tests of sharding."""
    old, new = allocation(1), allocation(2)
    dcp.save({"model": nn.ModuleList([trained(old)]).state_dict()}, checkpoint_id=tmp_path / "old", no_dist=True)

    made_with = Allocation.from_checkpoint(tmp_path / "old")
    model = nn.ModuleList([LMAEmbeddingBagCollection(TABLES, made_with)])
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "old", no_dist=True)
    model.load_state_dict(state["model"])
    model[0] = reallocate(model[0], new, IDS).module
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "new", no_dist=True)

    assert Allocation.from_checkpoint(tmp_path / "new").fingerprint == new.fingerprint
    expected = reallocate(trained(old), new, IDS).module
    again = nn.ModuleList([LMAEmbeddingBagCollection(TABLES, new)])
    state = {"model": again.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "new", no_dist=True)
    again.load_state_dict(state["model"])
    for name, ids in IDS.items():
        assert torch.equal(again[0].materialize(name, ids), expected.materialize(name, ids))


def test_what_cannot_be_reallocated_is_refused() -> None:
    with pytest.raises(TypeError, match="is a EmbeddingBagCollection, expected an unsharded LMA"):
        reallocate(EmbeddingBagCollection([replace(TABLES[0])]), allocation(2), IDS)
    with pytest.raises(ValueError, match="meta device"):
        reallocate(LMAEmbeddingBagCollection(TABLES, allocation(1), device=torch.device("meta")), allocation(2), IDS)
    others = [replace(TABLES[0], name="t_guest"), *TABLES[1:]]
    with pytest.raises(ValueError, match="made for other tables.*t_guest"):
        reallocate(trained(), Allocation.hashed(others, replace(CONFIG, raw_ids=())), IDS)
    with pytest.raises(ValueError, match=r"missing \['t_day'\], unknown \['t_night'\]"):
        reallocate(
            trained(), allocation(2), {"t_user": IDS["t_user"], "t_item": IDS["t_item"], "t_night": IDS["t_day"]}
        )
    with pytest.raises(TypeError, match="'t_user' has ids of torch.float32"):
        reallocate(trained(), allocation(2), {**IDS, "t_user": torch.rand(4)})
    with pytest.raises(ValueError, match="expected one weight for each of its 30 ids"):
        reallocate(trained(), allocation(2), IDS, {"t_day": torch.ones(4)})
