"""Reads the messages of an editor from a stream, whatever the stream holds.

The reader of pygls ends the server at a `Content-Length` that does not fit in memory, and it loses all later messages
after a header that it does not understand.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import BinaryIO

MESSAGE_LIMIT = 16 * 2**20
"""The largest message in bytes. A policy has at most 1 MiB, and JSON escapes make it at most six times as long."""

_PIECE = 2**16
# Searched at the end of a line: after a body whose length was wrong, the next header follows without a line end. JSON
# has no line ends inside strings, so no body contains this.
_LENGTH = re.compile(rb"content-length:[ \t]*([^\r\n]*?)[ \t]*\r?\n$", re.IGNORECASE)
_HEADER_LIMIT = 128


class MessageReader:
    """A stream of messages with correct headers, in the form that pygls reads.

    Args:
        stream: The bytes from the editor.
        refuse: Called with a reason for each message that is skipped.
    """

    def __init__(self, stream: BinaryIO, refuse: Callable[[str], None]) -> None:
        self._stream = stream
        self._refuse = refuse
        self._lines: list[bytes] = []

    def readline(self) -> bytes:
        """Returns the next header line of a message: its length, then an empty line. Empty at the end of the stream."""
        if not self._lines:
            length = self._next_length()
            if length is None:
                return b""
            self._lines = [b"\r\n", b"Content-Length: %d\r\n" % length]
        return self._lines.pop()

    def read(self, size: int) -> bytes:
        """Returns the body of a message, of at most `MESSAGE_LIMIT` bytes."""
        return self._stream.read(size)

    def _next_length(self) -> int | None:
        """Skips to the next body whose length is known, and returns the length. None is the end of the stream."""
        length: int | None = None
        complaint: str | None = "a message without a `Content-Length` was skipped"
        rest = b""
        while piece := self._stream.readline(_PIECE):
            line = rest + piece
            rest = b"" if line.endswith(b"\n") else line[-_HEADER_LIMIT:]
            header = _LENGTH.search(line)
            if header is not None:
                length, complaint = _length(header[1])
            elif line in {b"\r\n", b"\n"}:
                if length is not None:
                    return length
                if complaint is not None:
                    self._refuse(complaint)
                complaint = None  # one complaint until the next header
        return None


def _length(value: bytes) -> tuple[int | None, str | None]:
    """Returns a length, or why there is none."""
    shown = value[:20].decode("ascii", "backslashreplace")
    if not re.fullmatch(rb"[0-9]+", value) or not int(value[:10]):
        return None, f"a message with the `Content-Length` `{shown}` was skipped: a number of bytes is expected"
    if len(value) > 9 or int(value) > MESSAGE_LIMIT:
        return None, f"a message of {shown} bytes was skipped: at most {MESSAGE_LIMIT} are read"
    return int(value), None
