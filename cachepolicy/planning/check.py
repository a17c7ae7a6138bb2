"""What can be found wrong or doubtful in a policy without a model, and its expectations."""

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
from cachepolicy.planning.bind import bind
from cachepolicy.planning.doubtful_rules import doubts
from cachepolicy.planning.module_tree import Skeleton, ancestors, builtin
from cachepolicy.planning.plan import BoundRule, Plan, label
from cachepolicy.planning.selectors import Modules, Selection, why_nothing
from cachepolicy.planning.simulation import Schedule, rule_visits, simulate
from cachepolicy.planning.unreachable_rules import shadowed

EXPECTATION_WORK = 10_000_000
"""Rules that the expectations of a policy may visit: steps times rules times groups of sites. Takes about a minute."""


def check(policy: str | os.PathLike[str] | ir.Policy) -> tuple[Diagnostic, ...]:
    """Returns all that is wrong or doubtful in a policy with its default settings. Does not raise.

    Errors of the text come first. The policies that it uses are looked at if the text has none.

    Args:
        policy: A file, the name of a shipped policy, or a policy.
    """
    try:
        loaded = load(policy)
    except PolicyError as error:
        return error.diagnostics
    own = tuple(located(finding, loaded, None) for finding in check_names(loaded))
    return own if any(finding.severity == "error" for finding in own) else (*own, *_whole(loaded))


def check_text(text: str | bytes, *, source: str = "<text>") -> tuple[Diagnostic, ...]:
    """Checks a text that an editor holds, which may have errors.

    Args:
        text: The text.
        source: Its path, where the policies that it uses are looked for.
    """
    policy, findings = recover(text, source=source)
    if any(finding.severity == "error" for finding in findings):
        return findings
    path, held = Path(source).absolute(), prepare_source(text, source)[0]
    if is_file(path):
        policy = policy.model_copy(update={"source_name": str(path)})
    # Findings about this text show its lines, not those of the file at present.
    further = (
        held.locate(finding) if Path(finding.source or "").absolute() == path else finding for finding in _whole(policy)
    )
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
        yield from (located(finding, source, rule.span) for finding in doubts(rule))
    # Without a model each distinct selector stands for one site.
    numbers = dict[ir.Selector, int]()
    rules = [
        BoundRule(number, rule, (numbers.setdefault(rule.selector, len(numbers)),))
        for number, rule in enumerate(resolved.rules)
    ]
    for number, by in shadowed(rules):
        message = f"this rule never decides: `{label(resolved.rules[by[0]])}` comes first and takes the same"
        help = "the first rule whose `when` holds decides"
        related = tuple(_earlier(resolved, rule) for rule in by)
        finding = Diagnostic("W510", message, severity="warning", help=help, related=related)
        yield located(finding, resolved.sources[number].policy, resolved.rules[number].span)


def _earlier(resolved: Resolved, rule: int) -> Related:
    source = resolved.sources[rule]
    span = source.policy.statements[source.statement].span or Span(0, 0, 1, 1, 1, 1)
    return Related("this rule comes first", span, source.policy.source_name)


# --- expectations ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExpectationOutcome:
    """The outcome of one `expect`.

    Attributes:
        expect: The expectation.
        rows: The rows of the sites that it selects, by module name.
        findings: What is wrong, if anything.
    """

    expect: ir.Expect
    rows: Mapping[str, str] = field(default_factory=dict[str, str])
    findings: tuple[Diagnostic, ...] = ()

    @property
    def holds(self) -> bool:
        """True where every selected site gives the row."""
        return not self.findings


@dataclass(frozen=True, slots=True)
class Expectations:
    """The outcomes of a policy's expectations in order, and a warning for each of its rules that none reaches."""

    outcomes: tuple[ExpectationOutcome, ...]
    uncovered: tuple[Diagnostic, ...]

    @property
    def hold(self) -> bool:
        """True where all expectations hold, also where there are none."""
        return all(outcome.holds for outcome in self.outcomes)

    @property
    def findings(self) -> tuple[Diagnostic, ...]:
        """The findings of all expectations, then those about rules that none reaches."""
        return (*(finding for outcome in self.outcomes for finding in outcome.findings), *self.uncovered)


def run_expectations(policy: str | os.PathLike[str] | ir.Policy, skeleton: Skeleton | None = None) -> Expectations:
    """Runs every `expect` of a policy. A rule is reached where it owns a selected site at some step of one.

    Args:
        policy: A file, the name of a shipped policy, or a policy.
        skeleton: The model; a generic transformer by default.

    Raises:
        PolicyError: The policy cannot be loaded, or has no expectation whose outcome would show its errors. The errors
            of an expectation are in its outcome.
    """
    runner = _Runner(load(policy), builtin() if skeleton is None else skeleton)
    expects = [statement for statement in runner.policy.statements if isinstance(statement, ir.Expect)]
    if not expects:
        resolve(runner.policy, model=runner.skeleton.facts)
    outcomes = tuple(runner.run(number, expect) for number, expect in enumerate(expects))
    return Expectations(outcomes, tuple(_uncovered(runner.policy, runner.reached)))


@dataclass(slots=True)
class _Runner:
    """Runs expectations of one policy on one model; those with equal params share one plan.

    Attributes:
        reached: Numbers of the policy's own statements whose rules own a selected site at some step.
        work: Number of rules that were visited.
    """

    policy: ir.Policy
    skeleton: Skeleton
    reached: set[int] = field(default_factory=set[int])
    work: int = 0
    _bound: dict[tuple[tuple[str, object], ...], tuple[Resolved, Plan, Selection] | PolicyError] = field(
        default_factory=dict[tuple[tuple[str, object], ...], tuple[Resolved, Plan, Selection] | PolicyError]
    )

    def run(self, number: int, expect: ir.Expect) -> ExpectationOutcome:
        """Runs one expectation."""
        try:
            settings = _settings(self.policy, expect)
            resolved, plan, selection = self._plan(settings.params)
            selector = resolved.expects[number].selector
            taken = selection.select(selector)
            if not taken:
                help = why_nothing(selector, selection)
                raise PolicyError.of("E200", f"the expectation selects nothing in `{self.skeleton.name}`", help=help)
            self._count(plan, expect)
            schedule = simulate(
                plan,
                steps=expect.steps,
                timesteps=settings.timesteps,
                sigmas=settings.sigmas,
                signals=settings.signals,
            )
        except PolicyError as error:
            findings = tuple(located(finding, self.policy, expect.span) for finding in error.diagnostics)
            return ExpectationOutcome(expect, {}, findings)
        rows = dict(zip((modules[0] or "model" for modules in taken), _rows(schedule, taken), strict=True))
        wrong = [(modules, row) for modules, row in zip(taken, rows.values(), strict=True) if row != expect.row]
        self._reach(schedule, taken)
        return ExpectationOutcome(
            expect, rows, (_difference(self.policy, expect, schedule, wrong, len(taken)),) if wrong else ()
        )

    def _plan(self, params: Mapping[str, ir.Expression]) -> tuple[Resolved, Plan, Selection]:
        key = tuple(params.items())
        if key not in self._bound:
            try:
                resolved = resolve(self.policy, params, model=self.skeleton.facts)
                selection = Selection(self.skeleton, [expect.selector for expect in resolved.expects])
                self._bound[key] = resolved, bind(resolved, self.skeleton), selection
            except PolicyError as error:
                self._bound[key] = error
        bound = self._bound[key]
        if isinstance(bound, PolicyError):
            raise bound
        return bound

    def _count(self, plan: Plan, expect: ir.Expect) -> None:
        self.work += rule_visits(plan, expect.steps)
        if self.work > EXPECTATION_WORK:
            message = f"the expectations visit {self.work} rules, and at most {EXPECTATION_WORK} are visited"
            help = "a visit is a rule at a group of sites at a step: use fewer rules, steps or expectations"
            raise PolicyError.of("E221", message, help=help)

    def _reach(self, schedule: Schedule, taken: Sequence[Modules]) -> None:
        wanted = {site.index for site in schedule.plan.sites if site.modules in set(taken)}
        owners = {decisions[site].rule for _, decisions in schedule for site in wanted}
        sources = [schedule.plan.resolved.sources[rule] for rule in owners if rule is not None]
        self.reached |= {source.statement for source in sources if source.policy is self.policy}


@dataclass(frozen=True, slots=True)
class _Settings:
    """The settings of an expectation, by what they set."""

    params: Mapping[str, ir.Expression]
    signals: Mapping[str, Sequence[float]]
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None


def _settings(policy: ir.Policy, expect: ir.Expect) -> _Settings:
    names = {statement.name for statement in policy.statements if isinstance(statement, ir.Param)}
    values = {setting.name: setting.value for setting in expect.settings}
    series = {name: _series(name, value, expect.steps) for name, value in values.items() if name not in names}
    timesteps, sigmas = series.pop("t", None), series.pop("sigma", None)
    return _Settings({name: value for name, value in values.items() if name in names}, series, timesteps, sigmas)


def _series(name: str, value: ir.Expression, steps: int) -> list[float]:
    """Returns a number for each step: one for all, or a list of as many as there are steps."""
    try:
        number = constant(value)
    except Undefined as error:
        raise PolicyError.of("E220", f"`{name}` takes constants: {error}") from error
    numbers = number if isinstance(number, tuple) else (number,) * steps
    plain = [float(item) for item in numbers if isinstance(item, int | float) and not isinstance(item, bool)]
    if len(plain) != len(numbers) or len(plain) != steps:
        raise PolicyError.of("E220", f"`{name}` takes one number, or {steps}: one a step")
    return plain


def _rows(schedule: Schedule, taken: Sequence[Modules]) -> Iterator[str]:
    """Yields the row of each selected site. Modules that no rule takes compute, unless a site around them reuses."""
    rows, sites = schedule.rows, schedule.plan.sites
    own = {site.modules: rows[site.name] for site in sites}
    holding = dict[str, list[str]]()
    for site in sites:
        for name in site.modules:
            holding.setdefault(name, []).append(rows[site.name])
    for modules in taken:
        around = [row for name in (modules[0], *ancestors(modules[0])) for row in holding.get(name, ())]
        letters = zip(*around, strict=True) if around else [()] * schedule.steps
        yield own.get(modules) or "".join("." if set(column) - {"C"} else "C" for column in letters)


def _difference(
    policy: ir.Policy, expect: ir.Expect, schedule: Schedule, wrong: Sequence[tuple[Modules, str]], total: int
) -> Diagnostic:
    modules, row = wrong[0]
    name = modules[0] if len(modules) == 1 else f"the span from {modules[0]}"
    more = f", as do {len(wrong) - 1} more of {total} sites" if len(wrong) > 1 else ""
    step = next(step for step, (actual, wanted) in enumerate(zip(row, expect.row, strict=True)) if actual != wanted)
    message = f"`{name or 'model'}` gives {' '.join(row)}{more}"
    finding = Diagnostic("E220", message, label=f"step {step} differs", help=_why(schedule, modules, step))
    return located(finding, policy, expect.span)


def _why(schedule: Schedule, modules: Modules, step: int) -> str:
    site = next((site for site in schedule.plan.sites if site.modules == modules), None)
    if site is None:
        return f"at step {step}: no rule selects this itself"
    decision = schedule.decision(site.name, step)
    rule = "" if decision.rule is None else f" (`{label(schedule.plan.rules[decision.rule].rule)}`)"
    return f"at step {step} it {decision.verb}: {decision.reason}{rule}"


def _uncovered(policy: ir.Policy, reached: set[int]) -> Iterator[Diagnostic]:
    for number, statement in enumerate(policy.statements):
        if isinstance(statement, ir.Rule) and number not in reached:
            message = f"no expectation reaches `{label(statement)}`"
            help = "add an `expect` for its sites, with steps at which its `when` holds"
            finding = Diagnostic("W520", message, severity="warning", help=help)
            yield located(finding, policy, statement.span)
