"""The work of binding and of expectations is counted: it is linear in the rules of a policy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cachepolicy
from cachepolicy.errors import PolicyError
from cachepolicy.language import patterns
from cachepolicy.language.evaluate import Environment
from cachepolicy.language.linker import resolve
from cachepolicy.planning import check, unreachable_rules
from cachepolicy.planning.bind import bind
from cachepolicy.planning.check import run_expectations
from cachepolicy.planning.module_tree import builtin
from cachepolicy.planning.plan import BoundRule
from cachepolicy.planning.schedule import FRESH, Tick, clock_words, holds, prepare
from cachepolicy.planning.simulation import STEPS_LIMIT, rule_visits, simulate
from cachepolicy.planning.unreachable_rules import COMPARED, shadowed


def counted(monkeypatch, owner, name: str) -> list[str]:
    """A list that gets an item with each call of a function or method."""
    original, calls = getattr(owner, name), list[str]()

    def counting(*args, **options):
        calls.append(name)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, counting)
    return calls


def policy(count: int, form: str) -> cachepolicy.Policy:
    return cachepolicy.parse("\n".join(form.format(i=i, block=i % 8) for i in range(count)) + "\n")


FORMS = [
    'match "blocks.({block}|{i})[.].*attn" when t in ({i}, {i}7) every 2 -> reuse',
    "match attention when {i} < t -> reuse",
    'match "attn{block}|ff|x{i}" when t in ({i}, {i}7) and branch == "b{block}" -> reuse',
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [50, 200])
def test_binding_matches_each_name_once_and_visits_each_rule_once_a_group(monkeypatch, form, count):
    """Whatever the number of rules, a name is searched once; a rule is visited once for each group of its sites."""
    monkeypatch.setattr(patterns, "searcher", None)  # no search of one pattern by itself
    searches = counted(monkeypatch, patterns.re2.Set, "Match")
    visits = counted(monkeypatch, unreachable_rules._Earlier, "visit")
    comparisons = counted(monkeypatch, unreachable_rules._Clause, "follows_from")
    plan = bind(resolve(policy(count, form), {}), builtin())
    assert len(searches) in {0, len(plan.skeleton.modules)}
    groups = len(plan.groups.rules)
    assert len(visits) == sum(map(len, plan.groups.rules)) <= count * groups
    assert len(comparisons) <= len(visits) * COMPARED
    assert rule_visits(plan, 1) <= count * len(prepare(plan).coarse.groups)


def test_a_set_of_patterns_out_of_memory_matches_one_by_one(monkeypatch):
    """Where the set finds nothing at all, not even the empty pattern, every pattern is searched by itself."""
    names = ["a.b", "b.c", ""]
    expected = patterns.search_all(["^a", "b", "z"], names)
    assert {"^a": {"a.b"}, "b": {"a.b", "b.c"}, "z": set()} == expected
    monkeypatch.setattr(patterns.re2.Set, "Match", lambda _set, _text: [])
    assert expected == patterns.search_all(["^a", "b", "z"], names)
    with pytest.raises(ValueError, match="missing"):
        patterns.search_all(["a", "("], names)


# --- which rules never decide

_part = st.one_of(
    st.builds("t in ({}, {}]".format, st.integers(0, 3), st.integers(4, 8)),
    st.builds("{} <= t < {}".format, st.integers(0, 4), st.integers(3, 8)),
    st.builds("t {} {}".format, st.sampled_from(["<", "<=", ">", ">=", "=="]), st.integers(0, 6)),
    st.builds("{} {} step".format, st.integers(0, 6), st.sampled_from(["<", ">="])),
    st.sampled_from(['branch == "a"', "step % 2 == 0", "true"]),
)
_whens = st.lists(st.lists(_part, max_size=3).map(" and ".join), min_size=2, max_size=8)


def clause(text: str) -> str:
    return f"when {text} " if text else ""


@given(whens=_whens, data=st.data())
def test_a_rule_is_unreachable_where_one_earlier_clause_follows_from_its_own(whens, data):
    """As if all earlier rules of every site were compared; the rules that are named do decide in its place."""
    text = "\n".join(f"match attention {clause(when)}-> reuse" for when in whens)
    sites = [tuple(sorted(data.draw(st.sets(st.integers(0, 3), min_size=1)))) for _ in whens]
    parsed = resolve(cachepolicy.parse(text + "\n"), {}).rules
    rules = [BoundRule(index, rule, sites[index]) for index, rule in enumerate(parsed)]
    clauses = [unreachable_rules._Clause.of(rule.when) for rule in parsed]
    expected = [
        late
        for late in range(len(rules))
        if all(
            any(site in sites[early] and clauses[early].follows_from(clauses[late]) for early in range(late))
            for site in sites[late]
        )
    ]
    found = dict(shadowed(rules))
    assert expected == list(found)
    for t in range(9):
        for step in range(3):
            words = Environment(clock_words(Tick(step, float(t), 9, None, "a"), FRESH))
            for late, by in found.items():
                assert not holds(parsed[late].when, words) or any(holds(parsed[rule].when, words) for rule in by)


# --- limits


def test_the_work_of_expectations_is_bounded(monkeypatch):
    """The visits of all expectations are added up; the one that goes over the limit is an error, not a hang."""
    lines = ["match attention every 2 -> reuse"] + ["expect attention over 4 steps: C R C R"] * 3
    parsed = cachepolicy.parse("\n".join(lines) + "\n")
    assert run_expectations(parsed).hold
    visits = rule_visits(cachepolicy.plan(parsed), 4)
    monkeypatch.setattr(check, "EXPECTATION_WORK", 2 * visits)
    outcomes = run_expectations(parsed).outcomes
    assert [True, True, False] == [outcome.holds for outcome in outcomes]
    assert "E221" == outcomes[2].findings[0].code


def test_the_steps_of_a_schedule_are_bounded():
    """A number of steps that no run has is an error, not a hang."""
    with pytest.raises(PolicyError, match="E254"):
        simulate("fora", steps=STEPS_LIMIT + 1)


def test_expectations_with_equal_params_share_one_plan(monkeypatch):
    """A policy is bound once for each set of params that its expectations set."""
    text = "param n: int = 2\nmatch attention every n -> reuse\n"
    text += "expect attention over 4 steps: C R C R\n" * 5 + "expect attention over 4 steps with n = 3: C R R C\n" * 5
    binds = counted(monkeypatch, check, "bind")
    assert run_expectations(cachepolicy.parse(text)).hold
    assert 2 == len(binds)


def test_a_policy_that_does_not_fit_the_model_is_bound_once_for_all_expectations(monkeypatch):
    """Many rules without modules times many expectations would take minutes; every expectation has the errors."""
    text = 'match "absent" every 2 -> reuse\n' + "expect attention over 4 steps: C R C R\n" * 5
    binds = counted(monkeypatch, check, "bind")
    outcomes = run_expectations(cachepolicy.parse(text)).outcomes
    assert [["E200"]] * 5 == [[finding.code for finding in outcome.findings] for outcome in outcomes]
    assert 1 == len(binds)
