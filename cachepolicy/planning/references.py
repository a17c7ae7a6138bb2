"""Thresholds on models for editing, whose calls hold the tokens of reference pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cachepolicy.errors import Diagnostic
from cachepolicy.language import ir
from cachepolicy.language.formatter import format_node
from cachepolicy.language.loader import located
from cachepolicy.language.traversal import close_signals, names_in, walk
from cachepolicy.planning.module_tree import ancestors
from cachepolicy.planning.plan import Plan


def with_references(plan: Plan, source: str | None) -> Plan:
    """Returns the plan with a warning (W517) for each rule that measures the tokens of reference pictures.

    Args:
        plan: A plan.
        source: The class of a pipeline, or of a model, whose calls hold reference pictures. None if there are none.
    """
    return plan if source is None else replace(plan, warnings=(*plan.warnings, *_measured(plan, source)))


def _measured(plan: Plan, source: str) -> Iterator[Diagnostic]:
    signals = close_signals(plan.resolved.signals)
    facts = plan.skeleton.facts
    of_model = facts is not None and facts.class_name == source
    for bound in plan.rules:
        condition = bound.rule.condition
        if condition is None or not bound.sites:
            continue
        read = [condition, *(signals[name] for name in sorted(names_in(condition) & signals.keys()))]
        probes = [node for expression in read for node in walk(expression) if isinstance(node, ir.Probe)]
        probe = next((probe for probe in probes if _has_all_tokens(plan, probe)), None)
        if probe is not None:
            text = format_node(probe.model_copy(update={"tokens": ir.Tokens(latent=True)}))
            # The calls of a model for references alone do not tell which tokens these have.
            help = "measure a range of tokens, `tokens: a:b`" if of_model else f"measure `{text}`"
            message = f"rule {bound.index + 1} measures the tokens of reference pictures too, as in `{source}`"
            finding = Diagnostic("W517", message, "warning", span=condition.span, help=help)
            yield located(finding, plan.resolved.sources[bound.index].policy, bound.rule.span)


def _has_all_tokens(plan: Plan, probe: ir.Probe) -> bool:
    """Returns whether a probe takes a sequence with all tokens: of the model, a block, or a module inside a block."""
    place = plan.probes.get(probe)
    if probe.tokens is not None or probe.stream == "argument" or place is None:
        return False
    blocks = plan.skeleton.block_order
    return any(not name or {name, *ancestors(name)} & blocks.keys() for name in place.modules)
