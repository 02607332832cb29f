"""The sharded twin of LMAEmbeddingBagCollection, in the manner of torchrec/distributed/mc_embeddingbag.py.

TorchRec's own ShardedEmbeddingBagCollection holds the level tables, under any of its sharding types and kernels. Around
it, the remap runs on the local batch before the input dist, and the regroup when the pooled levels are waited for.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionContext,
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.types import (
    Awaitable,
    LazyAwaitable,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_lma.distributed.collection import (
    LMASharder,
    ShardedLMACollection,
    refuse_ranks_without_rows,
    without_bounds_checks,
)
from torchrec_lma.features import bag_lengths, checked
from torchrec_lma.modules import LMAEmbeddingBagCollection
from torchrec_lma.regroup import Pieces, regroup


@dataclass
class LMAEmbeddingBagCollectionContext(EmbeddingBagCollectionContext):
    """Of one batch: TorchRec's, and how many ids the bags of each slot have, [B, slots], where one pools MEAN."""

    bag_lengths: Tensor | None = None

    def record_stream(self, stream: torch.Stream) -> None:
        super().record_stream(stream)
        if self.bag_lengths is not None:
            self.bag_lengths.record_stream(stream)


class ShardedLMAEmbeddingBagCollection(ShardedLMACollection[KeyedTensor, LMAEmbeddingBagCollectionContext]):
    """An LMAEmbeddingBagCollection of which `levels` is sharded; every rank has the whole remap.

    Args:
        module: what is sharded.
        table_name_to_parameter_sharding: the plan of each level.
        ebc_sharder: shards `levels`.
        env, device: as in TorchRec.
    """

    levels: ShardedEmbeddingBagCollection

    def __init__(
        self,
        module: LMAEmbeddingBagCollection,
        table_name_to_parameter_sharding: dict[str, ParameterSharding],
        ebc_sharder: EmbeddingBagCollectionSharder,
        env: ShardingEnv,
        device: torch.device,
        module_fqn: str | None = None,
    ) -> None:
        refuse_ranks_without_rows(table_name_to_parameter_sharding, device)
        plan = without_bounds_checks(table_name_to_parameter_sharding, ebc_sharder.fused_params)
        levels = ebc_sharder.shard(module.levels, plan, env=env, device=device, module_fqn=module_fqn)
        super().__init__(module, levels, {"levels": levels}, device)
        self._is_weighted = module.is_weighted()
        self._regroup = partial(_regrouped, module._pieces, module._dims)
        self._has_mean = module._has_mean

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
        pooled.callbacks.append(partial(self._regroup, ctx.bag_lengths))
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
    def unsharded_module_type(self) -> type[LMAEmbeddingBagCollection]:
        return LMAEmbeddingBagCollection


def _regrouped(pieces: Pieces, dims: list[int], lengths: Tensor | None, pooled: KeyedTensor) -> KeyedTensor:
    values = regroup(pooled, pieces.tables, pieces.slots, pieces.levels, pieces.cuts, pieces.runs, lengths)
    return KeyedTensor(keys=pieces.names, length_per_key=dims, values=values)


class LMAEmbeddingBagCollectionSharder(LMASharder[LMAEmbeddingBagCollection]):
    """Shards an LMAEmbeddingBagCollection: a plan has its level tables by name.

    Args:
        ebc_sharder: shards the level tables; fused params, codecs and all else that TorchRec's sharder takes are its.
        fused_params: of the sharder that is made where none is given.
        qcomm_codecs_registry: likewise.
    """

    _plain_sharder: EmbeddingBagCollectionSharder

    def __init__(
        self,
        ebc_sharder: EmbeddingBagCollectionSharder | None = None,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> None:
        ebc_sharder = ebc_sharder or EmbeddingBagCollectionSharder(
            fused_params=fused_params, qcomm_codecs_registry=qcomm_codecs_registry
        )
        super().__init__(ebc_sharder, qcomm_codecs_registry)

    def shard(
        self,
        module: LMAEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedLMAEmbeddingBagCollection:
        return ShardedLMAEmbeddingBagCollection(
            module, params, self._plain_sharder, env, device or torch.device("cuda"), module_fqn
        )

    @property
    def module_type(self) -> type[LMAEmbeddingBagCollection]:
        return LMAEmbeddingBagCollection

    @property
    def sharded_module_type(self) -> type[ShardedLMAEmbeddingBagCollection]:
        return ShardedLMAEmbeddingBagCollection
