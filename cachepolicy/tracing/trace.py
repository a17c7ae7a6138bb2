"""Records of a run: every call of the root model with the decision for each site, for the last few trajectories."""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from cachepolicy.errors import PolicyError, counted
from cachepolicy.planning.facts import Fact
from cachepolicy.planning.grid import alike, notebook_html
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.schedule import Decision, Partition, Tick, prepare
from cachepolicy.planning.simulation import replay
from cachepolicy.planning.tally import tally
from cachepolicy.tracing import schema
from cachepolicy.tracing.schema import CallForm, DecisionForm, Document, SliceForm, TrajectoryForm


@dataclass(frozen=True, slots=True)
class Slice:
    """The time of one call of a module. `began` is on the clock of `CallRecord.began`."""

    module: str
    began: float
    seconds: float


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call of the root model.

    Attributes:
        tick: The clock.
        partition: The groups of sites.
        decided: A decision for each group.
        facts: What only the run could know, by site number.
        seconds: Wall-clock seconds of the call.
        signals: Measured numbers by name, by site number.
        held: Bytes of history that the session held after the call.
        began: `time.perf_counter` at its beginning.
        profile: Times of the modules that it called, in a run with `trace="profile"`.
        errors: Relative errors of the answers in an audited trajectory, by site number: the norm of the difference to
            the computed output, over the norm of the computed output.
    """

    tick: Tick
    partition: Partition
    decided: Sequence[Decision]
    facts: Mapping[int, str]
    seconds: float
    signals: Mapping[int, Mapping[str, float]] = field(default_factory=dict[int, Mapping[str, float]])
    held: int = 0
    began: float = 0.0
    profile: Sequence[Slice] = ()
    errors: Mapping[int, float] = field(default_factory=dict[int, float])

    @property
    def decisions(self) -> list[Decision]:
        """Decisions by site number."""
        return self.partition.spread(self.decided)


@dataclass(slots=True)
class Trajectory:
    """The calls of one trajectory, in order.

    In an audited trajectory every module has computed; the decisions are those of the policy.
    """

    session: object
    plan: Plan
    audited: bool = False
    _records: list[Any] = field(default_factory=list[Any])
    """A `CallRecord` for each call, or the tuple of its fields until it is read."""
    _expanded: int = 0
    """The number of records at the beginning that are expanded."""

    def record(self, fields: tuple[Any, ...]) -> None:
        """Append a call, as the values of the fields of `CallRecord`. The record is made when it is read."""
        self._records.append(fields)

    @property
    def size(self) -> int:
        """The number of calls."""
        return len(self._records)

    @property
    def calls(self) -> list[CallRecord]:
        """The calls."""
        records = self._records
        for index in range(self._expanded, len(records)):
            record = records[index]  # read once, because another thread may expand it meanwhile
            if not isinstance(record, CallRecord):
                records[index] = CallRecord(*record)
            self._expanded = index + 1
        return records

    def __deepcopy__(self, memo: object) -> Trajectory:
        # Plans and records never change. The key of a session may be any hashable object, and its identity matters.
        return Trajectory(self.session, self.plan, self.audited, list(self.calls))

    def rows(self, branch: str | None = None) -> dict[str, str]:
        """Returns one letter a call for each site: `C` computed, `R` reused, `.` hidden.

        Args:
            branch: Name of the branch; the first that ran by default.
        """
        name = self.branches[0] if branch is None and self.calls else branch
        calls = [call for call in self.calls if call.tick.branch == name]
        columns = [[decision.letter for decision in call.decisions] for call in calls]
        return {site.name: "".join(column[site.index] for column in columns) for site in self.plan.sites}

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches that ran, in order of appearance."""
        return tuple(dict.fromkeys(call.tick.branch for call in self.calls))

    @property
    def facts(self) -> dict[tuple[str, int, str], str]:
        """What only the run could know, by (site, step, branch), as `simulate` takes it."""
        return {
            (self.plan.sites[site].name, call.tick.step, call.tick.branch): fact
            for call in self.calls
            for site, fact in call.facts.items()
        }

    @property
    def signals(self) -> dict[tuple[int, str], Mapping[int, Mapping[str, float]]]:
        """Measured numbers, by (step, branch) and site number, as `replay` takes them."""
        return {(call.tick.step, call.tick.branch): call.signals for call in self.calls}

    def __iter__(self) -> Iterator[tuple[Tick, Sequence[Decision]]]:
        """Yields the calls in the order they ran, with their decisions by site number."""
        for call in self.calls:
            yield call.tick, call.decisions

    def counts(self) -> Counter[str]:
        """Returns the number of site calls by verdict."""
        return tally(self).calls

    @property
    def summary(self) -> str:
        """Steps, sites, skipped site calls and the time, on one line."""
        steps = len({call.tick.step for call in self.calls})
        size = f"{counted(steps, 'step')}, {counted(len(self.plan.sites), 'site')}"
        worst = self.worst
        audit = "" if not self.audited else ", audited" if worst is None else f", audited: {worst[2]:.2%} off at most"
        named = self.plan.resolved.preset
        preset = f", preset `{named}`" if named is not None else ""
        return f"{size}: {tally(self)}, {self.seconds:.2f} s in the model{preset}{audit}"

    @property
    def worst(self) -> tuple[str, int, float] | None:
        """The site, the step and the size of the largest error of an audited trajectory, or None."""
        errors = [
            (error, call.tick.step, self.plan.sites[site].name)
            for call in self.calls
            for site, error in call.errors.items()
        ]
        if not errors:
            return None
        error, step, name = max(errors, key=lambda found: found[0])
        return name, step, error

    def to_html(self) -> str:
        """Returns the summary and the rows as HTML for notebooks."""
        return notebook_html({branch: self.rows(branch) for branch in self.branches}, self.summary)

    def _repr_html_(self) -> str:
        return self.to_html()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds in the root model."""
        return sum(call.seconds for call in self.calls)


class Trace:
    """The last few trajectories of a run. `str` describes the newest in a few lines."""

    def __init__(self, most: int = 8) -> None:
        self._trajectories: deque[Trajectory] = deque(maxlen=most)
        self._lock = threading.Lock()

    def __getstate__(self) -> tuple[tuple[Trajectory, ...], int | None]:
        # Copies and pickles have a lock of their own.
        return self.trajectories, self._trajectories.maxlen

    def __setstate__(self, state: tuple[tuple[Trajectory, ...], int | None]) -> None:
        trajectories, most = state
        self._trajectories = deque(trajectories, maxlen=most)
        self._lock = threading.Lock()

    def begin(self, session: object, plan: Plan, *, audited: bool = False) -> Trajectory:
        """Starts the record of a trajectory, and drops the oldest if there are too many."""
        trajectory = Trajectory(session, plan, audited=audited)
        with self._lock:
            self._trajectories.append(trajectory)
        return trajectory

    def drop(self, trajectory: Trajectory) -> None:
        """Removes a trajectory that failed."""
        with self._lock:
            kept = [other for other in self._trajectories if other is not trajectory]
            self._trajectories = deque(kept, maxlen=self._trajectories.maxlen)

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """The recorded trajectories, oldest first."""
        with self._lock:
            return tuple(self._trajectories)

    def __iter__(self) -> Iterator[Trajectory]:
        return iter(self.trajectories)

    def __len__(self) -> int:
        return len(self._trajectories)

    @property
    def last(self) -> Trajectory | None:
        """The newest trajectory, None before the first call."""
        recorded = self.trajectories
        return recorded[-1] if recorded else None

    @property
    def latest(self) -> tuple[Trajectory, ...]:
        """The newest trajectory of each denoiser of the newest session."""
        newest = self.last
        if newest is None:
            return ()
        same = [trajectory for trajectory in self.trajectories if trajectory.session == newest.session]
        return tuple({id(trajectory.plan): trajectory for trajectory in same}.values())

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> Trace:
        """Returns a trace of these trajectories, such as those of one session."""
        trace = cls(max(1, len(trajectories)))
        trace._trajectories.extend(trajectories)
        return trace

    def to_html(self) -> str:
        """Returns `latest` as HTML for notebooks."""
        return "".join(trajectory.to_html() for trajectory in self.latest) or notebook_html({}, str(self))

    def _repr_html_(self) -> str:
        return self.to_html()

    def rows(self, branch: str | None = None) -> dict[str, str]:
        """Returns `Trajectory.rows` of the newest trajectory."""
        return self.last.rows(branch) if self.last is not None else {}

    def to_json(self) -> str:
        """Returns the trace as JSON text, which `from_json` reads. `schema.schema()` is its JSON schema."""
        return _document(self.trajectories).model_dump_json(indent=1, exclude_defaults=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the trace to a JSON file, which `load_trace` and `cachepolicy report` read."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def __str__(self) -> str:
        newest = self.last
        if newest is None:
            return "nothing has run yet"
        lines = [newest.summary]
        for branch in newest.branches:
            if len(newest.branches) > 1:
                lines.append(f"branch {branch or 'first'}")
            for row, names in alike(newest.rows(branch)).items():
                lines.append(f"  {row}  {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
        over = dict.fromkeys(site for (site, _, _), fact in newest.facts.items() if fact == Fact.OVER_LIMIT)
        if over:
            lines.append(f"{Fact.OVER_LIMIT}: {counted(len(over), 'site')}, which computed instead ({', '.join(over)})")
        return "\n".join(lines)


# --- files -----------------------------------------------------------------------------------------------


def load_trace(path: str | os.PathLike[str]) -> Trace:
    """Reads a trace from a file that `Trace.save` wrote. Every decision is made again, with the numbers that it read.

    Args:
        path: The file.

    Raises:
        PolicyError: E260, the file cannot be read or holds no trace, or its decisions are not those of its own policy,
            clock and measurements. The message names the entry.
    """
    shown = os.fspath(path)
    try:
        with Path(path).open("rb") as file:
            text = file.read(schema.FILE_LIMIT + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PolicyError.of("E260", f"`{shown}` cannot be read: {reason.lower()}") from error
    try:
        return from_json(text)
    except PolicyError as error:
        first = error.diagnostics[0]
        raise PolicyError.of("E260", f"`{shown}`: {first.message}", help=first.help) from error


def from_json(text: str | bytes) -> Trace:
    """Returns the trace of a JSON text.

    Raises:
        PolicyError: E260, as for `load_trace`.
    """
    read = schema.document(text)
    plans = [schema.plan_of(form, f"plans.{index}") for index, form in enumerate(read.plans)]
    trace = Trace(max(1, len(read.trajectories)))
    for index, form in enumerate(read.trajectories):
        where = f"trajectories.{index}"
        if form.plan >= len(plans):
            raise _wrong(f"{where}.plan", f"there is no plan {form.plan}")
        trajectory = trace.begin(form.session, plans[form.plan], audited=form.audited)
        trajectory.calls.extend(_replayed(plans[form.plan], form, where))
    return trace


def _wrong(where: str, problem: str) -> PolicyError:
    return PolicyError.of("E260", f"no trace: {where}: {problem}")


def _replayed(plan: Plan, form: TrajectoryForm, where: str) -> Iterator[CallRecord]:
    """Yields the calls of a trajectory. Their decisions are made again and compared with the saved ones."""
    fine = prepare(plan).fine
    order = [group.sites[0] for group in fine.groups]
    ticks = [_tick(call) for call in form.calls]
    for index, call in enumerate(form.calls):
        _check_indices(plan, form, call, f"{where}.calls.{index}")
    if len({(tick.step, tick.branch) for tick in ticks}) < len(ticks):
        raise _wrong(f"{where}.calls", "a branch is called twice at one step")
    names = [site.name for site in plan.sites]
    schedule = replay(
        plan,
        ticks,
        signals={(call.step, call.branch): call.signals for call in form.calls},
        facts={(names[site], call.step, call.branch): fact for call in form.calls for site, fact in call.facts.items()},
    )
    for index, (call, (_, decisions)) in enumerate(zip(form.calls, schedule, strict=True)):
        for site, (number, decision) in enumerate(zip(call.decisions, decisions, strict=True)):
            saved, made = form.decisions[number], _decision_form(decision)
            if saved != made:
                message = f"`{names[site]}` is said to {_shown(saved)}, and its policy says {_shown(made)}"
                raise _wrong(f"{where}.calls.{index}.decisions.{site}", message)
        yield CallRecord(
            tick=ticks[index],
            partition=fine,
            decided=[decisions[site] for site in order],
            facts=call.facts,
            seconds=call.seconds,
            signals=call.signals,
            held=call.held,
            began=form.began + call.began,
            errors=call.errors,
            profile=[Slice(piece.module, form.began + piece.began, piece.seconds) for piece in call.profile],
        )


def _check_indices(plan: Plan, form: TrajectoryForm, call: CallForm, where: str) -> None:
    sites = len(plan.sites)
    if len(call.decisions) != sites:
        raise _wrong(f"{where}.decisions", f"{counted(len(call.decisions), 'decision')} for {counted(sites, 'site')}")
    if call.decisions and max(call.decisions) >= len(form.decisions):
        raise _wrong(f"{where}.decisions", f"there is no decision {max(call.decisions)}")
    for name, numbers in (("facts", call.facts), ("signals", call.signals), ("errors", call.errors)):
        outside = [number for number in numbers if number >= sites]
        if outside:
            raise _wrong(f"{where}.{name}", f"there is no site {outside[0]}")


def _shown(form: DecisionForm) -> str:
    rule = "no rule" if form.rule is None else f"rule {form.rule}"
    return f"{form.verdict} by {rule} ({form.reason})"


def _tick(call: CallForm) -> Tick:
    return Tick(call.step, call.t, call.steps, call.sigma, call.branch, call.uncond_skipped)


def _document(trajectories: Sequence[Trajectory]) -> Document:
    plans = {id(trajectory.plan): trajectory.plan for trajectory in trajectories}
    indices = {key: index for index, key in enumerate(plans)}
    sessions = session_names(trajectories)
    start = min((call.began for trajectory in trajectories for call in trajectory.calls), default=0.0)
    forms = [
        _trajectory_form(trajectory, indices[id(trajectory.plan)], sessions[id(trajectory)], start)
        for trajectory in trajectories
    ]
    return Document(plans=tuple(map(schema.form_of, plans.values())), trajectories=tuple(forms))


def session_names(trajectories: Iterable[Trajectory]) -> dict[int, str]:
    """Returns the name of each trajectory's session by `id(trajectory)`. Keys of the caller name themselves."""
    names, counts = dict[object, str](), Counter[str]()
    called = dict[int, str]()
    for trajectory in trajectories:
        key = trajectory.session
        if key not in names:
            kind, name = _session(key)
            counts[kind] += 1
            names[key] = name or f"{kind} {counts[kind]}"
        called[id(trajectory)] = names[key]
    return called


def _session(key: object) -> tuple[str, str]:
    """Returns the kind of session of a key, and its name if the caller gave one."""
    if isinstance(key, str):
        return "saved", key
    if not isinstance(key, tuple):
        return "thread", ""
    kind, name = cast("tuple[str, object]", key)
    return ("session", f"session {name}") if kind == "session" else ("pipeline call", "")


def _trajectory_form(trajectory: Trajectory, plan: int, session: str, start: float) -> TrajectoryForm:
    forms = dict[DecisionForm, int]()
    known = dict[int, int]()
    calls, first = list[CallForm](), trajectory.calls[0].began if trajectory.calls else start

    def number(decision: Decision) -> int:
        # Most sites share the very same decision.
        if id(decision) not in known:
            known[id(decision)] = forms.setdefault(_decision_form(decision), len(forms))
        return known[id(decision)]

    for call in trajectory.calls:
        by_group = [number(decision) for decision in call.decided]
        calls.append(_call_form(call, tuple(by_group[group] for group in call.partition.group_of), first))
    return TrajectoryForm(
        session=session,
        plan=plan,
        began=max(0.0, first - start),
        decisions=tuple(forms),
        calls=tuple(calls),
        audited=trajectory.audited,
    )


def _decision_form(decision: Decision) -> DecisionForm:
    rule = None if decision.rule is None else decision.rule + 1
    return DecisionForm(verdict=decision.verdict, rule=rule, reason=decision.reason)


def _call_form(call: CallRecord, decisions: tuple[int, ...], first: float) -> CallForm:
    tick = call.tick
    return CallForm(
        step=tick.step,
        t=tick.t,
        steps=tick.steps,
        sigma=tick.sigma,
        branch=tick.branch,
        uncond_skipped=tick.uncond_skipped,
        began=max(0.0, call.began - first),
        seconds=call.seconds,
        held=call.held,
        decisions=decisions,
        facts=dict(call.facts),
        signals={site: dict(values) for site, values in call.signals.items()},
        errors=dict(call.errors),
        profile=tuple(
            SliceForm(module=piece.module, began=max(0.0, piece.began - first), seconds=piece.seconds)
            for piece in call.profile
        ),
    )
