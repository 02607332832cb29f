"""A checkpoint of the trainer loads on any number of ranks: the bits that were saved, and the steps that come after.

Steps after a load are compared with those that the saving ranks took themselves, on the same rows, so that a state that
was saved and loaded wrongly alike is found too.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from support.checkpointed_model import SAVED_AFTER, STEPS, Setup, checkpointing, differences, go_on, save, tensors
from support.ranks import run


def assert_goes_on(setup: Setup, saved: Path, folder: Path, ranks: int, **sharding: Any) -> set[str]:
    types = run(go_on, ranks, dataclasses.replace(setup, **sharding), saved, folder)[0]
    mine, theirs = (
        [tensors(checkpointing.Checkpoints(where).path(step)) for step in (SAVED_AFTER, STEPS)]
        for where in (folder, saved)
    )
    assert not differences(mine[0], theirs[0])
    assert any("embedding_bags" in name for name in differences(theirs[0], theirs[1]))  # steps change what is compared
    assert not differences(mine[1], theirs[1], rtol=1e-3, atol=1e-4)  # sums over other batches are rounded otherwise
    return types


# Full tables and levels; of the dense kernel Adam, which FBGEMM does not fuse on the CPU.
DENSE = [("adam", "table_wise dense"), ("adam", "column_wise dense"), ("rowwise-adagrad", "row_wise dense")]
UNEVEN = [("sgd", "uneven_columns"), ("rowwise-adagrad", "uneven_columns")]


@pytest.mark.parametrize("optimizer, plan", [*DENSE, *UNEVEN])
@pytest.mark.parametrize("table", ["full", "lma"])
def test_a_plan_by_hand_goes_on_as_saved(tmp_path: Path, table: str, optimizer: str, plan: str) -> None:
    setup = Setup(table, optimizer, plan=plan, dim=32, widths=(16, 16))
    run(save, 2, setup, tmp_path / "saved")
    assert_goes_on(setup, tmp_path / "saved", tmp_path / "loaded", 2)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer, plan", [*DENSE, ("sgd", "uneven_columns"), ("adagrad", "uneven_columns")])
def test_a_plan_by_hand_goes_on_with_more_ranks(tmp_path: Path, optimizer: str, plan: str) -> None:
    setup = Setup("full", optimizer, plan=plan, dim=16)
    run(save, 2, setup, tmp_path / "saved")
    assert_goes_on(setup, tmp_path / "saved", tmp_path / "loaded", 3)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["table_wise", "column_wise", "data_parallel", "row_wise"])
@pytest.mark.parametrize("optimizer", ["sgd", "rowwise-adagrad"])
@pytest.mark.parametrize("table", ["full", "lma"])
def test_any_number_of_ranks_goes_on(tmp_path: Path, table: str, optimizer: str, sharding: str) -> None:
    by_hand = sharding == "row_wise"  # which TorchRec's planner does not offer on the CPU
    # 3 tables or levels: with 3 ranks each rank holds a part of one only, with 2 not of all.
    setup = Setup(table, optimizer, plan=sharding) if by_hand else Setup(table, optimizer, (sharding,))
    for saved, loaded in ((2, (1, 3)), (3, (2,))):
        run(save, saved, setup, tmp_path / f"{saved}")
        for ranks in loaded:
            types = assert_goes_on(setup, tmp_path / f"{saved}", tmp_path / f"{saved}-{ranks}", ranks)
            assert by_hand or types == {sharding}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adagrad", "rowwise-adagrad"])
def test_tables_whose_columns_were_cut_go_on_with_what_the_planner_likes(tmp_path: Path, optimizer: str) -> None:
    setup = Setup("full", optimizer, ("column_wise",), dim=256)  # two column shards
    run(save, 2, setup, tmp_path / "saved")
    for ranks in (2, 3):
        assert_goes_on(setup, tmp_path / "saved", tmp_path / f"{ranks}", ranks, sharding=None)


@pytest.mark.slow
def test_half_precision_goes_on(tmp_path: Path) -> None:
    setup = Setup("lma", "rowwise-adagrad", data_type="FP16")
    run(save, 2, setup, tmp_path / "saved")
    run(go_on, 3, setup, tmp_path / "saved", tmp_path / "loaded")
    of_runs = [tensors(checkpointing.Checkpoints(tmp_path / name).path(SAVED_AFTER)) for name in ("loaded", "saved")]
    assert not differences(*of_runs)


def refusal(setup: Setup, saved: Path, folder: Path) -> str:
    with pytest.raises(ValueError) as refused:  # noqa: PT011  callers look at what it says
        go_on(setup, saved, folder)
    return str(refused.value)


def test_other_column_shards_are_refused_where_a_row_has_a_value_in_each(tmp_path: Path) -> None:
    setup = Setup("full", "rowwise-adagrad", plan="uneven_columns", dim=16)
    run(save, 2, setup, tmp_path / "saved")
    whole = dataclasses.replace(setup, plan="table_wise")
    said = run(refusal, 2, whole, tmp_path / "saved", tmp_path / "loaded")
    assert "t_user.momentum1 has size [82] there and [41] here (row-wise optimizers have a value for" in said[0]
    assert said[0] == said[1]  # one of which holds no part of t_user


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    setup = Setup("full", "adagrad", plan="table_wise")
    run(save, 2, setup, tmp_path / "saved")
    said = run(refusal, 2, dataclasses.replace(setup, optimizer="sgd"), tmp_path / "saved", tmp_path / "loaded")
    assert "is of another model or optimizer than this run's: it holds optimizer.state.model.sparse_arch." in said[0]
    assert said[0] == said[1]
