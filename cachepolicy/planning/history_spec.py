"""What a site has to keep for its rules: how many results, in which form. Pure, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cachepolicy.language import ir


@dataclass(frozen=True, slots=True)
class Keeping:
    """What a site has to keep: how many outputs, how many residuals, and whether it must know its streams at all."""

    outputs: int
    residuals: int
    streams: bool
    halves: bool

    @property
    def depth(self) -> int:
        """How many results of either form."""
        return max(1, self.outputs, self.residuals)

    @property
    def plain(self) -> bool:
        """True where the newest output alone is kept."""
        return self.outputs == 1 and not self.streams and not self.halves


def keeping(rules: Sequence[ir.Rule], *, span: bool, halves: bool) -> Keeping:
    """What the actions of a site's rules read from its history."""
    outputs = residuals = 0
    skips = False
    for rule in rules:
        match rule.action:
            case ir.Reuse(residual=True):
                residuals = max(residuals, 1)
            case ir.Reuse():
                outputs = max(outputs, 1)
            case ir.Predict(residual=True):
                residuals = max(residuals, history_depth(rule.action))
            case ir.Predict():
                outputs = max(outputs, history_depth(rule.action))
            case ir.Skip():
                skips = True
            case _:
                pass
    return Keeping(outputs, residuals, span or residuals > 0 or skips, halves)


def history_depth(action: ir.Predict) -> int:
    """How many computed results a predictor reads at most."""
    for argument in action.arguments:
        if argument.label == "order" and isinstance(argument.value, ir.Number):
            return int(argument.value.value) + 1
    return 2


def reach(action: ir.Action | None) -> int:
    """How many of the newest results an answer by this action is made from."""
    return history_depth(action) if isinstance(action, ir.Predict) else 1


def feedback(action: ir.Action | None) -> bool:
    """True where the action's answers enter the history too."""
    return isinstance(action, ir.Predict) and any(
        argument.label == "feedback" and isinstance(argument.value, ir.Boolean) and argument.value.value
        for argument in action.arguments
    )
