"""A DLRM that the trainer's own functions make, on a few ranks, from which checkpoints are saved and gone on from."""

import argparse
import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpointing
import model as dlrm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import DataType
from torchrec.optim.keyed import CombinedOptimizer

from torchrec_lma import (
    AllocationBuilder,
    LMAConfig,
    LMAEmbeddingBagCollection,
    LMAEmbeddingBagCollectionSharder,
)

dlrm.OPTIMIZERS["adam"] = torch.optim.Adam

ROWS = {"user": 41, "item": 30, "tag": 20}
BATCH = 12  # rows on all ranks together: every number of ranks takes the same steps
SAVED_AFTER, STEPS = 2, 4
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setup:
    """What a model is made of; all but its sharding is the same when a checkpoint of it is loaded.

    Attributes:
        table, optimizer, dim, data_type: options of train.py; "adam" for the dense kernel.
        sharding: what TorchRec's planner may choose from, all if None.
        plan: by hand instead, for all tables: a sharding type that the planner does not offer on the CPU, or
            "uneven_columns" of two widths; after it " dense" for that kernel.
        widths: of the levels.
    """

    table: str
    optimizer: str
    sharding: tuple[str, ...] | None = None
    plan: str | None = None
    dim: int = 8
    data_type: str = "FP32"
    widths: tuple[int, ...] | None = None

    def arguments(self) -> argparse.Namespace:
        """Of train.py, those that its functions look at."""
        return argparse.Namespace(
            **dataclasses.asdict(self),
            sharding_types=None if self.sharding is None else list(self.sharding),
            dense_layers=[8],
            over_layers=[8],
            batch_size=BATCH,
            lr=0.05,
            dense_lr=0.01,
        )


def features(step: int) -> tuple[list[Tensor], list[Tensor]]:
    """Lengths and values of each feature, of the rows of all ranks."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(0, 4, (len(ROWS), BATCH), generator=generator)
    values = [
        (rows * torch.rand(int(n.sum()), generator=generator) ** 2).long() for rows, n in zip(ROWS.values(), lengths)
    ]
    return list(lengths), values


def batch(step: int) -> Batch:
    """This rank's share of it."""
    share = BATCH // dist.get_world_size()
    mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    lengths, values = features(step)
    of_bags = [v.split(n.tolist()) for v, n in zip(values, lengths)]
    generator = torch.Generator().manual_seed(1000 + step)
    return Batch(
        dense_features=torch.randn(BATCH, 2, generator=generator)[mine],
        sparse_features=KeyedJaggedTensor(
            keys=list(ROWS),
            values=torch.cat(list(itertools.chain.from_iterable(bags[mine] for bags in of_bags))),
            lengths=torch.cat([n[mine] for n in lengths]),
        ),
        labels=(torch.rand(BATCH, generator=generator) < 0.5).float()[mine],
    )


def build(
    setup: Setup, trained: dict[str, Any] | None = None
) -> tuple[DistributedModelParallel, CombinedOptimizer, dict[str, Any]]:
    """As train.py does: the sharded model, its optimizer, and the settings of a checkpoint that its planning reads."""
    args = setup.arguments()
    tables = [
        EmbeddingBagConfig(
            name=f"t_{name}",
            num_embeddings=rows,
            embedding_dim=setup.dim,
            feature_names=[name],
            data_type=DataType[setup.data_type] if setup.table == "full" else DataType.FP32,
        )
        for name, rows in ROWS.items()
    ]
    allocation = None
    if setup.table == "lma":
        builder = AllocationBuilder(
            tables,
            LMAConfig(compression=2, data_type=setup.data_type, widths=setup.widths, seed=3),
        )
        for step in range(10):
            lengths, values = features(step)
            builder.update(KeyedJaggedTensor(keys=list(ROWS), values=torch.cat(values), lengths=torch.cat(lengths)))
        allocation = builder.build()
    collection = dlrm.make_collection(tables, allocation, torch.device("meta"))
    torch.manual_seed(7 * dist.get_world_size() + dist.get_rank())
    model = dlrm.make_model(args, collection, 2, CPU)
    if setup.plan is None or not setup.plan.endswith(" dense"):
        dlrm.train_tables_in_backward(collection, args)
    plan = dlrm.make_plan(model, args, CPU, trained) if setup.plan is None else plan_by_hand(setup.plan, collection)
    of_tables = plan.plan["model.sparse_arch.embedding_bag_collection"]
    settings = {
        "world_size": dist.get_world_size(),
        "arguments": {"optimizer": setup.optimizer},
        "plan": {
            name: {"sharding_type": p.sharding_type, "compute_kernel": p.compute_kernel, "ranks": p.ranks}
            for name, p in of_tables.items()
        },
    }
    return (*dlrm.shard(model, args, CPU, plan), settings)


def plan_by_hand(plan: str, collection: nn.Module) -> ShardingPlan:
    ranks = dist.get_world_size()
    sharding, _, kernel = plan.partition(" ")
    kernel = kernel or "fused"
    lma = isinstance(collection, LMAEmbeddingBagCollection)
    sharder: Any = LMAEmbeddingBagCollectionSharder() if lma else EmbeddingBagCollectionSharder()

    def of_table(i: int, columns: int) -> Any:
        if sharding == "row_wise":
            return row_wise(compute_kernel=kernel)
        if sharding == "table_wise":
            return table_wise(rank=i % ranks, compute_kernel=kernel)
        if sharding == "column_wise":
            return column_wise(ranks=[(i + j) % ranks for j in range(columns // 4)], compute_kernel=kernel)
        assert sharding == "uneven_columns"
        widths = [4] * (ranks - 1)
        widths.insert(i % ranks, columns - 4 * len(widths))
        return column_wise(size_per_rank=widths, compute_kernel=kernel)

    parameters = sharder.shardable_parameters(collection)
    of_tables = {name: of_table(i, parameter.size(1)) for i, (name, parameter) in enumerate(parameters.items())}
    key = "model.sparse_arch.embedding_bag_collection"
    return ShardingPlan(
        {key: construct_module_sharding_plan(collection, of_tables, sharder, ranks, ranks, device_type="cpu")}
    )


def take_steps(model: DistributedModelParallel, optimizer: CombinedOptimizer, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        model(batch(step))[0].backward()
        optimizer.step()


def save(setup: Setup, folder: Path) -> None:
    """A checkpoint after SAVED_AFTER steps and one after STEPS. Collective."""
    model, optimizer, settings = build(setup)
    checkpoints = checkpointing.Checkpoints(folder, keep=2)
    for first, last in ((0, SAVED_AFTER), (SAVED_AFTER, STEPS)):
        take_steps(model, optimizer, first, last)
        checkpoints.save(last, model, optimizer, {}, settings)


def go_on(setup: Setup, saved: Path, folder: Path) -> set[str]:
    """Loads the first checkpoint of `save` and makes the same two again. Collective; returns the sharding types."""
    source = checkpointing.Checkpoints(saved).path(SAVED_AFTER)
    model, optimizer, settings = build(setup, checkpointing.read_settings(source))
    checkpoints = checkpointing.Checkpoints(folder, keep=2)
    checkpoints.load(source, model, optimizer)
    checkpoints.save(SAVED_AFTER, model, optimizer, {}, settings)
    take_steps(model, optimizer, SAVED_AFTER, STEPS)
    checkpoints.save(STEPS, model, optimizer, {}, settings)
    return {table["sharding_type"] for table in settings["plan"].values()}


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Those of model and optimizer, whole, read on one process."""
    reader = dcp.FileSystemReader(checkpoint)
    state = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        for key, stored in reader.read_metadata().state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata) and not key.startswith("random.")
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def differences(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 0, atol: float = 0) -> list[str]:
    """Names of tensors that are missing, too many, of another size, or other than expected."""
    different = sorted(found.keys() ^ expected.keys())
    for name in sorted(found.keys() & expected.keys()):
        mine, theirs = found[name].double(), expected[name].double()
        if mine.shape != theirs.shape or not torch.allclose(mine, theirs, rtol=rtol, atol=atol):
            different.append(name)
    return different
