"""One builder out of those of all workers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from torchrec_lma.allocation.builder import AllocationBuilder


def reduce_builders(builder: AllocationBuilder, group: dist.ProcessGroup | None = None) -> AllocationBuilder | None:
    """Merges the builders of a process group's ranks into that of rank 0: every rank calls it with its own.

    A binary tree: in round i, rank r with r % 2 ** (i + 1) == 2 ** i sends to rank r - 2 ** i. The result is that of
    one builder that saw all rows. What a rank holds travels once: its sampled rows, counts and signatures.

    Args:
        builder: of this rank; all with the same settings. That of rank 0 is changed.
        group: of a backend that moves CPU tensors, such as gloo; None is the default group.
    Returns:
        On rank 0 its builder, with everything merged; None on the others.
    Raises:
        ConnectionError: a worker is gone.
        ValueError: builders with other settings.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    distance = 1
    while distance < world_size:
        if rank % (2 * distance) == distance:
            with noticing_lost_workers():
                dist.send_object_list([builder], group=group, group_dst=rank - distance)
            return None
        if rank + distance < world_size:
            received: list[AllocationBuilder | None] = [None]
            with noticing_lost_workers():
                dist.recv_object_list(received, group=group, group_src=rank + distance)
            assert received[0] is not None
            builder.merge(received[0])
        distance *= 2
    return builder


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
