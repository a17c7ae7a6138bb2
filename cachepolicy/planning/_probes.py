"""Where signals are measured, and whether that is before the rule that reads them decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cachepolicy.errors import Diagnostic, PolicyError
from cachepolicy.language import ir
from cachepolicy.language.formatter import format_node
from cachepolicy.language.traversal import children
from cachepolicy.planning.module_tree import Skeleton, ancestors
from cachepolicy.planning.plan import ProbePlace
from cachepolicy.planning.selectors import Modules, Selection, why_nothing


class ProbeLocator:
    """The probes that the rules of a policy read, and their places in one model.

    Args:
        signals: The signals of the policy.
        selection: Evaluates the selectors of the probes.
    """

    def __init__(self, signals: Sequence[ir.Signal], selection: Selection) -> None:
        self.places: dict[ir.Probe, ProbePlace] = {}
        self._signals = {signal.name: signal for signal in signals}
        self._selection = selection
        self._read: dict[ir.Expression | None, tuple[tuple[ir.Probe, bool], ...]] = {}
        self._reasons: dict[tuple[ir.Probe, int], str | None] = {}

    def locate(self, rule: ir.Rule) -> list[Diagnostic]:
        """Adds the places of a rule's probes. Returns a finding for each that takes not exactly one site (E207)."""
        findings = list[Diagnostic]()
        for probe in dict.fromkeys(probe for probe, _ in self._probes(rule.condition)):
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

    def unmeasurable(self, rule: ir.Rule, sites: tuple[Modules, ...]) -> Iterator[Diagnostic]:
        """Yields the probes that a rule reads at this step although they are known only after its sites ran (E208).

        Args:
            rule: The rule.
            sites: Its sites; equal selectors share the tuple.
        """
        for probe, now in self._probes(rule.condition):
            if now and probe in self.places:
                key = probe, id(sites)
                if key not in self._reasons:
                    self._reasons[key] = self._reason(probe, sites)
                if reason := self._reasons[key]:
                    help = "probe what runs before, or read `prev(...)` or `kept(...)` of it"
                    yield Diagnostic("E208", reason, span=probe.span or rule.span, help=help)

    def _reason(self, probe: ir.Probe, sites: Sequence[Modules]) -> str | None:
        for modules in sites:
            needs = _needs(probe, self.places[probe].modules, modules, self._selection.skeleton)
            if needs is not None:
                return f"`{format_node(probe)}` {needs} `{modules[0] or 'model'}`, which the rule may skip"
        return None

    def _probes(self, condition: ir.Expression | None) -> tuple[tuple[ir.Probe, bool], ...]:
        """Returns every probe below a clause and its signals, and whether the value of this step is read."""
        if condition not in self._read:
            seen = set[tuple[str, bool]]()
            probes = () if condition is None else dict.fromkeys(self._visit(condition, seen, now=True))
            self._read[condition] = tuple(probes)
        return self._read[condition]

    def _visit(self, node: ir.Node, seen: set[tuple[str, bool]], *, now: bool) -> Iterator[tuple[ir.Probe, bool]]:
        match node:
            case ir.Probe():
                yield node, now
            case ir.Name() if node.name in self._signals:
                if (node.name, now) not in seen:
                    seen.add((node.name, now))
                    yield from self._visit(self._signals[node.name].value, seen, now=now)
            case _:
                now = now and not (isinstance(node, ir.Call) and node.function in {"prev", "kept"})
                for child in children(node):
                    yield from self._visit(child, seen, now=now)


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
