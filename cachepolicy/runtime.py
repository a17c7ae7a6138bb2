"""A policy on a live model or pipeline: attached all or nothing, taken off without a trace."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Hashable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Literal, Self, cast

import torch

from cachepolicy import ir, neighbours
from cachepolicy.attached import DISABLED, SESSION, Attached, Surroundings
from cachepolicy.clock import CONTEXT, SCHEDULER_METHODS, Context, Follower, Sources
from cachepolicy.configs import config_of
from cachepolicy.diagnostics import PolicyError
from cachepolicy.intercept import Site, root_override
from cachepolicy.loading import load, resolve
from cachepolicy.modules import denoisers, describe, is_pipeline
from cachepolicy.placement import Placement
from cachepolicy.plan import Plan, bind
from cachepolicy.processes import member_ranks
from cachepolicy.swap import ATTRIBUTE, Handle, Method, is_swapped, restore, swap
from cachepolicy.told import Told, supplier
from cachepolicy.trace import Trace

PolicyLike = str | os.PathLike[str] | ir.Policy | Any


def apply(
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
    **params: Any,
) -> Run:
    """Attach a policy to a model or a diffusers pipeline; nothing is attached when anything is wrong.

    `target` is an `nn.Module` or a pipeline (its denoisers, scheduler and call boundaries are then known). `policy` is
    a shipped name (`"pab"`), a path, a `Policy`, a cache config of `cachepolicy.diffusers` or of diffusers itself, or
    an object with a `.policy()` method. `timestep` returns the current timestep in training units (0..1000) as a
    number or tensor; without it the clock reads `scheduler`, the pipeline's scheduler, or the model's own timestep
    argument. `steps` is the number of steps of a trajectory, for a policy that asks. `guidance` says whether a batch
    holds the unconditional and the conditional half, where no pipeline tells. `trace` is False for none, and "profile"
    for one with the time of every site, which takes some itself. `params` are the policy's own knobs; a function given
    for an `external` is asked once for each answer. `process_group` names the processes that hold pieces of the same
    samples, and so decide as one: a `ProcessGroup` or `DeviceMesh`; None for what diffusers' context parallelism and
    parameters in pieces (FSDP2) show, False for none.

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
    told = Told(timestep, scheduler, steps, guidance, samples, trace, process_group, externals)
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
        neighbours.refuse(module, target)
    if is_swapped(target):
        raise _already("the pipeline")
    plans = {name: bind(resolved, describe(module)) for name, module in roots.items()}
    if not any(bound.sites for bound in plans.values()):
        names = ", ".join(f"`{type(module).__name__}`" for module in roots.values())
        raise PolicyError.of(
            "E308", f"the policy selects nothing in {names}", help="`cachepolicy plan` shows what it selects"
        )
    run = Run(target, loaded, roots, plans, told)
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
    return handle.run if isinstance(handle, Attached) else None


class Run(Handle):
    """A policy attached to a model: a context manager that takes it off at the end.

    `plan` is the (first) denoiser's plan, `plans` holds all by name; `trace` is what happened, None when switched off.
    """

    def __init__(
        self,
        target: Any,
        policy: ir.Policy,
        roots: Mapping[str, torch.nn.Module],
        plans: Mapping[str, Plan],
        told: Told,
    ) -> None:
        self.target = target
        self.policy = policy
        self.plans = dict(plans)
        self.trace = Trace() if told.trace else None
        self._told = told
        reads_t = any("t" in plan.needs for plan in plans.values())
        self._bare = Sources(timestep=told.timestep, steps=told.steps, reads_t=reads_t)
        self._pipeline = is_pipeline(target)
        self._roots = dict(roots)
        self._attached: dict[str, Attached] = {}
        self._placements: dict[int, Placement] = {}
        self._swapped: list[Any] = []
        self._followers: list[tuple[Any, Follower]] = []

    @property
    def plan(self) -> Plan:
        """The plan of the first denoiser."""
        return next(iter(self.plans.values()))

    @property
    def attached(self) -> bool:
        """True until the run is removed."""
        return bool(self._attached)

    # --- attaching ---------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Place all hooks, or none."""
        try:
            for name, module in self._roots.items():
                self._attach_root(name, module)
            if self._pipeline:
                self._swap(self.target, {"__call__": _pipeline_override}, self)
            if self._told.scheduler is not None:
                self._follow(self._told.scheduler)
        except BaseException:
            self._detach()
            raise

    def _attach_root(self, name: str, module: torch.nn.Module) -> None:
        plan = self.plans[name]
        around = Surroundings(
            self._sources, self._guided, self._detach, self._settle, self._intercept, self._told, self.trace
        )
        attached = Attached(self, module, plan, around)
        self._attached[name] = attached
        placement = Placement(module, attached.handles, profiled=self._told.trace == "profile")
        placement.place()
        self._placements[attached.identity] = placement
        methods = {"__call__": root_override}
        methods |= {name: override for name, override in _ROOT_METHODS.items() if hasattr(module, name)}
        self._swap(module, methods, attached)

    def _settle(self, attached: Attached) -> None:
        """A trajectory starts: look once more at what else is on the model."""
        neighbours.refuse(attached.module, self.target)
        self._placements[attached.identity].settle()

    def _intercept(self, attached: Attached, place: str, site: Site) -> None:
        self._placements[attached.identity].add(place, site)

    def _swap(self, target: Any, methods: dict[str, Any], handle: object) -> None:
        swap(target, methods, handle)
        self._swapped.append(target)

    def _follow(self, scheduler: Any) -> Follower | None:
        """The follower of a scheduler; it is intercepted the first time."""
        for known, follower in self._followers:
            if known is scheduler:
                return follower
        if not hasattr(scheduler, "timesteps") or not hasattr(scheduler, "step") or is_swapped(scheduler):
            return None
        follower = Follower()
        methods = {name: override for name, override in SCHEDULER_METHODS.items() if hasattr(scheduler, name)}
        self._swap(scheduler, methods, follower)
        self._followers.append((scheduler, follower))
        return follower

    def _sources(self) -> Sources:
        if self._told.timestep is not None:
            return self._bare
        scheduler = self._told.scheduler
        if scheduler is None and PIPELINE.get() is self:
            scheduler = getattr(self.target, "scheduler", None)
        follower = self._follow(scheduler) if scheduler is not None else None
        if scheduler is not None and follower is not None and scheduler.timesteps is not None:
            return replace(self._bare, scheduler=scheduler, follower=follower)
        return self._bare

    def _guided(self) -> bool | None:
        """Whether the pipeline that is running (or the caller) says that batches hold both halves of guidance."""
        if self._told.guidance is not None:
            return self._told.guidance
        if PIPELINE.get() is not self:
            return None
        said = getattr(self.target, "do_classifier_free_guidance", None)
        return said if isinstance(said, bool) else None

    @contextlib.contextmanager
    def pipeline_call(self) -> Generator[None]:
        """One call of the pipeline: a session of its own, unless one is set, and one trajectory.

        Raises:
            PolicyError: a denoiser of the pipeline was replaced since `apply`.
        """
        for name, module in self._roots.items():
            if getattr(self.target, name) is not module:
                raise PolicyError.of(
                    "E303",
                    f"the pipeline's `{name}` was replaced after the policy was applied",
                    help="`run.remove()`, then apply the policy to the pipeline again",
                )
        scheduler = getattr(self.target, "scheduler", None)
        follower = self._follow(scheduler) if scheduler is not None else None
        if follower is not None:
            follower.restart()
        explicit = SESSION.get()
        key: Hashable = explicit if explicit is not None else ("pipeline", object())
        tokens = SESSION.set(key), PIPELINE.set(self)
        failed = True
        try:
            yield
            failed = False
        finally:
            PIPELINE.reset(tokens[1])
            SESSION.reset(tokens[0])
            self._drop(key, failed=failed)

    # --- using -------------------------------------------------------------------------------------------

    def session(self, key: Hashable) -> contextlib.AbstractContextManager[None]:
        """Calls inside belong to the session `key`; leaving only leaves it, its state stays until `reset(key)`.

        Raises:
            PolicyError: the key is None.
        """
        if key is None:
            raise PolicyError.of("E304", "a session's key is None", help="use a string or a number of your own")
        return _set(SESSION, ("session", key))

    def reset(self, key: Hashable | None = None) -> None:
        """End the session `key`, or all sessions: the next call starts a trajectory with nothing kept."""
        if key is not None:
            self._drop(("session", key))
            return
        for attached in self._attached.values():
            attached.drop_all()

    def _drop(self, key: Hashable, *, failed: bool = False) -> None:
        for attached in self._attached.values():
            attached.drop(key, failed=failed)

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Calls inside run the bare model and leave all state as it is."""
        mine = frozenset(attached.identity for attached in self._attached.values())
        return _set(DISABLED, DISABLED.get() | mine)

    def remove(self) -> None:
        """Take everything off; a run that is off already stays so.

        Raises:
            PolicyError: a forward is running through it.
        """
        if any(attached.active for attached in self._attached.values()):
            raise PolicyError.of(
                "E305",
                "the run cannot be removed while a forward is running",
                help="remove it when the call has returned",
            )
        for attached in self._attached.values():
            attached.drop_all()
        self._detach()

    def _detach(self) -> None:
        for target in reversed(self._swapped):
            restore(target)
        self._swapped.clear()
        for placement in self._placements.values():
            placement.lift()
        self._placements.clear()
        self._followers.clear()
        self._attached.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


PIPELINE: ContextVar[Run | None] = ContextVar("cachepolicy_pipeline", default=None)


@contextlib.contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Generator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


# --- the pipeline's and the root's other methods ---------------------------------------------------------


def _pipeline_override(original: Method) -> Method:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        run = self.__dict__.get(ATTRIBUTE)
        if run is None:
            return original(self, *args, **kwargs)
        with run.pipeline_call():
            return original(self, *args, **kwargs)

    return __call__


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
        if isinstance(attached, Attached):
            attached.drop_current()
        return original(self, *args, **kwargs)

    return _reset_stateful_cache


_ROOT_METHODS = {
    "cache_context": _cache_context_override,
    "_reset_stateful_cache": _reset_override,
    "enable_cache": neighbours.enable_cache_override,
}


# --- refusals --------------------------------------------------------------------------------------------


def _refuse_attached(name: str, module: torch.nn.Module) -> None:
    if any(is_swapped(each) for each in module.modules()):
        raise _already(f"`{name}`" if name else "the model")


def _already(what: str) -> PolicyError:
    return PolicyError.of(
        "E301",
        f"{what} has a policy already",
        help="`cachepolicy.remove(...)` it first, or combine both with `use` in one policy",
    )
