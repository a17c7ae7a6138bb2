"""Hover texts and definitions of the word under the cursor."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import assert_never

from cachepolicy._resources import documentation
from cachepolicy.language import ir
from cachepolicy.language.formatter import format_node
from cachepolicy.language.reference import ReferenceEntry, explain_word
from cachepolicy.language.source import Chunk
from cachepolicy.language.vocabulary import APPROXIMATIONS, CLOCK, FUNCTIONS, PHRASES, PREDICTORS, RESERVED, TYPES
from cachepolicy.lsp.document import PolicyDocument, Stretch, opened_document


@dataclass(frozen=True, slots=True)
class Hover:
    """Markdown about a stretch of the document."""

    text: str
    stretch: Stretch


@dataclass(frozen=True, slots=True)
class DocumentRange:
    """A stretch of a document, this one or another."""

    document: PolicyDocument
    stretch: Stretch


def hover(document: PolicyDocument, offset: int) -> Hover | None:
    """Returns the hover text for the word at `offset`, or `None`."""
    found = _at(document, offset)
    if found is None:
        return None
    stretch, subject = found
    match subject:
        case _Words():
            text = _entries(subject.entries)
        case _Name():
            text = _declaration(document, subject.name)
        case _Used(setting=None):
            text = _policy(subject.policy)
        case _Used():
            text = "\n\n".join(_param(each) for each in _params(subject.policy) if each.name == subject.setting)
        case _:
            assert_never(subject)
    return Hover(text, stretch) if text else None


def definitions(document: PolicyDocument, offset: int) -> tuple[DocumentRange, ...]:
    """Where the word under a cursor is declared.

    For a policy behind `use` that is its file, for a setting of it the parameter there, and for the `match` of a rule
    that never decides the rules that decide in its place.
    """
    found = _at(document, offset)
    if found is None:
        return ()
    stretch, subject = found
    match subject:
        case _Words():
            return _shadowing(document, stretch)
        case _Name():
            return (DocumentRange(document, document.names[subject.name]),)
        case _Used():
            file = opened_document(subject.policy.source_name)
            place = Stretch(0, 0) if file is None or subject.setting is None else file.names.get(subject.setting)
            return (DocumentRange(file, place),) if file and place else ()
        case _:
            assert_never(subject)


# --- what the cursor is at -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Words:
    """Words of the language."""

    entries: tuple[ReferenceEntry, ...]


@dataclass(frozen=True, slots=True)
class _Name:
    """A name that this document declares."""

    name: str


@dataclass(frozen=True, slots=True)
class _Used:
    """A policy that is used, or a parameter of it that is set."""

    policy: ir.Policy
    setting: str | None = None


def _at(document: PolicyDocument, offset: int) -> tuple[Stretch, _Words | _Name | _Used] | None:
    stretch = document.word(offset)
    chunk = document.statement(stretch.end if stretch else offset)
    if chunk is not None and chunk.word == "use":
        name = document.use(chunk)
        if name is not None and name.touches(offset):
            used = document.used(chunk)
            return None if used is None else (name, _Used(used))
        if stretch is not None and document.is_setting(stretch, chunk):
            used = document.used(chunk)
            return None if used is None else (stretch, _Used(used, document.said(stretch)))
    if stretch is None or chunk is None:
        return None
    word, phrase = document.said(stretch), _phrase(document, stretch, chunk)
    # A parameter may be called `all`; no other word of a phrase can stand elsewhere in its company.
    if word in document.names and word not in RESERVED and phrase in (None, "in all"):
        return stretch, _Name(word)
    return (stretch, _Words(explain_word(phrase or word))) if phrase or word in _EXPLAINED else None


_EXPLAINED = {*RESERVED, *CLOCK, *FUNCTIONS, *TYPES, *PREDICTORS, *APPROXIMATIONS}


def _phrase(document: PolicyDocument, stretch: Stretch, chunk: Chunk) -> str | None:
    """Returns the fixed phrase that contains the word."""
    for phrase in PHRASES:
        words = ("[0-9]+" if word == "N" else word for word in phrase.split())
        expression = re.compile(r"\b" + r"\s+".join(words) + r"\b")
        for found in expression.finditer(document.source.clean, chunk.start, chunk.end):
            if found.start() <= stretch.start and stretch.end <= found.end():
                return phrase
    return None


def _shadowing(document: PolicyDocument, stretch: Stretch) -> tuple[DocumentRange, ...]:
    """Returns the rules that precede the rule at this position."""
    related = (
        related
        for finding in document.findings
        if finding.span is not None and finding.span.start == stretch.start
        for related in finding.related
    )
    places = (
        (document if each.source == document.name else opened_document(each.source), each.span) for each in related
    )
    return tuple(DocumentRange(file, Stretch(span.start, span.end)) for file, span in places if file is not None)


# --- what is shown ---------------------------------------------------------------------------------------


def _entries(entries: Iterable[ReferenceEntry]) -> str:
    entries = tuple(entries)
    said = [f"**`{each.form}`** {each.sentence}" for each in entries]
    address = documentation(f"language.md#{entries[0].table.section}")
    return "\n\n".join([*said, f"[The language]({address})"] if address else said)


def _declaration(document: PolicyDocument, name: str) -> str:
    statement = document.declared.get(name)
    match statement:
        case None:
            return _code(document.text[document.names[name].start :].partition("\n")[0])
        case ir.Param():
            return _param(statement)
        case _:
            (entry,) = explain_word(statement.kind)
            return f"{_code(format_node(statement))}\n\n{entry.says}"


def _param(param: ir.Param) -> str:
    code = _code(format_node(param.model_copy(update={"doc": None})))
    return f"{code}\n\n{param.doc}" if param.doc else code


def _policy(policy: ir.Policy) -> str:
    params = "\n".join(format_node(each) for each in _params(policy))
    parts = (f"**{policy.title or policy.name or 'A policy'}**", policy.source, _code(params) if params else None)
    return "\n\n".join(part for part in parts if part)


def _params(policy: ir.Policy) -> list[ir.Param]:
    return [each for each in policy.statements if isinstance(each, ir.Param)]


_LONGEST = 2000
"""Characters of a declaration that are shown."""


def _code(text: str) -> str:
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return f"```cachepolicy\n{shown}\n```"
