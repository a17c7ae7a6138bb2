"""A policy on a live model or pipeline: attached all or nothing, taken off without a trace."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Generator, Hashable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar, cast

import torch

from cachepolicy.diffusers.configs import config_of
from cachepolicy.engine import compat
from cachepolicy.engine.class_swap import ATTRIBUTE, Handle, Method, is_swapped, plain, restore, swap
from cachepolicy.engine.clock import CONTEXT, Context, Sources
from cachepolicy.engine.distributed.groups import member_ranks
from cachepolicy.engine.history_packing import packing_of
from cachepolicy.engine.history_storage import ANYHOW, Storing
from cachepolicy.engine.hook_placement import Placement
from cachepolicy.engine.hooks import Site, root_override
from cachepolicy.engine.introspection import denoisers, describe, is_pipeline
from cachepolicy.engine.memory_budget import Budget
from cachepolicy.engine.memory_usage import Memory
from cachepolicy.engine.options import MOST_SESSIONS, RunOptions, supplier
from cachepolicy.engine.pipeline_calls import PipelineCall, pipeline_override
from cachepolicy.engine.root_model import DISABLED, RootContext, RootModel
from cachepolicy.engine.scheduler_hook import SchedulerFollower, Weakly, follow, unfollow
from cachepolicy.engine.session_config import BoundPolicy, SessionConfig
from cachepolicy.engine.sessions import Entered, Sessions, State
from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.language.linker import load, resolve
from cachepolicy.planning.bind import bind
from cachepolicy.planning.forecast import Work
from cachepolicy.planning.notebook import notebook_html
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.schedule import OVER_LIMIT
from cachepolicy.reports.html.page import page
from cachepolicy.tracing.trace import Trace

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
    **params: Any,
) -> Run:
    """Attach a policy to a model or a diffusers pipeline; nothing is attached when anything is wrong.

    `target` is an `nn.Module` or a pipeline (its denoisers, scheduler and call boundaries are then known). `policy` is
    a shipped name (`"pab"`), a path, a `Policy`, a cache config of `cachepolicy.diffusers` or of diffusers itself, or
    an object with a `.policy()` method. `timestep` returns the current timestep in training units (0..1000) as a
    number or tensor; without it the clock reads `scheduler`, the pipeline's scheduler, or the model's own timestep
    argument. `steps` is the number of steps of a trajectory, for a policy that asks. `guidance` says whether a batch
    holds the unconditional and the conditional half, where no pipeline tells. `trace` is False for none, and "profile"
    for one with the time of every site, which takes some itself. `max_sessions` is how many sessions hold something at
    a time; beyond, the one that was used longest ago ends. `process_group` names the processes that hold pieces of the
    same samples, and so decide as one: a `ProcessGroup` or `DeviceMesh`; None for what diffusers' context parallelism
    and parameters in pieces (FSDP2) show, False for none. `history_dtype` (such as `"bfloat16"`) and `history_device`
    (such as `"cpu"`) say how what is kept is stored between its compute and its use. `memory_limit`, bytes or a size
    such as `"2GiB"`, holds for all sessions together: over it, the sites that save least for their bytes compute.

    `params` are the policy's own knobs; a function given for an `external` is asked once for each answer.

    Raises:
        PolicyError: the policy, a param or a selector is wrong, the model has a run already, or the engine cannot run
            what the policy says on this model.
    """
    config = config_of(policy)
    if config is not None:
        # What the config says about the run holds where the caller says nothing; some pipelines know better than it.
        policy, said = config.policy(), config.arguments()
        callback, promised = said.pop("timestep", None), said.pop("guidance", None)
        timestep = callback if timestep is None else timestep
        if guidance is None and not (promised and hasattr(type(target), "do_classifier_free_guidance")):  # pyright: ignore[reportUnknownArgumentType]
            guidance = promised
        params = said | params
    elif hasattr(policy, "policy"):
        policy = cast("Any", policy).policy()
    loaded = load(policy)
    named = {each.name for each in loaded.statements if isinstance(each, ir.External)}
    externals = {name: supplier(name, params.pop(name)) for name in named & set(params)}
    told = RunOptions(
        timestep,
        scheduler,
        steps,
        guidance,
        samples,
        trace,
        process_group,
        externals,
        max_sessions,
        history_dtype,
        history_device,
        memory_limit,
    )
    packing = packing_of(history_dtype, history_device)
    resolved = resolve(loaded, params)
    missing = [name for name in resolved.externals if name not in externals]
    if missing:
        raise PolicyError.of(
            "E307", f"the policy asks for `{missing[0]}`", help=f"pass `{missing[0]}=` a function that returns it"
        )
    if process_group is not None and process_group is not False:
        member_ranks(process_group)
    roots = denoisers(target)
    for name, module in roots.items():
        _refuse_attached(name, module)
        compat.refuse(module, target)
    if is_swapped(target):
        raise _already("the pipeline")
    plans = {name: bind(resolved, describe(module)) for name, module in roots.items()}
    if not any(bound.sites for bound in plans.values()):
        names = ", ".join(f"`{type(module).__name__}`" for module in roots.values())
        raise PolicyError.of(
            "E308", f"the policy selects nothing in {names}", help="`cachepolicy plan` shows what it selects"
        )
    limit = told.limit
    storing = ANYHOW if packing is None and limit is None else Storing(packing)
    run = Run(
        target, BoundPolicy(loaded, plans, told, params), roots, storing, None if limit is None else Budget(limit)
    )
    run.attach()
    return run


def remove(target: Any) -> None:
    """Take the run off a model or pipeline; afterwards nothing of it is left.

    Raises:
        PolicyError: there is no run, or a forward is running through it.
    """
    run = run_of(target)
    if run is None:
        raise PolicyError.of("E302", "there is no policy to remove", help="`cachepolicy.apply` attaches one")
    run.remove()


def run_of(target: Any) -> Run | None:
    """The run that is attached to a model or pipeline, None where there is none."""
    handle = getattr(target, "__dict__", {}).get(ATTRIBUTE)
    if isinstance(handle, Run):
        return handle
    return handle.run if isinstance(handle, RootModel) else None


class Counted(Protocol):
    """FLOPs of one call of a model, in all and by module."""

    total: int
    modules: Mapping[str, int]


class Run(Handle):
    """A policy attached to a model: a context manager that takes it off at the end.

    `plan` is the (first) denoiser's plan, `plans` holds all by name; `trace` is what happened, None when switched off.
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
        self.trace = Trace() if offer.session_config.told.trace else None
        self._offer = offer
        self._terms = offer.session_config
        self._storing, self._budget = storing, budget
        self._roots = dict(roots)
        self._attached: dict[str, RootModel] = {}
        self._placements: dict[int, Placement] = {}
        self._swapped: list[torch.nn.Module] = []
        self._schedulers: Weakly[Any] = Weakly()
        self._pipelines: Weakly[Any] = Weakly()
        self._sessions = Sessions(offer.session_config.told.max_sessions, self._finished)

    @property
    def plans(self) -> dict[str, Plan]:
        """The plan of each denoiser, by its name in the pipeline."""
        return {name: layout.plan for name, layout in self._terms.layouts.items()}

    @property
    def plan(self) -> Plan:
        """The plan of the first denoiser."""
        return next(iter(self.plans.values()))

    @property
    def attached(self) -> bool:
        """True until the run is removed."""
        return bool(self._attached)

    @property
    def memory(self) -> Memory:
        """What the sessions hold at the moment, and which sites do without over the limit."""
        states = [(name, state) for session in self._sessions.alive() for name, state in list(session.states.items())]
        holding = [(self._attached[name], state) for name, state in states if name in self._attached]
        refused = {
            attached.plan.sites[site].name: None
            for attached, state in holding
            for branch in list(state.branches.values())
            for site, slot in enumerate(branch.slots)
            if slot.storing.lacking is OVER_LIMIT
        }
        calls = [call for trajectory in self.trace or () for call in list(trajectory.calls)]
        return Memory(
            sum(attached.held(state) for attached, state in holding),
            max((call.held for call in calls), default=0),
            self._terms.told.limit,
            tuple(refused),
        )

    # --- telling -----------------------------------------------------------------------------------------

    def report(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        flops: Counted | None = None,
        uncached: float | None = None,
    ) -> str:
        """What the newest session did, as one HTML file that loads nothing; written to `path` where one is given.

        `flops` are those of one call of the model, as `cachepolicy.tools.flops.count` counts them, and `uncached` the
        seconds that all calls of the model take without the policy; without it they are estimated.

        Raises:
            PolicyError: the run keeps no trace (E309).
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
        """Place all hooks, or none."""
        try:
            for name, module in self._roots.items():
                self._attach_root(name, module)
            if is_pipeline(self.target):
                self._take_up(self.target)
            if self._terms.told.scheduler is not None:
                self._follow(self._terms.told.scheduler)
        except BaseException:
            self._detach()
            raise

    def _attach_root(self, name: str, module: torch.nn.Module) -> None:
        around = RootContext(
            self._sources,
            _guided,
            self._detach,
            self._settle,
            self._intercept,
            self._sessions,
            self._terms,
            self.trace,
            self._storing,
            self._budget,
        )
        attached = RootModel(self, name, module, around)
        self._attached[name] = attached
        placement = Placement(module, attached.handles, profiled=self._terms.told.trace == "profile")
        placement.place()
        self._placements[attached.identity] = placement
        methods = {"__call__": root_override}
        methods |= {name: override for name, override in _ROOT_METHODS.items() if hasattr(module, name)}
        self._swap(module, methods, attached)

    def _settle(self, attached: RootModel) -> None:
        """A trajectory starts: look once more at what else is on the model."""
        compat.refuse(attached.module, self.target)
        placement = self._placements.get(attached.identity)
        if placement is not None:  # else a call of another thread has shown that the policy does not fit
            placement.settle()

    def _intercept(self, attached: RootModel, place: str, site: Site) -> None:
        self._placements[attached.identity].add(place, site)

    def _swap(self, module: torch.nn.Module, methods: dict[str, Any], handle: object) -> None:
        swap(module, methods, handle)
        self._swapped.append(module)

    def _take_up(self, pipeline: Any) -> None:
        swap(pipeline, {"__call__": pipeline_override}, self)
        self._pipelines.add(pipeline)

    def _follow(self, scheduler: Any) -> SchedulerFollower | None:
        """The follower of a scheduler; it is intercepted the first time."""
        follower = follow(scheduler, self)
        if follower is not None:
            self._schedulers.add(scheduler)
        return follower

    def _sources(self, session_config: SessionConfig, here: Entered | None) -> Sources:
        """Where the clock of a call reads."""
        if session_config.told.timestep is not None:
            return session_config.bare
        scheduler = session_config.told.scheduler
        if scheduler is None and here is not None and here.pipeline is not None and here.of(self._sessions):
            scheduler = getattr(here.pipeline, "scheduler", None)
        follower = self._follow(scheduler) if scheduler is not None else None
        if scheduler is not None and follower is not None and scheduler.timesteps is not None:
            return replace(session_config.bare, scheduler=scheduler, follower=follower)
        return session_config.bare

    def _finished(self, name: str, state: State) -> None:
        if name in self._attached:
            self._attached[name].finished(state)

    # --- pipelines ---------------------------------------------------------------------------------------

    def follow(self, pipeline: P) -> P:
        """Let another pipeline over the same denoisers run as the one that `apply` was given; gives the pipeline.

        Its calls are sessions of their own, with its own scheduler as their clock. Servers make such a pipeline for
        each request, with a scheduler of its own: nothing here keeps it alive, and nothing has to be undone.

        Raises:
            PolicyError: it is no pipeline (E300), has a policy already (E301), or none of its denoisers is this run's
                (E315).
        """
        if not self.attached:
            raise PolicyError.of("E302", "the run was removed", help="`cachepolicy.apply` attaches a new one")
        if not is_pipeline(pipeline):
            raise PolicyError.of(
                "E300", f"`{type(pipeline).__name__}` is no pipeline", help="pass a diffusers pipeline"
            )
        handle = pipeline.__dict__.get(ATTRIBUTE)
        if handle is self:
            return pipeline
        if handle is not None:
            raise _already("the pipeline")
        shared = cast("Any", pipeline).components.values()
        if not any(each is module for each in shared for module in self._roots.values()):
            raise PolicyError.of(
                "E315",
                f"no denoiser of this `{type(pipeline).__name__}` is one that the policy was applied to",
                help="`run.share(scheduler=...)` makes one that shares them; or apply the policy to this one too",
            )
        self._take_up(pipeline)
        return pipeline

    def share(self, kind: type | None = None, **parts: Any) -> Any:
        """A new pipeline over the models of the one that `apply` was given, followed: `run.share(scheduler=...)`.

        `kind` is its class, by default the same one. `parts` are what it has to itself: a scheduler, as a request has,
        or other arguments of the class. (`from_pipe` would not know the attached models, and casts all of them.)

        Raises:
            PolicyError: the policy was applied to a model (E300), or the class takes none of its denoisers (E315).
        """
        if not is_pipeline(self.target):
            raise PolicyError.of("E300", "the policy was applied to a model", help="apply it to a pipeline to share it")
        made: Any = kind or plain(type(self.target))  # pyright: ignore[reportUnknownArgumentType]
        held = {**getattr(self.target, "config", {}), **self.target.components, **parts}
        taken = inspect.signature(made).parameters
        return self.follow(made(**{name: value for name, value in held.items() if name in taken}))

    def pipeline_call(self, pipeline: Any) -> PipelineCall:
        """One call of a pipeline: a session of its own, unless one is set, and one trajectory.

        Raises:
            PolicyError: a denoiser of the pipeline was replaced since `apply`.
        """
        mine = pipeline is self.target
        for name, module in self._roots.items():
            if getattr(pipeline, name, module if not mine else None) is not module:
                raise _replaced(name)
        scheduler = getattr(pipeline, "scheduler", None)
        return PipelineCall(self._sessions, pipeline, self._follow(scheduler) if scheduler is not None else None)

    # --- using -------------------------------------------------------------------------------------------

    def session(
        self,
        key: Hashable,
        *,
        timestep: Callable[[], Any] | None = None,
        scheduler: Any = None,
        steps: int | None = None,
        guidance: bool | None = None,
        **params: Any,
    ) -> contextlib.AbstractContextManager[None]:
        """Calls inside belong to the session `key`; leaving only leaves it.

        A session ends with its trajectory, by `reset(key)`, or when many others have been used since. What is said here
        holds for it alone and until it ends, in place of what `apply` was told: its clock, and params of the policy
        that change no hook, such as thresholds and intervals. Who enters it again need not say it again.

        Raises:
            PolicyError: the key is None, a param does not fit or would change what is attached (E314), or the session's
                trajectory has begun under other ones (E313).
        """
        if key is None:
            raise PolicyError.of("E304", "a session's key is None", help="use a string or a number of your own")
        said = {"timestep": timestep, "scheduler": scheduler, "steps": steps, "guidance": guidance}
        told = {name: value for name, value in said.items() if value is not None}
        session_config = self._offer.depart(told, params) if told or params else None
        return self._inside(key, session_config)

    @contextlib.contextmanager
    def _inside(self, key: Hashable, session_config: SessionConfig | None) -> Generator[None]:
        if session_config is not None:
            self._sessions.agree(key, session_config)
        with Entered(self._sessions, key=key, session_config=session_config).inside():
            yield

    def reset(self, key: Hashable | None = None) -> None:
        """End the session `key`, or all sessions: the next call starts a trajectory with nothing kept."""
        if key is not None:
            self._sessions.drop(key)
        else:
            self._sessions.clear()

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Calls inside run the bare model and leave all state as it is."""
        mine = frozenset(attached.identity for attached in self._attached.values())
        return _set(DISABLED, DISABLED.get() | mine)

    def remove(self) -> None:
        """Take everything off; a run that is off already stays so.

        Raises:
            PolicyError: a forward is running through it.
        """
        if not all([attached.close() for attached in self._attached.values()]):
            for attached in self._attached.values():
                attached.reopen()
            raise PolicyError.of(
                "E305",
                "the run cannot be removed while a forward is running",
                help="remove it when the call has returned",
            )
        self._sessions.clear()
        self._detach()

    def _detach(self) -> None:
        for scheduler in self._schedulers:
            unfollow(scheduler, self)
        for pipeline in self._pipelines:
            restore(pipeline)
        for module in reversed(self._swapped):
            restore(module)
        for placement in self._placements.values():
            placement.lift()
        for each in (self._schedulers, self._pipelines, self._swapped, self._placements, self._attached):
            each.clear()

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


def _guided(session_config: SessionConfig, here: Entered | None) -> bool | None:
    """Whether the caller, or the pipeline that is running, says that batches hold both halves of guidance."""
    if session_config.told.guidance is not None or here is None:
        return session_config.told.guidance
    said = getattr(here.pipeline, "do_classifier_free_guidance", None)
    return said if isinstance(said, bool) else None


# --- the root's other methods ----------------------------------------------------------------------------


def _cache_context_override(original: Method) -> Method:
    """`model.cache_context(name, ...)` of diffusers, which names the branch and may tell the step."""

    @contextlib.contextmanager
    def cache_context(self: Any, name: str, *args: Any, **kwargs: Any) -> Generator[Any]:
        told = {key: value for key, value in kwargs.items() if key in Context.__slots__}
        with _set(CONTEXT, Context(name, **told)), original(self, name, *args, **kwargs) as inner:
            yield inner

    return cache_context


def _reset_override(original: Method) -> Method:
    """`_reset_stateful_cache`, which diffusers' pipelines call at their end."""

    def _reset_stateful_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        attached = self.__dict__.get(ATTRIBUTE)
        if isinstance(attached, RootModel):
            attached.drop_current()
        return original(self, *args, **kwargs)

    return _reset_stateful_cache


_ROOT_METHODS = {
    "cache_context": _cache_context_override,
    "_reset_stateful_cache": _reset_override,
    "enable_cache": compat.enable_cache_override,
}


# --- refusals --------------------------------------------------------------------------------------------


def _refuse_attached(name: str, module: torch.nn.Module) -> None:
    if any(is_swapped(each) for each in module.modules()):
        raise _already(f"`{name}`" if name else "the model")


def _replaced(name: str) -> PolicyError:
    return PolicyError.of(
        "E303",
        f"the pipeline's `{name}` was replaced after the policy was applied",
        help="`run.remove()`, then apply the policy to the pipeline again",
    )


def _already(what: str) -> PolicyError:
    return PolicyError.of(
        "E301",
        f"{what} has a policy already",
        help="`cachepolicy.remove(...)` it first, or combine both with `use` in one policy",
    )
