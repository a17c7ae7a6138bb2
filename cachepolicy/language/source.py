"""Prepares a policy text for the parser: decodes it, checks limits, splits statements and extracts comments."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice

from cachepolicy.errors import HIDDEN_CHARACTERS, Diagnostic, Span
from cachepolicy.language.vocabulary import CONTINUING, DEPTH_LIMIT, STATEMENT_WORDS, TEXT_LIMIT, TOKEN_LIMIT


@dataclass(slots=True)
class Chunk:
    """One statement of a text, from its first token to its last.

    Attributes:
        start: Offset of the first character.
        end: Offset after the last character.
        word: The first word.
        before: Comments on the lines before it. `""` stands for a blank line.
        after: The comment at its end.
    """

    start: int
    end: int
    word: str
    before: tuple[str, ...] = ()
    after: str | None = None


@dataclass(frozen=True)
class Source:
    """A policy text. Offsets count characters, including a byte order mark.

    Attributes:
        name: Name of the text in diagnostics.
        text: The text as it was read.
        clean: The text with the same offsets, one newline at each line end and one more newline at the end.
        chunks: The statements.
        tail: Comments after the last statement.
    """

    name: str
    text: str
    clean: str
    chunks: tuple[Chunk, ...] = ()
    tail: tuple[str, ...] = ()

    @cached_property
    def _line_starts(self) -> list[int]:
        first = [] if self.text.startswith("\ufeff") else [0]
        return first + [newline.end() for newline in re.finditer("\n", self.clean) if newline.end() <= len(self.text)]

    def span(self, start: int, end: int) -> Span:
        """Returns the span between two offsets. The end is exclusive."""
        end = min(max(start, end), len(self.text))
        start = min(start, end)
        line, column = self._place(start)
        end_line, end_column = self._place(end)
        return Span(start, end, line, column, end_line, end_column)

    def _place(self, offset: int) -> tuple[int, int]:
        line = max(1, bisect_right(self._line_starts, offset))
        return line, max(1, offset - self._line_starts[line - 1] + 1)

    def narrow(self, span: Span, word: str) -> Span:
        """Returns the span of the first occurrence of `word` in `span`, or `span` if there is none."""
        occurrence = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(word)}(?![A-Za-z0-9_])").search(
            self.clean, span.start, span.end
        )
        return self.span(*occurrence.span()) if occurrence else span

    def excerpt(self, span: Span) -> tuple[str, ...]:
        """Returns the lines that `span` covers. Characters that control a terminal are replaced."""
        starts = self._line_starts
        last = max(span.line, span.end_line - (span.end_column == 1))
        ends = [*starts[1:], len(self.text) + 1]
        # The file may be shorter now than when its policy was read.
        lines = range(span.line, min(last, span.line + _EXCERPT_LINES - 1, len(starts)) + 1)
        stretches = (self.clean[starts[line - 1] : ends[line - 1] - 1][:_EXCERPT_WIDTH] for line in lines)
        return tuple(HIDDEN_CHARACTERS.sub("\ufffd", stretch).rstrip() for stretch in stretches)

    def locate(self, diagnostic: Diagnostic) -> Diagnostic:
        """Adds the name and the source lines of this source to `diagnostic`."""
        help = diagnostic.help and _shortened(diagnostic.help)
        diagnostic = replace(diagnostic, source=self.name, message=_shortened(diagnostic.message), help=help)
        return replace(diagnostic, excerpt=self.excerpt(diagnostic.span)) if diagnostic.span else diagnostic

    def finding(self, code: str, message: str, start: int, end: int, *, help: str | None = None) -> Diagnostic:
        """Creates an error between two offsets of this text."""
        return self.locate(Diagnostic(code, message, span=self.span(start, end), help=help))


_EXCERPT_WIDTH = 4000
_EXCERPT_LINES = 8
_SENTENCE = 400
_FORBIDDEN_LIMIT = 20
"""Maximum number of forbidden characters that are reported, because a binary file has thousands."""


def _shortened(text: str) -> str:
    """Shortens a message that quotes a very long word. The middle is left out."""
    return text if len(text) <= _SENTENCE else f"{text[: _SENTENCE // 2]}…{text[-_SENTENCE // 2 :]}"


# Control characters, and characters that make a text look different from what it is (CVE-2021-42574): bidirectional
# overrides, line separators that Python and editors treat differently (also a carriage return without a line feed),
# byte order marks, halves of surrogate pairs.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def is_writable(text: str) -> bool:
    """Returns whether `text` is allowed inside a string of a policy."""
    return "\n" not in text and not _FORBIDDEN.search(text)


def prepare_source(text: str | bytes, name: str) -> tuple[Source, tuple[Diagnostic, ...], bool]:
    """Prepares a text for the parser.

    Args:
        text: The text. Bytes are decoded as UTF-8.
        name: Name of the text in diagnostics.

    Returns:
        The source, the diagnostics for its characters, its size and its lines, and whether the parser can read it.
    """
    if len(text) > TEXT_LIMIT:
        source = Source(name, "", "\n")
        message = f"the text has {len(text)} characters, the limit is {TEXT_LIMIT}"
        return source, (source.locate(Diagnostic("E013", message, help="is this a policy file?")),), False
    decoded, wrong = _decode(text)
    clean = decoded.replace("\r\n", " \n") + "\n"
    if clean.startswith("\ufeff"):
        # A newline in place of the mark, so that the statement after it starts in column 0.
        clean = "\n" + clean[1:]
    source = Source(name, decoded, clean)
    if wrong is not None:
        message = "the text is not UTF-8"
        return source, (source.finding("E011", message, wrong, wrong + 1, help="save the file as UTF-8"),), False
    forbidden = [
        _forbidden(source, character.start()) for character in islice(_FORBIDDEN.finditer(clean), _FORBIDDEN_LIMIT)
    ]
    if forbidden:
        return source, tuple(forbidden), False
    return _Scanner(source).scan()


def _decode(text: str | bytes) -> tuple[str, int | None]:
    if isinstance(text, str):
        return text, None
    try:
        return text.decode("utf-8"), None
    except UnicodeDecodeError as error:
        return text.decode("utf-8", "replace"), len(text[: error.start].decode("utf-8"))


_NAMES = {"\0": "NULL", "\r": "CARRIAGE RETURN", "\x1b": "ESCAPE", "\x7f": "DELETE"}
"""Names of control characters, which have none in Unicode."""


def _forbidden(source: Source, offset: int) -> Diagnostic:
    letter = source.clean[offset]
    named = f"U+{ord(letter):04X} {unicodedata.name(letter, _NAMES.get(letter, ''))}".strip()
    message = f"the character {named} is not allowed in a policy"
    help = "end lines with LF or CR LF" if letter == "\r" else "delete it"
    return source.finding("E012", message, offset, offset + 1, help=help)


_TOKENS = re.compile(
    r"""(?P<newline>\n) | (?P<blank>[ \t]+) | (?P<comment>\#[^\n]*)
      | (?P<token>"(?:[^"\n]|"")*" | '(?:[^'\n]|'')*' | [A-Za-z0-9_.]+)
      | (?P<open>[(\[{]) | (?P<close>[)\]}]) | (?P<other>[^\n])""",
    re.VERBOSE,
)


@dataclass
class _Scanner:
    """Splits a text into statements in one pass, collects the comments and counts tokens and brackets.

    Attributes:
        source: The text.
        chunks: The statements so far.
        findings: The diagnostics so far.
        notes: Comments since the last statement. `""` stands for a blank line.
        brackets: Offsets of the open brackets.
        tokens: Number of tokens so far.
        deepest: Offset of the first bracket beyond the nesting limit.
        unindented: Number of statements when an unindented line was last reported.
        fresh: Whether the current line has no token yet.
        commented: Whether the current line has a comment.
    """

    source: Source
    chunks: list[Chunk] = field(default_factory=list[Chunk])
    findings: list[Diagnostic] = field(default_factory=list[Diagnostic])
    notes: list[str] = field(default_factory=list[str])
    brackets: list[int] = field(default_factory=list[int])
    tokens: int = 0
    deepest: int | None = None
    unindented: int = -1
    fresh: bool = True
    commented: bool = False

    def scan(self) -> tuple[Source, tuple[Diagnostic, ...], bool]:
        line = 0
        for token in _TOKENS.finditer(self.source.clean):
            match token.lastgroup:
                case "newline":
                    self._end_line()
                    line = token.end()
                case "blank":
                    pass
                case "comment":
                    self._note(token[0].rstrip())
                case _:
                    if self.tokens == TOKEN_LIMIT:
                        return self.source, (self._too_many(token.start()),), False
                    self.tokens += 1
                    self._token(token, line)
        if self.deepest is not None:
            self.findings.append(self._too_deep(self.deepest))
        whole = replace(self.source, chunks=tuple(self.chunks), tail=tuple(_tidy(self.notes)))
        return whole, tuple(self.findings), self.deepest is None

    def _token(self, token: re.Match[str], line: int) -> None:
        if self.fresh:
            self._start_line(token, line)
        if self.chunks:
            self.chunks[-1].end = token.end()
        if token.lastgroup == "open":
            self.brackets.append(token.start())
            if len(self.brackets) > DEPTH_LIMIT and self.deepest is None:
                self.deepest = token.start()
        elif token.lastgroup == "close" and self.brackets:
            self.brackets.pop()

    def _start_line(self, token: re.Match[str], line: int) -> None:
        self.fresh = False
        start, word = token.start(), token[0]
        continues = word in CONTINUING or self.source.clean.startswith("->", start)
        if start == line and self.chunks and (continues or (self.brackets and word not in STATEMENT_WORDS)):
            # The line starts with a clause, or a bracket is open: the author meant it to continue the statement.
            if self.unindented != len(self.chunks):
                self.findings.append(self._finding("E006", "a line that continues a statement must be indented", token))
            self.unindented = len(self.chunks)
        elif start == line:
            self.brackets.clear()
            self.chunks.append(Chunk(start, token.end(), word, tuple(_tidy(self.notes))))
            self.notes.clear()
        elif self.chunks:
            self._continue()
        elif not self.findings:
            self.findings.append(self._finding("E006", "an indented line continues no statement", token))

    def _continue(self) -> None:
        """Moves the comments inside a statement before it."""
        chunk = self.chunks[-1]
        inner = [chunk.after] if chunk.after else []
        inner += [note for note in self.notes if note]
        self.notes.clear()
        chunk.before, chunk.after = (*chunk.before, *inner), None

    def _note(self, comment: str) -> None:
        self.commented = True
        if self.fresh:
            self.notes.append(comment)
        elif self.chunks:
            self.chunks[-1].after = comment

    def _end_line(self) -> None:
        if self.fresh and not self.commented:
            self.notes.append("")
        self.fresh, self.commented = True, False

    def _finding(self, code: str, message: str, token: re.Match[str]) -> Diagnostic:
        help = "a statement starts in column 1 with its keyword; indented lines continue it"
        return self.source.finding(code, message, token.start(), token.end(), help=help)

    def _too_many(self, offset: int) -> Diagnostic:
        message = f"more than {TOKEN_LIMIT} tokens"
        return self.source.finding("E014", message, offset, offset + 1, help="split the policy and `use` its parts")

    def _too_deep(self, offset: int) -> Diagnostic:
        message = f"brackets are nested deeper than {DEPTH_LIMIT}"
        return self.source.finding("E015", message, offset, offset + 1, help="name a part with `let`")


def _tidy(notes: list[str]) -> Iterator[str]:
    """Yields the notes. Several blank lines in a row become one."""
    last = None
    for note in notes:
        if note or last != "":
            yield note
        last = note
