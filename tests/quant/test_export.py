"""Exported files, loaded where torchrec_lma is not imported, against float models and against the contract."""

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan

from support import ranks, servable_models
from support.servable_models import (
    CONFIG,
    IDS,
    ROWS,
    SCORED,
    SequenceSums,
    make_allocation,
    make_dlrm,
    make_tables,
    mixed,
    of_dlrm,
    stored_tables,
)
from torchrec_lma import get_default_sharders
from torchrec_lma.cli import main as torchrec_lma
from torchrec_lma.cli.export import load_factory
from torchrec_lma.quant import export, load_checkpoint
from torchrec_lma.quant.export import CheckFailed

FACTORIES = Path(servable_models.__file__)


def metadata_of(path: Path) -> dict[str, Any]:
    files = {"torchrec_lma.json": ""}
    torch.jit.load(path, _extra_files=files)
    return json.loads(files["torchrec_lma.json"])


@pytest.mark.parametrize(("table", "dtype"), [("lma", "int8"), ("full", "int8"), ("full", "fp16")])
def test_the_file_predicts_what_the_float_model_predicts(tmp_path: Path, table: str, dtype: str) -> None:
    torch.manual_seed(0)
    model = make_dlrm(table)
    for bag in stored_tables(model).embedding_bags.values():
        nn.init.normal_(bag.weight)  # so that a table that is not read, or read wrongly, shows
    servable = of_dlrm(model, largest=2**40 if table == "lma" else 500)
    sample = servable.sample
    features = servable_models.KeyedJaggedTensor(
        keys=IDS, values=sample["id_list_features.values"], lengths=sample["id_list_features.lengths"]
    )
    expected = model(sample["float_features"], features).detach().reshape(-1).sigmoid()
    assert expected.std() > 0.01
    exported = export(servable, tmp_path / "new" / "model.pt", dtype)
    served = torch.jit.load(exported.path)(sample)["default"]
    tolerance = {"int8": 5e-3, "fp16": 1e-3}[dtype]
    torch.testing.assert_close(served, expected, rtol=0, atol=tolerance)
    assert exported.difference <= tolerance
    assert [path.name for path in exported.path.parent.iterdir()] == ["model.pt"]
    assert bool(metadata_of(exported.path)["allocation_fingerprint"]) == (table == "lma")


def test_the_contract_of_torchrecs_server(tmp_path: Path) -> None:
    servable = mixed(tmp_path, None)
    path = export(servable, tmp_path / "model.pt", "int8").path
    assert set(servable.sample) == {
        "float_features",
        "id_list_features.lengths",
        "id_list_features.values",
        "id_score_list_features.lengths",
        "id_score_list_features.values",
        "id_score_list_features.weights",
    }
    model = torch.jit.load(path)
    wide = {key: value.long() if not value.is_floating_point() else value for key, value in servable.sample.items()}
    narrow = {key: value.int() if not value.is_floating_point() else value for key, value in servable.sample.items()}
    predictions = [model(rows) for rows in (servable.sample, wide, narrow)]
    for prediction in predictions:
        assert set(prediction) == {"default"}
        assert prediction["default"].dtype == torch.float32 and prediction["default"].device.type == "cpu"
        assert prediction["default"].shape == (ROWS,)
        assert torch.equal(prediction["default"], predictions[0]["default"])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    one = {"float_features": torch.zeros(1, 3), "id_list_features.lengths": torch.tensor([1, 0]).int()}
    one |= {"id_list_features.values": torch.tensor([7]).int(), "id_score_list_features.lengths": torch.tensor([0])}
    one |= {"id_score_list_features.values": torch.tensor([]).int(), "id_score_list_features.weights": torch.tensor([])}
    assert model(one)["default"].shape == (1,)


def test_the_metadata_names_the_features(tmp_path: Path) -> None:
    servable = mixed(tmp_path, None)
    fingerprints = [servable.model.plain.allocation.fingerprint, servable.model.scored.allocation.fingerprint]
    assert metadata_of(export(servable, tmp_path / "model.pt", "fp16").path) == {
        "format_version": 1,
        "float_features": ["a", "b", "c"],
        "id_list_features": IDS,
        "id_score_list_features": SCORED,
        "string_features": [],
        "dtype": "fp16",
        "allocation_fingerprint": ",".join(fingerprints),
    }


def test_tables_of_sequences_are_exported_with_their_fingerprint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SequenceSums()
    servable = of_dlrm(model)
    features = servable_models.KeyedJaggedTensor(
        keys=IDS,
        values=servable.sample["id_list_features.values"],
        lengths=servable.sample["id_list_features.lengths"],
    )
    bags = [features[name].to_dense() for name in IDS]
    sums = [torch.stack([model.ec.materialize(f"t_{f}", ids).sum(0) for ids in of]) for f, of in zip(IDS, bags)]
    expected = model.over(torch.cat([servable.sample["float_features"], *sums], 1)).detach().reshape(-1).sigmoid()
    path = export(servable, tmp_path / "model.pt", "fp16").path
    torch.testing.assert_close(torch.jit.load(path)(servable.sample)["default"], expected, rtol=0, atol=1e-3)
    assert metadata_of(path)["allocation_fingerprint"] == model.ec.allocation.fingerprint


def test_a_failed_check_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    model = make_dlrm("lma")
    for bag in stored_tables(model).embedding_bags.values():
        bag.weight.data.normal_()
    with pytest.raises(CheckFailed, match="tolerance of 1e-09"):
        export(of_dlrm(model), path, "int4", tolerance=1e-9)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_export_that_the_disk_has_no_room_for_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as a disk with no more space
    try:
        with pytest.raises(OSError, match=r"File too large for [0-9,]+ bytes: '.*/model.pt'"):
            export(of_dlrm(make_dlrm("full")), path, "int8")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"] and path.read_bytes() == b"old"


def test_a_nan_is_no_success(tmp_path: Path) -> None:
    model = make_dlrm("lma")
    nn.init.constant_(model.over_arch.model[-1].bias, float("nan"))
    with pytest.raises(CheckFailed):
        export(of_dlrm(model), tmp_path / "model.pt", "fp32")


def test_samples_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for key, value, message in (
        ("float_features", torch.zeros(ROWS, 2), r"\[20, 2\], expected \[B, 3\]"),
        ("id_list_features.lengths", torch.zeros(3).int(), "3 id_list_features.lengths"),
        ("id_list_features.values", torch.zeros(1).int(), "1 values"),
    ):
        servable = of_dlrm(make_dlrm("lma"))
        servable.sample[key] = value
        with pytest.raises(ValueError, match=message):
            export(servable, tmp_path / "model.pt", "int8")
    servable = of_dlrm(make_dlrm("lma"))
    del servable.sample["id_list_features.values"]
    with pytest.raises(ValueError, match="lacks .*id_list_features.values"):
        export(servable, tmp_path / "model.pt", "int8")
    with pytest.raises(ValueError, match="int7"):
        export(of_dlrm(make_dlrm("lma")), tmp_path / "model.pt", "int7")
    assert not list(tmp_path.iterdir())


def save_sharded(folder: str, table: str, sharding_type: str) -> list[tuple[str, list[int], torch.Tensor]]:
    """On every rank: a sharded DLRM with random weights, saved. Returns this rank's parts: key, offsets, values."""
    torch.manual_seed(dist.get_rank())
    model = make_dlrm(table)
    shards = {"table_wise": table_wise(0), "row_wise": row_wise(), "data_parallel": data_parallel()}
    shards["column_wise"] = column_wise([0, 1])
    sharders = get_default_sharders()
    ebc = model.sparse_arch.embedding_bag_collection
    of_tables = construct_module_sharding_plan(
        ebc,
        {table.name: shards[sharding_type] for table in stored_tables(model).embedding_bag_configs()},
        next(sharder for sharder in sharders if sharder.module_type is type(ebc)),
        local_size=dist.get_world_size(),
        device_type="cpu",
    )
    plan = ShardingPlan({"sparse_arch.embedding_bag_collection": of_tables})
    dmp = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    dcp.save({"model": dmp.state_dict()}, checkpoint_id=folder)
    parts = []
    for name, value in dmp.state_dict().items():
        if isinstance(value, ShardedTensor):
            parts += [(name, shard.metadata.shard_offsets, shard.tensor.clone()) for shard in value.local_shards()]
        else:
            parts.append((name, [0] * value.dim(), value.detach().clone()))
    return parts


@pytest.mark.parametrize(
    ("table", "sharding_type", "world_size"),
    [("lma", "table_wise", 1), ("lma", "row_wise", 2), ("lma", "data_parallel", 2), ("full", "column_wise", 2)],
)
def test_checkpoints_of_any_plan_load_into_one_process(
    tmp_path: Path, table: str, sharding_type: str, world_size: int
) -> None:
    saved = ranks.run(save_sharded, world_size, str(tmp_path), table, sharding_type)
    model = make_dlrm(table)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    load_checkpoint(model, tmp_path, "model.")
    loaded = model.state_dict()
    assert {name for parts in saved for name, _, _ in parts} == set(loaded)
    for parts in saved:
        for name, offsets, values in parts:
            there = tuple(slice(first, first + size) for first, size in zip(offsets, values.shape))
            assert torch.equal(loaded[name][there], values), name
    assert not any(value.isnan().any() for value in loaded.values() if value.is_floating_point())


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    model = make_dlrm("lma")
    with pytest.raises(FileNotFoundError, match="holds no torch.distributed.checkpoint"):
        load_checkpoint(model, tmp_path)
    dcp.save({"model": make_dlrm("full").state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match="no tensor 'model.sparse_arch.*another model"):
        load_checkpoint(model, tmp_path, "model.")
    full = make_dlrm("full")
    full.over_arch.model[-1] = nn.Linear(8, 2)
    with pytest.raises(ValueError, match=r"in size \[1, 8\], the model in \[2, 8\]"):
        load_checkpoint(full, tmp_path, "model.")


def test_the_export_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dcp.save({"model": make_dlrm("lma").state_dict()}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    options = ["export", "--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "model.pt")]
    assert torchrec_lma([*options, "--model", "support.servable_models:lma_dlrm"]) == 0
    assert metadata_of(tmp_path / "model.pt")["dtype"] == "int8"
    said = capsys.readouterr().out
    assert f"checked on {ROWS} rows" in said and f"{(tmp_path / 'model.pt').stat().st_size:,} bytes" in said


def test_a_model_with_another_allocation_than_its_weights_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same sizes: only the rows of ids differ."""
    dcp.save({"model": make_dlrm("lma").state_dict()}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    other = make_allocation(make_tables(IDS), dataclasses.replace(CONFIG, seed=1))
    other.save(tmp_path / "other.safetensors")
    options = ["export", "--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "model.pt")]
    options += ["--model", "support.servable_models:lma_dlrm", "--allocation", str(tmp_path / "other.safetensors")]
    assert torchrec_lma(options) == 2
    assert f"this model has allocation {other.fingerprint}" in capsys.readouterr().err
    model = make_dlrm("lma", other)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)  # in place: load_state_dict never sees it
    with pytest.raises(ValueError, match=f"this model has allocation {other.fingerprint}"):
        export(of_dlrm(model), tmp_path / "model.pt", "int8")
    assert not (tmp_path / "model.pt").exists()


@pytest.mark.slow
def test_the_export_command_takes_a_file(tmp_path: Path) -> None:
    dcp.save({"model": make_dlrm("lma").state_dict()}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    options = ["export", "--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "model.pt")]
    code = "import sys; from torchrec_lma.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-W", "ignore", "-c", code, *options, "--model", f"{FACTORIES}:lma_dlrm"]
    done = subprocess.run([*command, "--dtype", "fp16"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert metadata_of(tmp_path / "model.pt")["dtype"] == "fp16"


def test_a_factory_file_may_be_any_python_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # the file's folder goes in front, and would stay there
    file = tmp_path / "torch.py"  # called like a package
    file.write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "@dataclasses.dataclass\n"
        "class Names:\n"
        "    first: dataclasses.KW_ONLY\n"
        "def factory(checkpoint, allocation):\n"
        "    return Names.__name__\n"
    )
    assert load_factory(f"{file}:factory")(tmp_path, None) == "Names"
    assert sys.modules["torch"] is torch


def test_wrong_options_are_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["export", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "model.pt"), "--model"]
    for factory, message in (
        ("nowhere", "module:function"),
        ("no_such_module:f", "no_such_module"),
        ("no_such_file.py:f", "no file"),
        ("support.servable_models:nothing", "no function 'nothing'"),
        ("support.servable_models:not_a_factory", "no function 'not_a_factory'"),
        ("support.servable_models:lma_dlrm", "no .metadata"),
    ):
        assert torchrec_lma([*options, factory]) == 2
        assert message in capsys.readouterr().err
    assert load_factory("support.servable_models:lma_dlrm") is servable_models.lma_dlrm
    options[2] = str(tmp_path / "nowhere")
    assert torchrec_lma([*options, "support.servable_models:lma_dlrm"]) == 2
    assert "not a folder" in capsys.readouterr().err


def test_devices_that_are_not_there_are_refused(tmp_path: Path) -> None:
    for device in ("tpu", *(["cuda"] if not torch.cuda.is_available() else [])):
        with pytest.raises(ValueError, match=f"'{device}' is not here"):
            export(of_dlrm(make_dlrm("lma")), tmp_path / "model.pt", "int8", device=device)
