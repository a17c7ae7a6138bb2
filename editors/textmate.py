"""Builds the TextMate grammar from the table of the Pygments lexer.

`python -m editors.textmate` writes it to `editors/vscode/syntaxes`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from cachepolicy.language.highlighting import NEXT_STATEMENT, STATES, Colouring, LexerState, Role

GRAMMAR = Path(__file__).parent / "vscode" / "syntaxes" / "cachepolicy.tmLanguage.json"
SCOPE = "source.cachepolicy"
SCOPES: Mapping[Role, str | None] = {
    "space": None,
    "comment": "comment.line.number-sign",
    "string": "string.quoted",
    "unclosed": "invalid.illegal",
    "number": "constant.numeric",
    "statement": "keyword.control",
    "clause": "keyword.other",
    "action": "support.function.action",
    "kind": "support.class",
    "probe": "support.function.probe",
    "connective": "keyword.operator.word",
    "constant": "constant.language",
    "type": "storage.type",
    "clock": "variable.language",
    "function": "support.function",
    "declared": "variable.other.constant",
    "policy": "entity.name.namespace",
    "method": "entity.name.function",
    "branch": "entity.name.label",
    "letters": "constant.character",
    "name": "variable.other",
    "operator": "keyword.operator",
    "punctuation": "punctuation",
}


def grammar() -> dict[str, Any]:
    """Returns the grammar, in the JSON form of TextMate's property lists."""
    return {
        "name": "cachepolicy",
        "scopeName": SCOPE,
        "fileTypes": ["cp", "cachepolicy"],
        "patterns": [{"include": "#policy"}],
        "repository": {state: {"patterns": list(_patterns(rules))} for state, rules in STATES.items()},
    }


def _patterns(rules: Iterable[Colouring]) -> Iterator[dict[str, Any]]:
    for rule in rules:
        if rule.opens:
            yield {
                "begin": rule.expression,
                "beginCaptures": _captures([rule]),
                **_end(rule.opens),
                "patterns": [{"include": f"#{rule.opens}"}, {"include": "#policy"}],
            }
        elif rule.roles != ("space",) and not rule.closes:
            yield {"match": rule.expression, "captures": _captures([rule])}


def _end(state: LexerState) -> dict[str, Any]:
    closing = [rule for rule in STATES[state] if rule.closes]
    return {
        "end": "|".join([*(rule.expression for rule in closing), NEXT_STATEMENT]),
        "endCaptures": _captures(closing),
    }


def _captures(rules: Sequence[Colouring]) -> dict[str, Any]:
    """Returns the scopes of the groups of all rules, numbered from 1. A single rule with one role has no groups."""
    if len(rules) == 1 and len(rules[0].roles) == 1:
        return {"0": {"name": _scope(rules[0].roles[0])}}
    roles: list[Role] = [*chain.from_iterable(rule.roles for rule in rules)]
    return {str(number): {"name": _scope(role)} for number, role in enumerate(roles, 1) if SCOPES[role]}


def _scope(role: Role) -> str:
    return f"{SCOPES[role]}.cachepolicy"


def text() -> str:
    """Returns the text of the grammar's file."""
    return json.dumps(grammar(), indent=2) + "\n"


if __name__ == "__main__":
    GRAMMAR.write_text(text(), "utf-8")
