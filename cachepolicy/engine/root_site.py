"""The root model itself, where it is a site or has probes: before its forward runs, and after it has run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cachepolicy.engine import guidance_observer, module_run
from cachepolicy.engine.actions import ANSWER, hidden_states
from cachepolicy.engine.span_run import Phase
from cachepolicy.language import ir

if TYPE_CHECKING:
    from cachepolicy.engine.forward_pass import ForwardPass


def before(call: ForwardPass) -> None:
    """Read the inputs, and answer the root model or let it run, perhaps on half of a guidance batch."""
    site, execution, names = call.owner.handles[""], call.context.execution, call.arguments.named
    itself = execution.itself
    if site.special:
        call.enter(site, names)
    if itself is None:
        return
    decision = call.ledger.resolve(itself, module_run.problem(call, site, names, call.args, call.kwargs))
    action = decision.action if isinstance(decision.action, ir.ApproximateUncond) else None
    if execution.approximation is not None and (action is not None or decision.verdict != "reuse"):
        guidance_observer.before(call, itself, action or execution.approximation)
    if call.answered or call.halved:
        return
    # Another rule may reuse the model at a later step.
    for number, position in site.members:
        span = call.span(number)
        if call.enter_span(span, position, names) is Phase.ANSWERING:
            call.answered, call.output = True, span.linked(position, names)
            return
        call.opened = span.begin(position, names)
    if module_run.operation(call, site, call.args, call.kwargs) is ANSWER:
        call.answered, call.output = True, module_run.answered(call, itself)
    elif call.ledger.facts:
        call.ledger.plan()


def after(call: ForwardPass, output: Any) -> Any:
    """Store the results of the root model, and complete the output of half a guidance batch. Return the output."""
    site, execution, owner = call.owner.handles[""], call.context.execution, call.owner
    itself = execution.itself
    if itself is not None and not (call.answered or call.halved):
        for number, position in site.members:
            call.span(number).end(position, owner.module, call.arguments.named, call.opened, output)
        if not execution.keepings[itself].streams and call.context.wanted(itself).outputs:
            module_run.store(call, itself, call.store, hidden_states(call.args, call.kwargs), output)
    return output if call.guidance is None else guidance_observer.after(call, output)
