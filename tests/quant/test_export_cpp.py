"""An exported model in a C++ program without Python, as TorchRec's own server loads it."""

import shutil
import subprocess
from pathlib import Path

import fbgemm_gpu
import pytest
import torch

from support.servable_models import ROWS, criteo_sized, mixed
from torchrec_lma.quant import ServableModel, export

SOURCE = Path(__file__).parent / "cpp" / "predict.cpp"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/quant/cpp/predict.cpp, linked with libtorch and all of FBGEMM's libraries, which register the operators."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    path = tmp_path_factory.mktemp("cpp") / "predict"
    torch_folder, fbgemm_folder = Path(torch.__file__).parent, Path(fbgemm_gpu.__file__).parent
    include, library = torch_folder / "include", torch_folder / "lib"
    command = ["g++", "-std=c++20", "-O0", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", str(SOURCE), "-o", str(path)]
    command += [f"-L{library}", f"-Wl,-rpath,{library}:{fbgemm_folder}", "-Wl,--no-as-needed"]
    command += ["-ltorch", "-ltorch_cpu", "-lc10", *map(str, sorted(fbgemm_folder.glob("*.so")))]
    command += ["-Wl,--allow-shlib-undefined"]  # Python's symbols, which nothing here calls
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["criteo_sized", "mixed"])
def test_a_program_without_python_predicts_the_same(program: Path, tmp_path: Path, name: str) -> None:
    servable: ServableModel = criteo_sized() if name == "criteo_sized" else mixed(tmp_path, None)
    path = export(servable, tmp_path / "model.pt", "int8").path
    wide = {key: value if value.is_floating_point() else value.long() for key, value in servable.sample.items()}
    narrow = {key: value if value.is_floating_point() else value.int() for key, value in servable.sample.items()}
    requests = [wide, narrow, narrow]  # the start-up check sends int64, requests are int32
    torch.save(requests, tmp_path / "in.pt")
    command = [str(program), str(path), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    model = torch.jit.load(path)
    for prediction, given in zip(torch.load(tmp_path / "out.pt", weights_only=False), requests, strict=True):
        assert prediction.shape == (ROWS,) and prediction.dtype == torch.float32
        torch.testing.assert_close(prediction, model(given)["default"], rtol=0, atol=1e-6)
