"""A policy bound to a model: which rule acts on which sites, and which site hides which."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from cachepolicy.errors import Diagnostic, PolicyError, counted, suggestion
from cachepolicy.language import ir
from cachepolicy.language.formatter import format_node
from cachepolicy.language.linker import Resolved, alignment
from cachepolicy.language.parser import parse_selector
from cachepolicy.language.traversal import inner_predictor, stateful_calls, walk
from cachepolicy.language.vocabulary import ACCUMULATORS, CLOCK, MEMORIES
from cachepolicy.planning.module_tree import Skeleton, ancestors
from cachepolicy.planning.selectors import Modules, select


@dataclass(frozen=True, slots=True)
class Site:
    """What rules act on: one module, or a span of blocks that is decided as one.

    Attributes:
        index: Position in `Plan.sites`.
        name: Name in reports.
        modules: Names of the modules that it covers, in the order they run. The name of the root is "".
        kinds: The kinds that all its modules share.
        parents: Numbers of the sites that hide it when they reuse, the outermost first.
    """

    index: int
    name: str
    modules: Modules
    kinds: frozenset[ir.Kind]
    parents: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class BoundRule:
    """A rule with its number among the policy's rules and the numbers of its sites, in ascending order."""

    index: int
    rule: ir.Rule
    sites: tuple[int, ...]
    memories: tuple[ir.Call, ...] = field(init=False, repr=False, compare=False)
    """The `prev` and `kept` calls of its `while`, inner calls first."""
    accumulators: tuple[ir.Call, ...] = field(init=False, repr=False, compare=False)
    """The accumulators of its `while`, inner calls first."""
    arguments: tuple[ir.Argument, ...] = field(init=False, repr=False, compare=False)
    """The arguments of its action that the clock tells, without those that are constants or read externals."""

    def __post_init__(self) -> None:
        condition = self.rule.condition
        for name, functions in (("memories", MEMORIES), ("accumulators", ACCUMULATORS)):
            calls = () if condition is None else stateful_calls(condition, functions)
            object.__setattr__(self, name, calls)
        action = self.rule.action
        given = action.arguments if isinstance(action, ir.Predict | ir.ApproximateUncond) else ()
        object.__setattr__(self, "arguments", tuple(filter(_told_by_the_clock, _leaves(given))))


def measured_clauses(rule: ir.Rule) -> tuple[ir.Expression, ...]:
    """Returns the parts of a rule that read what a run measures: its `while`, and the signal of `align`."""
    clauses = () if rule.condition is None else (rule.condition,)
    measured = alignment(rule.action)
    return clauses if measured is None else (*clauses, ir.Name(name=measured.name))


def _leaves(arguments: Iterable[ir.Argument]) -> Iterator[ir.Argument]:
    """Yields the arguments of an action and of the predictors in it."""
    for argument in arguments:
        inner = inner_predictor(argument.value)
        if inner is not None:
            yield from _leaves(inner.arguments)
        else:
            yield argument


def _told_by_the_clock(argument: ir.Argument) -> bool:
    constant = isinstance(argument.value, ir.Number | ir.Boolean | ir.Text)
    names = {node.name for node in walk(argument.value) if isinstance(node, ir.Name)}
    return not constant and names <= CLOCK.keys()


@dataclass(frozen=True, slots=True)
class RuleGroups:
    """Sites in groups that are taken by the same rules.

    Attributes:
        group_of: Group number by site number.
        rules: The rules of each group, in the order of the policy.
        taken_by: The numbers of the groups that a rule takes, by rule number.
    """

    group_of: Mapping[int, int]
    rules: tuple[tuple[BoundRule, ...], ...]
    taken_by: Mapping[int, Sequence[int]]


def group_rules(rules: Sequence[BoundRule]) -> RuleGroups:
    """Groups the sites of rules.

    Rules with equal selectors share the object `sites`, so the work is distinct selectors times sites plus rules times
    groups.
    """
    distinct = {id(bound.sites): bound.sites for bound in rules}
    takers = dict[int, list[int]]()
    for key, sites in distinct.items():
        for site in sites:
            takers.setdefault(site, []).append(key)
    numbers = dict[tuple[int, ...], int]()
    group_of = {site: numbers.setdefault(tuple(keys), len(numbers)) for site, keys in takers.items()}
    groups_of = {key: sorted({group_of[site] for site in sites}) for key, sites in distinct.items()}
    grouped: list[list[BoundRule]] = [[] for _ in numbers]
    for bound in rules:
        for group in groups_of[id(bound.sites)]:
            grouped[group].append(bound)
    return RuleGroups(
        group_of, tuple(map(tuple, grouped)), {bound.index: groups_of[id(bound.sites)] for bound in rules}
    )


@dataclass(frozen=True, slots=True)
class ProbePlace:
    """The modules that a probe measures: its input before the first, its output after the last."""

    modules: Modules


@dataclass(frozen=True)
class Plan:
    """All facts about a policy on a model that do not depend on the clock.

    Attributes:
        policy: The policy.
        resolved: The policy with its params and the policies that it uses.
        skeleton: The module tree of the model.
        sites: The sites in model order, an outer site before those inside it.
        rules: The rules with their sites.
        needs: Clock words that rules with sites read and that a run may not supply.
        probes: The modules that each probe measures.
        own: For a probe of `self` and the name of a site, the probe of that site in `probes`.
        members: The names of the modules that each `over` takes.
        read_now: The probes that have to be measured before a site is decided, by site number.
        warnings: Findings that are doubtful and no errors.
    """

    policy: ir.Policy = field(repr=False)
    resolved: Resolved = field(repr=False)
    skeleton: Skeleton = field(repr=False)
    sites: tuple[Site, ...]
    rules: tuple[BoundRule, ...]
    needs: frozenset[str] = frozenset()
    probes: Mapping[ir.Probe, ProbePlace] = field(default_factory=dict[ir.Probe, ProbePlace], repr=False)
    own: Mapping[tuple[ir.Probe, str], ir.Probe] = field(
        default_factory=dict[tuple[ir.Probe, str], ir.Probe], repr=False
    )
    members: Mapping[ir.Selector, tuple[str, ...]] = field(
        default_factory=dict[ir.Selector, tuple[str, ...]], repr=False
    )
    read_now: Mapping[int, frozenset[ir.Probe]] = field(default_factory=dict[int, frozenset[ir.Probe]], repr=False)
    warnings: tuple[Diagnostic, ...] = ()

    @cached_property
    def groups(self) -> RuleGroups:
        """The sites in groups with equal rules."""
        return group_rules(self.rules)

    def rules_of(self, site: int) -> tuple[int, ...]:
        """Returns the numbers of the rules that take a site, in the order of the policy."""
        return tuple(bound.index for bound in self.groups.rules[self.groups.group_of[site]])


def find_site(plan: Plan, name: str) -> Site:
    """Finds a site by its name, or by a selector that selects nothing else, such as `blocks[1:]`.

    Raises:
        PolicyError: E252, there is no such site.
    """
    for site in plan.sites:
        if site.name == name:
            return site
    for site in plan.sites:
        if name in site.modules:
            message = f"`{name}` is no site by itself, it belongs to the site `{site.name}`"
            raise PolicyError.of("E252", message, help=f"ask about `{site.name}`")
    try:
        selected = select(parse_selector(name), plan.skeleton)
    except PolicyError:
        selected = ()
    sites = [site for site in plan.sites if site.modules in selected]
    if len(sites) == 1:
        return sites[0]
    if sites:
        message = f"`{name}` selects {len(sites)} sites, not one"
        raise PolicyError.of("E252", message, help=f"ask about one of them, such as `{sites[0].name}`")
    # A selector of modules that are sites one by one, or that hold sites.
    members = {module for modules in selected for module in modules} | ({name} & plan.skeleton.position.keys())
    inside = [
        site.name for site in plan.sites if all(members & {module, *ancestors(module)} for module in site.modules)
    ]
    if inside:
        message = f"`{name}` is no site, and {counted(len(inside), 'site')} {'is' if len(inside) == 1 else 'are'} in it"
        raise PolicyError.of("E252", message, help=f"ask about one of them, such as {_some(inside)}")
    names = [site.name for site in plan.sites]
    help = suggestion(name, names) or (f"the sites are {_some(names)}" if names else "the policy has no site here")
    raise PolicyError.of("E252", f"no rule selects a site `{name}`", help=help)


def _some(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:3]) + (", ..." if names[3:] else "")


def label(rule: ir.Rule, *, width: int = 60) -> str:
    """Returns the text of a rule on one line, cut to `width` columns."""
    text = format_node(rule)
    return text if len(text) <= width else text[: width - 1] + "…"
