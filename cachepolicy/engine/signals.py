"""Signals: probed tensors, remembered over steps and computes, and reduced to numbers.

The norms use the same torch operations in the same dtype as the caches of diffusers, so that equal streams give
bit-identical numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cachepolicy.engine.distributed.consensus import Agreement
from cachepolicy.engine.distributed.norms import Share, Sum, in_pieces, norm_alone, share, summed
from cachepolicy.engine.history_packing import is_whole
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Environment, Undefined, evaluate
from cachepolicy.language.traversal import children, substitute, walk
from cachepolicy.language.vocabulary import MEMORIES, NORMS
from cachepolicy.planning.plan import Plan


class Stream:
    """A probed tensor with its `_version`. The mean magnitude is computed on demand."""

    __slots__ = ("_magnitude", "_sum", "_tensor", "_version")

    def __init__(self, tensor: torch.Tensor) -> None:
        # Inference tensors have no `_version`, so in-place writes cannot be detected. Small views are copied as well,
        # because they would keep a large storage alive.
        copies = tensor.is_inference() or not is_whole([tensor])
        self._tensor = tensor.detach().clone() if copies else tensor.detach()
        self._version = None if copies else tensor._version
        self._magnitude: torch.Tensor | None = None
        self._sum: Sum | None = None

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor as it was probed.

        Raises:
            Undefined: The tensor was modified in place.
        """
        if self._version is not None and self._tensor._version != self._version:
            raise Undefined("a probed tensor was overwritten in place")
        return self._tensor

    @property
    def held(self) -> torch.Tensor:
        """The stored tensor, even if it was modified in place."""
        return self._tensor

    @property
    def magnitude(self) -> torch.Tensor:
        """mean(|x|), computed once."""
        if self._magnitude is None:
            self._magnitude = self.tensor.abs().mean()
        return self._magnitude

    def sum(self, *, by_sample: bool) -> Sum:
        """Return the sum of |x|, computed once."""
        if self._sum is None:
            self._sum = summed(self.tensor.abs(), by_sample=by_sample)
        return self._sum


SignalValue = Stream | float


@dataclass(frozen=True, slots=True)
class Signals:
    """The number signals that rules read, expanded to probes, and what they need to remember."""

    numbers: Mapping[str, ir.Expression]
    kept: Mapping[ir.Expression, int]
    """The arguments of `kept`, and how many computes back they reach."""
    previous: tuple[ir.Expression, ...]
    """The arguments of `prev`."""
    probes: frozenset[ir.Probe]
    decisive: tuple[ir.Call, ...] = ()
    """The norms in the signals."""
    lasting: tuple[ir.Call, ...] = ()
    """The norms in remembered numbers."""
    _parts: dict[ir.Expression, list[ir.Call]] = field(
        default_factory=dict[ir.Expression, list[ir.Call]], repr=False, compare=False
    )

    def parts(self, expression: ir.Expression) -> list[ir.Call]:
        """Return the norms and memories in an expression over numbers."""
        if expression not in self._parts:
            self._parts[expression] = _outermost(expression)
        return self._parts[expression]


def signals_of(plan: Plan) -> Signals:
    """Return the signals of a plan that have to be measured."""
    closed = dict[str, ir.Expression]()
    for signal in plan.resolved.signals:
        closed[signal.name] = substitute(signal.value, closed)
    conditions = [rule.rule.condition for rule in plan.rules if rule.rule.condition is not None]
    read = {node.name for condition in conditions for node in walk(condition) if isinstance(node, ir.Name)}
    numbers = {name: value for name, value in closed.items() if name in read}
    nodes = [node for value in numbers.values() for node in walk(value)]
    kept, previous = dict[ir.Expression, int](), dict[ir.Expression, None]()
    for node in nodes:
        if isinstance(node, ir.Call) and node.function in MEMORIES:
            remembered, *back = node.arguments
            if node.function == "prev":
                previous[remembered] = None
            else:
                kept[remembered] = max(int(evaluate(back[0])) if back else 1, kept.get(remembered, 0))
    probes = frozenset(node for node in nodes if isinstance(node, ir.Probe))
    return Signals(numbers, kept, tuple(previous), probes, _norms(numbers.values()), _norms([*kept, *previous]))


@dataclass(slots=True)
class Remembered:
    """Memory of one branch: values of the previous step, and of the computes of each site, newest first."""

    step: int = -1
    previous: dict[tuple[ir.Expression, int], SignalValue] = field(
        default_factory=dict[tuple[ir.Expression, int], SignalValue]
    )
    kept: dict[tuple[ir.Expression, int], tuple[SignalValue, ...]] = field(
        default_factory=dict[tuple[ir.Expression, int], tuple[SignalValue, ...]]
    )


class Measuring:
    """The signals of one forward pass: probes as they arrive, numbers on demand."""

    __slots__ = ("_agreed", "_environment", "_seen", "_signals", "_step", "_undefined", "_worst", "agreement", "past")

    def __init__(
        self,
        signals: Signals,
        past: Remembered,
        environment: Environment,
        step: int,
        *,
        worst: bool = False,
        agreement: Agreement | None = None,
        undefined: AbstractSet[ir.Probe] = frozenset(),
    ) -> None:
        self._worst = worst
        self._undefined = undefined
        self.agreement = agreement
        self._agreed: dict[tuple[ir.Call, int], float] = {}
        self._signals = signals
        self._environment = environment
        self._step = step
        self._seen: dict[ir.Probe, Stream] = {}
        self.past = past

    def see(self, probe: ir.Probe, tensor: torch.Tensor) -> None:
        """Record the tensor of a probe."""
        self._seen[probe] = Stream(tensor)

    def has(self, probe: ir.Probe) -> bool:
        """Return True once the probe was recorded in this step."""
        return probe in self._seen

    def numbers(self, site: int) -> dict[str, float]:
        """Return the signals by name for the rules of `site`. Undefined signals are NaN."""
        values = dict[str, float]()
        for name, expression in self._signals.numbers.items():
            try:
                value = self._value(expression, site)
                values[name] = float("nan") if isinstance(value, Stream) else value
            except Undefined:
                values[name] = float("nan")
        return values

    def agree(self, subject: str, past: str, sites: Sequence[int], *, refuses: bool = False) -> bool:
        """Compute the norms for `sites` together with the other processes.

        Args:
            subject: The subject of the decision, equal on all processes.
            past: All other inputs of the decision, equal on all processes.
            sites: The site numbers.
            refuses: Whether this process cannot reuse.

        Returns:
            Whether any process cannot reuse.
        """
        return self._settle(subject, self._signals.decisive, sites, past, refuses=refuses)

    def _settle(
        self, subject: str, norms: Sequence[ir.Call], sites: Sequence[int], past: str = "", *, refuses: bool = False
    ) -> bool:
        assert self.agreement is not None
        keys = dict.fromkeys(self._key(call, site) for site in sites for call in norms)
        # A defined norm stays defined for the rest of the call, on all processes.
        missing = [key for key in keys if math.isnan(self._agreed.get(key, math.nan))]
        wanted = [(call.function, self._share(call, max(site, 0))) for call, site in missing]
        branch = self._environment.names.get("branch")
        where = f"{subject} at step {self._step}" + (f" of `{branch}`" if branch else "")
        settled = self.agreement.settle(where, wanted, past=past, refuses=refuses)
        self._agreed.update(zip(missing, settled.norms, strict=True))
        return settled.refused > 0

    def _key(self, call: ir.Call, site: int) -> tuple[ir.Call, int]:
        """Return the key of a norm: with its site, or -1 if the norm is equal for all sites."""
        return call, site if any(isinstance(node, ir.Call) and node.function == "kept" for node in walk(call)) else -1

    def _share(self, call: ir.Call, site: int) -> Share | None:
        """Return this process' share of a norm, or None if it is undefined here."""
        try:
            x, *others = self._streams(call, site)
            y = others[0].tensor if others else None
            magnitude = others[0].sum(by_sample=self._worst) if call.function == "relative_l1" else None
            return share(call.function, x.tensor, y, by_sample=self._worst, magnitude=magnitude)
        except Undefined:
            return None

    def finish(self, sites: list[int], computed: list[int]) -> bool:
        """Store this step for `prev` of the next step, and for `kept` of the sites that computed.

        Returns:
            Whether the stored values may have changed.
        """
        if self.agreement is not None and self._signals.lasting:
            self._settle("what is remembered", self._signals.lasting, sites)
        previous = self._values(self._signals.previous, sites)
        now = self._values(self._signals.kept, computed)
        for expression, depth in self._signals.kept.items():
            for site in computed:
                key = (expression, site)
                if key in now:
                    self.past.kept[key] = (now[key], *self.past.kept.get(key, ()))[:depth]
                else:
                    self.past.kept.pop(key, None)
        changed = bool(previous or self.past.previous or (computed and self._signals.kept))
        self.past.previous, self.past.step = previous, self._step
        return changed

    def _values(
        self, expressions: Iterable[ir.Expression], sites: list[int]
    ) -> dict[tuple[ir.Expression, int], SignalValue]:
        """Return the defined values of the expressions at each site."""
        values = dict[tuple[ir.Expression, int], SignalValue]()
        for expression in expressions:
            for site in sites:
                try:
                    values[expression, site] = self._value(expression, site)
                except Undefined:
                    continue
        return values

    def _value(self, expression: ir.Expression, site: int) -> SignalValue:
        match expression:
            case ir.Probe():
                if expression not in self._seen:
                    raise Undefined(f"`{expression.stream}(...)` was not seen in this step")
                self._require_one(expression)
                return self._seen[expression]
            case ir.Call(function="prev"):
                self._require_one(expression)
                return self._remembered(self.past.previous.get((expression.arguments[0], site)), "prev")
            case ir.Call(function="kept"):
                self._require_one(expression)
                depth = 1 if len(expression.arguments) == 1 else int(evaluate(expression.arguments[1]))
                kept = self.past.kept.get((expression.arguments[0], site), ())
                return self._remembered(kept[depth - 1] if 0 < depth <= len(kept) else None, "kept")
            case _:
                return self._number(expression, site)

    def _require_one(self, expression: ir.Expression) -> None:
        """Raise if the expression reads a module that one forward pass calls more than once."""
        if self._undefined and not self._undefined.isdisjoint(walk(expression)):  # pyright: ignore[reportArgumentType]
            raise Undefined("a probed module is called more than once in a forward")

    def _remembered(self, value: SignalValue | None, memory: str) -> SignalValue:
        if value is None or (memory == "prev" and self.past.step != self._step - 1):
            raise Undefined(f"`{memory}(...)` has no value yet")
        return value

    def _number(self, expression: ir.Expression, site: int) -> float:
        """Evaluate an expression over numbers, with its norms and memories as values."""
        if isinstance(expression, ir.Call) and expression.function in NORMS:
            return self._norm(expression, site)
        stateful = dict[ir.Call, float]()
        for node in self._signals.parts(expression):
            value = self._norm(node, site) if node.function in NORMS else self._value(node, site)
            if isinstance(value, Stream):
                raise Undefined("a tensor stands where a number is read")
            stateful[node] = value
        return evaluate(expression, replace(self._environment, stateful=stateful))

    def _norm(self, call: ir.Call, site: int) -> float:
        if self.agreement is not None:
            value = self._agreed.get(self._key(call, site), math.nan)
        else:
            tensors = self._streams(call, site)
            if in_pieces(tensors[0].tensor):
                x, y = tensors[0].tensor, tensors[1].tensor if len(tensors) > 1 else None
                value = norm_alone(call.function, x, y, by_sample=self._worst)
            else:
                norm = _worst(call.function, tensors) if self._worst else _norm(call.function, tensors)
                value = float(norm.item())
        if not math.isfinite(value):
            raise Undefined(f"`{call.function}(...)` is {value}")
        return value

    def _streams(self, call: ir.Call, site: int) -> list[Stream]:
        """Return the tensors that a norm reads."""
        streams = [self._value(argument, site) for argument in call.arguments]
        tensors = [stream for stream in streams if isinstance(stream, Stream)]
        if len(tensors) != len(streams):
            raise Undefined(f"`{call.function}(...)` reads tensors")
        if len(tensors) == 2 and tensors[0].tensor.shape != tensors[1].tensor.shape:
            raise Undefined(f"`{call.function}(...)` compares tensors of different shapes")
        return tensors


def _norms(expressions: Iterable[ir.Expression]) -> tuple[ir.Call, ...]:
    """Return the norms in the expressions, without those inside memories."""
    calls = [call for expression in expressions for call in _outermost(expression)]
    return tuple(dict.fromkeys(call for call in calls if call.function in NORMS))


def _outermost(node: ir.Node) -> list[ir.Call]:
    """Return the outermost norms and memories below a node."""
    if isinstance(node, ir.Call) and (node.function in NORMS or node.function in MEMORIES):
        return [node]
    return [call for child in children(node) for call in _outermost(child)]


def _norm(function: str, streams: list[Stream]) -> torch.Tensor:
    x = streams[0].tensor
    if len(streams) == 1:
        return streams[0].magnitude if function == "l1" else x.square().mean().sqrt()
    y = streams[1].tensor
    match function:
        case "l1":
            return (x - y).abs().mean()
        case "l2":
            return (x - y).square().mean().sqrt()
        case "relative_l1":
            return (x - y).abs().mean() / streams[1].magnitude
        case "cosine":
            return torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0)
        case _:
            raise Undefined(f"`{function}(...)` is not a norm")


def _worst(function: str, streams: list[Stream]) -> torch.Tensor:
    """Return the largest norm over the samples (the smallest cosine)."""
    samples = [[Stream(sample) for sample in stream.tensor] for stream in streams]
    norms = torch.stack([_norm(function, list(sample)) for sample in zip(*samples, strict=True)])
    return norms.min() if function == "cosine" else norms.max()


def probed(probe: ir.Probe, names: Mapping[str, Any], first: torch.Tensor | None) -> torch.Tensor | None:
    """Return the tensor that an `input` or `argument` probe reads.

    Args:
        probe: The probe.
        names: The arguments of the module call by name.
        first: The main tensor of the call, or None.

    Returns:
        The tensor, or None if the call does not have it.
    """
    if probe.stream == "argument":
        value = names.get(probe.argument or "")
        return value if isinstance(value, torch.Tensor) else None
    return first
