"""Completions: the keywords that the parser accepts at a position, and the names that are valid there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from cachepolicy._resources import shipped_policies
from cachepolicy.errors import PolicyError
from cachepolicy.language import ir, scope
from cachepolicy.language.formatter import format_node
from cachepolicy.language.installed_predictors import installed_names, labels_of
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
    """A text that may be inserted at the cursor.

    Attributes:
        text: The text.
        sort: What the text is, which decides its icon.
        detail: One line about it.
        documentation: Markdown about it.
    """

    text: str
    sort: CompletionSort
    detail: str = ""
    documentation: str = ""


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
    candidates = (*_names(document, chunk, ahead), *_words(ahead, _expression_place(chunk, ahead)))
    return tuple({completion.text: completion for completion in candidates}.values())


# --- words of the language -------------------------------------------------------------------------------

_PHRASED: Mapping[str, str] = {
    "at": "at most",
    "from": "from end",
    "since": "since compute",
    "approximate": "approximate uncond",
    "a": "a row",
}
"""The phrases that replace words which are never used alone."""


def _words(ahead: Lookahead, context: ExpressionPlace) -> Iterator[Completion]:
    words = set(ahead.words)
    if "clock word" in context.knows and _last(ahead) not in ("_EVERY", "_MOST"):
        words.discard("off")
    yield from _explained((_PHRASED.get(word, word) for word in sorted(words)), "word")
    if "_ARROW" in ahead.accepts:
        yield Completion("->", "word", "-> ACTION")
    if "KIND" in ahead.accepts:
        yield from _explained(KINDS, "kind")
    if "TYPE" in ahead.accepts:
        yield from _explained(("float",) if _last(ahead, 3) == "_EXTERNAL" else TYPES, "type")
    if "PROBE" in ahead.accepts and context.probes:
        yield from _explained(PROBES, "function")
    if "_TOKENS" in ahead.accepts:
        yield from _explained(("tokens",), "label")
    if "LETTERS" in ahead.accepts:
        yield from (Completion("C", "letter", "", "computes"), Completion("R", "letter", "", "reuses"))


def _explained(words: Iterable[str], sort: CompletionSort) -> Iterator[Completion]:
    for word in words:
        entries = explain_word(word)
        text = "\n\n".join(f"**`{entry.form}`** {entry.sentence}" for entry in entries)
        yield Completion(word, sort, entries[0].form if entries else "", text)


def _last(ahead: Lookahead, back: int = 1) -> str:
    return ahead.read[-back][0] if len(ahead.read) >= back else ""


# --- names -----------------------------------------------------------------------------------------------

_METHODS = {"_PREDICT": PREDICTORS, "_UNCOND": APPROXIMATIONS}
_PARAMS: Mapping[str, tuple[ir.ParamType, ...]] = {"_ON": ("list",), "_MASK": ("string",), "_IN": ("range", "list")}
"""The parameter types that a clause accepts in place of a literal."""


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
        installed = installed_names() if last == "_PREDICT" else ()
        yield from (Completion(name, "method", "of an installed package") for name in installed)
    elif last in _PARAMS and not ahead.accepts & {"INT", "KIND"}:
        yield from _declared(document, {"param"}, _PARAMS[last])
    elif ahead.accepts <= {"NAME", "RPAR", "_OF"}:
        yield from _labels(document, chunk, ahead)
    elif "KIND" in ahead.accepts:
        yield from _declared(document, {"param"}, ("string", "list"))
    else:
        yield from _labels_of_function(ahead)
        yield from _values(document, _expression_place(chunk, ahead))


def _labels(document: PolicyDocument, chunk: Chunk, ahead: Lookahead) -> Iterator[Completion]:
    """Yields the settings of a `with`, or the arguments of an action, that the statement does not set yet."""
    read = [text for _, text in ahead.read]
    match chunk.word:
        case "use" if "with" in read:
            used = document.used(chunk)
            statements = used.statements if used else ()
            candidates = {param.name: _completion(param) for param in statements if isinstance(param, ir.Param)}
        case "preset" if "with" in read:
            candidates = {completion.text: completion for completion in _declared(document, {"param"})}
        case "expect" if "with" in read:
            settable = (*_declared(document, {"param", "signal", "external"}), *_explained(("t", "sigma"), "clock"))
            candidates = {completion.text: completion for completion in settable}
        case "match" if "->" in read:
            methods = {*PREDICTORS, *APPROXIMATIONS, *installed_names()}
            labels = _labels_of_method(next((text for text in reversed(read) if text in methods), ""))
            candidates = {name: Completion(name, "label", f"{name}: {label.type}") for name, label in labels.items()}
        case _:
            return
    yield from (completion for name, completion in candidates.items() if name not in read)


def _labels_of_method(name: str) -> Mapping[str, Label]:
    """Returns the arguments of a predictor or approximation. One of a package that cannot be used has none."""
    try:
        return APPROXIMATIONS.get(name) or labels_of(name) or {}
    except PolicyError:
        return {}


def _labels_of_function(ahead: Lookahead) -> Iterator[Completion]:
    """Yields the labels of the innermost function whose first argument stands before the cursor."""
    texts = [text for _, text in ahead.read]
    opened = list[int]()
    for position, text in enumerate(texts):
        if text in ("(", "[", "{"):
            opened.append(position)
        elif text in (")", "]", "}") and opened:
            opened.pop()
    if opened and texts[-1] == "," and opened[-1] > 0:
        signature = FUNCTIONS.get(texts[opened[-1] - 1])
        for name, label in signature.labels.items() if signature else ():
            yield Completion(name, "label", f"{name}: {label.type}")


def _values(document: PolicyDocument, context: ExpressionPlace) -> Iterator[Completion]:
    """Yields the names that an expression may read at this place."""
    yield from _declared(document, {kind for kind, sort in SORTS.items() if sort in context.knows})
    if "clock word" not in context.knows:
        return
    yield from _explained(CLOCK, "clock")
    unknown = NORMS | {"wiener"} if "signal" not in context.knows else frozenset[str]()
    unknown |= MEMORIES | {"cross"} if not context.memory else frozenset[str]()
    unknown |= ACCUMULATORS if not context.accumulators else frozenset[str]()
    yield from _explained((function for function in FUNCTIONS if function not in unknown), "function")


def _declared(document: PolicyDocument, kinds: set[str], types: tuple[str, ...] = ()) -> Iterator[Completion]:
    for statement in document.declared.values():
        if statement.kind in kinds and (not types or (isinstance(statement, ir.Param) and statement.type in types)):
            yield _completion(statement)


def _completion(statement: Declaration) -> Completion:
    doc = statement.doc if isinstance(statement, ir.Param) else None
    return Completion(statement.name, "name", format_node(statement)[:120], doc or "")


# --- the place of the cursor -----------------------------------------------------------------------------

_STATEMENTS = {
    "param": scope.LITERAL,
    "let": scope.LET,
    "signal": scope.SIGNAL,
    "use": scope.SETTING,
    "expect": scope.EXPECTED,
    "tuned": scope.LITERAL,
    "preset": scope.LITERAL,
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


def _expression_place(chunk: Chunk, ahead: Lookahead) -> ExpressionPlace:
    """Returns the kind of place that an expression at the cursor has."""
    begun = (_CLAUSES[kind] for kind, _ in reversed(ahead.read) if kind in _CLAUSES)
    return _STATEMENTS.get(chunk.word) or next(begun, scope.POSITION)
