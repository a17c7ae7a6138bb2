"""A Pygments lexer for policies, for Sphinx, terminals and notebooks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from pygments.lexer import RegexLexer, bygroups, include
from pygments.token import (
    Comment,
    Error,
    Keyword,
    Name,
    Number,
    Operator,
    Punctuation,
    String,
    Whitespace,
)

# Pygments is typed in part.
# pyright: reportUnknownVariableType=false
from cachepolicy.language.highlighting import NEXT_STATEMENT, STATES, Colouring, Role

TOKENS: Mapping[Role, Any] = {
    "space": Whitespace,
    "comment": Comment.Single,
    "string": String,
    "unclosed": Error,
    "number": Number,
    "statement": Keyword.Declaration,
    "clause": Keyword,
    "action": Keyword.Pseudo,
    "kind": Keyword.Type,
    "probe": Keyword.Reserved,
    "connective": Operator.Word,
    "constant": Keyword.Constant,
    "type": Keyword.Type,
    "clock": Name.Builtin.Pseudo,
    "function": Name.Builtin,
    "declared": Name.Variable,
    "policy": Name.Namespace,
    "method": Name.Function,
    "branch": Name.Label,
    "letters": Keyword.Constant,
    "name": Name,
    "operator": Operator,
    "punctuation": Punctuation,
}


def _rule(colouring: Colouring) -> tuple[Any, ...]:
    tokens = [TOKENS[role] for role in colouring.roles]
    token_type = bygroups(*tokens) if len(tokens) > 1 else tokens[0]
    if colouring.closes:
        return colouring.expression, token_type, "#pop"
    return (
        (colouring.expression, token_type, colouring.opens) if colouring.opens else (colouring.expression, token_type)
    )


class CachePolicyLexer(RegexLexer):
    """Lexes policies. Text that is not part of the language becomes an error token, and no character is lost."""

    name = "cachepolicy"
    aliases: ClassVar = ["cachepolicy"]
    filenames: ClassVar = ["*.cachepolicy", "*.cp"]
    mimetypes: ClassVar = ["text/x-cachepolicy"]
    flags = re.MULTILINE
    tokens: ClassVar = {
        # Pygments starts in the state of this name.
        "root": [*map(_rule, STATES["policy"])],
        **{
            state: [(NEXT_STATEMENT, bygroups(), "#pop"), *map(_rule, rules), include("root")]
            for state, rules in STATES.items()
            if state != "policy"
        },
    }
