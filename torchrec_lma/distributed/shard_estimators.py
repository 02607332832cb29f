"""What a shard of an LMA memory costs; the twin of torchrec/distributed/planner/shard_estimators.py.

TorchRec takes a memory for a table [rows, dim] that is read once for each id. What travels back, the dense gradients of
data-parallel tables and the weights are that table's, so TorchRec's numbers are kept. Here is what differs: FBGEMM
reads a row for each chunk and keeps row-wise optimizer state for each chunk, addresses are computed first, and where
ranks share the rows an id travels more than once.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType as OptimType
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.constants import (
    BIGINT_DTYPE,
    UVM_CACHING_RATIO,
    WEIGHTED_KERNEL_MULTIPLIER,
    kernel_bw_lookup,
)
from torchrec.distributed.planner.estimator.estimator import compute_block_usage_penalty
from torchrec.distributed.planner.shard_estimators import (
    EmbeddingPerfEstimator,
    EmbeddingStorageEstimator,
    calculate_pipeline_io_cost,
)
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    SharderData,
    SharderDataMap,
    ShardingOption,
    Storage,
    Topology,
)
from torchrec.distributed.planner.utils import get_num_poolings, is_prefetch_pipelined
from torchrec.distributed.types import PipelineType, ShardingType, compute_storage_usage
from torchrec.distributed.utils import optimizer_type_to_emb_opt_type

from torchrec_lma.distributed.input_dist import sends_addresses
from torchrec_lma.distributed.specs import RowWiseInput
from torchrec_lma.memory_report import optimizer_state_bytes
from torchrec_lma.modules import LMAEmbeddingBagCollection

Constraints = Mapping[str, ParameterConstraints]

# TorchRec's own model of FBGEMM (TableWiseEvaluator): the kernel spends as much on a narrower row.
MIN_KERNEL_DIM = 32
WEIGHT_BYTES = 4  # of a per-sample weight, FP32


def is_memory(option: ShardingOption) -> bool:
    """Whether the option shards an LMA memory."""
    return isinstance(option.module[1], LMAEmbeddingBagCollection)


def shard_chunks(option: ShardingOption) -> int:
    """Chunks in each shard of a memory; all column shards are equally wide."""
    return math.ceil(option.shards[0].size[1] / option.module[1].config.chunk_dim)


def fused_optimizer(option: ShardingOption, sharder_data: SharderData | None) -> OptimType | None:
    """The optimizer inside FBGEMM: of apply_optimizer_in_backward, else of the sharder; None for dense kernels."""
    if option.compute_kernel == EmbeddingComputeKernel.DENSE.value:
        return None
    classes = getattr(option.tensor, "_optimizer_classes", None)  # as TorchRec reads it
    if classes:
        return optimizer_type_to_emb_opt_type(classes[0])
    return sharder_data.fused_params.get("optimizer") if sharder_data is not None else None


@dataclass(frozen=True)
class ShardTraffic:
    """What passes a shard of a memory in one step, on average over the shards.

    Attributes:
        ids: of all ranks' batches (data-parallel: of one rank's).
        bags: pooled vectors for those ids.
        n_chunks: chunks in the shard.
        row_ranks: ranks that share the rows.
        sent_addressed: whether an id travels as an address for each chunk, not raw to each rank that has rows.
        senders: ranks that the ids come from.
    """

    ids: float
    bags: float
    n_chunks: int
    row_ranks: int
    sent_addressed: bool
    senders: int

    @property
    def copies(self) -> int:
        """Times that an id travels."""
        return self.n_chunks if self.sent_addressed else self.row_ranks

    @property
    def plain_received(self) -> float:
        """Ids that a plain table's shard would get, evenly spread over its rows."""
        return self.ids / self.row_ranks

    @property
    def received(self) -> float:
        """Ids on the wire to this shard, raw or addressed ones."""
        return self.ids * self.copies / self.row_ranks

    @property
    def lookups(self) -> float:
        """Rows of chunk_dim columns that FBGEMM reads."""
        return self.ids * self.n_chunks / self.row_ranks

    @property
    def addressed(self) -> float:
        """Addresses that the rank computes: of raw ids where they arrive, all of them to find those that are here."""
        return self.n_chunks * (self.ids / self.senders if self.sent_addressed else self.ids)


def shard_traffic(
    option: ShardingOption,
    constraints: Constraints | None,
    world_size: int,
    local_world_size: int,
    row_wise_input: RowWiseInput,
) -> ShardTraffic:
    """
    Args:
        option: of a memory.
        constraints: by name, for num_poolings and batch_sizes.
        world_size: ranks.
        local_world_size: those that share the rows of a table-row-wise or grid shard.
        row_wise_input: of LMAEmbeddingBagCollectionSharder.
    """
    n_chunks = shard_chunks(option)
    row_ranks = {
        ShardingType.ROW_WISE.value: world_size,
        ShardingType.TABLE_ROW_WISE.value: local_world_size,
        ShardingType.GRID_SHARD.value: local_world_size,
    }.get(option.sharding_type, 1)
    senders = 1 if option.sharding_type == ShardingType.DATA_PARALLEL.value else world_size
    own = constraints.get(option.name) if constraints is not None else None
    batch_sizes = own.batch_sizes if own is not None else None
    inputs = zip(
        option.input_lengths,
        get_num_poolings(constraints, option),
        batch_sizes or [option.batch_size] * len(option.input_lengths),
    )
    bags_of = [(length, poolings * batch_size) for length, poolings, batch_size in inputs]
    return ShardTraffic(
        ids=senders * sum(length * bags for length, bags in bags_of),
        bags=senders * sum(min(1.0, length) * bags for length, bags in bags_of),
        n_chunks=n_chunks,
        row_ranks=row_ranks,
        sent_addressed=sends_addresses(row_wise_input, row_ranks, n_chunks),
        senders=senders,
    )


class LMAStorageEstimator(EmbeddingStorageEstimator):
    """TorchRec's estimate of bytes, with what differs for LMA memories; other tables are estimated as TorchRec does.

    A memory's shard has FBGEMM's optimizer state for every chunk of its rows, the ids of the LMA input dist, and the
    chunk rows that FBGEMM keeps from the forward to the backward pass. The allocation is not here, since every rank
    holds all of it: see LMAStorageReservation.

    Args:
        topology, constraints, pipeline_type, run_embedding_at_peak_memory: as EmbeddingStorageEstimator's.
        row_wise_input: as LMAEmbeddingBagCollectionSharder's.
    """

    def __init__(
        self,
        topology: Topology,
        constraints: Constraints | None = None,
        pipeline_type: PipelineType = PipelineType.NONE,
        run_embedding_at_peak_memory: bool = False,
        row_wise_input: RowWiseInput = "auto",
    ) -> None:
        super().__init__(topology, constraints, pipeline_type, run_embedding_at_peak_memory)
        self._row_wise_input = row_wise_input

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        super().estimate([_without_fused_optimizer(option) for option in sharding_options], sharder_data_map)
        for option in filter(is_memory, sharding_options):
            self._add_lma(option, sharder_data_map[option.module_type_key])

    def _add_lma(self, option: ShardingOption, sharder_data: SharderData) -> None:
        device, kernel = self._topology.compute_device, option.compute_kernel
        cached = kernel == EmbeddingComputeKernel.FUSED_UVM_CACHING.value
        settings = sharder_data.fused_params
        load_factor = option.cache_load_factor or settings.get("cache_load_factor", UVM_CACHING_RATIO)
        passes = option.cache_params.multipass_prefetch_config if option.cache_params is not None else None
        passes = passes or settings.get("multipass_prefetch_config")
        optimizer = fused_optimizer(option, sharder_data)
        traffic = shard_traffic(
            option,
            self._constraints,
            self._topology.world_size,
            self._topology.intra_group_size,
            self._row_wise_input,
        )
        # "hbm" or "ddr": where the weights of this kernel are, and their optimizer state with them.
        [weights_in] = compute_storage_usage(option.tensor, device, kernel, sharder_data.storage_usage_type)
        works_in = "ddr" if device == "cpu" else "hbm"
        lookup_bytes = traffic.lookups * (BIGINT_DTYPE + WEIGHT_BYTES * bool(option.is_weighted))
        for shard in option.shards:
            rows, columns = shard.size
            extra = {"hbm": 0, "ddr": 0}
            state_bytes = optimizer_state_bytes(optimizer, rows, columns, traffic.n_chunks)
            extra[weights_in] += state_bytes
            if cached:
                # As TorchRec: a share of weights and state, 4 bytes for each row and 16 for each row in the cache. The
                # rows are FBGEMM's, n_chunks for one of the memory; TorchRec has counted one.
                extra["hbm"] += round(state_bytes * load_factor)
                extra["hbm"] += math.ceil(rows * (traffic.n_chunks - 1) * (4 + 16 * load_factor))
            counted = traffic.plain_received if rows else 0  # by TorchRec
            extra[works_in] += math.ceil(lookup_bytes) + calculate_pipeline_io_cost(
                input_size=math.ceil((traffic.received - counted) * BIGINT_DTYPE),
                output_size=0,
                prefetch_size=math.ceil((traffic.lookups - counted) * BIGINT_DTYPE) if cached else 0,
                # TorchRec's formula knows pipelines on devices only.
                pipeline_type=PipelineType.NONE if device == "cpu" else self._pipeline_type,
                multipass_prefetch_max_pass=passes.num_passes if passes else None,
            )
            assert shard.storage is not None
            shard.storage += Storage(hbm=extra["hbm"], ddr=extra["ddr"], ssd=0)


def _without_fused_optimizer(option: ShardingOption) -> ShardingOption:
    """A view of a memory's option, with its shards, whose fused optimizer TorchRec does not see."""
    if not is_memory(option) or option.compute_kernel == EmbeddingComputeKernel.DENSE.value:
        return option
    view = copy.copy(option)
    # ShardingOption._tensor: the estimator reads the optimizer's class off the parameter, and counts state by row.
    view._tensor = torch.empty_like(option.tensor, device="meta")
    return view


class LMAPerfEstimator(EmbeddingPerfEstimator):
    """TorchRec's estimate of times, with what differs for LMA memories; other tables are estimated as TorchRec does.

    Forward and backward time are those of TorchRec's model of FBGEMM for rows of chunk_dim columns, n_chunks of them
    for an id, and of writing the addresses; the input dist is that of the ids which a rank receives. As in TorchRec
    the input dist does not count in the total, because pipelines hide it.

    Args:
        topology, constraints: as EmbeddingPerfEstimator's.
        row_wise_input: as LMAEmbeddingBagCollectionSharder's.
    """

    def __init__(
        self,
        topology: Topology,
        constraints: Constraints | None = None,
        row_wise_input: RowWiseInput = "auto",
    ) -> None:
        super().__init__(topology, constraints)
        self._row_wise_input = row_wise_input

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        super().estimate(sharding_options, sharder_data_map)
        for option in filter(is_memory, sharding_options):
            self._set_lma(option, sharder_data_map[option.module_type_key])

    def _set_lma(self, option: ShardingOption, sharder_data: SharderData) -> None:
        topology = self._topology
        chunk_dim = option.module[1].config.chunk_dim
        traffic = shard_traffic(
            option, self._constraints, topology.world_size, topology.intra_group_size, self._row_wise_input
        )
        load_factor = option.cache_load_factor or sharder_data.fused_params.get("cache_load_factor")
        bandwidth = kernel_bw_lookup(
            topology.compute_device,
            option.compute_kernel,
            topology.hbm_mem_bw,
            topology.ddr_mem_bw,
            topology.hbm_to_ddr_mem_bw,
            load_factor,
            is_prefetch_pipelined(option, sharder_data),
            topology.ssd_mem_bw,
        )
        memory_bandwidth = topology.ddr_mem_bw if topology.compute_device == "cpu" else topology.hbm_mem_bw
        value_bytes = option.tensor.element_size()
        weighted = bool(option.is_weighted)
        indices = traffic.lookups * BIGINT_DTYPE * (2 if weighted else 1)
        read = traffic.lookups * max(chunk_dim, MIN_KERNEL_DIM) * value_bytes
        written = traffic.bags * option.shards[0].size[1] * value_bytes
        lookup_ms = (indices + read + written) * compute_block_usage_penalty(chunk_dim) / bandwidth
        address_ms = traffic.addressed * BIGINT_DTYPE / memory_bandwidth
        backward_ms = lookup_ms * topology.bwd_compute_multiplier
        if weighted:
            backward_ms *= topology.weighted_feature_bwd_compute_multiplier
            backward_ms += lookup_ms * WEIGHTED_KERNEL_MULTIPLIER
        for shard in option.shards:
            assert shard.perf is not None
            shard.perf = replace(
                shard.perf,
                fwd_compute=lookup_ms + address_ms,
                bwd_compute=backward_ms,
                # TorchRec's is that of all ids, whatever share of them the shard receives.
                input_dist_comms=shard.perf.input_dist_comms * traffic.copies / traffic.row_ranks,
            )
