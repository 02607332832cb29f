"""An HTTP/2 client of nothing but sockets, for what gRPC's own never send: half messages and floods of resets."""

import contextlib
import socket
import struct
import threading

DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
INITIAL_WINDOW = 65_535  # bytes, of a stream and of the connection
FRAME = 16_384  # bytes of a DATA frame


def _frame(frame_type: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", frame_type, flags, stream) + payload


def _header(name: str, value: str) -> bytes:
    """HPACK: a literal that is not indexed, without Huffman code."""

    def text(of: str) -> bytes:
        assert len(of) < 127
        return bytes([len(of)]) + of.encode()

    return b"\0" + text(name) + text(value)


class RawConnection:
    """One connection. A thread answers the server's settings and pings and counts the bytes that may be sent."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.socket.settimeout(None)
        self.closed = threading.Event()  # by the server
        self.ended: set[int] = set()  # streams that the server has ended or reset
        self._next_stream = 1
        self._windows: dict[int, int] = {0: INITIAL_WINDOW}
        self._changed = threading.Condition()
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(SETTINGS, 0, 0))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def open(self, path: str = "/predictor.Predictor/Predict", *extra: tuple[str, str]) -> int:
        """The number of a new stream, whose headers are sent."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self.socket.sendall(self.opening(stream, path, *extra))
        return stream

    def opening(self, stream: int, path: str = "/predictor.Predictor/Predict", *extra: tuple[str, str]) -> bytes:
        fields = ((":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "test"))
        fields += (("content-type", "application/grpc"), ("te", "trailers"), *extra)
        self._windows[stream] = INITIAL_WINDOW
        return _frame(HEADERS, END_HEADERS, stream, b"".join(_header(*field) for field in fields))

    def send_message(self, stream: int, size: int, announced: int, patience: float = 5.0) -> int:
        """Sends up to `size` bytes of a message of `announced` ones, as flow control lets it; returns how many went."""
        rest = struct.pack(">BI", 0, announced) + bytes(size)
        sent = 0
        while rest and stream not in self.ended and not self.closed.is_set():
            with self._changed:
                allowed = min(self._windows[0], self._windows[stream], FRAME, len(rest))
                if allowed <= 0:
                    if not self._changed.wait(patience):
                        break
                    continue
                self._windows[0] -= allowed
                self._windows[stream] -= allowed
            try:
                self.socket.sendall(_frame(DATA, 0, stream, rest[:allowed]))
            except OSError:
                break
            rest, sent = rest[allowed:], sent + allowed
        return sent

    def flood_with_resets(self, streams: int, at_once: int = 100) -> int:
        """Opens streams and resets each at once; returns how many, fewer where the server hung up."""
        for done in range(0, streams, at_once):
            packet = b""
            for _ in range(at_once):
                stream, self._next_stream = self._next_stream, self._next_stream + 2
                packet += self.opening(stream) + _frame(RST_STREAM, 0, stream, struct.pack(">I", 8))
            try:
                self.socket.sendall(packet)
            except OSError:
                return done
        return streams

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # close() alone waits for the reader
        self.socket.close()

    def _read(self) -> None:
        try:
            with self.socket.makefile("rb") as file:
                while header := file.read(9):
                    length = int.from_bytes(header[:3], "big")
                    frame_type, flags, stream = struct.unpack(">BBI", header[3:])
                    self._take(frame_type, flags, stream, file.read(length))
        except (OSError, ValueError, struct.error):
            pass
        with self._changed:
            self.closed.set()
            self._changed.notify_all()

    def _take(self, frame_type: int, flags: int, stream: int, payload: bytes) -> None:
        if frame_type == SETTINGS and not flags & ACK:
            self.socket.sendall(_frame(SETTINGS, ACK, 0))
        elif frame_type == PING and not flags & ACK:
            self.socket.sendall(_frame(PING, ACK, 0, payload))
        with self._changed:
            if frame_type == WINDOW_UPDATE:
                self._windows[stream] = self._windows.get(stream, INITIAL_WINDOW) + struct.unpack(">I", payload)[0]
            elif frame_type == RST_STREAM or (frame_type in (HEADERS, DATA) and flags & END_STREAM):
                self.ended.add(stream)
            self._changed.notify_all()
