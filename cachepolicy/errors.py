"""Source spans, diagnostics, their rendering as text or JSON, and `PolicyError`."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from cachepolicy._error_codes import CODES

__all__ = [
    "CODES", "HIDDEN_CHARACTERS", "Diagnostic", "PolicyError", "Related", "Severity", "Span", "nearest", "render",
    "suggestion", "to_json", "visible", "warn",
]  # fmt: skip

Severity = Literal["error", "warning"]

# Characters that a terminal or an editor does not show, or that change how the text around them is shown: control
# characters, spaces other than U+0020, zero-width characters, variation selectors, bidirectional controls, tags, and
# halves of surrogate pairs. Tabs and newlines are not among them.
_HIDDEN_CLASS = (
    "\x00-\x08\x0b-\x1f\x7f-\xa0\xad\u034f\u061c\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f\u2000-\u200f\u2028-\u202f"
    "\u205f-\u206f\u2800\u3000\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
HIDDEN_CHARACTERS = re.compile(f"[{_HIDDEN_CLASS}]")
"""Matches one character that cannot be seen or that reorders the text around it."""
_HIDDEN_IN_SENTENCE = re.compile(f"[\t\n{_HIDDEN_CLASS}]")


def visible(sentence: str) -> str:
    r"""Returns a sentence with each hidden character, tab and newline as its escape, such as `\u200b`."""
    return _HIDDEN_IN_SENTENCE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), sentence)


@dataclass(frozen=True, slots=True)
class Span:
    """A range of source text.

    Offsets count characters from 0, lines and columns count from 1. The end is exclusive.
    """

    start: int
    end: int
    line: int
    column: int
    end_line: int
    end_column: int


@dataclass(frozen=True, slots=True)
class Related:
    """A second location that a diagnostic refers to.

    Attributes:
        message: Explains how the location relates to the diagnostic.
        span: The location in the source text.
        source: Name of the file that holds the location, or `None` for the file of the diagnostic.
    """

    message: str
    span: Span
    source: str | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", visible(self.message))


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One error or warning about a policy, its settings or its use on a model.

    Attributes:
        code: Stable code, a key of `CODES`.
        message: One sentence in lower case, without a full stop. Words of the user are in backticks.
        severity: `"error"` or `"warning"`.
        span: Location in the source text, or `None` if the diagnostic has no location.
        source: Name of the file, or `<text>`.
        excerpt: The source lines that the span covers.
        label: Text that the code frame prints next to the underline.
        help: A suggested fix.
        related: Further locations that the diagnostic refers to.
    """

    code: str
    message: str
    severity: Severity = "error"
    span: Span | None = None
    source: str | None = None
    excerpt: tuple[str, ...] = ()
    label: str = ""
    help: str | None = None
    related: tuple[Related, ...] = ()

    def __post_init__(self) -> None:
        # Sentences quote words of the user, which must not act on the terminal.
        for name in ("message", "label", "help"):
            sentence = getattr(self, name)
            if sentence:
                object.__setattr__(self, name, visible(sentence))


class PolicyError(Exception):
    """Raised when a policy, its settings or its use on a model is invalid.

    `str(error)` renders the diagnostics without colour.

    Attributes:
        diagnostics: All diagnostics of one operation, in source order.
    """

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics: tuple[Diagnostic, ...] = tuple(diagnostics)
        super().__init__(self.diagnostics)

    def __str__(self) -> str:
        return render(self.diagnostics)

    @classmethod
    def of(cls, code: str, message: str, *, help: str | None = None) -> PolicyError:
        """Creates an error with one diagnostic that has no source location.

        Args:
            code: Error code, a key of `CODES`.
            message: Message of the diagnostic.
            help: A suggested fix.

        Returns:
            The error; the caller raises it.
        """
        return cls([Diagnostic(code, message, help=help)])


def warn(code: str, message: str, *, help: str) -> None:
    """Warns of what a running policy has met, as a `UserWarning` with the rendered diagnostic.

    Args:
        code: Warning code, a key of `CODES`.
        message: Message of the diagnostic.
        help: A suggested fix.
    """
    warnings.warn(render([Diagnostic(code, message, "warning", help=help)]), UserWarning, stacklevel=3)


_RED, _YELLOW, _BLUE, _BOLD, _RESET = "\x1b[31;1m", "\x1b[33;1m", "\x1b[34;1m", "\x1b[1m", "\x1b[0m"


def render(diagnostics: Iterable[Diagnostic], *, colour: bool = False) -> str:
    """Renders diagnostics as text: a code frame with the span underlined, then the help.

    Args:
        diagnostics: The diagnostics, in the order in which they are printed.
        colour: Whether the text contains ANSI colour codes.

    Returns:
        The text, with a blank line between diagnostics.
    """
    text = "\n\n".join(_render_one(diagnostic) for diagnostic in diagnostics)
    if colour:
        return text
    for escape in (_RED, _YELLOW, _BLUE, _BOLD, _RESET):
        text = text.replace(escape, "")
    return text


def _render_one(diagnostic: Diagnostic) -> str:
    paint = _RED if diagnostic.severity == "error" else _YELLOW
    lines = [f"{paint}{diagnostic.severity}[{diagnostic.code}]{_RESET}{_BOLD}: {diagnostic.message}{_RESET}"]
    span = diagnostic.span
    if span is None:
        if diagnostic.source is not None:
            lines.append(f" {_BLUE}-->{_RESET} {visible(diagnostic.source)}")
        if diagnostic.help:
            lines.append(f"  {_BLUE}={_RESET} {_BOLD}help{_RESET}: {diagnostic.help}")
        return "\n".join(lines)
    margin = " " * len(str(span.line))
    lines.append(f"{margin}{_BLUE}-->{_RESET} {visible(diagnostic.source or '<text>')}:{span.line}:{span.column}")
    if diagnostic.excerpt and span.column <= len(diagnostic.excerpt[0]) + 1:
        lines += _frame(diagnostic, span, margin, paint)
    if diagnostic.help:
        lines.append(f"{margin} {_BLUE}={_RESET} {_BOLD}help{_RESET}: {diagnostic.help}")
    return "\n".join(lines)


def _frame(diagnostic: Diagnostic, span: Span, margin: str, paint: str) -> list[str]:
    first, column = diagnostic.excerpt[0], span.column
    end = span.end_column if span.end_line == span.line else len(first) + 1
    if len(first) > _FRAME_WIDTH:
        first, column, end = _clipped(first, column, end)
    # The padding keeps tabs, so that the underline is below its text at any tab width.
    padding = "".join("\t" if letter == "\t" else " " for letter in first[: column - 1])
    underline = "^" * max(1, end - column)
    label = f" {diagnostic.label}" if diagnostic.label else ""
    return [
        f"{margin} {_BLUE}|{_RESET}",
        f"{_BLUE}{span.line} |{_RESET} {first}",
        f"{margin} {_BLUE}|{_RESET} {padding}{paint}{underline}{label}{_RESET}",
    ]


_FRAME_WIDTH = 160


def _clipped(line: str, column: int, end: int) -> tuple[str, int, int]:
    """Shortens a long line to the part around its underlined text, and shifts the columns to match."""
    start = max(0, column - 1 - _FRAME_WIDTH // 4)
    shown = line[start : start + _FRAME_WIDTH]
    if start:
        shown = "…" + shown[1:]
    if start + _FRAME_WIDTH < len(line):
        shown = shown[:-1] + "…"
    return shown, column - start, min(end - start, len(shown) + 1)


def to_json(diagnostics: Iterable[Diagnostic]) -> str:
    """Renders diagnostics as a JSON list with one object per diagnostic. Hidden characters are escaped.

    Args:
        diagnostics: The diagnostics, in the order of the list.

    Returns:
        The JSON text.
    """
    text = json.dumps([asdict(diagnostic) for diagnostic in diagnostics], ensure_ascii=False, indent=2)
    return HIDDEN_CHARACTERS.sub(lambda match: json.dumps(match[0])[1:-1], text)


def nearest(word: str, candidates: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Finds the candidate that is most similar to `word`.

    Args:
        word: The word to match.
        candidates: The words to choose from.
        cutoff: Lowest accepted similarity, from 0 to 1.

    Returns:
        The best candidate, or `None` if no candidate reaches `cutoff`.
    """
    # Imported here because only error paths need it.
    import difflib

    matches = difflib.get_close_matches(word, list(candidates), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def suggestion(word: str, candidates: Sequence[str]) -> str | None:
    """Builds the help sentence for an unknown word.

    Args:
        word: The unknown word.
        candidates: The words that are valid in its position.

    Returns:
        A sentence with the most similar candidate, or with all candidates if there are at most 12,
        otherwise `None`.
    """
    near = nearest(word, candidates)
    if near is not None:
        return f"did you mean `{near}`?"
    if 0 < len(candidates) <= 12:
        return "one of " + ", ".join(f"`{candidate}`" for candidate in candidates)
    return None


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, in the plural unless the number is 1: `1 site`, `2 sites`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
