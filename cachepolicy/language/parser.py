"""Parses policy texts into `ir.Policy`. This is the only module that imports lark."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lark

from cachepolicy._resources import shipped
from cachepolicy.errors import Diagnostic, PolicyError
from cachepolicy.language import _syntax_errors as syntax_errors
from cachepolicy.language import ir
from cachepolicy.language.lowering import Lowering, depth, is_tree
from cachepolicy.language.semantics import check_names, judge
from cachepolicy.language.source import Chunk, Source, prepare_source
from cachepolicy.language.vocabulary import DEPTH_LIMIT, HEADER_WORDS, STATEMENT_WORDS

__all__ = ["Lookahead", "check_names", "look_ahead", "parse", "parse_selector", "parse_value", "recover"]


def parse(text: str | bytes, *, source: str = "<text>") -> ir.Policy:
    """Parses a policy text.

    Args:
        text: The text; bytes are decoded as UTF-8.
        source: Name of the text in diagnostics.

    Returns:
        The policy.

    Raises:
        PolicyError: The text has errors. The exception holds all of them, in source order.
    """
    policy, findings = recover(text, source=source)
    if any(finding.severity == "error" for finding in findings):
        raise PolicyError(findings)
    return policy


def recover(text: str | bytes, *, source: str = "<text>") -> tuple[ir.Policy, tuple[Diagnostic, ...]]:
    """Parses a policy text and recovers from errors. This function does not raise.

    A rule that does not parse keeps its selector if the selector parses, and its action becomes `compute`.

    Args:
        text: The text; bytes are decoded as UTF-8.
        source: Name of the text in diagnostics.

    Returns:
        The part of the policy that parses, and all errors and warnings in source order.
    """
    prepared, findings, parsable = prepare_source(text, source)
    reading = _Reading(prepared, list(findings))
    if parsable and not reading.unknown_edition():
        reading.read()
    policy = reading.policy()
    reading.judge(policy)
    return policy, tuple(sorted(reading.findings, key=_place))


def parse_value(text: str) -> ir.Expression:
    """Parses the value of a setting, as in `--set NAME=TEXT`: a number, string, `off`, list or interval.

    Args:
        text: The value. `[a, b]` parses as a list; a caller that needs a range converts a list of two numbers to
            the closed interval.

    Returns:
        The expression.

    Raises:
        PolicyError: `text` is not a value.
    """
    return _parse_part(text, "value")


def parse_selector(text: str) -> ir.Selector:
    """Parses a selector.

    Args:
        text: The selector, without `match`.

    Returns:
        The selector node.

    Raises:
        PolicyError: `text` is not a selector.
    """
    return _parse_part(text, "selector")


@dataclass(frozen=True, slots=True)
class Lookahead:
    """Terminals that may follow the beginning of a statement.

    Attributes:
        accepts: Names of the terminals that may follow.
        words: The keywords among them.
        read: The terminals of the beginning, each with its text.
    """

    accepts: frozenset[str]
    words: frozenset[str]
    read: tuple[tuple[str, str], ...]


def look_ahead(source: Source, start: int, end: int) -> Lookahead | None:
    """Computes which terminals may follow at `end` in a statement that starts at `start`.

    Args:
        source: The prepared text.
        start: Offset of the first character of the statement.
        end: Offset of the cursor.

    Returns:
        The terminals, or `None` if the statement has an error before `end`.
    """
    # The parser takes an empty line for the end of the statement, so trailing space is left out.
    end = start + len(source.clean[start:end].rstrip())
    parser = _parser().parse_interactive(source.clean[start:end], start="line")
    try:
        read = parser.exhaust_lexer()
    except lark.exceptions.UnexpectedInput:
        return None
    accepts = frozenset[str](parser.accepts())
    words = frozenset(word for name, word in _words().items() if name in accepts)
    return Lookahead(accepts, words, tuple((str(token.type), str(token)) for token in read))


def _place(finding: Diagnostic) -> tuple[int, int]:
    return (finding.span.start, finding.span.end) if finding.span else (-1, -1)


# --- the parser ------------------------------------------------------------------------------------------


@functools.cache
def _parser() -> Any:
    # `cache=True` is unsafe: it unpickles a file with a predictable path in the temporary folder.
    grammar = shipped("grammars").joinpath("cachepolicy.lark").read_text("utf-8")
    return lark.Lark(
        grammar,
        parser="lalr",
        lexer="contextual",
        propagate_positions=True,
        maybe_placeholders=False,
        start=["start", "line", "selector", "value"],
    )


@functools.cache
def _words() -> Mapping[str, str]:
    """Maps the name of each keyword terminal to its keyword."""
    patterns = ((terminal.name, str(terminal.pattern.value)) for terminal in _parser().terminals)
    return {name: word[1] for name, pattern in patterns if (word := re.fullmatch(r"([a-z_]+)\\b", pattern))}


@functools.cache
def _signs() -> Mapping[str, str]:
    """Maps the name of each terminal that is a fixed sign to the sign."""
    return {
        terminal.name: str(terminal.pattern.value) for terminal in _parser().terminals if terminal.pattern.type == "str"
    }


def _parse(source: Source, start: int, end: int, rule: str) -> Any:
    """Parses a part of the text. Positions in the tree refer to the whole text.

    `lark.TextSlice` does the same, but only since lark 1.3.
    """
    tree = _parser().parse(source.clean[start:end], start=rule)
    if start and is_tree(tree):
        for part in tree.iter_subtrees():
            tokens = [child for child in part.children if not is_tree(child)]
            for item in tokens if part.meta.empty else [part.meta, *tokens]:
                item.start_pos += start
                item.end_pos += start
    return tree


def _stop(source: Source, start: int, end: int, rule: str) -> syntax_errors.Stop:
    """Determines the offset at which the parser fails, and the terminals that it expected there."""
    parser = _parser().parse_interactive(source.clean[start:end], start=rule)
    offset: Any = end
    try:
        parser.exhaust_lexer()
    except lark.exceptions.UnexpectedInput as error:
        offset = start + (error.pos_in_stream or 0)
    # After a complete statement the parser accepts no terminal, not even the end.
    return syntax_errors.Stop(offset, frozenset(parser.accepts()) or frozenset({"$END"}), _words(), _signs())


def _parse_part(text: str, start: str) -> Any:
    """Parses a text that is no whole policy, from the grammar's rule `start`."""
    prepared, findings, parsable = prepare_source(text.replace("\n", " "), f"<{start}>")
    chunk = Chunk(0, len(prepared.clean.rstrip()), "")
    findings = [finding for finding in findings if finding.code != "E006"]
    if parsable and not findings:
        try:
            tree = _parse(prepared, 0, chunk.end, start)
        except lark.exceptions.UnexpectedInput:
            findings = [syntax_errors.syntax_error(prepared, chunk, _stop(prepared, 0, chunk.end, start))]
        else:
            lowering = Lowering(prepared)
            if depth(tree) > DEPTH_LIMIT:
                findings = [_too_deep(prepared, chunk)]
            else:
                part = lowering.lower(tree)
                findings = lowering.findings
                if not findings:
                    return part
    raise PolicyError(findings)


def _too_deep(source: Source, chunk: Chunk) -> Diagnostic:
    message = f"the statement is nested deeper than {DEPTH_LIMIT}"
    return source.finding("E015", message, chunk.start, chunk.end, help="name a part with `let`")


# --- a whole file ----------------------------------------------------------------------------------------


class _Reading:
    """Parser state for one source: the parsed statements and the diagnostics."""

    def __init__(self, source: Source, findings: list[Diagnostic]) -> None:
        self.source, self.findings = source, findings
        self.header = dict[str, Any]()
        self.statements = list[ir.Statement]()
        self.comments = list[ir.Comment]()
        self.broken = set[str]()
        self.lowering = Lowering(source, findings)

    def policy(self) -> ir.Policy:
        source = self.source
        return ir.Policy(
            **self.header,
            statements=tuple(self.statements),
            comments=tuple(self.comments),
            source_name=source.name,
            text=source.text,
            span=source.span(0, len(source.text)),
        )

    def unknown_edition(self) -> bool:
        """Reports an unsupported edition. The rest of such a file cannot be checked."""
        if not self.source.chunks:
            return False
        chunk = self.source.chunks[0]
        statement = re.compile(r"cachepolicy\s+([0-9]+)\b").match(self.source.clean, chunk.start, chunk.end)
        if not statement or statement[1].lstrip("0") == str(ir.EDITION):
            return False
        message = f"edition {statement[1][:20]} of the language is not known here"
        help = f"this version of cachepolicy reads edition {ir.EDITION}"
        self.findings.append(self.source.finding("E010", message, *statement.span(1), help=help))
        return True

    def read(self) -> None:
        trees = self._whole() if not self.findings else None
        pairs = zip(self.source.chunks, trees, strict=True) if trees is not None else self._by_statement()
        for chunk, tree in pairs:
            self._take(chunk, tree)
        self._comment(len(self.statements), self.source.tail)

    def judge(self, policy: ir.Policy) -> None:
        """Adds the diagnostics of the semantic checks."""
        partial = bool(self.findings)
        for judged in judge(policy, frozenset(self.broken), partial=partial):
            diagnostic = judged.diagnostic
            if judged.word is not None and diagnostic.span is not None:
                diagnostic = replace(diagnostic, span=self.source.narrow(diagnostic.span, judged.word))
            self.findings.append(self.source.locate(diagnostic))

    def _whole(self) -> Sequence[Any] | None:
        """Parses all statements at once (fast path). Returns `None` if the text has a syntax error."""
        try:
            return _parser().parse(self.source.clean, start="start").children
        except lark.exceptions.UnexpectedInput:
            return None

    def _by_statement(self) -> Iterator[tuple[Chunk, Any]]:
        """Parses each statement separately (error path), so that an error in one statement does not hide the next."""
        reported = [finding.span.start for finding in self.findings if finding.span]
        for chunk in self.source.chunks:
            within = [offset for offset in reported if chunk.start <= offset < chunk.end]
            if within:
                self._give_up(chunk, None, within[0])
            elif chunk.word not in STATEMENT_WORDS:
                self._give_up(chunk, syntax_errors.unknown_statement(self.source, chunk))
            else:
                try:
                    yield chunk, _parse(self.source, chunk.start, chunk.end, "line")
                except lark.exceptions.UnexpectedInput:
                    stop = _stop(self.source, chunk.start, chunk.end, "line")
                    self._give_up(chunk, syntax_errors.syntax_error(self.source, chunk, stop), stop.offset)

    def _take(self, chunk: Chunk, tree: Any) -> None:
        if depth(tree) > DEPTH_LIMIT + 8:
            self._give_up(chunk, _too_deep(self.source, chunk))
        elif chunk.word in HEADER_WORDS:
            self._take_header(chunk, tree)
        else:
            statement = self.lowering.lower(tree)
            self._comment(len(self.statements), self._about(chunk), chunk.after)
            self.statements.append(statement)

    def _take_header(self, chunk: Chunk, tree: Any) -> None:
        position = HEADER_WORDS.index(chunk.word)
        key = _HEADER_FIELDS[position]
        later = [word for word, key in zip(HEADER_WORDS, _HEADER_FIELDS, strict=True) if key in self.header]
        later = [word for word in later if HEADER_WORDS.index(word) > position]
        if key in self.header:
            self._misplaced(chunk, f"a policy has one `{chunk.word}` line")
        elif self.statements or later:
            self._misplaced(chunk, f"`{chunk.word}` stands before {f'`{later[0]}`' if later else 'the statements'}")
        else:
            self.header |= self.lowering.header(tree)
            self._comment(position - len(HEADER_WORDS), self._about(chunk), chunk.after)

    def _misplaced(self, chunk: Chunk, message: str) -> None:
        help = 'a file starts with `cachepolicy 1`, `policy NAME`, `source "..."`, in this order'
        self.findings.append(self.source.finding("E009", message, chunk.start, chunk.end, help=help))

    def _about(self, chunk: Chunk) -> tuple[str, ...]:
        """Returns the comments of a statement.

        Comments before the first statement that a blank line separates from it belong to the file.
        """
        if chunk is not self.source.chunks[0] or chunk.word == HEADER_WORDS[0] or "" not in chunk.before:
            return chunk.before
        end = len(chunk.before) - chunk.before[::-1].index("")
        self._comment(-len(HEADER_WORDS), chunk.before[:end])
        return chunk.before[end:]

    def _comment(self, statement: int, before: Iterable[str], after: str | None = None) -> None:
        self.comments += [ir.Comment(statement=statement, place="before", text=text) for text in before]
        if after is not None:
            self.comments.append(ir.Comment(statement=statement, place="after", text=after))

    def _give_up(self, chunk: Chunk, finding: Diagnostic | None, stop: int | None = None) -> None:
        """Records the usable parts of a broken statement: the declared name and the selector of a rule."""
        if finding is not None:
            self.findings.append(finding)
        clean = self.source.clean
        declared = re.compile(r"\S+\s+([A-Za-z_][A-Za-z0-9_]*)").match(clean, chunk.start, chunk.end)
        if chunk.word not in ("match", "use", "expect", "tuned", "preset", *HEADER_WORDS) and declared:
            self.broken.add(declared[1])
        if chunk.word == "match" and stop is not None:
            self._keep_selector(chunk, stop)

    def _keep_selector(self, chunk: Chunk, stop: int) -> None:
        head = re.compile(r"match\b\s*(optional\b\s*)?").match(self.source.clean, chunk.start, chunk.end)
        if not head:
            return
        tokens = _CLAUSE_OR_TEXT.finditer(self.source.clean, head.end(), stop)
        end = next((token.start() for token in tokens if token[0][0] not in "\"'"), stop)
        end = head.end() + len(self.source.clean[head.end() : end].rstrip())
        if end == stop:
            # The error touches the last word, which may be the beginning of a regex without quotes.
            return
        try:
            tree = _parse(self.source, head.end(), end, "selector")
        except lark.exceptions.UnexpectedInput:
            return
        if depth(tree) > DEPTH_LIMIT:
            return
        selector = self.lowering.lower(tree)
        span = self.source.span(chunk.start, chunk.end)
        self.statements.append(ir.Rule(selector=selector, optional=bool(head[1]), action=ir.Compute(), span=span))


_HEADER_FIELDS = ("edition", "name", "source")
_CLAUSE_OR_TEXT = re.compile(r"""\b(?:when|every|on|mask|while|at)\b|->|"[^"\n]*"|'[^'\n]*'""")
