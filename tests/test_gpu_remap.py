"""The remap's Triton kernels give the batches that torch's operators give: in Triton's interpreter on the CPU, and on a
GPU where there is one."""

import importlib
import os
from collections.abc import Iterator, Sequence
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

OPTIONS = ("source", "shared_fraction", "signature_fraction")
SOURCE = RowsMinHash()
SIZES = {"user": 3000, "item": 500, "shop": 200, "day": 3}
CASES: dict[str, dict[str, Any]] = {
    "bitmaps": {"compression": 7},
    "sorted vocabularies": {"compression": 9, "by_frequency": True},
    "packed rows": {"compression": 64},
    "shared rows": {"compression": 200},
    "raw ids": {"compression": 8, "raw_ids": True},
    "raw ids that share rows": {"compression": 100, "raw_ids": ("t_user",)},
    "two dims": {"compression": 8, "dims": (16, 16, 8, 16)},
    "all own": {"compression": 6, "all_seen": True},
    "all own the same columns": {"compression": 8, "all_seen": True},
    "all columns": {"compression": 1},
    "signatures": {"compression": 60, "source": SOURCE, "shared_fraction": 0.5, "signature_fraction": 0.3},
    "signatures of raw ids": {
        **{"compression": 30, "source": SOURCE, "shared_fraction": 0.5, "signature_fraction": 0.3},
        "raw_ids": True,
    },
    "the paper's form": {"compression": 8, "widths": (4, 4, 4, 4), "source": SOURCE, "shared_fraction": 1},
    "the paper's form, packed": {"compression": 8, "widths": (1, 1, 2, 4, 8), "source": SOURCE, "shared_fraction": 1},
    "a row of each level for a table": {"memory_bytes": 150, "widths": (4, 4, 8), "shared_fraction": 1},
}
BATCHES = ["plain", "weighted", "int32", "variable", "padded", "one row", "no id that is used"]


def raw_tables(case: str) -> Sequence[str]:
    names = CASES[case].get("raw_ids", ())
    return [f"t_{name}" for name in SIZES] if names is True else names


def batch(seed: int, rows: int, case: str, kind: str = "plain") -> KeyedJaggedTensor:
    """None to three ids in a bag; some are in no vocabulary. Small ids are frequent, if the case wants it."""
    random = torch.Generator().manual_seed(seed)
    rows = 1 if kind == "one row" else rows
    # FBGEMM gets the gradient of weights wrong where a feature is left out.
    sizes = SIZES if kind == "weighted" else {**SIZES, "unused": 9}
    strides = [rows, 3, rows, 7, 1] if kind == "variable" else [rows] * 5
    values, lengths = [], []
    for (name, size), stride in zip(sizes.items(), strides):
        lengths.append(torch.randint(0, 4, (stride,), generator=random))
        if kind == "no id that is used" and name != "unused":
            lengths[-1].zero_()
        ids = (size * torch.rand(int(lengths[-1].sum()), generator=random) ** 3).long()
        if not CASES[case].get("by_frequency"):
            ids = ids * 7 % size
        ids = torch.where(torch.rand(ids.numel(), generator=random) < 0.1, ids * 3 - 500, ids)
        if f"t_{name}" in raw_tables(case) and kind != "int32":
            ids = ids * -7046029254386353131  # all 64 bits
        values.append(ids)
    if kind == "padded":  # lengths add up to less than there are values
        values.append(torch.arange(700))
    ids = torch.cat(values)
    options: dict[str, Any] = {}
    if kind == "weighted":
        options["weights"] = torch.rand(ids.numel(), generator=random)
    if kind == "variable":
        options["stride_per_key_per_rank"] = [[stride] for stride in strides]
        options["inverse_indices"] = (list(sizes), torch.stack([torch.arange(rows) % stride for stride in strides]))
    return KeyedJaggedTensor(
        list(sizes), ids.to(torch.int32) if kind == "int32" else ids, lengths=torch.cat(lengths), **options
    )


def remap(case: str, is_weighted: bool) -> Remap:
    settings = {name: value for name, value in CASES[case].items() if name not in ("by_frequency", "all_seen", "dims")}
    options = {name: settings.pop(name) for name in OPTIONS if name in settings}
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", num_embeddings=size, embedding_dim=dim, feature_names=[name])
        for (name, size), dim in zip(SIZES.items(), CASES[case].get("dims", (16,) * 4))
    ]
    builder = AllocationBuilder(tables, LMAConfig(**settings), **options)
    if CASES[case].get("by_frequency"):
        for table in tables:
            ids = torch.arange(table.num_embeddings // 2)
            builder.add_counts(table.name, ids, 1000 // (ids + 1) + 1)
    elif CASES[case].get("all_seen"):
        for table in tables:
            ids = torch.arange(table.num_embeddings)
            builder.add_counts(table.name, ids, ids * 7 % 5 + 1)
    else:
        for seed in range(10):
            builder.update(batch(seed, 100, case))
    return Remap(builder.build(), slots_of(tables), is_weighted)


def has_one_row_an_id(module: Remap) -> bool:
    return len(module.keys) == len(module.features) and all(m.nobody_is_absent for m in module.memories.values())


def found(case: str, kind: str, with_kernel: bool, device: str = "cpu") -> list[Any]:
    """What the remap gives."""
    module = remap(case, kind == "weighted").to(device)
    features = batch(99, 300, case, kind).to(torch.device(device))
    if kind == "weighted":
        features.weights().requires_grad_()
    with patch.object(
        torchrec_lma.remap, "_has_kernel", lambda batch, device: with_kernel and batch.values().numel() > 0
    ):
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
        remap_batch(remap(case, kind == "weighted"), batch(99, 300, case, kind))
    return names


@pytest.fixture(scope="module")
def compiler() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """Triton looks at its variable when it is imported: a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with patch.dict(os.environ, TRITON_INTERPRET="1"):
            pool.submit(int).result()  # starts it
        yield pool


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("case", CASES)
def test_kernels_and_operators_agree(interpreter: ProcessPoolExecutor, case: str, kind: str) -> None:
    check_equal(interpreter.submit(found, case, kind, True).result(), found(case, kind, False))


@pytest.mark.parametrize("kind", ["plain", "weighted", "int32", "variable"])
@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_for_a_gpu(compiler: ProcessPoolExecutor, case: str, kind: str) -> None:
    module = remap(case, False)
    kernels = ["rows_kernel"] * len(module.memories)
    if not has_one_row_an_id(module):
        kernels.append("kept_kernel")
    assert compiler.submit(compiled, case, kind).result() == kernels


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("case", CASES)
def test_kernels_on_a_gpu_and_operators_agree(case: str, kind: str) -> None:
    check_equal(found(case, kind, True, "cuda"), found(case, kind, False))


def test_the_cases_are_of_every_kind() -> None:
    modules = {case: remap(case, False) for case in CASES}
    memories = [memory for module in modules.values() for memory in module.memories.values()]
    owners = {type(each) for memory in memories for each in memory.owners}
    assert owners == {AllOwn, NoneOwns, BitmapOwners, RangeOwners, IndexOwners}
    assert {memory.raw_ids for memory in memories if memory.has_signatures} == {False, True}
    assert any(any(memory.own_rows) for memory in memories if memory.has_signatures)
    packs = {pack for memory in memories for pack, rows in zip(memory.packs, memory.shared_rows) if rows}
    assert packs == {1, 2, 4}
    assert any(all(memory.shared_by_table) for memory in memories)
    assert {memory.outside_is_0 for memory in memories} == {False, True}
    assert {has_one_row_an_id(module) for module in modules.values()} == {False, True}
    assert not has_one_row_an_id(modules["bitmaps"])


def remap_lengths(case: str, lengths: list[int]) -> None:
    module = remap(case, False)
    features = KeyedJaggedTensor(module.features, torch.arange(6), lengths=torch.tensor(lengths))
    importlib.import_module("torchrec_lma.gpu_remap").remap_batch(module, features)


@pytest.mark.parametrize("case", ["bitmaps", "all own the same columns"])
@pytest.mark.parametrize("lengths", [[9, 0, 0, 0], [3, -9, 9, 1], [9, -9, 3, 3, 0, 0, 0, 0]])
def test_lengths_that_are_not_of_the_values_are_refused(
    interpreter: ProcessPoolExecutor, case: str, lengths: list[int]
) -> None:
    with pytest.raises(ValueError, match="lengths that are negative, or 6 values and lengths that add up to"):
        interpreter.submit(remap_lengths, case, lengths).result()
