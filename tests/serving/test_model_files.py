"""Files that are no models, or not those of this server: each is refused with its name and what is wrong."""

import functools
import re
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from support.running_server import save_model
from torchrec_lma.cli import main
from torchrec_lma.serving.model_store import ModelStore

CPU = torch.device("cpu")


class Returns(torch.nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        floats = features["float_features"]
        if self.kind == "no default":
            return {"ctr": floats[:, 0]}
        if self.kind == "two columns":
            return {"default": floats}
        if self.kind == "integers":
            return {"default": floats[:, 0].long()}
        return {"default": features["user"]}


@pytest.mark.parametrize(
    "kind, message",
    [
        ("no default", '"default"'),
        ("two columns", r"float32 \[1, 2\] as 'default', not floats \[1\]"),
        ("integers", "int64"),
        ("other keys", "does not keep TorchRec's inference contract"),
    ],
)
def test_module_that_breaks_the_contract_is_no_model(tmp_path: Path, kind: str, message: str) -> None:
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.script(Returns(kind)), str(path))
    with pytest.raises(ValueError, match=message):
        ModelStore(path, (2, 1, 0), CPU, 4)


def in_directory(archive: bytes, offset: int, value: bytes) -> bytes:
    """A zip archive with other bytes at an offset of each entry of its central directory."""
    changed = bytearray(archive)
    for entry in re.finditer(b"PK\1\2", archive):
        changed[entry.start() + offset : entry.start() + offset + len(value)] = value
    return bytes(changed)


@examples(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(part=0.046875, length=1, value=b"\1\0\0\0", in_the_end=True)  # entries before the file's start
@given(
    part=st.floats(0, 1), length=st.integers(1, 4), value=st.binary(min_size=4, max_size=4), in_the_end=st.booleans()
)
def test_damaged_files_are_refused_or_harmless(
    tmp_path: Path, part: float, length: int, value: bytes, in_the_end: bool
) -> None:
    path = tmp_path / "model.pt"
    content = bytearray(whole_model())
    at = int(part * (1000 if in_the_end else len(content) - 1))  # the directory is at the end
    at = len(content) - 1 - at if in_the_end else at
    content[at : at + length] = value[:length]
    path.write_bytes(content)
    try:
        ModelStore(path, None, CPU, 1)
    except ValueError as error:
        assert "model.pt" in str(error) or "torchrec_lma.json" in str(error)


@functools.cache
def whole_model() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return save_model(Path(folder) / "model.pt").read_bytes()


def test_file_that_is_no_model_is_refused_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = save_model(tmp_path / "whole.pt").read_bytes()
    flipped = bytearray(whole)
    at = whole.index(bytes(4096)) + 2048  # in the weights, which are zeros
    flipped[at] ^= 0xFF
    broken = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"not a model",
        "flipped": bytes(flipped),
        "deflated": in_directory(whole, 10, b"\x08\0"),  # as zip's compression method: once a zlib.error
        "long": in_directory(whole, 20, b"\xff\xff\xff\x0f"),  # a compressed size: once an EOFError
    }
    for name, content in broken.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.pt is truncated, damaged or no TorchScript model"):
            ModelStore(path, None, CPU, 4)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="state.pt is truncated, damaged or no TorchScript model"):
        ModelStore(tmp_path / "state.pt", None, CPU, 4)

    nameless = save_model(tmp_path / "nameless.pt", metadata=False)
    with pytest.raises(ValueError, match="export it with torchrec-lma export"):
        ModelStore(nameless, None, CPU, 4)
    with pytest.raises(ValueError, match="leave counts out"):
        ModelStore(tmp_path / "whole.pt", (1, 1, 0), CPU, 4)
    assert main(["serve", str(tmp_path / "text.pt"), "--port", "0"]) == 2
    assert "text.pt is truncated, damaged or no TorchScript model" in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "missing.pt")]) == 2
    assert "missing.pt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not JSON"),
        ("[]", "format_version None"),
        ('{"format_version": 2}', "format_version 2, not 1"),
        ('{"format_version": 1, "float_features": "price"}', "float_features='price' must be a list"),
    ],
)
def test_metadata_that_cannot_be_understood_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "model.pt"
    module = torch.jit.load(str(save_model(path)))
    torch.jit.save(module, str(path), _extra_files={"torchrec_lma.json": text})
    with pytest.raises(ValueError, match=message):
        ModelStore(path, None, CPU, 4)
