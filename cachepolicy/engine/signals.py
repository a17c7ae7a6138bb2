"""Signals: probed tensors, remembered over steps and computes, and reduced to numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

import torch

from cachepolicy.engine.distributed.consensus import Agreement
from cachepolicy.engine.distributed.norms import Share, in_pieces, norm_alone, share
from cachepolicy.engine.lowered_signals import Measure, is_stateful, lowered
from cachepolicy.engine.streams import NO_LAYOUT, SignalValue, Stream, half_of, norm_of, of_tokens, wiener, worst_norm
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Environment, Undefined, evaluate, finite
from cachepolicy.language.traversal import children, close_signals, is_stream, replace_outermost, walk
from cachepolicy.language.vocabulary import MEMORIES, NORMS
from cachepolicy.planning.plan import Plan, measured_clauses
from cachepolicy.planning.schedule import Inputs, Memory, Tick, clock_words


@dataclass(frozen=True, slots=True)
class Signals:
    """The number signals that rules read, expanded to probes, and what they need to remember."""

    numbers: Mapping[str, ir.Expression]
    kept: Mapping[ir.Expression, int]
    """The arguments of `kept`, and how many computes back they reach."""
    previous: tuple[ir.Expression, ...]
    """The arguments of `prev`."""
    probes: frozenset[ir.Probe]
    lasting: tuple[ir.Expression, ...] = ()
    """What is remembered: the arguments of `prev`, `kept` and `cross`."""
    reads_layout: bool = False
    """Whether the grids of tokens are read."""
    crossed: tuple[ir.Expression, ...] = ()
    """What other branches read of a step, in `cross`."""
    names: Mapping[int, str] = field(default_factory=dict[int, str])
    """The name of the module of each site that is one, and of each module that `over` takes."""
    members: Mapping[ir.Selector, tuple[int, ...]] = field(default_factory=dict[ir.Selector, tuple[int, ...]])
    """The numbers of the modules that each `over` takes: site numbers, negative for modules that are no sites."""
    others: tuple[int, ...] = ()
    """The negative numbers in `members`."""
    own: Mapping[tuple[ir.Probe, str], ir.Probe] = field(default_factory=dict[tuple[ir.Probe, str], ir.Probe])
    """The probe of each site for a probe of `self`."""
    tables: Mapping[str, Sequence[int | float]] = field(default_factory=dict[str, "Sequence[int | float]"])
    """The tables of the plan by name."""
    slots: Mapping[ir.Expression, int] = field(init=False, repr=False, compare=False)
    """The numbers of the expressions in `lasting`, by which their values are remembered."""
    _measures: dict[ir.Expression, Measure] = field(
        default_factory=dict[ir.Expression, "Measure"], repr=False, compare=False
    )
    _parts: dict[ir.Expression, list[ir.Call | ir.Over]] = field(
        default_factory=dict[ir.Expression, list[ir.Call | ir.Over]], repr=False, compare=False
    )
    _by_site: dict[ir.Expression, bool] = field(default_factory=dict[ir.Expression, bool], repr=False, compare=False)
    _pushed: dict[ir.Call, ir.Expression] = field(
        default_factory=dict[ir.Call, ir.Expression], repr=False, compare=False
    )

    def __post_init__(self) -> None:
        distinct = dict.fromkeys(self.lasting)
        object.__setattr__(self, "slots", {expression: slot for slot, expression in enumerate(distinct)})

    def measure(self, expression: ir.Expression) -> Measure:
        """Return the closure that gives the value of an expression. `Measuring.value` interprets it."""
        if expression not in self._measures:
            self._measures[expression] = lowered(self, expression)
        return self._measures[expression]

    def key(self, expression: ir.Expression, site: int) -> tuple[int, int]:
        """Return the key of a remembered value: its slot, and its site, or -1 if it is equal for all sites."""
        return self.slots[expression], site if self.by_site(expression) else -1

    def parts(self, expression: ir.Expression) -> list[ir.Call | ir.Over]:
        """Return the outermost parts of an expression over numbers that a run measures or remembers."""
        if expression not in self._parts:
            self._parts[expression] = _outermost(expression)
        return self._parts[expression]

    def by_site(self, expression: ir.Expression) -> bool:
        """Return whether the value of an expression may differ from site to site."""
        if expression not in self._by_site:
            self._by_site[expression] = any(
                isinstance(node, ir.Itself)
                or (isinstance(node, ir.Call) and node.function == "kept")
                or (isinstance(node, ir.Name) and node.name in _OF_SITE)
                for node in walk(expression)
            )
        return self._by_site[expression]

    def pushed(self, call: ir.Call) -> ir.Expression:
        """Return a `cross` of a number as that number of the `cross` of its tensors, which a batch has in one call."""
        if call not in self._pushed:
            self._pushed[call] = _of_tensors(call)
        return self._pushed[call]


_OF_SITE = frozenset({"age", "gap", "computes"})
"""The clock words that differ from site to site."""


def signals_of(plan: Plan) -> Signals:
    """Return the signals of a plan that have to be measured."""
    closed = close_signals(plan.resolved.signals)
    conditions = [clause for rule in plan.rules for clause in measured_clauses(rule.rule)]
    read = {node.name for condition in conditions for node in walk(condition) if isinstance(node, ir.Name)}
    numbers = {name: value for name, value in closed.items() if name in read}
    nodes = [node for value in numbers.values() for node in walk(value)]
    crossings = dict.fromkeys(node for node in nodes if isinstance(node, ir.Call) and node.function == "cross")
    # In a guidance batch the halves of the tensors are remembered.
    nodes += [node for call in crossings for node in walk(_of_tensors(call))]
    kept, previous = dict[ir.Expression, int](), dict[ir.Expression, None]()
    for node in nodes:
        if isinstance(node, ir.Call) and node.function in MEMORIES:
            remembered, *back = node.arguments
            if node.function == "prev":
                previous[remembered] = None
            else:
                kept[remembered] = max(int(evaluate(back[0])) if back else 1, kept.get(remembered, 0))
    probes = frozenset(node for node in nodes if isinstance(node, ir.Probe))
    crossed = tuple(dict.fromkeys(at_its_step(call.arguments[1])[0] for call in crossings))
    sites = {site.modules[0]: site.index for site in plan.sites if len(site.modules) == 1}
    others = dict.fromkeys(name for members in plan.members.values() for name in members if name not in sites)
    keys = sites | {name: -2 - number for number, name in enumerate(others)}
    return Signals(
        numbers,
        kept,
        tuple(previous),
        probes,
        lasting=(*kept, *previous, *crossed),
        reads_layout=any(
            (isinstance(node, ir.Probe) and node.tokens is not None and node.tokens.latent)
            or (isinstance(node, ir.Call) and node.function == "wiener")
            for node in nodes
        ),
        crossed=crossed,
        names={key: name for name, key in keys.items()},
        members={selector: tuple(keys[name] for name in members) for selector, members in plan.members.items()},
        others=tuple(keys[name] for name in others),
        own=plan.own,
        tables=plan.resolved.tables,
    )


def at_its_step(expression: ir.Expression) -> tuple[ir.Expression, int]:
    """Return what a `cross` reads, and how many steps back: 1 for `prev(x)`, else 0."""
    if isinstance(expression, ir.Call) and expression.function == "prev":
        return expression.arguments[0], 1
    return expression, 0


def _of_tensors(call: ir.Call) -> ir.Expression:
    """Return a `cross` with its branch at the outermost tensors of its argument, or below `prev` and `kept`."""
    branch, value = call.arguments

    def of_tensor(node: ir.Node) -> ir.Node | None:
        return call.model_copy(update={"arguments": (branch, node)}) if is_stream(node) else None

    return replace_outermost(value, of_tensor)


@dataclass(slots=True)
class Remembered:
    """Memory of one branch: values of the previous step, and of the computes of each site, newest first.

    The keys are those of `Signals.key`; values below `kept` have one for each site. `crossed` has what other branches
    read, with the step, of the last two steps.
    """

    step: int = -1
    previous: dict[tuple[int, int], SignalValue] = field(default_factory=dict[tuple[int, int], SignalValue])
    kept: dict[tuple[int, int], tuple[SignalValue, ...]] = field(
        default_factory=dict[tuple[int, int], "tuple[SignalValue, ...]"]
    )
    crossed: tuple[tuple[int, Mapping[tuple[int, int], SignalValue]], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.previous or self.kept or self.crossed)


_NO_NUMBERS: Mapping[str, float] = {}
_ANY_SITE = (-1,)


class Measuring:
    """The signals of one forward pass: probes as they arrive, numbers on demand."""

    __slots__ = (
        "_agreed", "_externals", "_known", "_made", "_memory_of", "_now", "_others", "_reduced", "_signals", "_step",
        "_tick", "_undefined", "_worst", "agreement", "cond", "layout", "past", "rows", "seen",
    )  # fmt: skip

    def __init__(
        self,
        signals: Signals,
        past: Remembered,
        tick: Tick,
        *,
        memory_of: Callable[[int], Memory],
        others: Callable[[str], Remembered | None],
        worst: bool = False,
        agreement: Agreement | None = None,
        undefined: AbstractSet[ir.Probe] = frozenset(),
        externals: Mapping[str, float] = _NO_NUMBERS,
    ) -> None:
        self._tick = tick
        self._externals = externals
        self._memory_of = memory_of
        self._others = others
        self._made: dict[tuple[ir.Expression, int], Stream] = {}
        self.layout = NO_LAYOUT
        self.rows: int | None = None
        """The number of rows of a guidance batch, None if the call is no such batch."""
        self.cond = 1
        """Whether the conditional half of a guidance batch comes first (0) or second (1)."""
        self._worst = worst
        self._undefined = undefined
        self.agreement = agreement
        self._agreed: dict[tuple[ir.Call, int], float] = {}
        self._signals = signals
        self._known: Environment | None = None
        self._step = tick.step
        self._now: Inputs | None = None
        self._reduced: dict[tuple[str, tuple[int, ...]], tuple[float, Sequence[Stream]]] = {}
        """Norms by function and tensors, with these, so that each is read from the device once."""
        self.seen: dict[ir.Probe, Stream | None] = {}
        """The tensors of the probes that were recorded; None where the probe has none."""
        self.past = past

    @property
    def _environment(self) -> Environment:
        """The clock, the externals and the tables. Most signals read none of them."""
        if self._known is None:
            names = {**clock_words(self._tick, Memory(self._step)), **self._externals}
            self._known = Environment(names, self._signals.tables)
        return self._known

    def at(self, site: int) -> Inputs:
        """Return the clock and the externals at a site, or at no site in particular (-1)."""
        if site >= 0:
            return Inputs(self._tick, self._memory_of(site), self._externals, self._signals.tables)
        if self._now is None:
            self._now = Inputs(self._tick, Memory(self._step), self._externals, self._signals.tables)
        return self._now

    def see(self, probe: ir.Probe, tensor: torch.Tensor, *, shared: bool = True) -> None:
        """Record the tensor of a probe. Arguments as for `Stream`."""
        try:
            if probe.tokens is not None:
                self._whole("a part of the tokens")
                tensor = of_tokens(probe.tokens, tensor, self.layout)
                shared = True  # a view of the tensor
            self.seen[probe] = Stream(tensor, shared=shared)
        except Undefined:
            self.seen[probe] = None

    def _whole(self, subject: str) -> None:
        """Raise where the tokens of a sample are spread over processes."""
        if self.agreement is not None:
            raise Undefined(f"{subject} is not known where processes share the tokens of a sample")

    def has(self, probe: ir.Probe) -> bool:
        """Return True once the probe was recorded in this step."""
        return probe in self.seen

    def numbers(self, site: int) -> dict[str, float]:
        """Return the signals by name for the rules of `site`. Undefined signals are NaN."""
        values = dict[str, float]()
        signals = self._signals
        for name, expression in signals.numbers.items():
            try:
                value = signals.measure(expression)(self, site)
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
        return self._settle(subject, [*self._signals.numbers.values()], sites, past, refuses=refuses)

    def _settle(
        self,
        subject: str,
        expressions: Sequence[ir.Expression],
        sites: Sequence[int],
        past: str = "",
        *,
        refuses: bool = False,
    ) -> bool:
        assert self.agreement is not None
        pairs = (pair for site in sites for expression in expressions for pair in self._norms(expression, site))
        keys = dict.fromkeys(self._key(call, site) for call, site in pairs)
        # A defined norm stays defined for the rest of the call, on all processes.
        missing = [key for key in keys if math.isnan(self._agreed.get(key, math.nan))]
        wanted = [(call.function, self._share(call, 0 if site == -1 else site)) for call, site in missing]
        branch = self._tick.branch
        where = f"{subject} at step {self._step}" + (f" of `{branch}`" if branch else "")
        settled = self.agreement.settle(where, wanted, past=past, refuses=refuses)
        self._agreed.update(zip(missing, settled.norms, strict=True))
        return settled.refused > 0

    def _key(self, call: ir.Call, site: int) -> tuple[ir.Call, int]:
        """Return the key of a norm: with its site, or -1 if the norm is equal for all sites."""
        return call, site if self._signals.by_site(call) else -1

    def _norms(self, expression: ir.Node, site: int) -> Iterator[tuple[ir.Call, int]]:
        """Yield the norms of this call that the value of an expression at a site depends on, with their sites."""
        match expression:
            case ir.Over():
                for member in self._signals.members[expression.selector]:
                    yield from self._norms(expression.value, member)
            case ir.Call(function=function) if function in NORMS:
                yield expression, site
            case ir.Call(function=function) if function in MEMORIES:
                pass
            case ir.Call(function="cross"):
                if self.rows is not None:
                    yield from self._norms(self._signals.pushed(expression), site)
                elif self._of_this_branch(expression):
                    yield from self._norms(expression.arguments[1], site)
            case _:
                for child in children(expression):
                    yield from self._norms(child, site)

    def _share(self, call: ir.Call, site: int) -> Share | None:
        """Return this process' share of a norm, or None if it is undefined here."""
        try:
            x, *others = _of_one_shape(call, [self.value(argument, site) for argument in call.arguments])
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
        signals, past = self._signals, self.past
        # Modules that `over` takes and that are no sites have their own previous values.
        sites = [*sites, *signals.others]
        previous = self._values(signals.previous, sites)
        if computed:
            for expression, depth in signals.kept.items():
                slot, measure = signals.slots[expression], signals.measure(expression)
                for site in computed:
                    key = slot, site
                    try:
                        past.kept[key] = (measure(self, site), *past.kept.get(key, ()))[:depth]
                    except Undefined:
                        past.kept.pop(key, None)
        changed = bool(previous or past.previous or (computed and signals.kept))
        if signals.crossed and self.rows is None:
            past.crossed = ((self._step, self._values(signals.crossed, sites)), *past.crossed[:1])
            changed = True
        self.past.previous, self.past.step = previous, self._step
        return changed

    def _values(self, expressions: Iterable[ir.Expression], sites: Sequence[int]) -> dict[tuple[int, int], SignalValue]:
        """Return the defined values of the expressions, at each site where they may differ from site to site."""
        values, signals = dict[tuple[int, int], SignalValue](), self._signals
        for expression in expressions:
            slot, measure = signals.slots[expression], signals.measure(expression)
            for site in sites if signals.by_site(expression) else _ANY_SITE:
                try:
                    values[slot, site] = measure(self, site)
                except Undefined:
                    continue
        return values

    def value(self, expression: ir.Expression, site: int) -> SignalValue:
        """Interpret an expression at a site.

        Raises:
            Undefined: It has no value in this forward pass.
        """
        match expression:
            case ir.Probe():
                probe = self._named(expression, site)
                stream = self.seen.get(probe) if probe is not None else None
                if stream is None:
                    raise Undefined(f"`{expression.stream}(...)` was not seen in this step")
                self.require_one(expression, site)
                return stream
            case ir.Call(function=function) if function in NORMS:
                return self._norm(expression, site)
            case ir.Call(function="kept"):
                self.require_one(expression, site)
                depth = 1 if len(expression.arguments) == 1 else int(evaluate(expression.arguments[1]))
                kept = self.past.kept.get((self._signals.slots[expression.arguments[0]], site), ())
                if not 0 < depth <= len(kept):
                    raise Undefined("`kept(...)` has no value yet")
                return kept[depth - 1]
            case ir.Call(function="cross"):
                return self._crossed(expression, site)
            case ir.Call(function="wiener") | ir.Arithmetic() if is_stream(expression):
                return self._calculated(expression, site)
            case ir.Call(function="prev"):
                self.require_one(expression, site)
                return self.last(*self._signals.key(expression.arguments[0], site))
            case _:
                return self._number(expression, site)

    def _named(self, probe: ir.Probe, site: int) -> ir.Probe | None:
        """Return the probe itself or, for a probe of `self`, the one of the site."""
        if not isinstance(probe.selector, ir.Itself):
            return probe
        return self._signals.own.get((probe, self._signals.names.get(site, "?")))

    def require_one(self, expression: ir.Expression, site: int) -> None:
        """Raise `Undefined` if the expression reads a module that one forward pass calls more than once."""
        if self._undefined and any(
            self._named(node, site) in self._undefined for node in walk(expression) if isinstance(node, ir.Probe)
        ):
            raise Undefined("a probed module is called more than once in a forward")

    def _calculated(self, expression: ir.Call | ir.Arithmetic, site: int) -> Stream:
        """Return a tensor that is calculated from others, once for all sites where it is equal for them."""
        key = expression, site if self._signals.by_site(expression) else -1
        if key not in self._made:
            made = self._filtered(expression, site) if isinstance(expression, ir.Call) else self._sum(expression, site)
            self._made[key] = Stream(made)
        return self._made[key]

    def _filtered(self, call: ir.Call, site: int) -> torch.Tensor:
        self._whole("a filtered tensor")
        (beta,) = (self._number(argument.value, site) for argument in call.labelled)
        sigma = self._environment.names["sigma"]
        if sigma is None:
            raise Undefined("`sigma` is not known here")
        return wiener(self._tensor(call.arguments[0], site), beta, sigma, self.layout)

    def _sum(self, expression: ir.Arithmetic, site: int) -> torch.Tensor:
        """Return a sum or difference of two tensors, or a number times a tensor."""
        if expression.operator == "*":
            factor, stream = (
                (expression.right, expression.left)
                if is_stream(expression.left)
                else (expression.left, expression.right)
            )
            return self._tensor(stream, site) * self._number(factor, site)
        left, right = self._tensor(expression.left, site), self._tensor(expression.right, site)
        if left.shape != right.shape:
            raise Undefined("tensors of different shapes are added")
        return left + right if expression.operator == "+" else left - right

    def _tensor(self, expression: ir.Expression, site: int) -> torch.Tensor:
        value = self.value(expression, site)
        if not isinstance(value, Stream):
            raise Undefined("a number stands where a tensor is read")
        return value.tensor

    def _of_this_branch(self, call: ir.Call) -> bool:
        return call.arguments[0] == ir.Text(value=self._tick.branch)

    def _crossed(self, call: ir.Call, site: int) -> SignalValue:
        """Return a value of another branch at this step, or of one half of a guidance batch."""
        branch, value = call.arguments
        name = str(evaluate(branch))
        if self.rows is not None:
            if not is_stream(value):
                return self.value(self._signals.pushed(call), site)
            key = call, site if self._signals.by_site(value) else -1
            if key not in self._made:
                self._made[key] = Stream(half_of(name, self._tensor(value, site), self.rows, self.cond))
            return self._made[key]
        if self._of_this_branch(call):
            return self.value(value, site)
        read, back = at_its_step(value)
        other = self._others(name)
        key = self._signals.key(read, site)
        for step, values in other.crossed if other is not None else ():
            if step == self._step - back and key in values:
                return values[key]
        raise Undefined(f"`{name}` has not run in this step")

    def _over(self, expression: ir.Over) -> float | bool:
        """Return the mean, smallest or largest of the values that exist, or whether any is true."""
        values = list[float]()
        for member in self._signals.members[expression.selector]:
            try:
                value = self.value(expression.value, member)
            except Undefined:
                continue
            if not isinstance(value, Stream):
                values.append(value)
        if not values:
            raise Undefined(f"`{expression.function}(... over ...)` has no value yet")
        match expression.function:
            case "mean":
                return sum(values) / len(values)
            case "any":
                return any(values)
            case function:
                return min(values) if function == "min" else max(values)

    def last(self, slot: int, site: int) -> SignalValue:
        """Return a value of the step before.

        Args:
            slot: The slot of its expression.
            site: The site, or -1 if the value is equal for all sites.

        Raises:
            Undefined: There is none.
        """
        value = self.past.previous.get((slot, site)) if self.past.step == self._step - 1 else None
        if value is None:
            raise Undefined("`prev(...)` has no value yet")
        return value

    def _number(self, expression: ir.Expression, site: int) -> float:
        """Evaluate an expression over numbers, with its norms and memories as values."""
        if isinstance(expression, ir.Call) and expression.function in NORMS:
            return self._norm(expression, site)
        if isinstance(expression, ir.Over):
            return self._over(expression)
        stateful = dict[ir.Expression, float | bool]()
        for node in self._signals.parts(expression):
            value = self._number(node, site) if _is_measured(node) else self.value(node, site)
            if isinstance(value, Stream):
                raise Undefined("a tensor stands where a number is read")
            stateful[node] = value
        environment = self._environment
        if site >= 0 and self._signals.by_site(expression):
            names = {**clock_words(self._tick, self._memory_of(site)), **self._externals}
            environment = replace(environment, names=names)
        return evaluate(expression, replace(environment, stateful=stateful))

    def _norm(self, call: ir.Call, site: int) -> float:
        if self.agreement is not None:
            return self.agreed(call, site)
        return self.norm(call, [self.value(argument, site) for argument in call.arguments])

    def agreed(self, call: ir.Call, site: int) -> float:
        """Return a norm that was computed together with other processes."""
        return finite(self._agreed.get(self._key(call, site), math.nan), f"`{call.function}(...)`")

    def norm(self, call: ir.Call, values: Sequence[SignalValue]) -> float:
        """Return a norm of tensors. Equal tensors are reduced and read from the device once in a forward pass.

        Args:
            call: The norm.
            values: The values of its arguments.
        """
        tensors = _of_one_shape(call, values)
        key = call.function, tuple(map(id, tensors))
        known = self._reduced.get(key)
        if known is None:
            if in_pieces(tensors[0].tensor):
                x, y = tensors[0].tensor, tensors[1].tensor if len(tensors) > 1 else None
                value = norm_alone(call.function, x, y, by_sample=self._worst)
            else:
                value = float((worst_norm if self._worst else norm_of)(call.function, tensors).item())
            known = self._reduced[key] = value, tensors
        return finite(known[0], f"`{call.function}(...)`")


def _of_one_shape(call: ir.Call, values: Sequence[SignalValue]) -> list[Stream]:
    """Return the tensors that a norm reads.

    Raises:
        Undefined: They are numbers, have different shapes, or were modified in place.
    """
    streams = [value for value in values if isinstance(value, Stream)]
    if len(streams) != len(values):
        raise Undefined(f"`{call.function}(...)` reads tensors")
    shapes = [stream.tensor.shape for stream in streams]
    if len(shapes) == 2 and shapes[0] != shapes[1]:
        raise Undefined(f"`{call.function}(...)` compares tensors of different shapes")
    return streams


def _is_measured(node: ir.Call | ir.Over) -> bool:
    return isinstance(node, ir.Over) or node.function in NORMS


def _outermost(node: ir.Node) -> list[ir.Call | ir.Over]:
    """Return the outermost norms, memories, `cross` and `over` below a node."""
    if is_stateful(node):
        return [node]
    return [call for child in children(node) for call in _outermost(child)]
