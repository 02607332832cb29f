"""One builder out of those of all workers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from torchrec_lma.allocation.builder import AllocationBuilder

T = TypeVar("T")


def reduce_builders(builder: AllocationBuilder, group: dist.ProcessGroup | None = None) -> AllocationBuilder | None:
    """Merges the builders of a process group's ranks into that of rank 0: every rank calls it with its own.

    The result is that of one builder that saw all rows. What a rank holds travels once: its sampled rows, counts and
    signatures.

    Args:
        builder: of this rank; all with the same settings. That of rank 0 is changed.
        group: of a backend that moves CPU tensors, such as gloo; None is the default group.
    Returns:
        On rank 0 its builder, with everything merged; None on the others.
    Raises:
        ConnectionError: a worker is gone.
        ValueError: builders with other settings.
    """
    return reduce_to_first(builder, AllocationBuilder.merge, group)


def reduce_to_first(value: T, merge: Callable[[T, T], T], group: dist.ProcessGroup | None = None) -> T | None:
    """Merges the values of a process group's ranks on rank 0: every rank calls it with its own.

    A binary tree: in round i, rank r with r % 2 ** (i + 1) == 2 ** i sends to rank r - 2 ** i.

    Args:
        value: of this rank; it can be pickled.
        merge: takes the values of two sets of ranks, in order of ranks, and returns that of both.
        group: as in reduce_builders.
    Returns:
        On rank 0 everything merged; None on the others.
    Raises:
        ConnectionError: a worker is gone.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    distance = 1
    while distance < world_size:
        if rank % (2 * distance) == distance:
            with noticing_lost_workers():
                dist.send_object_list([value], group=group, group_dst=rank - distance)
            return None
        if rank + distance < world_size:
            received: list[T | None] = [None]
            with noticing_lost_workers():
                dist.recv_object_list(received, group=group, group_src=rank + distance)
            assert received[0] is not None
            value = merge(value, received[0])
        distance *= 2
    return value


@contextmanager
def noticing_lost_workers() -> Iterator[None]:
    """Raises ConnectionError where torch.distributed notices that a worker is gone."""
    try:
        yield
    except RuntimeError as error:  # gloo's and the store's errors have no common narrower class
        raise ConnectionError(
            f"another worker ended or did not answer in time ({str(error).splitlines()[0]}); its own output tells why. "
            "No allocation was written"
        ) from error
