"""Warnings for rules that are valid and without effect, as far as a rule alone tells."""

from __future__ import annotations

from collections.abc import Iterator

from cachepolicy.diffusers.guidance import BATCH_CONTEXT, COND_BRANCHES, FURTHER_BRANCHES, UNCOND_BRANCHES
from cachepolicy.errors import Diagnostic, nearest
from cachepolicy.language import ir
from cachepolicy.language.traversal import walk
from cachepolicy.planning.unreachable_rules import interval

_BRANCHES = COND_BRANCHES | UNCOND_BRANCHES | FURTHER_BRANCHES | {BATCH_CONTEXT, ""}


def doubts(rule: ir.Rule) -> Iterator[Diagnostic]:
    """Yields warnings for a rule whose parameters and lets are substituted.

    Args:
        rule: The rule.

    Returns:
        Warnings without a source: an interval that contains no number (W512), a clause that lets the rule never reuse
        (W513) and a branch name that no diffusers pipeline uses (W514).
    """
    for node in walk(rule.when) if rule.when is not None else ():
        bounds = interval(node)
        if bounds is not None and bounds[1] >= bounds[2]:
            message = "this interval contains no number, so the rule never decides"
            yield _warning("W512", message, node, "the lower end comes first")
    clause = None if isinstance(rule.action, ir.Compute) else _always_computes(rule)
    if clause is not None:
        node, reason = clause
        help = "write `-> compute` where that is meant"
        yield _warning("W513", f"the rule never reuses, because {reason}", node or rule, help)
    for name, node in _branch_names(rule):
        if name not in _BRANCHES:
            near = nearest(name, sorted(_BRANCHES - {""}))
            help = f"did you mean `{near}`?" if near else "diffusers' pipelines call their branches `cond` and `uncond`"
            yield _warning("W514", f"no pipeline of diffusers has a branch `{name}`", node or rule, help)


def _warning(code: str, message: str, node: ir.Node, help: str) -> Diagnostic:
    return Diagnostic(code, message, "warning", span=node.span, help=help)


def _always_computes(rule: ir.Rule) -> tuple[ir.Node | None, str] | None:
    """Returns the clause that computes at every step, and the reason."""
    match rule.schedule:
        case ir.Every(interval=ir.Number(value=1)):
            return rule.schedule, "`every 1` computes at every step"
        case ir.Mask(mask=ir.Text(value=letters)) if "0" not in letters:
            return rule.schedule, "its mask has no 0"
        case _:
            pass
    for bound in rule.bounds:
        if isinstance(bound.count, ir.Number) and bound.count.value < 1:
            return bound, "its bound allows no reuse"
    if rule.condition == ir.Boolean(value=False):
        return rule.condition, "its `while` is false"
    return None


def _branch_names(rule: ir.Rule) -> Iterator[tuple[str, ir.Node | None]]:
    """Yields the branch names that a rule compares with or follows, with their nodes."""
    if rule.follow is not None:
        yield rule.follow, None
    branch = ir.Name(name="branch")
    for node in walk(rule):
        match node:
            case ir.Comparison(operands=operands) if branch in operands:
                values = operands
            case ir.Membership(value=value, container=ir.SetOf(items=items)) if value == branch:
                values = items
            case _:
                continue
        yield from ((value.value, value) for value in values if isinstance(value, ir.Text))
