"""Binds a policy to a model: finds the sites of every rule and checks that the rules fit them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from cachepolicy.errors import Diagnostic, PolicyError, counted
from cachepolicy.language import ir
from cachepolicy.language.evaluate import reads_steps
from cachepolicy.language.formatter import format_node
from cachepolicy.language.linker import Resolved, RuleSource
from cachepolicy.language.loader import located
from cachepolicy.language.traversal import names_in, walk
from cachepolicy.planning._probes import ProbeLocator
from cachepolicy.planning.doubtful_rules import doubts
from cachepolicy.planning.history_spec import axis, is_mean, is_scaled
from cachepolicy.planning.module_tree import Skeleton, ancestors
from cachepolicy.planning.plan import BoundRule, Plan, Site, label, measured_clauses
from cachepolicy.planning.selectors import Modules, Selection, why_nothing
from cachepolicy.planning.unreachable_rules import shadowed

RUN_CLOCK_WORDS = frozenset({"t", "steps", "progress", "sigma", "branch", "uncond_skipped"})
"""The clock words that a run may not supply."""


def bind(resolved: Resolved, skeleton: Skeleton) -> Plan:
    """Finds the sites of every rule in a model.

    The work is distinct patterns times names for the selectors, and rules times groups of sites for the rest.

    Args:
        resolved: The policy with its params and the policies that it uses.
        skeleton: The module tree of the model.

    Raises:
        PolicyError: All that does not fit, at once: a rule that takes nothing (E200), missing blocks (E201, E202, E205,
            E206), spans that overlap (E203) or are among other selectors (E204), a probe that takes not exactly one
            site (E207) or that the rule may skip (E208), an action for another site (E209).
    """
    findings = list[Diagnostic]()
    selection = Selection(skeleton, [*resolved.rules, *resolved.signals])
    if any(isinstance(rule.schedule, ir.Mask) and rule.schedule.by_site for rule in resolved.rules):
        resolved = _by_site(resolved, selection, findings)
        selection = Selection(skeleton, [*resolved.rules, *resolved.signals])
    taken = [_taken(resolved, number, selection, findings) for number in range(len(resolved.rules))]
    distinct = dict.fromkeys(modules for sites in {id(sites): sites for sites in taken}.values() for modules in sites)
    findings += _overlaps(resolved, distinct, taken, skeleton)
    if not findings:
        findings += _misplaced(resolved, taken)
    probes = ProbeLocator(resolved.signals, selection)
    for number, rule in enumerate(resolved.rules):
        if taken[number]:
            findings += [_at(resolved, number, finding) for finding in probes.locate(rule, taken[number])]
    if not findings:
        for number, rule in enumerate(resolved.rules):
            findings += [_at(resolved, number, finding) for finding in probes.unmeasurable(rule, taken[number])]
    if findings:
        raise PolicyError(dict.fromkeys(findings))
    sites = _sites(distinct, skeleton)
    rules = tuple(_bound_rules(resolved, taken, sites))
    plan = Plan(
        resolved.policy,
        resolved,
        skeleton,
        sites,
        rules,
        needs(rules, resolved.signals),
        probes.places,
        probes.own,
        probes.members,
        _read_now(probes, rules, sites),
    )
    return replace(plan, warnings=tuple(_warnings(plan)))


def _taken(resolved: Resolved, number: int, selection: Selection, findings: list[Diagnostic]) -> tuple[Modules, ...]:
    rule = resolved.rules[number]
    try:
        taken = selection.select(rule.selector)
    except PolicyError as error:
        findings += [_at(resolved, number, finding) for finding in error.diagnostics if not _excused(rule, finding)]
        return ()
    if not taken and not rule.optional:
        message = f"`{format_node(rule.selector)}` takes nothing in `{selection.skeleton.name}`"
        finding = Diagnostic("E200", message, span=rule.selector.span, help=why_nothing(rule.selector, selection))
        findings.append(_at(resolved, number, finding))
    return taken


def _by_site(resolved: Resolved, selection: Selection, findings: list[Diagnostic]) -> Resolved:
    """Returns the policy with a rule for each site in place of a rule with a mask for each site."""
    rules, sources = list[ir.Rule](), list[RuleSource]()
    for number, rule in enumerate(resolved.rules):
        schedule = rule.schedule
        if not (isinstance(schedule, ir.Mask) and schedule.by_site and isinstance(schedule.mask, ir.ListOf)):
            rules.append(rule)
            sources.append(resolved.sources[number])
            continue
        taken, masks = _taken(resolved, number, selection, findings), schedule.mask.items
        if taken and len(taken) != len(masks):
            message = f"{counted(len(masks), 'mask')} for {counted(len(taken), 'site')}"
            help = "a mask for each site, in the order in which `plan` prints the sites"
            findings.append(_at(resolved, number, Diagnostic("E214", message, span=schedule.span, help=help)))
        for modules, mask in zip(taken, masks, strict=False):
            one = schedule.model_copy(update={"mask": mask, "by_site": False})
            name = ir.Pattern(regex=f"^{re.escape(modules[0])}$", span=rule.selector.span)
            selector = name if len(modules) == 1 and modules[0] else rule.selector
            rules.append(rule.model_copy(update={"schedule": one, "selector": selector}))
            sources.append(resolved.sources[number])
    return replace(resolved, rules=tuple(rules), sources=tuple(sources))


def _bound_rules(
    resolved: Resolved, taken: Sequence[tuple[Modules, ...]], sites: Sequence[Site]
) -> Iterator[BoundRule]:
    """Yields the rules with the numbers of their sites; equal selectors share one tuple of numbers."""
    by_modules = {site.modules: site.index for site in sites}
    numbers = dict[int, tuple[int, ...]]()
    for index, (rule, selected) in enumerate(zip(resolved.rules, taken, strict=True)):
        if id(selected) not in numbers:
            numbers[id(selected)] = tuple(sorted(by_modules[modules] for modules in selected))
        yield BoundRule(index, rule, numbers[id(selected)])


def _excused(rule: ir.Rule, finding: Diagnostic) -> bool:
    """Returns whether a finding is none for an `optional` rule, which may find no blocks."""
    return rule.optional and finding.code in {"E201", "E202", "E205"}


def _at(resolved: Resolved, number: int, finding: Diagnostic) -> Diagnostic:
    return located(finding, resolved.sources[number].policy, resolved.rules[number].span)


# --- sites -----------------------------------------------------------------------------------------------


def _sites(taken: Iterable[Modules], skeleton: Skeleton) -> tuple[Site, ...]:
    """Returns each set of modules as one site, in model order, an outer site before those inside it."""
    position = skeleton.position
    ordered = sorted(taken, key=lambda modules: (position[modules[0]], -len(modules)))
    holders = dict[str, list[int]]()
    for index, modules in enumerate(ordered):
        for name in modules:
            holders.setdefault(name, []).append(index)
    around = [set(_around(modules[0], holders)) - {index} for index, modules in enumerate(ordered)]
    for index, modules in enumerate(ordered):
        around[index] = {outer for outer in around[index] if _holds(ordered[outer], modules)}
    return tuple(
        Site(
            index,
            site_name(modules, skeleton),
            modules,
            frozenset[ir.Kind].intersection(*(skeleton[name].kinds for name in modules)),
            tuple(sorted(around[index], key=lambda outer: (len(around[outer]), outer))),
        )
        for index, modules in enumerate(ordered)
    )


def _around(name: str, holders: Mapping[str, Sequence[int]]) -> Iterator[int]:
    """Yields the sites that hold a module or one around it."""
    yield from holders.get(name, ())
    for outer in ancestors(name):
        yield from holders.get(outer, ())


def _holds(outer: Modules, inner: Modules) -> bool:
    """Returns whether the first of two sites around one module holds the other: it is longer, or further up."""
    return len(outer) > len(inner) or inner[0] not in outer


def site_name(modules: Modules, skeleton: Skeleton) -> str:
    """Returns the name of a site in reports: a module, `model` for the root, or `list[a:b]` parts joined by `+`."""
    if len(modules) == 1:
        return modules[0] or "model"
    parts = dict[str, list[str]]()
    for name in modules:
        parts.setdefault(name.rpartition(".")[0], []).append(name)
    return "+".join(_slice(name, blocks, skeleton) for name, blocks in parts.items())


def _slice(name: str, blocks: Sequence[str], skeleton: Skeleton) -> str:
    first = skeleton.elements[name].index(blocks[0])
    return f"{name}[{first}:{first + len(blocks)}]"


def _overlaps(
    resolved: Resolved, distinct: Iterable[Modules], taken: Sequence[Sequence[Modules]], skeleton: Skeleton
) -> Iterator[Diagnostic]:
    """Yields spans that share a block although neither is inside the other."""
    holder = dict[str, Modules]()
    # From the largest span on, all blocks of a span are in the same smallest span so far, or two spans cross.
    for span in sorted((modules for modules in distinct if len(modules) > 1), key=len, reverse=True):
        holders = dict.fromkeys(holder.get(name, ()) for name in span)
        if len(holders) == 1:
            holder.update(dict.fromkeys(span, span))
            continue
        other = next(modules for modules in holders if modules and not set(span) <= set(modules))
        first, second = sorted((span, other), key=lambda modules: (skeleton.position[modules[0]], -len(modules)))
        names = f"`{site_name(first, skeleton)}` and `{site_name(second, skeleton)}`"
        message = f"{names} overlap, and neither stands inside the other"
        help = "one decision and one history belong to a span; cut the spans so that they meet or nest"
        rule = max(number for number, sites in enumerate(taken) if span in sites or other in sites)
        finding = Diagnostic("E203", message, span=resolved.rules[rule].selector.span, help=help)
        yield _at(resolved, rule, finding)


def _misplaced(resolved: Resolved, taken: Sequence[Sequence[Modules]]) -> Iterator[Diagnostic]:
    """Yields actions that fit only the whole model, and clauses that fit any other site."""
    for number, rule in enumerate(resolved.rules):
        on_model = ("",) in taken[number]
        if isinstance(rule.action, ir.ApproximateUncond) and any(modules != ("",) for modules in taken[number]):
            finding = Diagnostic("E209", "`approximate uncond` acts on `model` only", span=rule.action.span)
            yield _at(resolved, number, finding)
        whole = any(len(modules) > 1 or modules == ("",) for modules in taken[number])
        if is_mean(rule.action) and whole:
            message = "`reuse mean` acts on single modules inside the model"
            yield _at(resolved, number, Diagnostic("E209", message, span=rule.action.span))
        if on_model and "uncond_skipped" in _read(rule, resolved.signals):
            message = "a rule on `model` decides first, so it cannot read `uncond_skipped`"
            yield _at(resolved, number, Diagnostic("E209", message))


# --- what the rules read ---------------------------------------------------------------------------------


def needs(rules: Sequence[BoundRule], signals: Sequence[ir.Signal]) -> frozenset[str]:
    """Returns the clock words of `RUN_CLOCK_WORDS` that rules with sites read."""
    words = set[str]()
    for bound in rules:
        if bound.sites:
            words |= _read(bound.rule, signals) & RUN_CLOCK_WORDS
    return frozenset(words)


def _read(rule: ir.Rule, signals: Sequence[ir.Signal]) -> set[str]:
    """Returns the names that a rule reads, also through signals and as implied by its clauses."""
    read = names_in(rule)
    nodes: list[ir.Node] = [rule]
    # Signals are in dependency order, so that those that read a signal come before it here.
    for signal in reversed(signals):
        if signal.name in read:
            read |= names_in(signal.value)
            nodes.append(signal.value)
    if any(reads_steps(part) for node in nodes for part in walk(node)):
        read.add("steps")
    if isinstance(rule.schedule, ir.Every) and rule.schedule.anchor == "end":
        read.add("steps")
    if isinstance(rule.action, ir.Predict):
        read.add(axis(rule.action))
        if is_scaled(rule.action) and axis(rule.action) == "step":
            read.add("steps")
    if any(isinstance(part, ir.Call) and part.function == "wiener" for node in nodes for part in walk(node)):
        read.add("sigma")
    if rule.follow is not None:
        read.add("branch")
    return read


def _read_now(
    probes: ProbeLocator, rules: Sequence[BoundRule], sites: Sequence[Site]
) -> dict[int, frozenset[ir.Probe]]:
    """Returns the probes that have to be measured before a site is decided, for the sites that wait for any."""
    read = dict[int, set[ir.Probe]]()
    for bound in rules:
        if measured_clauses(bound.rule):
            for site in bound.sites:
                read.setdefault(site, set()).update(probes.read_now(bound.rule, sites[site].modules))
    return {site: frozenset(found) for site, found in read.items() if found}


def _replaced(plan: Plan, number: int, by: Sequence[int]) -> bool:
    """Returns whether a rule gives way to others of the same used policy, as the params of the `use` have it."""
    source = plan.resolved.sources[number].policy
    return source is not plan.policy and all(plan.resolved.sources[other].policy is source for other in by)


def _warnings(plan: Plan) -> Iterator[Diagnostic]:
    if plan.rules and not plan.sites:
        message = f"no rule takes anything in `{plan.skeleton.name}`: every step is computed"
        yield located(Diagnostic("W511", message, severity="warning"), plan.policy, None)
    for bound in plan.rules:
        if bound.sites:
            yield from (_at(plan.resolved, bound.index, doubt) for doubt in doubts(bound.rule))
    for number, by in shadowed(plan.rules):
        if _replaced(plan, number, by):
            continue
        others = " and ".join(f"rule {other + 1}, `{label(plan.rules[other].rule)}`" for other in by)
        message = f"this rule never decides: {others} come{'s' if len(by) == 1 else ''} first at all its sites"
        help = "the first rule whose `when` holds decides; move this one up, or narrow the other"
        yield _at(plan.resolved, number, Diagnostic("W510", message, severity="warning", help=help))
