"""Derives quick fixes from the help of diagnostics."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from cachepolicy.errors import Diagnostic
from cachepolicy.lsp.document import PolicyDocument, Stretch

_MEANT = re.compile(r"did you mean (?:the [a-z ]+ )?`([^`]+)`\?")
_WRITE = re.compile(r"write `((?:-> )?[^` ]+)`")


@dataclass(frozen=True, slots=True)
class Edit:
    """A range of the text and its replacement."""

    stretch: Stretch
    text: str


@dataclass(frozen=True, slots=True)
class Fix:
    """A way out of a finding: what it is called, and its edits, which do not overlap."""

    title: str
    edits: tuple[Edit, ...]


def fixes(document: PolicyDocument, finding: Diagnostic) -> Iterator[Fix]:
    """The ways out of a finding about the document; none where a person has to decide."""
    if finding.span is None or finding.help is None:
        return
    stretch = Stretch(finding.span.start, finding.span.end)
    if meant := _MEANT.fullmatch(finding.help):
        wrong = _wrong(document, finding, stretch)
        if wrong is not None:
            yield Fix(f"Change to `{meant[1]}`", (Edit(wrong, meant[1]),))
    elif (sign := _WRITE.fullmatch(finding.help)) and finding.code in ("E001", "E002"):
        yield Fix(f"Change to `{sign[1]}`", (Edit(stretch, sign[1]),))
    elif finding.code == "E012":
        yield Fix("Delete the character", (Edit(stretch, ""),))
    elif finding.code == "E006" and "must be indented" in finding.message:
        yield Fix("Indent the line", (Edit(Stretch(stretch.start, stretch.start), "  "),))
    elif finding.code == "W510":
        yield from _moved(document, finding, stretch)


def _wrong(document: PolicyDocument, finding: Diagnostic, stretch: Stretch) -> Stretch | None:
    """The word that the message quotes and the text holds, as a word of its own."""
    for word in re.findall(r"`([^`]+)`", finding.message):
        expression = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(word)}(?![A-Za-z0-9_])")
        if found := expression.search(document.text, stretch.start, stretch.end):
            return Stretch(*found.span())
    return None


def _moved(document: PolicyDocument, finding: Diagnostic, stretch: Stretch) -> Iterator[Fix]:
    """The rule put before those that come before it, where all stand in this text."""
    if not finding.related or any(each.source != document.name for each in finding.related):
        return
    first = min(finding.related, key=lambda each: each.span.start).span
    rule, place = _with_comments(document, stretch), _with_comments(document, Stretch(first.start, first.end)).start
    text = document.said(rule)
    insertion = Edit(Stretch(place, place), text if text.endswith("\n") else f"{text}\n")
    yield Fix(f"Move the rule before line {first.line}", (insertion, Edit(rule, "")))


def _with_comments(document: PolicyDocument, stretch: Stretch) -> Stretch:
    """A statement's lines, from the comments right above it."""
    text = document.text
    above = re.search(r"(?:^#[^\n]*\n)*\Z", text[: stretch.start], re.MULTILINE)
    end = text.find("\n", stretch.end)
    return Stretch(above.start() if above else stretch.start, len(text) if end < 0 else end + 1)
