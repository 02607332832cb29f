"""The sharded twin of LMAEmbeddingCollection, in the manner of torchrec/distributed/mc_embedding.py.

TorchRec's own ShardedEmbeddingCollections hold the level tables, one for each width, under any of its sharding types
and kernels. Around them, the remap runs on the local batch before the input dist, and the regroup when their vectors
are waited for.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding import (
    EmbeddingCollectionContext,
    EmbeddingCollectionSharder,
    ShardedEmbeddingCollection,
)
from torchrec.distributed.embedding_sharding import KJTListSplitsAwaitable
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, KJTList
from torchrec.distributed.types import (
    Awaitable,
    LazyAwaitable,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
    ShardingType,
)
from torchrec.distributed.utils import append_prefix
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_lma.distributed.collection import (
    LMASharder,
    ShardedLMACollection,
    refuse_ranks_without_rows,
    without_bounds_checks,
)
from torchrec_lma.features import checked
from torchrec_lma.regroup import for_plain_collections, numbered
from torchrec_lma.sequences import LMAEmbeddingCollection

T = TypeVar("T")


@dataclass
class LMAEmbeddingCollectionContext(EmbeddingCollectionContext):
    """Of one batch.

    Attributes:
        of_widths: TorchRec's context of each of its collections. The `sharding_contexts` here are all of theirs.
        batch: the ids of all slots.
        positions: of each row the place of its id among them, int64.
    """

    of_widths: list[EmbeddingCollectionContext] = field(default_factory=list)
    batch: KeyedJaggedTensor | None = None
    positions: Tensor | None = None

    def record_stream(self, stream: torch.Stream) -> None:
        for context in self.of_widths:
            context.record_stream(stream)
        for held in (self.batch, self.positions):
            if held is not None:
                held.record_stream(stream)


class LMAEmbeddingCollectionAwaitable(LazyAwaitable[dict[str, JaggedTensor]]):
    """Waits for the vectors of each width, and regroups them."""

    def __init__(
        self,
        of_widths: list[LazyAwaitable[dict[str, JaggedTensor]]],
        regroup: Callable[[list[dict[str, JaggedTensor]]], dict[str, JaggedTensor]],
    ) -> None:
        super().__init__()
        self._of_widths = of_widths
        self._regroup = regroup

    def _wait_impl(self) -> dict[str, JaggedTensor]:
        return self._regroup([each.wait() for each in self._of_widths])


class ShardedLMAEmbeddingCollection(ShardedLMACollection[dict[str, JaggedTensor], LMAEmbeddingCollectionContext]):
    """An LMAEmbeddingCollection of which `levels` is sharded; every rank has the whole remap.

    Args:
        module: what is sharded.
        table_name_to_parameter_sharding: the plan of each level.
        ec_sharder: shards the collections in `levels`.
        env, device: as in TorchRec.
    """

    def __init__(
        self,
        module: LMAEmbeddingCollection,
        table_name_to_parameter_sharding: dict[str, ParameterSharding],
        ec_sharder: EmbeddingCollectionSharder,
        env: ShardingEnv,
        device: torch.device,
        module_fqn: str | None = None,
    ) -> None:
        refuse_ranks_without_rows(table_name_to_parameter_sharding, device)
        _refuse_dense_kernels(table_name_to_parameter_sharding, device)
        plan = without_bounds_checks(table_name_to_parameter_sharding, ec_sharder.fused_params)
        sharded: dict[str, ShardedEmbeddingCollection] = {
            width: ec_sharder.shard(
                plain,  # type: ignore[arg-type]
                plan,
                env=env,
                device=device,
                module_fqn=append_prefix(module_fqn or "", f"levels.{width}"),
            )
            for width, plain in module.levels.items()
        }
        levels = nn.ModuleDict(sharded)
        super().__init__(module, levels, {f"levels.{width}": each for width, each in sharded.items()}, device)
        self._need_indices = module.need_indices()
        self._pieces = module._pieces

    def create_context(self) -> LMAEmbeddingCollectionContext:
        return LMAEmbeddingCollectionContext()

    def input_dist(
        self, ctx: LMAEmbeddingCollectionContext, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        """Remaps the local batch, and sends its rows to where they are."""
        self.remap.check_not_overwritten()
        with torch.no_grad():
            ctx.batch = numbered(checked(features, self._features, False), self.remap.features)
            rows = self.remap(ctx.batch)
            ctx.positions = rows.weights()
            plain = for_plain_collections(rows)
        awaitables = []
        for sharded in self._sharded.values():
            of_width = sharded.create_context()
            awaitables += sharded.input_dist(of_width, plain).awaitables
            ctx.of_widths.append(of_width)
            ctx.sharding_contexts += of_width.sharding_contexts
        return KJTListSplitsAwaitable(awaitables, ctx)

    def compute(self, ctx: LMAEmbeddingCollectionContext, dist_input: KJTList) -> list[Tensor]:
        return [
            output
            for sharded, of_width, features in self._by_width(ctx, dist_input.features)
            for output in sharded.compute(of_width, KJTList(features))
        ]

    def output_dist(
        self, ctx: LMAEmbeddingCollectionContext, output: list[Tensor]
    ) -> LazyAwaitable[dict[str, JaggedTensor]]:
        of_widths = [sharded.output_dist(each, part) for sharded, each, part in self._by_width(ctx, output)]
        return self._with_regroup(ctx, of_widths)

    def compute_and_output_dist(
        self, ctx: LMAEmbeddingCollectionContext, input: KJTList
    ) -> LazyAwaitable[dict[str, JaggedTensor]]:
        of_widths = [
            sharded.compute_and_output_dist(each, KJTList(part))
            for sharded, each, part in self._by_width(ctx, input.features)
        ]
        return self._with_regroup(ctx, of_widths)

    def _by_width(
        self, ctx: LMAEmbeddingCollectionContext, values: list[T]
    ) -> Iterator[tuple[ShardedEmbeddingCollection, EmbeddingCollectionContext, list[T]]]:
        """Each sharded collection, its context, and those of the values, one for each sharding type, that are its."""
        begin = 0
        for sharded, of_width in zip(self._sharded.values(), ctx.of_widths):
            end = begin + len(of_width.sharding_contexts)
            yield sharded, of_width, values[begin:end]
            begin = end

    def _with_regroup(
        self, ctx: LMAEmbeddingCollectionContext, of_widths: list[LazyAwaitable[dict[str, JaggedTensor]]]
    ) -> LazyAwaitable[dict[str, JaggedTensor]]:
        assert ctx.batch is not None and ctx.positions is not None, "input_dist comes first"
        regroup = partial(
            self._pieces.regroup, positions=ctx.positions, batch=ctx.batch, need_indices=self._need_indices
        )
        return LMAEmbeddingCollectionAwaitable(of_widths, regroup)

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The logical tables."""
        return self._tables

    @property
    def unsharded_module_type(self) -> type[LMAEmbeddingCollection]:
        return LMAEmbeddingCollection


class LMAEmbeddingCollectionSharder(LMASharder[LMAEmbeddingCollection]):
    """Shards an LMAEmbeddingCollection: a plan has its level tables by name.

    Args:
        ec_sharder: shards the level tables; fused params, codecs and all else that TorchRec's sharder takes are its.
        fused_params: of the sharder that is made where none is given.
        qcomm_codecs_registry: likewise.
        use_index_dedup: likewise.
    """

    _plain_sharder: EmbeddingCollectionSharder

    def __init__(
        self,
        ec_sharder: EmbeddingCollectionSharder | None = None,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        use_index_dedup: bool = False,
    ) -> None:
        ec_sharder = ec_sharder or EmbeddingCollectionSharder(fused_params, qcomm_codecs_registry, use_index_dedup)
        super().__init__(ec_sharder, qcomm_codecs_registry)

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types = super().sharding_types(compute_device_type)
        # Which takes the dense kernel: see _refuse_dense_kernels.
        return [each for each in types if compute_device_type != "cpu" or each != ShardingType.DATA_PARALLEL.value]

    def shard(
        self,
        module: LMAEmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedLMAEmbeddingCollection:
        return ShardedLMAEmbeddingCollection(
            module, params, self._plain_sharder, env, device or torch.device("cuda"), module_fqn
        )

    @property
    def module_type(self) -> type[LMAEmbeddingCollection]:
        return LMAEmbeddingCollection

    @property
    def sharded_module_type(self) -> type[ShardedLMAEmbeddingCollection]:
        return ShardedLMAEmbeddingCollection


def _refuse_dense_kernels(plan: dict[str, ParameterSharding], device: torch.device) -> None:
    """Raises ValueError for tables of FBGEMM's dense kernel, on the CPU: there it pools what it should not."""
    dense = [name for name, sharding in plan.items() if sharding.compute_kernel == EmbeddingComputeKernel.DENSE.value]
    if device.type == "cpu" and dense:
        raise ValueError(
            f"tables {dense} are planned with the dense kernel, as data_parallel ones are, which on the CPU gives a "
            "vector for each bag and not for each id (of plain EmbeddingCollections too); shard them otherwise, with "
            "the fused kernel, or leave the collection out of the plan: DistributedDataParallel then has all of it"
        )
