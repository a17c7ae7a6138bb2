"""Where signals are measured, and whether that is before the rule that reads them decides."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cachepolicy.errors import Diagnostic, PolicyError
from cachepolicy.language import ir
from cachepolicy.language.formatter import format_node
from cachepolicy.language.traversal import children
from cachepolicy.language.vocabulary import MEMORIES
from cachepolicy.planning.module_tree import Skeleton, ancestors
from cachepolicy.planning.plan import ProbePlace, measured_clauses
from cachepolicy.planning.selectors import Modules, Selection, why_nothing


@dataclass(frozen=True, slots=True)
class _Reading:
    """A probe that a clause reads: at this step (`now`) or remembered. `me` is the site that `self` stands for."""

    probe: ir.Probe
    now: bool
    me: str | None = None


class ProbeLocator:
    """The probes that the rules of a policy read, and their places in one model.

    Attributes:
        places: The place of each probe. A probe of `self` is here once for each site, with its name.
        own: The probe with its name, for a probe of `self` and the name of its site.
        members: The names of the sites that each `over` takes.

    Args:
        signals: The signals of the policy.
        selection: Evaluates the selectors of the probes.
    """

    def __init__(self, signals: Sequence[ir.Signal], selection: Selection) -> None:
        self.places: dict[ir.Probe, ProbePlace] = {}
        self.own: dict[tuple[ir.Probe, str], ir.Probe] = {}
        self.members: dict[ir.Selector, tuple[str, ...]] = {}
        self._signals = {signal.name: signal for signal in signals}
        self._selection = selection
        self._read: dict[ir.Expression | None, tuple[_Reading, ...]] = {}
        self._reasons: dict[tuple[ir.Probe, int], str | None] = {}

    def locate(self, rule: ir.Rule, sites: tuple[Modules, ...]) -> list[Diagnostic]:
        """Adds the places of a rule's probes. Returns a finding for each that takes not exactly one site (E207)."""
        findings = list[Diagnostic]()
        for clause in measured_clauses(rule):
            findings += self._find_members(clause, set())
        if findings:
            return findings
        for reading in dict.fromkeys(self._read_by(rule)):
            if isinstance(reading.probe.selector, ir.Itself):
                findings += self._locate_own(reading, sites)
                continue
            if reading.probe in self.places:
                continue
            probe = reading.probe
            try:
                taken = self._selection.select(probe.selector)
            except PolicyError as error:
                findings += error.diagnostics
                continue
            if len(taken) == 1:
                self.places[probe] = ProbePlace(taken[0])
            else:
                names = ", ".join(f"`{modules[0]}`" for modules in taken[:3])
                several = f"it takes {names}, ...: write `^...$` around one name"
                help = several if taken else why_nothing(probe.selector, self._selection)
                count = "nothing" if not taken else f"{len(taken)} sites"
                where = f"takes {count} in `{self._selection.skeleton.name}`"
                message = f"`{format_node(probe)}` {where}, and a probe takes exactly one"
                findings.append(Diagnostic("E207", message, span=probe.span, help=help))
        return findings

    def _locate_own(self, reading: _Reading, sites: Sequence[Modules]) -> Iterator[Diagnostic]:
        """Gives a probe of `self` its places: the site around it in `over`, otherwise every site of the rule."""
        probe, places = reading.probe, sites if reading.me is None else [(reading.me,)]
        for modules in places:
            if len(modules) > 1:
                span = f"a span of {len(modules)} blocks"
                message = f"`{format_node(probe)}` is of one module or block, and the rule takes {span}"
                help = "`each blocks` takes the blocks one by one"
                yield Diagnostic("E207", message, span=probe.span, help=help)
                return
            name = next(iter(modules))
            pattern = ir.OfKind(of="model") if not name else ir.Pattern(regex=f"^{re.escape(name)}$")
            named = probe.model_copy(update={"selector": pattern})
            self.own[probe, name] = named
            self.places[named] = ProbePlace(modules)

    def _find_members(self, node: ir.Node | None, seen: set[str]) -> Iterator[Diagnostic]:
        """Finds the sites of every `over` below a clause and its signals."""
        if isinstance(node, ir.Name) and node.name in self._signals and node.name not in seen:
            seen.add(node.name)
            yield from self._find_members(self._signals[node.name].value, seen)
        if isinstance(node, ir.Over) and node.selector not in self.members:
            taken = self._selection.select(node.selector)
            if not taken or any(len(modules) > 1 for modules in taken):
                count = "a span of blocks" if taken else f"nothing in `{self._selection.skeleton.name}`"
                message = f"`over {format_node(node.selector)}` takes {count}, and it takes single modules"
                help = (
                    "`each blocks` takes the blocks one by one"
                    if taken
                    else why_nothing(node.selector, self._selection)
                )
                yield Diagnostic("E207", message, span=node.span, help=help)
            self.members[node.selector] = tuple(modules[0] for modules in taken)
        for child in children(node) if node is not None else ():
            yield from self._find_members(child, seen)

    def unmeasurable(self, rule: ir.Rule, sites: tuple[Modules, ...]) -> Iterator[Diagnostic]:
        """Yields the probes that a rule reads at this step although they are known only after its sites ran (E208).

        Args:
            rule: The rule.
            sites: Its sites; equal selectors share the tuple.
        """
        help = "probe what runs before, or read `prev(...)` or `kept(...)` of it"
        for reading in self._read_by(rule):
            probe = reading.probe
            if reading.now and isinstance(probe.selector, ir.Itself) and reading.me is None:
                if probe.stream in {"output", "residual"}:
                    message = f"`{format_node(probe)}` exists only after the site has run, which the rule may skip"
                    yield Diagnostic("E208", message, span=probe.span or rule.span, help=help)
                continue
            named = self.own.get((probe, reading.me or ""), probe)
            if reading.now and named in self.places:
                key = named, id(sites)
                if key not in self._reasons:
                    self._reasons[key] = self._reason(named, sites)
                if reason := self._reasons[key]:
                    yield Diagnostic("E208", reason, span=probe.span or rule.span, help=help)

    def read_now(self, rule: ir.Rule, site: Modules) -> Iterator[ir.Probe]:
        """Yields the probes whose values at this step a rule reads before it decides the site."""
        for reading in self._read_by(rule):
            if reading.now:
                me = site[0] if reading.me is None else reading.me
                probe = self.own.get((reading.probe, me), reading.probe)
                if probe in self.places:
                    yield probe

    def _reason(self, probe: ir.Probe, sites: Sequence[Modules]) -> str | None:
        for modules in sites:
            needs = _needs(probe, self.places[probe].modules, modules, self._selection.skeleton)
            if needs is not None:
                return f"`{format_node(probe)}` {needs} `{modules[0] or 'model'}`, which the rule may skip"
        return None

    def _read_by(self, rule: ir.Rule) -> Iterator[_Reading]:
        """Yields the probes that a rule reads."""
        for clause in measured_clauses(rule):
            yield from self._probes(clause)

    def _probes(self, condition: ir.Expression | None) -> tuple[_Reading, ...]:
        """Returns every probe below a clause and its signals, and whether the value of this step is read."""
        if condition not in self._read:
            seen = set[tuple[str, bool, str | None]]()
            probes = () if condition is None else dict.fromkeys(self._visit(condition, seen, now=True, me=None))
            self._read[condition] = tuple(probes)
        return self._read[condition]

    def _visit(
        self, node: ir.Node, seen: set[tuple[str, bool, str | None]], *, now: bool, me: str | None
    ) -> Iterator[_Reading]:
        match node:
            case ir.Probe():
                yield _Reading(node, now, me if isinstance(node.selector, ir.Itself) else None)
            case ir.Name() if node.name in self._signals:
                if (node.name, now, me) not in seen:
                    seen.add((node.name, now, me))
                    yield from self._visit(self._signals[node.name].value, seen, now=now, me=me)
            case ir.Over():
                for member in self.members.get(node.selector, ()):
                    yield from self._visit(node.value, seen, now=now, me=member)
            case _:
                # On another branch the value is measured in another call.
                elsewhere = isinstance(node, ir.Call) and node.function in MEMORIES | {"cross"}
                for child in children(node):
                    yield from self._visit(child, seen, now=now and not elsewhere, me=me)


def _needs(probe: ir.Probe, path: Modules, site: Modules, skeleton: Skeleton) -> str | None:
    """Returns how a probe depends on the site's own forward, None where it does not."""
    position, before = skeleton.position, probe.stream in {"input", "argument"}
    first, last = path[0], path[-1]
    inside = _within(first, site)
    later = _is_later(first, site, skeleton)
    if before and (first == site[0] or not inside) and not later:
        return None
    if not before and any(name == last or last in ancestors(name) or name in path for name in site):
        return "needs the output of"
    if inside:
        in_first = site[0] in ancestors(first) and "block" in skeleton[site[0]].kinds
        return None if in_first else "stands inside"
    return "comes after" if later and position[first] > position[site[0]] else None


def _within(name: str, site: Modules) -> bool:
    return name in site or any(outer in site for outer in ancestors(name))


def _is_later(name: str, site: Modules, skeleton: Skeleton) -> bool:
    """Returns whether a module's block runs after the site. Without a run only the order of blocks is known."""
    order = skeleton.block_order

    def block(name: str) -> int | None:
        return next((order[outer] for outer in (name, *ancestors(name)) if outer in order), None)

    probed, decided = block(name), block(site[0])
    return probed is not None and decided is not None and probed > decided and not _within(name, site)
