"""A trace that is saved tells everything: read back, every decision is made once more and comes out as it was."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cachepolicy
from cachepolicy._resources import shipped_policies
from cachepolicy.errors import PolicyError
from cachepolicy.language.linker import load, resolve
from cachepolicy.planning.bind import bind
from cachepolicy.planning.module_tree import builtin
from cachepolicy.planning.schedule import prepare
from cachepolicy.planning.simulation import Schedule, simulate
from cachepolicy.testing import checks, strategies
from cachepolicy.tracing.schema import Document, form_of, plan_of, schema
from cachepolicy.tracing.trace import CallRecord, Slice, Trace, from_json, load_trace

DRIFTING = (
    "signal drift = relative_l1(residual(blocks[0]), kept(residual(blocks[0])))\n"
    "match blocks[1:] while drift <= 0.1 -> reuse residual\n"
)
DRIFTS = [0.0, 0.05, 0.2, 0.05, 0.01, 0.3]


def as_trace(schedule: Schedule, **series: list[float]) -> Trace:
    """The trace of a run that went as the schedule says."""
    trace = Trace()
    trajectory = trace.begin(("session", "mine"), schedule.plan)
    fine = prepare(schedule.plan).fine
    for number, (tick, decisions) in enumerate(schedule):
        numbers = {name: values[tick.step] for name, values in series.items()}
        measured = {site.index: numbers for site in schedule.plan.sites if numbers}
        order = [decisions[group.sites[0]] for group in fine.groups]
        trajectory.calls.append(CallRecord(tick, fine, order, {}, 0.25, measured, 100 + number, 1000.0 + number))
    return trace


def drifting() -> Trace:
    """A run whose second rule decides by what it measured."""
    policy = cachepolicy.parse(DRIFTING)
    schedule = simulate(policy, steps=6, signals={"drift": DRIFTS})
    bound = bind(resolve(policy, {}), builtin())
    return as_trace(Schedule(bound, schedule.ticks, schedule.decisions), drift=DRIFTS)


def refusal(text: str | bytes) -> str:
    with pytest.raises(PolicyError) as caught:
        from_json(text)
    (diagnostic,) = caught.value.diagnostics
    assert "E260" == diagnostic.code
    return diagnostic.message


@pytest.mark.parametrize("key", ["cachepolicy_trace", "plans", "calls", "seconds"])
def test_a_key_that_stands_twice_is_refused(key: str) -> None:
    """The first value would be gone without a word."""
    text = drifting().to_json()
    start = text.index(f'"{key}"')
    assert f"the key `{key}` stands twice" in refusal(f'{text[:start]}"{key}": 1, {text[start:]}')


@given(policy=strategies.policies(steps=5), timesteps=strategies.timesteps(5, 5), branches=strategies.branches())
def test_any_schedule_comes_back(policy, timesteps, branches):
    """Whatever a policy decides on whatever clock, a trace of it is read back with the same decisions."""
    checks.saved_alike(as_trace(simulate(policy, steps=5, timesteps=timesteps, branches=branches)))


SETTINGS: dict[str, dict[str, Any]] = {"deepcache": {"deep": ["attn"]}, "double_dbcache": {"first": 1}}
"""Settings of policies whose defaults select nothing in the skeleton, which is no U-Net and has few blocks."""


@pytest.mark.parametrize("name", sorted(shipped_policies()))
def test_shipped_policies_come_back(name):
    """The plan that is read back has the digest, the settings and the rules of the one that was saved."""
    plan = bind(resolve(load(name), SETTINGS.get(name, {})), builtin())
    again = plan_of(form_of(plan), "plans.0")
    assert plan.resolved.digest == again.resolved.digest
    assert plan.resolved.settings == again.resolved.settings
    assert plan.rules == again.rules
    assert plan.sites == again.sites


def test_what_is_used_comes_along(tmp_path: Path):
    """Policies beside the policy are saved with it: the trace is read where those files are not."""
    (tmp_path / "inner.cp").write_text('param n: int = 2\nmatch "attn1$" every n -> reuse\n')
    (tmp_path / "outer.cp").write_text(
        "param often: int = 3\nuse './inner.cp' with n = often\nuse fbc with threshold = 0.2\n"
    )
    plan = bind(resolve(load(tmp_path / "outer.cp"), {"often": 4}), builtin())
    form = form_of(plan)
    for path in tmp_path.iterdir():
        path.unlink()
    again = plan_of(form, "plans.0")
    assert plan.rules == again.rules
    assert plan.resolved.signals == again.resolved.signals
    assert {"often": 4} == again.resolved.settings
    assert ["", "inner", "first_block_cache"] == [_named(each.text) for each in form.policies]


def _named(text: str) -> str:
    if "first_block_cache" in text:
        return "first_block_cache"
    return "inner" if "param n" in text else ""


def test_everything_of_a_call_comes_back(tmp_path: Path):
    """Seconds, bytes held, signals and the times of modules are those that were saved."""
    trace = drifting()
    assert trace.last is not None
    call = trace.last.calls[2]
    sliced = Slice("transformer_blocks.0", call.began + 0.125, 0.0625)
    trace.last.calls[2] = CallRecord(
        call.tick, call.partition, call.decided, call.facts, 0.5, call.signals, 7, call.began, [sliced]
    )
    trace.save(tmp_path / "trace.json")
    read = load_trace(tmp_path / "trace.json").last
    assert read is not None
    assert [0.25, 0.25, 0.5] == [each.seconds for each in read.calls[:3]]
    assert [100, 101, 7] == [each.held for each in read.calls[:3]]
    assert [0.0, 1.0, 2.0] == [each.began for each in read.calls[:3]]
    assert [Slice("transformer_blocks.0", 2.125, 0.0625)] == read.calls[2].profile
    assert DRIFTS == [each.signals[0]["drift"] for each in read.calls]
    assert "session mine" == read.session
    assert {"C": 3, "R": 3} == {letter: "".join(read.rows().values()).count(letter) for letter in "CR"}


def test_a_read_decision_explains_itself():
    """A decision that was made once more carries the numbers that it was made from."""
    read = from_json(drifting().to_json()).last
    assert read is not None
    inputs = read.calls[2].decisions[0].inputs
    assert inputs is not None
    assert {"drift": 0.2} == inputs.signals


def test_undefined_numbers_come_back():
    """A signal that had no value is NaN, and JSON can say it."""
    trace = drifting()
    assert trace.last is not None
    text = trace.to_json().replace('"drift": 0.3', '"drift": "NaN"')
    read = from_json(text).last
    assert read is not None
    assert read.calls[5].signals[0]["drift"] != read.calls[5].signals[0]["drift"]


# --- files that are none


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    """The error tells the path and the reason."""
    with pytest.raises(PolicyError, match=r"`.*gone.json` cannot be read: no such file"):
        load_trace(tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the text: invalid JSON"),
        ("[]", "the text: input should be an object"),
        (b"\xff\x00", "the text: invalid JSON"),
        ('{"cachepolicy_trace": 2, "plans": [], "trajectories": []}', "cachepolicy_trace: input should be 1"),
        ('{"plans": [], "trajectories": [], "more": 1}', "more: extra inputs are not permitted"),
    ],
)
def test_junk_is_refused(text, said):
    """What is no trace is told from one by the place that is wrong."""
    assert said in refusal(text)


def test_an_unreadable_file_says_which(tmp_path: Path):
    """The path stands before the place."""
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(PolicyError, match=r"bad.json`: no trace: plans: field required"):
        load_trace(tmp_path / "bad.json")


def _set(data: object, path: str, value: object) -> None:
    *outer, last = path.split("/")
    for each in outer:
        data = data[each if isinstance(data, dict) else int(each)]
    data[last if isinstance(data, dict) else int(last)] = value


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("plans/0/policies/0/text", "match\n", "plans.0: "),
        ("plans/0/policies/0/text", DRIFTING.replace("0.1", "0.4"), "plans.0.digest: the policy's hash is"),
        ("plans/0/policies/0/text", "use missing\n", "plans.0: `use missing`, which was not saved"),
        ("plans/0/settings", {"x": "1"}, "plans.0: the policy has no parameter `x`"),
        ("plans/0/settings", {"x": "("}, "plans.0: "),
        ("plans/0/sites", ["other"], "plans.0.sites: the policy selects other sites"),
        ("plans/0/skeleton/modules/0/name", "root", "plans.0: the first module is the root"),
        ("trajectories/0/plan", 1, "trajectories.0.plan: there is no plan 1"),
        ("trajectories/0/calls/1/decisions/0", 9, "trajectories.0.calls.1.decisions: there is no decision 9"),
        ("trajectories/0/calls/1/decisions", [0, 0], "trajectories.0.calls.1.decisions: 2 decisions for 1 site"),
        ("trajectories/0/calls/1/facts", {"5": "why"}, "trajectories.0.calls.1.facts: there is no site 5"),
        ("trajectories/0/calls/1/step", 0, "trajectories.0.calls: a branch is called twice at one step"),
        ("trajectories/0/calls/1/step", -1, "trajectories.0.calls.1.step: input should be greater than"),
        ("trajectories/0/calls/1/t", "late", "trajectories.0.calls.1.t: input should be a valid number"),
        (
            "trajectories/0/calls/1/signals",
            {"0": {"drift": 0.7}},
            "said to reuse by rule 1 (the rule reuses), and its policy says compute by rule 1 (its `while` is false)",
        ),
    ],
)
def test_a_trace_that_does_not_hold_together_is_refused(path, value, said):
    """What was changed is found: by its form, or because the decisions are no longer those of the policy."""
    data = json.loads(drifting().to_json())
    _set(data, path, value)
    assert said in refusal(json.dumps(data))


@given(data=st.data())
def test_no_damage_is_a_traceback(data):
    """Whatever value stands in whatever place, the file is read or refused."""
    document = json.loads(drifting().to_json())
    places = [path for path in _places(document) if "skeleton" not in path]
    path = data.draw(st.sampled_from(places))
    value = data.draw(st.sampled_from([None, -1, 0, 1, 2**70, 1e308, "", "match", "NaN", [], {}, [0], {"0": "x"}]))
    _set(document, path, value)
    try:
        from_json(json.dumps(document))
    except PolicyError as error:
        assert "E260" == error.diagnostics[0].code


def _places(data: object, path: str = "") -> list[str]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    places = [path[1:]] if path else []
    return places + [place for name, value in items for place in _places(value, f"{path}/{name}")]


def test_the_schema_is_that_of_what_is_written():
    """The JSON schema names every field that a saved trace has, and what is written has that form."""
    defined = schema()
    assert {"cachepolicy_trace", "plans", "trajectories"} == set(defined["properties"])
    call = json.loads(drifting().to_json())["trajectories"][0]["calls"][0]
    assert set(call) == set(defined["$defs"]["CallForm"]["properties"])
    assert Document.model_validate_json(drifting().to_json()).trajectories[0].session == "session mine"


class Interrupted(list[Any]):
    """A list whose first reader is interrupted by another one."""

    def __init__(self, items: list[Any], other: Callable[[], Any]) -> None:
        super().__init__(items)
        self.others = [other]

    def __getitem__(self, index: Any) -> Any:
        item = super().__getitem__(index)
        if self.others:
            self.others.pop()()
        return item


def test_a_reader_of_the_calls_may_be_interrupted_by_another() -> None:
    """Two threads that read the calls of one trajectory get the same records."""
    (run,) = drifting()
    recorded = [tuple(getattr(call, each.name) for each in dataclasses.fields(call)) for call in run.calls]
    trajectory = Trace().begin("mine", run.plan)
    trajectory._records = Interrupted(recorded, lambda: trajectory.calls)
    assert run.calls == trajectory.calls


def test_a_trace_of_trajectories_has_these_alone() -> None:
    """`of` keeps their order and leaves the others out; it may be saved and read as every trace."""
    schedule = simulate("fora", steps=3)
    trace = Trace()
    made = [trace.begin(name, schedule.plan) for name in ("one", "two", "one")]
    picked = Trace.of([each for each in trace if each.session == "one"])
    assert (made[0], made[2]) == picked.trajectories
    assert ["one", "one"] == [each.session for each in from_json(picked.to_json())]
    assert () == Trace.of([]).trajectories
