"""The options of `apply` besides the policy and its params."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast

from cachepolicy.engine.memory_budget import bytes_of
from cachepolicy.errors import PolicyError, suggestion

MOST_SESSIONS = 64
"""The default number of sessions with state. The least recently used one is dropped."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of `apply`.

    Args:
        gradients: What happens where a gradient would have to pass through a reused result, which has none: `"refuse"`
            raises E343 if an input of the model requires grad or an adapter is being trained; `"detach"` treats reused
            results as constants.
        audit: The share of trajectories, 0 to 1, in which every module computes and each answer that the policy would
            have given is compared with the computed output. Such a trajectory returns what the bare model returns.
        audit_seed: The seed of the choice. The trajectory with the number n, counted from 0 in the order in which the
            trajectories of the run begin, is audited where `random.Random(f"cachepolicy audit {audit_seed} {n}")`
            draws a number below `audit`.

    The other fields are keyword arguments of `apply`, which documents them.
    """

    timestep: Callable[[], Any] | None = None
    scheduler: Any = None
    steps: int | None = None
    guidance: bool | None = None
    samples: Literal["mean", "max"] = "mean"
    trace: bool | Literal["profile"] = True
    process_group: Any = None
    externals: Mapping[str, Callable[[], float]] = field(default_factory=dict[str, Callable[[], float]])
    max_sessions: int = MOST_SESSIONS
    history_dtype: Any = None
    history_device: Any = None
    memory_limit: int | str | None = None
    gradients: Literal["refuse", "detach"] = "refuse"
    audit: float = 0.0
    audit_seed: int = 0

    @classmethod
    def of(cls, options: RunOptions | Mapping[str, Any] | None, **keywords: Any) -> RunOptions:
        """Return options with the keyword arguments of `apply` that differ from their defaults.

        Raises:
            PolicyError: `options` is neither `RunOptions` nor a mapping, or has an unknown name (E309).
        """
        defaults = {option.name: option.default for option in fields(cls)}
        if isinstance(options, Mapping):
            for name in options:
                if name not in defaults:
                    raise PolicyError.of(
                        "E309",
                        f"`options` has no `{name}`",
                        help=suggestion(str(name), list(defaults)) or ", ".join(defaults),
                    )
            options = cls(**options)
        if not isinstance(options, cls | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PolicyError.of(
                "E309", f"`options` is `{options!r}`", help="pass `RunOptions(...)`, or a dict of its fields"
            )
        changed = {name: value for name, value in keywords.items() if value is not defaults[name]}
        return replace(options or cls(), **changed)

    @property
    def limit(self) -> int | None:
        """`memory_limit` in bytes."""
        limit = self.memory_limit
        return bytes_of(limit) if isinstance(limit, str) else limit

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem is not None:
            raise PolicyError.of("E309", problem[0], help=problem[1])

    def _problem(self) -> tuple[str, str] | None:
        """Return a problem and its correction, or None."""
        # Checked at run time, since callers may not use a type checker.
        values = (self.steps, self.guidance, self.samples, self.trace)
        steps, guidance, samples, trace = cast("tuple[Any, Any, Any, Any]", values)
        if self.timestep is not None and not callable(self.timestep):
            return "`timestep` is no function", "pass a function that returns the current timestep, such as `lambda: t`"
        if self.scheduler is not None and (isinstance(self.scheduler, type) or not hasattr(self.scheduler, "step")):
            return f"`scheduler` is `{self.scheduler!r}`", "the scheduler that the loop steps, such as `pipe.scheduler`"
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            return f"`steps` is `{steps!r}`", "the number of steps of a trajectory, at least 1"
        if guidance is not None and not isinstance(guidance, bool):
            return f"`guidance` is `{guidance!r}`", "True, False or None"
        if samples not in {"mean", "max"}:
            return f"`samples` is `{samples!r}`", '`"mean"` or `"max"`'
        if not isinstance(trace, bool) and trace != "profile":
            return f"`trace` is `{trace!r}`", 'True, False or `"profile"`'
        most = cast("Any", self.max_sessions)
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            return f"`max_sessions` is `{most!r}`", "how many sessions hold something at a time, at least 1"
        gradients = cast("Any", self.gradients)
        if gradients not in {"refuse", "detach"}:
            return f"`gradients` is `{gradients!r}`", '`"refuse"` or `"detach"`'
        audit, seed = cast("tuple[Any, Any]", (self.audit, self.audit_seed))
        if not isinstance(audit, int | float) or isinstance(audit, bool) or not 0 <= audit <= 1:
            return f"`audit` is `{audit!r}`", "the share of trajectories that are audited, between 0 and 1"
        if not isinstance(seed, int) or isinstance(seed, bool):
            return f"`audit_seed` is `{seed!r}`", "a whole number"
        limit = cast("Any", self.memory_limit)
        if limit is not None and not _is_size(limit):
            return f"`memory_limit` is `{limit!r}`", "a number of bytes, or a size such as `512MiB` or `2GB`"
        return None


def _is_size(limit: Any) -> bool:
    """Return True for a whole number of bytes (at least 0), or the text of a size."""
    if isinstance(limit, str):
        return bytes_of(limit) is not None
    return isinstance(limit, int) and not isinstance(limit, bool) and limit >= 0


_logger = logging.getLogger("cachepolicy")
_disabled_before = False


def is_disabled() -> bool:
    """Return True if `CACHEPOLICY_DISABLE` is set in the environment, to anything but `0`, `false`, `no` or `off`.

    Logs a warning the first time that it finds the variable set, and again if it was unset in between.
    """
    global _disabled_before  # noqa: PLW0603 (the log has one line for each time that the variable is set)
    value = os.environ.get("CACHEPOLICY_DISABLE", "").strip().lower()
    disabled = value not in {"", "0", "false", "no", "off"}
    if disabled and not _disabled_before:
        _logger.warning("CACHEPOLICY_DISABLE is set: policies are not attached, and models run as they are")
    _disabled_before = disabled
    return disabled


def _refuse_arguments(name: str, function: Callable[..., Any]) -> None:
    """Raises PolicyError if the function for an external needs other arguments than it is called with."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without a signature
        return
    arguments = ("module",) if getattr(function, "takes_module", False) else ()
    try:
        signature.bind(*arguments)
    except TypeError as error:
        message = f"the function for `{name}` cannot be called: {error}"
        help = "it is called with the module of the site" if arguments else "it is called without arguments"
        raise PolicyError.of("E307", message, help=help) from error


def supplier(name: str, value: Any) -> Callable[[], float]:
    """Return a function that gives the value of an external.

    Raises:
        PolicyError: E307, the value is neither a number nor a function that can be called without arguments.
    """
    if callable(value):
        _refuse_arguments(name, value)
        return cast("Callable[[], float]", value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return lambda: value
    raise PolicyError.of(
        "E307", f"`{name}` is `{type(value).__name__}`", help="a number, or a function that returns one"
    )
