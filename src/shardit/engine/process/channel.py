"""Messages over a socket between processes of shardit: pickled, with large buffers sent separately without copies.
Threads read and write for a process that must not block."""

from __future__ import annotations

import contextlib
import io
import pickle
import queue
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_COUNT = struct.Struct("<I")
_LENGTH = struct.Struct("<Q")


def encode(message: object) -> list[Any]:
    """Turn a message into byte strings to send: a header, the pickle, and large buffers, which are not copied."""
    buffers: list[pickle.PickleBuffer] = []
    pickler = _BufferPickler(buffers.append)
    parts = [pickler.dumps(message), *(buffer.raw() for buffer in buffers)]
    header = _COUNT.pack(len(parts)) + b"".join(_LENGTH.pack(len(part)) for part in parts)
    return [header + parts[0], *parts[1:]]


@dataclass(frozen=True)
class Packed:
    """A pickled object within a message, unpickled separately by the receiver: a failure to unpickle it loses this
    object alone. Large buffers are not copied."""

    parts: tuple[Any, ...]

    @classmethod
    def of(cls, value: object) -> Packed:
        """Pickle an object."""
        buffers: list[pickle.PickleBuffer] = []
        data = _BufferPickler(buffers.append).dumps(value)
        return cls((pickle.PickleBuffer(data), *buffers))

    def load(self) -> Any:
        """Unpickle the object."""
        data, *buffers = self.parts
        return pickle.loads(data, buffers=buffers)


class Closed(EOFError):
    """The other side of a channel has closed it or exited."""


class Channel:
    """Messages over a stream socket; TimeoutError means that the other side is stuck."""

    def __init__(self, sock: socket.socket, timeout_s: float | None = None):
        """timeout_s: limit of each wait until the other side accepts or sends the next bytes."""
        self.socket = sock
        sock.settimeout(timeout_s)

    def fileno(self) -> int:
        """Return the file descriptor, for `multiprocessing.connection.wait`."""
        return self.socket.fileno()

    def send(self, message: object) -> None:
        """Send one message."""
        self.send_encoded(encode(message))

    def send_encoded(self, parts: Sequence[Any]) -> None:
        """Send the result of `encode`: a message for several receivers is pickled once."""
        try:
            for part in parts:
                self.socket.sendall(part)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed("the other side is gone") from error

    def recv(self) -> Any:
        """Wait for one message. After an error from unpickling it the channel can still be used."""
        (count,) = _COUNT.unpack(self._read(_COUNT.size))
        lengths = [size for (size,) in _LENGTH.iter_unpack(self._read(_LENGTH.size * count))]
        data, *buffers = [self._read(length) for length in lengths]
        return pickle.loads(data, buffers=buffers)

    def close(self) -> None:
        """Close this end; the other side reads EOF if no process holds a copy of this end."""
        self.socket.close()

    def _read(self, length: int) -> bytearray:
        data = bytearray(length)
        view, position = memoryview(data), 0
        while position < length:
            try:
                received = self.socket.recv_into(view[position:])
            except ConnectionResetError:
                received = 0
            if not received:
                raise Closed("the other side is gone")
            position += received
        return data


class Pipe:
    """A channel with a reader thread and a writer thread, so that neither side ever waits for the other.

    `on_message(message)` and, once, `on_closed()` are called in the reading thread.
    """

    def __init__(self, channel: Channel, on_message: Callable[[Any], None], on_closed: Callable[[], None]):
        self._channel, self._on_message, self._on_closed = channel, on_message, on_closed
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        channel.socket.settimeout(None)
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()

    @property
    def backlog(self) -> int:
        """Number of messages that the other side has not received yet."""
        return self._out.qsize()

    def send(self, message: Any) -> None:
        """Queue a message to be sent."""
        self.send_encoded(encode(message))

    def send_encoded(self, parts: Sequence[Any]) -> None:
        """Queue the result of `encode` to be sent: a message for several receivers is pickled once."""
        self._out.put(parts)

    def close(self) -> None:
        """Close the channel; unsent messages are lost."""
        with contextlib.suppress(OSError):
            self._channel.socket.shutdown(2)  # before the writer closes it: for the reader it would stay open
        self._out.put(_END)

    def _read(self) -> None:
        try:
            with contextlib.suppress(Closed, OSError):
                while True:
                    self._on_message(self._channel.recv())
        finally:  # whatever the error: without its messages the other side is lost
            self._on_closed()

    def _write(self) -> None:
        try:
            with contextlib.suppress(Closed, OSError):
                while (message := self._out.get()) is not _END:
                    self._channel.send_encoded(message)
        finally:
            self._channel.close()


_END = object()


def send_all(pipes: Iterable[Pipe], message: Any) -> None:
    """Send a message along several pipes. It is pickled once."""
    parts = encode(message)
    for pipe in pipes:
        pipe.send_encoded(parts)


class _BufferPickler(pickle.Pickler):
    """Pickle 5 with buffers out of band, which PIL's own pickling does not do (3 times slower for a video)."""

    def __init__(self, buffer_callback: Any):
        self._file = io.BytesIO()
        super().__init__(self._file, protocol=5, buffer_callback=buffer_callback)

    def dumps(self, message: object) -> bytes:
        self.dump(message)
        return self._file.getvalue()

    def reducer_override(self, obj: Any) -> Any:
        pil = sys.modules.get("PIL.Image")
        if pil is None or type(obj) is not pil.Image or obj.mode not in ("L", "RGB", "RGBA"):
            return NotImplemented
        return _restore_image, (obj.mode, obj.size, obj.info, pickle.PickleBuffer(obj.tobytes()))


def _restore_image(mode: str, size: tuple[int, int], info: dict, data: Any) -> Any:
    from PIL import Image

    image = Image.frombytes(mode, size, bytes(0) if 0 in size else data)
    image.info = info
    return image
