"""What editors ask of a text: any text is answered, places are counted right, what is offered can stand there."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st
from lsprotocol.types import Position, PositionEncodingKind

from cachepolicy.language.formatter import format
from cachepolicy.language.parser import look_ahead
from cachepolicy.lsp._code_actions import fixes
from cachepolicy.lsp._completion import completions
from cachepolicy.lsp._hover import definitions, hover
from cachepolicy.lsp._positions import Positions
from cachepolicy.lsp.document import PolicyDocument
from tests.language.test_highlighting import TEXTS, texts
from tests.support import ir_strategies

ENCODINGS = {"utf-8": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}
UNITS = {"utf-8": 1, "utf-16": 2, "utf-32": 4}
offsets = st.integers(0, 200)


@given(st.text(), st.sampled_from([*ENCODINGS]))
@example("a\r\n\r\n\rb\n", "utf-16")
def test_places_and_offsets(text: str, encoding: str) -> None:
    """The place of every character is the line ends before it, and the code units since the last; and back."""
    positions = Positions(text, PositionEncodingKind(encoding))
    for offset in range(len(text) + 1):
        if text[offset - 1 : offset + 1] == "\r\n":
            continue  # inside a line end
        before = text[:offset].replace("\r\n", "\n").replace("\r", "\n")
        units = len(before.rpartition("\n")[2].encode(ENCODINGS[encoding])) // UNITS[encoding]
        assert Position(before.count("\n"), units) == positions.position(offset)
        assert offset == positions.offset(positions.position(offset))


@given(st.text(), st.integers(-3, 99), st.integers(-3, 99))
def test_places_beyond_a_text_are_at_its_ends(text: str, line: int, column: int) -> None:
    """Whatever place is asked for, the offset is one of the text."""
    assert 0 <= Positions(text).offset(Position(line, column)) <= len(text)
    assert Positions("\U0001f600").offset(Position(0, 1)) == 0


@given(texts, offsets)
@example("use", 3)
@example("use '", 5)
@example("match attention -> predict foo(", 31)
@example("expect block over 2 steps with", 30)
@example("match block at most", 19)
def test_any_text_is_answered(text: str, offset: int) -> None:
    """Whatever a text holds, every question about any place in it has an answer."""
    document, offset = PolicyDocument(text, "<text>"), min(offset, len(text))
    shown = hover(document, offset)
    assert shown is None or (shown.text and shown.range.touches(offset))
    assert all(0 <= each.range.start <= each.range.end <= len(text) for each in definitions(document, offset))
    assert all(each.text for each in completions(document, offset))
    for finding in document.findings:
        for fix in fixes(document, finding):
            assert all(0 <= each.range.start <= each.range.end <= len(text) for each in fix.edits)


@given(st.sampled_from([*TEXTS.values()]) | ir_strategies.policies().map(format), st.data())
def test_what_is_offered_can_stand_there(text: str, data: st.DataObject) -> None:
    """At every place of a sound policy something is offered, and the parser takes what is offered there."""
    offset = data.draw(st.integers(0, len(text)))
    document = PolicyDocument(text[:offset], "<text>")
    word, chunk = document.word(offset), document.statement(offset)
    if chunk is None or not document.is_code(offset):
        return
    start = word.start if word else offset
    for each in completions(document, offset):
        begun = PolicyDocument(f"{text[:start]} {each.text} ", "<text>")
        assert look_ahead(begun.source, chunk.start, len(begun.text)) is not None, each


@given(ir_strategies.policies().map(format), st.data())
def test_the_word_that_stands_there_is_offered(text: str, data: st.DataObject) -> None:
    """Of a sensible policy, every word and name that is no new name is among what is offered at its place."""
    document = PolicyDocument(text, "<text>")
    places = [each for each in range(len(text)) if document.word(each) == document.word(each + 1) is not None]
    offset = data.draw(st.sampled_from(places))
    word, chunk = document.word(offset), document.statement(offset + 1)
    assert word is not None
    if word in document.names.values() or chunk is None or chunk.word in ("policy", "cachepolicy"):
        return
    begun = PolicyDocument(text[: word.end], "<text>")
    offered = " ".join(each.text for each in completions(begun, word.end)).split()
    assert document.text_of(word) in offered
