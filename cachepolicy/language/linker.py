"""Links a policy: inlines used policies, sets parameters, substitutes names and computes the digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from graphlib import CycleError
from typing import Any, TypeVar, cast

from cachepolicy.errors import Diagnostic, PolicyError
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Value, constant
from cachepolicy.language.formatter import format_node
from cachepolicy.language.loader import Origin, chain, load, load_used, located, origin
from cachepolicy.language.params import settled
from cachepolicy.language.presets import ModelFacts, choose, missing
from cachepolicy.language.scope import BOUND
from cachepolicy.language.semantics import check_names
from cachepolicy.language.traversal import (
    dependency_order,
    fold_constants,
    measure_size,
    names_in,
    transform,
    walk,
    without_truisms,
)
from cachepolicy.language.validate import WholeNumber, bare_mask, resolved_faults
from cachepolicy.language.vocabulary import NORMS

__all__ = ["Resolved", "RuleSource", "load", "resolve"]

USE_DEPTH_LIMIT = 16
"""Maximum nesting depth of `use`."""
USE_LIMIT = 256
"""Maximum number of `use` statements that are inlined, with repetitions."""
RULE_LIMIT = 10_000
"""Maximum number of rules, including the rules of used policies."""
NODE_LIMIT = 300_000
"""Maximum number of nodes after substitution of lets and signals."""
NESTING_LIMIT = 160
"""Maximum depth of an expression after substitution."""


@dataclass(frozen=True, slots=True)
class RuleSource:
    """The statement that a rule came from: its policy and its index among the statements of the policy."""

    policy: ir.Policy = field(repr=False)
    statement: int


@dataclass(frozen=True, slots=True)
class Resolved:
    """A policy after substitution. Only clock words, signals and externals are still names.

    Attributes:
        policy: The policy as it was loaded.
        rules: The rules of the policy and of the policies that it uses, in reading order, without rules that are off.
        sources: The statement that each rule came from.
        signals: The signals in dependency order. A signal of a used policy is called `policy.name` if its name is
            taken. A norm in a `while` is a signal too, which is called as it is written.
        tables: The tables by name, renamed in the same way.
        externals: Names of the externals.
        expects: The expectations of the policy itself.
        settings: The Python value of each parameter.
        digest: The sha256 of what the rules mean, in hexadecimal.
        preset: The name of the preset that applies; None if none does.
        used: The used policies, by the key of the user's origin and the name in its `use` statement.
    """

    policy: ir.Policy = field(repr=False)
    rules: tuple[ir.Rule, ...]
    sources: tuple[RuleSource, ...] = field(repr=False)
    signals: tuple[ir.Signal, ...]
    tables: Mapping[str, tuple[int | float, ...]]
    externals: tuple[str, ...]
    expects: tuple[ir.Expect, ...]
    tuned: tuple[ir.Tuned, ...]
    settings: Mapping[str, Value]
    digest: str
    preset: str | None = None
    used: Used = field(default_factory=dict[tuple[str, str], ir.Policy], repr=False, compare=False)


Used = Mapping[tuple[str, str], ir.Policy]
Loader = Callable[[str, ir.Policy], ir.Policy]
"""Loads the policy that `use NAME` refers to, given the name and the policy that contains the statement."""


def resolve(
    policy: ir.Policy,
    settings: Mapping[str, object] | None = None,
    *,
    loader: Loader = load_used,
    model: ModelFacts | None = None,
) -> Resolved:
    """Sets the parameters of a policy, inlines the policies that it uses and substitutes parameters and lets.

    Args:
        policy: The policy. It is not modified.
        settings: Values of parameters by name: Python values (`None` for `off`, a tuple `(low, high)` for an open
            range) or expressions. `preset` chooses a preset by its name, unless a parameter has this name.
        loader: Loads the policy that a `use` statement refers to.
        model: The model that presets are asked about. Without one, the first preset sets parameters without a default.

    Returns:
        The resolved policy.

    Raises:
        PolicyError: A setting does not fit (E160 to E162), a clause does not fit its constants (E163, E164), the policy
            grows too large (E165), a parameter has no value (E166), no or several presets fit (E167), or a used policy
            cannot be loaded (E150 to E155), uses itself (E156) or uses too many others (E157).
    """
    if policy.source_name is None:
        # Built by hand or read from JSON: a text was held to the rules when it was parsed.
        errors = [finding for finding in check_names(policy) if finding.severity == "error"]
        if errors:
            raise PolicyError(errors)
    settings = dict(settings or {})
    flat = _Flat(loader, model, _chosen(policy, settings))
    names = flat.add(policy, settings, (origin(policy),))
    if flat.findings:
        raise PolicyError(flat.findings)
    flat.signals = {name: flat.signals[name] for name in _ordered(flat.signals, policy)}
    rules, signals = tuple(flat.rules), tuple(flat.signals.values())
    flat.hold_to_size(policy)
    tuned = tuple(_of(policy, ir.Tuned))
    meaning = digest(policy.edition, rules, signals, flat.tables, tuned)
    rules, signals = _with_named_norms(rules, signals)
    return Resolved(
        policy=policy,
        rules=rules,
        sources=tuple(flat.sources),
        signals=signals,
        tables=flat.tables,
        externals=tuple(flat.externals),
        expects=tuple(flat.expects),
        tuned=tuned,
        settings={param.name: constant(names[param.name]) for param in _of(policy, ir.Param)},
        digest=meaning,
        preset=flat.preset,
        used=flat.files,
    )


def _chosen(policy: ir.Policy, settings: dict[str, object]) -> str | None:
    """Returns the preset that the settings choose, and removes it from them."""
    if not _of(policy, ir.Preset) or any(param.name == "preset" for param in _of(policy, ir.Param)):
        return None
    value = settings.pop("preset", None)
    match value:
        case ir.Text():
            return value.value
        case ir.Name():
            return value.name
        case None | str():
            return value
        case _:
            raise PolicyError.of("E161", f"`preset` takes the name of a preset, not `{value}`")


def _with_named_norms(
    rules: Sequence[ir.Rule], signals: Sequence[ir.Signal]
) -> tuple[tuple[ir.Rule, ...], tuple[ir.Signal, ...]]:
    """Makes a signal of everything in a `while` that only a run can measure, so that signals alone have tensors.

    The signal is called as the norm is written: `l1(head, kept(head))`.
    """
    named = dict[ir.Node, ir.Signal]()

    def name(node: ir.Node) -> ir.Node:
        if not is_measured(node):
            return node
        if node not in named:
            named[node] = ir.Signal(name=format_node(node), value=node, span=node.span)  # pyright: ignore[reportArgumentType] (a measured node is an expression)
        return ir.Name(name=named[node].name, span=node.span)

    written = tuple(
        rule if rule.condition is None else rule.model_copy(update={"condition": transform(rule.condition, name)})
        for rule in rules
    )
    for rule in rules:
        measured = alignment(rule.action)
        if measured is not None:
            named.setdefault(measured.value, measured)
    return written, (*signals, *named.values())


def alignment(action: ir.Action) -> ir.Signal | None:
    """Returns what `align` measures, as a signal that is called as the action is written; None for other actions.

    It is how far the probe is from its value at the second last compute, over how far the values at the last two
    computes are apart, within the limits of `clip`.
    """
    if not isinstance(action, ir.Predict) or action.predictor != "align":
        return None
    return _aligned(action)  # pyright: ignore[reportArgumentType] (frozen nodes have a hash)


@lru_cache(maxsize=256)
def _aligned(action: ir.Predict) -> ir.Signal | None:
    given = {argument.label: argument.value for argument in action.arguments}
    probe, clip = given["probe"], given["clip"]
    if not isinstance(clip, ir.ListOf):
        return None
    newest, older = (ir.Call(function="kept", arguments=(probe, ir.Number(value=back))) for back in (1, 2))
    moved, apart = (ir.Call(function="l1", arguments=(x, older)) for x in (probe, newest))
    ratio = ir.Arithmetic(left=moved, operator="/", right=apart)
    value = ir.Call(function="clamp", arguments=(ratio, *clip.items))
    return ir.Signal(name=format_node(action), value=value, span=action.span)


def is_measured(node: ir.Node) -> bool:
    """Returns whether a node is a number that only a run can measure: a norm, `x over S`, or `cross`."""
    return isinstance(node, ir.Over) or (
        isinstance(node, ir.Call) and (node.function in NORMS or node.function == "cross")
    )


S = TypeVar("S", bound=ir.Node)


def _of(policy: ir.Policy, kind: type[S]) -> list[S]:
    return [statement for statement in policy.statements if isinstance(statement, kind)]


@dataclass
class _Flat:
    """Accumulates the linked rules, signals, tables and diagnostics of a policy and of the policies that it uses."""

    loader: Loader
    model: ModelFacts | None = None
    chosen: str | None = None
    preset: str | None = None
    rules: list[ir.Rule] = field(default_factory=list[ir.Rule])
    sources: list[RuleSource] = field(default_factory=list[RuleSource])
    signals: dict[str, ir.Signal] = field(default_factory=dict[str, ir.Signal])
    tables: dict[str, tuple[int | float, ...]] = field(default_factory=dict[str, tuple[int | float, ...]])
    externals: list[str] = field(default_factory=list[str])
    expects: list[ir.Expect] = field(default_factory=list[ir.Expect])
    findings: list[Diagnostic] = field(default_factory=list[Diagnostic])
    taken: set[str] = field(default_factory=set[str])
    files: dict[tuple[str, str], ir.Policy] = field(default_factory=dict[tuple[str, str], ir.Policy])
    uses: int = 0
    nodes: int = 0

    def add(
        self,
        policy: ir.Policy,
        settings: Mapping[str, object],
        path: Sequence[Origin],
        use: ir.Use | None = None,
    ) -> dict[str, ir.Expression]:
        """Inlines one policy, or the policy that `use` refers to. Returns the substitution for its names."""
        spans = {setting.name: setting.span for setting in use.settings} if use else {}
        prefix = (policy.name or use.policy) if use else ""
        names: dict[str, ir.Expression] = settled(_of(policy, ir.Param), self._preset(policy, settings, use), spans)
        unset = [param for param in _of(policy, ir.Param) if param.name not in names]
        if unset:
            raise PolicyError([located(missing(unset, _of(policy, ir.Preset), self.model), policy, unset[0].span)])
        renamed = self._declare(policy, prefix, names)
        names |= {old: ir.Name(name=new) for old, new in renamed.items() if old not in names}
        sizes = dict[str, tuple[int, int]]()
        lets = {let.name: let for let in _of(policy, ir.Let)}
        for name in _ordered(lets, policy):
            sizes[name] = self._size(policy, lets[name], sizes)
            names[name] = self._write(policy, lets[name].value, names, renamed)
        for number, statement in enumerate(policy.statements):
            match statement:
                case ir.Rule():
                    self._rule(policy, number, statement, names, renamed, sizes)
                case ir.Signal():
                    self._size(policy, statement, sizes)
                    new = renamed[statement.name]
                    value = self._write(policy, statement.value, names, renamed)
                    self.signals[new] = statement.model_copy(update={"name": new, "value": value})
                case ir.Use():
                    self._use(policy, statement, names, renamed, path)
                case ir.Expect() if not prefix:
                    selector = self._write(policy, statement.selector, names, renamed)
                    self.expects.append(statement.model_copy(update={"selector": selector}))
                case _:
                    pass
        return names

    def _preset(self, policy: ir.Policy, settings: Mapping[str, object], use: ir.Use | None) -> Mapping[str, object]:
        """Returns the settings with the values of the preset that applies."""
        presets = _of(policy, ir.Preset)
        if not presets:
            return settings
        chosen = self.chosen if use is None else None
        name, values = choose(presets, self.model, chosen, settings)
        if self.model is None and chosen is None:
            unset = {param.name for param in _of(policy, ir.Param) if param.default is None}
            name, values = None, {key: value for key, value in values.items() if key in unset}
        if use is None:
            self.preset = name
        return {**values, **settings}

    def _declare(self, policy: ir.Policy, prefix: str, settings: Mapping[str, ir.Expression]) -> dict[str, str]:
        """Chooses unique names for signals, tables and externals. Returns the map from old to new names.

        A list parameter that is looked up, as `ratios[step]`, is a table whose numbers are those of its setting.
        """
        looked_up = {
            node.table for statement in policy.statements for node in walk(statement) if isinstance(node, ir.Lookup)
        }
        renamed = dict[str, str]()
        for statement in policy.statements:
            if not isinstance(statement, ir.Signal | ir.Table | ir.External | ir.Param):
                continue
            if isinstance(statement, ir.Param) and statement.name not in looked_up:
                continue
            new, count = statement.name, 1
            while prefix and new in self.taken:
                new = f"{prefix}.{statement.name}" if count == 1 else f"{prefix}.{count}.{statement.name}"
                count += 1
            renamed[statement.name] = new
            self.taken.add(new)
            if isinstance(statement, ir.Table):
                self.tables[new] = statement.values
            elif isinstance(statement, ir.Param):
                self.tables[new] = self._numbers(policy, statement, settings[statement.name])
            elif isinstance(statement, ir.External):
                self.externals.append(new)
        if not prefix:
            self.taken |= {
                statement.name for statement in policy.statements if isinstance(statement, ir.Param | ir.Let)
            }
        return renamed

    def _numbers(self, policy: ir.Policy, param: ir.Param, value: ir.Expression) -> tuple[int | float, ...]:
        """Returns the numbers of a list parameter that is looked up; `off` has none."""
        items: tuple[Any, ...] = tuple(cast("Any", constant(value))) if isinstance(value, ir.ListOf) else ()
        numbers = tuple(item for item in items if isinstance(item, int | float) and not isinstance(item, bool))
        if len(numbers) < len(items):
            message = f"`{param.name}` is looked up as a table, so its items are numbers"
            self.findings.append(located(Diagnostic("E161", message), policy, param.span))
        return numbers

    def _write(
        self, policy: ir.Policy, node: Any, names: Mapping[str, ir.Expression], renamed: Mapping[str, str]
    ) -> Any:
        def rewrite(node: ir.Node) -> ir.Node:
            match node:
                case ir.Name():
                    return names.get(node.name, node)
                case ir.Lookup():
                    return node.model_copy(update={"table": renamed.get(node.table, node.table)})
                case ir.PatternParam():
                    return self._pattern(policy, node, names)
                case ir.Mask():
                    return node.model_copy(update={"mask": transform(node.mask, _bare)})
                case _:
                    return fold_constants(node)

        return transform(node, rewrite)

    def _pattern(self, policy: ir.Policy, node: ir.PatternParam, names: Mapping[str, ir.Expression]) -> ir.Node:
        """Returns the selector for a regex parameter.

        A list matches any of its regexes. `off` and an empty list match nothing.
        """
        value = names.get(node.name)
        if value is None and node.name == "self":
            return ir.Itself(span=node.span)
        match value:
            case ir.Text():
                return ir.Pattern(regex=value.value, span=node.span)
            case ir.ListOf():
                texts = [item.value for item in value.items if isinstance(item, ir.Text)]
                if len(texts) < len(value.items):
                    message = f"`{node.name}` stands for regexes, so its items are strings"
                    self.findings.append(located(Diagnostic("E161", message), policy, node.span))
                patterns = tuple(ir.Pattern(regex=text, span=node.span) for text in texts)
                return patterns[0] if len(patterns) == 1 else ir.AnyOf(selectors=patterns, span=node.span)
            case ir.Off():
                return ir.AnyOf(selectors=(), span=node.span)
            case _:
                message = f"`{node.name}` is no string or list parameter, so it cannot stand for a regex"
                self.findings.append(located(Diagnostic("E161", message), policy, node.span))
                return ir.AnyOf(selectors=(), span=node.span)

    def _rule(
        self,
        policy: ir.Policy,
        number: int,
        rule: ir.Rule,
        names: Mapping[str, ir.Expression],
        renamed: Mapping[str, str],
        sizes: Mapping[str, tuple[int, int]],
    ) -> None:
        self._size(policy, rule, sizes)
        written: ir.Rule = self._write(policy, rule, names, renamed)
        if _is_absent(written):
            return
        bounds = tuple(bound for bound in written.bounds if not isinstance(bound.count, ir.Off))
        guard = without_truisms(written.when)
        if len(bounds) < len(written.bounds) or guard is not written.when:
            written = written.model_copy(update={"bounds": bounds, "when": guard})
        self.findings += [located(finding, policy, rule.span) for finding in resolved_faults(written)]
        self.rules.append(written)
        self.sources.append(RuleSource(policy, number))
        if len(self.rules) > RULE_LIMIT:
            raise PolicyError.of("E157", f"more than {RULE_LIMIT} rules, with those that are used")

    def _use(
        self,
        policy: ir.Policy,
        use: ir.Use,
        names: Mapping[str, ir.Expression],
        renamed: Mapping[str, str],
        path: Sequence[Origin],
    ) -> None:
        first = len(self.rules)
        try:
            used = self._load(use.policy, policy, path)
            settings = {setting.name: self._write(policy, setting.value, names, {}) for setting in use.settings}
            self.add(used, settings, (*path, origin(used)), use)
        except PolicyError as error:
            findings = [located(finding, policy, use.span) for finding in error.diagnostics]
            if any(finding.code == "E157" for finding in findings):
                raise PolicyError(findings) from error
            self.findings += findings
        when = None if use.when is None else without_truisms(self._write(policy, use.when, names, renamed))
        count = None if use.bound is None else self._write(policy, use.bound.count, names, renamed)
        if count is not None:
            fault = WholeNumber(count, "`at most`", BOUND, 0, off=True).fault()
            self.findings += [] if fault is None else [located(Diagnostic("E163", fault), policy, use.span)]
        for number in range(first, len(self.rules)):
            self.rules[number] = _narrowed(self.rules[number], when, count)

    def _load(self, name: str, user: ir.Policy, path: Sequence[Origin]) -> ir.Policy:
        self.uses += 1
        if len(path) > USE_DEPTH_LIMIT:
            raise PolicyError.of("E157", f"`use` reaches deeper than {USE_DEPTH_LIMIT}: {chain(path)}")
        if self.uses > USE_LIMIT:
            raise PolicyError.of("E157", f"more than {USE_LIMIT} policies are used: {chain(path)}")
        key = (path[-1].key, name)
        if key not in self.files:
            self.files[key] = self.loader(name, user)
        used = self.files[key]
        here = origin(used)
        if here.key in {user.key for user in path}:
            raise PolicyError.of("E156", f"a policy uses itself: {chain([*path, here])}")
        return used

    def _size(self, policy: ir.Policy, node: ir.Node, sizes: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
        nodes, depth = measure_size(node, sizes)
        self.nodes += nodes
        if self.nodes > NODE_LIMIT or depth > NESTING_LIMIT:
            raise PolicyError([located(_TOO_LARGE, policy, node.span)])
        return nodes, depth

    def hold_to_size(self, policy: ir.Policy) -> None:
        """Checks the size limits after substitution of signals in one another."""
        sizes = dict[str, tuple[int, int]]()
        for name, signal in self.signals.items():
            sizes[name] = self._size(policy, signal.value, sizes)
        for rule in self.rules:
            self._size(policy, rule, sizes)


def _bare(node: ir.Node) -> ir.Node:
    return node.model_copy(update={"value": bare_mask(node.value)}) if isinstance(node, ir.Text) else node


def _narrowed(rule: ir.Rule, when: ir.Expression | None, count: ir.Expression | None) -> ir.Rule:
    """Returns a used rule that owns its sites only where `when` holds, and reuses at most `count` times in a row."""
    if when is not None:
        both = when if rule.when is None else ir.Both(operands=(when, rule.when))
        rule = rule.model_copy(update={"when": fold_constants(both)})
    if count is None or isinstance(count, ir.Off) or isinstance(rule.action, ir.Compute):
        return rule
    bounds = [bound for bound in rule.bounds if bound.scope != "row"]
    for bound in rule.bounds:
        if bound.scope == "row":
            least = fold_constants(ir.Call(function="min", arguments=(count, bound.count)))
            bounds.append(bound.model_copy(update={"count": least}))
    if len(bounds) == len(rule.bounds) and all(bound.scope != "row" for bound in bounds):
        bounds.append(ir.Bound(count=count, scope="row"))
    return rule.model_copy(update={"bounds": tuple(bounds)})


_TOO_LARGE = Diagnostic(
    "E165", "the statement is too large after substitution of its names", help="use fewer or smaller lets"
)


def _is_absent(rule: ir.Rule) -> bool:
    """Returns whether the schedule of the rule is `off`, which removes the rule."""
    match rule.schedule:
        case ir.Every(interval=ir.Off()) | ir.OnSteps(steps=ir.Off()) | ir.Mask(mask=ir.Off()):
            return True
        case _:
            return False


def _ordered(declared: Mapping[str, ir.Let | ir.Signal], policy: ir.Policy) -> list[str]:
    """Sorts lets or signals in dependency order.

    Raises:
        PolicyError: E158, a name depends on itself.
    """
    try:
        return dependency_order({name: names_in(statement) for name, statement in declared.items()})
    except CycleError as error:
        cycle = error.args[1][::-1]
        message = f"`{cycle[0]}` is defined by itself: {' -> '.join(cycle)}"
        raise PolicyError([Diagnostic("E158", message, source=policy.source_name)]) from error


# --- normal form and digest --------------------------------------------------------------------------------

Tables = Mapping[str, Sequence[int | float]]


def digest(
    edition: int,
    rules: Sequence[ir.Rule],
    signals: Sequence[ir.Signal],
    tables: Tables,
    tuned: Sequence[ir.Tuned] = (),
) -> str:
    """Computes the sha256 of what the rules mean, in hexadecimal. `signals` are in dependency order.

    Equal for policies that differ in the names of parameters, lets, signals and tables, in comments, titles and layout,
    in the order of declarations, in what no rule reads, or in whether rules are written out or come by `use`. Externals
    count by their names, since the caller gives them so. Of `tuned`, only the numbers of steps count: a trajectory that
    begins within such a schedule keeps its step numbers.
    """
    values = {name: _hash(["table", *(_number(value) for value in table)]) for name, table in tables.items()}
    for signal in signals:
        values[signal.name] = _hash(["signal", _normal(signal.value, values)])
    lengths = [["tuned", *sorted({statement.steps for statement in tuned})]] if tuned else []
    return _hash([edition, *(_normal(rule, values) for rule in rules), *lengths])


def _hash(form: object) -> str:
    text = json.dumps(form, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _number(value: float) -> object:
    """Normalizes a number: `1` and `1.0` are equal, and `inf` becomes a string, because JSON has no infinity."""
    if isinstance(value, bool):
        return value
    return int(value) if value == value // 1 else repr(float(value))


def _normal(node: object, values: Mapping[str, str]) -> object:
    """Converts a node to nested lists. Names of signals and tables are replaced by their hashes."""
    match node:
        case ir.Number():
            return _number(node.value)
        case ir.Name():
            return ["name", values.get(node.name, node.name)]
        case ir.Lookup():
            return ["lookup", values.get(node.table, node.table), _normal(node.index, values)]
        case ir.Comparison(operands=(_, _, _)):
            return _normal(_as_interval(node) or (node.operators, node.operands), values)
        case ir.Node():
            return [type(node).__name__, *(_normal(getattr(node, name), values) for name in _fields(node))]
        case tuple():
            return [_normal(item, values) for item in cast("tuple[object, ...]", node)]
        case _:
            return node


def _fields(node: ir.Node) -> list[str]:
    left_out = {"span", "kind"} | (node.unsaid() if isinstance(node, ir.GrownNode) else frozenset[str]())
    return [name for name in type(node).model_fields if name not in left_out]


def _as_interval(chain: ir.Comparison) -> ir.Membership | None:
    """Converts a comparison chain such as `100 < t < 800` to the equivalent `t in (100, 800)`."""
    operators = set(chain.operators)
    low, value, high = chain.operands
    closed = tuple(operator in {"<=", ">="} for operator in chain.operators)
    if operators <= {">", ">="}:
        low, high, closed = high, low, closed[::-1]
    elif not operators <= {"<", "<="}:
        return None
    interval = ir.Interval(low=low, high=high, low_closed=closed[0], high_closed=closed[1])
    return ir.Membership(value=value, container=interval)
