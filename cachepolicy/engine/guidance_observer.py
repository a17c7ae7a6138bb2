"""Rebuilding of the unconditional half around a forward pass: before it runs, after it has run, and between steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cachepolicy.diffusers.guidance import COND_BRANCHES, UNCOND_BRANCHES
from cachepolicy.engine.batch_view import HALVES, WHOLE
from cachepolicy.engine.cfg_cache import Problem
from cachepolicy.engine.streams import Layout, layout_of
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Undefined
from cachepolicy.planning.schedule import UNDEFINED_ARGUMENT

if TYPE_CHECKING:
    from cachepolicy.engine.forward_pass import ForwardPass

_FACTORS = frozenset({"low", "high", "cond", "uncond"})
"""Arguments that only a rebuilt step reads. A computed step does not evaluate them."""


def describe(call: ForwardPass) -> None:
    """Tell a call and its signals what its arguments show: the grids of its tokens, and the halves of its batch."""
    context, measuring = call.context, call.ledger.measuring
    context.spread = call.state.spread
    if context.execution.reads_grid:
        context.layout = layout(call)
    if measuring is None:
        return
    arguments, signals, model = call.arguments, context.execution.signals, call.owner.module
    if signals.reads_layout:
        measuring.layout = layout(call)
    guide = call.state.guide
    if signals.crossed and not guide.named(context.tick.branch):
        measuring.rows = guide.rows(arguments, call.source, model)
        if measuring.rows is not None:
            measuring.cond = int(call.source.layout("found", model) != "cond first")


def layout(call: ForwardPass) -> Layout:
    """Return what the arguments of a call show of the grids of its tokens."""
    arguments = call.arguments
    patch = getattr(getattr(call.owner.module, "config", None), "patch_size", None)
    return layout_of(arguments.named, arguments.latent_input, patch)


def before(call: ForwardPass, site: int, action: ir.ApproximateUncond) -> None:
    """Answer the unconditional call of its own, or let a guidance batch run its conditional half only.

    Args:
        call: The forward pass.
        site: The site number of the root model.
        action: The action that rebuilds the unconditional half.
    """
    context, ledger, state = call.context, call.ledger, call.state
    layout = context.execution.approximation or action
    settings = context.arguments(layout, site, without=_FACTORS) | context.arguments(action, site, without=_FACTORS)
    guide, tick, model = state.guide, context.tick, call.owner.module
    settings.setdefault("layout", "found")
    if not guide.named(tick.branch) and call.source.require():
        settings["layout"] = call.source.layout(settings["layout"], model)
    call.guidance = settings
    problem = guide.problem(call, action)
    factors = dict[str, Any]()
    if problem is None and ledger.resolve(site).verdict == "reuse":
        try:
            factors = context.arguments(action, site)
        except Undefined:
            problem = Problem(UNDEFINED_ARGUMENT, final=False)
    if problem is not None:
        call.guidance = None if problem.final else settings
        if ledger.resolve(site).verdict == "reuse":
            # The sites inside keep their own histories, so they may still reuse.
            ledger.facts[site] = problem.reason
            ledger.plan()
        return
    if ledger.resolve(site).verdict != "reuse":
        return
    if site in ledger.signals:
        # The other sites were decided before the signals of this one were measured.
        ledger.plan()
    settings |= {name: factors[name] for name in _FACTORS & factors.keys()}
    settings["method"] = action.method
    if guide.named(tick.branch):
        call.answered, call.output = True, guide.answered(action.method, settings)
    else:
        ledger.halve(HALVES[int(settings["layout"] != "cond first")])
        call.args, call.kwargs = guide.halved(call.arguments, call.args, settings)


def after(call: ForwardPass, output: Any) -> Any:
    """Complete the output of a halved call, or store what later steps rebuild from. Return the output."""
    if call.guidance is None or call.answered or not _is_read(call):
        return output
    return call.state.guide.ended(call, call.guidance, output, _channels(call.owner.module))


def release(call: ForwardPass) -> None:
    """Release what no later step rebuilds from."""
    tick = call.context.tick
    kept = not call.context.liveness.approximates(tick, now=to_come(call))
    call.state.guide.release(kept=kept, cond=tick.branch in UNCOND_BRANCHES)


def to_come(call: ForwardPass) -> bool:
    """Return whether an unconditional call of its own may follow in this step."""
    calls = call.state.calls
    named = call.context.tick.branch in COND_BRANCHES or any(key.branch in UNCOND_BRANCHES for key in calls.known)
    return named and not any(key.branch in UNCOND_BRANCHES for key in calls.present)


def _is_read(call: ForwardPass) -> bool:
    """Return whether this or a later step rebuilds an unconditional half from this prediction."""
    context = call.context
    if context.rows is not WHOLE:
        return True
    if context.tick.branch in COND_BRANCHES:
        return to_come(call) and context.liveness.approximates(context.tick, now=True)
    return context.liveness.approximates(context.tick, now=False)


def _channels(module: torch.nn.Module) -> int | None:
    """Return the number of channels of the prediction from the model's config, or None."""
    config = getattr(module, "config", None)
    for name in ("out_channels", "in_channels", "out_visual_dim", "in_visual_dim"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None
