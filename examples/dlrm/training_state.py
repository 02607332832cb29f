"""What a checkpoint holds of a run, under keys and in shards that load on any number of ranks."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchrec.distributed.types import Shard, ShardedTensor, ShardedTensorMetadata, ShardMetadata
from torchrec.optim.keyed import CombinedOptimizer

from torchrec_lma import checkpoint


class TrainingState:
    """The tensors of a model, its optimizer and its random states, which are written and loaded where they are.

    Args:
        model, optimizer: of this rank; an optimizer that makes its state at the first step has made it.
        random: this rank's random states, under names that no other rank has.
    """

    def __init__(self, model: nn.Module, optimizer: CombinedOptimizer, random: dict[str, Tensor]) -> None:
        self.model = model
        self.optimizer = optimizer
        self._tree = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": random}

    def stored(self) -> dict[str, Any]:
        """What torch.distributed.checkpoint saves and loads, by its own keys. Ranks have different ones."""
        return _with_shards(_leaves(self._tree))

    def load(self, reader: checkpoint.CheckpointReader) -> None:
        """Loads in place. Collective.

        Raises ValueError, the same on all ranks, where the checkpoint is of other tensors than these.
        """
        stored = self.stored()
        _check_fits(stored, reader.read_metadata().state_dict_metadata, reader.checkpoint_id)
        checkpoint.load(stored, reader)
        _set_leaves(self._tree, stored)
        # The shards of tables are in place. TorchRec's hook would take them for shards of one width.
        rest = {name: value for name, value in self._tree["model"].items() if not isinstance(value, ShardedTensor)}
        self.model.load_state_dict(rest, strict=False)
        self.optimizer.load_state_dict(self._tree["optimizer"])


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts, by the keys that torch.distributed.checkpoint itself gives them.

    Given nested ones, it takes a checkpoint for one of before torch 2.4 where this rank lacks a key that others have,
    such as the optimizer state of a table on another rank, and then wants keys for empty dicts, which nobody has.
    """
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def _set_leaves(tree: dict[str, Any], loaded: Mapping[str, Any], prefix: str = "") -> None:
    """Puts values that are loaded but not in place into the tree."""
    for name, value in tree.items():
        if isinstance(value, dict):
            _set_leaves(value, loaded, f"{prefix}{name}.")
        elif not isinstance(value, Tensor | ShardedTensor) and f"{prefix}{name}" in loaded:
            tree[name] = loaded[f"{prefix}{name}"]


def _with_shards(leaves: dict[str, Any]) -> dict[str, Any]:
    """Leaves in which optimizer state is sharded as its table is, in views of the same tensors.

    torch's optimizers know a table of TorchRec's dense kernel as an ordinary parameter, this rank's part of it. Under
    its one key torch.distributed.checkpoint would keep the state of one rank's part and give it to all.
    """
    leaves = dict(leaves)
    for name, table in list(leaves.items()):
        if not (name.startswith("model.") and isinstance(table, ShardedTensor)):
            continue
        prefix = f"optimizer.state.{name.removeprefix('model.')}."
        for key in [key for key in leaves if key.startswith(prefix)]:
            value = leaves[key]
            if isinstance(value, ShardedTensor):  # a fused optimizer's
                continue
            if not table.local_shards():
                del leaves[key]
            elif isinstance(value, Tensor) and value.dim():  # else a count of steps
                leaves[key] = _sharded_as(table, value, key)
    return leaves


def _sharded_as(table: ShardedTensor, value: Tensor, key: str) -> ShardedTensor:
    """A view of `value`, the state of this rank's part of a table: of each weight, or of each row.

    Raises ValueError if it is neither, or of rows of which ranks hold some columns.
    """
    shards = [shard.metadata for shard in table.local_shards()]
    metadata = table.metadata()
    if value.numel() == sum(math.prod(shard.shard_sizes) for shard in shards):
        dims = 2
    elif value.numel() == sum(shard.shard_sizes[0] for shard in shards) and all(
        shard.shard_sizes[1] == metadata.size[1] for shard in metadata.shards_metadata
    ):
        dims = 1
    else:
        raise ValueError(
            f"{key} of shape {list(value.shape)} cannot be in a checkpoint: on this rank the dense kernel holds "
            f"{[shard.shard_sizes for shard in shards]} of a table of {list(metadata.size)}; use the fused kernel, or "
            "shard no columns"
        )

    def cut(shard: ShardMetadata) -> ShardMetadata:
        return ShardMetadata(shard.shard_offsets[:dims], shard.shard_sizes[:dims], shard.placement)

    own = [cut(shard) for shard in shards]
    parts = value.detach().view(-1).split([math.prod(shard.shard_sizes) for shard in own])
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        [Shard(part.view(shard.shard_sizes), shard) for part, shard in zip(parts, own)],
        ShardedTensorMetadata(
            [cut(shard) for shard in metadata.shards_metadata],
            metadata.size[:dims],
            dataclasses.replace(metadata.tensor_properties, dtype=value.dtype, requires_grad=False),
        ),
        process_group=table._process_group,
    )


def _check_fits(stored: Mapping[str, Any], saved: Mapping[str, Any], path: Any) -> None:
    """Raises ValueError, the same on all ranks, where a checkpoint holds other tensors than these. Collective."""
    of_ranks = gathered((list(stored), list(_misfits(stored, saved))))
    known = {key for keys, _ in of_ranks for key in keys}
    problems = [problem for _, of_rank in of_ranks for problem in of_rank]
    problems += [f"it holds {key}" for key in saved if key not in known and not key.startswith("random.")]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ValueError(f"checkpoint {path} is of another model or optimizer than this run's: {problems[0]}{more}")


def _misfits(stored: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[str]:
    for key, value in stored.items():
        if key not in saved:
            yield f"it lacks {key}"
        elif isinstance(value, Tensor | ShardedTensor):
            size = saved[key].size if isinstance(saved[key], TensorStorageMetadata) else None
            if size != value.size():
                yield (
                    f"{key} has size {size and list(size)} there and {list(value.size())} here"
                    + (
                        " (row-wise optimizers have a value for each row and column shard: cut columns as they were)"
                        if key.startswith("optimizer.") and value.dim() == 1
                        else ""
                    )
                )


def gathered(value: Any) -> list[Any]:
    """Every rank's value, in rank order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
