"""A policy bound to a model: which rule acts on which sites, and which site hides which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from cachepolicy.errors import Diagnostic
from cachepolicy.language import ir
from cachepolicy.language.formatter import format_node
from cachepolicy.language.linker import Resolved
from cachepolicy.language.traversal import stateful_calls
from cachepolicy.language.vocabulary import ACCUMULATORS, MEMORIES
from cachepolicy.planning.module_tree import Skeleton
from cachepolicy.planning.selectors import Modules


@dataclass(frozen=True, slots=True)
class Site:
    """What rules act on: one module, or a span of blocks that is decided as one.

    `index` is its place in `Plan.sites`; `modules` are the names of what it covers, in the order they run (the root's
    is ""); `parents` are the sites that hide it when they reuse, the outermost first.
    """

    index: int
    name: str
    modules: Modules
    kinds: frozenset[ir.Kind]
    parents: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class BoundRule:
    """A rule with its number among the policy's rules and the sites it acts on."""

    index: int
    rule: ir.Rule
    sites: tuple[int, ...]
    memories: tuple[ir.Call, ...] = field(init=False, repr=False, compare=False)
    """The `prev` and `kept` of its `while`, the inner ones first."""
    accumulators: tuple[ir.Call, ...] = field(init=False, repr=False, compare=False)
    """The `sum` and `product` of its `while`, likewise."""

    def __post_init__(self) -> None:
        condition = self.rule.condition
        for name, functions in (("memories", MEMORIES), ("accumulators", ACCUMULATORS)):
            calls = () if condition is None else stateful_calls(condition, functions)
            object.__setattr__(self, name, calls)


@dataclass(frozen=True, slots=True)
class ProbePlace:
    """The modules that a probe measures: its input before the first, its output after the last."""

    modules: Modules


@dataclass(frozen=True)
class Plan:
    """Everything about a policy on a model that does not depend on the clock.

    `sites` stand in model order, an outer one before those inside it. `needs` names the clock words that the rules with
    sites read, `probes` the modules that each probe measures. `warnings` holds what is doubtful but not wrong.
    """

    policy: ir.Policy = field(repr=False)
    resolved: Resolved = field(repr=False)
    skeleton: Skeleton = field(repr=False)
    sites: tuple[Site, ...]
    rules: tuple[BoundRule, ...]
    needs: frozenset[str] = frozenset()
    probes: Mapping[ir.Probe, ProbePlace] = field(default_factory=dict[ir.Probe, ProbePlace], repr=False)
    warnings: tuple[Diagnostic, ...] = ()

    @cached_property
    def _rules_of(self) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in self.sites]
        for bound in self.rules:
            for site in bound.sites:
                found[site].append(bound.index)
        return tuple(map(tuple, found))

    def rules_of(self, site: int) -> tuple[int, ...]:
        """The numbers of the rules that take the site, in the order they are asked."""
        return self._rules_of[site]


def label(rule: ir.Rule, *, width: int = 60) -> str:
    """The rule's text on one line, cut to `width` columns, for reports."""
    text = format_node(rule)
    return text if len(text) <= width else text[: width - 1] + "…"
