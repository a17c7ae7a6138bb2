"""How a policy is coloured: one table of rules, from which the lexers of editors and documents are made.

The expressions are those that Python's `re` and the engines of editors read alike. None looks across a line end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from cachepolicy.language.vocabulary import (
    ACTION_WORDS,
    CLAUSE_WORDS,
    CLOCK,
    FUNCTIONS,
    KINDS,
    PHRASES,
    PROBES,
    RESERVED,
    STATEMENT_WORDS,
    TYPES,
    VALUE_WORDS,
)

Role = Literal[
    "space", "comment", "string", "unclosed", "number", "statement", "clause", "action", "kind", "probe", "connective",
    "constant", "type", "clock", "function", "declared", "policy", "method", "branch", "letters", "name", "operator",
    "punctuation",
]  # fmt: skip
"""What a stretch of text is in a policy."""

LexerState = Literal["policy", "bound", "expected", "row"]


@dataclass(frozen=True, slots=True)
class Colouring:
    """What an expression matches: its role, or the roles of its groups, which then cover the whole match.

    `opens` is the state that begins behind the match; it ends with `closes`, or where the next statement starts.
    """

    expression: str
    roles: tuple[Role, ...]
    opens: LexerState | None = None
    closes: bool = False


NEXT_STATEMENT = r"^(?=[^ \t\r\n#])"
"""Where every state is back at the beginning."""


def _either(words: Iterable[str]) -> str:
    return "|".join(sorted(words))


_NAME = rf"(?!(?:{_either(RESERVED)})\b)[A-Za-z_][A-Za-z0-9_]*\b"
_GAP = r"[ \t]+"


def _words(words: Iterable[str], role: Role) -> Colouring:
    return Colouring(rf"\b(?:{_either(words)})\b", (role,))


def _phrase(text: str, *, opens: LexerState | None = None, closes: bool = False) -> Colouring:
    """A fixed phrase, `N` in it a whole number."""
    words = text.split()
    parts = ["[0-9]+" if word == "N" else word for word in words]
    expression = r"\b" + rf"({_GAP})".join(f"({each})" for each in parts) + r"\b"
    roles: list[Role] = []
    for word in words:
        roles.extend(("space", _PHRASED.get(word, "clause")))
    return Colouring(expression, tuple(roles[1:]), opens, closes)


_PHRASED: Mapping[str, Role] = {"N": "number", "approximate": "action", "reuse": "action"}
_OPENING: Mapping[str, LexerState] = {"at most": "bound", "over N steps": "expected"}
_CLOSING = ("in a row", "in all")

_DECLARATIONS = (
    Colouring(
        rf"\b(param|external)({_GAP})({_NAME})([ \t]*)(:)([ \t]*)({_either(TYPES)})\b",
        ("statement", "space", "declared", "space", "punctuation", "space", "type"),
    ),
    Colouring(rf"\b(param|let|table|signal|external)({_GAP})({_NAME})", ("statement", "space", "declared")),
    Colouring(rf"\b(policy|use)({_GAP})({_NAME})", ("statement", "space", "policy")),
)
_METHODS = (
    Colouring(rf"\b(predict)({_GAP})({_NAME})", ("action", "space", "method")),
    Colouring(rf"\b(approximate)({_GAP})(uncond)({_GAP})({_NAME})", ("action", "space", "clause", "space", "method")),
    Colouring(rf"\b(follow)({_GAP})({_NAME})", ("clause", "space", "branch")),
)
_CONSTANTS = ("off", "inf", "true", "false")
_WORDS = (
    _words(STATEMENT_WORDS, "statement"),
    _words((*CLAUSE_WORDS, "each", "of", "class", "optional"), "clause"),
    _words(ACTION_WORDS, "action"),
    _words((*KINDS, "blocks"), "kind"),
    _words(PROBES, "probe"),
    _words(_CONSTANTS, "constant"),
    _words(set(VALUE_WORDS) - set(_CONSTANTS), "connective"),
    _words(CLOCK, "clock"),
    _words(FUNCTIONS, "function"),
)
_LITERALS = (
    Colouring(r"""\"(?:[^"\n]|"")*\"|'(?:[^'\n]|'')*'""", ("string",)),
    Colouring(r"""["'][^\n]*""", ("unclosed",)),
    Colouring(r"\b[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?\b(?!\.)", ("number",)),
)
_SIGNS = (
    Colouring(r"->|<=|>=|==|!=|[-<>+*/%=?]", ("operator",)),
    Colouring(r"[()\[\]{},:]", ("punctuation",)),
)
_ANYWHERE = (
    Colouring(r"[ \t\r\n\ufeff]+", ("space",)),
    Colouring(r"#[^\n]*", ("comment",)),
    *_LITERALS,
    *_DECLARATIONS,
    *_METHODS,
    *(_phrase(each, opens=_OPENING.get(each)) for each in PHRASES if each not in _CLOSING),
    *_WORDS,
    Colouring(_NAME, ("name",)),
    *_SIGNS,
)

STATES: Mapping[LexerState, tuple[Colouring, ...]] = {
    "policy": _ANYWHERE,
    # `in all` ends a bound, and asks about a parameter `all` elsewhere.
    "bound": tuple(_phrase(each, closes=True) for each in _CLOSING),
    # A row is alone on its line; other colons are those of slices.
    "expected": (Colouring(r":(?=[CR \t]*(?:#[^\n]*)?$)", ("punctuation",), opens="row"),),
    "row": (Colouring(r"\b[CR]+\b", ("letters",)),),
}
"""The rules of each state, behind which those of `policy` are tried; the first that matches at a place decides.

What none matches is wrong there.
"""
