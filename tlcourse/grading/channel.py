"""Lines of JSON over a socket: all that passes between the parent and a sandbox."""

from __future__ import annotations

import json
import select
import socket
import time
from typing import Any


class ChannelError(Exception):
    """The other side broke the protocol: not JSON, or more bytes than agreed."""


class Channel:
    """One end of a connection.

    Args:
        connection: a stream socket; the channel owns it.
        most_bytes: how much may arrive in all; None for no limit.

    Attributes:
        ended: the other side has closed its end.
    """

    def __init__(self, connection: socket.socket, most_bytes: int | None = None) -> None:
        self.connection = connection
        self._left = most_bytes
        self.ended = False
        self._buffer = bytearray()
        self._searched = 0

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, message: Any) -> None:
        """Send one message; waits while the other side does not read.

        Raises:
            OSError: if the other side is gone.
        """
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def next(self) -> Any:
        """A message that has arrived in full, or None."""
        end = self._buffer.find(b"\n", self._searched)
        self._searched = len(self._buffer)
        if end < 0:
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ChannelError(f"not JSON: {type(error).__name__}") from None

    def read(self) -> bool:
        """Take in what is there; False at the end of the stream.

        Raises:
            ChannelError: if more has arrived than agreed.
        """
        try:
            data = self.connection.recv(1 << 18)
        except ConnectionResetError:
            data = b""
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                raise ChannelError("more output than allowed")
        self._buffer += data
        self.ended = not data
        return bool(data)

    def receive(self, seconds: float | None = None) -> Any:
        """Wait for one message; None at the end of the stream, or when time is up."""
        end = None if seconds is None else time.monotonic() + seconds
        while (message := self.next()) is None:
            left = None if end is None else end - time.monotonic()
            if self.ended or (left is not None and left <= 0):  # however much still comes
                return None
            if not select.select([self], [], [], left)[0] or not self.read():
                return None
        return message

    def close(self) -> None:
        self.connection.close()
