"""What the sharded twins of LMA collections have in common, and what their sharders have."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor, nn
from torchrec.distributed.embedding_types import BaseEmbeddingSharder, KJTList, ShardedEmbeddingModule
from torchrec.distributed.types import (
    EnumerableShardingSpec,
    Multistreamable,
    ParameterSharding,
    QuantizedCommCodecs,
)
from torchrec.distributed.utils import append_prefix

from torchrec_lma.allocation.artifact import Allocation
from torchrec_lma.collection import LMACollection
from torchrec_lma.distributed.constraints import refuse_constraints_of_logical_tables

Out = TypeVar("Out")
Context = TypeVar("Context", bound=Multistreamable)
M = TypeVar("M", bound=LMACollection)


class ShardedLMACollection(ShardedEmbeddingModule[KJTList, list[Tensor], Out, Context], Generic[Out, Context]):
    """An LMA collection of which `levels` is sharded; every rank has the whole remap.

    Args:
        module: what is sharded.
        levels: its `levels`, sharded.
        sharded: TorchRec's sharded collections in it, by where they are in this module.
        device: of the remap.
    """

    def __init__(self, module: LMACollection, levels: nn.Module, sharded: dict[str, Any], device: torch.device) -> None:
        super().__init__()
        # Children in the order of the unsharded module: torchrec.distributed.shard compares names in order.
        self.remap = module.remap.to("cpu" if device.type == "meta" else device)
        self.levels = levels
        self._sharded = sharded
        # What the base class does with lookups (prefetch, train) is meant for those of `levels`.
        self._lookups: list[nn.Module] = [lookup for each in sharded.values() for lookup in each._lookups]
        self._tables = module.tables
        self._allocation = module.allocation
        self._features = module._features
        self._register_load_state_dict_pre_hook(self._check_state_dict)

    def _check_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: object) -> None:
        self.remap.check_state_dict(state_dict, f"{prefix}remap.")

    @property
    def tables(self) -> list[Any]:
        """The logical tables."""
        return self._tables

    @property
    def allocation(self) -> Allocation:
        return self._allocation

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        # Buffers too: the remap is the same on every rank, and DDP shall not send it around.
        for path, each in self._sharded.items():
            yield from each.sharded_parameter_names(append_prefix(prefix, path))
        for name, _ in self.remap.named_buffers(append_prefix(prefix, "remap")):
            yield name


class LMASharder(BaseEmbeddingSharder[M]):
    """Shards an LMA collection: a plan has its level tables by name.

    Args:
        plain_sharder: TorchRec's, of the collections in `levels`; fused params, codecs and all else are its.
    """

    def __init__(
        self, plain_sharder: BaseEmbeddingSharder[Any], qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None
    ) -> None:
        super().__init__(qcomm_codecs_registry=qcomm_codecs_registry)
        self._plain_sharder = plain_sharder

    def shardable_parameters(self, module: M) -> dict[str, nn.Parameter]:
        refuse_constraints_of_logical_tables(module)
        return {
            name: parameter
            for plain in module.plain_collections()
            for name, parameter in self._plain_sharder.shardable_parameters(plain).items()
        }

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return self._plain_sharder.sharding_types(compute_device_type)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return self._plain_sharder.compute_kernels(sharding_type, compute_device_type)

    @property
    def fused_params(self) -> dict[str, Any] | None:
        return self._plain_sharder.fused_params


def without_bounds_checks(
    plan: dict[str, ParameterSharding], fused_params: dict[str, Any] | None
) -> dict[str, ParameterSharding]:
    """The plan, without FBGEMM's check of every row unless it or the fused params ask for one.

    The rows are the remap's, which are in bounds whatever the ids are; on a GPU the check is a sixth of the forward.
    """
    if "bounds_check_mode" in (fused_params or {}):
        return plan
    return {
        name: replace(sharding, bounds_check_mode=BoundsCheckMode.NONE)
        if sharding.bounds_check_mode is None  # FATAL is 0
        else sharding
        for name, sharding in plan.items()
    }


def refuse_ranks_without_rows(plan: dict[str, ParameterSharding], device: torch.device) -> None:
    """Raises ValueError for a table of which a rank gets no row, on the CPU.

    FBGEMM's CPU kernels tell tables apart by where their rows begin, and read past the last one if it has none: wrong
    gradients, absurd errors or a crash, on any table. A level may well have fewer rows than there are ranks.
    """
    for name, sharding in plan.items() if device.type == "cpu" else ():
        shards = sharding.sharding_spec.shards if isinstance(sharding.sharding_spec, EnumerableShardingSpec) else []
        without = [shard.placement.rank() for shard in shards if shard.shard_sizes[0] == 0]
        if without:
            rows = max(shard.shard_offsets[0] + shard.shard_sizes[0] for shard in shards)
            raise ValueError(
                f"table {name!r} has {rows} rows, of which {sharding.sharding_type} sharding gives none to ranks "
                f"{without}, which FBGEMM's CPU kernels do not survive; shard it table_wise or data_parallel"
            )
