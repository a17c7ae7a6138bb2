"""Signals: probed tensors, remembered over steps and computes, and reduced to numbers.

The norms use the same torch operations in the same dtype as the caches of diffusers, so that equal streams give
bit-identical numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

import torch

from cachepolicy.engine.distributed.consensus import Agreement
from cachepolicy.engine.distributed.norms import Share, Sum, in_pieces, norm_alone, share, summed
from cachepolicy.engine.history_packing import is_whole
from cachepolicy.engine.streams import Layout, half_of, of_tokens, wiener
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Environment, Undefined, evaluate
from cachepolicy.language.traversal import children, close_signals, is_stream, replace_outermost, walk
from cachepolicy.language.vocabulary import MEMORIES, NORMS
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.schedule import Memory, Tick, clock_words


class Stream:
    """A probed tensor with its `_version`. The mean magnitude is computed on demand.

    Args:
        tensor: The tensor.
        shared: Whether other code may have it, and write into it.
    """

    __slots__ = ("_magnitude", "_sum", "_tensor", "_version")

    def __init__(self, tensor: torch.Tensor, *, shared: bool = True) -> None:
        if shared:
            # Inference tensors have no `_version`, so in-place writes cannot be detected. Small views are copied as
            # well, because they would keep a large storage alive.
            shared = not tensor.is_inference() and is_whole([tensor])
            self._tensor = tensor.detach() if shared else tensor.detach().clone()
        else:
            self._tensor = tensor.detach() if tensor.requires_grad else tensor
        self._version = tensor._version if shared else None
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
    _parts: dict[ir.Expression, list[ir.Call | ir.Over]] = field(
        default_factory=dict[ir.Expression, list[ir.Call | ir.Over]], repr=False, compare=False
    )
    _by_site: dict[ir.Expression, bool] = field(default_factory=dict[ir.Expression, bool], repr=False, compare=False)
    _pushed: dict[ir.Call, ir.Expression] = field(
        default_factory=dict[ir.Call, ir.Expression], repr=False, compare=False
    )

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
    conditions = [rule.rule.condition for rule in plan.rules if rule.rule.condition is not None]
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

    `crossed` has what other branches read, with the step, of the last two steps.
    """

    step: int = -1
    previous: dict[tuple[ir.Expression, int], SignalValue] = field(
        default_factory=dict[tuple[ir.Expression, int], SignalValue]
    )
    kept: dict[tuple[ir.Expression, int], tuple[SignalValue, ...]] = field(
        default_factory=dict[tuple[ir.Expression, int], tuple[SignalValue, ...]]
    )
    crossed: tuple[tuple[int, Mapping[tuple[ir.Expression, int], SignalValue]], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.previous or self.kept or self.crossed)


_NO_LAYOUT = Layout()
_NO_NUMBERS: Mapping[str, float] = {}


class Measuring:
    """The signals of one forward pass: probes as they arrive, numbers on demand."""

    __slots__ = (
        "_agreed", "_externals", "_known", "_made", "_memory_of", "_others", "_seen", "_signals", "_step", "_tables",
        "_tick", "_undefined", "_worst", "agreement", "cond", "layout", "past", "rows",
    )  # fmt: skip

    def __init__(
        self,
        signals: Signals,
        past: Remembered,
        tick: Tick,
        tables: Mapping[str, Sequence[int | float]],
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
        self.layout = _NO_LAYOUT
        self.rows: int | None = None
        """The number of rows of a guidance batch, None if the call is no such batch."""
        self.cond = 1
        """Whether the conditional half of a guidance batch comes first (0) or second (1)."""
        self._worst = worst
        self._undefined = undefined
        self.agreement = agreement
        self._agreed: dict[tuple[ir.Call, int], float] = {}
        self._signals = signals
        self._tables = tables
        self._known: Environment | None = None
        self._step = tick.step
        self._seen: dict[ir.Probe, Stream | None] = {}
        self.past = past

    @property
    def _environment(self) -> Environment:
        """The clock, the externals and the tables. Most signals read none of them."""
        if self._known is None:
            names = {**clock_words(self._tick, Memory(self._step)), **self._externals}
            self._known = Environment(names, self._tables)
        return self._known

    def see(self, probe: ir.Probe, tensor: torch.Tensor, *, shared: bool = True) -> None:
        """Record the tensor of a probe. Arguments as for `Stream`."""
        try:
            if probe.tokens is not None:
                self._whole("a part of the tokens")
                tensor = of_tokens(probe.tokens, tensor, self.layout)
                shared = True  # a view of the tensor
            self._seen[probe] = Stream(tensor, shared=shared)
        except Undefined:
            self._seen[probe] = None

    def _whole(self, subject: str) -> None:
        """Raise where the tokens of a sample are spread over processes."""
        if self.agreement is not None:
            raise Undefined(f"{subject} is not known where processes share the tokens of a sample")

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
        # Modules that `over` takes and that are no sites have their own previous values.
        sites = [*sites, *self._signals.others]
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
        if self._signals.crossed and self.rows is None:
            self.past.crossed = ((self._step, self._values(self._signals.crossed, sites)), *self.past.crossed[:1])
            changed = True
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
        # The most frequent expressions come first, because each pattern below takes time.
        if isinstance(expression, ir.Probe):
            probe = self._named(expression, site)
            stream = self._seen.get(probe) if probe is not None else None
            if stream is None:
                raise Undefined(f"`{expression.stream}(...)` was not seen in this step")
            self._require_one(expression, site)
            return stream
        if isinstance(expression, ir.Call):
            if expression.function in NORMS:
                return self._norm(expression, site)
            if expression.function == "kept":
                self._require_one(expression, site)
                depth = 1 if len(expression.arguments) == 1 else int(evaluate(expression.arguments[1]))
                kept = self.past.kept.get((expression.arguments[0], site), ())
                return self._remembered(kept[depth - 1] if 0 < depth <= len(kept) else None, "kept")
        match expression:
            case ir.Call(function="cross"):
                return self._crossed(expression, site)
            case ir.Call(function="wiener") | ir.Arithmetic() if is_stream(expression):
                return self._calculated(expression, site)
            case ir.Call(function="prev"):
                self._require_one(expression, site)
                return self._remembered(self.past.previous.get((expression.arguments[0], site)), "prev")
            case _:
                return self._number(expression, site)

    def _named(self, probe: ir.Probe, site: int) -> ir.Probe | None:
        """Return the probe itself or, for a probe of `self`, the one of the site."""
        if not isinstance(probe.selector, ir.Itself):
            return probe
        return self._signals.own.get((probe, self._signals.names.get(site, "?")))

    def _require_one(self, expression: ir.Expression, site: int) -> None:
        """Raise if the expression reads a module that one forward pass calls more than once."""
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
        value = self._value(expression, site)
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
                return self._value(self._signals.pushed(call), site)
            key = call, site if self._signals.by_site(value) else -1
            if key not in self._made:
                self._made[key] = Stream(half_of(name, self._tensor(value, site), self.rows, self.cond))
            return self._made[key]
        if self._of_this_branch(call):
            return self._value(value, site)
        read, back = at_its_step(value)
        other = self._others(name)
        for step, values in other.crossed if other is not None else ():
            if step == self._step - back and (read, site) in values:
                return values[read, site]
        raise Undefined(f"`{name}` has not run in this step")

    def _over(self, expression: ir.Over) -> float | bool:
        """Return the mean, smallest or largest of the values that exist, or whether any is true."""
        values = list[float]()
        for member in self._signals.members[expression.selector]:
            try:
                value = self._value(expression.value, member)
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

    def _remembered(self, value: SignalValue | None, memory: str) -> SignalValue:
        if value is None or (memory == "prev" and self.past.step != self._step - 1):
            raise Undefined(f"`{memory}(...)` has no value yet")
        return value

    def _number(self, expression: ir.Expression, site: int) -> float:
        """Evaluate an expression over numbers, with its norms and memories as values."""
        if isinstance(expression, ir.Call) and expression.function in NORMS:
            return self._norm(expression, site)
        if isinstance(expression, ir.Over):
            return self._over(expression)
        stateful = dict[ir.Expression, float | bool]()
        for node in self._signals.parts(expression):
            value = self._number(node, site) if _is_measured(node) else self._value(node, site)
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


def _is_measured(node: ir.Call | ir.Over) -> bool:
    return isinstance(node, ir.Over) or node.function in NORMS


def _outermost(node: ir.Node) -> list[ir.Call | ir.Over]:
    """Return the outermost norms, memories, `cross` and `over` below a node."""
    if isinstance(node, ir.Over) or (isinstance(node, ir.Call) and node.function in NORMS | MEMORIES | {"cross"}):
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
