"""The policy as one session has it: its params, and what its caller said of the run."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cachepolicy.engine.clock import Sources
from cachepolicy.engine.execution_plan import ExecutionPlan, lay_out
from cachepolicy.engine.options import RunOptions, supplier
from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.language.linker import resolve
from cachepolicy.planning.bind import bind
from cachepolicy.planning.plan import Plan

MOST_LAYOUTS = 64
"""Distinct sets of params whose layouts are kept; beyond, the least recently used one is worked out anew."""


@dataclass(frozen=True, slots=True, eq=False)
class SessionConfig:
    """A layout for each root, and what the caller said."""

    layouts: Mapping[str, ExecutionPlan]
    told: RunOptions
    bare: Sources = field(init=False)
    """What the clock reads where no scheduler is known."""

    def __post_init__(self) -> None:
        reads_t = any("t" in layout.plan.needs for layout in self.layouts.values())
        bare = Sources(timestep=self.told.timestep, steps=self.told.steps, reads_t=reads_t)
        object.__setattr__(self, "bare", bare)

    def differs(self, other: SessionConfig) -> bool:
        """True where a trajectory cannot go from one to the other; functions that give numbers may be exchanged."""
        mine, theirs = self.told, other.told
        told = (mine.scheduler is not theirs.scheduler, mine.steps != theirs.steps, mine.guidance != theirs.guidance)
        return any(told) or (self.layouts is not other.layouts and self._rules() != other._rules())

    def _rules(self) -> list[str]:
        """What the rules of each root mean: params that were bound anew give equal layouts, not the same ones."""
        return [layout.plan.resolved.digest for layout in self.layouts.values()]


class BoundPolicy:
    """What `apply` was given, from which each session may depart within what is attached."""

    def __init__(
        self, policy: ir.Policy, plans: Mapping[str, Plan], told: RunOptions, params: Mapping[str, Any]
    ) -> None:
        self.policy = policy
        self._params = dict(params)
        self._externals = {each.name for each in policy.statements if isinstance(each, ir.External)}
        self._layouts: OrderedDict[object, Mapping[str, ExecutionPlan]] = OrderedDict()
        self._lock = threading.Lock()
        self.session_config = SessionConfig({name: lay_out(plan) for name, plan in plans.items()}, told)

    def depart(self, told: Mapping[str, Any], params: Mapping[str, Any]) -> SessionConfig:
        """The session_config of a session that says so much otherwise.

        Raises:
            PolicyError: what `apply` would say of a param, or a param changes what is attached to the model (E314).
        """
        externals = {name: supplier(name, params[name]) for name in params if name in self._externals}
        own = {name: value for name, value in params.items() if name not in externals}
        said = replace(self.session_config.told, **told, externals={**self.session_config.told.externals, **externals})
        return SessionConfig(self._laid_out(own) if own else self.session_config.layouts, said)

    def _laid_out(self, params: Mapping[str, Any]) -> Mapping[str, ExecutionPlan]:
        key = tuple(sorted((name, _frozen(value)) for name, value in params.items()))
        with self._lock:
            known = self._layouts.get(key)
            if known is not None:
                self._layouts.move_to_end(key)
                return known
        layouts = self._bound(params)
        with self._lock:
            layouts = self._layouts.setdefault(key, layouts)
            while len(self._layouts) > MOST_LAYOUTS:
                self._layouts.popitem(last=False)
            return layouts

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
        """The layouts under these params, or what they change of all that is attached."""
        resolved = resolve(self.policy, self._params | dict(params))
        if all(resolved.digest == layout.plan.resolved.digest for layout in self.session_config.layouts.values()):
            return self.session_config.layouts
        found = dict[str, ExecutionPlan]()
        for name, layout in self.session_config.layouts.items():
            found[name] = lay_out(bind(resolved, layout.plan.skeleton))
            change = _change(layout, found[name])
            if change:
                return change
        return found


def _change(attached: ExecutionPlan, other: ExecutionPlan) -> str:
    """What of a layout's hooks is not that of another's; empty where they are the same."""
    if [site.modules for site in attached.plan.sites] != [site.modules for site in other.plan.sites]:
        return "which modules the rules take"
    if attached.plan.probes != other.plan.probes or attached.inside != other.inside:
        return "what is measured, and where"
    for site, mine, theirs in zip(attached.plan.sites, attached.keepings, other.keepings, strict=True):
        if mine != theirs:
            return f"what `{site.name}` keeps"
    if (attached.approximation is None) != (other.approximation is None):
        return "whether guidance is approximated"
    return ""


def _frozen(value: Any) -> str:
    """A param's value as text that tells it from others: 1, 1.0 and True are three."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_frozen, value))}]"  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    return f"{type(value).__name__} {value!r}"
