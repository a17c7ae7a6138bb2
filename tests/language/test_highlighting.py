"""Colours: the lexers of documents and of editors see in a text what the parser sees."""

from __future__ import annotations

import json
import re
import tomllib
from importlib import import_module
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pygments.token import Error, Keyword, Name, Number, Operator, Punctuation, String, Whitespace

from cachepolicy._resources import shipped, shipped_policies
from cachepolicy.language import parser
from cachepolicy.language.formatter import format
from cachepolicy.language.pygments_lexer import TOKENS, CachePolicyLexer
from cachepolicy.language.source import prepare_source
from cachepolicy.language.vocabulary import LATER_WORDS, PHRASES, RESERVED, TYPES
from editors import textmate
from tests.support import examples, ir_strategies
from tests.test_docs import ROOT, fences

SHIPPED = {name: policy.read_text("utf-8") for name, policy in shipped_policies().items()}
EXAMPLES = {name: examples.text(name) for name in examples.NAMES}
REFERENCE = {
    f"language.md:{each.line}": each.text
    for each in fences(ROOT / "docs" / "language.md")
    if each.language == "cachepolicy"
}
TEXTS = SHIPPED | EXAMPLES | REFERENCE
WORDS = (Keyword, Operator.Word)
EXPECTED: dict[str, tuple[Any, ...]] = {
    "NAME": (Name,),
    "STRING": (String,),
    "INT": (Number,),
    "FLOAT": (Number,),
    "COMPARE": (Operator,),
    "_ARROW": (Operator,),
    "LETTERS": (Keyword.Constant,),
}
"""What the lexer makes of a terminal of the grammar; signs are signs, and all others are words."""

pieces = st.sampled_from(
    [
        *sorted(RESERVED),
        *PHRASES,
        "t",
        "a",
        "C",
        "R",
        " ",
        "\n",
        "\n  ",
        "\r\n",
        '"',
        "'",
        "#",
        ":",
        "1",
        "é",
        "\U0001f600",
    ]
)
texts = st.text() | st.lists(pieces).map("".join) | st.lists(pieces).map(" ".join)


def lexed(text: str) -> list[tuple[int, Any, str]]:
    return list(CachePolicyLexer().get_tokens_unprocessed(text))


def parsed(text: str) -> list[Any]:
    """The tokens that the parser reads in a sound text."""
    clean = prepare_source(text, "<text>")[0].clean
    return parser._parser().parse_interactive(clean, start="start").exhaust_lexer()


def assert_seen_alike(text: str) -> None:
    found = {start: (token, word) for start, token, word in lexed(text)}
    for each in parsed(text):
        if each.type == "_END":
            continue
        token, word = found[each.start_pos]
        signs = (Operator, Punctuation) if not each[0].isalnum() else WORDS
        assert str(each) == word
        assert any(token in wanted for wanted in EXPECTED.get(each.type, signs)), (each.type, word, token)


# --- the lexer


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_lexer_sees_what_the_parser_sees(text: str) -> None:
    """In every policy that is shipped or shown, words are keywords, names are names, and nothing is wrong."""
    assert_seen_alike(text)
    assert [] == [word for _, token, word in lexed(text) if token is Error]


@given(ir_strategies.policies())
def test_the_lexer_sees_what_the_parser_sees_of_any_policy(policy) -> None:
    """In any sensible policy, words of the language are keywords and names are names."""
    assert_seen_alike(format(policy))


@given(ir_strategies.shapes())
def test_nothing_is_wrong_in_a_text_that_parses(policy) -> None:
    """No part of a text that parses is an error for the lexer, whatever the names in it."""
    assert [] == [word for _, token, word in lexed(format(policy)) if token is Error]


def test_every_keyword_of_the_grammar_is_a_keyword() -> None:
    """Every word of the grammar is a keyword for the lexer: the reserved ones anywhere, others in their place."""
    grammar = shipped("grammars").joinpath("cachepolicy.lark").read_text("utf-8")
    terminals = re.findall(r"^_?[A-Z]+: /(?:\(\?:)?([a-z_|]+)\)?\\b/", grammar, re.MULTILINE)
    words = {word for terminal in terminals for word in terminal.split("|")}
    phrased = {word for phrase in PHRASES for word in phrase.split()}
    assert words <= RESERVED | LATER_WORDS | phrased | set(TYPES)
    lines = [
        *sorted(RESERVED),
        "param x: " + " = 1\nparam x: ".join(TYPES),
        *(each.replace("N", "8") for each in PHRASES),
        "tuned over 8 steps",
        "match a within b",
        'preset a for class "b" with c = 1',
    ]
    # `in a row` and `in all` are phrases behind `at most`.
    found = {
        word
        for _, token, word in lexed("\n".join([*lines, "  at most 1 in a row", "  at most 1 in all"]))
        if any(token in each for each in WORDS)
    }
    assert set() == words - found


@given(texts)
@example("at most 2\nmatch")
@example("expect block over 3 steps: C\n  R # \"\nuse '")
def test_no_character_is_lost(text: str) -> None:
    """The lexer gives back every character of any text, in order."""
    assert text == "".join(word for _, _, word in lexed(text))


@pytest.mark.parametrize(
    ("text", "word", "token"),
    [
        ("match block when t in all -> reuse", "all", Name),
        ("match block at most 3 in all -> reuse", "all", Keyword),
        ("match block at most 3 # no end\nmatch block when t in all -> reuse", "all", Name),
        ("match block every end -> reuse", "end", Name),
        ("match block every 3 from end -> reuse", "end", Keyword),
        ("expect block over 2 steps: C R", "R", Keyword.Constant),
        ("expect blocks[:R] over 2 steps with R = 1: C C", "R", Name),
        ("expect block over 2 steps:\n  C # later\n  R", "R", Keyword.Constant),
        ("expect block over 1 steps: C\nparam R: int = 1", "R", Name.Variable),
        ("param list: list = [1]", "list", Name.Variable),
        ("match block every2 -> reuse", "every2", Name),
    ],
)
def test_words_of_phrases_are_names_elsewhere(text: str, word: str, token: Any) -> None:
    """A word of a fixed phrase is a keyword in it alone."""
    assert token is next(found for _, found, each in lexed(text) if each == word)


def test_pygments_finds_the_lexer() -> None:
    """The package declares the lexer where Pygments looks for one, under the name that the documents' fences have."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]["pygments.lexers"]
    module, _, name = declared["cachepolicy"].partition(":")
    assert CachePolicyLexer is getattr(import_module(module), name)
    assert "cachepolicy" in CachePolicyLexer.aliases


# --- the grammar of editors


def test_the_grammar_is_up_to_date() -> None:
    """The grammar in the extension's folder is what `python -m editors.textmate` writes."""
    assert textmate.text() == textmate.GRAMMAR.read_text("utf-8")


class Tokenizer:
    """What an editor does with a TextMate grammar, as far as ours goes: a scope for every character, line by line."""

    def __init__(self, grammar: dict[str, Any]) -> None:
        self.grammar = grammar

    def scopes(self, text: str) -> list[str | None]:
        opened = list[dict[str, Any]]()
        found = list[str | None]()
        for line in text.split("\n"):
            found += [*self._line(line, opened), None]
        return found[:-1]

    def _line(self, line: str, opened: list[dict[str, Any]]) -> list[str | None]:
        scopes, place = [None] * len(line), 0
        while place <= len(line):
            rule, match = self._next(line, place, opened)
            if rule is None:
                break
            ending = opened and rule is opened[-1]
            names = rule["endCaptures" if ending else "beginCaptures" if "begin" in rule else "captures"]
            for group, each in names.items():
                start, end = match.span(int(group))
                scopes[start:end] = [each["name"]] * (end - start)
            if ending:
                opened.pop()
            elif "begin" in rule:
                opened.append(rule)
            place = match.end() if match.end() > place or ending else place + 1
        return scopes

    def _next(self, line: str, place: int, opened: list[dict[str, Any]]) -> tuple[Any, Any]:
        """The rule that matches first, and its match; the end of what is open comes before what may stand inside."""
        rules = [opened[-1], *self._rules(opened[-1])] if opened else self._rules(self.grammar)
        best = None, None
        for rule in rules:
            expression = rule["end"] if opened and rule is opened[-1] else rule.get("begin") or rule["match"]
            match = re.compile(expression).search(line, place)
            if match and (best[1] is None or match.start() < best[1].start()):
                best = rule, match
        return best

    def _rules(self, outer: dict[str, Any]) -> list[dict[str, Any]]:
        found = list[dict[str, Any]]()
        for each in outer["patterns"]:
            included = self.grammar["repository"][each["include"][1:]] if "include" in each else None
            found += self._rules(included) if included else [each]
        return found


def assert_coloured_alike(text: str) -> None:
    """Editors give every character the scope that belongs to the lexer's token."""
    scopes = Tokenizer(json.loads(textmate.text())).scopes(text)
    roles = {token: role for role, token in reversed(TOKENS.items())}
    for start, token, word in lexed(text):
        if token in (Whitespace, Error, Keyword.Type, Keyword.Constant):
            continue  # several roles have one token, or a role has no scope
        scope = textmate.SCOPES[roles[token]]
        wanted = f"{scope}.cachepolicy" if scope else None
        assert [wanted] * len(word) == scopes[start : start + len(word)], word


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_editors_colour_what_the_lexer_colours(text: str) -> None:
    """Every policy that is shipped or shown has in an editor the colours that it has in the documents."""
    assert_coloured_alike(text)


@given(ir_strategies.shapes())
def test_editors_colour_what_the_lexer_colours_of_any_text(policy) -> None:
    """Any text that parses has in an editor the colours that it has in the documents."""
    assert_coloured_alike(format(policy))


def test_every_scope_is_known_to_themes() -> None:
    """The scopes begin with TextMate's names, which the themes of editors colour, and every role has one."""
    roots = {
        "comment",
        "constant",
        "entity",
        "invalid",
        "keyword",
        "punctuation",
        "storage",
        "string",
        "support",
        "variable",
    }
    assert roots >= {scope.partition(".")[0] for scope in textmate.SCOPES.values() if scope}
    assert TOKENS.keys() == textmate.SCOPES.keys()


def test_the_extension_is_whole() -> None:
    """The extension names files that it has, the version of the package, and the suffixes of policies."""
    folder = textmate.GRAMMAR.parents[1]
    manifest = json.loads((folder / "package.json").read_text("utf-8"))
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    (language,), (grammar,) = manifest["contributes"]["languages"], manifest["contributes"]["grammars"]
    named = [manifest["main"], language["configuration"], grammar["path"], "README.md", "LICENSE"]
    assert [] == [each for each in named if not (folder / each).is_file()]
    assert version == manifest["version"]
    assert [f".{each}" for each in json.loads(textmate.text())["fileTypes"]] == language["extensions"]
    assert textmate.SCOPE == grammar["scopeName"]
    assert (ROOT / "LICENSE").read_text("utf-8") == (folder / "LICENSE").read_text("utf-8")
    json.loads((folder / language["configuration"]).read_text("utf-8"))
