"""What signals are worth: tensors seen at probes, remembered over steps and computes, brought down to numbers.

The norms use the same torch operations in the same dtype as diffusers' caches, so that equal streams give equal numbers
to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cachepolicy.engine.distributed.consensus import Agreement
from cachepolicy.engine.distributed.norms import Share, Sum, in_pieces, norm_alone, share, summed
from cachepolicy.engine.history_packing import whole
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Environment, Undefined, children, evaluate, substitute, walk
from cachepolicy.language.vocabulary import MEMORIES, NORMS
from cachepolicy.planning.plan import Plan


class Stream:
    """A tensor that was seen, with its write counter then, and its mean magnitude once somebody asked."""

    __slots__ = ("_magnitude", "_sum", "_tensor", "_version")

    def __init__(self, tensor: torch.Tensor) -> None:
        # An inference tensor has no write counter: a copy cannot be written into.
        copies = tensor.is_inference() or not whole([tensor])
        self._tensor = tensor.detach().clone() if copies else tensor.detach()
        self._version = None if copies else tensor._version
        self._magnitude: torch.Tensor | None = None
        self._sum: Sum | None = None

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor as it was seen.

        Raises:
            Undefined: somebody wrote into it since.
        """
        if self._version is not None and self._tensor._version != self._version:
            raise Undefined("a probed tensor was overwritten in place")
        return self._tensor

    @property
    def held(self) -> torch.Tensor:
        """The tensor that is kept, whether or not somebody wrote into it."""
        return self._tensor

    @property
    def magnitude(self) -> torch.Tensor:
        """mean|x|, computed once."""
        if self._magnitude is None:
            self._magnitude = self.tensor.abs().mean()
        return self._magnitude

    def sum(self, *, by_sample: bool) -> Sum:
        """The sum of |x|, computed once."""
        if self._sum is None:
            self._sum = summed(self.tensor.abs(), by_sample=by_sample)
        return self._sum


Value = Stream | float


@dataclass(frozen=True, slots=True)
class Signals:
    """The number signals that rules read, written out down to probes, and what has to be remembered for them."""

    numbers: Mapping[str, ir.Expression]
    kept: Mapping[ir.Expression, int]
    """What `kept` reads, and how many computes back."""
    previous: tuple[ir.Expression, ...]
    """What `prev` reads."""
    probes: frozenset[ir.Probe]
    decisive: tuple[ir.Call, ...] = ()
    """The norms that the numbers are made of."""
    lasting: tuple[ir.Call, ...] = ()
    """The norms that remembered numbers are made of."""
    _parts: dict[ir.Expression, list[ir.Call]] = field(
        default_factory=dict[ir.Expression, list[ir.Call]], repr=False, compare=False
    )

    def parts(self, expression: ir.Expression) -> list[ir.Call]:
        """The norms and memories that an expression over numbers is made of."""
        if expression not in self._parts:
            self._parts[expression] = _outermost(expression)
        return self._parts[expression]


def signals_of(plan: Plan) -> Signals:
    """What of a plan's signals has to be measured."""
    closed = dict[str, ir.Expression]()
    for signal in plan.resolved.signals:
        closed[signal.name] = substitute(signal.value, closed)
    conditions = [rule.rule.condition for rule in plan.rules if rule.rule.condition is not None]
    read = {node.name for each in conditions for node in walk(each) if isinstance(node, ir.Name)}
    numbers = {name: value for name, value in closed.items() if name in read}
    nodes = [node for value in numbers.values() for node in walk(value)]
    kept, previous = dict[ir.Expression, int](), dict[ir.Expression, None]()
    for node in nodes:
        if isinstance(node, ir.Call) and node.function in MEMORIES:
            what, *back = node.arguments
            if node.function == "prev":
                previous[what] = None
            else:
                kept[what] = max(int(evaluate(back[0])) if back else 1, kept.get(what, 0))
    probes = frozenset(node for node in nodes if isinstance(node, ir.Probe))
    return Signals(numbers, kept, tuple(previous), probes, _norms(numbers.values()), _norms([*kept, *previous]))


@dataclass(slots=True)
class Remembered:
    """What one branch remembers: streams at the step before, and at the computes of each site, newest first."""

    step: int = -1
    previous: dict[tuple[ir.Expression, int], Value] = field(default_factory=dict[tuple[ir.Expression, int], Value])
    kept: dict[tuple[ir.Expression, int], tuple[Value, ...]] = field(
        default_factory=dict[tuple[ir.Expression, int], tuple[Value, ...]]
    )


class Measuring:
    """The signals of one call: probes as they come in, numbers on demand."""

    __slots__ = ("_agreed", "_environment", "_seen", "_signals", "_step", "_worst", "agreement", "past")

    def __init__(
        self,
        signals: Signals,
        past: Remembered,
        environment: Environment,
        step: int,
        *,
        worst: bool = False,
        agreement: Agreement | None = None,
    ) -> None:
        self._worst = worst
        self.agreement = agreement
        self._agreed: dict[tuple[ir.Call, int], float] = {}
        self._signals = signals
        self._environment = environment
        self._step = step
        self._seen: dict[ir.Probe, Stream] = {}
        self.past = past

    def see(self, probe: ir.Probe, tensor: torch.Tensor) -> None:
        """A probe's tensor of this step; the first one counts where a module is called more than once."""
        self._seen.setdefault(probe, Stream(tensor))

    def has(self, probe: ir.Probe) -> bool:
        """True once the probe was seen in this step."""
        return probe in self._seen

    def numbers(self, site: int) -> dict[str, float]:
        """The signals by name as the rules of `site` read them now; what is undefined is NaN."""
        found = dict[str, float]()
        for name, expression in self._signals.numbers.items():
            try:
                value = self._value(expression, site)
                found[name] = float("nan") if isinstance(value, Stream) else value
            except Undefined:
                found[name] = float("nan")
        return found

    def agree(self, what: str, past: str, sites: Sequence[int], *, refuses: bool = False) -> bool:
        """Work out the norms that the numbers of `sites` are made of, together with the other processes.

        `what` is decided, and `past` is all else that it depends on, in words that are the same on all of them;
        `refuses` says that it could not reuse here. Gives whether it could not somewhere.
        """
        return self._settle(what, self._signals.decisive, sites, past, refuses=refuses)

    def _settle(
        self, what: str, norms: Sequence[ir.Call], sites: Sequence[int], past: str = "", *, refuses: bool = False
    ) -> bool:
        assert self.agreement is not None
        keys = dict.fromkeys(self._key(call, site) for site in sites for call in norms)
        # What is defined stays so for the rest of the call, on all processes alike.
        missing = [key for key in keys if math.isnan(self._agreed.get(key, math.nan))]
        wanted = [(call.function, self._share(call, max(site, 0))) for call, site in missing]
        branch = self._environment.names.get("branch")
        where = f"{what} at step {self._step}" + (f" of `{branch}`" if branch else "")
        settled = self.agreement.settle(where, wanted, past=past, refuses=refuses)
        self._agreed.update(zip(missing, settled.norms, strict=True))
        return settled.refused > 0

    def _key(self, call: ir.Call, site: int) -> tuple[ir.Call, int]:
        """A norm and the site that it is of; -1 where it is the same for all."""
        return call, site if any(isinstance(node, ir.Call) and node.function == "kept" for node in walk(call)) else -1

    def _share(self, call: ir.Call, site: int) -> Share | None:
        """This process' share of a norm, None where it is undefined here."""
        try:
            x, *others = self._streams(call, site)
            y = others[0].tensor if others else None
            magnitude = others[0].sum(by_sample=self._worst) if call.function == "relative_l1" else None
            return share(call.function, x.tensor, y, by_sample=self._worst, magnitude=magnitude)
        except Undefined:
            return None

    def finish(self, sites: list[int], computed: list[int]) -> None:
        """Remember this step: for `prev` at the next one, for `kept` where a site has computed."""
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
        self.past.previous, self.past.step = previous, self._step

    def _values(self, expressions: Iterable[ir.Expression], sites: list[int]) -> dict[tuple[ir.Expression, int], Value]:
        """What the expressions are worth now at each site; those that are undefined are left out."""
        found = dict[tuple[ir.Expression, int], Value]()
        for expression in expressions:
            for site in sites:
                try:
                    found[expression, site] = self._value(expression, site)
                except Undefined:
                    continue
        return found

    def _value(self, expression: ir.Expression, site: int) -> Value:
        match expression:
            case ir.Probe():
                if expression not in self._seen:
                    raise Undefined(f"`{expression.stream}(...)` was not seen in this step")
                return self._seen[expression]
            case ir.Call(function="prev"):
                return self._remembered(self.past.previous.get((expression.arguments[0], site)), "prev")
            case ir.Call(function="kept"):
                depth = 1 if len(expression.arguments) == 1 else int(evaluate(expression.arguments[1]))
                kept = self.past.kept.get((expression.arguments[0], site), ())
                return self._remembered(kept[depth - 1] if 0 < depth <= len(kept) else None, "kept")
            case _:
                return self._number(expression, site)

    def _remembered(self, value: Value | None, what: str) -> Value:
        if value is None or (what == "prev" and self.past.step != self._step - 1):
            raise Undefined(f"`{what}(...)` has no value yet")
        return value

    def _number(self, expression: ir.Expression, site: int) -> float:
        """An expression over numbers, with the norms and memories in it put in as values."""
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
        """The tensors that a norm reads."""
        streams = [self._value(argument, site) for argument in call.arguments]
        tensors = [stream for stream in streams if isinstance(stream, Stream)]
        if len(tensors) != len(streams):
            raise Undefined(f"`{call.function}(...)` reads tensors")
        if len(tensors) == 2 and tensors[0].tensor.shape != tensors[1].tensor.shape:
            raise Undefined(f"`{call.function}(...)` compares tensors of different shapes")
        return tensors


def _norms(expressions: Iterable[ir.Expression]) -> tuple[ir.Call, ...]:
    """The norms that numbers are made of, without those that are remembered."""
    calls = [call for each in expressions for call in _outermost(each)]
    return tuple(dict.fromkeys(call for call in calls if call.function in NORMS))


def _outermost(node: ir.Node) -> list[ir.Call]:
    """The norms and memories below a node that stand in no other of them."""
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
    """The largest of the samples' norms (the smallest cosine), so that none is judged by its neighbours."""
    samples = [[Stream(sample) for sample in stream.tensor] for stream in streams]
    norms = torch.stack([_norm(function, list(sample)) for sample in zip(*samples, strict=True)])
    return norms.min() if function == "cosine" else norms.max()


def probed(probe: ir.Probe, names: Mapping[str, Any], first: torch.Tensor | None) -> torch.Tensor | None:
    """What an `input` or `argument` probe sees of a call's arguments; None where there is no tensor."""
    if probe.stream == "argument":
        value = names.get(probe.argument or "")
        return value if isinstance(value, torch.Tensor) else None
    return first
