"""A policy text in an editor: its statements and words, its diagnostics, and the positions of its declarations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cachepolicy.errors import Diagnostic, PolicyError
from cachepolicy.language import ir
from cachepolicy.language.loader import is_file, load_used, path_of
from cachepolicy.language.lowering import quoted
from cachepolicy.language.parser import recover
from cachepolicy.language.scope import Declaration
from cachepolicy.language.source import Chunk, Source, prepare_source
from cachepolicy.planning.check import check_text

_NAME = "[A-Za-z_][A-Za-z0-9_]*"
_STRING = r"""(?:"(?:[^"\n]|"")*"|'(?:[^'\n]|'')*')"""
_TOKENS = re.compile(rf"""(?<![\d.])(?P<word>{_NAME}) | (?P<closed>{_STRING}) | \#[^\n]* | ["'][^\n]*""", re.VERBOSE)
_DECLARED = re.compile(rf"(?:param|let|table|signal|external)\s+({_NAME})")
_USED = re.compile(rf"use\s+({_NAME}|{_STRING})")


@dataclass(frozen=True, slots=True)
class TextRange:
    """A range of a text: character offsets, with an exclusive end."""

    start: int
    end: int

    def touches(self, offset: int) -> bool:
        """Returns whether a cursor at `offset` is inside the range or at one of its ends."""
        return self.start <= offset <= self.end


@dataclass(frozen=True)
class PolicyDocument:
    """The text of a policy.

    Attributes:
        text: The text.
        name: The absolute path of the file, or any other string for a text without a file.
    """

    text: str
    name: str

    @cached_property
    def source(self) -> Source:
        """The text, split into statements."""
        return prepare_source(self.text, self.name)[0]

    @cached_property
    def policy(self) -> ir.Policy:
        """The policy that consists of the valid statements."""
        policy, _ = recover(self.text, source=self.name)
        return policy.model_copy(update={"source_name": self.name}) if is_file(Path(self.name)) else policy

    @cached_property
    def findings(self) -> tuple[Diagnostic, ...]:
        """All errors and warnings."""
        return check_text(self.text, source=self.name)

    def text_of(self, text_range: TextRange) -> str:
        """Returns the text in a range."""
        return self.text[text_range.start : text_range.end]

    # --- statements and words

    def statement(self, offset: int) -> Chunk | None:
        """Returns the statement that contains or precedes the cursor.

        In column 0 a new statement begins, so the result is None.
        """
        if offset == self._line(offset).start:
            return None
        return next((chunk for chunk in reversed(self.source.chunks) if chunk.start < offset), None)

    def word(self, offset: int) -> TextRange | None:
        """Returns the word that the cursor touches, outside strings and comments."""
        words = (TextRange(*token.span()) for token in self._tokens(offset) if token["word"])
        return next((word for word in words if word.touches(offset)), None)

    def is_code(self, offset: int) -> bool:
        """Returns False for a cursor inside a string or a comment."""
        for token in self._tokens(offset):
            if token.start() < offset <= token.end() and not token["word"]:
                return token["closed"] is not None and offset == token.end()
        return True

    def _tokens(self, offset: int) -> Iterator[re.Match[str]]:
        line = self._line(offset)
        return _TOKENS.finditer(self.source.clean, line.start, line.end)

    def _line(self, offset: int) -> TextRange:
        clean = self.source.clean
        end = clean.find("\n", offset)
        return TextRange(clean.rfind("\n", 0, offset) + 1, len(clean) if end < 0 else end)

    # --- names

    @cached_property
    def names(self) -> Mapping[str, TextRange]:
        """The range of each declared name, including declarations in broken statements."""
        ranges = dict[str, TextRange]()
        for chunk in self.source.chunks:
            if declared := _DECLARED.match(self.source.clean, chunk.start, chunk.end):
                ranges.setdefault(declared[1], TextRange(*declared.span(1)))
        return ranges

    @cached_property
    def declared(self) -> Mapping[str, Declaration]:
        """The declarations in valid statements, by name."""
        return {statement.name: statement for statement in self.policy.statements if isinstance(statement, Declaration)}

    def is_setting(self, word: TextRange, chunk: Chunk) -> bool:
        """Returns whether the word is a name that a `with` clause of the statement sets."""
        before, after = self.source.clean[chunk.start : word.start], self.source.clean[word.end : chunk.end]
        return re.search(r"\bwith\b", before) is not None and re.match(r"\s*=(?!=)", after) is not None

    # --- other policies

    def use(self, chunk: Chunk) -> TextRange | None:
        """Returns the range of the policy's name in a `use` statement."""
        name = _USED.match(self.source.clean, chunk.start, chunk.end)
        return TextRange(*name.span(1)) if name else None

    def used(self, chunk: Chunk) -> ir.Policy | None:
        """Returns the policy that a `use` statement names, or None if it cannot be loaded."""
        text_range = self.use(chunk)
        if text_range is None:
            return None
        name = self.text_of(text_range)
        try:
            return load_used(quoted(name) if name[0] in "\"'" else name, self.policy)
        except PolicyError:
            return None


def opened_document(source_name: str | None) -> PolicyDocument | None:
    """Returns the file of `Policy.source_name` as a document, or None if it cannot be read."""
    path = path_of(source_name)
    try:
        return None if path is None else PolicyDocument(path.read_bytes().decode("utf-8"), str(path))
    except (OSError, ValueError):
        return None
