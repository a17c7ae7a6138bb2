"""Plans for pipelines whose guidance is known: in one batch, in two calls of a step, or built into the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from cachepolicy.errors import Diagnostic
from cachepolicy.language import ir
from cachepolicy.language.loader import located
from cachepolicy.language.traversal import names_in
from cachepolicy.planning._possible_values import View, truth
from cachepolicy.planning.plan import Plan

NO_UNCOND = "this model has no unconditional half"


@dataclass(frozen=True, slots=True)
class Guidance:
    """How a pipeline runs classifier-free guidance.

    Attributes:
        form: `batched` (both halves in one call), `sequential` (a call for each), `distilled` (built into the model, so
            that there is no unconditional half), or `unknown`.
        source: The class or the entry of a config that shows it, or the option that says it.
        branches: Names of the calls of a step, in the order they run.
    """

    form: Literal["batched", "sequential", "distilled", "unknown"] = "unknown"
    source: str = ""
    branches: tuple[str, ...] = ("",)

    def __str__(self) -> str:
        match self.form:
            case "distilled":
                return f"guidance is built into the model (`{self.source}`): one call a step, no unconditional half"
            case "sequential":
                return f"guidance runs in calls of its own ({', then '.join(self.branches)}), as in `{self.source}`"
            case "batched":
                return f"guidance runs both halves in one call, as in `{self.source}`"
            case "unknown":
                return "assumed: guidance runs both halves in one call (`--branch cond --branch uncond` for two calls)"


def reads_guidance(plan: Plan) -> bool:
    """Returns whether the schedule of a plan depends on how guidance runs."""
    return any(
        isinstance(bound.rule.action, ir.ApproximateUncond)
        or bound.rule.follow is not None
        or names_in(bound.rule) & {"branch", "uncond_skipped"}
        for bound in plan.rules
    )


def without_uncond(plan: Plan) -> Plan:
    """Returns the plan on a model without an unconditional half: `approximate uncond` computes.

    The plan has a warning (W516) for each such rule that may own a call.
    """
    rules = tuple(
        replace(bound, rule=bound.rule.model_copy(update={"action": ir.Compute()}))
        if isinstance(bound.rule.action, ir.ApproximateUncond)
        else bound
        for bound in plan.rules
    )
    return replace(plan, rules=rules, warnings=(*plan.warnings, *_no_uncond(plan)))


def _no_uncond(plan: Plan) -> Iterator[Diagnostic]:
    for bound in plan.rules:
        if isinstance(bound.rule.action, ir.ApproximateUncond) and truth(bound.rule.when, View({})).true:
            message = f"{NO_UNCOND}, so rule {bound.index + 1} computes"
            finding = Diagnostic("W516", message, "warning", span=bound.rule.action.span, help=distilled_help(plan))
            yield located(finding, plan.resolved.sources[bound.index].policy, bound.rule.span)


def distilled_help(plan: Plan) -> str | None:
    """Returns the advice to set `distilled`, for a policy that has such a param."""
    return "try `distilled=True` (`--set distilled=true`)" if "distilled" in plan.resolved.settings else None
