"""Guidance batches: runs the conditional half and rebuilds the unconditional half from stored differences.

This is FasterCache's CFG-cache (arXiv:2410.19355, equations 9 to 11): per frame, the difference of both halves changes
slowly in a low and a high frequency band. On a skipped step it is added to the spectrum of the conditional half.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Inputs and outputs of models have arbitrary types, which pyright reports as unknown.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from cachepolicy.diffusers.guidance import COND_BRANCHES, UNCOND_BRANCHES
from cachepolicy.engine.actions import cloned, versions
from cachepolicy.engine.call_arguments import CallArguments
from cachepolicy.engine.guidance_batch import GuidanceSource, rows_of
from cachepolicy.engine.guidance_tensors import (
    Bands,
    Frames,
    conditional,
    difference,
    frames_of,
    halves,
    predictions_of,
    rebuild,
    whole,
    with_predictions,
)
from cachepolicy.language import ir
from cachepolicy.planning.facts import Fact
from cachepolicy.planning.history_spec import needed_results

if TYPE_CHECKING:
    from cachepolicy.engine.forward_pass import ForwardPass


@dataclass(frozen=True, slots=True)
class Problem:
    """Why an unconditional half cannot be rebuilt. `final` if the call is no guidance batch at all."""

    reason: str
    final: bool


@dataclass(slots=True, eq=False)
class Guide:
    """Guidance state of one trajectory: the stored difference, and the conditional prediction of this step.

    The conditional prediction is stored only if the halves run in separate calls.

    Attributes:
        over_limit: Whether the memory limit did not admit the stored difference, or the prediction of this step.
    """

    over_limit: bool = False
    _kept: list[tuple[Bands, Frames]] = field(default_factory=list[tuple[Bands, Frames]])
    _pairs: list[Sequence[tuple[torch.Tensor, torch.Tensor]]] = field(
        default_factory=list[Sequence[tuple[torch.Tensor, torch.Tensor]]]
    )
    _cond: Any = None
    _versions: tuple[int, ...] | None = None
    _clones: bool = False
    _rows: int = 0
    _step: int = -1
    _called: tuple[int, int] = (-1, 0)
    _alone: bool = False
    _apart: bool = False
    _examined: tuple[object, str | None] | None = None

    def release(self, *, kept: bool, cond: bool) -> None:
        """Release the stored difference (`kept`) or the conditional prediction (`cond`)."""
        if kept:
            self._kept, self._pairs = [], []
        if cond:
            self._cond = None

    def limit(self, *, admitted: bool) -> None:
        """Release everything that the memory limit does not admit."""
        if not admitted:
            self.release(kept=True, cond=True)
        if not admitted or self._kept or self._pairs:
            self.over_limit = not admitted

    @property
    def held(self) -> list[torch.Tensor]:
        """The stored tensors."""
        outputs = predictions_of(self._cond, self._rows) if self._cond is not None else []
        pairs = [tensor for step in self._pairs for pair in step for tensor in pair]
        return [*outputs, *pairs, *(band for bands, _ in self._kept for band in (bands.low, bands.high))]

    def named(self, branch: str) -> bool:
        """Return True if the name of the branch tells which half it is."""
        return branch in COND_BRANCHES or branch in UNCOND_BRANCHES

    def problem(self, call: ForwardPass, action: ir.ApproximateUncond) -> Problem | None:
        """Return why a call cannot be approximated by an action, or None."""
        tick, arguments, source = call.context.tick, call.arguments, call.source
        if self.named(tick.branch):
            if tick.branch in UNCOND_BRANCHES and (self._cond is None or self._step != tick.step):
                missing = "the conditional call has not run in this step"
                return Problem(Fact.OVER_LIMIT if self.over_limit and self._step == tick.step else missing, final=True)
            if tick.branch in UNCOND_BRANCHES and self._overwritten():
                # Other code modifies the predictions in place, so copies are stored from now on.
                self._clones, self._cond = True, None
                return Problem("the conditional prediction was overwritten in place", final=True)
        elif not source.guided:
            return Problem("there is no guidance", final=True)
        elif self._several_calls(tick.step, len(call.state.calls.present)):
            self.release(kept=True, cond=False)
            return Problem("guidance runs in several calls", final=True)
        elif _batch(arguments) % 2:
            return Problem("the batch has no two halves", final=True)
        if not self.named(tick.branch):
            if not self._alone:
                return Problem("no step has shown that it has one call", final=False)
            doubt = self._doubt(arguments, source, call.owner.module)
            if doubt is not None:
                self.release(kept=True, cond=False)
                return Problem(doubt, final=True)
        holds = bool(self._kept) if action.method == "spectral" else len(self._pairs) >= needed_results(action)
        return None if holds else Problem(Fact.OVER_LIMIT if self.over_limit else Fact.NO_HISTORY, final=False)

    def rows(self, arguments: CallArguments, source: GuidanceSource, model: torch.nn.Module) -> int | None:
        """Return the number of rows of a guidance batch, or None if the call is not known to be one."""
        rows = _batch(arguments)
        guided = source.guided is True and rows % 2 == 0
        return rows if guided and self._doubt(arguments, source, model) is None else None

    def _doubt(self, arguments: CallArguments, source: GuidanceSource, model: torch.nn.Module) -> str | None:
        """Return why the batch may not have two halves, or None. Batches of equal size are examined once."""
        key = (_batch(arguments), source.samples)
        if self._examined is None or self._examined[0] != key:
            self._examined = (key, source.problem(arguments.latent_input, model))
        return self._examined[1]

    def _several_calls(self, step: int, calls: int) -> bool:
        """Return whether a step has had more than one call. Also record a completed step with a single call."""
        before, last = self._called
        self._apart |= calls > 1
        self._alone |= step != before and last == 1
        self._called = (step, calls)
        return self._apart

    def halved(
        self, arguments: CallArguments, args: tuple[Any, ...], settings: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the root model with the conditional half of all batched values."""
        only, lists = settings.get("inputs") or None, isinstance(arguments.latent_input, list)
        named = conditional(arguments.named, _batch(arguments), settings["layout"], only, lists=lists)
        names = list(named)
        positional = tuple(named[name] for name in names[: len(args)])
        return positional, {name: named[name] for name in names[len(args) :]}

    def answered(self, method: str, settings: Mapping[str, Any]) -> Any:
        """Return the answer of the unconditional call from the conditional call of this step."""
        output, rows = self._cond, self._rows
        return with_predictions(output, rows, self._rebuilt(predictions_of(output, rows), method, settings))

    def ended(self, call: ForwardPass, settings: Mapping[str, Any], output: Any, channels: int | None) -> Any:
        """Store what later steps read of a full call, or complete the output of half a batch. Return the output.

        Args:
            call: The call.
            settings: The arguments of the action, and its method if the call ran half a batch.
            output: The output of the root model.
            channels: The number of channels of a prediction, or None.
        """
        tick, arguments, keeping = call.context.tick, call.arguments, call.context.execution.guidance
        rows = _batch(arguments)
        if tick.branch in COND_BRANCHES:
            self._keep(output, tick.step, rows)
            return output
        order = settings["layout"]
        if call.halved:
            conds = predictions_of(output, rows // 2)
            unconds = self._rebuilt(conds, settings["method"], settings)
            both = [whole(uncond, cond, order) for uncond, cond in zip(unconds, conds, strict=True)]
            return with_predictions(output, rows // 2, both)
        predictions = predictions_of(output, rows)
        if tick.branch in UNCOND_BRANCHES:
            pairs = list(zip(predictions, predictions_of(self._cond, rows), strict=True))
        else:
            pairs = [halves(prediction, order) for prediction in predictions]
        if keeping.pairs:
            # Copies, because the caller may modify the predictions in place.
            step = [(uncond.detach().clone(), cond.detach().clone()) for uncond, cond in pairs]
            self._pairs = [step, *self._pairs][: keeping.pairs]
        self._kept = []
        if not keeping.bands:
            return output
        latents = arguments.latent_input if isinstance(arguments.latent_input, torch.Tensor) else None
        for number, (prediction, (uncond, cond)) in enumerate(zip(predictions, pairs, strict=True)):
            if number > 0 and prediction.ndim == _SEQUENCE:
                frames = Frames("BSC", (1, 1, prediction.shape[1]))  # a second stream, such as audio
            else:
                frames = frames_of(prediction, arguments.named, latents, channels, settings)
            self._kept.append((difference(frames.split(uncond), frames.split(cond)), frames))
        return output

    def _keep(self, output: Any, step: int, rows: int) -> None:
        """Store the conditional prediction, as a copy if in-place writes cannot be detected or have occurred."""
        tensors = predictions_of(output, rows)
        clones = self._clones or any(tensor.is_inference() for tensor in tensors)
        self._cond, self._step, self._rows = cloned(output) if clones else output, step, rows
        self._versions = None if clones else versions(output)

    def _overwritten(self) -> bool:
        return self._versions is not None and versions(self._cond) != self._versions

    def _rebuilt(self, conds: Sequence[torch.Tensor], method: str, settings: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return the unconditional predictions of a step that ran the conditional ones only."""
        match method:
            case "copy":
                return [cond.clone() for cond in conds]
            case "delta":
                return [cond - (kept - uncond) for cond, (uncond, kept) in zip(conds, self._pairs[0], strict=True)]
            case "affine":
                return [self._combined(number, cond, settings) for number, cond in enumerate(conds)]
            case _:
                return self._by_bands(conds, settings)

    def _combined(self, number: int, cond: torch.Tensor, settings: Mapping[str, Any]) -> torch.Tensor:
        """Return LinearAG's sum of conditional and unconditional predictions (arXiv:2312.12487)."""
        first, *others = settings["cond"]
        answer = cond * first
        for factor, step in zip(others, self._pairs, strict=False):
            answer = answer + step[number][1] * factor
        for factor, step in zip(settings.get("uncond", ()), self._pairs, strict=False):
            answer = answer + step[number][0] * factor
        return answer

    def _by_bands(self, conds: Sequence[torch.Tensor], settings: Mapping[str, Any]) -> list[torch.Tensor]:
        rebuilt = list[torch.Tensor]()
        for cond, (bands, frames) in zip(conds, self._kept, strict=True):
            rows = rebuild(bands, frames.split(cond), settings["low"], settings["high"])
            rebuilt.append(frames.join(rows, cond.shape[0]).to(cond.dtype))
        return rebuilt


_SEQUENCE = 3  # dimensions of a batch of token sequences (B, S, C)


def _batch(arguments: CallArguments) -> int:
    return rows_of(arguments.latent_input)
