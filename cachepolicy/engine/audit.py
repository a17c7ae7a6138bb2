"""Audited trajectories: every module computes, and each answer that the policy would have given is compared with it.

A session draws at the beginning of a trajectory whether it is audited. The decisions, the signals and the histories of
an audited trajectory are those of the policy; what the model returns is what the bare model returns.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cachepolicy.engine.history_packing import leaves
from cachepolicy.engine.hooks import LOCAL
from cachepolicy.errors import counted

if TYPE_CHECKING:
    from cachepolicy.engine.forward_pass import ForwardPass
    from cachepolicy.engine.span_run import SpanRun


class Audit:
    """The comparisons of one forward pass of an audited trajectory.

    Attributes:
        expected: The answers of the segments whose last block has not run yet, by span and segment.
        left: The span that was answered while its first block ran. The rest of that block runs without the policy.
    """

    __slots__ = ("_norms", "expected", "left")

    def __init__(self) -> None:
        self.expected: dict[tuple[int, int], list[Any]] = {}
        self.left: SpanRun | None = None
        self._norms: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def compare(self, site: int, answer: Any, computed: Any) -> None:
        """Record how far an answer is from the computed output. Tensors of integers are not compared.

        Args:
            site: The site number.
            answer: What the policy would have answered.
            computed: What the site computed. Its tensors have the shapes of those of the answer.
        """
        for one, other in zip(leaves(answer), leaves(computed), strict=True):
            if other.is_floating_point() or other.is_complex():
                wide = _wide(other.detach())
                self._norms.setdefault(site, []).append((_norm(_wide(one.detach()) - wide), _norm(wide)))

    def errors(self) -> dict[int, float]:
        """Return the relative error of each answer, by site number, and forget the comparisons.

        It is the norm of the difference over the norm of the computed output, over all tensors of the output. It is
        infinite for an answer with NaN, and for an answer other than zero to an output of zeros.
        """
        norms, self._norms = self._norms, {}
        return {site: _relative([(one.item(), other.item()) for one, other in pairs]) for site, pairs in norms.items()}


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in at least float32, in which squares of half precision do not overflow."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor


def _relative(norms: list[tuple[float, float]]) -> float:
    difference, computed = (math.hypot(*side) for side in zip(*norms, strict=True))
    if difference == 0:
        return 0.0
    return difference / computed if computed and not math.isnan(difference) else math.inf


def run_bare(original: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a module and all modules inside it without the policy."""
    frame, LOCAL.frame = LOCAL.frame, None
    try:
        return original(module, *args, **kwargs)
    finally:
        LOCAL.frame = frame


# --- all trajectories of a run -----------------------------------------------------------------------------


def is_drawn(share: float, seed: int, number: int) -> bool:
    """Return whether a trajectory is audited.

    Args:
        share: The share of audited trajectories, 0 to 1.
        seed: The seed of the choice.
        number: The number of the trajectory in the run, from 0, in the order in which they begin.
    """
    return share > 0 and random.Random(f"cachepolicy audit {seed} {number}").random() < share  # noqa: S311 (a choice that can be repeated)


@dataclass(frozen=True, slots=True)
class SiteErrors:
    """The relative errors of the answers of one site.

    Attributes:
        count: The number of compared answers.
        mean: Their mean error.
        worst: The largest error.
        step: The step of the largest error.
    """

    count: int
    mean: float
    worst: float
    step: int

    def __str__(self) -> str:
        return f"{self.mean:.2%} on average of {counted(self.count, 'answer')}, {self.worst:.2%} at step {self.step}"


@dataclass(frozen=True, slots=True)
class AuditSummary:
    """What the audited trajectories of a run have shown. `str` describes it in a few lines.

    Attributes:
        begun: The number of trajectories that have begun since `apply`.
        audited: The number of those that are audited.
        errors: The errors of each site with a compared answer, by its name. With several denoisers, the name of the
            denoiser comes before it: `transformer_2: blocks.0`.
    """

    begun: int
    audited: int
    errors: Mapping[str, SiteErrors]

    @property
    def worst(self) -> float | None:
        """The largest error of any site, None before the first compared answer."""
        return max((errors.worst for errors in self.errors.values()), default=None)

    def __str__(self) -> str:
        lines = [f"{self.audited} of {self.begun} {'trajectory' if self.begun == 1 else 'trajectories'} audited"]
        most = sorted(self.errors.items(), key=lambda item: -item[1].worst)
        lines += [f"  {name}: {errors}" for name, errors in most[:_SHOWN]]
        if len(most) > _SHOWN:
            lines.append(f"  and {counted(len(most) - _SHOWN, 'site')} with smaller errors")
        return "\n".join(lines)


_SHOWN = 8  # sites that the text of a summary lists


class Audits:
    """Draws the audited trajectories of a run, and adds up their errors."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun = 0
        self._audited = 0
        self._errors: dict[str, SiteErrors] = {}

    def draws(self, share: float, seed: int) -> bool:
        """Count a trajectory that begins, and return whether it is audited."""
        with self._lock:
            drawn = is_drawn(share, seed, self._begun)
            self._begun += 1
            self._audited += drawn
            return drawn

    def add(self, step: int, errors: Mapping[str, float]) -> None:
        """Add the errors of a forward pass, by site name."""
        with self._lock:
            for name, error in errors.items():
                known = self._errors.get(name, SiteErrors(0, 0.0, -1.0, step))
                count = known.count + 1
                finite = math.isfinite(error) and math.isfinite(known.mean)
                mean = known.mean + (error - known.mean) / count if finite else math.inf
                worst, at = (error, step) if error > known.worst else (known.worst, known.step)
                self._errors[name] = SiteErrors(count, mean, worst, at)

    def compared(self, call: ForwardPass, audit: Audit, output: Any) -> dict[int, float]:
        """Return the error of each answer of an audited call by site number, and add them to those of the run.

        Args:
            call: The forward pass.
            audit: Its comparisons.
            output: The output that the policy would have given.
        """
        root, itself = call.owner, call.context.execution.itself
        if call.compares and itself is not None:
            audit.compare(itself, output, call.computed)
        errors = audit.errors()
        prefix = f"{root.name}: " if len(root.attachment.modules) > 1 else ""
        sites = root.execution.plan.sites
        self.add(call.context.tick.step, {f"{prefix}{sites[site].name}": error for site, error in errors.items()})
        return errors

    @property
    def summary(self) -> AuditSummary:
        """The counts and errors so far."""
        with self._lock:
            return AuditSummary(self._begun, self._audited, dict(self._errors))
