"""What is judged without a model: doubtful rules, and the expectations that policies carry."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepolicy._resources import shipped_policies
from cachepolicy.errors import Diagnostic, PolicyError
from cachepolicy.language import ir
from cachepolicy.language.loader import load
from cachepolicy.language.parser import parse
from cachepolicy.planning.check import check, check_text, run_expectations
from cachepolicy.planning.module_tree import sites_skeleton
from cachepolicy.planning.simulation import evenly, simulate

RULE = "match attention every 2 -> reuse\n"


def codes(findings: tuple[Diagnostic, ...]) -> list[str]:
    return [each.code for each in findings]


# --- shipped policies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_policies())
def test_shipped_policies_are_sound_and_covered(name: str) -> None:
    """Every shipped policy checks without a finding, holds its expectations and has each rule reached."""
    assert () == check(name)
    report = run_expectations(name)
    assert report.outcomes
    assert () == report.findings
    assert report.hold


def test_pab_has_the_knobs_of_diffusers() -> None:
    """Defaults of ranges and names are those of `PyramidAttentionBroadcastConfig`."""
    params = {each.name: each for each in load("pab").statements if isinstance(each, ir.Param)}
    assert {
        f"{kind}_{knob}" for kind in ("spatial", "temporal", "cross") for knob in ("every", "range", "names")
    } == set(params)
    config = pytest.importorskip("diffusers").PyramidAttentionBroadcastConfig()
    for kind in ("spatial", "temporal", "cross"):
        names = getattr(config, f"{kind}_attention_block_identifiers")
        default = params[f"{kind}_names"].default
        assert isinstance(default, ir.ListOf)
        assert tuple(names) == tuple(item.value for item in default.items if isinstance(item, ir.Text))
        low, high = getattr(config, f"{kind}_attention_timestep_skip_range")
        default = params[f"{kind}_range"].default
        assert ir.Interval(low=ir.Number(value=low), high=ir.Number(value=high)) == default


@given(st.integers(1, 7), st.integers(2, 30), st.integers(-50, 1000), st.integers(1, 600))
def test_pab_is_diffusers_rule(every: int, steps: int, low: int, width: int) -> None:
    """Compute at the first step, outside the open range, and at every Nth step counted from the first."""
    high = low + width
    schedule = simulate("pab", steps=steps, spatial_every=every, spatial_range=(low, high))
    timesteps = evenly(steps)
    expected = "".join(
        "C" if step == 0 or not low < timesteps[step] < high or step % every == 0 else "R" for step in range(steps)
    )
    assert expected == schedule.rows["transformer_blocks.0.attn1"]


@given(st.integers(1, 9), st.integers(1, 30))
def test_fora_counts_from_the_end(interval: int, steps: int) -> None:
    """The last step computes, and every Nth before it; the first has nothing to answer from."""
    row = simulate("fora", steps=steps, interval=interval).rows["transformer_blocks.0.ff"]
    assert "".join("C" if step == 0 or (steps - 1 - step) % interval == 0 else "R" for step in range(steps)) == row


# --- expectations ----------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 12), st.data())
def test_an_expectation_holds_where_its_row_is_the_schedule(every: int, steps: int, data: st.DataObject) -> None:
    """Any other row fails, at the first step that differs."""
    row = "".join("C" if step % every == 0 else "R" for step in range(steps))
    written = data.draw(st.text("CR", min_size=steps, max_size=steps) | st.just(row))
    text = f"match attention every {every} -> reuse\nexpect attention over {steps} steps: {' '.join(written)}\n"
    report = run_expectations(parse(text))
    assert (written == row) == report.hold
    if not report.hold:
        (finding,) = report.outcomes[0].findings
        first = next(step for step in range(steps) if written[step] != row[step])
        assert "E220" == finding.code
        assert " ".join(row) in finding.message
        assert f"at step {first} " in (finding.help or "")


@pytest.mark.parametrize(
    ("expectation", "findings"),
    [
        ("attention over 4 steps: C R C C", []),
        ("attention over 4 steps with every_ = 3: C R R C", []),
        ("attention over 4 steps with t = [999, 50, 40, 0]: C C C C", []),
        ("attention over 4 steps with t = 500: C R C R", []),
        ("feedforward over 4 steps: C C C C", []),
        ('"attn1.to_q" over 2 steps with t = 500: C C', ["E220"]),
        ("names over 4 steps: C R C C", []),
        ('names over 4 steps with names = ["ff"]: C C C C', []),
        ("attention over 4 steps with every_ = 0: C C C C", ["E162"]),
        ('"nothing" over 4 steps: C C C C', ["E200"]),
        ("blocks[99] over 4 steps: C C C C", ["E201"]),
    ],
)
def test_settings_of_expectations(expectation: str, findings: list[str]) -> None:
    """`with` sets parameters and the clock; what does not fit is the expectation's finding."""
    text = (
        'param every_: int = 2 in [1, 9]\nparam names: list = ["attn1$"]\n'
        f"match attention when 100 < t < 900 every every_ -> reuse\nexpect {expectation}\n"
    )
    assert findings == [each.code for outcome in run_expectations(parse(text)).outcomes for each in outcome.findings]


def test_signals_of_expectations() -> None:
    """A signal is one number, or one a step."""
    text = """
signal drift = l1(residual(blocks[0]))
match blocks[1:] while drift < 0.5 -> reuse residual
expect blocks[1:] over 4 steps with drift = 0.1: C R R R
expect blocks[1:] over 4 steps with drift = [0, 0.4, 0.5, 0.1]: C R C R
expect blocks[1:] over 4 steps: C R R R
"""
    report = run_expectations(parse(text))
    assert [True, True, False] == [each.holds for each in report.outcomes]
    assert "drift" in report.outcomes[2].findings[0].message


def test_every_selected_site_must_give_the_row() -> None:
    """One site that differs is enough, and is named."""
    text = 'match "0.attn1$" every 3 -> reuse\nmatch attention every 2 -> reuse\nexpect attention over 3 steps: C R C\n'
    report = run_expectations(parse(text))
    (finding,) = report.outcomes[0].findings
    assert finding.message.startswith("`transformer_blocks.0.attn1` gives C R R")
    assert "every 3" in (finding.help or "")


def test_rules_that_no_expectation_reaches() -> None:
    """Coverage goes by who owns a selected site, over all expectations and their settings."""
    text = """
param n: int? = off
match attention when t > 500 every 2 -> reuse
match attention when t > 2000 every 3 -> reuse
match feedforward every n -> reuse
match "norm1" every 2 -> reuse
expect attention over 4 steps: C R C C
expect feedforward over 4 steps with n = 2: C R C R
"""
    report = run_expectations(parse(text))
    assert report.hold
    assert ["W520", "W520"] == codes(report.uncovered)
    assert [4, 6] == [each.span.line for each in report.uncovered if each.span]


def test_expectations_on_another_model() -> None:
    """A skeleton takes the place of the built-in one."""
    skeleton = sites_skeleton(["layers.0.attention", "layers.1.attention"])
    text = 'match "^layers.*attention" every 2 -> reuse\nexpect "^layers.*attention" over 2 steps: C R\n'
    assert run_expectations(parse(text), skeleton).hold
    report = run_expectations(parse(text))
    assert ["E200"] == codes(report.outcomes[0].findings)


def test_used_rules_are_not_counted() -> None:
    """A policy answers for its own rules; those it uses have their own expectations."""
    text = "use fora with interval = 2\nexpect attention over 4 steps: C C R C\n"
    report = run_expectations(parse(text))
    assert report.hold
    assert () == report.uncovered


# --- checks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RULE, []),
        (RULE + "match attention when t > 5 every 3 -> reuse\n", ["W510"]),
        (RULE + "match self_attention every 3 -> reuse\n", []),
        ("match attention when 800 < t < 100 every 2 -> reuse\n", ["W512"]),
        ("", ["W506"]),
        ("# a comment\nlet half = steps / 2\n", ["W506", "W504"]),
        ("match attention every 1 -> reuse\n", ["W513"]),
        ("param n: int = 1\nmatch attention every n since compute -> reuse\n", ["W513"]),
        ('match attention mask "111" -> reuse\n', ["W513"]),
        ("match attention at most 0 in a row -> reuse\n", ["W513"]),
        ("match attention every 1 -> compute\n", []),
        ('match attention when branch in {"uncond", "unc"} every 2 -> reuse\n', ["W514"]),
        ("match attention every 2 -> reuse follow conditional\n", ["W514"]),
        ('match attention when branch != "pred_cond" every 2 -> reuse follow cond\n', []),
        ("match attention every 2 + step / 10 -> reuse\n", ["W505"]),
        ("match attention every 2 offset t at most progress * 4 in all -> reuse\n", ["W505", "W505"]),
        ("let n = 1 + sqrt(steps)\nmatch attention every n -> reuse\n", ["W505"]),
        ("table n = [2, 2.5]\nmatch attention every n[step] -> reuse\n", ["W505"]),
        ("table n = [2.5]\nlet first = n[0]\nlet more = first + 1\nmatch attention every more -> reuse\n", ["W505"]),
        ("let half = step / 2\nlet more = half + 1\nmatch attention every more -> reuse\n", ["W505"]),
        ("match attention every 5 / 2 -> reuse\n", ["E163"]),
        ("param n: int = 5\nlet half = n / 2\nmatch attention every half -> reuse\n", ["E163"]),
        ("param n: int = 4\nlet half = n / 2\nmatch attention every half -> reuse\n", []),
        ("table n = [2, 3]\nmatch attention every max(n[step], steps % 4) -> reuse\n", []),
        ("match attention every 6 / 2 at most (3 if t > 5 else step) in a row -> reuse\n", []),
        ("param n: int = 1\nmatch attention every n - 1 -> reuse\n", ["E163"]),
        ("use nothing_of_the_kind\n", ["E150"]),
        ("use pab with spatial_evry = 3\n", ["E160"]),
        ("match attention evry 2 -> reuse\nmatch attention when tt > 1 every 2 -> reuse\n", ["E001", "E101"]),
    ],
)
def test_check(text: str, expected: list[str], tmp_path: Path) -> None:
    """The same findings for a text, a file and a policy; only a sound text is followed further."""
    assert expected == codes(check_text(text))
    (tmp_path / "policy.cp").write_text(text)
    assert expected == codes(check(tmp_path / "policy.cp"))
    if "E001" not in expected:
        assert expected == codes(check(parse(text)))


def test_a_text_under_its_path_uses_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An editor's text is checked as the file it will be."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "part.cp").write_text(RULE)
    (tmp_path / "policy.cp").write_text("")
    assert [] == codes(check_text("use 'part.cp'\n", source="policy.cp"))
    assert ["E150"] == codes(check_text("use 'part.cp'\n"))


@pytest.mark.parametrize("relative", [True, False])
def test_a_text_is_shown_as_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool) -> None:
    """What is found in a text that was not saved shows its own lines, under the name that it was given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.cp").write_text("# one line\n")
    name = "mine.cp" if relative else str(tmp_path / "mine.cp")
    (found,) = check_text(f"\n\n{RULE}\n{RULE}", source=name)
    assert ("W510", name, (RULE.strip(),)) == (found.code, found.source, found.excerpt)
    (related,) = found.related
    assert (str(tmp_path / "mine.cp"), 3) == (related.source, related.span.line)


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    """A finding shows the lines of the file as they were when the policy was loaded."""
    path = tmp_path / "mine.cp"
    path.write_text(f"\n\n{RULE}{RULE}")
    policy = load(path)
    path.write_text("")
    (found,) = check(policy)
    assert ("W510", (RULE.strip(),)) == (found.code, found.excerpt)


def test_errors_of_parsed_texts_show_their_lines() -> None:
    """What is found when a parsed text meets its params and its model shows the line of the text."""
    policy = parse('param n: int = 2\nmatch attention every n -> reuse\nmatch optional "nothing" -> reuse\n')
    for settings, line in [({"n": 0}, 2), ({"n": "no"}, None)]:
        with pytest.raises(PolicyError) as raised:
            simulate(policy, steps=4, **settings)
        shown = ("match attention every n -> reuse",) if line else ()
        assert shown == raised.value.diagnostics[0].excerpt
    with pytest.raises(PolicyError) as raised:
        simulate(parse('policy mine\n\nmatch "nothing" every 2 -> reuse\n'), steps=4)
    (found,) = raised.value.diagnostics
    assert ("E200", "<text>", ('match "nothing" every 2 -> reuse',)) == (found.code, found.source, found.excerpt)


def test_warnings_of_names_are_checked_too() -> None:
    """What nothing reads is doubtful, told once."""
    assert ["W503"] == codes(check(parse("param unread: int = 2\n" + RULE)))


def test_policies_built_by_hand_are_held_to_the_rules() -> None:
    """A policy from Python with unknown names is an error, told once."""
    rule = ir.Rule(selector=ir.OfKind(of="attention"), when=ir.Name(name="nothing"), action=ir.Reuse())
    assert "E101" in codes(check(ir.Policy(statements=(rule,))))


@given(st.text(max_size=300) | st.binary(max_size=300))
def test_any_text_is_checked(text: str | bytes) -> None:
    """Checking never raises."""
    check_text(text)
