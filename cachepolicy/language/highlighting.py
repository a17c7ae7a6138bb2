"""Syntax highlighting of policies: one table of rules, from which the lexers of Pygments and of editors are built.

The expressions have the same meaning in Python's `re` and in the engines of editors. No expression matches across the
end of a line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from cachepolicy.language.vocabulary import (
    ACTION_WORDS,
    CLAUSE_WORDS,
    CLOCK,
    FUNCTIONS,
    KINDS,
    LATER_WORDS,
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
"""The role of a piece of text in a policy."""

LexerState = Literal["policy", "bound", "expected", "row"]


@dataclass(frozen=True, slots=True)
class Colouring:
    """A rule of the lexer.

    Attributes:
        expression: The regular expression.
        roles: The role of the match, or the roles of its groups, which cover the whole match.
        opens: The state that starts after the match. It ends with the next statement at the latest.
        closes: Whether the match ends the current state.
    """

    expression: str
    roles: tuple[Role, ...]
    opens: LexerState | None = None
    closes: bool = False


NEXT_STATEMENT = r"^(?=[^ \t\r\n#])"
"""Matches where the next statement starts, at which every state ends."""


def _either(words: Iterable[str]) -> str:
    return "|".join(sorted(words))


_NAME = rf"(?!(?:{_either(RESERVED)})\b)[A-Za-z_][A-Za-z0-9_]*\b"
_GAP = r"[ \t]+"


def _words(words: Iterable[str], role: Role) -> Colouring:
    return Colouring(rf"\b(?:{_either(words)})\b", (role,))


def _phrase(text: str, *, opens: LexerState | None = None, closes: bool = False) -> Colouring:
    """Returns the rule for a fixed phrase, in which `N` stands for a whole number."""
    words = text.split()
    parts = ["[0-9]+" if word == "N" else word for word in words]
    expression = r"\b" + rf"({_GAP})".join(f"({part})" for part in parts) + r"\b"
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
_LATER = (
    Colouring(r"\bwithin(?=[ \t]+[^ \t=:])", ("clause",)),
    Colouring(r"\btokens(?=[ \t]*:)", ("clause",)),
    Colouring(r"^tuned(?=[ \t]+over\b)", ("statement",)),
    Colouring(rf"^(preset)({_GAP})({_NAME})({_GAP})(for)\b", ("statement", "space", "declared", "space", "clause")),
)
_METHODS = (
    Colouring(rf"\b(predict)({_GAP})({_NAME})", ("action", "space", "method")),
    Colouring(rf"\b(approximate)({_GAP})(uncond)({_GAP})({_NAME})", ("action", "space", "clause", "space", "method")),
    Colouring(rf"\b(follow)({_GAP})({_NAME})", ("clause", "space", "branch")),
)
_CONSTANTS = ("off", "inf", "true", "false")
_WORDS = (
    _words((word for word in STATEMENT_WORDS if word not in LATER_WORDS), "statement"),
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
    *_LATER,
    *_DECLARATIONS,
    *_METHODS,
    *(_phrase(phrase, opens=_OPENING.get(phrase)) for phrase in PHRASES if phrase not in _CLOSING),
    *_WORDS,
    Colouring(_NAME, ("name",)),
    *_SIGNS,
)

STATES: Mapping[LexerState, tuple[Colouring, ...]] = {
    "policy": _ANYWHERE,
    # `in all` ends a bound. Elsewhere it is a membership in a parameter called `all`.
    "bound": tuple(_phrase(phrase, closes=True) for phrase in _CLOSING),
    # Only the colon before a row is followed by letters alone. Other colons belong to slices.
    "expected": (Colouring(r":(?=[CR \t]*(?:#[^\n]*)?$)", ("punctuation",), opens="row"),),
    "row": (Colouring(r"\b[CR]+\b", ("letters",)),),
}
"""The rules of each state in the order in which they are tried, before the rules of the state `policy`.

Text that no rule matches is an error.
"""


def coloured(text: str) -> Iterator[tuple[str, Role]]:
    """Yields the text of a policy in pieces with their roles. The pieces make up the text."""
    states: list[LexerState] = ["policy"]
    place = 0
    while place < len(text):
        if len(states) > 1 and _NEXT.match(text, place):
            states = ["policy"]
        own = STATES[states[-1]] if len(states) > 1 else ()
        found = ((rule, re.compile(rule.expression, re.MULTILINE).match(text, place)) for rule in (*own, *_ANYWHERE))
        rule, match = next(((rule, match) for rule, match in found if match and match.end() > place), (None, None))
        if rule is None or match is None:
            yield text[place], "name"
            place += 1
            continue
        pieces = match.groups() if len(rule.roles) > 1 else (match[0],)
        yield from zip(pieces, rule.roles, strict=True)
        place = match.end()
        if rule.closes:
            states.pop()
        elif rule.opens is not None:
            states.append(rule.opens)


_NEXT = re.compile(NEXT_STATEMENT, re.MULTILINE)
