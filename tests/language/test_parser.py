"""Any text is a policy or a `PolicyError`, quickly; what a policy says is what its text says."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachepolicy._resources import shipped
from cachepolicy.errors import CODES, Diagnostic, PolicyError, render, to_json
from cachepolicy.language import ir
from cachepolicy.language.formatter import format
from cachepolicy.language.parser import check_names, parse, parse_selector, parse_value, recover
from cachepolicy.language.traversal import children
from cachepolicy.language.vocabulary import RESERVED, TEXT_LIMIT
from tests.support import examples, goldens, ir_strategies

fuzz = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def codes(text: str | bytes) -> list[str]:
    """The codes of what is wrong with a text, warnings aside."""
    return [each.code for each in recover(text)[1] if each.severity == "error"]


def nodes(node: ir.Node) -> Iterator[ir.Node]:
    yield node
    for child in children(node):
        yield from nodes(child)


def rule(text: str) -> ir.Rule:
    (statement,) = recover(text)[0].statements
    assert isinstance(statement, ir.Rule)
    return statement


# --- meaning ---------------------------------------------------------------------------------------------


def test_the_first_line_means_what_it_says() -> None:
    """The line that started the project is a whole file."""
    policy = parse('match "^transformer_blocks.*attn" when 100<t<800 every 2 -> reuse')
    t, low, high = ir.Name(name="t"), ir.Number(value=100), ir.Number(value=800)
    expected = ir.Rule(
        selector=ir.Pattern(regex="^transformer_blocks.*attn"),
        when=ir.Comparison(operators=("<", "<"), operands=(low, t, high)),
        schedule=ir.Every(interval=ir.Number(value=2)),
        action=ir.Reuse(),
    )
    assert ir.Policy(statements=(expected,)) == policy


@pytest.mark.parametrize("path", sorted(examples.FOLDER.glob("*.cp")), ids=lambda path: path.stem)
def test_conformance(path) -> None:
    """Each conformance text gives its recorded policy or errors."""
    expected, text = goldens.conformance(path.stem)
    assert expected.read_text("utf-8") == text
    if expected.name == f"{path.stem}.json":
        assert ir.Policy.model_validate(json.loads(text)) == parse(path.read_bytes())


@pytest.mark.parametrize("name", examples.NAMES)
def test_published_policies_have_no_findings(name: str) -> None:
    """The wordings of published methods parse without an error or a warning; the empty policy warns of that."""
    expected = ["W506"] if name == "empty" else []
    assert expected == [found.code for found in recover(examples.text(name))[1]]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("a or b and not c", "a or (b and (not c))"),
        ("not a < b", "not (a < b)"),
        ("a - b - c", "(a - b) - c"),
        ("a / b * c", "(a / b) * c"),
        ("a + b * c", "a + (b * c)"),
        ("-a * b", "(-a) * b"),
        ("a if b else c if d else e", "a if b else (c if d else e)"),
        ("a or b if c else d", "(a or b) if c else d"),
        ("not t in (1, 2)", "not (t in (1, 2))"),
        ("a + 1 in {1}", "(a + 1) in {1}"),
    ],
)
def test_operators_bind_as_in_mathematics(text: str, same: str) -> None:
    """Precedence and associativity, told by parentheses."""
    assert recover(f"let x = {text}\n")[0] == recover(f"let x = {same}\n")[0]


@pytest.mark.parametrize(
    ("text", "same"),
    [("a or b and not c", "a or (b and (not c))"), ("not a and b", "(not a) and b")],
)
def test_selectors_bind_like_conditions(text: str, same: str) -> None:
    """`not` before `and` before `or`."""
    assert parse_selector(text) == parse_selector(same)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", ir.Number(value=3)),
        ("-3", ir.Number(value=-3)),
        ("3.0", ir.Number(value=3.0)),
        ("1e-3", ir.Number(value=0.001)),
        ("off", ir.Off()),
        ("true", ir.Boolean(value=True)),
        ("'a\\n'", ir.Text(value="a\\n")),
        ('"say ""x"""', ir.Text(value='say "x"')),
        ("cond", ir.Name(name="cond")),
        ("[1, 2]", ir.ListOf(items=(ir.Number(value=1), ir.Number(value=2)))),
        ("(1, 2]", ir.Interval(low=ir.Number(value=1), high=ir.Number(value=2), high_closed=True)),
        (" (100,\n800) ", ir.Interval(low=ir.Number(value=100), high=ir.Number(value=800))),
    ],
)
def test_values_of_settings(text: str, value: ir.Expression) -> None:
    """`--set NAME=TEXT` takes the values of the language; 3 and 3.0 stay apart."""
    assert value == parse_value(text)


@pytest.mark.parametrize("text", ["", "3 4", "a)", "((", '"', "1 <", "{1}", "a < b", "\0", "(" * 100])
def test_what_is_no_value(text: str) -> None:
    """Everything else is a `PolicyError`."""
    with pytest.raises(PolicyError):
        parse_value(text)


@pytest.mark.parametrize("text", ["", "3", "a -> reuse", "(a", "every", "class", "a when b"])
def test_what_is_no_selector(text: str) -> None:
    """Selectors are parsed whole."""
    with pytest.raises(PolicyError):
        parse_selector(text)


# --- statements and lines --------------------------------------------------------------------------------


def test_statements_end_with_their_line_unless_indented() -> None:
    """Blank and comment lines neither end nor start a statement."""
    text = "match attention # one\n\n# two\n  when t < 3\n   # three\n\n\tevery 2\n  -> reuse\nmatch block -> skip"
    policy = parse(text)
    assert 2 == len(policy.statements)
    assert ["# one", "# two", "# three"] == [each.text for each in policy.comments if each.text]


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_marks_mean_nothing(end: str, mark: str) -> None:
    """Files of any editor say the same, as text and as bytes."""
    lines = ["cachepolicy 1", "match attention", "\twhen t < 3 # note", "  -> reuse"]
    text = mark + (end or "\n").join(lines) + end
    assert parse("\n".join(lines)) == parse(text) == parse(text.encode())


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_spans_are_places_in_the_original_text(end: str, mark: str) -> None:
    """Offsets count every character, columns do not count a byte order mark."""
    text = mark + end.join(["cachepolicy 1", "", "match attention", '\twhen branch == "é" and step < 3 -> reuse'])
    found = rule(text.replace("cachepolicy 1", "#" * 13))
    assert found.when is not None
    span = found.when.span
    assert span is not None
    assert 'branch == "é" and step < 3' == text[span.start : span.end]
    assert (4, 7) == (span.line, span.column)
    first = parse(f"{mark}match attention -> skip").statements[0].span
    assert first is not None
    assert (1, 1) == (first.line, first.column)


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("match attention -> skip\r", 1, 24),
        ("\ufeffmatch attention -> skip\r", 1, 24),
        ("match attention\r  -> skip", 1, 16),
        ("# note\r\r\nmatch attention -> skip", 1, 7),
        ("match attention -> skip # harmless\rmatch block -> skip\n", 1, 35),
        ("match attention -> skip\nmatch 'a\rb' -> skip\n", 2, 9),
    ],
)
def test_a_carriage_return_alone_is_refused(text: str, line: int, column: int) -> None:
    """Editors and Python disagree whether it ends a line: what is read must be what is shown."""
    for read in (text, text.encode()):
        findings = recover(read)[1]
        assert ["E012"] == [finding.code for finding in findings]
        assert (line, column) == (findings[0].span.line, findings[0].span.column)
        assert "U+000D CARRIAGE RETURN" in findings[0].message
        assert "\r" not in render(findings)


@pytest.mark.parametrize("name", examples.NAMES)
def test_every_node_knows_its_text(name: str) -> None:
    """A child's text lies within its parent's, and the text of a name is the name."""
    text = examples.text(name)
    for node in nodes(parse(text)):
        assert node.span is not None
        assert node.span.start <= node.span.end <= len(text)
        if isinstance(node, ir.Name | ir.PatternParam):
            assert node.name == text[node.span.start : node.span.end]
        for child in children(node):
            assert child.span is not None
            assert node.span.start <= child.span.start
            assert child.span.end <= node.span.end


def test_a_broken_rule_keeps_its_selector() -> None:
    """What is wrong with the selector can be told together with what is wrong behind it."""
    policy, findings = recover('match "transfomer_blocks.*attn" evry 2 -> reuse')
    assert ["E001"] == [each.code for each in findings]
    assert "did you mean `every`?" == findings[0].help
    assert (ir.Rule(selector=ir.Pattern(regex="transfomer_blocks.*attn"), action=ir.Compute()),) == policy.statements


@pytest.mark.parametrize(
    "text",
    ["match optional (a or b) every -> skip", "match a and b when t > -> skip", "match blocks[1:]\nevery 2 -> skip"],
)
def test_selectors_of_broken_rules_are_kept(text: str) -> None:
    """Wherever the mistake is behind the selector."""
    assert 1 == len(recover(text)[0].statements)


def test_one_mistake_is_told_once() -> None:
    """An unknown name, a broken declaration and an unused name behind an error make no echo."""
    assert ["E101"] == codes("match attention when stp > 1 and stp < 3 -> skip\nmatch block when stp < 3 -> skip\n")
    assert ["E001"] == codes("param interval: itn = 3\nmatch attention every interval -> skip\n")
    assert ["E007"] == codes("parm interval: int = 3\nmatch attention every interval -> skip\n")
    assert ["E001"] == [each.code for each in recover("param n: int = 3\nmatch attention evry n -> skip\n")[1]]
    assert ["E111"] == codes("let x = branch + 1\nmatch attention every x -> skip\n")


@pytest.mark.parametrize("word", sorted(RESERVED - {"inf"}))
def test_reserved_words_are_no_names(word: str) -> None:
    """Neither declared nor read."""
    assert ["E008"] == codes(f"let {word} = 3\n")
    assert codes(f"match attention when {word} < 3 -> skip\n")


@pytest.mark.parametrize(
    "word", ["a", "row", "all", "most", "end", "uncond", "low", "weight", "C", "R", "int", "linear", "x"]
)
def test_other_words_are_names(word: str) -> None:
    """Words of fixed phrases, labels, branches, predictors and letters are free."""
    text = f"""\
param {word}: int = 3
match attention every {word} from end at most {word} in a row at most {word} in all -> reuse follow {word}
match attention every {word} -> predict linear(weight: {word} + 1)
expect attention over 2 steps: C R
"""
    assert [] == codes(text)


@pytest.mark.parametrize(
    "text",
    [
        "match attention every2 -> skip",
        "matchx attention -> skip",
        "match attention when t<3and step<2 -> skip",
        "let x = 2 y",
    ],
)
def test_words_are_whole(text: str) -> None:
    """A keyword glued to something is another word."""
    assert codes(text)


def test_punctuation_needs_no_spaces() -> None:
    """Strings, arrows and signs end words."""
    assert [] == codes('match"x"when(t<3)every 2->reuse')


# --- bounds ----------------------------------------------------------------------------------------------


def _seconds(text: str | bytes) -> float:
    start = time.process_time()
    with pytest.raises(PolicyError):
        parse(text)
    return time.process_time() - start


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("(" * 10_000 + ")" * 10_000, "E015"),
        ("let x = " + "(" * 10_000 + "1" + ")" * 10_000, "E015"),
        ("match " + "(" * 10_000 + "attention" + ")" * 10_000 + " -> skip", "E015"),
        ("let x = " + "not " * 20_000 + "true", "E015"),
        ("let x = " + "-" * 20_000 + "1", "E015"),
        ("let x = 1" + " + 1" * 10_000, "E015"),
        ("let x = 1" + " if true else 1" * 5_000, "E015"),
        ("match " + "not " * 20_000 + "attention -> skip", "E015"),
        ("let x = " + "1 " * 100_000, "E014"),
        ("\n".join(f"let x{n} = {n}" for n in range(10_000)), "E014"),
        ("# a\n" * 400_000, "E013"),
        ("x" * 10_000_000, "E013"),
        (b"\xff" * 1_000_000, "E011"),
        ("\0" * 1_000_000, "E012"),
        ('"' * 1_000_000, "E007"),
        ("let x = " + "9" * 1_000_000, "E016"),
        ("let x = 1e" + "9" * 1_000_000, "E016"),
        ("let x = 9007199254740993", "E016"),
        ('match "' + "a" * 1_001 + '" -> skip', "E019"),
        (" \n" * 300_000 + " x", "E006"),
        ("match attention" + "\n " * 300_000 + "x -> skip", "E001"),
        ("let " * 20_000, "E008"),
        ("\n".join(["let x0 = x1"] + [f"let x{n} = x{n + 1}" for n in range(1, 5_000)] + ["let x5000 = x0"]), "E109"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 5 else "",
)
def test_work_is_bounded(text: str | bytes, code: str) -> None:
    """Texts made to hurt are refused with their own code, soon, without exhausting the stack."""
    assert code in codes(text)
    assert _seconds(text) < 10


def test_counted_bounds_hold_to_the_letter() -> None:
    """The limits are numbers, told in the message."""
    assert [] == codes("#" * TEXT_LIMIT)
    assert ["E013"] == codes("#" * (TEXT_LIMIT + 1))
    assert [] == codes("table x = [" + "1," * 14_990 + "1]\n")
    assert ["E014"] == codes("table x = [" + "1," * 15_000 + "1]\n")
    assert [] == codes("let x = " + "(" * 64 + "1" + ")" * 64)
    assert ["E015"] == codes("let x = " + "(" * 65 + "1" + ")" * 65)
    assert [] == codes("let x = 1" + " + 1" * 62)
    assert ["E015"] == codes("let x = 1" + " + 1" * 63)
    assert [] == codes(f"let x = {2**53}")
    assert [] == codes('match "' + "a" * 1_000 + '" -> skip')


def test_regexes_take_linear_time() -> None:
    """What makes other engines hang is harmless; what RE2 lacks is refused by name."""
    assert [] == codes('match "(a+)+$" or "^(\\w+\\.?)+attn$" -> skip')
    for regex in ("(?=a)", "(?!a)b", "(?<=a)b", "(?<!a)b", r"(a)\1", "(?P<n>a)(?P=n)", "(?>a)", "a++"):
        assert ["E018"] == codes(f'match "{regex}" -> skip'), regex
        assert ["E018"] == codes(f'match class "{regex}" -> skip'), regex
        assert ["E018"] == codes(f'param p: list = ["{regex}"]\nmatch p -> skip'), regex
    for regex in ("(", "a(b", "[z-a]", "*", r"\q", "a{2000}", "((a{100}){100}){100}"):
        assert ["E017"] == codes(f'match "{regex}" -> skip'), regex
    assert [] == codes(r'match "\\1" or "[(?=]" or "a+?" -> skip')


# --- fuzz ------------------------------------------------------------------------------------------------

SOUP = [
    *sorted(RESERVED), "t", "step", "steps", "branch", "x", "sum", "prev", "kept", "l1", "linear", "taylor", "order",
    "int", "range", "?", "a", "row", "all", "most", "end", "C", "R", "1", "2.5", "1e9", "0", "->", "<", "<=", "==",
    "!=", "+", "-", "*", "/", "%", "(", ")", "[", "]", "{", "}", ",", ":", "=", '"a"', "'b'", '"', "'", "#", "\n",
    "\n  ", "\n\n", "\r", "\t", "é", "\0", "\u202e", "\ufeff", "\\", "@", ";", "9" * 30, '"(?=a)"', '"("',
]  # fmt: skip


def _hold(text: str | bytes) -> None:
    """What holds of any text."""
    policy, findings = recover(text)
    length = len(text)
    for each in findings:
        assert each.code in CODES
        assert ("warning" if each.code[0] == "W" else "error") == each.severity
        if each.span is not None:
            assert 0 <= each.span.start <= each.span.end <= length
            assert each.span.line >= 1
            assert each.span.column >= 1
    assert render(findings).isprintable() or "\n" in render(findings)
    json.loads(to_json(findings))
    errors = [each for each in findings if each.severity == "error"]
    if errors:
        with pytest.raises(PolicyError) as caught:
            parse(text)
        assert findings == caught.value.diagnostics
    else:
        formatted = format(policy)
        assert policy == parse(text) == parse(formatted)
        assert formatted == format(formatted)


@fuzz
@given(st.lists(st.sampled_from(SOUP), max_size=40), st.sampled_from(["", " "]))
def test_any_words_give_a_policy_or_an_error(words: list[str], between: str) -> None:
    """Tokens in any order never crash, and every finding has its place."""
    _hold(between.join(words))


@fuzz
@given(st.binary(max_size=60) | st.text(max_size=60))
def test_any_bytes_give_a_policy_or_an_error(text: str | bytes) -> None:
    """So do any bytes and any characters."""
    _hold(text)


@fuzz
@given(st.sampled_from([examples.text(name) for name in examples.NAMES]), st.randoms(use_true_random=False))
def test_mutations_give_a_policy_or_an_error(text: str, random: random.Random) -> None:
    """Valid files with pieces deleted, doubled, swapped or strewn with tokens never crash."""
    for _ in range(random.randint(1, 4)):
        start = random.randint(0, len(text))
        end = min(len(text), start + random.randint(0, 12))
        piece = random.choice(["", text[start:end] * 2, random.choice(SOUP), f" {random.choice(SOUP)} "])
        text = text[:start] + piece + text[end:]
    _hold(text)


@settings(fuzz, max_examples=60)
@given(st.lists(st.sampled_from(SOUP), max_size=12), st.lists(st.sampled_from(SOUP), max_size=12))
def test_statements_are_judged_apart(one: list[str], other: list[str]) -> None:
    """The grammar of a whole file takes what it takes statement by statement."""
    lines = [
        " ".join(word for word in words if not set(word) & set("\n\r#\0\u202e\ufeff\"'([{")) for words in (one, other)
    ]
    apart = [codes(f"match {line}") for line in lines]
    together = codes("\n".join(f"match {line}" for line in lines))
    form = [[code for code in found if code < "E015"] for found in (*apart, together)]
    assert len(form[2]) == len(form[0]) + len(form[1])


# --- JSON ------------------------------------------------------------------------------------------------


@settings(fuzz, max_examples=100)
@given(ir_strategies.shapes())
def test_json_is_equal_in_power_to_the_text(policy: ir.Policy) -> None:
    """A policy survives JSON; the same is wrong with it there as in its text."""
    read = ir.Policy.model_validate_json(policy.model_dump_json())
    assert policy == read
    by_text = [each.code for each in recover(format(policy))[1]]
    assert sorted(by_text) == sorted(each.code for each in check_names(read))


def test_the_schema_describes_the_json_form() -> None:
    """The schema has every statement and nothing about places in a text."""
    schema = ir.Policy.model_json_schema()
    assert {"Param", "Let", "Table", "Signal", "External", "Rule", "Use", "Expect"} <= schema["$defs"].keys()
    assert "span" not in json.dumps(schema["properties"])


NESTED = '{"kind": "not", "operand": ' * 90 + '{"kind": "boolean", "value": true}' + "}" * 90
NUMBER = '{"kind": "number", "value": 1}'
BLOCK = '{"kind": "of_kind", "of": "block"}'
OPEN = f'{{"kind": "interval", "low": {NUMBER}, "high": {NUMBER}}}'
CLOSED = OPEN.replace("}}", '}, "low_closed": true, "high_closed": true}')


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        ('{"kind": "let", "name": "x", "value": %s}' % NESTED, "E015"),
        ('{"kind": "let", "name": "x y", "value": %s}' % NUMBER, "E021"),
        ('{"kind": "let", "name": "match", "value": %s}' % NUMBER, "E008"),
        ('{"kind": "let", "name": "x", "value": {"kind": "number", "value": "NaN"}}', "E021"),
        ('{"kind": "let", "name": "x", "value": {"kind": "number", "value": 9007199254740993}}', "E016"),
        ('{"kind": "let", "name": "x", "value": {"kind": "text", "value": "a\\nb"}}', "E021"),
        ('{"kind": "let", "name": "x", "value": {"kind": "and", "operands": []}}', "E021"),
        ('{"kind": "let", "name": "x", "value": {"kind": "comparison", "operators": ["<"], "operands": []}}', "E021"),
        ('{"kind": "let", "name": "x", "value": {"kind": "set", "items": [%s]}}' % NUMBER, "E021"),
        ('{"kind": "let", "name": "x", "value": %s}' % OPEN, "E021"),
        ('{"kind": "let", "name": "x", "value": {"kind": "name", "name": "y"}}', "E101"),
        ('{"kind": "table", "name": "x", "values": []}', "E021"),
        ('{"kind": "table", "name": "x", "values": ["Infinity"]}', "E021"),
        ('{"kind": "match", "selector": {"kind": "pattern", "regex": "(?=a)"}, "action": {"kind": "skip"}}', "E018"),
        ('{"kind": "match", "selector": {"kind": "any_of", "selectors": []}, "action": {"kind": "skip"}}', "E021"),
        ('{"kind": "match", "selector": %s, "action": {"kind": "skip"}, "follow": "a b"}' % BLOCK, "E021"),
        ('{"kind": "use", "policy": "x", "settings": [{"name": "a", "value": %s}]}' % CLOSED, "E021"),
    ],
)  # fmt: skip
def test_json_is_held_to_the_rules_of_the_text(statement: str, code: str) -> None:
    """Whoever wrote the JSON: what no text can say, and what no text may say, is found."""
    policy = ir.Policy.model_validate_json(f'{{"statements": [{statement}]}}')
    assert [code] == [each.code for each in check_names(policy) if each.severity == "error"]


def test_json_cannot_smuggle_statements_in_comments() -> None:
    """Comments are printed as they are, so they must be comments."""
    comment = ir.Comment(statement=0, place="before", text="match model -> skip")
    assert ["E021"] == [each.code for each in check_names(ir.Policy(comments=(comment,)))]


def test_large_json_is_refused_by_count() -> None:
    """A policy of more parts than a text may have is not walked through."""
    policy = ir.Policy(statements=(ir.Table(name="x", values=(1,) * 40_000),))
    assert ["E014"] == [each.code for each in check_names(policy)]


# --- the grammar's file ----------------------------------------------------------------------------------


def _examples_of_the_grammar() -> Iterator[tuple[str, str]]:
    lines = shipped("grammars").joinpath("cachepolicy.lark").read_text("utf-8").splitlines()
    for comment, definition in pairwise(lines):
        name = definition.split(":")[0].lstrip("?")
        if comment.startswith("// ") and name.isidentifier() and name.islower() and ":" in definition:
            yield name, comment.removeprefix("// ")


@pytest.mark.parametrize(("name", "example"), list(_examples_of_the_grammar()))
def test_the_grammars_examples_parse(name: str, example: str) -> None:
    """The example above each rule of the grammar has the form of that rule."""
    text = {"expression": f"let x = {example}", "blocks": f"match {example} -> skip", "value": ""}.get(name, example)
    assert [] == [code for code in codes(text) if code < "E100"]


def test_the_grammar_has_no_collisions() -> None:
    """Keywords win over names by the name's own lookahead: grammar and vocabulary reserve the same words."""
    text = shipped("grammars").joinpath("cachepolicy.lark").read_text("utf-8")
    line = next(line for line in text.splitlines() if line.startswith("NAME:"))
    assert RESERVED == set(line[line.index("(?:") + 3 : line.index(r")\b)")].split("|"))


def test_findings_are_plain_data() -> None:
    """Warnings come with a policy that parses."""
    policy, findings = recover("param unused: int = 3\nmatch attention every 2 -> reuse\n")
    assert ["W503"] == [each.code for each in findings]
    assert isinstance(findings[0], Diagnostic)
    assert policy == parse("param unused: int = 3\nmatch attention every 2 -> reuse\n")
