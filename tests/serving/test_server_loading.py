"""Model files that never load, crash what loads them, or are much larger than they look; and the models after them."""

import asyncio
import io
import json
import os
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from support.running_server import FLOATS, IDS, Rows, running, save_model
from support.server_process import event, serve_process, until
from torchrec_lma.serving import loading, model
from torchrec_lma.serving.model import Model
from torchrec_lma.serving.model_store import ModelStore
from torchrec_lma.serving.settings import Settings

CPU = torch.device("cpu")


class Loops(torch.nn.Module):
    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x = features["float_features"].sum()
        while bool(x == x):
            x = x * 1.0
        return {"default": features["float_features"][:, 0]}


def save_looping(path: Path) -> Path:
    fields = {"format_version": 1, "float_features": FLOATS, "id_list_features": IDS, "id_score_list_features": ()}
    extra = {"torchrec_lma.json": json.dumps(fields)}
    torch.jit.save(torch.jit.script(Loops()), str(path), _extra_files=extra)
    return path


@pytest.mark.parametrize("what", ["pipe", "folder", "device"])
def test_what_is_no_regular_file_is_refused_unread(tmp_path: Path, what: str) -> None:
    path = tmp_path / "model.pt"
    store = ModelStore(save_model(path), None, CPU, 4)
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"model.pt is not a regular file"):
        Model(path, None, CPU, 4)
    with pytest.raises(ValueError, match=r"model.pt is not a regular file"):
        asyncio.run(store.load())
    assert not store.has_changed()
    assert not store.has_changed()  # it is not tried again


def with_entry(path: Path, name: str, content: bytes, compression: int) -> None:
    with zipfile.ZipFile(path, "a", compression) as archive:
        archive.writestr(name, content)


def test_file_that_unpacks_to_much_more_than_it_is_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_model(tmp_path / "model.pt")
    Model(path, None, CPU, 4)  # torch compresses a model's code
    monkeypatch.setattr(model, "MAX_CODE_BYTES", 1 << 20)
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: pytest.fail("it was read"))
    with_entry(path, "archive/bomb", bytes(2 << 20), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"would unpack to 2,[0-9]{3},[0-9]{3}"):
        Model(path, None, CPU, 4)

    overlapping = io.BytesIO(save_model(tmp_path / "other.pt").read_bytes())
    with zipfile.ZipFile(overlapping, "a", zipfile.ZIP_STORED) as archive:
        archive.filelist += archive.filelist  # the same bytes once more
        archive._didModify = True  # type: ignore[attr-defined]
    (tmp_path / "other.pt").write_bytes(overlapping.getvalue())
    with pytest.raises(ValueError, match="would unpack to"):
        Model(tmp_path / "other.pt", None, CPU, 4)


def test_file_that_takes_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_model(tmp_path / "model.pt")
    store = ModelStore(path, None, CPU, 4)
    old = store.current
    save_model(path, bias=1)
    monkeypatch.setattr(loading, "LOAD_SECONDS", 0.05)  # Python takes longer to start
    with pytest.raises(ValueError, match=r"model.pt did not load and answer a few rows within 0 s"):
        asyncio.run(store.load())
    assert store.current is old


def test_crash_of_what_tries_a_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_model(tmp_path / "model.pt")
    monkeypatch.setattr(loading, "_TRY", "import os; os.abort()")
    said = pytest.raises(ValueError, match=r"model.pt ended the process that tried it by SIGABRT")
    with said, path.open("rb") as file:
        asyncio.run(loading.try_model(path, None, CPU, 4, file.fileno()))


def test_model_that_loads_only_where_it_is_tried_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_model(tmp_path / "model.pt")

    async def nothing(*_: object) -> None: ...

    monkeypatch.setattr("torchrec_lma.serving.model_store.try_model", nothing)
    with running(Settings(path, port=0, watch_seconds=0)) as server:
        save_looping(path)
        monkeypatch.setattr(loading, "LOAD_SECONDS", 0.2)
        monkeypatch.setattr(Model, "_check", lambda *_: time.sleep(2))
        assert not server.run(server.server.reload())
        monkeypatch.undo()
        monkeypatch.setattr("torchrec_lma.serving.model_store.try_model", nothing)
        save_model(path, bias=1)
        assert server.run(server.server.reload())
        data = Rows(3)
        np.testing.assert_allclose(server.send(data.request()), data.expected(bias=1), rtol=1e-5)


@pytest.mark.slow
def test_good_file_is_tried_and_taken_over_and_a_looping_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_model(tmp_path / "model.pt")
    store = ModelStore(path, None, CPU, 4)
    save_model(path, bias=1)
    assert asyncio.run(store.load()) is store.current
    old = store.current
    save_looping(path)
    monkeypatch.setattr(loading, "LOAD_SECONDS", 20.0)
    with pytest.raises(ValueError, match=r"within 20 s"):
        asyncio.run(store.load())
    assert store.current is old


@pytest.mark.slow
def test_a_looping_file_keeps_neither_the_next_one_nor_the_end_waiting(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model.pt")

    def trying(pid: int) -> list[str]:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()

    with serve_process(str(path), "--port", "0") as (process, log):
        event(process, log, "serving")
        for _ in range(2):
            os.replace(save_looping(tmp_path / "loops.pt"), path)
            until(lambda: bool(trying(process.pid)))
            time.sleep(4)  # into the loop, on a machine that is not busy; the rest holds anyhow
            if len([line for line in log if line["event"] == "model loaded"]) == 1:
                save_model(path, bias=1)
                event(process, log, "model loaded", 2, seconds=300)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert log[-1]["event"] == "stopped"
