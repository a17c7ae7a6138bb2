"""All that a run has on a model or pipeline: its hooks, its settings and its sessions."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from cachepolicy.engine import compat
from cachepolicy.engine.audit import Audits
from cachepolicy.engine.class_swap import ATTRIBUTE, Handle, is_swapped, restore, swap
from cachepolicy.engine.history_packing import packing_of
from cachepolicy.engine.history_storage import ANYHOW, Storing
from cachepolicy.engine.introspection import is_pipeline, unwrapped, walk
from cachepolicy.engine.memory_budget import Budget, MemoryUsage
from cachepolicy.engine.pipeline_calls import PipelineCall, pipeline_override
from cachepolicy.engine.root_hooks import ROOT_METHODS, root_entry_override, root_override
from cachepolicy.engine.root_model import RootModel
from cachepolicy.engine.scheduler_hook import SchedulerFollower, Weakly, follow, unfollow
from cachepolicy.engine.session_config import BoundPolicy
from cachepolicy.engine.session_state import State
from cachepolicy.engine.sessions import Sessions
from cachepolicy.engine.tuned_for import Guidance
from cachepolicy.errors import PolicyError
from cachepolicy.planning.facts import Fact
from cachepolicy.tracing.trace import Trace

if TYPE_CHECKING:
    from cachepolicy.engine.run import Run

_HOOKS = threading.RLock()
"""Held while the hooks of a run are placed or removed, so that two runs never place hooks on one model."""


class PipelineHandle(Handle):
    """Carries a run on a pipeline, so that copies of the pipeline do not carry it."""

    __slots__ = ("attachment",)

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment


class Attachment:
    """What a run shares with its root models: the target, the policy, the sessions and all hooks.

    Attributes:
        run: The run.
        modules: The denoisers, by their names in the pipeline.
        roots: The root models, by the same names, while the hooks are placed.
        disabled: Whether the hooks are never placed, because `CACHEPOLICY_DISABLE` is set.
    """

    run: Run

    def __init__(self, target: Any, modules: Mapping[str, torch.nn.Module], bound: BoundPolicy) -> None:
        options = bound.session_config.options
        packing, limit = packing_of(options.history_dtype, options.history_device), options.limit
        self.target = target
        self.modules = dict(modules)
        self.bound = bound
        self.session_config = bound.session_config
        self.storing = ANYHOW if packing is None and limit is None else Storing(packing)
        self.budget = None if limit is None else Budget(limit)
        self.trace = Trace() if options.trace else None
        self.audits = Audits()
        self.sessions = Sessions(options.max_sessions, self._finished)
        self.roots: dict[str, RootModel] = {}
        self.pipelines: Weakly[Any] = Weakly()
        self.disabled = False
        self._handle = PipelineHandle(self)
        self._schedulers: Weakly[Any] = Weakly()

    def _finished(self, name: str, state: State) -> None:
        if name in self.roots:
            self.roots[name].finished(state)

    @property
    def memory(self) -> MemoryUsage:
        """Bytes of history that the sessions hold now, and the sites that the memory limit excludes."""
        every = [item for session in self.sessions.alive() for item in list(session.states.items())]
        states = [state for name, state in every if name in self.roots]
        refused = {
            state.execution.plan.sites[site].name: None
            for state in states
            for branch in state.branches.values()
            for site, slot in enumerate(branch.slots)
            if slot.storing.lacking is Fact.OVER_LIMIT or (state.guide.over_limit and site == state.execution.itself)
        }
        calls = [call for trajectory in self.trace or () for call in list(trajectory.calls)]
        options = self.session_config.options
        return MemoryUsage(
            sum(state.held for state in states),
            max((call.held for call in calls), default=0),
            options.limit,
            tuple(refused),
            self.sessions.continued,
            options.max_sessions,
        )

    # --- hooks -------------------------------------------------------------------------------------------

    def place(self) -> None:
        """Place all hooks. When one fails, remove those that were placed.

        Raises:
            PolicyError: The model has a run (E301) or another cache (E340), perhaps since `apply` checked it.
        """
        with _HOOKS:
            require_free(self.target, self.modules)
            try:
                for name, module in self.modules.items():
                    root = self.roots[name] = RootModel(self, name, module)
                    root.placement.place()
                    methods = {"__call__": root_override, "_call_impl": root_entry_override}
                    methods |= {name: made for name, made in ROOT_METHODS.items() if hasattr(type(module), name)}
                    swap(module, methods, root)
                if is_pipeline(self.target):
                    self._take_up(self.target)
                self.follower_of(self.session_config.options.scheduler)
            except BaseException:
                self.lift()
                raise

    def remove(self) -> None:
        """Remove all hooks, and end the sessions.

        Raises:
            PolicyError: A forward pass is running (E305).
        """
        with _HOOKS:
            # The list closes every root before the check, so that no new forward pass begins in between.
            if not all([root.close() for root in self.roots.values()]):
                for root in self.roots.values():
                    root.reopen()
                raise PolicyError.of(
                    "E305",
                    "the run cannot be removed while a forward is running",
                    help="remove it when the call has returned",
                )
            self.sessions.clear()
            self.lift()

    def lift(self) -> None:
        """Remove all hooks, also while a forward pass is running."""
        with _HOOKS:
            for scheduler in self._schedulers:
                unfollow(scheduler, self)
            for pipeline in self.pipelines:
                restore(pipeline)
            for root in reversed(self.roots.values()):
                restore(root.module)
                root.placement.lift()
            for collection in (self._schedulers, self.pipelines, self.roots):
                collection.clear()

    # --- pipelines and schedulers ------------------------------------------------------------------------

    def _take_up(self, pipeline: Any) -> None:
        swap(pipeline, {"__call__": pipeline_override}, self._handle)
        self.pipelines.add(pipeline)

    def follower_of(self, scheduler: Any) -> SchedulerFollower | None:
        """Return the follower of a scheduler, or None. The first call installs the follower."""
        follower = None if scheduler is None else follow(scheduler, self)
        if follower is not None:
            self._schedulers.add(scheduler)
        return follower

    def add(self, pipeline: Any) -> None:
        """Let another pipeline over the same denoisers use the run. See `Run.follow`."""
        with _HOOKS:
            if not self.roots:
                raise PolicyError.of("E302", "the run was removed", help="`cachepolicy.apply` attaches a new one")
            if not is_pipeline(pipeline):
                raise PolicyError.of(
                    "E300", f"`{type(pipeline).__name__}` is no pipeline", help="pass a diffusers pipeline"
                )
            handle = pipeline.__dict__.get(ATTRIBUTE)
            if handle is self._handle:
                return
            if handle is not None:
                raise _already("the pipeline")
            shared = map(unwrapped, pipeline.components.values())
            if not any(model is module for model in shared for module in self.modules.values()):
                raise PolicyError.of(
                    "E315",
                    f"no denoiser of this `{type(pipeline).__name__}` is one that the policy was applied to",
                    help="`run.share(scheduler=...)` makes one that shares them; or apply the policy to this one too",
                )
            self._take_up(pipeline)

    def call_of(self, pipeline: Any, guidance: Guidance) -> PipelineCall:
        """Return the state of one pipeline call: one trajectory, in its own session unless one is entered.

        Args:
            pipeline: The pipeline.
            guidance: Returns the numbers by which the call guides.

        Raises:
            PolicyError: A denoiser of the pipeline was replaced after `apply`.
        """
        mine = pipeline is self.target
        for name, module in self.modules.items():
            if unwrapped(getattr(pipeline, name, module if not mine else None)) is not module:
                raise PolicyError.of(
                    "E303",
                    f"the pipeline's `{name}` was replaced after the policy was applied",
                    help="`run.remove()`, then apply the policy to the pipeline again",
                )
        follower = self.follower_of(getattr(pipeline, "scheduler", None))
        return PipelineCall(self.sessions, pipeline, follower, guidance)


def require_free(target: Any, roots: Mapping[str, torch.nn.Module]) -> None:
    """Raise if a model has a run (E301) or another cache (E340)."""
    for name, root in roots.items():
        modules = [module for _, module in walk(root)]
        if any([vars(module).get(ATTRIBUTE) is not None for module in modules]):
            raise _already(f"`{name}`" if name else "the model")
        compat.refuse(root, target, modules)
    if is_swapped(target):
        raise _already("the pipeline")


def _already(subject: str) -> PolicyError:
    return PolicyError.of(
        "E301",
        f"{subject} has a policy already",
        help="`cachepolicy.remove(...)` it first, or combine both with `use` in one policy",
    )
