"""A trained memory under a new allocation, against numpy's least squares and changes computed by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import training
from ranks import run
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection, reallocate
from torchrec_lma.allocation import RowsMinHash

CONFIG = LMAConfig(compression=5, chunk_dim=4, seed=3)
TABLES = [
    EmbeddingBagConfig(name="t_user", num_embeddings=80, embedding_dim=8, feature_names=["user"]),
    EmbeddingBagConfig(name="t_item", num_embeddings=40, embedding_dim=8, feature_names=["item"]),
    EmbeddingBagConfig(name="t_day", num_embeddings=30, embedding_dim=12, feature_names=["day"]),
]
IDS = {"t_user": torch.arange(-20, 60), "t_item": torch.arange(40) * 2**33, "t_day": torch.arange(30)}
FEATURE = {"t_user": "user", "t_item": "item", "t_day": "day"}


def allocation(shift: int, config: LMAConfig = CONFIG, tables=TABLES) -> Allocation:
    """Learned from ids that depend on `shift`."""
    builder = AllocationBuilder(tables, config, source=RowsMinHash(power=1, num_values=2, min_support=1))
    for i in range(60):
        values = [IDS["t_user"][(i + shift) % 20], IDS["t_item"][(3 * i + shift) % 9], (i * shift) % 5]
        builder.update(
            KeyedJaggedTensor(
                keys=["user", "item", "day"], values=torch.tensor(values), lengths=torch.ones(3, dtype=torch.int32)
            )
        )
    return builder.build()


def trained(made_with: Allocation | None = None) -> LMAEmbeddingBagCollection:
    """Weights that no initialisation gives."""
    torch.manual_seed(4)
    module = LMAEmbeddingBagCollection(TABLES, CONFIG, made_with or allocation(1))
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_()
    return module


def by_numpy(module: LMAEmbeddingBagCollection, new: LMAEmbeddingBagCollection, weights) -> dict[str, np.ndarray]:
    """The closest embeddings that the new addresses allow, one lstsq for each chunk position of a memory."""
    best = {name: np.zeros((n.numel(), module.materialize(name, n).size(1))) for name, n in IDS.items()}
    for memory in new.allocation.memories:
        counts = [IDS[table].numel() for table in memory.tables]
        wanted = np.concatenate([module.materialize(table, IDS[table]).double().numpy() for table in memory.tables])
        scale = np.sqrt(np.concatenate([weights[table].double().numpy() for table in memory.tables]))[:, None]
        for j in range(memory.n_chunks):
            rows = np.concatenate([new.addresses(FEATURE[t], IDS[t])[:, j].numpy() for t in memory.tables])
            design = np.eye(memory.rows)[rows]
            columns = slice(j * memory.chunk_dim, (j + 1) * memory.chunk_dim)
            solution = np.linalg.lstsq(design * scale, wanted[:, columns] * scale, rcond=None)[0]
            for table, part in zip(memory.tables, np.split(design @ solution, np.cumsum(counts)[:-1])):
                best[table][:, columns] = part
    return best


NEW_CONFIGS = {
    "same config": CONFIG,
    "larger": LMAConfig(compression=3, chunk_dim=4, seed=3),
    "finer chunks": LMAConfig(compression=5, chunk_dim=2, seed=3),
    "other seed": LMAConfig(compression=5, chunk_dim=4, seed=8),
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
    expected = by_numpy(module, result.module, used)
    for change in result.changes[:-1]:
        name = change.table
        before, after = module.materialize(name, IDS[name]).numpy(), result.module.materialize(name, IDS[name]).numpy()
        np.testing.assert_allclose(after, expected[name], atol=2e-6)
        w = np.broadcast_to(used[name].numpy()[:, None], before.shape)
        assert change.ids == IDS[name].numel()
        assert change.rms_before == pytest.approx(np.sqrt(np.average(before**2, weights=w)), rel=1e-5)
        assert change.rms_change == pytest.approx(np.sqrt(np.average((after - before) ** 2, weights=w)), rel=1e-5)
        assert 0 < change.relative < 1


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
    for name, bag in module.embedding_bags.items():
        torch.testing.assert_close(result.module.embedding_bags[name].weight, bag.weight, rtol=0, atol=1e-6)
    assert all(change.rms_change < 1e-6 for change in result.changes)


def test_hashed_ids_that_were_not_given_keep_their_embeddings() -> None:
    """With the same rows and seed, as far as none of the given ids shares their chunks."""
    module = trained(Allocation.hashed(TABLES, CONFIG))
    only = {"t_user": torch.tensor([5]), "t_item": torch.tensor([], dtype=torch.int64), "t_day": torch.arange(0)}
    result = reallocate(module, Allocation.hashed(TABLES, CONFIG), only)
    for name, ids in IDS.items():
        assert torch.equal(result.module.materialize(name, ids), module.materialize(name, ids))
    assert [change.ids for change in result.changes] == [1, 0, 0, 1]
    assert result.changes[1].relative == 0.0


def test_the_model_given_is_left_alone_and_the_result_trains() -> None:
    module = trained()
    before = [weight.clone() for weight in module.parameters()]
    new = reallocate(module, allocation(2), IDS).module
    ids, lengths = torch.tensor([1, 2, 3]), torch.tensor([1, 1, 1])
    new(KeyedJaggedTensor(keys=["user", "item", "day"], values=ids, lengths=lengths)).values().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in new.parameters())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before))
    assert all(weight.grad is None for weight in module.parameters())


def test_tables_may_have_grown() -> None:
    grown = [replace(table, num_embeddings=2 * table.num_embeddings) for table in TABLES]
    result = reallocate(trained(), allocation(2, tables=grown), IDS)
    assert [table.num_embeddings for table in result.module.tables] == [160, 80, 60]
    assert result.module.tables[0].feature_names == ["user"]


def test_changes_print_as_a_table() -> None:
    header, *lines = str(reallocate(trained(), allocation(2), IDS)).splitlines()
    assert header.split() == ["table", "ids", "RMS", "before", "RMS", "change", "relative"]
    assert [line.split()[0] for line in lines] == ["t_user", "t_item", "t_day", "total"]
    assert len({len(line) for line in (header, *lines)}) == 1


def save_sharded(made_with: Allocation, path: str) -> None:
    """A few steps of a row-wise sharded model, then a checkpoint of it."""
    dmp, optimizer, _ = training.build(made_with, "row_wise", "rowwise_adagrad")
    for step in range(3):
        optimizer.zero_grad()
        dmp(training.batch(step, dist.get_rank()))[0].backward()
        optimizer.step()
    dcp.save({"model": dmp.state_dict()}, checkpoint_id=path)


def sharded_outputs(made_with: Allocation, path: str) -> Tensor:
    """The logits of a column-wise sharded model with the checkpoint's weights."""
    dmp, _, _ = training.build(made_with, "column_wise", "rowwise_adagrad")
    state = {"model": dmp.state_dict()}
    dcp.load(state, checkpoint_id=path)
    dmp.load_state_dict(state["model"])
    return dmp(training.batch(7, 0))[1]


def test_a_sharded_model_is_reallocated_through_its_checkpoints(tmp_path: Path) -> None:
    old = training.build_allocation()
    new = AllocationBuilder(training.tables(), old.config)
    new = new.update(training.features(5, batch=256)).build()
    run(save_sharded, 2, old, str(tmp_path / "old"))

    model = training.Model(LMAEmbeddingBagCollection(training.tables(), old.config, old))
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=str(tmp_path / "old"), no_dist=True)
    model.load_state_dict(state["model"])
    ids = {"a": torch.arange(60), "b": torch.arange(60), "c": torch.arange(60)}
    model.ebc = reallocate(model.ebc, new, ids).module
    dcp.save({"model": model.state_dict()}, checkpoint_id=str(tmp_path / "new"), no_dist=True)

    assert Allocation.from_checkpoint(str(tmp_path / "new")).fingerprint == new.fingerprint
    for logits in run(sharded_outputs, 2, new, str(tmp_path / "new")):
        torch.testing.assert_close(logits, model(training.batch(7, 0))[1])


def test_what_cannot_be_reallocated_is_refused() -> None:
    with pytest.raises(TypeError, match="is a EmbeddingBagCollection, expected an unsharded LMA"):
        reallocate(EmbeddingBagCollection([replace(TABLES[0])]), allocation(2), IDS)
    with pytest.raises(ValueError, match="meta device"):
        reallocate(LMAEmbeddingBagCollection(TABLES, CONFIG, device=torch.device("meta")), allocation(2), IDS)
    others = [replace(TABLES[0], name="t_guest"), *TABLES[1:]]
    with pytest.raises(ValueError, match="made for other tables.*t_guest"):
        reallocate(trained(), Allocation.hashed(others, CONFIG), IDS)
    with pytest.raises(ValueError, match=r"missing \['t_day'\], unknown \['t_night'\]"):
        reallocate(
            trained(), allocation(2), {"t_user": IDS["t_user"], "t_item": IDS["t_item"], "t_night": IDS["t_day"]}
        )
    with pytest.raises(TypeError, match="'t_user' are torch.float32"):
        reallocate(trained(), allocation(2), {**IDS, "t_user": torch.rand(4)})
    with pytest.raises(ValueError, match="expected one weight for each of its 30 ids"):
        reallocate(trained(), allocation(2), IDS, {"t_day": torch.ones(4)})
