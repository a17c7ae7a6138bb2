"""Converts offsets in a text to the lines and columns of the language server protocol, and back."""

from __future__ import annotations

import re
from bisect import bisect_right

from lsprotocol.types import Position, PositionEncodingKind
from pygls.workspace import PositionCodec


class Positions:
    """Positions in one text.

    Lines end at CR, LF or CR LF, as the protocol says, and nowhere else. `str.splitlines`, which pygls uses for its own
    documents, also ends lines at form feeds and other characters.

    Args:
        text: The text of the document.
        encoding: The units in which the editor counts columns.
    """

    def __init__(self, text: str, encoding: PositionEncodingKind = PositionEncodingKind.Utf16) -> None:
        self._text, self._codec = text, PositionCodec(encoding)
        self._starts = [0, *(end.end() for end in re.finditer("\r\n|\n|\r", text))]

    def position(self, offset: int) -> Position:
        """Returns the position of the character at `offset`. Offsets beyond the text are its end."""
        offset = min(max(0, offset), len(self._text))
        line = bisect_right(self._starts, offset) - 1
        return Position(line, self._codec.client_num_units(self._text[self._starts[line] : offset]))

    def offset(self, position: Position) -> int:
        """Returns the offset of a position.

        A column beyond its line is the line's end, a line beyond the text is the end of the text. A column inside a
        character is the position before that character.
        """
        if position.line < 0 or position.line >= len(self._starts):
            return 0 if position.line < 0 else len(self._text)
        start, end = [*self._starts, len(self._text)][position.line : position.line + 2]
        text = self._text[start:end].rstrip("\r\n")
        column = min(max(0, position.character), self._codec.client_num_units(text))
        index = self._codec.position_from_client_units([text], Position(0, column)).character
        if self._codec.client_num_units(text[:index]) > column:
            index -= 1  # pygls rounds a column inside a character up
        return start + index
