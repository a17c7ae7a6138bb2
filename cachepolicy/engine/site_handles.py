"""The handles of the modules that a run intercepts, from the sites and probes of the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

from cachepolicy.engine.execution_plan import ExecutionPlan
from cachepolicy.engine.history_storage import ANYHOW
from cachepolicy.engine.hooks import SiteHandle, parameters_of
from cachepolicy.engine.introspection import unwrapped

if TYPE_CHECKING:
    from cachepolicy.engine.root_model import RootModel


def handles_of(root: RootModel) -> dict[str, SiteHandle]:
    """Build the handle of each intercepted module, by module name. The root model has the name ""."""
    handles, plan, keepings = dict[str, SiteHandle](), root.execution.plan, root.execution.keepings
    known = dict[Any, tuple[str, ...]]()

    def at(name: str) -> SiteHandle:
        if name not in handles:
            handles[name] = SiteHandle(root, name or "model", _parameters(root.module.get_submodule(name), known))
        return handles[name]

    at("")
    for site in sorted(plan.sites, key=lambda site: len(site.parents)):
        keeping = keepings[site.index]
        if keeping.streams:
            for position, name in enumerate(site.modules):
                at(name).members.append((site.index, position))
        if len(site.modules) == 1:
            handle = at(site.modules[0])
            handle.index, handle.keeping = site.index, keeping
            handle.plain = keeping.plain and root.attachment.storing is ANYHOW
    for probe, location in plan.probes.items():
        before = probe.stream in {"input", "argument"}
        handle = at(location.modules[0 if before else -1])
        (handle.inputs if before else handle.outputs).append(probe)
        if len(location.modules) > 1:
            at(location.modules[0]).starts.append(probe)
    if any(keeping.streams for keeping in keepings) or plan.probes:
        # All blocks are watched: their calls show which output becomes which input.
        for name in plan.skeleton.block_lists:
            for block in plan.skeleton.elements[name]:
                at(block).special = True
    for handle in handles.values():
        handle.special |= handle.watched
        handle.alone = (
            len(handle.members) == 1
            and not (handle.inputs or handle.outputs or handle.starts)
            and handle.index in {-1, handle.members[0][0]}
        )
    return handles


def _parameters(module: Any, known: dict[Any, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the parameter names of the module's forward, which modules of one class share."""
    # A method of the instance that a removed hook of diffusers has put back is the function of the class.
    forward = getattr(module.forward, "__func__", None)
    if not isinstance(forward, FunctionType) or unwrapped(module) is not module:
        return parameters_of(module)
    if forward not in known:
        known[forward] = parameters_of(module)
    return known[forward]


def lone_blocks(
    execution: ExecutionPlan, handles: Mapping[str, SiteHandle]
) -> Mapping[int, Sequence[SiteHandle | None]]:
    """Return the handles of the blocks of each span, by site number. None stands for a block that others watch too."""
    return {
        site: [handle if (handle := handles.get(name)) is not None and handle.alone else None for name in names]
        for site, names in execution.names.items()
        if execution.keepings[site].streams
    }
