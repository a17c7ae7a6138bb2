"""A text in an editor: its statements and words, what is wrong with it, and where its names are declared."""

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
class Stretch:
    """A part of a text: offsets of its characters, the end exclusive."""

    start: int
    end: int

    def touches(self, offset: int) -> bool:
        """Whether a cursor at `offset` stands in it or at one of its ends."""
        return self.start <= offset <= self.end


@dataclass(frozen=True)
class PolicyDocument:
    """A policy's text under a name: the absolute path of its file, or anything else for a text that has none."""

    text: str
    name: str

    @cached_property
    def source(self) -> Source:
        """The text, cut into statements."""
        return prepare_source(self.text, self.name)[0]

    @cached_property
    def policy(self) -> ir.Policy:
        """As much of a policy as the text says."""
        policy, _ = recover(self.text, source=self.name)
        return policy.model_copy(update={"source_name": self.name}) if is_file(Path(self.name)) else policy

    @cached_property
    def findings(self) -> tuple[Diagnostic, ...]:
        """Everything that is wrong or doubtful about the text."""
        return check_text(self.text, source=self.name)

    def said(self, stretch: Stretch) -> str:
        """The text of a stretch."""
        return self.text[stretch.start : stretch.end]

    # --- what stands at a place

    def statement(self, offset: int) -> Chunk | None:
        """The statement that a cursor stands in or behind; none in column 0, where a new one begins."""
        if offset == self._line(offset).start:
            return None
        return next((each for each in reversed(self.source.chunks) if each.start < offset), None)

    def word(self, offset: int) -> Stretch | None:
        """The word that a cursor touches, outside strings and comments."""
        words = (Stretch(*each.span()) for each in self._tokens(offset) if each["word"])
        return next((each for each in words if each.touches(offset)), None)

    def is_code(self, offset: int) -> bool:
        """False for a cursor inside a string or a comment."""
        quiet = (each for each in self._tokens(offset) if each.start() < offset <= each.end() and not each["word"])
        inside = next(quiet, None)
        return inside is None or (inside["closed"] is not None and offset == inside.end())

    def _tokens(self, offset: int) -> Iterator[re.Match[str]]:
        line = self._line(offset)
        return _TOKENS.finditer(self.source.clean, line.start, line.end)

    def _line(self, offset: int) -> Stretch:
        clean = self.source.clean
        end = clean.find("\n", offset)
        return Stretch(clean.rfind("\n", 0, offset) + 1, len(clean) if end < 0 else end)

    # --- names

    @cached_property
    def names(self) -> Mapping[str, Stretch]:
        """Where each name is declared, also by statements that are broken."""
        found = dict[str, Stretch]()
        for chunk in self.source.chunks:
            if declared := _DECLARED.match(self.source.clean, chunk.start, chunk.end):
                found.setdefault(declared[1], Stretch(*declared.span(1)))
        return found

    @cached_property
    def declared(self) -> Mapping[str, Declaration]:
        """What each name is declared as, by statements that are not broken."""
        return {each.name: each for each in self.policy.statements if isinstance(each, Declaration)}

    def is_setting(self, word: Stretch, chunk: Chunk) -> bool:
        """Whether the word is a name that a `with` of this statement sets."""
        before, after = self.source.clean[chunk.start : word.start], self.source.clean[word.end : chunk.end]
        return re.search(r"\bwith\b", before) is not None and re.match(r"\s*=(?!=)", after) is not None

    # --- other policies

    def use(self, chunk: Chunk) -> Stretch | None:
        """Where a `use` names its policy."""
        found = _USED.match(self.source.clean, chunk.start, chunk.end)
        return Stretch(*found.span(1)) if found else None

    def used(self, chunk: Chunk) -> ir.Policy | None:
        """The policy that a `use` names, where that can be had."""
        stretch = self.use(chunk)
        if stretch is None:
            return None
        name = self.said(stretch)
        try:
            return load_used(quoted(name) if name[0] in "\"'" else name, self.policy)
        except PolicyError:
            return None


def opened_document(source_name: str | None) -> PolicyDocument | None:
    """The file that `Policy.source_name` stands for, as a document."""
    path = path_of(source_name)
    try:
        return None if path is None else PolicyDocument(path.read_bytes().decode("utf-8"), str(path))
    except (OSError, ValueError):
        return None
