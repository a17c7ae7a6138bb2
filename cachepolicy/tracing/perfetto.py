"""Exports a trace in the Trace Event Format of Perfetto and `chrome://tracing`: a track for each session and branch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cachepolicy.tracing.trace import CallRecord, Trace, Trajectory, session_names

TraceEvent = dict[str, Any]
_PROCESS = 1


def events(trace: Trace) -> dict[str, Any]:
    """Returns the document: a slice for each call of the root model, and inside it one for each profiled module.

    Times are in microseconds from the first call of the trace. Held bytes and measured numbers are counters.
    """
    return {"traceEvents": list(_events(trace)), "displayTimeUnit": "ms"}


def perfetto_json(trace: Trace) -> str:
    """Returns the document as JSON text."""
    return json.dumps(events(trace), ensure_ascii=False, allow_nan=False)


def _events(trace: Trace) -> Iterator[TraceEvent]:
    trajectories = trace.trajectories
    names = session_names(trajectories)
    start = min((call.began for trajectory in trajectories for call in trajectory.calls), default=0.0)
    tracks = dict[tuple[str, str, str], int]()
    yield {"ph": "M", "pid": _PROCESS, "name": "process_name", "args": {"name": "cachepolicy"}}
    for trajectory in trajectories:
        session = names[id(trajectory)]
        for call in trajectory.calls:
            key = session, trajectory.plan.skeleton.name, call.tick.branch
            if key not in tracks:
                tracks[key] = len(tracks) + 1
                yield from _track(tracks[key], *key)
            yield from _call(trajectory, call, tracks[key], session, start)


def _track(track: int, session: str, model: str, branch: str) -> Iterator[TraceEvent]:
    name = f"{session}, {model}" + (f", branch {branch}" if branch else "")
    common = {"ph": "M", "pid": _PROCESS, "tid": track}
    yield {**common, "name": "thread_name", "args": {"name": name}}
    yield {**common, "name": "thread_sort_index", "args": {"sort_index": track}}


def _call(trajectory: Trajectory, call: CallRecord, track: int, session: str, start: float) -> Iterator[TraceEvent]:
    decisions, tick = call.decisions, call.tick
    counts = Counter(decision.verdict for decision in decisions)
    arguments = {
        "t": tick.t,
        **{verdict: counts[verdict] for verdict in ("compute", "reuse", "hidden")},
        "rules": dict(Counter(f"rule {decision.rule + 1}" for decision in decisions if decision.rule is not None)),
        "facts": {trajectory.plan.sites[site].name: fact for site, fact in call.facts.items()},
        "held": call.held,
    }
    common = {"pid": _PROCESS, "tid": track}
    began = _micro(call.began - start)
    yield {
        **common, "ph": "X", "cat": "call", "name": f"step {tick.step}",
        "ts": began, "dur": _micro(call.seconds), "args": arguments,
    }  # fmt: skip
    sites = {name: site.index for site in trajectory.plan.sites for name in site.modules}
    for piece in call.profile:
        site = sites.get(piece.module)
        decided = {} if site is None else {"verdict": decisions[site].verdict, "reason": decisions[site].reason}
        yield {
            **common, "ph": "X", "cat": "module", "name": piece.module,
            "ts": _micro(piece.began - start), "dur": _micro(piece.seconds), "args": decided,
        }  # fmt: skip
    counter = {"pid": _PROCESS, "ph": "C", "ts": began}
    yield {**counter, "name": f"bytes held, {session}", "args": {"held": call.held}}
    for site, numbers in call.signals.items():
        values = {name: value for name, value in numbers.items() if math.isfinite(value)}
        if values:
            yield {**counter, "name": f"signals of {trajectory.plan.sites[site].name}, {session}", "args": values}


def _micro(seconds: float) -> float:
    return round(1e6 * seconds, 3)
