"""A policy that is attached to a model: what a program does with it."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch

from cachepolicy.engine.attachment import Attachment
from cachepolicy.engine.audit import AuditSummary
from cachepolicy.engine.class_swap import plain
from cachepolicy.engine.contexts import setting, step_context
from cachepolicy.engine.introspection import is_pipeline
from cachepolicy.engine.memory_budget import MemoryUsage
from cachepolicy.engine.root_hooks import denoiser_of, stepped
from cachepolicy.engine.root_model import DISABLED
from cachepolicy.errors import PolicyError
from cachepolicy.planning.cost_model import Work
from cachepolicy.planning.grid import notebook_html
from cachepolicy.planning.plan import Plan
from cachepolicy.reports.html.page import page

P = TypeVar("P")


class Counted(Protocol):
    """FLOPs of one forward pass of a model, as a total and per module."""

    total: int
    modules: Mapping[str, int]


class Run:
    """A policy that is attached to a model. As a context manager, it removes the policy on exit.

    A run cannot be copied or pickled (E316). Copies of its model or pipeline carry no policy.

    Attributes:
        plan: The plan of the first denoiser.
        plans: The plans of all denoisers, by name.
        trace: The record of what the sites did, or None when tracing is off.
    """

    def __init__(self, attachment: Attachment) -> None:
        self.target = attachment.target
        self.policy = attachment.bound.policy
        self.trace = attachment.trace
        self._attachment = attachment
        self._sessions = attachment.sessions
        attachment.run = self

    @property
    def plans(self) -> dict[str, Plan]:
        """The plan of each denoiser, by its name in the pipeline."""
        return {name: execution.plan for name, execution in self._attachment.session_config.executions.items()}

    @property
    def plan(self) -> Plan:
        """The plan of the first denoiser."""
        return next(iter(self.plans.values()))

    @property
    def attached(self) -> bool:
        """True until the run is removed."""
        return bool(self._attachment.roots)

    @property
    def memory(self) -> MemoryUsage:
        """Bytes of history that the sessions hold now, and the sites that the memory limit excludes."""
        return self._attachment.memory

    @property
    def audit(self) -> AuditSummary:
        """The errors of the answers in the trajectories that `RunOptions(audit=...)` has audited."""
        return self._attachment.audits.summary

    def report(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        flops: Counted | None = None,
        uncached: float | None = None,
    ) -> str:
        """Return an HTML report of the newest session, as one file without external resources.

        Args:
            path: Where the report is written, if given.
            flops: FLOPs of one forward pass, as `cachepolicy.tools.flops.count` returns them.
            uncached: Seconds that all forward passes take without the policy. Estimated by default.

        Returns:
            The HTML text.

        Raises:
            PolicyError: The run keeps no trace (E309).
        """
        if self.trace is None:
            raise PolicyError.of("E309", "the run keeps no trace to report", help="apply the policy with `trace=True`")
        work = None if flops is None else Work(flops.total, flops.modules)
        text = page(self.trace.latest, work=work, uncached=uncached)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def _repr_html_(self) -> str:
        return notebook_html({}, "the run keeps no trace") if self.trace is None else self.trace.to_html()

    # --- pipelines ---------------------------------------------------------------------------------------

    def follow(self, pipeline: P) -> P:
        """Let another pipeline over the same denoisers use this run.

        Calls of the pipeline are sessions of their own, and its scheduler is their clock. Servers create such a
        pipeline for each request. The run holds only weak references to it, so no cleanup is needed.

        Args:
            pipeline: A pipeline that shares at least one denoiser with this run.

        Returns:
            The same pipeline.

        Raises:
            PolicyError: The run was removed (E302), the object is no pipeline (E300), it has a policy already (E301),
                or none of its denoisers belongs to this run (E315).
        """
        if not self._attachment.disabled:
            self._attachment.add(pipeline)
        return pipeline

    def share(self, kind: type | None = None, **parts: Any) -> Any:
        """Create a pipeline over the models of the target, and let it use this run.

        `from_pipe` is not used: it does not recognize the attached models, and it casts all models.

        Args:
            kind: The pipeline class. By default the class of the target.
            **parts: Components or arguments that replace those of the target, such as `scheduler=...`.

        Returns:
            The new pipeline.

        Raises:
            PolicyError: The policy was applied to a model (E300), or the class takes none of its denoisers (E315).
        """
        if not is_pipeline(self.target):
            raise PolicyError.of("E300", "the policy was applied to a model", help="apply it to a pipeline to share it")
        made: Any = kind or plain(type(self.target))  # pyright: ignore[reportUnknownArgumentType]
        held = {**getattr(self.target, "config", {}), **self.target.components, **parts}
        taken = inspect.signature(made).parameters
        return self.follow(made(**{name: value for name, value in held.items() if name in taken}))

    # --- using -------------------------------------------------------------------------------------------

    def session(
        self,
        key: Hashable,
        *,
        timestep: Callable[[], Any] | None = None,
        scheduler: Any = None,
        steps: int | None = None,
        guidance: bool | None = None,
        audit: float | None = None,
        **params: Any,
    ) -> contextlib.AbstractContextManager[None]:
        """Return a context manager that assigns the calls inside to the session `key`.

        Leaving the context does not end the session. A session ends with its trajectory, by `reset(key)`, or when it is
        the least recently used one beyond `max_sessions`. The settings apply to this session until it ends, in place of
        those of `apply`, and need not be repeated when the session is entered again.

        Args:
            key: Any hashable value except None.
            timestep: As for `apply`.
            scheduler: As for `apply`.
            steps: As for `apply`.
            guidance: As for `apply`.
            audit: As for `RunOptions`; 1.0 audits the session's trajectories, 0.0 none of them.
            **params: Params of the policy that change no hook, such as thresholds and intervals.

        Raises:
            PolicyError: The key is None, a param is wrong or would change a hook (E314), or the trajectory of the
                session has begun with other settings (E313).
        """
        if key is None:
            raise PolicyError.of("E304", "a session's key is None", help="use a string or a number of your own")
        stated = {"timestep": timestep, "scheduler": scheduler, "steps": steps, "guidance": guidance, "audit": audit}
        options = {name: value for name, value in stated.items() if value is not None}
        session_config = self._attachment.bound.depart(options, params) if options or params else None
        if self.attached:
            self._attachment.follower_of(scheduler)  # before `scheduler.step(model(x, t), ...)` takes its method
        return self._sessions.inside(key, session_config)

    def step(
        self,
        model: str | torch.nn.Module | None = None,
        /,
        *,
        t: Any = None,
        step: int | None = None,
        steps: int | None = None,
        sigma: float | None = None,
        branch: str | None = None,
    ) -> contextlib.AbstractContextManager[None]:
        """Return a context manager: the modules that run inside are one forward pass of the model.

        For code that calls the blocks of a model itself and never its `forward`. Each evaluation of the model is one
        context: the decisions are made when it is entered, and committed when it is left. A call of the model inside
        is part of it. Do not `await` inside.

        What is given here comes before `timestep=` and the scheduler. They tell the step where `t` and `step` are left
        out; without them, the second context on a branch is the next step.

        Args:
            model: The denoiser or its name, where the run has more than one.
            t: The timestep in training units (0..1000), a number or a tensor of one element. A new trajectory starts
                where it rises.
            step: The number of the step, from 0. A new trajectory starts where it falls.
            steps: The number of steps of the trajectory, at least 1.
            sigma: The noise level.
            branch: The guidance branch, such as `"cond"`. Each has a history of its own.

        Raises:
            PolicyError: An argument does not fit, the policy has a rule or a probe on the model itself, or the run has
                several denoisers and none is named (E324).
        """
        context = step_context(t=t, step=step, steps=steps, sigma=sigma, branch=branch)
        root = denoiser_of(self._attachment.roots, model)
        return contextlib.nullcontext() if root is None else stepped(root, context)

    def reset(self, key: Hashable | None = None) -> None:
        """End the session `key`, or all sessions. The next call starts a trajectory without history."""
        if key is not None:
            self._sessions.drop(key)
        else:
            self._sessions.clear()

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager: calls inside run the bare model and change no state."""
        mine = frozenset(root.identity for root in self._attachment.roots.values())
        return setting(DISABLED, DISABLED.get() | mine)

    def remove(self) -> None:
        """Remove all hooks. A second call has no effect.

        Raises:
            PolicyError: A forward pass is running.
        """
        self._attachment.remove()

    def __reduce__(self) -> Any:
        raise PolicyError.of(
            "E316",
            "a run cannot be copied or pickled, since it is attached to one model",
            help="copy the model, which leaves the policy behind, and apply `run.policy` to the copy",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
