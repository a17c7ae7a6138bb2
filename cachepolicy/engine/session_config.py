"""The settings of a session: its params and its run options."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cachepolicy.engine.clock import Sources
from cachepolicy.engine.execution_plan import ExecutionPlan, lay_out
from cachepolicy.engine.options import RunOptions, supplier
from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.language.linker import resolve
from cachepolicy.planning.bind import bind
from cachepolicy.planning.plan import Plan

if TYPE_CHECKING:
    from cachepolicy.engine.attachment import Attachment

MOST_EXECUTIONS = 64
"""The number of cached execution plans, one per set of params. The least recently used is dropped."""


@dataclass(frozen=True, slots=True, eq=False)
class SessionConfig:
    """An execution plan per root model, and the run options."""

    executions: Mapping[str, ExecutionPlan]
    options: RunOptions
    bare: Sources = field(init=False)
    """The clock's sources when no scheduler is known."""

    def __post_init__(self) -> None:
        reads_t = any("t" in execution.plan.needs for execution in self.executions.values())
        lengths = {one.steps for execution in self.executions.values() for one in execution.plan.resolved.tuned}
        bare = Sources(
            timestep=self.options.timestep, steps=self.options.steps, reads_t=reads_t, lengths=frozenset(lengths)
        )
        object.__setattr__(self, "bare", bare)

    def sources(self, attachment: Attachment, pipeline: Any) -> Sources:
        """Return what the clock of a root call reads, in a call of `pipeline` or outside of any (None)."""
        if self.options.timestep is not None:
            return self.bare
        scheduler = self.options.scheduler
        if scheduler is None and pipeline is not None:
            scheduler = getattr(pipeline, "scheduler", None)
        follower = None if scheduler is None else attachment.follower_of(scheduler)
        if follower is None or getattr(scheduler, "timesteps", None) is None:
            return self.bare
        return replace(
            self.bare, scheduler=scheduler, follower=follower, pipeline=None if pipeline is None else type(pipeline)
        )

    def differs(self, other: SessionConfig) -> bool:
        """Return True if a running trajectory cannot change to `other`. A change of functions is allowed."""
        mine, theirs = self.options, other.options
        changed = (mine.scheduler is not theirs.scheduler, mine.steps != theirs.steps, mine.guidance != theirs.guidance)
        return any(changed) or (self.executions is not other.executions and self._rules() != other._rules())

    def _rules(self) -> list[str]:
        """Return the digest of the rules per root model: equal params bind to equal, not identical, plans."""
        return [execution.plan.resolved.digest for execution in self.executions.values()]


class BoundPolicy:
    """The policy and options of `apply`. Sessions may change what needs no other hooks."""

    def __init__(
        self, policy: ir.Policy, plans: Mapping[str, Plan], options: RunOptions, params: Mapping[str, Any]
    ) -> None:
        self.policy = policy
        self._params = dict(params)
        self._externals = {statement.name for statement in policy.statements if isinstance(statement, ir.External)}
        self._executions: OrderedDict[object, Mapping[str, ExecutionPlan]] = OrderedDict()
        self._lock = threading.Lock()
        self.session_config = SessionConfig({name: lay_out(plan) for name, plan in plans.items()}, options)

    def depart(self, options: Mapping[str, Any], params: Mapping[str, Any]) -> SessionConfig:
        """Return the settings of a session with other options or params.

        Args:
            options: Run options that differ.
            params: Params and externals that differ.

        Raises:
            PolicyError: A param is invalid, or changes the hooks on the model (E314).
        """
        externals = {name: supplier(name, params[name]) for name in params if name in self._externals}
        own = {name: value for name, value in params.items() if name not in externals}
        current = self.session_config.options
        changed = replace(current, **options, externals={**current.externals, **externals})
        return SessionConfig(self._executions_for(own) if own else self.session_config.executions, changed)

    def _executions_for(self, params: Mapping[str, Any]) -> Mapping[str, ExecutionPlan]:
        key = tuple(sorted((name, _frozen(value)) for name, value in params.items()))
        with self._lock:
            known = self._executions.get(key)
            if known is not None:
                self._executions.move_to_end(key)
                return known
        executions = self._bound(params)
        with self._lock:
            # Another thread may have bound the same params meanwhile. Use its plans.
            executions = self._executions.setdefault(key, executions)
            while len(self._executions) > MOST_EXECUTIONS:
                self._executions.popitem(last=False)
            return executions

    def _bound(self, params: Mapping[str, Any]) -> Mapping[str, ExecutionPlan]:
        change = self._change(params)
        if not isinstance(change, str):
            return change
        alone = [name for name in params if isinstance(self._change({name: params[name]}), str)]
        names = " and ".join(f"`{name}`" for name in alone or params)
        raise PolicyError.of(
            "E314",
            f"{names} cannot differ from session to session: it changes {change}",
            help="the hooks are placed once, by `apply`: set it there",
        )

    def _change(self, params: Mapping[str, Any]) -> Mapping[str, ExecutionPlan] | str:
        """Return the execution plans under these params, or the part of the hooks that they would change."""
        current = self.session_config.executions
        resolved = {
            name: resolve(self.policy, self._params | dict(params), model=execution.plan.skeleton.facts)
            for name, execution in current.items()
        }
        if all(resolved[name].digest == execution.plan.resolved.digest for name, execution in current.items()):
            return current
        executions = dict[str, ExecutionPlan]()
        for name, execution in current.items():
            executions[name] = lay_out(bind(resolved[name], execution.plan.skeleton))
            change = _change(execution, executions[name])
            if change:
                return change
        return executions


def _change(current: ExecutionPlan, other: ExecutionPlan) -> str:
    """Return which part of the hooks differs between two execution plans, or an empty string."""
    if [site.modules for site in current.plan.sites] != [site.modules for site in other.plan.sites]:
        return "which modules the rules take"
    if current.plan.probes != other.plan.probes or current.inside != other.inside:
        return "what is measured, and where"
    for site, mine, theirs in zip(current.plan.sites, current.keepings, other.keepings, strict=True):
        if mine != theirs:
            return f"what `{site.name}` keeps"
    if (current.approximation is None) != (other.approximation is None):
        return "whether guidance is approximated"
    return ""


def _frozen(value: Any) -> str:
    """Return a param's value as a cache key that distinguishes 1, 1.0 and True."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_frozen, value))}]"  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    return f"{type(value).__name__} {value!r}"
