"""Messages between a trainer's process and its engine's: JSON and bytes over a socket that only they have."""

import json
import socket
import struct
from collections.abc import Sequence
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, Any]

_SIZES = struct.Struct("<QQ")  # of the JSON and of the bytes after it
_DESCRIPTOR = b"f"


class Channel:
    """One end; both take turns, so that a message answers the one before it."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, message: Message, attached: bytes = b"") -> None:
        """OSError when the other process has ended."""
        text = json.dumps(message).encode()
        self._socket.sendall(b"".join((_SIZES.pack(len(text), len(attached)), text, attached)))

    def receive(self) -> tuple[Message, bytes]:
        """EOFError when the other process has ended."""
        num_text, num_attached = _SIZES.unpack(self._read(_SIZES.size))
        message: Message = json.loads(self._read(num_text))
        return message, self._read(num_attached)

    def send_descriptors(self, descriptors: Sequence[int]) -> None:
        """Give the other process files of this one."""
        if descriptors:
            socket.send_fds(self._socket, [_DESCRIPTOR], list(descriptors))

    def receive_descriptors(self, number: int) -> list[int]:
        """As many as were sent."""
        if not number:
            return []
        word, found, _, _ = socket.recv_fds(self._socket, len(_DESCRIPTOR), number)
        if word != _DESCRIPTOR:
            raise EOFError
        return list(found)

    def close(self) -> None:
        """The other process then meets the end."""
        self._socket.close()

    def _read(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size:
            part = self._socket.recv(min(size, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)
