"""The DLRM of train.py: its tables, full or LMA, its layers, its sharding and its optimizers."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ShardingPlan, ShardingType
from torchrec.distributed.utils import optimizer_type_to_emb_opt_type
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig, data_type_to_dtype
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma import Allocation, LMAEmbeddingBagCollection, get_default_sharders
from torchrec_lma.allocation import reduce_builders
from torchrec_lma.datasets import RowDataset, Vocabulary
from torchrec_lma.distributed import level_constraints
from torchrec_lma.memory_report import optimizer_state_bytes
from torchrec_lma.options import make_builder

OPTIMIZERS: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise-adagrad": RowWiseAdagrad,
}
Collection: TypeAlias = EmbeddingBagCollection | LMAEmbeddingBagCollection
Prepare = Callable[[KeyedJaggedTensor], Tensor]


def make_prepare(args: argparse.Namespace, vocabulary: Vocabulary | None) -> Prepare:
    """What gives the ids of the data those of the tables, int64 [ids]."""
    if vocabulary is not None:
        return lambda features: vocabulary(features).values()
    if args.table == "full":  # the hashing trick
        return lambda features: features.values() % args.num_embeddings
    return lambda features: features.values()


def prepared(batch: Batch, prepare: Prepare) -> Batch:
    """A batch that nothing else holds, its ids replaced: a copy would drop cached offsets."""
    batch.sparse_features._values = prepare(batch.sparse_features)
    return batch


def get_allocation(
    args: argparse.Namespace,
    dataset: RowDataset,
    tables: list[EmbeddingBagConfig],
    prepare: Prepare,
    resume_from: Path | None,
) -> Allocation:
    """That of the checkpoint or the file, or one that all ranks build from the training rows. Collective."""
    given = Allocation.load(args.allocation) if args.allocation is not None else None
    if resume_from is not None:
        trained = Allocation.from_checkpoint(resume_from)
        if given is not None and given.fingerprint != trained.fingerprint:
            raise ValueError(
                f"--allocation {args.allocation} has fingerprint {given.fingerprint}, {resume_from} was trained with "
                f"{trained.fingerprint}: leave the option out, the checkpoint brings its own"
            )
        return trained
    if given is not None:
        return given
    builder = make_builder(args, tables)
    share = dataset.batches("train", batch_size=8192, rank=dist.get_rank(), world_size=dist.get_world_size())
    for batch in share:
        builder.update(prepared(batch, prepare).sparse_features)
    # What a builder holds is on the CPU. Any: to torch 2.14 a rank may be outside of the group; here all are in it.
    gloo: Any = dist.new_group(backend="gloo")
    reduced = reduce_builders(builder, gloo)
    built: list[Any] = [None]
    if reduced is not None:
        try:
            built = [reduced.build()]
        except ValueError as error:  # all ranks shall say it, none wait for an allocation
            built = [error]
    dist.broadcast_object_list(built, group=gloo, group_src=0)
    if isinstance(built[0], ValueError):
        raise built[0]
    return built[0]


def make_collection(
    tables: list[EmbeddingBagConfig], allocation: Allocation | None, device: torch.device
) -> Collection:
    """The tables on `device`: LMA tables if there is an allocation, else full ones."""
    if allocation is None:
        return EmbeddingBagCollection(tables=tables, device=device)
    return LMAEmbeddingBagCollection(tables, allocation, device=device)


def make_model(
    args: argparse.Namespace, collection: Collection, dense_in_features: int, device: torch.device
) -> DLRMTrain:
    """The DLRM of the arguments, its layers on `device`."""
    return DLRMTrain(
        DLRM(
            collection,
            dense_in_features=dense_in_features,
            dense_arch_layer_sizes=[*args.dense_layers, args.dim],
            over_arch_layer_sizes=[*args.over_layers, 1],
            dense_device=device,
        )
    )


def stored(collection: Collection) -> EmbeddingBagCollection:
    """The plain collection whose tables TorchRec plans, shards and trains: of LMA tables the levels."""
    return collection.levels if isinstance(collection, LMAEmbeddingBagCollection) else collection


def allowed_kernels(args: argparse.Namespace) -> list[str] | None:
    """What the planner may choose from; None is all. Raises ValueError if nothing is left.

    Replicated (data-parallel) tables train with torch's optimizers, which keep their state in the type of the weights.
    In FP16 the small number that keeps row-wise Adagrad from dividing by 0 is 0, and the weights are NaN after a step.
    """
    data_type = args.data_type or ("FP16" if args.table == "lma" else "FP32")
    if data_type == "FP32":
        return None
    if args.sharding_types == [ShardingType.DATA_PARALLEL.value]:
        raise ValueError(f"data_parallel tables train in FP32 only, these are {data_type}: add another sharding type")
    return [EmbeddingComputeKernel[kernel].value for kernel in ("FUSED", "FUSED_UVM", "FUSED_UVM_CACHING")]


def make_plan(
    model: DLRMTrain, args: argparse.Namespace, device: torch.device, trained: dict[str, Any] | None
) -> ShardingPlan:
    """The plan of TorchRec's planner within the given sharding types.

    `trained`: settings of the run that is resumed. On as many ranks as then, tables keep their sharding types: where
    two cost the same, the planner may choose another one each time.
    """
    collection = model.model.sparse_arch.embedding_bag_collection
    given = ParameterConstraints(sharding_types=args.sharding_types, compute_kernels=allowed_kernels(args))
    constraints = level_constraints(model, {table.name: given for table in collection.embedding_bag_configs()})
    if trained is not None:
        constraints = {
            name: replace(of_table, sharding_types=types_again(trained, name, args.sharding_types))
            for name, of_table in constraints.items()
        }
    topology = Topology(
        world_size=dist.get_world_size(),
        local_world_size=get_local_size(dist.get_world_size()),
        compute_device=device.type,
    )
    planner = EmbeddingShardingPlanner(topology=topology, batch_size=args.batch_size, constraints=constraints)
    return planner.collective_plan(model, get_default_sharders(), dist.GroupMember.WORLD)


def types_again(trained: dict[str, Any], table: str, sharding_types: list[str] | None) -> list[str]:
    """What a table of a run that is resumed may be sharded as."""
    allowed = sharding_types if sharding_types is not None else [each.value for each in ShardingType]
    then = trained["plan"][table]["sharding_type"]
    if then in allowed and trained["world_size"] == dist.get_world_size():
        return [then]
    by_row = OPTIMIZERS[trained["arguments"]["optimizer"]] is RowWiseAdagrad
    found = [each for each in allowed if _form_of_state(each, by_row) == _form_of_state(then, by_row)]
    if not found:
        raise ValueError(
            f"{table} was {then} in the checkpoint, whose optimizer state fits none of --sharding-types {allowed}: add "
            f"{then}"
        )
    return found


def _form_of_state(sharding_type: str, by_row: bool) -> str:
    """Sharding types of the same form load each other's optimizer state: a data-parallel table's is torch's, others'
    is FBGEMM's, which of an optimizer by row has a value for each row and column shard."""
    if sharding_type == ShardingType.DATA_PARALLEL.value:
        return "dense"
    cut = {ShardingType.COLUMN_WISE.value, ShardingType.TABLE_COLUMN_WISE.value, ShardingType.GRID_SHARD.value}
    return "fused, by column shard" if by_row and sharding_type in cut else "fused"


def shard(
    model: DLRMTrain, args: argparse.Namespace, device: torch.device, plan: ShardingPlan
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """The sharded model, and the optimizer of its tables (fused where TorchRec does) and of its layers (Adam)."""
    dmp = DistributedModelParallel(model, device=device, plan=plan, sharders=get_default_sharders())
    parameters = dict(in_backward_optimizer_filter(dmp.named_parameters()))
    tables = {name: p for name, p in parameters.items() if "embedding_bags" in name}  # data-parallel ones
    layers = {name: p for name, p in parameters.items() if name not in tables}
    optimizers = [
        dmp.fused_optimizer,
        KeyedOptimizerWrapper(layers, lambda p: torch.optim.Adam(p, lr=args.dense_lr)),
    ]
    if tables:
        optimizers.append(KeyedOptimizerWrapper(tables, lambda p: OPTIMIZERS[args.optimizer](p, lr=args.lr)))
    return dmp, CombinedOptimizer(optimizers)


def train_tables_in_backward(collection: Collection, args: argparse.Namespace) -> None:
    """Tells TorchRec which optimizer to fuse into the backward of the tables."""
    apply_optimizer_in_backward(OPTIMIZERS[args.optimizer], stored(collection).parameters(), {"lr": args.lr})


def memory_use(collection: Collection, args: argparse.Namespace) -> dict[str, int]:
    """Bytes of the tables, their optimizer state and their allocation; once, however many ranks replicate them."""
    if isinstance(collection, LMAEmbeddingBagCollection):
        report = collection.memory_report()
        return {
            "weight": report.weight_bytes,
            "optimizer": report.optimizer_bytes,
            "allocation": report.allocation_bytes,
            "full": report.full_bytes,
        }
    optimizer = optimizer_type_to_emb_opt_type(OPTIMIZERS[args.optimizer])
    weight_bytes = optimizer_bytes = 0
    for table in collection.embedding_bag_configs():
        weight_bytes += table.num_embeddings * table.embedding_dim * data_type_to_dtype(table.data_type).itemsize
        optimizer_bytes += optimizer_state_bytes(optimizer, table.num_embeddings, table.embedding_dim)
    return {"weight": weight_bytes, "optimizer": optimizer_bytes, "allocation": 0, "full": weight_bytes}
