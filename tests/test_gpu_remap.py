"""The remap's Triton kernels give the batches that torch's operators give: in Triton's interpreter on the CPU, and on a
GPU where there is one."""

import importlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

import torchrec_lma.remap
from torchrec_lma import AllocationBuilder, LMAConfig
from torchrec_lma.allocation import RowsMinHash
from torchrec_lma.features import slots_of
from torchrec_lma.owners import AllOwn, BitmapOwners, IndexOwners, NoneOwns, RangeOwners
from torchrec_lma.remap import Remap

pytest.importorskip("triton")  # which torch for CPUs does without

SIZES = {"user": 3000, "item": 500, "shop": 200, "day": 3}
CASES: dict[str, dict[str, Any]] = {
    "bitmaps": {"compression": 4},
    "sorted vocabularies": {"compression": 4, "by_frequency": True},
    "packed rows": {"compression": 64},
    "shared rows": {"compression": 200},
    "raw ids": {"compression": 8, "raw_ids": True},
    "raw ids that share rows": {"compression": 100, "raw_ids": ("t_user",)},
    "two dims": {"compression": 8, "dims": (16, 16, 8, 16)},
    "signatures": {"compression": 8, "widths": (4, 4, 8), "shared_fraction": 0.5},
    "signatures of raw ids": {"compression": 8, "widths": (4, 4, 8), "shared_fraction": 0.5, "raw_ids": True},
    "the paper's form": {"compression": 8, "widths": (4, 4, 4, 4), "shared_fraction": 1},
}
BATCHES = ["plain", "weighted", "int32", "variable", "padded"]


def batch(seed: int, rows: int, kind: str = "plain", by_frequency: bool = False) -> KeyedJaggedTensor:
    """None to three ids in a bag; some are in no vocabulary, most are small or, without `by_frequency`, are not."""
    random = torch.Generator().manual_seed(seed)
    strides = [rows, 3, rows, 7] if kind == "variable" else [rows] * 4
    lengths = [torch.randint(0, 4, (stride,), generator=random) for stride in strides]
    values = []
    for size, of_feature in zip(SIZES.values(), lengths):
        ids = (size * torch.rand(int(of_feature.sum()), generator=random) ** 3).long()
        ids = ids if by_frequency else ids * 7 % size
        values.append(torch.where(torch.rand(ids.numel(), generator=random) < 0.1, ids * 3 - 500, ids))
    if kind == "padded":  # lengths add up to less than there are values
        values.append(torch.arange(700))
    ids = torch.cat(values)
    options: dict[str, Any] = {}
    if kind == "weighted":
        options["weights"] = torch.rand(ids.numel(), generator=random)
    if kind == "variable":
        options["stride_per_key_per_rank"] = [[stride] for stride in strides]
        options["inverse_indices"] = (list(SIZES), torch.stack([torch.arange(rows) % stride for stride in strides]))
    return KeyedJaggedTensor(
        list(SIZES), ids.to(torch.int32) if kind == "int32" else ids, lengths=torch.cat(lengths), **options
    )


def remap(case: str, is_weighted: bool) -> Remap:
    settings = dict(CASES[case])
    by_frequency, dims = settings.pop("by_frequency", False), settings.pop("dims", (16,) * 4)
    shared_fraction = settings.pop("shared_fraction", None)
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", num_embeddings=size, embedding_dim=dim, feature_names=[name])
        for (name, size), dim in zip(SIZES.items(), dims)
    ]
    source = RowsMinHash() if "widths" in settings else None
    builder = AllocationBuilder(tables, LMAConfig(**settings), source, shared_fraction)
    if by_frequency:
        for table in tables:
            ids = torch.arange(table.num_embeddings // 2)
            builder.add_counts(table.name, ids, 1000 // (ids + 1) + 1)
    else:
        for seed in range(10):
            builder.update(batch(seed, 100))
    return Remap(builder.build(), slots_of(tables), is_weighted)


def found(case: str, kind: str, with_kernel: bool, device: str = "cpu") -> list[Any]:
    """What the remap gives."""
    module = remap(case, kind == "weighted").to(device)
    features = batch(99, 300, kind, CASES[case].get("by_frequency", False)).to(torch.device(device))
    if kind == "weighted":
        features.weights().requires_grad_()
    with patch.object(torchrec_lma.remap, "_has_kernel", lambda features: with_kernel):
        rows = module(features)
    parts = [rows.values(), rows.lengths(), module.out_of_vocabulary]
    if kind == "weighted":
        (rows.weights() * torch.arange(rows.weights().numel(), device=device)).sum().backward()
        parts += [rows.weights().detach(), features.weights().grad]
    parts = [part.cpu() for part in parts]
    return [rows.keys(), rows.length_per_key(), rows.stride_per_key_per_rank(), *parts]


def check_equal(of_kernels: list[Any], of_operators: list[Any]) -> None:
    for one, other in zip(of_kernels, of_operators, strict=True):
        if isinstance(other, torch.Tensor):
            assert one.dtype is other.dtype and torch.equal(one, other)
        else:
            assert one == other


class H100:
    """Stands in for the driver of a GPU that is not there, so that Triton can compile for it."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class NothingComputed(Exception):
    """What follows would read what no kernel wrote."""


def compiled(case: str, kind: str) -> list[str]:
    """The names of the kernels of a batch, which are compiled instead of launched."""
    import triton

    launch, names = triton.runtime.jit.JITFunction.run, []

    def compile_only(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launch(kernel, *args, **kwargs | {"warmup": True})
        names.append(kernel.fn.__name__)
        if names[-1] == "kept_kernel":
            raise NothingComputed

    triton.runtime.driver.set_active(H100())
    with patch.object(triton.runtime.jit.JITFunction, "run", compile_only), suppress(NothingComputed):
        remap_batch = importlib.import_module("torchrec_lma.gpu_remap").remap_batch
        remap_batch(remap(case, kind == "weighted"), batch(99, 300, kind))
    return names


@pytest.fixture(scope="module")
def compiler() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[[str, str], list[Any]]]:
    """`found` of the kernels. Triton looks at its variable when it is imported: a process of their own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with patch.dict(os.environ, TRITON_INTERPRET="1"):
            pool.submit(int).result()  # starts it
        yield lambda case, kind: pool.submit(found, case, kind, True).result()


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("case", CASES)
def test_kernels_and_operators_agree(interpreted: Callable[[str, str], list[Any]], case: str, kind: str) -> None:
    check_equal(interpreted(case, kind), found(case, kind, False))


@pytest.mark.parametrize("kind", ["plain", "weighted"])
@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_for_a_gpu(compiler: ProcessPoolExecutor, case: str, kind: str) -> None:
    module = remap(case, False)
    groups = len(module.memories) + (module.n_whole > 0)
    assert compiler.submit(compiled, case, kind).result() == ["rows_kernel"] * groups + ["kept_kernel"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("case", CASES)
def test_kernels_on_a_gpu_and_operators_agree(case: str, kind: str) -> None:
    check_equal(found(case, kind, True, "cuda"), found(case, kind, False))


def test_the_cases_have_all_owners() -> None:
    owners = {type(each) for case in CASES for m in remap(case, False).memories.values() for each in m.owners}
    assert owners == {AllOwn, NoneOwns, BitmapOwners, RangeOwners, IndexOwners}
