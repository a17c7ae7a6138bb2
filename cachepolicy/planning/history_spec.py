"""What a site has to keep for its rules: how many results, and in which form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from cachepolicy.language import ir
from cachepolicy.language.installed_predictors import installed
from cachepolicy.language.traversal import inner_predictor
from cachepolicy.language.vocabulary import NOT_LINEAR, PREDICTORS


@dataclass(frozen=True, slots=True)
class Keeping:
    """What a site has to keep.

    Attributes:
        outputs: Number of outputs.
        residuals: Number of residuals.
        streams: Whether the site must know which of its inputs and outputs are hidden-state streams.
        halves: Whether it keeps the halves of a guidance batch apart.
    """

    outputs: int
    residuals: int
    streams: bool
    halves: bool

    @property
    def depth(self) -> int:
        """Number of results, of either form."""
        return max(1, self.outputs, self.residuals)

    @property
    def plain(self) -> bool:
        """True where only the newest output is kept."""
        return self.outputs == 1 and not self.streams and not self.halves


@dataclass(frozen=True, slots=True)
class GuidanceKeeping:
    """What is kept of steps that computed both halves of guidance.

    Attributes:
        bands: Whether the difference of both halves is kept by frequency bands.
        pairs: Number of pairs of predictions.
    """

    bands: bool
    pairs: int


def keeping(rules: Sequence[ir.Rule], *, span: bool, halves: bool) -> Keeping:
    """Returns what the actions of a site's rules read from its history.

    Args:
        rules: The rules of the site.
        span: Whether the site is a span of blocks.
        halves: Whether the halves of a guidance batch are kept apart.
    """
    outputs = residuals = 0
    skips = False
    for rule in rules:
        match rule.action:
            case ir.Reuse(residual=residual) | ir.Predict(residual=residual):
                if residual:
                    residuals = max(residuals, reach(rule.action))
                else:
                    outputs = max(outputs, reach(rule.action))
            case ir.Skip():
                skips = True
            case _:
                pass
    return Keeping(outputs, residuals, span or residuals > 0 or skips, halves)


def history_depth(action: ir.Predict) -> int:
    """Returns the largest number of computed results that a predictor reads."""
    inner = _inner_predictors(action)
    if inner:
        return max(map(history_depth, inner))
    given = {argument.label: argument.value for argument in action.arguments}
    match action.predictor, given:
        case "weights", {"of": ir.ListOf(items=items)}:
            return len(items)
        case _, {"window": ir.Number(value=window)}:
            return int(window)
        case name, {"order": ir.Number(value=order)}:
            return chebyshev_window(int(order)) if name == "chebyshev" else int(order) + 1
        case name, _ if name not in PREDICTORS and (found := installed(name)) is not None:
            return found.results
        case _:
            return 2


def _inner_predictors(action: ir.Predict) -> list[ir.Predict]:
    """Returns the predictors that the arguments of an action name."""
    return [inner for argument in action.arguments if (inner := inner_predictor(argument.value)) is not None]


def chebyshev_window(order: int) -> int:
    """Returns how many results `chebyshev` reads without a window: as many as the authors' code."""
    return max(order + 1, 6)


def fewest_results(action: ir.Predict) -> int:
    """Returns the smallest number of results that a predictor can answer from. With fewer, the site computes."""
    inner = _inner_predictors(action)
    if inner:
        return max(map(fewest_results, inner))
    return history_depth(action) if action.predictor == "weights" else 1


def is_scaled(action: ir.Predict) -> bool:
    """Returns whether a predictor takes places from -1 to 1, of the whole range of its axis."""
    return action.predictor == "chebyshev"


def reach(action: ir.Action | None) -> int:
    """Returns the number of newest results that an answer by this action is computed from."""
    return history_depth(action) if isinstance(action, ir.Predict) else 1


Axis = Literal["step", "t", "sigma"]


def axis(action: ir.Predict) -> Axis:
    """Returns the clock word along which a predictor extrapolates."""
    for argument in action.arguments:
        if argument.label == "along" and isinstance(argument.value, ir.Text):
            return cast("Axis", argument.value.value)
    return "step"


def is_mean(action: ir.Action | None) -> bool:
    """Returns whether the action answers with the mean of both halves of a guidance batch."""
    return isinstance(action, ir.Reuse) and action.mean


def needed_results(action: ir.Action) -> int:
    """Returns how often a site must have computed before the action can answer."""
    match action:
        case ir.Skip() | ir.Compute() | ir.ApproximateUncond(method="copy"):
            return 0
        case ir.ApproximateUncond(method="affine"):
            return max(1, kept_pairs(action))
        case ir.Predict():
            return fewest_results(action)
        case _:
            return 1


def whole_results(action: ir.Action) -> int:
    """Returns how many of the newest results must be of a whole guidance batch to answer a call of one.

    Most predictors leave out older results of half a batch. `weights`, `align` and `band` do not.
    """
    if not needed_results(action):
        return 0
    every = isinstance(action, ir.Predict) and (is_whole(action) or fewest_results(action) > 1)
    return reach(action) if every else 1


def is_whole(action: ir.Action) -> bool:
    """Returns whether the action answers and reads whole guidance batches only."""
    return isinstance(action, ir.Predict) and action.predictor in NOT_LINEAR


def kept_pairs(action: ir.ApproximateUncond) -> int:
    """Returns how many pairs of conditional and unconditional predictions the action reads, newest first."""
    if action.method == "delta":
        return 1
    if action.method != "affine":
        return 0
    lengths = {
        argument.label: len(argument.value.items)
        for argument in action.arguments
        if isinstance(argument.value, ir.ListOf)
    }
    # The first conditional factor is that of the present step.
    return max(lengths.get("cond", 1) - 1, lengths.get("uncond", 0))


def feedback(action: ir.Action | None) -> bool:
    """Returns whether the answers of the action enter the history too."""
    return isinstance(action, ir.Predict) and any(
        argument.label == "feedback" and isinstance(argument.value, ir.Boolean) and argument.value.value
        for argument in action.arguments
    )
