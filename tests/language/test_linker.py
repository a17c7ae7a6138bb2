"""Policies by name and path, their settings, what they use, and the hash of what they mean."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachepolicy._resources import shipped_policies
from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.language.evaluate import constant
from cachepolicy.language.formatter import format as printed
from cachepolicy.language.formatter import format_node
from cachepolicy.language.linker import load, resolve
from cachepolicy.language.params import typed
from cachepolicy.language.parser import parse, parse_value
from cachepolicy.language.traversal import walk

FORA = """
param interval: int = 3 in [1, 50]
let doubled = interval * 2
match attention every interval from end -> reuse
match feedforward when step > doubled every doubled -> reuse
"""


def codes(error: PolicyError) -> list[str]:
    return [each.code for each in error.diagnostics]


def refused(call: Any, *arguments: Any) -> PolicyError:
    with pytest.raises(PolicyError) as caught:
        call(*arguments)
    return caught.value


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- names and paths -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pab", "pab.cp", "pab.cachepolicy", "<shipped>/pab.cp"])
def test_shipped_by_name(name: str, folder: Path) -> None:
    """A bare name is a shipped policy, with or without its suffix."""
    assert load(name).name == "pyramid_attention_broadcast"


def test_a_policy_is_given_back() -> None:
    """`load` takes what it gives."""
    policy = parse(FORA)
    assert load(policy) is policy


@pytest.mark.parametrize("suffix", [".cp", ".cachepolicy", ".txt", ""])
def test_file_by_path(folder: Path, suffix: str) -> None:
    """A path is a file, whatever its suffix; a string, a path object and a bare name that is not shipped will do."""
    path = folder / f"mine{suffix}"
    path.write_text(FORA)
    for source in (str(path), path, f"./mine{suffix}", f"mine{suffix}"):
        assert parse(FORA) == load(source)


def test_json_by_path(folder: Path) -> None:
    """`.json` is the JSON form, equal in power."""
    policy = load("fora")
    (folder / "mine.json").write_text(policy.model_dump_json())
    assert policy == load("./mine.json")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "E154"),
        ("[]", "E154"),
        ('{"statements": [], "statements": []}', "E154"),
        ('{"statements": [{"kind": "nothing"}]}', "E154"),
        ('{"statements": [{"kind": "let", "name": "a", "value": {"kind": "name", "name": "b"}}]}', "E101"),
        ('{"statements": [{"kind": "param", "name": "a b", "type": "int", "default": {"kind": "off"}}]}', "E021"),
    ],
)
def test_json_is_held_to_the_rules(folder: Path, text: str, code: str) -> None:
    """What is wrong with a JSON policy is the same error as in a text."""
    (folder / "mine.json").write_text(text)
    assert code in codes(refused(load, "mine.json"))


@given(st.data())
def test_a_key_that_stands_twice_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """In whatever object of the JSON form, also where both values are equal, and the message names the key."""
    text = data.draw(st.sampled_from([load(name) for name in shipped_policies()])).model_dump_json()
    members = list(re.finditer(r'"(\w+)":(?=[^,{}\[\]]+[,}])', text))
    member = data.draw(st.sampled_from(members))
    path = tmp_path_factory.mktemp("json") / "mine.json"
    path.write_text(text)
    assert load(path).statements
    path.write_text(f"{text[: member.start()]}{member[0]}null,{text[member.start() :]}")
    with pytest.raises(PolicyError) as caught:
        load(path)
    assert "E154" == caught.value.diagnostics[0].code
    assert f"the key `{member[1]}` stands twice" in caught.value.diagnostics[0].message


@pytest.mark.parametrize("here", ["pab.cp", "pab.cachepolicy"])
@pytest.mark.parametrize("name", ["pab", "pab.cp"])
def test_shipped_and_here(folder: Path, here: str, name: str) -> None:
    """A bare name that is a shipped policy and a file here is refused, and both ways out work."""
    (folder / here).write_text("match attention every 2 -> reuse")
    error = refused(load, name)
    assert ["E151"] == codes(error)
    assert f"./{here}" in str(error)
    assert load(f"./{here}").name is None
    assert load("<shipped>/pab.cp").name is not None


@pytest.mark.parametrize(
    ("name", "help"),
    [
        ("pba", "did you mean `pab`?"),
        ("pabb.cp", "did you mean `pab`?"),
        ("zzz", "`cachepolicy list`"),
        ("Delta-DiT", "`delta_dit`"),
        ("./nowhere/pba.cp", "did you mean `pab`?"),
        ("match attention every 2 -> reuse\n", "parse(text)"),
    ],
)
def test_near_misses(folder: Path, name: str, help: str) -> None:
    """An unknown name names the shipped ones."""
    error = refused(load, name)
    assert ["E150"] == codes(error)
    assert help in (error.diagnostics[0].help or "")


@pytest.mark.parametrize("wrong", [None, 5, b"pab", ["pab"]])
def test_what_is_no_policy_at_all(wrong: Any) -> None:
    """Anything that is neither name, path nor policy is an error of the one kind."""
    assert ["E150"] == codes(refused(load, wrong))


def test_forgotten_suffix(folder: Path) -> None:
    """`mine` where `mine.cp` lies here is told so."""
    (folder / "mine.cp").write_text(FORA)
    assert "./mine.cp" in (refused(load, "mine").diagnostics[0].help or "")


def test_unreadable(folder: Path) -> None:
    """Folders, pipes, missing and oversized files are errors, found before they are read whole."""
    (folder / "folder.cp").mkdir()
    os.mkfifo(folder / "pipe.cp")
    (folder / "large.cp").write_bytes(b"#" * (2**20 + 1))
    (folder / "bytes.cp").write_bytes(b"\xff\xfe\x00")
    (folder / "loop.cp").symlink_to(folder / "loop.cp")
    assert "E152" in codes(refused(load, "./folder.cp"))
    assert "E152" in codes(refused(load, "./pipe.cp"))
    assert "E153" in codes(refused(load, "./large.cp"))
    assert "E011" in codes(refused(load, "./bytes.cp"))
    assert "E152" in codes(refused(load, "./loop.cp"))
    assert "E152" in codes(refused(load, "./a\0b.cp"))
    assert "E150" in codes(refused(load, "./none.cp"))
    assert "E152" in codes(refused(load, "./" + "x" * 5000))


def test_errors_name_the_file(folder: Path) -> None:
    """A mistake in a file is shown with its path and line."""
    (folder / "mine.cp").write_text("match attention every 0 -> reuse")
    assert "mine.cp:1:" in str(refused(load, "./mine.cp"))


# --- settings --------------------------------------------------------------------------------------------

ints = st.integers(-(10**6), 10**6)
floats = st.floats(allow_nan=False)
GOOD: dict[str, st.SearchStrategy[Any]] = {
    "int": ints,
    "float": floats | ints,
    "bool": st.booleans(),
    "string": st.text(max_size=8),
    "range": st.tuples(ints, ints).filter(lambda ends: ends[0] < ends[1]),
    "list": st.lists(ints | floats | st.booleans() | st.text(max_size=5), max_size=5),
}
BAD: dict[str, list[Any]] = {
    "int": [True, 2.0, 2.5, "2", (1,), math.nan, object()],
    "float": [True, "1", math.nan, (1.0,), 1j],
    "bool": [0, 1, "true", 1.0],
    "string": [1, True, ("a",), b"a"],
    "range": [5, (1,), (1, 2, 3), [1, 2], (800, 100), (5, 5), (True, 2), (math.nan, 2), ("a", "b")],
    "list": ["abc", 5, {1, 2}, [[1]], [None], [math.nan], {"a": 1}],
}


def param(type: str, *, optional: bool = False) -> ir.Param:
    return ir.Param(name="p", type=type, optional=optional, default=ir.Off())  # pyright: ignore[reportArgumentType]


@given(st.data(), st.sampled_from(sorted(GOOD)))
def test_python_values_come_back(data: st.DataObject, type: str) -> None:
    """A setting means the Python value that it was given as."""
    value = data.draw(GOOD[type])
    got = constant(typed(param(type), value))
    match type:
        case "range":
            assert isinstance(got, ir.Interval)
            assert (value, False, False) == (
                (constant(got.low), constant(got.high)),
                got.low_closed,
                got.high_closed,
            )
        case "list":
            assert tuple(value) == got
        case _:
            assert value == got
            assert type != "bool" or isinstance(got, bool)


@pytest.mark.parametrize(("type", "value"), [(type, value) for type, values in BAD.items() for value in values])
def test_other_types_are_refused(type: str, value: Any) -> None:
    """A bool is no int, a float no int, a string no list, and `nan` is nothing."""
    assert set(codes(refused(typed, param(type), value))) <= {"E161", "E162"}


@pytest.mark.parametrize("type", sorted(GOOD))
def test_off(type: str) -> None:
    """None and `off` set a `?` parameter, and no other."""
    for off in (None, ir.Off()):
        assert ir.Off() == typed(param(type, optional=True), off)
        assert ["E161"] == codes(refused(typed, param(type), off))


@pytest.mark.parametrize(
    ("type", "text", "value"),
    [
        ("int", "-3", -3),
        ("float", "2", 2.0),
        ("float", "-inf", -math.inf),
        ("bool", "false", False),
        ("string", '"a b"', "a b"),
        ("string", "word", "word"),
        ("list", '["a", 1]', ("a", 1)),
        ("list", "[]", ()),
    ],
)
def test_text_values(type: str, text: str, value: Any) -> None:
    """`--set NAME=TEXT` takes the values of the language."""
    assert value == constant(typed(param(type), parse_value(text)))


@pytest.mark.parametrize(
    ("text", "closed"),
    [("(1, 5)", (False, False)), ("[1, 5]", (True, True)), ("[1, 5)", (True, False)), ("(1, 5]", (False, True))],
)
def test_text_ranges(text: str, closed: tuple[bool, bool]) -> None:
    """A range from text keeps its brackets."""
    value = typed(param("range"), parse_value(text))
    assert isinstance(value, ir.Interval)
    assert closed == (value.low_closed, value.high_closed)


def test_numbers_of_other_libraries() -> None:
    """What registers as a number is one."""
    numpy = pytest.importorskip("numpy")
    assert 3 == constant(typed(param("int"), numpy.int64(3)))
    assert 0.5 == constant(typed(param("float"), numpy.float32(0.5)))
    assert "E161" in codes(refused(typed, param("int"), numpy.float64(3.0)))
    assert "E161" in codes(refused(typed, param("int"), numpy.bool_(True)))


def test_unknown_names_and_domains_at_once() -> None:
    """All that is wrong with the settings is said together, with the near names."""
    policy = parse('param a: int = 1 in [1, 5]\nparam word: string = "x" in {"x", "y"}\nlet b = a\n')
    error = refused(resolve, policy, {"a": 6, "word": "z", "wrod": "x", "b": 1})
    assert ["E160", "E160", "E162", "E162"] == sorted(codes(error))
    assert "did you mean `word`?" in str(error)
    assert "[1, 5]" in str(error)


@given(st.integers(1, 50))
def test_settings_leave_the_policy_alone(interval: int) -> None:
    """Resolving changes nothing but its result."""
    policy = parse(FORA)
    before = policy.model_dump_json()
    resolved = resolve(policy, {"interval": interval})
    assert before == policy.model_dump_json()
    assert {"interval": interval} == resolved.settings


@given(st.integers(1, 50))
def test_constants_stand_for_names(interval: int) -> None:
    """No parameter or let is left in a resolved rule."""
    rules = resolve(parse(FORA), {"interval": interval}).rules
    names = {node.name for rule in rules for node in walk(rule) if isinstance(node, ir.Name)}
    assert {"step"} == names
    assert f"every {interval} from end" in format_node(rules[0])
    assert f"step > {2 * interval} every {2 * interval}" in format_node(rules[1])


# --- off -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type", "schedule"), [("int", "every p"), ("list", "on p"), ("string", "mask p"), ("int", "every p since compute")]
)
def test_a_schedule_that_is_off_is_no_rule(type: str, schedule: str) -> None:
    """A rule with `every off`, `on off` or `mask off` is absent."""
    text = f"param p: {type}? = off\nmatch attention {schedule} -> reuse\nmatch feedforward every 2 -> reuse\n"
    rules = resolve(parse(text), {}).rules
    assert ["match feedforward every 2 -> reuse"] == [format_node(rule) for rule in rules]


def test_bounds_and_ranges_that_are_off() -> None:
    """`at most off` bounds nothing and nothing lies in a range that is off."""
    text = "param n: int? = off\nparam r: range? = off\nmatch attention when t in r at most n in a row -> reuse\n"
    (rule,) = resolve(parse(text), {}).rules
    assert () == rule.bounds
    assert ir.Boolean(value=False) == rule.when
    (rule,) = resolve(parse(text), {"n": 2, "r": (0, 10)}).rules
    assert "match attention when t in (0, 10) at most 2 in a row -> reuse" == format_node(rule)


@pytest.mark.parametrize(("names", "selector"), [(["a"], '"a"'), (["a", "b"], '"a" or "b"'), ("a.b", '"a.b"')])
def test_names_as_parameters(names: Any, selector: str) -> None:
    """A string or list parameter stands for its regexes, any of them."""
    type = "string" if isinstance(names, str) else "list"
    text = f"param names: {type} = {'[]' if type == 'list' else repr('x')}\nmatch names every 2 -> reuse\n"
    (rule,) = resolve(parse(text), {"names": names}).rules
    assert parse(f"match {selector} every 2 -> reuse\n").statements[0] == rule


@pytest.mark.parametrize(
    ("text", "settings", "code"),
    [
        ("param n: int = 2\nmatch attention every n -> reuse\n", {"n": 0}, "E163"),
        ("param n: int = 2\nmatch attention every n - 2 -> reuse\n", {}, "E163"),
        ("param n: int = 2\nmatch attention every 2 at most n in all -> reuse\n", {"n": -1}, "E163"),
        ("param l: list = [1]\nmatch attention on l -> reuse\n", {"l": [1, -1]}, "E163"),
        ("param l: list = [1]\nmatch attention on l -> reuse\n", {"l": ["a"]}, "E163"),
        ('param m: string = "10"\nmatch attention mask m -> reuse\n', {"m": "102"}, "E163"),
        ('param r: string = "a"\nmatch r every 2 -> reuse\n', {"r": "(?=a)"}, "E164"),
        ('param r: list = ["a"]\nmatch r every 2 -> reuse\n', {"r": ["a", "("]}, "E164"),
        ('param r: list = ["a"]\nmatch r every 2 -> reuse\n', {"r": [1]}, "E161"),
    ],
)
def test_settings_that_do_not_fit_their_clause(text: str, settings: dict[str, Any], code: str) -> None:
    """What only shows once a setting is in place is an error that names the rule."""
    assert code in codes(refused(resolve, parse(text), settings))


def test_a_list_parameter_is_looked_up_as_a_table(folder: Path) -> None:
    """Its numbers are those of the setting, also through `use`, and the meaning is that of a table."""
    text = "param numbers: list = [1]\nmatch blocks while {}[step] < 2 -> reuse\n"
    table = resolve(parse("table numbers = [3, 1, 4]\nmatch blocks while numbers[step] < 2 -> reuse\n"))
    policy = parse(text.format("numbers"))
    assert table.digest == resolve(policy, {"numbers": [3, 1, 4]}).digest
    (folder / "list.cp").write_text(text.format("numbers"))
    user = folder / "user.cp"
    user.write_text(
        'table numbers = [7]\nuse "./list.cp" with numbers = [3, 1, 4]\nmatch model while numbers[0] < 1 -> reuse\n'
    )
    used = resolve(load(str(user)))
    assert {(7,), (3, 1, 4)} == set(used.tables.values())
    assert ["E161"] == codes(refused(resolve, policy, {"numbers": ["blocks"]}))
    assert ["E110"] == codes(refused(parse, "param n: int = 1\nmatch blocks while n[step] < 2 -> reuse\n"))


def test_a_nested_regex_is_harmless() -> None:
    """`(a+)+$` is taken: RE2 matches in linear time."""
    resolve(parse('match "(a+)+$" every 2 -> reuse\n'), {})


# --- use -------------------------------------------------------------------------------------------------


def test_use_is_the_same_as_writing_it_out(folder: Path) -> None:
    """The used rules stand where `use` stands, with their settings."""
    (folder / "part.cp").write_text(
        "param n: int = 2\nparam r: range = (0, 9)\nmatch attention when t in r every n -> reuse\n"
    )
    (folder / "whole.cp").write_text(
        "param outer: int = 4\nmatch feedforward every 3 -> reuse\n"
        "use 'part.cp' with n = outer, r = (5, 7)\nmatch block every 9 -> reuse\n"
    )
    resolved = resolve(load("./whole.cp"), {"outer": 7})
    expected = (
        "match feedforward every 3 -> reuse\nmatch attention when t in (5, 7) every 7 -> reuse\n"
        "match block every 9 -> reuse\n"
    )
    assert parse(expected).statements == resolved.rules
    assert resolve(parse(expected), {}).digest == resolved.digest
    assert [1, 2, 3] == [source.statement for source in resolved.sources]
    assert ["whole.cp", "part.cp", "whole.cp"] == [Path(s.policy.source_name or "").name for s in resolved.sources]


def test_use_of_a_shipped_policy() -> None:
    """A text may use what ships."""
    rules = resolve(parse("use fora with interval = 5\n"), {}).rules
    assert resolve(load("fora"), {"interval": 5}).rules == rules


def test_names_are_kept_apart(folder: Path) -> None:
    """A used policy's names never capture the user's, nor the other way round."""
    (folder / "part.cp").write_text(
        "param n: int = 2\nlet late = step > n\nsignal drift = l1(output('a'))\ntable w = [1, 2]\n"
        "match 'part' when late and w[step] > 1 while drift < 1 -> reuse\n"
    )
    text = (
        "param n: int = 9\nlet late = step > 100\nsignal drift = l1(output('b'))\ntable w = [3, 4]\nuse 'part.cp'\n"
        "match 'user' when late and w[step] > 1 every n while drift < 1 -> reuse\n"
    )
    (folder / "whole.cp").write_text(text)
    resolved = resolve(load("./whole.cp"), {})
    part, user = map(format_node, resolved.rules)
    assert "step > 2" in part
    assert "step > 100" in user
    signals = {signal.name: format_node(signal.value) for signal in resolved.signals}
    assert {'l1(output("a"))', 'l1(output("b"))'} == set(signals.values())
    assert 'l1(output("b"))' == signals["drift"]
    assert (3, 4) == resolved.tables["w"]
    assert {(1, 2), (3, 4)} == set(resolved.tables.values())
    assert "drift < 1" in user
    assert "drift < 1" in part
    assert " drift < 1" not in part


@pytest.mark.parametrize(
    "name", ["../out.cp", "sub/../../out.cp", "/etc/passwd", "link.cp", "..\\out.cp", "C:/out.cp", "linked/out.cp"]
)
def test_use_stays_in_the_folder(tmp_path: Path, name: str) -> None:
    """No `..`, no absolute path, no link out of the policy's folder."""
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    (tmp_path / "out.cp").write_text(FORA)
    (inside / "link.cp").symlink_to(tmp_path / "out.cp")
    (inside / "linked").symlink_to(tmp_path)
    (inside / "whole.cp").write_text(f"use '{name}'\n")
    assert ["E155"] == codes(refused(resolve, load(inside / "whole.cp"), {}))


def test_use_reaches_folders_below(tmp_path: Path) -> None:
    """Files beside the policy and below may be used, and their own uses are read from where they are."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "one.cp").write_text("use 'two.cp'\n")
    (tmp_path / "sub" / "two.cp").write_text(FORA)
    (tmp_path / "whole.cp").write_text("use './sub/one.cp'\n")
    assert 2 == len(resolve(load(tmp_path / "whole.cp"), {}).rules)


def test_a_text_has_no_folder(folder: Path) -> None:
    """A text uses shipped policies only."""
    (folder / "part.cp").write_text(FORA)
    assert ["E155"] == codes(refused(resolve, parse("use './part.cp'\n"), {}))
    assert ["E150"] == codes(refused(resolve, parse("use 'part.cp'\n"), {}))


def test_circles_show_their_chain(folder: Path) -> None:
    """A circle of `use` is an error that shows it."""
    (folder / "a.cp").write_text("use 'b.cp'\n")
    (folder / "b.cp").write_text("use 'c.cp'\n")
    (folder / "c.cp").write_text("use 'a.cp'\n")
    error = refused(resolve, load("./a.cp"), {})
    assert ["E156"] == codes(error)
    assert "a.cp -> b.cp -> c.cp -> a.cp" in str(error)


def test_use_is_bounded(folder: Path) -> None:
    """Chains and trees of `use` end with an error, not with the machine."""
    for number in range(30):
        (folder / f"p{number}.cp").write_text(f"use 'p{number + 1}.cp'\nuse 'p{number + 1}.cp'\n")
    (folder / "p30.cp").write_text(FORA)
    for number in (0, 20):
        assert ["E157"] == codes(refused(resolve, load(f"./p{number}.cp"), {}))
    assert 2 * 2**5 == len(resolve(load("./p25.cp"), {}).rules)


def test_errors_inside_a_use_name_both(folder: Path) -> None:
    """A setting that a used policy refuses is shown at the `use`, a mistake in its text at its own line."""
    (folder / "part.cp").write_text("param n: int = 2 in [1, 9]\nmatch attention every n -> reuse\n")
    (folder / "broken.cp").write_text("\n\nmatch attention evry 2 -> reuse\n")
    (folder / "whole.cp").write_text("use 'part.cp' with n = 99\n\nuse 'broken.cp'\nuse 'part.cp' with m = 1\n")
    error = refused(resolve, load("./whole.cp"), {})
    assert "whole.cp:1:" in str(error)
    assert "broken.cp:3:" in str(error)
    assert "whole.cp:4:" in str(error)


def test_lets_cannot_blow_up() -> None:
    """Lets that double a hundred times, or a chain that nests, are refused in no time."""
    doubling = "let a0 = step\n" + "".join(f"let a{n + 1} = a{n} + a{n}\n" for n in range(100))
    chain = "let a0 = step\n" + "".join(f"let a{n + 1} = a{n} + 1\n" for n in range(1000))
    for text, last in ((doubling, 100), (chain, 1000)):
        for clause in (f"when a{last} > 1 every 2", f"every a{last}", f"at most a{last} in all"):
            policy = parse(text + f"match attention {clause} -> reuse\n")
            assert ["E165"] == codes(refused(resolve, policy, {}))


# --- the digest ------------------------------------------------------------------------------------------

TEACACHE = """
cachepolicy 1
policy teacache "Tea" # a comment
source "x"
# another
param threshold: float = 0.2 "doc"
param names: list = ["norm1"]
let middle = 0 < step < steps - 1
table weights = [1, 2.5]
signal modulated = output("^a$")
signal change = poly([1, 0], relative_l1(modulated, prev(modulated))) * weights[step]
match blocks when middle while sum(change) < threshold at most 3 in a row -> reuse residual
match names when 100 < t < 800 every 2 -> reuse
"""

EQUAL = {
    "names": TEACACHE.replace("threshold", "limit").replace("middle", "inner").replace("names", "regexes"),
    "signals": TEACACHE.replace("modulated", "m").replace("change", "c").replace("weights", "w"),
    "layout": printed(parse(TEACACHE)),
    "header": "\n".join(TEACACHE.splitlines()[7:]) + '\nparam names: list = ["norm1"]\nparam threshold: float = 0.2\n',
    "constants": TEACACHE.replace("while sum(change) < threshold", "while sum(change) < 0.2").replace(
        "match names", "match 'norm1'"
    ),
    "intervals": TEACACHE.replace("100 < t < 800", "t in (100, 800)"),
    "turned": TEACACHE.replace("100 < t < 800", "800 > t > 100"),
    "unused": TEACACHE + "param unused: int = 3\nlet nothing = 4\nsignal unread = l1(output('b'))\n",
    "numbers": TEACACHE.replace("[1, 2.5]", "[1.0, 2.5]").replace("every 2", "every 1 + 1"),
    "expectations": TEACACHE + "expect blocks over 2 steps with change = 0: C C\n",
}


@pytest.mark.parametrize("name", sorted(EQUAL))
def test_equal_meanings_have_equal_digests(name: str) -> None:
    """Names, layout, comments, order of declarations and what is never read do not count."""
    assert resolve(parse(TEACACHE), {}).digest == resolve(parse(EQUAL[name]), {}).digest


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.2", "0.21"),
        ("1, 2.5", "1, 2.6"),
        ('"^a$"', '"^b$"'),
        ("[1, 0]", "[1, 0.5]"),
        ("every 2", "every 3"),
        ("100 < t", "100 <= t"),
        ("reuse residual", "reuse"),
        ("at most 3", "at most 4"),
        ("-> reuse\n", "-> skip\n"),
        ("match blocks", "match each blocks"),
    ],
)
def test_other_meanings_have_other_digests(old: str, new: str) -> None:
    """Whatever a rule, signal or table says counts."""
    assert resolve(parse(TEACACHE), {}).digest != resolve(parse(TEACACHE.replace(old, new)), {}).digest


def test_rules_count_in_order() -> None:
    """The first match wins, so the order of rules is part of their meaning."""
    one, two = "match attention every 2 -> reuse\n", "match 'a' every 3 -> reuse\n"
    assert resolve(parse(one + two), {}).digest != resolve(parse(two + one), {}).digest


def test_what_a_policy_was_tuned_for_counts_by_its_steps() -> None:
    """The numbers of steps of `tuned` say how a trajectory is counted; its values and their order say nothing."""
    rule = "match model every 2 -> reuse\n"
    one, two = rule + "tuned over 10 steps with guidance = 3\n", rule + "tuned over 10 steps\ntuned over 10 steps\n"
    both = "tuned over 5 steps\n" + one
    assert resolve(parse(one), {}).digest == resolve(parse(two), {}).digest
    assert 3 == len({resolve(parse(text), {}).digest for text in (rule, one, both)})
    assert resolve(parse(both), {}).digest == resolve(parse(one + "tuned over 5 steps\n"), {}).digest


def test_settings_count_by_what_they_change() -> None:
    """A setting that says the default changes nothing; another one does."""
    policy = parse(TEACACHE)
    assert resolve(policy, {}).digest == resolve(policy, {"threshold": 0.2}).digest
    assert resolve(policy, {}).digest != resolve(policy, {"threshold": 0.3}).digest


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(renames=st.lists(st.from_regex(r"\A[a-z]{3,8}_\Z"), min_size=6, max_size=6, unique=True))
def test_digest_under_any_renaming_and_inlining(tmp_path: Path, renames: list[str]) -> None:
    """Whatever the names, written out or used, it is one policy."""
    text = TEACACHE
    for old, new in zip(["threshold", "middle", "names", "modulated", "change", "weights"], renames, strict=True):
        text = text.replace(old, new)
    (tmp_path / "part.cp").write_text(text)
    (tmp_path / "whole.cp").write_text("let middle = step\nuse 'part.cp'\n")
    expected = resolve(parse(TEACACHE), {}).digest
    assert expected == resolve(parse(text), {}).digest
    assert expected == resolve(load(tmp_path / "whole.cp"), {}).digest
