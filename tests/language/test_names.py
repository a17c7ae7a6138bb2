"""What a policy may say where: names, types and places, judged before there is a model."""

from __future__ import annotations

import pytest

from cachepolicy.language.parser import recover

DECLARED = """\
param n: int = 3
param maybe: int? = off
param weight: float = 0.5
param flag: bool = true
param word: string = "attn"
param window: range = (100, 800)
param many: list = ["attn", "ff"]
param at_steps: list = [0, 5]
param letters: string = "1101"
let late = progress > 0.5
let half = steps / 2
let twice = n * 2
table ratios = [1.0, 0.98]
external push: float
signal x = output(model)
signal d = l1(x, prev(x))
"""
LINES = DECLARED.count("\n")


def found(text: str) -> list[str]:
    """The codes of errors that `text` adds to the declarations above."""
    findings = recover(DECLARED + text)[1]
    assert all(each.span is not None and each.span.line > LINES for each in findings if each.severity == "error")
    return [each.code for each in findings if each.severity == "error"]


def helps(text: str) -> list[str | None]:
    return [each.help for each in recover(DECLARED + text)[1] if each.severity == "error"]


@pytest.mark.parametrize(
    "clauses",
    [
        "when 100 < t < 800",
        "when steps > step >= 3",
        "when late and not flag or uncond_skipped",
        'when branch == "cond" and word != "x"',
        "when t in window and step in at_steps and n in {1, 2, n}",
        "when step in {0, 5} and progress in [0, 0.5)",
        'when branch in {"cond", "uncond"} and word in many',
        "when (t if late else sigma) > max(n, abs(weight), ratios[step])",
        "when step in (n, half)",
        "when t in [5, 5]",
        "when age > 2",
        "every n",
        "every maybe",
        "every maybe since compute",
        "every off",
        "every twice + n offset -1",
        "every n from end",
        "on {0, n, 7}",
        "on at_steps",
        'mask "10"',
        "mask letters",
        "at most 3 in a row at most maybe in all",
        "while sum(d) < weight",
        "while push > d and sum(push) < kept(push)",
        "while d < 0.1 and step > 3 and kept(step) < step - 2",
        "while l1(x, kept(x)) / l1(kept(x, 2)) < 0.1",
        "while sum(abs(1 - product(ratios[step]))) < 0.24",
        "while poly([1, -2.5, n], d) < 1 and poly(at_steps, d) < clamp(t, 0, 1)",
        "while prev(prev(d)) < kept(d + 1)",
    ],
)
def test_what_clauses_may_say(clauses: str) -> None:
    """Each of these is sound."""
    assert [] == found(f"match attention {clauses} -> reuse\n")


@pytest.mark.parametrize(
    ("clauses", "code"),
    [
        ("when step", "E111"),
        ("when late + 1 > 2", "E111"),
        ('when t == "x"', "E111"),
        ("when branch < 3", "E111"),
        ("when not t", "E111"),
        ("when n and late", "E111"),
        ("when (1 if late else true) == 1", "E111"),
        ("when t if late else true", "E111"),
        ("when window > 3", "E111"),
        ("when many == 3", "E111"),
        ("when flag in (1, 2)", "E111"),
        ('when t in {1, "a"}', "E111"),
        ("when abs(late) > 1", "E111"),
        ("when poly(3, t) > 1", "E111"),
        ('when poly(["a"], t) > 1', "E111"),
        ("when 100 < t > 50", "E112"),
        ("when t < 3 == 3", "E112"),
        ("when 1 == 1 == 1", "E112"),
        ("when 1 != t != 2", "E112"),
        ("when d < 1", "E113"),
        ("every d", "E113"),
        ("at most d in all", "E113"),
        ("when prev(t) < 1", "E115"),
        ("when sum(t) < 1", "E115"),
        ("every kept(step)", "E115"),
        ("when output(model) == 1", "E114"),
        ("while l1(output(model)) < 1", "E114"),
        ("when push > 1", "E116"),
        ("every push", "E116"),
        ("at most push in all", "E116"),
        ("while x < 1", "E111"),
        ("while l1(d) < 1", "E111"),
        ("while x + 1 < 1", "E111"),
        ("while x == x", "E111"),
        ("while prev(late) == true", "E111"),
        ("while kept(d, 0) < 1", "E124"),
        ("while kept(d, n) < 1", "E124"),
        ("while kept(d, 17) < 1", "E124"),
        ("while prev(sum(d)) < 1", "E115"),
        ("while kept(product(d)) < 1", "E115"),
        ("while l1(x, x, x) < 1", "E106"),
        ("while relative_l1(x) < 1", "E106"),
        ("while min(d) < 1", "E106"),
        ("while prev() < 1", "E106"),
        ("when nosuch < 1", "E101"),
        ("when nosuch[step] < 1", "E101"),
        ("when t in nosuch", "E101"),
        ("on nosuch", "E101"),
        ("mask nosuch", "E101"),
        ("when nosuch(t) < 1", "E105"),
        ("when n(t) < 1", "E105"),
        ("when ratios(step) < 1", "E105"),
        ("when ratios < 1", "E110"),
        ("when abs < 1", "E110"),
        ("when n[step] < 1", "E110"),
        ("when t in n", "E110"),
        ("when t in word", "E110"),
        ("when t in late", "E110"),
        ("on word", "E110"),
        ("on step", "E110"),
        ("mask many", "E110"),
        ("mask d", "E110"),
        ('mask "12"', "E118"),
        ('mask ""', "E118"),
        ("mask word", "E118"),
        ("when maybe > 1", "E120"),
        ("when maybe + 1 > 1", "E120"),
        ("when off == 1", "E120"),
        ("every maybe + 1", "E120"),
        ("every 2 offset maybe", "E120"),
        ("every 0", "E124"),
        ("every -1", "E124"),
        ("every 2.5", "E124"),
        ("every weight", "E111"),
        ("every late", "E111"),
        ("on {-1}", "E124"),
        ("on {0.5}", "E124"),
        ("at most -1 in all", "E124"),
        ("at most 2 in a row at most 3 in a row", "E020"),
        ("when t in (800, 100)", "E124"),
        ("when t in (5, 5]", "E124"),
    ],
)
def test_what_clauses_may_not_say(clauses: str, code: str) -> None:
    """Each of these is one error, with its own code."""
    if clauses == "mask word":
        findings = recover(DECLARED + "match attention mask word -> reuse\n")[1]
        assert [(code, 5)] == [
            (each.code, each.span.line) for each in findings if each.severity == "error" and each.span
        ]
    else:
        assert [code] == found(f"match attention {clauses} -> reuse\n")


@pytest.mark.parametrize(
    ("action", "codes"),
    [
        ("predict linear(weight: push * progress)", []),
        ("predict linear(weight: 0.5 if late else ratios[step], feedback: true)", []),
        ("predict taylor(order: n)", []),
        ("predict hermite(order: 2, scale: weight, feedback: flag) of residual", []),
        ("predict linear", ["E108"]),
        ("predict linear()", ["E108"]),
        ("predict linear(0.5)", ["E001"]),
        ("predict linear(weight: 1, weight: 2)", ["E108"]),
        ("predict linear(weight: 1, order: 2)", ["E108"]),
        ("predict linear(weight: d)", ["E121"]),
        ("predict linear(weight: prev(t))", ["E115"]),
        ("predict linear(weight: late)", ["E111"]),
        ("predict linear(weight: 1, feedback: 1)", ["E111"]),
        ("predict taylor(order: step)", ["E121"]),
        ("predict taylor(order: push)", ["E121"]),
        ("predict taylor(order: half)", ["E113"]),
        ("predict taylor(order: 1.5)", ["E124"]),
        ("predict taylor(order: 9)", ["E124"]),
        ("predict taylor(order: maybe)", ["E120"]),
        ("predict tailor(order: 1)", ["E107"]),
        ('approximate uncond spectral(low: 1, high: 1, layout: "uncond first")', ["E123"]),
        ('approximate uncond spectrl(low: 1, high: 1, layout: "uncond first")', ["E107", "E123"]),
    ],
)
def test_arguments_of_actions(action: str, codes: list[str]) -> None:
    """Answers are weighed by the clock and externals alone."""
    assert codes == sorted(found(f"match attention every 3 -> {action}\n"))


@pytest.mark.parametrize(
    ("selector", "codes"),
    [
        ("word or many", []),
        ("blocks[n:twice]", []),
        ("blocks[-n]", []),
        ('each blocks[1:] and "^single" or not each blocks of "^layers$"', []),
        ("nosuch", ["E101"]),
        ("n", ["E110"]),
        ("late", ["E110"]),
        ("at_steps", ["E111", "E111"]),
        ("maybe", ["E110"]),
        ("blocks and attention", ["E119"]),
        ("not blocks", ["E119"]),
        ("attention or blocks[0]", ["E119"]),
        ("(blocks)", []),
        ("blocks[step]", ["E113"]),
        ("blocks[half:]", ["E113"]),
        ("blocks[d]", ["E113"]),
        ("blocks[ratios[0]]", ["E113"]),
        ("blocks[0.5]", ["E124"]),
        ("blocks[maybe:]", ["E120"]),
        ('blocks of "("', ["E017"]),
    ],
)
def test_selectors(selector: str, codes: list[str]) -> None:
    """Sets are joined, spans stand alone, positions are fixed."""
    findings = recover(f"{DECLARED}match {selector} -> skip\n")[1]
    assert codes == [each.code for each in findings if each.severity == "error"]


@pytest.mark.parametrize(
    ("param", "code"),
    [
        ("a: int = 3 in [1, 5]", None),
        ("a: int = -3", None),
        ("a: int = 2 * 3", None),
        ("a: float = 3", None),
        ("a: float? = off in (0, 1)", None),
        ("a: bool = false", None),
        ('a: string = "x" in {"x", "y"}', None),
        ("a: range = [1, 5]", None),
        ("a: range = (1, inf) in [0, inf]", None),
        ('a: list = [1, 2.5, "a"]', None),
        ("a: list = []", None),
        ("a: int = 3.0", "E161"),
        ('a: int = "x"', "E161"),
        ("a: int = true", "E161"),
        ("a: int = off", "E161"),
        ("a: bool = 1", "E161"),
        ("a: string = 1", "E161"),
        ("a: range = 1", "E161"),
        ("a: range = [1, 2, 3]", "E161"),
        ("a: list = 1", "E161"),
        ("a: int = 6 in [1, 5]", "E162"),
        ("a: int = 5 in [1, 5)", "E162"),
        ('a: string = "z" in {"x", "y"}', "E162"),
        ("a: range = (1, 5) in [2, 9]", "E162"),
        ("a: list = [1, 9] in [0, 5]", "E162"),
        ("a: range = (5, 1)", "E124"),
        ("a: int = 3 in [5, 1]", "E124"),
        ('a: string = "x" in (0, 1)', "E111"),
        ("a: int = n", "E113"),
        ("a: int = step", "E113"),
        ("a: int = 3 in [1, n]", "E113"),
        ("a: int = nosuch", "E101"),
        ("n: int = 3", "E102"),
        ("step: int = 3", "E103"),
        ("sum: int = 3", "E103"),
        ("trace: int = 3", "E104"),
        ("memory_limit: int = 3", "E104"),
        ("max_sessions: int = 1", "E104"),
        ("sites: int = 1", "E104"),
        ('branch: string = "cond"', "E103"),
    ],
)
def test_parameters(param: str, code: str | None) -> None:
    """Defaults are constants of the type, within the domain; names are free."""
    assert ([code] if code else []) == found(f"param {param}\n")


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        ("let a = late or t > 3", None),
        ('let a = "x" if late else branch', None),
        ("let a = ratios[step] + twice", None),
        ('signal a = argument(model, "temb")', None),
        ("signal a = kept(x)", None),
        ("signal a = d + prev(d) * t", None),
        ("use other with a = n, b = maybe, c = twice + 1, d = (1, 2), e = [1, 2], f = off", None),
        ("expect attention over 2 steps with t = [9, 0], d = 0.5, push = [1, 2], n = 4: C C", None),
        ("let a = [1, 2]", "E111"),
        ("let a = d", "E113"),
        ("let a = push", "E116"),
        ("let a = prev(t)", "E115"),
        ("let a = a + 1", "E109"),
        ("let a = b\nlet b = c\nlet c = a", "E109"),
        ("let late = 3", "E102"),
        ("table ratios = [1]", "E102"),
        ("external t: float", "E103"),
        ("external a: int", "E001"),
        ("signal a = late", "E111"),
        ("signal a = sum(d)", "E115"),
        ("signal a = push", "E116"),
        ("signal a = x + 1", "E111"),
        ("signal a = argument(model)", "E106"),
        ('signal a = input(model, "x")', "E106"),
        ("signal a = output(nosuch)", "E101"),
        ("signal a = output(n)", "E110"),
        ('signal a = output("(")', "E017"),
        ("signal a = prev(a)", "E109"),
        ("use other with a = 1, a = 2", "E102"),
        ("use other with a = step", "E113"),
        ("use other with a = late", "E113"),
        ("use other with a = d", "E113"),
        ("use other with a = nosuch", "E101"),
        ("expect attention over 3 steps: C C", "E117"),
        ("expect attention over 2 steps with t = [1, 2, 3]: C C", "E117"),
        ("expect attention over 0 steps: C", "E124"),
        ("expect attention over 1 steps with nosuch = 1: C", "E101"),
        ("expect attention over 1 steps with late = true: C", "E110"),
        ("expect attention over 1 steps with t = n: C", "E113"),
        ("expect nosuch over 1 steps: C", "E101"),
    ],
)
def test_other_statements(statement: str, code: str | None) -> None:
    """Lets are of clock and parameters, signals of probes and memory, settings of constants."""
    assert ([code] if code else []) == found(f"{statement}\n")


def test_rules_on_the_model_do_not_read_what_follows_from_them() -> None:
    """Through lets neither; other sites may."""
    text = "let a = uncond_skipped\nmatch {} when a every 2 -> reuse\n"
    assert ["E122"] == found(text.format("model"))
    assert ["E122"] == found(text.format("attention or model"))
    assert [] == found(text.format("attention"))
    assert [] == found(text.format("attention and model"))


@pytest.mark.parametrize(
    ("text", "help"),
    [
        ("match attention when stp < 3 -> skip", "did you mean the clock word `step`?"),
        ("match attention when timestep < 3 -> skip", "did you mean the clock word `t`?"),
        ("match attention when num_inference_steps < 3 -> skip", "did you mean the clock word `steps`?"),
        ("match attention when wieght < 3 -> skip", "did you mean the parameter `weight`?"),
        ("match attention when lat -> skip", "did you mean the let `late`?"),
        ("match attention when flag == True -> skip", "did you mean `true`?"),
        ("match attention when branch == cond -> skip", 'the name of a branch is a string: `"cond"`'),
        ("match atention -> skip", "did you mean `attention`?"),
        ("match manny -> skip", "did you mean the parameter `many`?"),
        ("match attention when ratio[step] < 1 -> skip", "did you mean the table `ratios`?"),
        ("match attention when abz(t) < 1 -> skip", "did you mean `abs`?"),
        ("match attention when ratios < 1 -> skip", "write `ratios[step]`"),
        ("match attention -> predict linaer(weight: 1)", "did you mean `linear`?"),
        ("match attention -> predict linear(wight: 1)", "did you mean `weight`?"),
        ("match attention when d < 1 -> skip", "conditions on signals stand after `while`"),
    ],
)
def test_suggestions(text: str, help: str) -> None:
    """The way out names what was probably meant, and what that is."""
    assert [help] == helps(text + "\n")


@pytest.mark.parametrize(
    ("rules", "codes"),
    [
        ("match block while sum(relative_l1(x, kept(x))) < 1 -> reuse", ["W501"]),
        ("match block while sum(step - kept(step)) < 1 -> reuse", ["W501"]),
        ("signal e = l1(x, kept(x))\nmatch block while sum(2 * e) < 1 -> reuse", ["W501"]),
        ("signal e = l1(x, kept(x))\nlet one = 1\nsignal f = e * one\nmatch block while sum(f) < 1 -> reuse", ["W501"]),
        ("match block while sum(product(l1(x, kept(x)))) < 1 -> reuse", ["W501"]),
        ("match block while l1(x, kept(x)) < 1 -> reuse", []),
        ("match block while sum(l1(x, prev(x)) / l1(kept(x))) < 1 -> reuse", []),
        ("match block while sum(l1(kept(x), kept(x, 2)) * d) < 1 -> reuse", []),
        ("match block while d < 1 -> reuse", ["W502"]),
        ("match block while l1(x, prev(x)) < 1 -> reuse", ["W502"]),
        ("match block while sum(d) < 1 and d < 1 -> reuse", ["W502"]),
        ("match block while sum(d) < 1 -> reuse", []),
        ("match block while l1(prev(x)) < 1 -> reuse", []),
    ],
)
def test_doubtful_anchors(rules: str, codes: list[str]) -> None:
    """A `sum` over `kept` and a bare `prev` are warned of, what only weighs is not."""
    head = "signal x = output(model)\nsignal d = l1(x, prev(x))\n"
    read = "match attention while sum(d) < 1 -> reuse\n"
    assert codes == [each.code for each in recover(f"{head}{rules}\n{read}")[1]]


def test_what_nothing_reads_is_warned_of() -> None:
    """Each left-over name once; names in selectors, settings and expectations are read."""
    findings = recover(DECLARED + "match many -> skip\nuse other with a = n\n")[1]
    unread = {
        "maybe",
        "weight",
        "flag",
        "word",
        "window",
        "at_steps",
        "letters",
        "late",
        "half",
        "twice",
        "ratios",
        "push",
        "d",
    }
    assert unread == {each.message.split("`")[1] for each in findings}
    assert {"W503", "W504"} == {each.code for each in findings}
    assert [] == [each for each in recover(DECLARED + "match manny -> skip\n")[1] if each.severity == "warning"]


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ('tuned over 4 steps with sigmas = [1, 0.5], denoiser = "A", adapters = [], n = 3, guidance = inf', []),
        ("tuned over 4 steps with guidance = 1, guidance = 2", ["E102"]),
        ("tuned over 4 steps with guidance = step", ["E113"]),
        ("tuned over 0 steps", ["E124"]),
        ("tuned over 4 steps with model = 3", ["E008"]),
        ("tuned 4 steps", ["E001"]),
        ("let tuned = 3\nmatch attention when tuned > step -> reuse", []),
        ("policy tuned", ["E009"]),
    ],
)
def test_what_a_policy_was_tuned_for(text: str, codes: list[str]) -> None:
    """Constants under any names; `tuned` is a word at the start of a statement only."""
    assert codes == found(f"{text}\n")


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("param a: int = b[0]\nmatch attention every a -> reuse\n", ["E113"]),
        ("match each blocks[b[0]:] every 2 -> reuse\n", ["E113"]),
        ("match attention -> predict taylor(order: b[0])\n", ["E121"]),
        ("use fora with interval = b[0]\n", ["E113"]),
        ("match attention every 2 -> reuse\nexpect attention over 1 steps with t = b[0]: C\n", ["E113"]),
        ("match attention every b[0] -> reuse\n", ["W505"]),
        ("match attention -> predict linear(weight: b[0])\n", []),
        ("match attention when t > b[step] while sum(b[age]) < 3 -> reuse\n", []),
    ],
)
def test_a_list_parameter_is_looked_up_where_a_table_is(text: str, codes: list[str]) -> None:
    """A place that takes no table takes no lookup in a list parameter either."""
    for declared in ("table b = [1, 2.5]\n", "param b: list = [1, 2.5]\n"):
        assert codes == [each.code for each in recover(declared + text)[1]]
