"""Completion: the keywords that the parser accepts at a position, and the names that are valid there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from cachepolicy._resources import shipped_policies
from cachepolicy.language import ir, scope
from cachepolicy.language.formatter import format_node
from cachepolicy.language.parser import Lookahead, look_ahead
from cachepolicy.language.reference import explain_word
from cachepolicy.language.scope import SORTS, Declaration, ExpressionPlace
from cachepolicy.language.source import Chunk
from cachepolicy.language.vocabulary import (
    ACCUMULATORS,
    APPROXIMATIONS,
    CLOCK,
    FUNCTIONS,
    HEADER_WORDS,
    KINDS,
    MEMORIES,
    NORMS,
    PREDICTORS,
    PROBES,
    STATEMENT_WORDS,
    TYPES,
    Label,
)
from cachepolicy.lsp.document import PolicyDocument

CompletionSort = Literal["word", "kind", "type", "clock", "function", "name", "policy", "method", "label", "letter"]


@dataclass(frozen=True, slots=True)
class Completion:
    """A text that may stand where the cursor is, what it is, and a line and a sentence about it."""

    text: str
    sort: CompletionSort
    detail: str = ""
    says: str = ""


def completions(document: PolicyDocument, offset: int) -> tuple[Completion, ...]:
    """Returns the completions at `offset`, most likely first. A completion replaces the part of the word before it."""
    if not document.is_code(offset):
        return ()
    word = document.word(offset)
    start = word.start if word else offset
    chunk = document.statement(start)
    if chunk is None:
        words = STATEMENT_WORDS if not document.policy.statements else STATEMENT_WORDS[len(HEADER_WORDS) :]
        return tuple(_explained(words, "word"))
    ahead = look_ahead(document.source, chunk.start, start)
    if ahead is None:
        return ()
    found = {each.text: each for each in (*_names(document, chunk, ahead), *_words(ahead, _place(chunk, ahead)))}
    return tuple(found.values())


# --- words of the language -------------------------------------------------------------------------------

_PHRASED: Mapping[str, str] = {
    "at": "at most",
    "from": "from end",
    "since": "since compute",
    "approximate": "approximate uncond",
    "a": "a row",
}
"""Words that never stand alone."""


def _words(ahead: Lookahead, place: ExpressionPlace) -> Iterator[Completion]:
    words = set(ahead.words)
    if "clock word" in place.knows and _last(ahead) not in ("_EVERY", "_MOST"):
        words.discard("off")
    yield from _explained((_PHRASED.get(each, each) for each in sorted(words)), "word")
    if "_ARROW" in ahead.accepts:
        yield Completion("->", "word", "-> ACTION")
    if "KIND" in ahead.accepts:
        yield from _explained(KINDS, "kind")
    if "TYPE" in ahead.accepts:
        yield from _explained(("float",) if _last(ahead, 3) == "_EXTERNAL" else TYPES, "type")
    if "PROBE" in ahead.accepts and place.probes:
        yield from _explained(PROBES, "function")
    if "LETTERS" in ahead.accepts:
        yield from (Completion("C", "letter", says="computes"), Completion("R", "letter", says="reuses"))


def _explained(words: Iterable[str], sort: CompletionSort) -> Iterator[Completion]:
    for word in words:
        entries = explain_word(word)
        says = "\n\n".join(f"**`{each.form}`** {each.sentence}" for each in entries)
        yield Completion(word, sort, entries[0].form if entries else "", says)


def _last(ahead: Lookahead, back: int = 1) -> str:
    return ahead.read[-back][0] if len(ahead.read) >= back else ""


# --- names -----------------------------------------------------------------------------------------------

_METHODS = {"_PREDICT": PREDICTORS, "_UNCOND": APPROXIMATIONS}
_PARAMS: Mapping[str, tuple[ir.ParamType, ...]] = {"_ON": ("list",), "_MASK": ("string",), "_IN": ("range", "list")}
"""The types of the parameters that stand alone behind a word."""


def _names(document: PolicyDocument, chunk: Chunk, ahead: Lookahead) -> Iterator[Completion]:
    last = _last(ahead)
    if "NAME" not in ahead.accepts:
        return
    if last == "_USE":
        yield from (Completion(name, "policy") for name in shipped_policies())
    elif last == "_FOLLOW":
        yield from (Completion(name, "name", "a branch") for name in ("cond", "uncond"))
    elif last in _METHODS:
        yield from _explained(_METHODS[last], "method")
    elif last in _PARAMS and not ahead.accepts & {"INT", "KIND"}:
        yield from _declared(document, {"param"}, _PARAMS[last])
    elif ahead.accepts <= {"NAME", "RPAR"}:
        yield from _labels(document, chunk, ahead)
    elif "KIND" in ahead.accepts:
        yield from _declared(document, {"param"}, ("string", "list"))
    else:
        yield from _values(document, _place(chunk, ahead))


def _labels(document: PolicyDocument, chunk: Chunk, ahead: Lookahead) -> Iterator[Completion]:
    """The settings of a `with`, or the arguments of an action; none that was given already, and none for a new name."""
    read = [text for _, text in ahead.read]
    match chunk.word:
        case "use" if "with" in read:
            used = document.used(chunk)
            params = [each for each in used.statements if isinstance(each, ir.Param)] if used else []
            found = {each.name: _completion(each) for each in params}
        case "expect" if "with" in read:
            found = {each.text: each for each in _declared(document, {"param", "signal", "external"})}
            found |= {each.text: each for each in _explained(("t", "sigma"), "clock")}
        case "match" if "->" in read:
            methods = {**PREDICTORS, **APPROXIMATIONS}
            labels = next((methods[text] for text in reversed(read) if text in methods), dict[str, Label]())
            found = {name: Completion(name, "label", f"{name}: {label.type}") for name, label in labels.items()}
        case _:
            return
    yield from (each for name, each in found.items() if name not in read)


def _values(document: PolicyDocument, place: ExpressionPlace) -> Iterator[Completion]:
    """What an expression may read at a place."""
    yield from _declared(document, {kind for kind, sort in SORTS.items() if sort in place.knows})
    if "clock word" not in place.knows:
        return
    yield from _explained(CLOCK, "clock")
    unknown = NORMS if "signal" not in place.knows else frozenset[str]()
    unknown |= MEMORIES if not place.memory else frozenset[str]()
    unknown |= ACCUMULATORS if not place.accumulators else frozenset[str]()
    yield from _explained((each for each in FUNCTIONS if each not in unknown), "function")


def _declared(document: PolicyDocument, kinds: set[str], types: tuple[str, ...] = ()) -> Iterator[Completion]:
    for each in document.declared.values():
        if each.kind in kinds and (not types or (isinstance(each, ir.Param) and each.type in types)):
            yield _completion(each)


def _completion(statement: Declaration) -> Completion:
    doc = statement.doc if isinstance(statement, ir.Param) else None
    return Completion(statement.name, "name", format_node(statement)[:120], doc or "")


# --- where the cursor is ---------------------------------------------------------------------------------

_STATEMENTS = {
    "param": scope.LITERAL,
    "let": scope.LET,
    "signal": scope.SIGNAL,
    "use": scope.SETTING,
    "expect": scope.EXPECTED,
}
_CLAUSES = {
    "_WHEN": scope.WHEN,
    "_EVERY": scope.SCHEDULE,
    "_OFFSET": scope.SCHEDULE,
    "_ON": scope.SCHEDULE,
    "_WHILE": scope.WHILE,
    "_AT": scope.BOUND,
    "_ARROW": scope.ARGUMENT,
}


def _place(chunk: Chunk, ahead: Lookahead) -> ExpressionPlace:
    """The kind of place for an expression that the cursor is at."""
    begun = (_CLAUSES[kind] for kind, _ in reversed(ahead.read) if kind in _CLAUSES)
    return _STATEMENTS.get(chunk.word) or next(begun, scope.POSITION)
