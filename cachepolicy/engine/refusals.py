"""Refusals and warnings about how a root model or its sites are called."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, NoReturn

import torch

from cachepolicy.diffusers.guidance import distilled_by
from cachepolicy.engine.class_swap import plain
from cachepolicy.engine.hooks import SiteHandle, runs
from cachepolicy.errors import PolicyError, counted, warn
from cachepolicy.reports.nothing_reused import why_nothing_was_reused

if TYPE_CHECKING:
    from cachepolicy.engine.root_model import RootModel
    from cachepolicy.engine.session_state import State


def refuse_again(root: RootModel, reason: str) -> NoReturn:
    """Reject a forward pass that has to run again and cannot.

    Raises:
        PolicyError: Always (E342).
    """
    raise PolicyError.of(
        "E342",
        f"one forward calls {_repeated(root)} more than once, which was noticed after the policy had "
        f"answered, and it cannot run again, because {reason}",
        help="these modules compute from the next call on; select modules that run once to avoid this",
    )


def warn_of_repeats(root: RootModel) -> None:
    """Warn that sites compute because one forward pass calls them more than once (W604)."""
    warn(
        "W604",
        f"one forward of `{plain(type(root.module)).__name__}` calls {_repeated(root)} more than once, "
        "and a history holds one result of a forward: what is selected or measured there computes at every step",
        help="select modules that one forward calls once",
    )


def warn_of_compilers(root: RootModel) -> None:
    """Warn that every call computes, if torch is too old to keep what compiled models compute (W606)."""
    if not hasattr(torch.compiler, "set_stance"):
        warn(
            "W606",
            f"`{plain(type(root.module)).__name__}` is compiled, and torch {torch.__version__} loses what a graph "
            "keeps for a later call: every call computes",
            help="use torch 2.6 or later, or do not compile the model",
        )


def refuse_step(root: RootModel) -> None:
    """Reject a step context for a policy that needs the inputs or the output of the root model.

    Raises:
        PolicyError: A rule or a probe is on the model itself, or a call is running (E324).
    """
    if runs(root):
        raise PolicyError.of(
            "E324",
            f"`run.step` is inside a call of `{type(root.module).__name__}`, or inside another `run.step`",
            help="leave one of them out: each is an evaluation of the model",
        )
    if root.execution.itself is not None or root.handles[""].special:
        raise PolicyError.of(
            "E324",
            "the policy has a rule or a probe on the model itself, and `run.step` cannot answer or see its calls",
            help="call the model's own `forward`, or select its blocks",
        )


def warn_of_lone_site(root: RootModel, site: SiteHandle) -> None:
    """Warn that a site runs outside any call of the root model, where the policy has no effect (W601)."""
    warn(
        "W601",
        f"`{site.name}` runs outside any call of its `{type(root.module).__name__}`, where the policy does nothing",
        help="a loop of your own over the blocks needs `with run.step(t=..., branch=...):` around each evaluation",
    )


def is_running(module: torch.nn.Module) -> bool:
    """Return True inside a call of a module in this thread, also one that began without the policy."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code in _CALLS and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


_CALLS = {getattr(torch.nn.Module, name).__code__ for name in ("__call__", "_call_impl")}


def _repeated(root: RootModel) -> str:
    """Return the modules that one forward calls more than once, as text."""
    plan = root.execution.plan
    sites = [plan.sites[site].name for site in sorted(root.repeated)]
    probed = [plan.probes[probe].modules[0] or "model" for probe in root.remeasured]
    names = list(dict.fromkeys([*sites, *probed]))
    rest = f" and {counted(len(names) - 3, 'other')}" if names[3:] else ""
    return ", ".join(f"`{name}`" for name in names[:3]) + rest


def warn_of_no_reuse(root: RootModel, state: State) -> None:
    """Warn that a trajectory has reused nothing, and say why as far as its record tells."""
    message = f"the policy reused nothing in a trajectory of {counted(state.count, 'call')}"
    if state.trajectory is not None:
        distilled = distilled_by(getattr(root.module, "config", None)) is not None
        why = why_nothing_was_reused(state.trajectory, distilled=distilled)
        ts = [call.tick.t for call in state.trajectory.calls if call.tick.t is not None]
        seen = f" (t went from {ts[0]:g} to {ts[-1]:g})" if ts else ""
        message = f"{message}: {why or 'no rule allows it'}{seen}"
    warnings.warn(message, UserWarning, stacklevel=3)
