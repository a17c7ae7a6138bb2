"""`explain`: every rule that was asked, each clause with its truth and what it read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cachepolicy
from cachepolicy.errors import PolicyError
from cachepolicy.language.parser import parse
from cachepolicy.planning.simulation import simulate
from cachepolicy.reports.explanation import Explanation, explain, explain_decision, explain_run
from cachepolicy.testing import strategies

SITE = "transformer_blocks.0.attn1"


def why(text: str, step: int, steps: int = 10, site: str = SITE, **options: Any) -> Explanation:
    return explain(parse(text), f"{site}@{step}", steps=steps, **options)


@given(st.data())
def test_the_clauses_say_what_was_decided(data: st.DataObject) -> None:
    """For any policy, site and step: the owner's clauses are all true exactly where it reuses."""
    policy = data.draw(strategies.policies(selectors=(*strategies.SELECTORS, "blocks"), follow="cond"))
    branches = data.draw(strategies.branches())
    schedule = simulate(policy, steps=12, branches=branches)
    site = data.draw(st.sampled_from(schedule.plan.sites))
    step, branch = data.draw(st.integers(0, 11)), data.draw(st.sampled_from(branches))
    decision = schedule.decision(site.name, step, branch)
    explanation = explain_decision(schedule.plan, site.name, step, branch, decision)
    assert str(explanation).startswith(site.name)
    if decision.verdict == "hidden":
        assert () == explanation.asked
        return
    mine = [rule.index for rule in schedule.plan.rules if site.index in rule.sites]
    assert mine == [asked.rule for asked in explanation.asked]
    for asked in explanation.asked:
        if asked.rule == decision.rule:
            assert "owns the step" == asked.outcome
            computes = decision.reason == "the rule computes"
            assert (decision.verdict == "reuse") == (all(each.holds for each in asked.clauses) and not computes)
        elif decision.rule is None or asked.rule < decision.rule:
            assert "does not own the step" == asked.outcome
            assert not all(each.holds for each in asked.clauses)
        else:
            assert "was not asked" in asked.outcome
            assert () == asked.clauses


def test_values_are_shown() -> None:
    """Each clause names the numbers it read."""
    text = str(why("match attention when 100 < t < 800 every 2 -> reuse", 3))
    assert f"{SITE} reuses at step 3: the rule reuses" in text
    assert "yes  when 100 < t < 800   (t = 666)" in text
    assert "yes  every 2 does not ask for a compute" in text
    assert "step = 3" in text


def test_losing_rules_are_shown_with_their_clauses() -> None:
    """The rule above that did not own the step, and the one below that was not asked."""
    text = "match attention when step < 2 -> reuse\nmatch attention every 3 -> reuse\nmatch attention -> reuse"
    explanation = why(text, 3)
    assert ["does not own the step", "owns the step", "was not asked: an earlier rule owns the step"] == [
        asked.outcome for asked in explanation.asked
    ]
    assert "no   when step < 2   (step = 3)" in str(explanation)


def test_accumulators_show_their_sum() -> None:
    """`sum` is shown as it was compared."""
    text = str(why("match attention while sum(1) < 3 -> reuse", 3))
    assert "no   while sum(1) < 3   (sum(1) = 3)" in text
    assert "computes at step 3: its `while` is false" in text


def test_bounds_show_the_age() -> None:
    """`at most N in a row` fails with the age that it saw."""
    assert "no   at most 2 in a row   (age = 3)" in str(why("match attention at most 2 in a row -> reuse", 3))


def test_a_site_without_history_says_so() -> None:
    """At the first step nothing is kept yet."""
    text = str(why("match attention -> reuse", 0))
    assert "computes at step 0: nothing is kept yet" in text
    assert "no   something is kept from an earlier step" in text


def test_an_undefined_value_is_named() -> None:
    """What is not there yet is called undefined."""
    assert "undefined" in str(why("match attention while prev(t) > 0 -> reuse", 0))


def test_no_owner_and_hidden_are_explained() -> None:
    """Where no rule owns the step, and where a site around hides it."""
    assert "computes at step 1: no rule owns it" in str(why("match attention when t < 0 -> reuse", 1))
    hidden = str(why("match block every 2 -> reuse\nmatch attention -> reuse", 1))
    assert f"{SITE} is hidden at step 1: inside a site that reuses" == hidden


def test_a_follower_names_its_leader() -> None:
    """On another branch the clause is what the leader did."""
    text = "match attention while sum(1) < 3 -> reuse follow cond"
    explanation = why(text, 3, branches=("cond", "uncond"), branch="uncond")
    assert "on branch `uncond`: `cond` computed" in str(explanation)
    assert "no   follow cond   (because = `cond` computed)" in str(explanation)


def test_a_fact_of_the_run_is_a_clause() -> None:
    """What only the run knew is shown as what failed."""
    facts = {(SITE, 3, ""): "the history does not fit this call"}
    assert "no   the history does not fit this call" in str(why("match attention -> reuse", 3, facts=facts))


@pytest.mark.parametrize("where", ["attn1", "attn1@", "@3", "attn1@x", "attn1@-1", "attn1@3.5"])
def test_a_place_is_site_at_step(where: str) -> None:
    """E258 shows the form."""
    with pytest.raises(PolicyError, match=r"E25[28]"):
        explain(parse("match attention -> reuse"), where, steps=10)


def test_unknown_sites_and_steps_are_refused() -> None:
    """As `Schedule.decision` does."""
    with pytest.raises(PolicyError, match="E252"):
        why("match attention -> reuse", 3, site="nowhere")
    with pytest.raises(PolicyError, match="E253"):
        why("match attention -> reuse", 99)
    with pytest.raises(PolicyError, match=r"E25\d"):
        why("match attention -> reuse", 3, branch="cond")


def test_a_run_is_explained_as_a_simulation_is() -> None:
    """A decision of the trace carries its inputs, so that it explains itself."""
    from cachepolicy.testing.models import Toy, inputs, sample

    model = Toy().build()
    with torch.no_grad(), cachepolicy.apply(model, parse("match attention when t < 900 every 2 -> reuse")) as run:
        list(sample(model, [950.0, 850.0, 750.0], *inputs(Toy())))
    call = run.trace.last.calls[1]
    site = run.trace.last.plan.sites[0]
    explanation = explain_decision(run.trace.last.plan, site.name, 1, "", call.decisions[site.index])
    assert "yes  when t < 900   (t = 850)" in str(explanation)


# --- runs that are over ----------------------------------------------------------------------------------


@pytest.fixture
def traced(tmp_path):
    """A run on a toy by a signal and a clock, and the file that its trace was saved to."""
    from cachepolicy.testing.models import Toy, inputs, sample

    text = "match attention when t > 900 -> compute\nmatch attention every 2 while sum(t) < 9000 -> reuse\n"
    model = Toy().build()
    with torch.no_grad(), cachepolicy.apply(model, parse(text)) as run:
        list(sample(model, (950.0, 850.0, 750.0, 650.0), *inputs(Toy())))
        run.trace.save(tmp_path / "trace.json")
        return run.trace.last, tmp_path / "trace.json"


def test_every_decision_of_a_saved_run_is_explained_as_it_was_in_the_run(traced):
    """From the file come the same rules, clauses and values as from the run itself."""
    from cachepolicy.tracing.trace import load_trace

    trajectory, file = traced
    again = load_trace(file).last
    for call in trajectory.calls:
        for site in trajectory.plan.sites:
            where = f"{site.name}@{call.tick.step}"
            assert str(explain_run(trajectory, where)) == str(explain_run(again, where))


def test_a_run_names_the_rule_and_why_the_earlier_one_did_not_decide(traced):
    """Rule 1 lost by its `when`, with the timestep of the run; rule 2 owns the step."""
    told = str(explain_run(traced[0], "blocks.0.attn@1"))
    assert "reuses at step 1" in told
    assert "no   when t > 900   (t = 850)" in told
    assert "yes  while sum(t) < 9000" in told


def test_places_that_the_run_does_not_have_are_refused(traced):
    """An unknown site with the nearest one, a step that never ran, a branch that never ran."""
    with pytest.raises(PolicyError, match=r"blocks\.0\.attn"):
        explain_run(traced[0], "blocks.0.atn@1")
    with pytest.raises(PolicyError, match="no step 9"):
        explain_run(traced[0], "blocks.0.attn@9")
    with pytest.raises(PolicyError, match="branch `cond`"):
        explain_run(traced[0], "blocks.0.attn@1", branch="cond")


def test_the_command_explains_a_saved_run(traced):
    """`--trace` stands for the policy; both, or a trajectory that is not there, are usage errors."""
    from click.testing import CliRunner

    from cachepolicy.cli.commands import main

    file = str(traced[1])
    result = CliRunner().invoke(main, ["explain", "blocks.0.attn@1", "--trace", file])
    assert 0 == result.exit_code
    assert "blocks.0.attn reuses at step 1" in result.stdout
    assert 2 == CliRunner().invoke(main, ["explain", "pab", "blocks.0.attn@1", "--trace", file]).exit_code
    assert 2 == CliRunner().invoke(main, ["explain", "blocks.0.attn@1", "--trace", file, "--trajectory", "5"]).exit_code
    assert 2 == CliRunner().invoke(main, ["explain", "blocks.0.attn@1"]).exit_code


def test_an_audited_answer_is_explained_with_its_error(tmp_path):
    """The explanation, its JSON form, the page and the terminal show the recorded error, and no speed-up."""
    import json

    from click.testing import CliRunner

    from cachepolicy.cli.commands import main
    from cachepolicy.reports.html.page import page
    from cachepolicy.reports.stats import gains
    from cachepolicy.reports.text import draw
    from cachepolicy.testing.models import Toy, inputs, sample

    options = cachepolicy.RunOptions(audit=1.0)
    policy = parse("match attention every 2 -> reuse")
    with torch.no_grad(), cachepolicy.apply(Toy().build(), policy, options=options) as run:
        list(sample(run.target, (950.0, 850.0, 750.0, 650.0), *inputs(Toy())))
        trajectory, file = run.trace.last, tmp_path / "trace.json"
        run.trace.save(file)
    error = trajectory.calls[1].errors[0]
    assert f"audited: the answer is {error:.2%} off" in str(explain_run(trajectory, "blocks.0.attn@1"))
    assert "audited" not in str(explain_run(trajectory, "blocks.0.attn@0"))
    command = ["explain", "blocks.0.attn@1", "--trace", str(file), "--json"]
    assert error == json.loads(CliRunner().invoke(main, command).output)["error"]
    worst = max(error for call in trajectory.calls for error in call.errors.values())
    for text in (page([trajectory]), draw(trajectory), str(run.trace)):
        assert f"{worst:.2%}" in text
    assert gains(trajectory, uncached=10.0).speed_up is None
