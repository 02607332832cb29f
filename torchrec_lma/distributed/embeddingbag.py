"""The sharded twin of LMAEmbeddingBagCollection, in the manner of torchrec/distributed/mc_embeddingbag.py.

TorchRec's own ShardedEmbeddingBagCollection holds the level tables, under any of its sharding types and kernels. Around
it, the remap runs on the local batch before the input dist, and the regroup when the pooled levels are waited for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding_types import BaseEmbeddingSharder, KJTList, ShardedEmbeddingModule
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionContext,
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.types import (
    Awaitable,
    EnumerableShardingSpec,
    LazyAwaitable,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
)
from torchrec.distributed.utils import append_prefix
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_lma.allocation.artifact import Allocation
from torchrec_lma.distributed.constraints import refuse_constraints_of_logical_tables
from torchrec_lma.features import bag_lengths, checked
from torchrec_lma.modules import LMAEmbeddingBagCollection
from torchrec_lma.regroup import divide_by_lengths, regroup


@dataclass
class LMAEmbeddingBagCollectionContext(EmbeddingBagCollectionContext):
    """Of one batch: TorchRec's, and how many ids the bags of each slot have, [B, slots], where one pools MEAN."""

    bag_lengths: Tensor | None = None

    def record_stream(self, stream: torch.Stream) -> None:
        super().record_stream(stream)
        if self.bag_lengths is not None:
            self.bag_lengths.record_stream(stream)


class ShardedLMAEmbeddingBagCollection(
    ShardedEmbeddingModule[KJTList, list[Tensor], KeyedTensor, LMAEmbeddingBagCollectionContext]
):
    """An LMAEmbeddingBagCollection of which `levels` is sharded; every rank has the whole remap.

    Args:
        module: what is sharded.
        table_name_to_parameter_sharding: the plan of each level and whole table.
        ebc_sharder: shards `levels`.
        env, device: as in TorchRec.
    """

    def __init__(
        self,
        module: LMAEmbeddingBagCollection,
        table_name_to_parameter_sharding: dict[str, ParameterSharding],
        ebc_sharder: EmbeddingBagCollectionSharder,
        env: ShardingEnv,
        device: torch.device,
        module_fqn: str | None = None,
    ) -> None:
        super().__init__()
        if device.type == "cpu":
            _refuse_ranks_without_rows(table_name_to_parameter_sharding)
        # Children in the order of the unsharded module: torchrec.distributed.shard compares names in order.
        self.remap = module.remap.to("cpu" if device.type == "meta" else device)
        self.levels: ShardedEmbeddingBagCollection = ebc_sharder.shard(
            module.levels, table_name_to_parameter_sharding, env=env, device=device, module_fqn=module_fqn
        )
        # What the base class does with lookups (prefetch, train) is meant for those of `levels`.
        self._lookups: list[nn.Module] = self.levels._lookups
        self._tables = module.embedding_bag_configs()
        self._allocation = module.allocation
        self._is_weighted = module.is_weighted()
        self._features = module._features
        self._regroup = partial(_regrouped, module._names, module._dims, module._piece_keys, module._piece_widths)
        self._has_mean = module._has_mean
        self._is_mean = module._is_mean
        self._register_load_state_dict_pre_hook(self._check_state_dict)

    def _check_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: object) -> None:
        self.remap.check_state_dict(state_dict, f"{prefix}remap.")

    def create_context(self) -> LMAEmbeddingBagCollectionContext:
        return LMAEmbeddingBagCollectionContext()

    def input_dist(
        self, ctx: LMAEmbeddingBagCollectionContext, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        """Remaps the local batch, and sends its rows to where they are."""
        self.remap.check_not_overwritten()
        features = checked(features, self._features, self._is_weighted)
        if self._is_weighted and torch.is_grad_enabled() and features.weights().requires_grad:
            raise ValueError(
                "the KeyedJaggedTensor has weights that require gradients, which do not pass the input dist: what made "
                "them would not be trained. Detach them, or give those features full tables"
            )
        with torch.no_grad():
            rows = self.remap(features)
            if self._has_mean:
                ctx.bag_lengths = bag_lengths(features, self._features)
        return self.levels.input_dist(ctx, rows)

    def compute(self, ctx: LMAEmbeddingBagCollectionContext, dist_input: KJTList) -> list[Tensor]:
        return self.levels.compute(ctx, dist_input)

    def output_dist(self, ctx: LMAEmbeddingBagCollectionContext, output: list[Tensor]) -> LazyAwaitable[KeyedTensor]:
        return self._with_regroup(ctx, self.levels.output_dist(ctx, output))

    def compute_and_output_dist(
        self, ctx: LMAEmbeddingBagCollectionContext, input: KJTList
    ) -> LazyAwaitable[KeyedTensor]:
        return self._with_regroup(ctx, self.levels.compute_and_output_dist(ctx, input))

    def _with_regroup(
        self, ctx: LMAEmbeddingBagCollectionContext, pooled: LazyAwaitable[KeyedTensor]
    ) -> LazyAwaitable[KeyedTensor]:
        pooled.callbacks.append(partial(self._regroup, ctx.bag_lengths, self._is_mean))
        return pooled

    @property
    def fused_optimizer(self) -> Any:
        return self.levels.fused_optimizer

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The logical tables."""
        return self._tables

    def is_weighted(self) -> bool:
        return self._is_weighted

    @property
    def allocation(self) -> Allocation:
        return self._allocation

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        # Buffers too: the remap is the same on every rank, and DDP shall not send it around.
        yield from self.levels.sharded_parameter_names(append_prefix(prefix, "levels"))
        for name, _ in self.remap.named_buffers(append_prefix(prefix, "remap")):
            yield name

    @property
    def unsharded_module_type(self) -> type[LMAEmbeddingBagCollection]:
        return LMAEmbeddingBagCollection


def _refuse_ranks_without_rows(plan: dict[str, ParameterSharding]) -> None:
    """Raises ValueError for a table of which a rank gets no row.

    FBGEMM's CPU kernels tell tables apart by where their rows begin, and read past the last one if it has none: wrong
    gradients, absurd errors or a crash, on any table. A level may well have fewer rows than there are ranks.
    """
    for name, sharding in plan.items():
        shards = sharding.sharding_spec.shards if isinstance(sharding.sharding_spec, EnumerableShardingSpec) else []
        without = [shard.placement.rank() for shard in shards if shard.shard_sizes[0] == 0]
        if without:
            rows = max(shard.shard_offsets[0] + shard.shard_sizes[0] for shard in shards)
            raise ValueError(
                f"table {name!r} has {rows} rows, of which {sharding.sharding_type} sharding gives none to ranks "
                f"{without}, which FBGEMM's CPU kernels do not survive; shard it table_wise or data_parallel"
            )


def _regrouped(
    names: list[str],
    dims: list[int],
    piece_keys: list[list[str]],
    piece_widths: list[int],
    lengths: Tensor | None,
    is_mean: list[bool],
    pooled: KeyedTensor,
) -> KeyedTensor:
    values = regroup(pooled, piece_keys, piece_widths)
    if lengths is not None:
        values = divide_by_lengths(values, lengths, is_mean, dims)
    return KeyedTensor(keys=names, length_per_key=dims, values=values)


class LMAEmbeddingBagCollectionSharder(BaseEmbeddingSharder[LMAEmbeddingBagCollection]):
    """Shards an LMAEmbeddingBagCollection: a plan has its level tables and whole tables by name.

    Args:
        ebc_sharder: shards the level tables; fused params, codecs and all else that TorchRec's sharder takes are its.
        fused_params, qcomm_codecs_registry: of the sharder that is made where none is given.
    """

    def __init__(
        self,
        ebc_sharder: EmbeddingBagCollectionSharder | None = None,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> None:
        super().__init__(qcomm_codecs_registry=qcomm_codecs_registry)
        self._ebc_sharder = ebc_sharder or EmbeddingBagCollectionSharder(
            fused_params=fused_params, qcomm_codecs_registry=self.qcomm_codecs_registry
        )

    def shard(
        self,
        module: LMAEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedLMAEmbeddingBagCollection:
        return ShardedLMAEmbeddingBagCollection(
            module, params, self._ebc_sharder, env, device or torch.device("cuda"), module_fqn
        )

    def shardable_parameters(self, module: LMAEmbeddingBagCollection) -> dict[str, nn.Parameter]:
        refuse_constraints_of_logical_tables(module)
        return self._ebc_sharder.shardable_parameters(module.levels)

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return self._ebc_sharder.sharding_types(compute_device_type)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return self._ebc_sharder.compute_kernels(sharding_type, compute_device_type)

    @property
    def fused_params(self) -> dict[str, Any] | None:
        return self._ebc_sharder.fused_params

    @property
    def module_type(self) -> type[LMAEmbeddingBagCollection]:
        return LMAEmbeddingBagCollection

    @property
    def sharded_module_type(self) -> type[ShardedLMAEmbeddingBagCollection]:
        return ShardedLMAEmbeddingBagCollection
