"""Where signals are measured, and whether that can be done before the rule that reads them decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from cachepolicy.errors import Diagnostic, PolicyError
from cachepolicy.language import ir
from cachepolicy.language.formatter import format_node
from cachepolicy.language.traversal import children
from cachepolicy.planning.module_tree import Skeleton, ancestors
from cachepolicy.planning.plan import ProbePlace
from cachepolicy.planning.selectors import Modules, select, why_nothing


def measured(
    rule: ir.Rule, signals: Sequence[ir.Signal], skeleton: Skeleton, found: dict[ir.Probe, ProbePlace]
) -> list[Diagnostic]:
    """Add the place of every probe that the rule reads to `found`; gives those that take not just one site (E207)."""
    values = {signal.name: signal for signal in signals}
    findings = list[Diagnostic]()
    for probe in dict.fromkeys(probe for probe, _ in _probes(rule.condition, values)):
        text = format_node(probe)
        try:
            taken = select(probe.selector, skeleton)
        except PolicyError as error:
            findings += error.diagnostics
            continue
        if len(taken) == 1:
            found[probe] = ProbePlace(taken[0])
        else:
            names = ", ".join(f"`{modules[0]}`" for modules in taken[:3])
            several = f"it takes {names}, ...: write `^...$` around one name"
            help = several if taken else why_nothing(probe.selector, skeleton)
            count = "nothing" if not taken else f"{len(taken)} sites"
            message = f"`{text}` takes {count} in `{skeleton.name}`, and a probe takes exactly one"
            findings.append(Diagnostic("E207", message, span=probe.span, help=help))
    return findings


def unmeasurable(
    rule: ir.Rule,
    sites: Sequence[Modules],
    probes: Mapping[ir.Probe, ProbePlace],
    signals: Sequence[ir.Signal],
    skeleton: Skeleton,
) -> Iterator[Diagnostic]:
    """The probes that the rule reads at this step though they are known only once its site has run (E208)."""
    values = {signal.name: signal for signal in signals}
    for probe, now in dict.fromkeys(_probes(rule.condition, values)):
        if not now or probe not in probes:
            continue
        place = probes[probe].modules
        for modules in sites:
            reason = _needs(probe, place, modules, skeleton)
            if reason is not None:
                shown = modules[0] or "model"
                message = f"`{format_node(probe)}` {reason} `{shown}`, which the rule may skip"
                help = "probe what runs before, or read `prev(...)` or `kept(...)` of it"
                yield Diagnostic("E208", message, span=probe.span or rule.span, help=help)
                break


def _needs(probe: ir.Probe, place: Modules, site: Modules, skeleton: Skeleton) -> str | None:
    """How the probe depends on the site's own forward, if it does."""
    position, before = skeleton.position, probe.stream in {"input", "argument"}
    first, last = place[0], place[-1]
    inside = _within(first, site)
    if before and (first == site[0] or not inside) and not _is_later(first, site, skeleton):
        return None
    if not before and any(name == last or last in ancestors(name) or name in place for name in site):
        return "needs the output of"
    if inside:
        in_first = site[0] in ancestors(first) and "block" in skeleton[site[0]].kinds
        return None if in_first else "stands inside"
    if position[first] > position[site[0]] and _is_later(first, site, skeleton):
        return "comes after"
    return None


def _within(name: str, site: Modules) -> bool:
    return name in site or any(outer in site for outer in ancestors(name))


def _is_later(name: str, site: Modules, skeleton: Skeleton) -> bool:
    """True where a module's block runs after the site; only the order of blocks is known without a run."""
    blocks = [block for name in skeleton.block_lists for block in skeleton.elements[name]]
    order = {block: index for index, block in enumerate(blocks)}

    def block(name: str) -> int | None:
        return next((order[each] for each in (name, *ancestors(name)) if each in order), None)

    probed, decided = block(name), block(site[0])
    return probed is not None and decided is not None and probed > decided and not _within(name, site)


def _probes(
    expression: ir.Expression | None, signals: Mapping[str, ir.Signal], *, now: bool = True
) -> Iterator[tuple[ir.Probe, bool]]:
    """Every probe below a clause, with its signals written out, and whether this step's value is read."""
    seen = set[tuple[str, bool]]()

    def visit(node: ir.Node, now: bool) -> Iterator[tuple[ir.Probe, bool]]:
        match node:
            case ir.Probe():
                yield node, now
            case ir.Name() if node.name in signals:
                if (node.name, now) not in seen:
                    seen.add((node.name, now))
                    yield from visit(signals[node.name].value, now)
            case ir.Call(function="prev" | "kept"):
                for child in children(node):
                    yield from visit(child, False)
            case _:
                for child in children(node):
                    yield from visit(child, now)

    if expression is not None:
        yield from visit(expression, now)
