"""Binds a policy to a model: finds the sites of every rule and checks that the rules fit them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from cachepolicy.errors import Diagnostic, PolicyError
from cachepolicy.language import ir
from cachepolicy.language.formatter import format_node
from cachepolicy.language.linker import Resolved
from cachepolicy.language.loader import located
from cachepolicy.language.traversal import names_in, walk
from cachepolicy.planning._probes import measured, unmeasurable
from cachepolicy.planning.module_tree import Skeleton, ancestors
from cachepolicy.planning.plan import BoundRule, Plan, ProbePlace, Site, label
from cachepolicy.planning.selectors import Modules, select, why_nothing
from cachepolicy.planning.unreachable_rules import shadowed

RUN_CLOCK_WORDS = frozenset({"t", "steps", "progress", "sigma", "branch", "uncond_skipped"})
"""The clock words that a run may not be able to tell."""


def bind(resolved: Resolved, skeleton: Skeleton) -> Plan:
    """Find the sites of every rule in a model.

    Raises:
        PolicyError: all that does not fit, at once: a rule that takes nothing (E200), blocks that the model has not
            (E201, E202, E205, E206), spans that overlap (E203) or stand among other selectors (E204), a probe that
            takes not exactly one site (E207) or that the rule may skip (E208), an action that another site is for
            (E209).
    """
    findings = list[Diagnostic]()
    taken = [_taken(resolved, number, skeleton, findings) for number in range(len(resolved.rules))]
    sites = _sites({modules for each in taken for modules in each}, skeleton)
    findings += _overlaps(resolved, sites, taken)
    if not findings:
        findings += _misplaced(resolved, taken)
    by_modules = {site.modules: site.index for site in sites}
    rules = tuple(
        BoundRule(number, rule, tuple(sorted(by_modules[modules] for modules in taken[number])))
        for number, rule in enumerate(resolved.rules)
    )
    probes = dict[ir.Probe, ProbePlace]()
    for each in rules:
        if each.sites:
            errors = measured(each.rule, resolved.signals, skeleton, probes)
            findings += [_at(resolved, each.index, error) for error in errors]
    if not findings:
        findings += _unmeasurable(resolved, rules, sites, probes, skeleton)
    if findings:
        raise PolicyError(dict.fromkeys(findings))
    plan = Plan(resolved.policy, resolved, skeleton, sites, rules, needs(rules, resolved.signals), probes)
    return replace(plan, warnings=tuple(_warnings(plan)))


def _taken(resolved: Resolved, number: int, skeleton: Skeleton, findings: list[Diagnostic]) -> tuple[Modules, ...]:
    rule = resolved.rules[number]
    try:
        taken = select(rule.selector, skeleton)
    except PolicyError as error:
        findings += [_at(resolved, number, each) for each in error.diagnostics if not _excused(rule, each)]
        return ()
    if not taken and not rule.optional:
        message = f"`{format_node(rule.selector)}` takes nothing in `{skeleton.name}`"
        finding = Diagnostic("E200", message, span=rule.selector.span, help=why_nothing(rule.selector, skeleton))
        findings.append(_at(resolved, number, finding))
    return taken


def _excused(rule: ir.Rule, finding: Diagnostic) -> bool:
    """An `optional` rule may find no blocks."""
    return rule.optional and finding.code in {"E201", "E202", "E205"}


def _at(resolved: Resolved, number: int, finding: Diagnostic) -> Diagnostic:
    return located(finding, resolved.sources[number].policy, resolved.rules[number].span)


# --- sites -----------------------------------------------------------------------------------------------


def _sites(taken: Iterable[Modules], skeleton: Skeleton) -> tuple[Site, ...]:
    """Each set of modules as one site, in model order, the outer one first."""
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
    """The sites that hold a module or what it stands in."""
    yield from holders.get(name, ())
    for outer in ancestors(name):
        yield from holders.get(outer, ())


def _holds(outer: Modules, inner: Modules) -> bool:
    """Of two sites around one module, whether the first holds the other: it is longer, or further up."""
    return len(outer) > len(inner) or inner[0] not in outer


def site_name(modules: Modules, skeleton: Skeleton) -> str:
    """The site's name in reports: the module's own, `model` for the root, `list[a:b]` joined by `+` for a span."""
    if len(modules) == 1:
        return modules[0] or "model"
    parts = dict[str, list[str]]()
    for name in modules:
        parts.setdefault(name.rpartition(".")[0], []).append(name)
    return "+".join(_slice(name, blocks, skeleton) for name, blocks in parts.items())


def _slice(name: str, blocks: Sequence[str], skeleton: Skeleton) -> str:
    first = skeleton.elements[name].index(blocks[0])
    return f"{name}[{first}:{first + len(blocks)}]"


def _overlaps(resolved: Resolved, sites: Sequence[Site], taken: Sequence[Sequence[Modules]]) -> Iterator[Diagnostic]:
    """Spans that share a block though neither stands in the other."""
    spans = [site for site in sites if len(site.modules) > 1]
    for index, one in enumerate(spans):
        for other in spans[index + 1 :]:
            shared = set(one.modules) & set(other.modules)
            if shared and shared != set(one.modules) and shared != set(other.modules):
                message = f"`{one.name}` and `{other.name}` overlap, and neither stands inside the other"
                help = "one decision and one history belong to a span; cut the spans so that they meet or nest"
                rule = max(number for number, each in enumerate(taken) if one.modules in each or other.modules in each)
                yield _at(
                    resolved, rule, Diagnostic("E203", message, span=resolved.rules[rule].selector.span, help=help)
                )


def _misplaced(resolved: Resolved, taken: Sequence[Sequence[Modules]]) -> Iterator[Diagnostic]:
    """Actions and clauses that fit the whole model only, or any site but that."""
    for number, rule in enumerate(resolved.rules):
        on_model = [modules == ("",) for modules in taken[number]]
        if isinstance(rule.action, ir.ApproximateUncond) and not all(on_model):
            finding = Diagnostic("E209", "`approximate uncond` acts on `model` only", span=rule.action.span)
            yield _at(resolved, number, finding)
        if any(on_model) and "uncond_skipped" in _read(rule, resolved.signals):
            message = "a rule on `model` decides first, so it cannot read `uncond_skipped`"
            yield _at(resolved, number, Diagnostic("E209", message))


def _unmeasurable(
    resolved: Resolved,
    rules: Sequence[BoundRule],
    sites: Sequence[Site],
    probes: Mapping[ir.Probe, ProbePlace],
    skeleton: Skeleton,
) -> Iterator[Diagnostic]:
    for bound in rules:
        found = unmeasurable(
            bound.rule, [sites[index].modules for index in bound.sites], probes, resolved.signals, skeleton
        )
        yield from (_at(resolved, bound.index, each) for each in found)


# --- what the rules read ---------------------------------------------------------------------------------


def needs(rules: Sequence[BoundRule], signals: Sequence[ir.Signal]) -> frozenset[str]:
    """The clock words that rules with sites read, of those that a run may not be able to tell."""
    found = set[str]()
    for bound in rules:
        if bound.sites:
            found |= _read(bound.rule, signals) & RUN_CLOCK_WORDS
    return frozenset(found)


def _read(rule: ir.Rule, signals: Sequence[ir.Signal]) -> set[str]:
    """The names that a rule reads, through its signals too, with what its clauses imply."""
    found = names_in(rule)
    nodes: list[ir.Node] = [rule]
    # Signals are in dependency order, so that those that read a signal come before it here.
    for signal in reversed(signals):
        if signal.name in found:
            found |= names_in(signal.value)
            nodes.append(signal.value)
    if any(isinstance(part, ir.Lookup) for node in nodes for part in walk(node)):
        found.add("steps")
    if isinstance(rule.schedule, ir.Every) and rule.schedule.anchor == "end":
        found.add("steps")
    if rule.follow is not None:
        found.add("branch")
    return found


def _warnings(plan: Plan) -> Iterator[Diagnostic]:
    if plan.rules and not plan.sites:
        message = f"no rule takes anything in `{plan.skeleton.name}`: every step is computed"
        yield located(Diagnostic("W511", message, severity="warning"), plan.policy, None)
    for number, by in shadowed(plan.rules):
        others = " and ".join(f"rule {each + 1}, `{label(plan.rules[each].rule)}`" for each in by)
        message = f"this rule never decides: {others} come{'s' if len(by) == 1 else ''} first at all its sites"
        help = "the first rule whose `when` holds decides; move this one up, or narrow the other"
        yield _at(plan.resolved, number, Diagnostic("W510", message, severity="warning", help=help))
