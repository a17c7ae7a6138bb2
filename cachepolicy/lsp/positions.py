"""Lines and columns as editors count them, and offsets as we do."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping

_WIDTHS: Mapping[str, Callable[[str], int]] = {
    "utf-8": lambda text: len(text.encode("utf-8", "surrogatepass")),
    "utf-16": lambda text: len(text) + sum(letter > "\uffff" for letter in text),
    "utf-32": len,
}


class Positions:
    """The places of one text. Columns count code units of `encoding`: two of UTF-16 for a letter beyond the 65536th.

    Lines end as in the language server protocol, with CR, LF or both, and nowhere else.
    """

    def __init__(self, text: str, encoding: str = "utf-16") -> None:
        self._text, self._width = text, _WIDTHS[encoding]
        self._starts = [0, *(found.end() for found in re.finditer("\r\n|\n|\r", text))]

    def position(self, offset: int) -> tuple[int, int]:
        """Line and column from 0 of a character; what is beyond the text is its end."""
        offset = min(max(0, offset), len(self._text))
        line = bisect_right(self._starts, offset) - 1
        return line, self._width(self._text[self._starts[line] : offset])

    def offset(self, line: int, column: int) -> int:
        """The offset of a place; what is beyond a line is its end, and a column inside a character is before it."""
        if line < 0 or line >= len(self._starts):
            return 0 if line < 0 else len(self._text)
        ends = [*self._starts[line + 1 : line + 2], len(self._text)]
        stretch = self._text[self._starts[line] : ends[0]].rstrip("\r\n")
        low, high = 0, len(stretch)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._width(stretch[:middle]) <= column else (low, middle - 1)
        return self._starts[line] + low
