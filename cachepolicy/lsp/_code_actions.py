"""Derives quick fixes from the help of diagnostics."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from cachepolicy.errors import Diagnostic
from cachepolicy.lsp.document import PolicyDocument, TextRange

_MEANT = re.compile(r"did you mean (?:the [a-z ]+ )?`([^`]+)`\?")
_WRITE = re.compile(r"write `((?:-> )?[^` ]+)`")


@dataclass(frozen=True, slots=True)
class Edit:
    """A range of the text and its replacement."""

    range: TextRange
    text: str


@dataclass(frozen=True, slots=True)
class Fix:
    """A quick fix: its title and its edits, which do not overlap."""

    title: str
    edits: tuple[Edit, ...]


def fixes(document: PolicyDocument, finding: Diagnostic) -> Iterator[Fix]:
    """Yields the quick fixes for a finding about the document."""
    if finding.span is None or finding.help is None:
        return
    extent = TextRange(finding.span.start, finding.span.end)
    if meant := _MEANT.fullmatch(finding.help):
        wrong = _wrong_word(document, finding, extent)
        if wrong is not None:
            yield Fix(f"Change to `{meant[1]}`", (Edit(wrong, meant[1]),))
    elif (sign := _WRITE.fullmatch(finding.help)) and finding.code in ("E001", "E002"):
        yield Fix(f"Change to `{sign[1]}`", (Edit(extent, sign[1]),))
    elif finding.code == "E012":
        yield Fix("Delete the character", (Edit(extent, ""),))
    elif finding.code == "E006" and "must be indented" in finding.message:
        yield Fix("Indent the line", (Edit(TextRange(extent.start, extent.start), "  "),))
    elif finding.code == "W510":
        yield from _moved(document, finding, extent)


def _wrong_word(document: PolicyDocument, finding: Diagnostic, searched: TextRange) -> TextRange | None:
    """Returns the range of a word that the message quotes and the searched text contains."""
    for word in re.findall(r"`([^`]+)`", finding.message):
        expression = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(word)}(?![A-Za-z0-9_])")
        if match := expression.search(document.text, searched.start, searched.end):
            return TextRange(*match.span())
    return None


def _moved(document: PolicyDocument, finding: Diagnostic, extent: TextRange) -> Iterator[Fix]:
    """Yields a fix that moves the rule before the rules that precede it, if all are in this document."""
    if not finding.related or any(related.source != document.name for related in finding.related):
        return
    first = min((related.span for related in finding.related), key=lambda span: span.start)
    rule, target = (
        _with_comments(document, extent),
        _with_comments(document, TextRange(first.start, first.end)).start,
    )
    text = document.text_of(rule)
    insertion = Edit(TextRange(target, target), text if text.endswith("\n") else f"{text}\n")
    yield Fix(f"Move the rule before line {first.line}", (insertion, Edit(rule, "")))


def _with_comments(document: PolicyDocument, statement: TextRange) -> TextRange:
    """Returns the lines of a statement and of the comments directly above it."""
    text = document.text
    above = re.search(r"(?:^#[^\n]*\n)*\Z", text[: statement.start], re.MULTILINE)
    end = text.find("\n", statement.end)
    return TextRange(above.start() if above else statement.start, len(text) if end < 0 else end + 1)
