"""Hover texts and definitions of the word under the cursor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cachepolicy._resources import documentation
from cachepolicy.language import ir
from cachepolicy.language.formatter import format_node
from cachepolicy.language.reference import ReferenceEntry, explain_word
from cachepolicy.language.source import Chunk
from cachepolicy.language.vocabulary import APPROXIMATIONS, CLOCK, FUNCTIONS, PHRASES, PREDICTORS, RESERVED, TYPES
from cachepolicy.lsp.document import PolicyDocument, TextRange, opened_document


@dataclass(frozen=True, slots=True)
class Hover:
    """A Markdown text about a range of the document."""

    text: str
    range: TextRange


@dataclass(frozen=True, slots=True)
class DocumentRange:
    """A range of a document: the open document or another one."""

    document: PolicyDocument
    range: TextRange


def hover(document: PolicyDocument, offset: int) -> Hover | None:
    """Returns the hover text for the word at `offset`, or None."""
    target = _subject(document, offset)
    if target is None:
        return None
    word, subject = target
    match subject:
        case _Used(setting=None):
            text = _describe_policy(subject.policy)
        case _Used():
            params = [param for param in _params(subject.policy) if param.name == subject.setting]
            text = "\n\n".join(map(_describe_param, params))
        case str():
            text = _describe_declaration(document, subject)
        case _:
            text = _describe_entries(subject)
    return Hover(text, word) if text else None


def definitions(document: PolicyDocument, offset: int) -> tuple[DocumentRange, ...]:
    """Returns the declarations of the word at `offset`.

    For a policy in a `use` statement, that is its file. For a setting of the policy, it is the parameter in that file.
    For the `match` of a rule that never decides, it is the rules that decide instead.
    """
    target = _subject(document, offset)
    if target is None:
        return ()
    word, subject = target
    match subject:
        case _Used():
            file = opened_document(subject.policy.source_name)
            declared = TextRange(0, 0) if file is None or subject.setting is None else file.names.get(subject.setting)
            return (DocumentRange(file, declared),) if file and declared else ()
        case str():
            return (DocumentRange(document, document.names[subject]),)
        case _:
            return _preceding_rules(document, word)


# --- the subject under the cursor ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Used:
    """A policy in a `use` statement, or a parameter of it that the statement sets."""

    policy: ir.Policy
    setting: str | None = None


_Subject = _Used | str | tuple[ReferenceEntry, ...]
"""A used policy, a name that the document declares, or the entries for words of the language."""

_EXPLAINED = {*RESERVED, *CLOCK, *FUNCTIONS, *TYPES, *PREDICTORS, *APPROXIMATIONS}


def _subject(document: PolicyDocument, offset: int) -> tuple[TextRange, _Subject] | None:
    word = document.word(offset)
    chunk = document.statement(word.end if word else offset)
    if chunk is None:
        return None
    if chunk.word == "use":
        name = document.use(chunk)
        if name is not None and name.touches(offset):
            used = document.used(chunk)
            return None if used is None else (name, _Used(used))
        if word is not None and document.is_setting(word, chunk):
            used = document.used(chunk)
            return None if used is None else (word, _Used(used, document.text_of(word)))
    if word is None:
        return None
    text, phrase = document.text_of(word), _phrase(document, word, chunk)
    # A parameter may be called `all`. Every other word of a phrase is reserved in the context of that phrase.
    if text in document.names and text not in RESERVED and phrase in (None, "in all"):
        return word, text
    return (word, explain_word(phrase or text)) if phrase or text in _EXPLAINED else None


def _phrase(document: PolicyDocument, word: TextRange, chunk: Chunk) -> str | None:
    """Returns the fixed phrase that contains the word."""
    for phrase in PHRASES:
        parts = ("[0-9]+" if part == "N" else part for part in phrase.split())
        expression = re.compile(r"\b" + r"\s+".join(parts) + r"\b")
        for occurrence in expression.finditer(document.source.clean, chunk.start, chunk.end):
            if occurrence.start() <= word.start and word.end <= occurrence.end():
                return phrase
    return None


def _preceding_rules(document: PolicyDocument, word: TextRange) -> tuple[DocumentRange, ...]:
    """Returns the rules that precede the rule at this position."""
    findings = [finding for finding in document.findings if finding.span and finding.span.start == word.start]
    return tuple(
        DocumentRange(file, TextRange(related.span.start, related.span.end))
        for finding in findings
        for related in finding.related
        if (file := document if related.source == document.name else opened_document(related.source)) is not None
    )


# --- hover texts -----------------------------------------------------------------------------------------


def _describe_entries(entries: Sequence[ReferenceEntry]) -> str:
    parts = [f"**`{entry.form}`** {entry.sentence}" for entry in entries]
    address = documentation(f"language.md#{entries[0].table.section}")
    return "\n\n".join([*parts, f"[The language]({address})"] if address else parts)


def _describe_declaration(document: PolicyDocument, name: str) -> str:
    statement = document.declared.get(name)
    match statement:
        case None:
            return _code(document.text[document.names[name].start :].partition("\n")[0])
        case ir.Param():
            return _describe_param(statement)
        case _:
            (entry,) = explain_word(statement.kind)
            return f"{_code(format_node(statement))}\n\n{entry.says}"


def _describe_param(param: ir.Param) -> str:
    code = _code(format_node(param.model_copy(update={"doc": None})))
    return f"{code}\n\n{param.doc}" if param.doc else code


def _describe_policy(policy: ir.Policy) -> str:
    params = "\n".join(map(format_node, _params(policy)))
    parts = (f"**{policy.title or policy.name or 'A policy'}**", policy.source, _code(params) if params else None)
    return "\n\n".join(part for part in parts if part)


def _params(policy: ir.Policy) -> list[ir.Param]:
    return [statement for statement in policy.statements if isinstance(statement, ir.Param)]


_CODE_LIMIT = 2000
"""The largest number of characters of a declaration in a hover text."""


def _code(text: str) -> str:
    shown = text if len(text) <= _CODE_LIMIT else f"{text[:_CODE_LIMIT]} ..."
    return f"```cachepolicy\n{shown}\n```"
