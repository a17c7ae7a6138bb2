"""The printer is the inverse of the parser, in one style, with every comment."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings

from cachepolicy.language import ir
from cachepolicy.language.formatter import LINE_WIDTH, format, format_node
from cachepolicy.language.parser import check_names, parse, parse_selector, parse_value, recover
from tests.support import examples, ir_strategies

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def _comments(text: str) -> Counter[str]:
    bare = re.sub(r'"(?:[^"\n]|"")*"|\'(?:[^\'\n]|\'\')*\'', "", text)
    return Counter(found.rstrip() for found in re.findall(r"#[^\n]*", bare))


@quick
@given(ir_strategies.shapes())
def test_printed_policies_read_back_equal(policy: ir.Policy) -> None:
    """Whatever a text can say is printed as a text that says it."""
    text = format(policy)
    read, findings = recover(text)
    assert [] == [each for each in findings if each.code.startswith("E0") and each.code not in _OF_MEANING], text
    assert policy == read, text


# Codes of the E0 range that judge more than the form.
_OF_MEANING = {"E017", "E018", "E019", "E020"}


@quick
@given(ir_strategies.shapes())
def test_formatting_is_idempotent_and_keeps_comments(policy: ir.Policy) -> None:
    """A formatted text is its own canonical form, and no comment is lost, doubled or changed."""
    text = format(policy)
    read, _ = recover(text)
    assert text == format(read)
    assert Counter(each.text for each in policy.comments if each.text) == Counter(
        each.text for each in read.comments if each.text
    )


@settings(quick, max_examples=60)
@given(ir_strategies.policies())
def test_policies_that_make_sense_parse(policy: ir.Policy) -> None:
    """The strategy for users gives policies without errors, as text and as JSON."""
    assert policy == parse(format(policy))
    assert () == tuple(each for each in check_names(policy) if each.severity == "error")
    assert policy == ir.Policy.model_validate_json(policy.model_dump_json())


@pytest.mark.parametrize("name", examples.NAMES)
def test_examples_survive_formatting(name: str) -> None:
    """The published policies mean the same after formatting, and keep their comments."""
    text = examples.text(name)
    formatted = format(text)
    assert parse(text) == parse(formatted)
    assert formatted == format(formatted)
    assert _comments(text) == _comments(formatted)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a - (b - c)", "a - (b - c)"),
        ("(a - b) - c", "a - b - c"),
        ("a / (b * c)", "a / (b * c)"),
        ("(a * b) + c", "a * b + c"),
        ("a * (b + c)", "a * (b + c)"),
        ("-(a + b)", "-(a + b)"),
        ("-(5)", "-(5)"),
        ("--5", "--5"),
        ("- 5", "-5"),
        ("(a < b) + 1", "(a < b) + 1"),
        ("1e-7", "1e-07"),
        ("2.50", "2.5"),
        ("2", "2"),
        ("2.0", "2.0"),
        ("(a if b else c)", "(a if b else c)"),
        ("'it'", '"it"'),
        ("""'say "x"'""", """'say "x"'"""),
        ('''"it's a ""word"""''', '''"it's a ""word"""'''),
        ("[1,2 , 3]", "[1, 2, 3]"),
        ("(0,inf]", "(0, inf]"),
        ("-inf", "-inf"),
    ],
)
def test_values_are_printed_with_fewest_parentheses(given: str, expected: str) -> None:
    """Parentheses stand where precedence or associativity needs them, and nowhere else."""
    assert f"use x with a = {expected}" == format_node(
        ir.Use(policy="x", settings=(ir.Setting(name="a", value=parse_value(given)),))
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("(a) and (b or c)", "a and (b or c)"),
        ("(a and b) or c", "a and b or c"),
        ("not (not a)", "not not a"),
        ("not (a and b)", "not (a and b)"),
        ("a and (b and c)", "a and (b and c)"),
        ("each  blocks [ 1 : - 1 ]", "each blocks[1:-1]"),
        ("blocks[:]", "blocks"),
        ('blocks[3] of "^layers$"', 'blocks[3] of "^layers$"'),
        ('class "Attention$"', 'class "Attention$"'),
    ],
)
def test_selectors_are_printed_with_fewest_parentheses(given: str, expected: str) -> None:
    """As for values; nested sets keep their shape."""
    assert expected == format_node(parse_selector(given))


def test_conditions_keep_their_structure() -> None:
    """`not`, `and`, `or` and the conditional bind as they are read."""
    text = "let x = a if not (b or c) and d else (e if f else g) if h else i\n"
    policy, _ = recover(text)
    assert "let x = a if not (b or c) and d else (e if f else g) if h else i" == format_node(policy.statements[0])


def test_long_rules_break_at_their_clauses() -> None:
    """Lines stay within the width; what follows is indented and reads back as one statement."""
    names = " or ".join(f'"^transformer_blocks.{number}.attn"' for number in range(12))
    text = f"match {names} when {' and '.join(f'step != {n}' for n in range(20))} every 2 -> reuse  # why\n"
    formatted = format(text)
    lines = formatted.splitlines()
    assert all(len(line) <= LINE_WIDTH + len("  # why") for line in lines)
    assert lines[-1].endswith("# why")
    assert all(line.startswith("  ") for line in lines[3:])
    assert parse(text) == parse(formatted)
    assert formatted == format(formatted)


def test_arguments_of_long_actions_stand_on_their_own_lines() -> None:
    """An action that is too long is broken at its arguments."""
    formatted = format(examples.text("fastercache_as_diffusers"))
    assert "  -> approximate uncond spectral(low: 1.1 if t in (99, 901) else 1," in formatted.splitlines()
    assert '    high: 1.1 if t in (-1, 301) else 1, layout: "uncond first")' in formatted.splitlines()


def test_comments_stay_with_their_statements() -> None:
    """Leading comments before, trailing ones behind, inner ones before; blank lines single."""
    text = """\
# file


# about
param x: int = 1 # first


# rule
match attention # selector
  # inner
  when step < x # condition
  -> skip # last
# end
"""
    expected = """\
# file

cachepolicy 1

# about
param x: int = 1  # first

# rule
# selector
# inner
# condition
match attention when step < x -> skip  # last
# end
"""
    assert expected == format(text)


def test_a_policy_without_a_text_gets_blank_lines_between_its_groups() -> None:
    """Header, parameters, names, rules and expectations are parted."""
    policy = parse("param a: int = 2\nlet b = a\nmatch model every b -> reuse\nexpect model over 1 steps: C\n")
    bare = ir.Policy.model_validate_json(policy.model_dump_json())
    groups = [
        "cachepolicy 1",
        "param a: int = 2",
        "let b = a",
        "match model every b -> reuse",
        "expect model over 1 steps: C",
    ]
    assert "\n\n".join(groups) + "\n" == format(bare)
