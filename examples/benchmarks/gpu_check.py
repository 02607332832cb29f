"""Whether LMA tables do on a CUDA GPU what they do on the CPU, and how fast; one command, under 8 minutes.

    python examples/benchmarks/gpu_check.py --out runs/gpu                # gpu_check.json, and gpu_check.md to be read
    python examples/benchmarks/gpu_check.py --device cpu --out runs/form  # for form, where there is no GPU

Each check compares with the unsharded collection on the CPU, trained by torch's own optimizers in FP32. What FBGEMM has
on a GPU only is left out on a CPU, and said. A check that fails does not stop the others; the exit status is then 1.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import fbgemm_gpu  # noqa: F401  registers the operators of scripted tables
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from speed import WORKLOADS, Workload, build, measure, show
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor, PoolingType
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec.distributed.types import CacheParams, ShardedTensor
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_lma import (
    Allocation,
    AllocationBuilder,
    LMAConfig,
    LMAEmbeddingBagCollection,
    LMAEmbeddingCollection,
    get_default_sharders,
)
from torchrec_lma.quant import ServableModel, export, load_checkpoint, request

CPU = torch.device("cpu")
DIM, BATCH, STEPS, NUMBERS = 64, 512, 5, 3
SIZES = {"user": 20_000, "item": 5_000, "tag": 300}
OPTIMIZERS: dict[str, tuple[Any, dict[str, float]]] = {
    "row-wise Adagrad": (RowWiseAdagrad, {"lr": 0.05, "eps": 1e-8}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "eps": 1e-8}),
}


class Left(Exception):
    """A check that the device has no kernels for."""


@dataclass
class Outcome:
    """Of a check: the largest difference from the CPU's result, or why there is none."""

    check: str
    status: str  # passed, failed, left out
    difference: float | None
    tolerance: float | None
    seconds: float
    said: str = ""


class Model(nn.Module):
    """Tables and one layer; TorchRec's DLRM would do as well and says less about which part differs."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables = tables
        self.layer = nn.Linear(NUMBERS + len(SIZES) * DIM, 1)

    def forward(self, float_features: Tensor, features: KeyedJaggedTensor) -> Tensor:
        return self.layer(torch.cat([float_features, self.tables(features).values()], dim=1)).squeeze(1)


class Training(nn.Module):
    """A loss from a batch, as TorchRec's pipelines want it."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.model(batch.dense_features, batch.sparse_features)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels), logits.detach()


def tables(divide_by: int = 1) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(
            name=f"t_{name}",
            num_embeddings=size // divide_by,
            embedding_dim=DIM,
            feature_names=[name],
            pooling=PoolingType.MEAN if name == "tag" else PoolingType.SUM,
        )
        for name, size in SIZES.items()
    ]


def batch(seed: int, rows: int = BATCH) -> Batch:
    """None to three ids in a bag, the smaller the more often, unseen ones among them."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(SIZES) * rows,), generator=random)
    values = [
        (size * torch.rand(int(lengths[k * rows : (k + 1) * rows].sum()), generator=random) ** 3).long()
        for k, size in enumerate(SIZES.values())
    ]
    features = KeyedJaggedTensor(list(SIZES), torch.cat(values), lengths=lengths)
    numbers = torch.rand(rows, NUMBERS, generator=random)
    return Batch(numbers, features, (torch.rand(rows, generator=random) < 0.4).float())


def allocation(data_type: str = "FP32") -> Allocation:
    builder = AllocationBuilder(tables(), LMAConfig(compression=8, data_type=data_type))
    for seed in range(100, 120):
        builder.update(batch(seed).sparse_features)
    return builder.build()


def made(data_type: str = "FP32") -> Training:
    """The same weights each time, on the CPU."""
    torch.manual_seed(1)
    return Training(Model(LMAEmbeddingBagCollection(tables(), allocation(data_type))))


def batches(optimizer: str) -> list[Batch]:
    # FBGEMM's Adam moves the rows of a batch, torch's all that have momentum: with one batch over and over, the same.
    return [batch(0 if optimizer == "Adam" else step) for step in range(STEPS)]


def trained_on_cpu(optimizer: str, data_type: str = "FP32") -> dict[str, Tensor]:
    """The weights after STEPS steps of the unsharded model with torch's optimizers, in FP32."""
    training = made(data_type).float()
    optimizer_class, settings = OPTIMIZERS[optimizer]
    of_tables = optimizer_class(training.model.tables.parameters(), **settings)
    of_layer = torch.optim.SGD(training.model.layer.parameters(), lr=0.1)
    for each in batches(optimizer):
        of_tables.zero_grad()
        of_layer.zero_grad()
        training(each)[0].backward()
        of_tables.step()
        of_layer.step()
    return floats(training.state_dict())


def floats(state: dict[str, Any]) -> dict[str, Tensor]:
    """The weights, on the CPU in float32; this one rank has all shards."""
    whole = {}
    for name, value in state.items():
        value = value.local_shards()[0].tensor if isinstance(value, ShardedTensor) else value
        if value.is_floating_point():
            whole[name] = value.detach().cpu().float()
    return whole


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    if found.keys() != expected.keys():
        raise AssertionError(f"names differ: {sorted(found.keys() ^ expected.keys())}")
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def sharded(
    training: nn.Module, device: torch.device, optimizer: str, kernel: str = "fused", cache: CacheParams | None = None
) -> DistributedModelParallel:
    """By TorchRec's planner, table-wise, the optimizer of the tables fused."""
    optimizer_class, settings = OPTIMIZERS[optimizer]
    stored = {name: weight for name, weight in training.named_parameters() if "embedding" in name}
    apply_optimizer_in_backward(optimizer_class, stored.values(), dict(settings))  # TorchRec takes the rate out of it
    given = ParameterConstraints(sharding_types=["table_wise"], compute_kernels=[kernel], cache_params=cache)
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=1, compute_device=device.type),
        constraints={name.split(".")[-2]: given for name in stored},
    )
    sharders = get_default_sharders()
    start = {name: value.clone() for name, value in training.state_dict().items() if not value.is_meta}
    dmp = DistributedModelParallel(training, device=device, plan=planner.plan(training, sharders), sharders=sharders)
    for name, value in dmp.state_dict().items():  # sharding has initialised the tables again
        if isinstance(value, ShardedTensor) and name in start:
            value.local_shards()[0].tensor.copy_(start[name])
    return dmp


def sgd_of_layer(dmp: DistributedModelParallel) -> KeyedOptimizerWrapper:
    layers = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    return KeyedOptimizerWrapper(layers, lambda weights: torch.optim.SGD(weights, lr=0.1))


def check_unsharded(device: torch.device) -> float:
    """Logits and gradients."""
    results = []
    for where in (CPU, device):
        training = made().to(where)
        loss, logits = training(batch(0).to(where))
        loss.backward()
        grads = {name: weight.grad for name, weight in training.named_parameters()}
        results.append(floats(grads | {"logits": logits}))
    return largest_difference(results[1], results[0])


def check_sequences(device: torch.device) -> float:
    """A vector for each id, unsharded."""
    configs = [EmbeddingConfig(name="t_item", num_embeddings=5_000, embedding_dim=DIM, feature_names=["item"])]
    builder = AllocationBuilder(configs, LMAConfig(compression=8, data_type="FP32"))
    made_of = builder.update(batch(100).sparse_features.permute([1])).build()
    torch.manual_seed(1)
    collection = LMAEmbeddingCollection(configs, made_of)
    features = batch(0).sparse_features.permute([1])
    expected = collection(features)["item"].values()
    found = collection.to(device)(features.to(device))["item"].values()
    return largest_difference(floats({"item": found}), floats({"item": expected}))


def check_fused(device: torch.device, optimizer: str, data_type: str = "FP32") -> float:
    """Weights after training, sharded on one rank, with the optimizer fused into the backward."""
    if device == CPU and optimizer == "Adam":
        raise Left("FBGEMM has no fused Adam on the CPU")
    dmp = sharded(made(data_type), device, optimizer)
    of_layer = sgd_of_layer(dmp)
    for each in batches(optimizer):
        of_layer.zero_grad()
        dmp(each.to(device))[0].backward()
        of_layer.step()
    return largest_difference(floats(dmp.state_dict()), trained_on_cpu(optimizer, data_type))


def check_pipeline(device: torch.device, prefetch: bool = False) -> float:
    """TrainPipelineSparseDist; with `prefetch`, on tables in host memory with a cache on the GPU, filled ahead."""
    if device == CPU and prefetch:
        raise Left("FBGEMM's UVM caching is for CUDA")
    cache = CacheParams(load_factor=0.3, prefetch_pipeline=True) if prefetch else None
    kernel = "fused_uvm_caching" if prefetch else "fused"
    dmp = sharded(made(), device, "row-wise Adagrad", kernel, cache)
    pipeline_class = PrefetchTrainPipelineSparseDist if prefetch else TrainPipelineSparseDist
    pipeline = pipeline_class(dmp, sgd_of_layer(dmp), device)
    feed = iter(batches("row-wise Adagrad"))
    for _ in range(STEPS):
        pipeline.progress(feed)
    return largest_difference(floats(dmp.state_dict()), trained_on_cpu("row-wise Adagrad"))


def check_checkpoints(device: torch.device) -> float:
    """Saved on the device and loaded on the CPU; saved on the CPU and loaded on the device."""
    dmp = sharded(made(), device, "row-wise Adagrad")
    with tempfile.TemporaryDirectory() as folder:
        dmp(batch(0).to(device))[0].backward()
        dcp.save({"model": dmp.state_dict()}, checkpoint_id=f"{folder}/device")
        on_cpu = made()
        load_checkpoint(on_cpu, Path(folder, "device"), "model.")
        there = largest_difference(floats(on_cpu.state_dict()), floats(dmp.state_dict()))
        fresh = made()
        dcp.save({"model": fresh.state_dict()}, checkpoint_id=f"{folder}/cpu")
        state = {"model": dmp.state_dict()}
        dcp.load(state, checkpoint_id=f"{folder}/cpu")
        dmp.load_state_dict(state["model"])
        back = largest_difference(floats(dmp.state_dict()), floats(fresh.state_dict()))
    with torch.no_grad():
        logits = largest_difference(
            floats({"logits": dmp(batch(9).to(device))[1]}), floats({"logits": fresh(batch(9))[1]})
        )
    return max(there, back, logits)


def check_serving(device: torch.device) -> float:
    """Probabilities of the INT8 model in TorchScript, as a server computes them, against the float model's."""
    model, rows = made().model.eval(), batch(0)
    sample = request(rows.dense_features, rows.sparse_features)
    with torch.no_grad():
        expected = model(rows.dense_features, rows.sparse_features).sigmoid()
    names = [f"number{k}" for k in range(NUMBERS)]
    with tempfile.TemporaryDirectory() as folder:
        servable = ServableModel(model, names, list(SIZES), [], sample)
        exported = export(servable, Path(folder, "model.pt"), "int8", device=device.type)
        scripted = torch.jit.load(exported.path, map_location=device)
        found = scripted({name: tensor.to(device) for name, tensor in sample.items()})["default"]
    return largest_difference({"p": found.cpu()}, {"p": expected})


CHECKS: list[tuple[str, float, Callable[[torch.device], float]]] = [
    ("unsharded: logits and gradients", 1e-4, check_unsharded),
    ("unsharded sequences", 1e-4, check_sequences),
    ("sharded, fused row-wise Adagrad", 1e-3, lambda device: check_fused(device, "row-wise Adagrad")),
    ("sharded, fused Adam", 1e-3, lambda device: check_fused(device, "Adam")),
    # FBGEMM rounds FP16 weights at random on a GPU: a step is off by up to 1/1024 of a weight, here at most 1.
    ("sharded, FP16 weights", 1e-2, lambda device: check_fused(device, "row-wise Adagrad", "FP16")),
    ("TrainPipelineSparseDist", 1e-3, check_pipeline),
    ("UVM caching, prefetched", 1e-3, lambda device: check_pipeline(device, prefetch=True)),
    ("checkpoints to the CPU and back", 1e-5, check_checkpoints),
    ("INT8 in TorchScript", 2e-2, check_serving),
]


def run_check(name: str, tolerance: float, check: Callable[[torch.device], float], device: torch.device) -> Outcome:
    started, said = time.perf_counter(), ""
    try:
        difference: float | None = check(device)
        status = "passed" if difference is not None and difference <= tolerance else "failed"
    except Left as reason:
        difference, status, said = None, "left out", str(reason)
    except Exception as error:  # the next check may pass, and time on a GPU is short
        traceback.print_exc()
        difference, status, said = None, "failed", f"{type(error).__name__}: {error}".splitlines()[0]
    return Outcome(name, status, difference, tolerance, time.perf_counter() - started, said)


def speeds(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Rows of speed.py: 26 equal tables (on a CPU small ones), LMA tables at 16x beside full ones."""
    on_gpu = device.type == "cuda"
    workload = Workload(WORKLOADS["equal"] if on_gpu else (10_000,) * 26, pooling=1, batch_size=8192 if on_gpu else 512)
    allocations = {
        f"LMA {data_type}": build(workload, LMAConfig(compression=16, data_type=data_type))
        for data_type in ("FP16", "FP32")
    }
    how = argparse.Namespace(beside=["full", "hashing trick"], repeats=repeats, warm_up=5, threads=None)
    how.device = device.type
    return measure(workload, allocations, 1, how)


def page(record: dict[str, Any]) -> str:
    """The record, to be read."""
    lines = [
        f"# LMA tables on {record['device']}",
        "",
        ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "",
        "Each check compares with the unsharded collection on the CPU.",
        "",
        "| check | | largest difference | tolerance | seconds |",
        "|---|---|---|---|---|",
    ]
    for outcome in record["checks"]:
        found = outcome["said"] if outcome["difference"] is None else f"{outcome['difference']:.2g}"
        numbers = f"{found} | {outcome['tolerance']:g} | {outcome['seconds']:.1f}"
        lines.append(f"| {outcome['check']} | {outcome['status']} | {numbers} |")
    if record["speed"]:
        lines += ["", "26 tables of dim 64, minima, and minima / medians as ratios to full tables", "", "```"]
        lines += [show(record["speed"]), "```"]
    return "\n".join(lines) + "\n"


def installed(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write the two files")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=20, help="of what is timed (default: %(default)s)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU; --device cpu runs the checks that a CPU can, for form")
    device = torch.device("cuda", 0) if args.device == "cuda" else CPU
    backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"a CPU ({platform.machine()})",
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | installed(("torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchrec_lma")),
        "checks": [],
        "speed": [],
    }
    args.out.mkdir(parents=True, exist_ok=True)

    def write() -> None:  # after each check: what is known stays known if the next one takes the process down
        (args.out / "gpu_check.json").write_text(json.dumps(record, indent=1))
        (args.out / "gpu_check.md").write_text(page(record))

    for name, tolerance, check in CHECKS:
        outcome = run_check(name, tolerance, check, device)
        record["checks"].append(asdict(outcome))
        write()
        shown = outcome.said if outcome.difference is None else f"{outcome.difference:.2g} of {tolerance:g}"
        print(f"{name}: {outcome.status} ({shown})", flush=True)
    dist.destroy_process_group()
    record["speed"] = speeds(device, args.repeats)
    write()
    print(show(record["speed"]))
    return int(any(outcome["status"] == "failed" for outcome in record["checks"]))


if __name__ == "__main__":
    sys.exit(main())
