"""What one root call is decided and answered from: clock, branch, rows of the batch, and what later steps read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from cachepolicy.engine.actions import STORE, STORE_CLONE, Op, Slot, combine
from cachepolicy.engine.batch_view import WHOLE, BatchView
from cachepolicy.engine.execution_plan import ExecutionPlan, Trims
from cachepolicy.engine.finite import is_too_large
from cachepolicy.engine.memory_budget import Lease
from cachepolicy.engine.signals import Remembered
from cachepolicy.engine.streams import NO_LAYOUT, low_band
from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Environment, Undefined
from cachepolicy.language.linker import alignment
from cachepolicy.language.traversal import names_in
from cachepolicy.language.vocabulary import PREDICTORS
from cachepolicy.planning.facts import Fact
from cachepolicy.planning.history_spec import axis, fewest_results, is_mean, is_scaled, reach
from cachepolicy.planning.liveness import Liveness
from cachepolicy.planning.possible_decisions import NOTHING, Reads
from cachepolicy.planning.predictors import Inner, Weights, evaluated, weights
from cachepolicy.planning.schedule import UNDEFINED_ARGUMENT, Decision, Memory, Partition, Tick, clock_words

if TYPE_CHECKING:
    from cachepolicy.engine.audit import Audit
    from cachepolicy.engine.root_model import RootModel


@dataclass(slots=True)
class Branch:
    """State of one guidance branch: memories of the decisions, slots of the sites, and past signals."""

    partition: Partition
    memories: list[Memory]
    slots: list[Slot]
    remembered: Remembered = field(default_factory=Remembered)
    reads: dict[int, Reads] = field(default_factory=dict[int, Reads])
    """Reads of each group at the last check, by the first site of the group."""
    held: int = 0
    """Bytes that the branch holds."""
    signals: Lease | None = None
    """The lease for remembered signals, if there is a memory limit."""
    trims: Trims | None = None
    """What the last call released, if its decisions depended only on the clock."""
    ticks: dict[int, Tick] = field(default_factory=dict[int, Tick])
    """The times of the calls so far, by step."""
    decided: tuple[int, Sequence[Decision]] | None = None
    """The step and the decisions of the last call by site, where other branches follow them."""

    def forget(self) -> None:
        """Release the history. The memories of the decisions stay."""
        self.slots = [Slot(slot.storing) for slot in self.slots]
        self.remembered = Remembered()
        self.reads.clear()
        self.trims = None
        self.held = 0


class StepContext:
    """What one root call is decided and answered from.

    Attributes:
        root: The root model.
        execution: The plan under the settings of the session.
        branch: The state of the guidance branch.
        tick: The time of the call.
        liveness: What later steps may read.
        rows: The rows of the batch that the call runs.
        guided: Whether the call is known to have a guidance batch. It is found out only where a rule asks.
        inference: Whether the call runs in inference mode.
        store: How a computed result is stored.
        signals: The measured numbers of the sites that were decided by signals, by site number.
        layout: The grids of the tokens, where a predictor reads them.
        spread: Whether several processes hold parts of one sample.
        audit: Compares the answers with computed outputs, or None where the trajectory is not audited.
        externals: Numbers of the externals that a `while` reads, by name.
    """

    __slots__ = (
        "_arguments", "_suppliers", "_weights", "audit", "branch", "execution", "externals", "guided", "inference",
        "layout", "liveness", "root", "rows", "signals", "spread", "store", "tick",
    )  # fmt: skip

    def __init__(
        self,
        root: RootModel,
        execution: ExecutionPlan,
        branch: Branch,
        tick: Tick,
        liveness: Liveness,
        suppliers: Mapping[str, Any],
        audit: Audit | None,
        earlier: StepContext | None = None,
    ) -> None:
        self.root = root
        self.execution = execution
        self.branch = branch
        self.tick = branch.ticks[tick.step] = tick
        self.audit = audit
        self.liveness = liveness
        self.guided = False
        self.rows: BatchView = WHOLE
        self.inference = torch.is_inference_mode_enabled()
        # Inference tensors have no `_version` counter, so in-place writes cannot be detected. Clones are stored.
        self.store: Op = STORE_CLONE if self.inference else STORE
        self.signals: Mapping[int, Mapping[str, float]] = {}
        self.layout = NO_LAYOUT
        self.spread = False
        self._suppliers = suppliers
        self.externals: Mapping[str, float] = _NOTHING_READ
        if execution.program.externals:
            # A call that is prepared anew is decided from what was read before.
            self.externals = earlier.externals if earlier is not None else self._read_externals()
        self._arguments: dict[tuple[int, frozenset[str]], dict[str, Any]] = {}
        self._weights: dict[tuple[int, ...], Weights] = {}

    def wanted(self, site: int) -> Reads:
        """Return what later steps may read of a result that the site computes now."""
        if site in self.root.repeated:
            return NOTHING
        return self.liveness.wanted(self.execution.program.alike.group_of[site], self.tick, self.tick.step)

    def excess(self, site: int, action: ir.Action | None) -> str | None:
        """Return the reason if the weights of a predictor are too large for the dtype of its history, or None."""
        slot = self.branch.slots[site]
        if is_mean(action):
            batch = self.guided or self.rows.half is not None
            return None if batch and slot.rows.half is None else "it has no two halves to take the mean of"
        if not isinstance(action, ir.Predict):
            return None
        if slot.chain is not None:
            newest: Any = [entry.tensors for entry in slot.chain.history[0][:1]]
            history = [(entry.step, entry.rows) for entry in slot.chain.history[0]]
        else:
            newest = slot.output
            history = [(slot.step, slot.rows), *[(kept.step, kept.rows) for kept in slot.older]]
        steps = [step for step, rows in history[: reach(action)] if rows.serves(self.rows)]
        try:
            self.arguments(action, site)
        except Undefined:
            return UNDEFINED_ARGUMENT
        if action.predictor == "band" and self.spread:
            return Fact.SPREAD
        if len(steps) < fewest_results(action):
            return Fact.NO_HISTORY
        if len(steps) < 2 and action.predictor in PREDICTORS and action.predictor != "weights":
            return None  # the answer is the newest value itself
        numbers = self.bands(action, site, steps) if action.predictor == "band" else [self.weights(action, site, steps)]
        return Fact.TOO_LARGE if any(is_too_large(each, newest) for each in numbers) else None

    def banded(
        self, action: ir.Predict, site: int, column: Sequence[torch.Tensor], steps: Sequence[int]
    ) -> torch.Tensor:
        """Return the prediction of `band` for one tensor from its values at earlier steps, newest first."""
        given = self.arguments(action, site)
        low, high = (combine(column, numbers) for numbers in self.bands(action, site, steps))
        return high + low_band(low - high, given["transform"], given["cut"], self.layout)

    def bands(self, action: ir.Predict, site: int, steps: Sequence[int]) -> list[Weights]:
        """Return the coefficients of the low and of the high band at this step."""
        (here, *places), given = self._places(action, steps), self.arguments(action, site)
        inner: list[Inner] = [given["low"], given["high"]]
        return [each.weights(places, here) for each in inner]

    def weights(self, action: ir.Predict, site: int, steps: Sequence[int]) -> Weights:
        """Return the coefficients of the prediction at this step from results of other steps.

        Args:
            action: The action.
            site: The number of the site that is answered.
            steps: The steps of the results, newest first.
        """
        key = site, id(action), *steps
        numbers = self._weights.get(key)
        if numbers is None:
            here, *places = self._places(action, steps)
            numbers = self._weights[key] = weights(action.predictor, places, here, self.arguments(action, site))
        return numbers

    def _places(self, action: ir.Predict, steps: Sequence[int]) -> list[float]:
        """Return the places of this step and of other steps on the axis of a predictor."""
        word, ticks = axis(action), self.branch.ticks
        places: list[float] = [self.tick.step, *steps]
        if word != "step":
            places = [getattr(ticks[step], word) for step in (self.tick.step, *steps)]
        if is_scaled(action):
            whole = {"step": self.tick.steps or 1, "t": 1000, "sigma": 1}[word]
            places = [2 * place / whole - 1 for place in places]
        return places

    def arguments(
        self, action: ir.Predict | ir.ApproximateUncond, site: int, *, without: frozenset[str] = frozenset()
    ) -> dict[str, Any]:
        """Evaluate the arguments of the action at this step, with externals that are called once for the site.

        Args:
            action: The action.
            site: The number of the site that is answered.
            without: Labels of arguments that are left out.

        Raises:
            Undefined: An argument has no value at this step.
        """
        known = self._arguments.get((site, without))
        if known is not None:
            return known
        wanted = [argument for argument in action.arguments if argument.label not in without]
        memory = self.branch.memories[self.branch.partition.group_of[site]]
        names = clock_words(self.tick if self.rows is WHOLE else replace(self.tick, uncond_skipped=True), memory)
        if self._suppliers:
            read = set[str]().union(*(names_in(argument.value) for argument in wanted))
            names |= {
                name: self.externals[name] if name in self.externals else self._asked(name, site)
                for name in self._suppliers
                if name in read
            }
        environment = Environment(names, self.execution.program.tables)
        measured = alignment(action)
        if measured is not None:
            wanted = [argument for argument in wanted if argument.label == "feedback"]
        values = {argument.label: evaluated(argument.value, environment) for argument in wanted}
        if measured is not None:
            values["weight"] = self._scale(site, measured, memory) - 1
        self._arguments[site, without] = values
        return values

    def _scale(self, site: int, measured: ir.Signal, memory: Memory) -> float:
        """Return the measured scale of `align`. With one result the answer is this result, whatever the scale."""
        scale = self.signals.get(site, {}).get(measured.name, math.nan) if memory.computes > 1 else 1.0
        if not math.isfinite(scale):
            raise Undefined("the scale of `align` is not known")
        return scale

    def _read_externals(self) -> dict[str, float]:
        """Call the externals that a `while` reads."""
        return {name: float(self._asked(name)) for name in self.execution.program.externals}

    def _asked(self, external: str, site: int | None = None) -> Any:
        """Call an external. A callback in diffusers' style receives the module of the site, or the root model."""
        supply = self._suppliers[external]
        if not getattr(supply, "takes_module", False):
            value = supply()
        else:
            value = supply(self.root.module.get_submodule("" if site is None else self.execution.names[site][0]))
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            return value.reshape(())
        if isinstance(value, Real) and value is not True and value is not False:
            return value
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"`{value!r}`"
        raise PolicyError.of("E307", f"the function for `{external}` returned {shown}", help="it must return a number")


_NOTHING_READ: Mapping[str, float] = {}
