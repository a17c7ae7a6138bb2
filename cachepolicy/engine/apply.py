"""Attaches a policy to a live model or pipeline, and removes it again."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, cast

from cachepolicy.diffusers.configs import config_of
from cachepolicy.diffusers.guidance import GUIDANCE_PROPERTY, PIPELINES
from cachepolicy.engine.attachment import Attachment, PipelineHandle
from cachepolicy.engine.class_swap import ATTRIBUTE
from cachepolicy.engine.distributed.groups import member_ranks
from cachepolicy.engine.history_packing import packing_of
from cachepolicy.engine.introspection import denoisers, describe, unwrapped
from cachepolicy.engine.options import MOST_SESSIONS, RunOptions, is_disabled, supplier
from cachepolicy.engine.root_model import RootModel
from cachepolicy.engine.run import Run
from cachepolicy.engine.session_config import BoundPolicy
from cachepolicy.errors import PolicyError, render
from cachepolicy.language import ir
from cachepolicy.language.linker import load, resolve
from cachepolicy.planning.bind import bind
from cachepolicy.planning.plan import Plan

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
    packing_of(chosen.history_dtype, chosen.history_device)
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
    attachment = Attachment(target, roots, BoundPolicy(loaded, plans, chosen, params))
    run = Run(attachment)
    if attaches:
        attachment.place()
        for root in attachment.roots.values():
            if root.tuned_for is not None:
                root.tuned_for.compare_model()
        _warn_of_rules(target, plans.values())
    else:
        attachment.disabled = True
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
    return handle.attachment.run if isinstance(handle, RootModel | PipelineHandle) else None
