"""Golden diagnostics, one per code, and the pages made of them."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepolicy.errors import CODES, Diagnostic, PolicyError, Related, Span, nearest, render, suggestion, to_json
from cachepolicy.language.parser import parse, recover
from cachepolicy.planning.check import check_text
from cachepolicy.planning.simulation import simulate
from tests.support import goldens

# What reading a text can find; loading, binding and running have their own tests.
OF_TEXTS = [code for code in CODES if code < "E150" or code in ("E161", "E162") or "W501" <= code <= "W506"]


@pytest.mark.parametrize("code", OF_TEXTS)
def test_every_code_of_texts_has_a_golden(code: str) -> None:
    """A code is shown, and explained."""
    assert code in goldens.SHOWN
    assert code in goldens.EXPLAINED


@pytest.mark.parametrize("code", goldens.SHOWN)
def test_golden_diagnostics(code: str) -> None:
    """The whole rendered diagnostic is as recorded, the only one (`python -m tests.support.goldens` records anew)."""
    found = goldens.findings(code)
    assert [code] == [each.code for each in found]
    assert (goldens.GOLDEN / f"{code}.txt").read_text("utf-8") == render(found) + "\n"


@pytest.mark.parametrize("code", goldens.EXPLAINED)
def test_pages_show_their_goldens(code: str) -> None:
    """The documentation's page of a code is made of its golden."""
    assert (goldens.PAGES / f"{code}.md").read_text("utf-8") == goldens.page(code)


def test_the_index_lists_every_code() -> None:
    """No code is missing, nothing is out of date."""
    assert (goldens.PAGES / "index.md").read_text("utf-8") == goldens.index()


@pytest.mark.parametrize("code", goldens.SHOWN)
def test_messages_keep_the_house_style(code: str) -> None:
    """Lower case, one sentence, no full stop; the user's words in backticks."""
    for found in goldens.findings(code):
        for text in (found.message, found.help or ""):
            assert not text.endswith(".") or text.endswith("...")
            assert "\n" not in text
            assert text.startswith(("`", "RE2", "UTF-8")) or text[:1] == text[:1].lower()
            assert text.count("`") % 2 == 0


HIDDEN = "\x1b\x00\x7f\x85\xa0\xad\u200b\u200c\u200d\u200e\u202e\u2060\u2066\u2028\u3000\ufe0f\ufeff\ud800\U000e0041"


def is_shown(text: str) -> bool:
    """True if the text has no character that Unicode counts as a control, format, surrogate, or unusual space."""
    categories = {unicodedata.category(letter) for letter in text if letter not in " \n\t"}
    return not categories & {"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"} and not set(text) & set(HIDDEN)


@given(st.text(max_size=8), st.sampled_from(HIDDEN), st.text(max_size=8))
def test_no_message_has_a_character_that_cannot_be_seen(before: str, hidden: str, after: str) -> None:
    """Message, help, label, related messages and file names are shown with escapes, as text and as JSON."""
    word = f"{before}{hidden}{after}\n\t"
    related = (Related(f"see `{word}`", Span(0, 1, 1, 1, 1, 2), None),)
    for span in (None, Span(0, 1, 1, 1, 1, 2)):
        found = Diagnostic("E101", f"`{word}` is unknown", "error", span, word, ("a",), word, word, related)
        for text in (found.message, found.help, found.label, found.related[0].message):
            assert is_shown(text)
            assert "\n" not in text
            assert hidden.encode("unicode_escape").decode() in text
        assert is_shown(render([found]))
        assert is_shown(to_json([found]))
        assert word == json.loads(to_json([found]))[0]["source"]
        assert found == replace(found, code="E101")


@pytest.mark.parametrize(
    "hidden", [letter for letter in HIDDEN if letter not in "\x00\x1b\x7f\x85\ufeff\ud800\u202e\u2066\u2028"]
)
def test_findings_of_a_policy_show_hidden_characters(hidden: str) -> None:
    """In names, regexes, strings and comments, found by the parser, the checker or the binding."""
    for text in (
        f"match blo{hidden}ck -> skip",
        f'match "blo{hidden}cks(" -> skip',
        f'match block when branch == "{hidden}" and stp < 3 -> skip',
        f"# {hidden}\nmatch block wen t < 3 -> skip # {hidden}",
    ):
        findings = check_text(text)
        assert findings
        assert is_shown(render(findings))
        assert is_shown(to_json(findings))
        for finding in findings:
            assert is_shown("".join(finding.excerpt))
    with pytest.raises(PolicyError) as caught:
        simulate(parse(f'match "bl{hidden}ocks" -> reuse # {hidden}'), steps=3)
    assert is_shown(str(caught.value))


def test_severity_follows_the_code() -> None:
    """W codes warn, all others are errors."""
    for code in goldens.SHOWN:
        assert ["warning" if code[0] == "W" else "error"] == [each.severity for each in goldens.findings(code)]


def test_all_errors_of_a_file_come_at_once() -> None:
    """`PolicyError` holds the findings in reading order and renders them all."""
    _, found = recover("mach a -> skip\nmatch attention evry 2 -> reuse\nmatch attention when stp < 3 -> skip\n")
    assert ["E007", "E001", "E101"] == [each.code for each in found]
    error = PolicyError(found)
    assert found == error.diagnostics
    assert render(found) == str(error)
    assert 3 == str(error).count("-->")


def test_json_holds_everything() -> None:
    """Editors get the code, the place and the help of each finding."""
    _, found = recover("match attention evry 2 -> reuse\n", source="a.cp")
    (record,) = json.loads(to_json(found))
    assert "E001" == record["code"]
    assert "a.cp" == record["source"]
    assert {"start": 16, "end": 20, "line": 1, "column": 17, "end_line": 1, "end_column": 21} == record["span"]
    assert "did you mean `every`?" == record["help"]


def test_colour_is_asked_for() -> None:
    """Escapes stand in the text with `colour` only."""
    _, found = recover("match attention evry 2 -> reuse\n")
    assert "\x1b[" not in render(found)
    assert "\x1b[" in render(found, colour=True)


def test_tabs_keep_the_underline_below_its_text() -> None:
    """The padding repeats the tabs of the line."""
    _, found = recover("match attention\n\twhen\tstp < 3 -> skip\n")
    line, marks = render(found).splitlines()[3:5]
    assert "2 | \twhen\tstp < 3 -> skip" == line
    assert "  | \t    \t^^^" == marks


def test_long_lines_are_shown_around_the_mistake() -> None:
    """A frame has a bounded width, with the underlined text in it."""
    names = " or ".join(["attention"] * 200)
    _, found = recover(f"match {names} or atention or {names} -> skip\n")
    shown = render(found)
    assert max(map(len, shown.splitlines())) < 200
    line, marks = shown.splitlines()[3:5]
    start = marks.index("^")
    assert "atention" == line[start : start + marks.count("^")]


def test_a_span_over_lines_is_underlined_to_the_end_of_the_first() -> None:
    """The frame shows where a long stretch begins."""
    span = Span(0, 9, 1, 3, 2, 4)
    shown = render([Diagnostic("E001", "message", span=span, excerpt=("abcdef", "gh"))])
    assert "  ^^^^" in shown.splitlines()[4]


def test_diagnostics_without_a_place_name_their_file() -> None:
    """A setting or a file has no line."""
    assert "error[E150]: message\n --> a.cp\n  = help: help" == render(
        [Diagnostic("E150", "message", source="a.cp", help="help")]
    )
    assert "error[E150]: message" == str(PolicyError.of("E150", "message"))


def test_suggestions_name_the_nearest_or_all() -> None:
    """A near word is suggested, a few far ones are listed, many are not."""
    assert "every" == nearest("evry", ["when", "every"])
    assert nearest("zzz", ["when", "every"]) is None
    assert "did you mean `every`?" == suggestion("evry", ["when", "every"])
    assert "one of `when`, `every`" == suggestion("zzz", ["when", "every"])
    assert suggestion("zzz", [f"name{number}" for number in range(20)]) is None
