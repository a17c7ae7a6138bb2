"""Attaches a policy to a live model or pipeline, and removes it again."""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
import warnings
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar, cast

import torch

from cachepolicy.diffusers.configs import config_of
from cachepolicy.diffusers.guidance import GUIDANCE_PROPERTY, PIPELINES
from cachepolicy.engine import compat
from cachepolicy.engine.audit import Audits, AuditSummary
from cachepolicy.engine.class_swap import ATTRIBUTE, Handle, Method, is_swapped, plain, restore, swap
from cachepolicy.engine.clock import CONTEXT, Context, step_context
from cachepolicy.engine.compile.graph_ops import UNCOMPILED
from cachepolicy.engine.distributed.groups import member_ranks
from cachepolicy.engine.history_packing import packing_of
from cachepolicy.engine.history_storage import ANYHOW, Storing
from cachepolicy.engine.hooks import LOCAL
from cachepolicy.engine.introspection import denoisers, describe, is_pipeline, unwrapped, walk
from cachepolicy.engine.memory_budget import Budget, MemoryUsage
from cachepolicy.engine.options import MOST_SESSIONS, RunOptions, is_disabled, supplier
from cachepolicy.engine.pipeline_calls import PipelineCall, pipeline_override
from cachepolicy.engine.refusals import refuse_again, refuse_step
from cachepolicy.engine.root_hooks import AGAIN, root_entry_override, root_override
from cachepolicy.engine.root_model import DISABLED, RootModel
from cachepolicy.engine.scheduler_hook import SchedulerFollower, Weakly, follow, unfollow
from cachepolicy.engine.session_config import BoundPolicy, SessionConfig
from cachepolicy.engine.sessions import Entered, Sessions, State
from cachepolicy.engine.tuned_for import Guidance
from cachepolicy.errors import PolicyError, render
from cachepolicy.language import ir
from cachepolicy.language.linker import load, resolve
from cachepolicy.planning.bind import bind
from cachepolicy.planning.cost_model import Work
from cachepolicy.planning.facts import Fact
from cachepolicy.planning.grid import notebook_html
from cachepolicy.planning.plan import Plan
from cachepolicy.reports.html.page import page
from cachepolicy.tracing.trace import Trace

_HOOKS = threading.RLock()
"""Held while the hooks of a run are placed or removed, so that two runs never place hooks on one model."""

P = TypeVar("P")
PolicyLike = str | os.PathLike[str] | ir.Policy | Any


def apply(  # noqa: PLR0913 (all that can be said of a run)
    target: Any,
    policy: PolicyLike,
    *,
    timestep: Callable[[], Any] | None = None,
    scheduler: Any = None,
    steps: int | None = None,
    guidance: bool | None = None,
    samples: Literal["mean", "max"] = "mean",
    process_group: Any = None,
    trace: bool | Literal["profile"] = True,
    max_sessions: int = MOST_SESSIONS,
    history_dtype: Any = None,
    history_device: Any = None,
    memory_limit: int | str | None = None,
    options: RunOptions | Mapping[str, Any] | None = None,
    **params: Any,
) -> Run:
    """Attach a policy to a model or a diffusers pipeline.

    The call is atomic: when any check or any hook fails, no hook stays on the model.

    If the environment variable `CACHEPOLICY_DISABLE` is set (to anything but `0`, `false`, `no`, `off` or nothing), the
    policy is read and bound to the model as always, but nothing is attached: the model stays as it is, and the run has
    its plan, an empty trace and no effect.

    Args:
        target: An `nn.Module`, or a diffusers pipeline. With a pipeline, its denoisers, scheduler and call boundaries
            are known. Of `torch.compile(model)`, a `PeftModel` or `DistributedDataParallel`, the policy is attached to
            the model inside, and acts on calls of both.
        policy: The name of a shipped policy (`"pab"`), a path, a `Policy`, a cache config of `cachepolicy.diffusers` or
            of diffusers, or an object with a `.policy()` method.
        timestep: Returns the current timestep in training units (0..1000), as a number or a tensor. By default the
            clock reads `scheduler`, the pipeline's scheduler, or the timestep argument of the model.
        scheduler: The scheduler that the clock reads.
        steps: The number of steps of a trajectory (at least 1), for policies that use it.
        guidance: Whether every batch consists of the unconditional and the conditional half, in the order of the
            policy's `layout` (by default the unconditional half first). Needed where no pipeline provides this.
        samples: How a signal is reduced over the samples of a batch, `"mean"` or `"max"`.
        process_group: A `ProcessGroup` or `DeviceMesh` of the processes that hold parts of the same samples and decide
            together. None detects diffusers' context parallelism and sharded parameters (FSDP2); False disables the
            detection.
        trace: False keeps no trace. `"profile"` adds the time of every site, and the measurement itself takes time.
        max_sessions: The number of sessions that hold state at the same time. Beyond it, the least recently used
            session ends.
        history_dtype: The dtype of stored results between compute and use, such as `"bfloat16"`.
        history_device: The device of stored results between compute and use, such as `"cpu"`.
        memory_limit: Bytes, or a size such as `"2GiB"`, for all sessions together. Over the limit, the sites that save
            the least compute per byte are not stored and compute.
        options: `RunOptions`, or a dict of its fields. Keyword arguments take precedence over its fields.
        **params: The policy's own params. A function that is given for an `external` is called once for each answer.

    Returns:
        The attached run, a context manager that removes the policy on exit.

    Raises:
        PolicyError: The policy, a param or a selector is wrong, the model has a run already, or the engine cannot run
            the policy on this model.
    """
    config = config_of(policy)
    if config is not None:
        # Explicit arguments of the caller override the config. A pipeline that has `do_classifier_free_guidance`
        # answers for each call, so the promise of the config is not used there.
        policy, arguments = config.policy(), config.arguments()
        callback, promised = arguments.pop("timestep", None), arguments.pop("guidance", None)
        timestep = callback if timestep is None else timestep
        told = arguments.pop("steps", None)
        steps = told if steps is None and scheduler is None else steps
        if guidance is None and not (promised and hasattr(type(target), GUIDANCE_PROPERTY)):  # pyright: ignore[reportUnknownArgumentType]
            guidance = promised
        params = arguments | params
    elif hasattr(policy, "policy"):
        policy = cast("Any", policy).policy()
    loaded = load(policy)
    named = {statement.name for statement in loaded.statements if isinstance(statement, ir.External)}
    externals = {name: supplier(name, params.pop(name)) for name in named & set(params)}
    chosen = RunOptions.of(
        options,
        timestep=timestep,
        scheduler=scheduler,
        steps=steps,
        guidance=guidance,
        samples=samples,
        trace=trace,
        process_group=process_group,
        max_sessions=max_sessions,
        history_dtype=history_dtype,
        history_device=history_device,
        memory_limit=memory_limit,
    )
    chosen = replace(chosen, externals=externals)
    packing = packing_of(chosen.history_dtype, chosen.history_device)
    roots = denoisers(target)
    skeletons = {name: describe(module) for name, module in roots.items()}
    resolved = {name: resolve(loaded, params, model=skeleton.facts) for name, skeleton in skeletons.items()}
    missing = [name for one in resolved.values() for name in one.externals if name not in externals]
    if missing:
        raise PolicyError.of(
            "E307", f"the policy asks for `{missing[0]}`", help=f"pass `{missing[0]}=` a function that returns it"
        )
    if chosen.process_group is not None and chosen.process_group is not False:
        member_ranks(chosen.process_group)
    attaches = not is_disabled()
    plans = {name: bind(resolved[name], skeleton) for name, skeleton in skeletons.items()}
    if not any(bound.sites for bound in plans.values()):
        names = ", ".join(f"`{type(module).__name__}`" for module in roots.values())
        raise PolicyError.of(
            "E308", f"the policy selects nothing in {names}", help="`cachepolicy plan` shows what it selects"
        )
    limit = chosen.limit
    storing = ANYHOW if packing is None and limit is None else Storing(packing)
    run = Run(
        target, BoundPolicy(loaded, plans, chosen, params), roots, storing, None if limit is None else Budget(limit)
    )
    if attaches:
        run.attach()
        run.compare_model()
        _warn_of_rules(target, plans.values())
    else:
        run.disable()
    return run


def _warn_of_rules(target: Any, plans: Iterable[Plan]) -> None:
    """Warn of rules that can never act: shadowed ones (W510), ones that never reuse (W513), unknown branches (W514).

    A loop of one's own may name its branches as it likes, so W514 concerns the pipelines of diffusers only.
    """
    codes = {"W510", "W513"} | ({"W514"} if type(target).__module__.startswith(PIPELINES) else set[str]())
    found = dict.fromkeys(warning for plan in plans for warning in plan.warnings if warning.code in codes)
    if found:
        warnings.warn(render(found), UserWarning, stacklevel=3)


def remove(target: Any) -> None:
    """Remove the run from a model or pipeline, and restore the original classes.

    Has no effect on a target without a run if `CACHEPOLICY_DISABLE` is set.

    Args:
        target: The model or pipeline that `apply` was given.

    Raises:
        PolicyError: No run is attached, or a forward pass is running.
    """
    run = run_of(target)
    if run is None:
        if is_disabled():
            return
        raise PolicyError.of("E302", "there is no policy to remove", help="`cachepolicy.apply` attaches one")
    run.remove()


def run_of(target: Any) -> Run | None:
    """Return the run that is attached to a model or pipeline, or None."""
    handle = getattr(unwrapped(target), "__dict__", {}).get(ATTRIBUTE)
    return handle.run if isinstance(handle, RootModel | PipelineHandle) else None


class PipelineHandle(Handle):
    """Carries a run on a pipeline, so that copies of the pipeline do not carry it."""

    __slots__ = ("run",)

    def __init__(self, run: Run) -> None:
        self.run = run


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

    def __init__(
        self,
        target: Any,
        offer: BoundPolicy,
        roots: Mapping[str, torch.nn.Module],
        storing: Storing = ANYHOW,
        budget: Budget | None = None,
    ) -> None:
        self.target = target
        self.policy = offer.policy
        self.trace = Trace() if offer.session_config.options.trace else None
        self._offer = offer
        self._terms = offer.session_config
        self._storing, self._budget = storing, budget
        self._roots = dict(roots)
        self._handle = PipelineHandle(self)
        self._disabled = False
        self._attached: dict[str, RootModel] = {}
        self._swapped: list[torch.nn.Module] = []
        self._schedulers: Weakly[Any] = Weakly()
        self._pipelines: Weakly[Any] = Weakly()
        self._audits = Audits()
        self._sessions = Sessions(offer.session_config.options.max_sessions, self._finished)

    @property
    def plans(self) -> dict[str, Plan]:
        """The plan of each denoiser, by its name in the pipeline."""
        return {name: execution.plan for name, execution in self._terms.executions.items()}

    @property
    def plan(self) -> Plan:
        """The plan of the first denoiser."""
        return next(iter(self.plans.values()))

    @property
    def attached(self) -> bool:
        """True until the run is removed."""
        return bool(self._attached)

    @property
    def memory(self) -> MemoryUsage:
        """Bytes of history that the sessions hold now, and the sites that the memory limit excludes."""
        states = [(name, state) for session in self._sessions.alive() for name, state in list(session.states.items())]
        holding = [(self._attached[name], state) for name, state in states if name in self._attached]
        refused = {
            root.execution.plan.sites[site].name: None
            for root, state in holding
            for branch in list(state.branches.values())
            for site, slot in enumerate(branch.slots)
            if slot.storing.lacking is Fact.OVER_LIMIT or (state.guide.over_limit and site == root.execution.itself)
        }
        calls = [call for trajectory in self.trace or () for call in list(trajectory.calls)]
        return MemoryUsage(
            sum(state.held for _, state in holding),
            max((call.held for call in calls), default=0),
            self._terms.options.limit,
            tuple(refused),
            self._sessions.continued,
            self._terms.options.max_sessions,
        )

    @property
    def audit(self) -> AuditSummary:
        """The errors of the answers in the trajectories that `RunOptions(audit=...)` has audited."""
        return self._audits.summary

    # --- telling -----------------------------------------------------------------------------------------

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

    # --- attaching ---------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Place all hooks. When one fails, remove those that were placed.

        Raises:
            PolicyError: The model has a run (E301) or another cache (E340), perhaps since `apply` checked it.
        """
        with _HOOKS:
            _require_free(self.target, self._roots)
            try:
                for name, module in self._roots.items():
                    self._attach_root(name, module)
                if is_pipeline(self.target):
                    self._take_up(self.target)
                if self._terms.options.scheduler is not None:
                    self.follower_of(self._terms.options.scheduler)
            except BaseException:
                self.detach()
                raise

    def compare_model(self) -> None:
        """Warn where the denoisers are not those that the policy was tuned for."""
        for root in self._attached.values():
            if root.tuned_for is not None:
                root.tuned_for.compare_model()

    def disable(self) -> None:
        """Mark a run that is never attached, because `CACHEPOLICY_DISABLE` is set."""
        self._disabled = True

    def _attach_root(self, name: str, module: torch.nn.Module) -> None:
        root = RootModel(self, name, module, self._terms, self._sessions, self._storing, self._budget, self._audits)
        self._attached[name] = root
        root.placement.place()
        methods = {"__call__": root_override, "_call_impl": root_entry_override}
        methods |= {name: override for name, override in _ROOT_METHODS.items() if hasattr(type(module), name)}
        self._swap(module, methods, root)

    def _swap(self, module: torch.nn.Module, methods: dict[str, Any], handle: object) -> None:
        swap(module, methods, handle)
        self._swapped.append(module)

    def _take_up(self, pipeline: Any) -> None:
        swap(pipeline, {"__call__": pipeline_override}, self._handle)
        self._pipelines.add(pipeline)

    def follower_of(self, scheduler: Any) -> SchedulerFollower | None:
        """Return the follower of a scheduler. The first call installs the follower."""
        follower = follow(scheduler, self)
        if follower is not None:
            self._schedulers.add(scheduler)
        return follower

    def _finished(self, name: str, state: State) -> None:
        if name in self._attached:
            self._attached[name].finished(state)

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
        if self._disabled:
            return pipeline
        with _HOOKS:
            if not self.attached:
                raise PolicyError.of("E302", "the run was removed", help="`cachepolicy.apply` attaches a new one")
            if not is_pipeline(pipeline):
                raise PolicyError.of(
                    "E300", f"`{type(pipeline).__name__}` is no pipeline", help="pass a diffusers pipeline"
                )
            handle = pipeline.__dict__.get(ATTRIBUTE)
            if handle is self._handle:
                return pipeline
            if handle is not None:
                raise _already("the pipeline")
            shared = map(unwrapped, cast("Any", pipeline).components.values())
            if not any(model is root for model in shared for root in self._roots.values()):
                raise PolicyError.of(
                    "E315",
                    f"no denoiser of this `{type(pipeline).__name__}` is one that the policy was applied to",
                    help="`run.share(scheduler=...)` makes one that shares them; or apply the policy to this one too",
                )
            self._take_up(pipeline)
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

    def pipeline_call(self, pipeline: Any, guidance: Guidance) -> PipelineCall:
        """Return the state of one pipeline call: one trajectory, in its own session unless one is entered.

        Args:
            pipeline: The pipeline.
            guidance: Returns the numbers by which the call guides.

        Raises:
            PolicyError: A denoiser of the pipeline was replaced after `apply`.
        """
        mine = pipeline is self.target
        for name, module in self._roots.items():
            if unwrapped(getattr(pipeline, name, module if not mine else None)) is not module:
                raise _replaced(name)
        scheduler = getattr(pipeline, "scheduler", None)
        follower = self.follower_of(scheduler) if scheduler is not None else None
        return PipelineCall(self._sessions, pipeline, follower, guidance)

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
        session_config = self._offer.depart(options, params) if options or params else None
        if scheduler is not None and self.attached:
            self.follower_of(scheduler)  # before `scheduler.step(model(x, t), ...)` takes its method
        return self._inside(key, session_config)

    @contextlib.contextmanager
    def _inside(self, key: Hashable, session_config: SessionConfig | None) -> Generator[None]:
        if session_config is not None:
            self._sessions.agree(key, session_config)
        with Entered(self._sessions, key=key, session_config=session_config).inside():
            yield

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
        return self._stepped(self._denoiser(model), context) if self.attached else contextlib.nullcontext()

    def _denoiser(self, model: str | torch.nn.Module | None) -> RootModel | None:
        """Return the root model of a `run.step`, or None if the run was removed."""
        every = dict(self._attached)
        matching = [root for name, root in every.items() if model is None or model == name or model is root.module]
        if len(matching) > 1 or (every and not matching):
            names = " and ".join(f"`{name or type(root.module).__name__}`" for name, root in every.items())
            raise PolicyError.of(
                "E324",
                f"`run.step` is for one denoiser, and the run has {names}",
                help="pass the denoiser or its name first, as in `run.step(pipe.transformer_2, t=t)`",
            )
        return matching[0] if matching else None

    @contextlib.contextmanager
    def _stepped(self, root: RootModel | None, context: Context) -> Generator[None]:
        if root is None:
            yield
            return
        refuse_step(root)
        with _set(CONTEXT, context):
            call = root.begin((), {})
        if call is None:
            yield
            return
        outer, thread = (LOCAL.frame, LOCAL.stage), threading.get_ident()
        call.spans_calls = True
        LOCAL.frame, LOCAL.stage = call, None
        try:
            with UNCOMPILED if call.learns else contextlib.nullcontext():
                yield
            if root.end(call, None) is AGAIN:
                refuse_again(root, "it is a `run.step` of the caller")
        except BaseException as error:
            root.fail(call, error)
            raise
        finally:
            call.spans_calls = False
            # A generator that was given up inside may be closed in another thread, which may be in a call of its own.
            if threading.get_ident() == thread:
                LOCAL.frame, LOCAL.stage = outer

    def reset(self, key: Hashable | None = None) -> None:
        """End the session `key`, or all sessions. The next call starts a trajectory without history."""
        if key is not None:
            self._sessions.drop(key)
        else:
            self._sessions.clear()

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager: calls inside run the bare model and change no state."""
        mine = frozenset(root.identity for root in self._attached.values())
        return _set(DISABLED, DISABLED.get() | mine)

    def remove(self) -> None:
        """Remove all hooks. A second call has no effect.

        Raises:
            PolicyError: A forward pass is running.
        """
        with _HOOKS:
            # The list closes every root before the check, so that no new forward pass begins in between.
            if not all([root.close() for root in self._attached.values()]):
                for root in self._attached.values():
                    root.reopen()
                raise PolicyError.of(
                    "E305",
                    "the run cannot be removed while a forward is running",
                    help="remove it when the call has returned",
                )
            self._sessions.clear()
            self.detach()

    def detach(self) -> None:
        """Remove all hooks, also while a forward pass is running."""
        with _HOOKS:
            for scheduler in self._schedulers:
                unfollow(scheduler, self)
            for pipeline in self._pipelines:
                restore(pipeline)
            for module in reversed(self._swapped):
                restore(module)
            for root in self._attached.values():
                root.placement.lift()
            for collection in (self._schedulers, self._pipelines, self._swapped, self._attached):
                collection.clear()

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


@contextlib.contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Generator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


# --- the root's other methods ----------------------------------------------------------------------------


def _cache_context_override(original: Method) -> Method:
    """Override of diffusers' `model.cache_context(name, ...)`: names the guidance branch of the calls inside."""

    @contextlib.contextmanager
    def cache_context(self: Any, name: str, *args: Any, **kwargs: Any) -> Generator[Any]:
        clock = {key: value for key, value in kwargs.items() if key in Context.__slots__}
        with _set(CONTEXT, Context(name, **clock)), original(self, name, *args, **kwargs) as inner:
            yield inner

    return cache_context


def _reset_override(original: Method) -> Method:
    """Override of `_reset_stateful_cache`, which diffusers pipelines call at their end: ends the session."""

    def _reset_stateful_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        root = self.__dict__.get(ATTRIBUTE)
        if isinstance(root, RootModel):
            root.sessions.end_current()
        return original(self, *args, **kwargs)

    return _reset_stateful_cache


_ROOT_METHODS = {
    "cache_context": _cache_context_override,
    "_reset_stateful_cache": _reset_override,
    "enable_cache": compat.enable_cache_override,
}


# --- refusals --------------------------------------------------------------------------------------------


def _require_free(target: Any, roots: Mapping[str, torch.nn.Module]) -> None:
    """Raise if a model has a run (E301) or another cache (E340)."""
    for name, root in roots.items():
        modules = [module for _, module in walk(root)]
        if any([vars(module).get(ATTRIBUTE) is not None for module in modules]):
            raise _already(f"`{name}`" if name else "the model")
        compat.refuse(root, target, modules)
    if is_swapped(target):
        raise _already("the pipeline")


def _replaced(name: str) -> PolicyError:
    return PolicyError.of(
        "E303",
        f"the pipeline's `{name}` was replaced after the policy was applied",
        help="`run.remove()`, then apply the policy to the pipeline again",
    )


def _already(subject: str) -> PolicyError:
    return PolicyError.of(
        "E301",
        f"{subject} has a policy already",
        help="`cachepolicy.remove(...)` it first, or combine both with `use` in one policy",
    )
