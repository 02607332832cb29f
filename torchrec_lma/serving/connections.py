"""The end of a server's connections."""

import os
import socket
import stat
from contextlib import suppress

_DESCRIPTORS = "/proc/self/fd"


def hang_up(port: int) -> None:
    """Ends this process's connections to clients of `port`, who see UNAVAILABLE, and takes no new ones.

    gRPC's own way to stop cancels the requests that it has received and not handed over, and those that come until
    clients know of it. To a client CANCELLED means that it gave up itself; UNAVAILABLE, that it should try another
    server. gRPC keeps its sockets to itself, so this looks through the process's descriptors (on Linux).
    """
    for name in os.listdir(_DESCRIPTORS) if os.path.isdir(_DESCRIPTORS) else ():
        with suppress(OSError):  # closed meanwhile, by either side
            descriptor = int(name)
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.getsockname()[1] != port:
                    continue
                if not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    connection.shutdown(socket.SHUT_RDWR)
                    continue
            with socket.socket() as nothing:  # in the listener's place: gRPC would log that it was shut down
                os.dup2(nothing.fileno(), descriptor)
