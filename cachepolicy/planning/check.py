"""What can be judged of a policy without a model: names, types, what it uses, doubtful rules, expectations."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cachepolicy.errors import Diagnostic, PolicyError, Related, Span
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Undefined, constant
from cachepolicy.language.linker import Resolved, resolve
from cachepolicy.language.loader import is_file, load, located
from cachepolicy.language.parser import recover
from cachepolicy.language.semantics import check_names
from cachepolicy.language.source import prepare_source
from cachepolicy.language.traversal import walk
from cachepolicy.planning.bind import bind
from cachepolicy.planning.module_tree import Skeleton, ancestors, builtin
from cachepolicy.planning.plan import BoundRule, Plan, label
from cachepolicy.planning.selectors import Modules, select, why_nothing
from cachepolicy.planning.simulation import Schedule, simulate
from cachepolicy.planning.unreachable_rules import interval, shadowed


def check(policy: str | os.PathLike[str] | ir.Policy) -> tuple[Diagnostic, ...]:
    """Everything that is wrong or doubtful about a policy as it stands, with its default settings; never raises.

    Errors come first from the text itself; only a sound text is followed into what it uses.
    """
    try:
        loaded = load(policy)
    except PolicyError as error:
        return error.diagnostics
    own = tuple(located(each, loaded, None) for each in check_names(loaded))
    return own if any(each.severity == "error" for each in own) else (*own, *_whole(loaded))


def check_text(text: str | bytes, *, source: str = "<text>") -> tuple[Diagnostic, ...]:
    """`check` for a text that need not be sound, as an editor holds it; `source` is its path, for what it uses."""
    policy, findings = recover(text, source=source)
    if any(each.severity == "error" for each in findings):
        return findings
    path, held = Path(source).absolute(), prepare_source(text, source)[0]
    if is_file(path):
        policy = policy.model_copy(update={"source_name": str(path)})
    # What is said of this text shows its lines, not those that its file has at present.
    further = (held.locate(each) if Path(each.source or "").absolute() == path else each for each in _whole(policy))
    return (*findings, *further)


def _whole(policy: ir.Policy) -> tuple[Diagnostic, ...]:
    try:
        resolved = resolve(policy, {})
    except PolicyError as error:
        return error.diagnostics
    return tuple(_doubts(resolved))


def _doubts(resolved: Resolved) -> Iterator[Diagnostic]:
    for number, rule in enumerate(resolved.rules):
        source = resolved.sources[number].policy
        yield from (located(each, source, rule.span) for each in _empty_intervals(rule))
    numbers = dict[ir.Selector, int]()
    alike = [
        BoundRule(number, rule, (numbers.setdefault(rule.selector, len(numbers)),))
        for number, rule in enumerate(resolved.rules)
    ]
    for number, by in shadowed(alike):
        message = f"this rule never decides: `{label(resolved.rules[by[0]])}` comes first and takes the same"
        help = "the first rule whose `when` holds decides"
        related = tuple(_earlier(resolved, each) for each in by)
        found = Diagnostic("W510", message, severity="warning", help=help, related=related)
        yield located(found, resolved.sources[number].policy, resolved.rules[number].span)


def _earlier(resolved: Resolved, rule: int) -> Related:
    source = resolved.sources[rule]
    span = source.policy.statements[source.statement].span or Span(0, 0, 1, 1, 1, 1)
    return Related("this rule comes first", span, source.policy.source_name)


def _empty_intervals(rule: ir.Rule) -> Iterator[Diagnostic]:
    for node in walk(rule.when) if rule.when is not None else ():
        bounds = interval(node)
        if bounds is not None and not _is_possible(*bounds[1:]):
            message = "this interval contains no number, so the rule never decides"
            yield Diagnostic("W512", message, severity="warning", span=node.span, help="the lower end comes first")


def _is_possible(low: float, low_in: bool, high: float, high_in: bool) -> bool:
    return low < high or (low == high and low_in and high_in)


# --- expectations ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExpectationOutcome:
    """One `expect` and what came of it: the rows of the sites it selects, and what is wrong, if anything."""

    expect: ir.Expect
    rows: Mapping[str, str] = field(default_factory=dict[str, str])
    findings: tuple[Diagnostic, ...] = ()

    @property
    def holds(self) -> bool:
        """True where every selected site gives the row."""
        return not self.findings


@dataclass(frozen=True, slots=True)
class Expectations:
    """The outcomes of a policy's `expect`s in order, and a warning for each of its rules that none of them reaches."""

    outcomes: tuple[ExpectationOutcome, ...]
    uncovered: tuple[Diagnostic, ...]

    @property
    def hold(self) -> bool:
        """True where every one holds, also where there is none."""
        return all(each.holds for each in self.outcomes)

    @property
    def findings(self) -> tuple[Diagnostic, ...]:
        """All that is wrong, then what is not covered."""
        return (*(found for each in self.outcomes for found in each.findings), *self.uncovered)


def run_expectations(policy: str | os.PathLike[str] | ir.Policy, skeleton: Skeleton | None = None) -> Expectations:
    """Run every `expect` of the policy on a model's skeleton, or the built-in one.

    A rule counts as reached where it owns a selected site at some step of an expectation.

    Raises:
        PolicyError: the policy cannot be loaded; what is wrong with an expectation is in its outcome.
    """
    loaded = load(policy)
    model = builtin() if skeleton is None else skeleton
    outcomes, reached = list[ExpectationOutcome](), set[int]()
    for number, expect in enumerate(each for each in loaded.statements if isinstance(each, ir.Expect)):
        outcome, covered = _run(loaded, number, expect, model)
        outcomes.append(outcome)
        reached |= covered
    return Expectations(tuple(outcomes), tuple(_uncovered(loaded, reached)))


def _run(policy: ir.Policy, number: int, expect: ir.Expect, skeleton: Skeleton) -> tuple[ExpectationOutcome, set[int]]:
    try:
        given = _given(policy, expect)
        resolved = resolve(policy, given.params)
        selector = resolved.expects[number].selector
        plan = bind(resolved, skeleton)
        taken = select(selector, skeleton)
        if not taken:
            help = why_nothing(selector, skeleton)
            raise PolicyError.of("E200", f"the expectation selects nothing in `{skeleton.name}`", help=help)
        schedule = simulate(
            plan, steps=expect.steps, timesteps=given.timesteps, sigmas=given.sigmas, signals=given.signals
        )
    except PolicyError as error:
        return ExpectationOutcome(
            expect, {}, tuple(located(each, policy, expect.span) for each in error.diagnostics)
        ), set()
    rows = {modules[0] or "model": _row(plan, schedule, modules) for modules in taken}
    wrong = [(modules, row) for modules, row in zip(taken, rows.values(), strict=True) if row != expect.row]
    findings = (_difference(policy, expect, schedule, wrong, len(taken)),) if wrong else ()
    return ExpectationOutcome(expect, rows, findings), _reached(policy, plan, schedule, taken)


@dataclass(frozen=True, slots=True)
class _Given:
    """The settings of an expectation, by what they set."""

    params: Mapping[str, object]
    signals: Mapping[str, Sequence[float]]
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None


def _given(policy: ir.Policy, expect: ir.Expect) -> _Given:
    params = {each.name for each in policy.statements if isinstance(each, ir.Param)}
    values = {each.name: each.value for each in expect.settings}
    series = {name: _series(name, value, expect.steps) for name, value in values.items() if name not in params}
    clock = [series.pop("t", None), series.pop("sigma", None)]
    return _Given({name: value for name, value in values.items() if name in params}, series, clock[0], clock[1])


def _series(name: str, value: ir.Expression, steps: int) -> list[float]:
    """A number for each step: one for all, or a list of as many as there are steps."""
    try:
        number = constant(value)
    except Undefined as error:
        raise PolicyError.of("E220", f"`{name}` takes constants: {error}") from error
    numbers = number if isinstance(number, tuple) else (number,) * steps
    plain = [float(each) for each in numbers if isinstance(each, int | float) and not isinstance(each, bool)]
    if len(plain) != len(numbers) or len(plain) != steps:
        raise PolicyError.of("E220", f"`{name}` takes one number, or {steps}: one a step")
    return plain


def _row(plan: Plan, schedule: Schedule, modules: Modules) -> str:
    """The row of what the selector takes; what no rule takes computes, unless a site around it reuses."""
    for site in plan.sites:
        if site.modules == modules:
            return schedule.rows[site.name]
    holders = {modules[0], *ancestors(modules[0])}
    around = [site.name for site in plan.sites if holders.intersection(site.modules)]
    letters = zip(*(schedule.rows[name] for name in around), strict=True) if around else [()] * schedule.steps
    return "".join("." if set(column) - {"C"} else "C" for column in letters)


def _difference(
    policy: ir.Policy, expect: ir.Expect, schedule: Schedule, wrong: Sequence[tuple[Modules, str]], total: int
) -> Diagnostic:
    modules, row = wrong[0]
    name = modules[0] if len(modules) == 1 else f"the span from {modules[0]}"
    more = f", as do {len(wrong) - 1} more of {total} sites" if len(wrong) > 1 else ""
    step = next(step for step, (is_, wanted) in enumerate(zip(row, expect.row, strict=True)) if is_ != wanted)
    message = f"`{name or 'model'}` gives {' '.join(row)}{more}"
    found = Diagnostic("E220", message, label=f"step {step} differs", help=_why(schedule, modules, step))
    return located(found, policy, expect.span)


def _why(schedule: Schedule, modules: Modules, step: int) -> str:
    site = next((each for each in schedule.plan.sites if each.modules == modules), None)
    if site is None:
        return f"at step {step}: no rule selects this itself"
    decision = schedule.decision(site.name, step)
    rule = "" if decision.rule is None else f" (`{label(schedule.plan.rules[decision.rule].rule)}`)"
    return f"at step {step} it {_VERBS[decision.verdict]}: {decision.reason}{rule}"


_VERBS = {"compute": "computes", "reuse": "reuses", "hidden": "is hidden"}


# --- coverage --------------------------------------------------------------------------------------------


def _reached(policy: ir.Policy, plan: Plan, schedule: Schedule, taken: Sequence[Modules]) -> set[int]:
    """The numbers of the policy's own statements whose rules own a selected site at some step."""
    wanted = {site.index for site in plan.sites if site.modules in set(taken)}
    owners = {decisions[site].rule for _, decisions in schedule for site in wanted}
    sources = [plan.resolved.sources[rule] for rule in owners if rule is not None]
    return {source.statement for source in sources if source.policy is policy}


def _uncovered(policy: ir.Policy, reached: set[int]) -> Iterator[Diagnostic]:
    for number, statement in enumerate(policy.statements):
        if isinstance(statement, ir.Rule) and number not in reached:
            message = f"no expectation reaches `{label(statement)}`"
            help = "add an `expect` for its sites, with steps at which its `when` holds"
            found = Diagnostic("W520", message, severity="warning", help=help)
            yield located(found, policy, statement.span)
