"""torch.export and AOTInductor of LMA collections: other batches than the one that was traced, against eager ones."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchrec import KeyedJaggedTensor, PoolingType
from torchrec.pt2.utils import register_fake_classes

from support import pooled_collection, sequence_collection
from torchrec_lma.quant import quantize

register_fake_classes()  # of what FBGEMM's quantized tables hold


class Pooled(nn.Module):
    def __init__(self, kind: str, weighted: bool) -> None:
        super().__init__()
        self.weighted = weighted
        self.ebc = pooled_collection.collection(kind, pooling=PoolingType.MEAN, is_weighted=weighted)

    def forward(self, values: Tensor, lengths: Tensor, weights: Tensor) -> Tensor:
        given = weights if self.weighted else None
        return self.ebc(KeyedJaggedTensor(pooled_collection.FEATURES, values, given, lengths)).values()

    def arguments(self, seed: int) -> tuple[Tensor, ...]:
        features = pooled_collection.batch(seed, rows=8 + seed, weighted=True)
        return features.values(), features.lengths(), features.weights()


class Sequences(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.ec = sequence_collection.collection(kind)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        found = self.ec(KeyedJaggedTensor(["other", *sequence_collection.FEATURES], values, lengths=lengths))
        return torch.cat([found[name].values() for name in sequence_collection.SLOTS])

    def arguments(self, seed: int) -> tuple[Tensor, ...]:
        features = sequence_collection.batch(seed, rows=8 + seed)
        return features.values(), features.lengths()


MODELS = {
    "pooled": lambda: Pooled("narrow", False),
    "weighted": lambda: Pooled("own", True),
    "raw ids": lambda: Pooled("raw ids", False),
    "sequences": lambda: Sequences("narrow"),
}


def exported(model: nn.Module) -> ExportedProgram:
    given = model.arguments(1)
    return torch.export.export(model, given, dynamic_shapes=tuple({0: Dim.AUTO} for _ in given), strict=False)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if (name, dtype) == ("pooled", torch.int8) else [pytest.mark.slow])
        for name in MODELS
        for dtype in (None, torch.int8)
    ],
    ids=str,
)
def test_exported_programs_take_batches_of_any_size(name: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    model = MODELS[name]().eval()
    if dtype is not None:
        quantize(model, dtype)
    program = exported(copy.deepcopy(model))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for seed in range(1, 4):
        given = model.arguments(seed)
        assert torch.equal(loaded(*given), model(*given))


RUN = """
import sys, torch, fbgemm_gpu
model = torch._inductor.aoti_load_package(sys.argv[1])
torch.save([model(*given) for given in torch.load(sys.argv[2])], sys.argv[3])
assert not {"torchrec", "torchrec_lma"} & set(sys.modules), "it needs more than fbgemm_gpu"
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pooled", "sequences"])
def test_compiled_packages_run_where_only_fbgemm_is(name: str, tmp_path: Path) -> None:
    model = quantize(MODELS[name]().eval(), torch.int8)
    program = exported(copy.deepcopy(model))
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # halves the time that g++ takes
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2"), inductor_configs=quick
    )
    batches = [model.arguments(seed) for seed in range(1, 4)]
    torch.save(batches, tmp_path / "in.pt")
    command = [sys.executable, "-W", "ignore", "-c", RUN, package, tmp_path / "in.pt", tmp_path / "out.pt"]
    subprocess.run(command, check=True, capture_output=True)
    for found, given in zip(torch.load(tmp_path / "out.pt"), batches):
        torch.testing.assert_close(found, model(*given))
