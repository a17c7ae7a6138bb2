"""Builds diagnostics for statements with syntax errors."""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from cachepolicy.errors import Diagnostic, nearest
from cachepolicy.language.scope import SYNONYMS
from cachepolicy.language.source import Chunk, Source
from cachepolicy.language.vocabulary import (
    ACTION_WORDS,
    APPROXIMATIONS,
    KINDS,
    PREDICTORS,
    RESERVED,
    STATEMENT_WORDS,
    TYPES,
)

USAGE = {
    "cachepolicy": "`cachepolicy 1`",
    "policy": '`policy NAME "title"`',
    "source": '`source "paper or repository"`',
    "param": '`param NAME: TYPE = DEFAULT in DOMAIN "doc"`',
    "let": "`let NAME = EXPRESSION`",
    "table": "`table NAME = [1.0, 0.98, ...]`",
    "signal": "`signal NAME = EXPRESSION`",
    "external": "`external NAME: float`",
    "use": "`use POLICY with NAME = VALUE, ... when G at most N in a row`",
    "preset": '`preset NAME for class "regex" when G with NAME = VALUE, ... source "..."`',
    "expect": "`expect SELECTOR over N steps with NAME = VALUE: C C R R`",
}
RULE = "`match SELECTOR when G every N while C at most N in a row -> ACTION follow BRANCH`"


@dataclass(frozen=True, slots=True)
class Stop:
    """The position at which the parser failed.

    Attributes:
        offset: Offset in the text.
        accepts: Names of the terminals that the parser accepts there.
        words: Maps the names of keyword terminals to their keywords.
        signs: Maps the names of terminals such as `COLON` to their signs.
    """

    offset: int
    accepts: frozenset[str]
    words: Mapping[str, str]
    signs: Mapping[str, str]


def unknown_statement(source: Source, chunk: Chunk) -> Diagnostic:
    """Returns the diagnostic for a line in column 1 that does not start with the keyword of a statement."""
    word = chunk.word
    near = nearest(word[:60].lower(), STATEMENT_WORDS)
    help = f"did you mean `{near}`?" if near else "one of " + ", ".join(f"`{word}`" for word in STATEMENT_WORDS)
    if source.clean.startswith(("//", "--", "/*"), chunk.start):
        help = "a comment starts with `#`"
    message = f"`{word}` does not start a statement"
    return source.finding("E007", message, chunk.start, chunk.start + len(word), help=help)


def syntax_error(source: Source, chunk: Chunk, stop: Stop) -> Diagnostic:
    """Returns the diagnostic for a statement that does not parse."""
    if stop.offset >= chunk.end:
        return _cut_short(source, chunk, stop)
    lexeme = _found(source, chunk, stop.offset)
    start, end = stop.offset, stop.offset + len(lexeme)
    if lexeme[0] in "\"'" and _unclosed(lexeme):
        message = f"the string is not closed: a closing `{lexeme[0]}` is missing on this line"
        return source.finding("E003", message, start, end)
    moved = _out_of_order(source, chunk, stop, lexeme)
    if moved:
        message, help = moved
        return source.finding("E020", message, start, end, help=help)
    if lexeme in RESERVED and "NAME" in stop.accepts and stop.accepts <= _NAME_ONLY:
        message = f"`{lexeme}` is a reserved word and cannot be a name"
        return source.finding("E008", message, start, end, help=f"call it `{lexeme}_` or something else")
    expected = expectation(stop)
    hint = _hint(source, chunk, stop, lexeme) or _usage(chunk)
    if not re.match(_LEXABLE, lexeme):
        return source.finding("E002", f"`{lexeme}` has no meaning here: expected {expected}", start, end, help=hint)
    return source.finding("E001", f"expected {expected}, found `{lexeme}`", start, end, help=hint)


_NAME_ONLY = frozenset({"NAME", "STRING", "RPAR"})
_LEXABLE = r"[A-Za-z_][A-Za-z0-9_]*$|[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?$|[\"'()\[\]{},:?+*/%-]|->|[<>=!]=|<|>|="
_WORD = re.compile(
    r"""[A-Za-z_][A-Za-z0-9_]*|[0-9.][A-Za-z0-9_.]*|"(?:[^"\n]|"")*"?|'(?:[^'\n]|'')*'?|[-=]+>|[<>=!]=|&&|\|\||\*\*|//|\S"""
)


def _found(source: Source, chunk: Chunk, offset: int) -> str:
    matched = _WORD.match(source.clean, offset, chunk.end)
    text = matched[0] if matched else source.clean[offset : offset + 1]
    return text if len(text) <= 60 else text[:60]


def _unclosed(lexeme: str) -> bool:
    return lexeme.count(lexeme[0]) % 2 == 1


def _cut_short(source: Source, chunk: Chunk, stop: Stop) -> Diagnostic:
    opening = _open_bracket(source, chunk)
    if opening is not None:
        message = f"`{source.clean[opening]}` is never closed"
        help = "a statement ends before the next line that starts in column 1; indent the lines that continue it"
        return source.finding("E005", message, opening, opening + 1, help=help)
    message = f"the statement ends too early: expected {expectation(stop)}"
    help = _ending_hint(source, chunk, stop) or _usage(chunk)
    return source.finding("E004", message, chunk.end, chunk.end + 1, help=help)


def _ending_hint(source: Source, chunk: Chunk, stop: Stop) -> str | None:
    following = source.clean[chunk.end :].lstrip()
    if re.match(r"(when|every|on|mask|while|at)\b|->", following):
        return "indent the lines that continue a statement"
    unfinished = _unfinished(source.clean[chunk.start : chunk.end], stop, "$")
    if unfinished is not None:
        return unfinished
    if "_ARROW" in stop.accepts:
        return "a rule ends with an action: `-> reuse`"
    return None


def _open_bracket(source: Source, chunk: Chunk) -> int | None:
    opened = list[int]()
    for bracket in re.finditer(r"""#[^\n]*|"(?:[^"\n]|"")*"|'(?:[^'\n]|'')*'|[()\[\]{}]""", source.clean[: chunk.end]):
        if bracket.start() < chunk.start:
            continue
        if bracket[0] in "([{":
            opened.append(bracket.start())
        elif bracket[0] in ")]}" and opened:
            opened.pop()
    return opened[-1] if opened else None


# --- clauses in another order ----------------------------------------------------------------------------

_ORDER = {"when": 0, "every": 1, "on": 1, "mask": 1, "while": 2, "at": 3}


def _out_of_order(source: Source, chunk: Chunk, stop: Stop, lexeme: str) -> tuple[str, str] | None:
    if chunk.word != "match" or lexeme not in _ORDER:
        return None
    earlier = re.sub(r""""[^"\n]*"|'[^'\n]*'|#[^\n]*""", "", source.clean[chunk.start : stop.offset])
    if "->" in earlier and "_FOLLOW" in stop.accepts:
        return f"`{lexeme}` stands before `->`", f"the order is {RULE}"
    if "_ARROW" not in stop.accepts:
        return None
    clauses = [word for word in re.findall(r"[a-z_]+", earlier) if word in _ORDER]
    same = [word for word in clauses if _ORDER[word] == _ORDER[lexeme]]
    if same == [lexeme]:
        return f"a rule has one `{lexeme}`", "join the conditions with `and`" if lexeme != "every" else f"it is {RULE}"
    if same:
        return f"a rule has one schedule: `{same[0]}` and `{lexeme}` cannot stand together", "write two rules"
    later = [word for word in clauses if _ORDER[word] > _ORDER[lexeme]]
    return (f"`{lexeme}` stands before `{later[0]}`", f"the order is {RULE}") if later else None


# --- expected terminals ----------------------------------------------------------------------------------

_ENGLISH = {
    "NAME": "a name",
    "STRING": "a string",
    "INT": "a whole number",
    "FLOAT": "a number",
    "KIND": "a kind such as `attention`",
    "TYPE": "a type (" + ", ".join(f"`{name}`" for name in TYPES) + ")",
    "LETTERS": "the letters `C` and `R`",
    "PROBE": "a probe",
    "COMPARE": "a comparison",
    "_TOKENS": "`tokens:`",
    "MINUS": "`-`",
    "$END": "the end of the statement",
    "_END": "the end of the statement",
}
_VALUES = frozenset({"INT", "FLOAT", "NAME", "STRING", "INF", "TRUE", "FALSE", "OFF", "PROBE", "MINUS", "LPAR", "LSQB"})
_SELECTORS = frozenset({"STRING", "NAME", "KIND", "_CLASS", "EACH", "_BLOCKS", "_NOT", "LPAR"})
_OPERATORS = frozenset({"PLUS", "MINUS", "STAR", "SLASH", "PERCENT", "COMPARE", "_IF", "_AND", "_OR", "_IN"})


def expectation(stop: Stop) -> str:
    """Describes in English what the parser accepts."""
    left = set(stop.accepts)
    expected = list[str]()
    for members, name in _GROUPED:
        if left >= members:
            expected.append(name)
            left -= members
    if left >= _SELECTORS:
        expected.append("a selector")
        left -= _SELECTORS
    if left >= _VALUES:
        expected.append("a value")
        left -= _VALUES | {"_NOT"}
    elif left - _OPERATORS - {"LPAR", "LSQB"}:
        left -= _OPERATORS | {"LPAR", "LSQB"} if len(left) > 4 else set[str]()
    shown = {**stop.signs, **stop.words}
    ordered = sorted(left, key=lambda terminal: (_POSITION.get(terminal, 50), terminal))
    expected += [_ENGLISH.get(terminal) or f"`{shown.get(terminal, terminal)}`" for terminal in ordered]
    expected = list(dict.fromkeys(expected))
    return expected[0] if len(expected) == 1 else ", ".join(expected[:-1]) + f" or {expected[-1]}"


_GROUPED = (
    (
        frozenset({"_COMPUTE", "_SKIP", "_REUSE", "_PREDICT", "_APPROXIMATE"}),
        "an action (`compute`, `skip`, `reuse`, `predict` or `approximate`)",
    ),
    (frozenset({"LPAR", "LSQB", "LBRACE"}), "an interval, a set"),
)
_POSITION = {"_WHEN": 60, "_EVERY": 61, "_ON": 62, "_MASK": 63, "_WHILE": 64, "_AT": 65, "_ARROW": 66, "$END": 90}


# --- suggestions -----------------------------------------------------------------------------------------

_AFTER = {
    "each": "`each` stands before `blocks`",
    "on": "steps stand in braces: `on {0, 1, 2}`",
    "mask": 'a mask is a string: `mask "1101"`',
    "class": 'a class is named by a regex in quotes: `class "Attention$"`',
    "in": "after `in` stands an interval `(100, 800)`, a set `{0, 5}` or a parameter",
}
_WORDS = {
    "not": "to negate `in`, write `not t in (100, 800)`",
    "is": "write `==`",
    "then": "write `a if condition else b`",
    "elif": "write `a if x else b if y else c`",
}
_SIGNS = {
    "=": "`==` compares; `=` only gives a value",
    "===": "write `==`",
    "&&": "write `and`",
    "&": "write `and`",
    "||": "write `or`",
    "|": "write `or`",
    "!": "write `not`",
    "**": "there is no power: multiply, or use `exp` and `log`",
    "^": "there is no power: multiply, or use `exp` and `log`",
    "//": "a comment starts with `#`; `/` divides",
    "=>": "write `->`",
    "-->": "write `->`",
    "==>": "write `->`",
    ";": "a statement ends with its line",
    ".": "there are no attributes in the language",
    "“": 'write plain quotes: `"`',
    "”": 'write plain quotes: `"`',
    "‘": "write plain quotes: `'`",
    "’": "write plain quotes: `'`",
    "`": 'write plain quotes: `"`',
    "×": "write `*`",
    "≤": "write `<=`",
    "≥": "write `>=`",
    "≠": "write `!=`",
    "∞": "write `inf`",
    "→": "write `->`",
    "−": "write `-`",
}


def _usage(chunk: Chunk) -> str | None:
    if chunk.word == "match":
        return f"a rule reads {RULE}"
    return f"write {USAGE[chunk.word]}" if chunk.word in USAGE else None


def _hint(source: Source, chunk: Chunk, stop: Stop, lexeme: str) -> str | None:
    pattern = _unquoted_regex(source, chunk, stop)
    if pattern is not None:
        return f'a regex stands in quotes: `"{pattern}"`'
    unfinished = _unfinished(source.clean[chunk.start : stop.offset], stop, lexeme)
    if unfinished is not None:
        return unfinished
    preceding = source.clean[chunk.start : stop.offset].split()[-1:]
    special = _AFTER.get("".join(preceding)) or _WORDS.get(lexeme)
    if special and lexeme not in _SIGNS:
        return special
    words = {stop.words[terminal] for terminal in stop.accepts if terminal in stop.words}
    if "KIND" in stop.accepts:
        words |= set(KINDS)
    if "TYPE" in stop.accepts:
        words |= set(TYPES)
    if lexeme in _SIGNS and (lexeme != "=" or "COMPARE" in stop.accepts):
        return _SIGNS[lexeme]
    if re.fullmatch(r"[A-Za-z_]\w*", lexeme):
        return _word_hint(stop, lexeme, words)
    if re.fullmatch(r"\.[0-9]+|[0-9]+\.", lexeme):
        return f"write `{'0' + lexeme if lexeme[0] == '.' else lexeme + '0'}`"
    if lexeme[0].isalnum() and not lexeme.isascii():
        return "names are written in ASCII letters, digits and `_`"
    if lexeme[0].isdigit():
        return "a name cannot start with a digit, and a number ends before a letter"
    return None


def _unfinished(before: str, stop: Stop, lexeme: str) -> str | None:
    """Returns the hint for a percentage, a bound without its end, or an action's argument without its name.

    Args:
        before: The text of the statement before the error.
        stop: The position of the error.
        lexeme: The word or sign at the error.
    """
    percentage = re.search(r"(?<![A-Za-z0-9_.])([0-9.]+)\s*%\s*$", before)
    if percentage is not None and re.fullmatch(r"[0-9]*\.?[0-9]+", percentage[1]):
        return f"`%` is the remainder of a division; write `{float(percentage[1]) / 100:g}`"
    bound = re.search(r"\bat\s+most\s+([A-Za-z0-9_]+)\s*$", before)
    if bound is not None and "_IN" in stop.accepts:
        return f"write `at most {bound[1]} in a row` or `at most {bound[1]} in all`"
    method = re.search(r"\b(?:predict|uncond)\s+([a-z_]+)\s*\(\s*$", before)
    labels = {**PREDICTORS, **APPROXIMATIONS}.get(method[1]) if method is not None else None
    required = [name for name, label in (labels or {}).items() if label.required]
    if method is not None and required:
        first, *others = required
        value = lexeme if lexeme[0].isdigit() else "..."
        arguments = ", ".join([f"{first}: {value}", *(f"{name}: ..." for name in others)])
        return f"arguments have names: `{method[1]}({arguments})`"
    used = re.search(r"\b([a-z_]+)\s*$", before)
    if lexeme == "[" and used is not None and SYNONYMS.get(used[1]) == "blocks":
        return "did you mean `blocks`?"
    return None


def _unquoted_regex(source: Source, chunk: Chunk, stop: Stop) -> str | None:
    """Returns the regular expression without quotes at the error, if the error is in the selector of a rule."""
    start, end = stop.offset, stop.offset
    while start > chunk.start and source.clean[start - 1] in _REGEX_LETTERS:
        start -= 1
    while end < chunk.end and source.clean[end] in _REGEX_LETTERS and not source.clean.startswith("->", end):
        end += 1
    before, pattern = source.clean[chunk.start : start], source.clean[start:end]
    selector = r"(?:match(?:\s+optional)?|expect)\s+(?:[a-z_\s()]|\"[^\"]*\")*$"
    clauses = {*_ORDER, "over", "with", "most"}
    in_selector = re.match(selector, before) and not clauses & set(re.findall(r"[a-z_]+", before))
    return pattern if in_selector and re.search(r"[A-Za-z_]", pattern) and re.search(r"[.^$*\\|+?]", pattern) else None


_REGEX_LETTERS = frozenset(string.ascii_letters + string.digits + "_.^$*\\|+?-")


def _word_hint(stop: Stop, lexeme: str, words: Collection[str]) -> str | None:
    near = nearest(lexeme.lower(), words)
    if near:
        return f"did you mean `{near}`?"
    if "_ARROW" in stop.accepts and lexeme in ACTION_WORDS:
        return f"write `-> {lexeme}`"
    if lexeme in RESERVED and "NAME" in stop.accepts:
        return f"`{lexeme}` is a reserved word and cannot be a name"
    if "LETTERS" in stop.accepts or re.fullmatch(r"[A-Z]+", lexeme):
        return "one letter per step: `C` computes, `R` reuses"
    return None
