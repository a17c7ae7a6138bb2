"""A run as a viewer of traces reads it: valid by the rules of the Trace Event Format, and the same run."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepolicy.planning.simulation import simulate
from cachepolicy.testing import strategies
from cachepolicy.tracing.perfetto import events, perfetto_json
from cachepolicy.tracing.trace import CallRecord, Slice, Trace
from tests.support import report_data as reports


def hold(document: dict[str, Any]) -> None:
    """The rules: required fields by phase, numbers that are finite, slices of a track nested or apart, tracks named."""
    named, used, slices = set[int](), set[int](), defaultdict[int, list[tuple[float, float]]](list)
    assert {"traceEvents", "displayTimeUnit"} == set(document)
    for event in document["traceEvents"]:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        match event["ph"]:
            case "M":
                assert event["name"] in {"process_name", "thread_name", "thread_sort_index"}
                if event["name"] == "thread_name":
                    assert event["args"]["name"]
                    named.add(event["tid"])
            case "X":
                assert event["ts"] >= 0
                assert event["dur"] >= 0
                assert event["cat"]
                used.add(event["tid"])
                slices[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
            case "C":
                assert event["ts"] >= 0
                assert all(isinstance(value, int | float) for value in event["args"].values())
                assert event["args"]
            case other:
                raise AssertionError(f"no such phase is used: {other}")
    assert used <= named
    for track in slices.values():
        open_ends = list[float]()
        for start, end in sorted(track, key=lambda each: (each[0], -each[1])):
            while open_ends and open_ends[-1] <= start:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1] + 1e-3, "a slice ends after the one around it"
            open_ends.append(end)


@given(
    policy=strategies.policies(steps=5),
    branches=strategies.branches(),
    value=st.sampled_from([0.5, float("nan"), float("inf")]),
)
def test_any_run_is_a_valid_document(policy, branches, value):
    """Whatever was decided and measured, JSON can say it and the rules hold."""
    schedule = simulate(policy, steps=5, branches=branches)
    trace = reports.as_trace(schedule, {site.index: {"drift": [value] * 5} for site in schedule.plan.sites[:1]})
    hold(json.loads(perfetto_json(trace)))


def test_a_call_is_a_slice_with_its_counts():
    """A slice for each call of the root, at its time and of its length, with verdicts, rules and bytes."""
    trace = reports.drifting()
    found = [event for event in events(trace)["traceEvents"] if event["ph"] == "X"]
    assert [f"step {step}" for step in range(8)] == [event["name"] for event in found]
    assert [1e6 * step for step in range(8)] == [event["ts"] for event in found]
    for event, call in zip(found, trace.last.calls, strict=True):
        assert 1e6 * call.seconds == event["dur"]
        verdicts = [each.verdict for each in call.decisions]
        assert {name: verdicts.count(name) for name in ("compute", "reuse", "hidden")} == {
            name: event["args"][name] for name in ("compute", "reuse", "hidden")
        }
        assert call.held == event["args"]["held"]
        assert sum(each.rule is not None for each in call.decisions) == sum(event["args"]["rules"].values())


def test_sessions_and_branches_have_tracks():
    """One track for each session and branch, named after them."""
    trace = reports.as_trace(reports.flux(4))
    other = reports.drifting().last
    trace.begin(("pipeline", object()), other.plan).calls.extend(other.calls)
    named = [event["args"]["name"] for event in events(trace)["traceEvents"] if event["name"] == "thread_name"]
    assert [
        "session mine, names, branch cond",
        "session mine, names, branch uncond",
        "pipeline call 1, builtin",
    ] == named


def test_modules_of_a_profiled_run_are_slices_inside():
    """Each timed module is a slice inside its call, with what was decided for it."""
    trace = reports.as_trace(simulate("fora", steps=2))
    call = trace.last.calls[1]
    site = trace.last.plan.sites[0].name
    profile = [Slice(site, call.began + 0.01, 0.02), Slice("elsewhere", call.began + 0.04, 0.01)]
    trace.last.calls[1] = CallRecord(
        call.tick, call.partition, call.decided, {}, call.seconds, began=call.began, profile=profile
    )
    document = events(trace)
    hold(document)
    inner, other = [event for event in document["traceEvents"] if event.get("cat") == "module"]
    assert (site, call.decisions[0].verdict) == (inner["name"], inner["args"]["verdict"])
    assert pytest.approx(1e6 + 1e4) == inner["ts"]
    assert {} == other["args"]


def test_signals_and_memory_are_counters():
    """What was measured and what the session held can be drawn over time."""
    counters = [event for event in events(reports.drifting())["traceEvents"] if event["ph"] == "C"]
    drifts = [event["args"]["drift"] for event in counters if "drift" in event["args"]]
    held = [event["args"]["held"] for event in counters if "held" in event["args"]]
    assert reports.DRIFTS == drifts
    assert [1024 * (step + 1) for step in range(8)] == held


def test_nothing_is_a_document_too():
    """A trace without trajectories has no slices."""
    hold(events(Trace()))
