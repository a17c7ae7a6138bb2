"""What decisions mean, worked out plainly: on copies, module by module, with nothing shared and nothing aliased.

The engine is held to this to the last bit. Whatever it does to be fast (aliases, write counters, chains of segments,
frames) has no counterpart here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cachepolicy.engine.actions import combine
from cachepolicy.language import ir
from cachepolicy.language.evaluate import evaluate
from cachepolicy.planning.history_spec import feedback
from cachepolicy.planning.plan import Plan, Site
from cachepolicy.planning.predictors import weights
from cachepolicy.planning.schedule import Decision
from cachepolicy.testing.models import ToyDiT


@dataclass(frozen=True, slots=True)
class Entry:
    """What went into a site and what came out of it, when it computed; every tensor a copy."""

    given: Sequence[Tensor]
    outputs: Sequence[Tensor]
    step: int


class PlainEngine:
    """A toy whose modules do what they are told: compute and remember, or answer from what is remembered.

    For toys alone: output number i of a module continues its positional input number i.
    """

    def __init__(self, model: ToyDiT, plan: Plan) -> None:
        self.model = model
        self.plan = plan
        self.decisions: Sequence[Decision] = ()
        self.step = 0
        self.ticks: dict[int, Any] = {}
        self.branch = ""
        self.histories: dict[tuple[str, int], list[Entry]] = {}
        self._begun: dict[int, Sequence[Tensor]] = {}
        for name, module in model.named_modules():
            sites = [(site, site.modules.index(name)) for site in plan.sites if name in site.modules]
            # The outermost first: a span stands around a site of one of its blocks.
            sites.sort(key=lambda each: len(each[0].parents))
            if sites:
                module.forward = _obeying(self, module.forward, sites)  # pyright: ignore[reportAttributeAccessIssue]

    def forget(self) -> None:
        """A trajectory begins."""
        self.histories.clear()

    def call(self, tick: Any, decisions: Sequence[Decision], facts: Mapping[int, str], args: tuple[Any, ...]) -> Any:
        """One call of the model under these decisions; facts about a history say that it is gone."""
        self.step, self.branch, self.decisions = tick.step, tick.branch, decisions
        self.ticks[tick.step] = tick
        self._begun.clear()
        for site, fact in facts.items():
            if any(
                words in fact
                for words in ("does not fit", "overwritten", "which branch", "nothing is kept", "ran again")
            ):
                self.histories.pop((self.branch, site), None)
        return self.model(*args)

    def run(self, original: Any, sites: Sequence[tuple[Site, int]], args: tuple[Any, ...]) -> Any:
        """A module is called: the outermost of its sites that reuses answers, else it computes for all of them."""
        for site, position in sites:
            if self.decisions[site.index].verdict == "reuse":
                return self._answer(site, position, args, original)
        given = [each.detach().clone() for each in args if isinstance(each, Tensor)]
        for site, position in sites:
            if position == 0:
                self._begun[site.index] = given
        output = original(*args)
        for site, position in sites:
            last = position == len(site.modules) - 1 and site.index in self._begun
            if last and self.decisions[site.index].verdict == "compute":
                entry = Entry(self._begun[site.index], [each.detach().clone() for each in streams(output)], self.step)
                self._remember(site, entry)
        return output

    def _remember(self, site: Site, entry: Entry) -> None:
        self.histories.setdefault((self.branch, site.index), []).insert(0, entry)

    def _places(
        self, predictor: str, history: Sequence[Entry], arguments: Mapping[str, Any]
    ) -> tuple[list[float], float]:
        """Where the entries and this call lie on the axis of a predictor."""
        word = arguments.get("along", "step")
        places = {step: float(getattr(tick, word)) for step, tick in self.ticks.items()}
        if predictor == "chebyshev":
            whole = {"step": self.ticks[self.step].steps, "t": 1000, "sigma": 1}[word]
            places = {step: 2 * place / whole - 1 for step, place in places.items()}
        return [places[entry.step] for entry in history], places[self.step]

    def _answer(self, site: Site, position: int, args: tuple[Any, ...], original: Any) -> Any:
        action = self.decisions[site.index].action
        history = self.histories.get((self.branch, site.index), [])
        form = original.__self__
        if isinstance(action, ir.Skip) or position > 0:
            return formed(form, args)
        residual = isinstance(action, ir.Reuse | ir.Predict) and action.residual
        answers = list[Tensor]()
        for place in range(len(history[0].outputs)):
            column = [_kept(entry, place, residual=residual) for entry in history]
            value = column[0]
            if isinstance(action, ir.Predict):
                arguments = {each.label: evaluate(each.value) for each in action.arguments}
                places, here = self._places(action.predictor, history, arguments)
                value = combine(column, weights(action.predictor, places, here, arguments))
            answers.append(args[place] + value if residual else value.clone())
        if feedback(action):
            given = [each.clone() for each in args if isinstance(each, Tensor)]
            self._remember(site, Entry(given, [each.clone() for each in answers], self.step))
        return formed(form, answers)


def _kept(entry: Entry, place: int, *, residual: bool) -> Tensor:
    return entry.outputs[place] - entry.given[place] if residual else entry.outputs[place]


def _obeying(engine: PlainEngine, original: Any, sites: Sequence[tuple[Site, int]]) -> Any:
    def forward(*args: Any) -> Any:
        return engine.run(original, sites, args)

    return forward


def streams(output: Any) -> list[Tensor]:
    """The tensors of a toy's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    return list(output.values() if isinstance(output, dict) else output)


def formed(module: torch.nn.Module, tensors: Sequence[Tensor]) -> Any:
    """`tensors` in the form in which the toy's module hands on its streams."""
    toy = getattr(module, "toy", None)
    if toy is None or isinstance(module, ToyDiT) or toy.returns == "tensor":
        return tensors[0]
    two = tensors[0], tensors[1]
    match toy.returns:
        case "tuple":
            return two
        case "list":
            return list(two)
        case _:
            return {"x": two[0], "context": two[1]}
