"""Lowered rules against the interpreter: the same decisions, reasons, accumulators and memories."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

import cachepolicy
from cachepolicy.language import ir
from cachepolicy.language.closures import Closure, Compiler
from cachepolicy.language.evaluate import Environment, Undefined, evaluate
from cachepolicy.planning.lowered import Lowering
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.schedule import (
    NOT_CALLED,
    Decision,
    Memory,
    Program,
    Tick,
    decide_all,
    follows,
    prepare,
    rebuilds_uncond,
)
from cachepolicy.planning.simulation import plan
from cachepolicy.testing import strategies

SIGNALS = ("drift", "change", "rate", "x")
ODD = [math.nan, math.inf, -math.inf, 0.0, -1.0]
_number = st.floats(-3, 3) | st.sampled_from(ODD)
_odd_clock = st.none() | st.floats() | st.integers(-10, 10**6)
FACTS = ("over the memory limit", NOT_CALLED)


@st.composite
def measured(draw: st.DrawFn, sites: int) -> dict[int, dict[str, float]]:
    """Numbers of signals for some sites; some are missing."""
    numbers = st.dictionaries(st.sampled_from(SIGNALS), _number)
    return draw(st.dictionaries(st.integers(0, sites - 1), numbers))


@st.composite
def ticks(draw: st.DrawFn) -> list[Tick]:
    """Calls of several branches on a clock that may be odd."""
    branches, steps = draw(strategies.branches()), draw(st.none() | st.integers(1, 12))
    if draw(st.booleans()):
        times: Sequence[Any] = draw(strategies.timesteps())
    else:
        times = draw(st.lists(_odd_clock, min_size=1, max_size=8))
    sigma = draw(st.none() | st.floats(0, 1) | _odd_clock)
    skip = draw(st.integers(0, 3))  # steps that are left out, as where a trajectory starts late
    return [
        Tick(step + skip * (step > 1), t, steps, sigma, branch, draw(st.booleans()))
        for step, t in enumerate(times)
        for branch in branches
    ]


def told(decision: Decision) -> tuple[Any, ...]:
    """All of a decision; NaN as text, since it equals nothing."""
    accumulated = sorted((key[0], str(key[1]), repr(value)) for key, value in decision.accumulated.items())
    return decision.verdict, decision.reason, decision.rule, decision.action, accumulated


def known(memory: Memory) -> str:
    return repr(memory)


def run(program: Program, calls: Sequence[Tick], numbers: Sequence[Any], facts: Sequence[Any]) -> list[Any]:
    """The decisions and memories of all calls."""
    followed, fine = follows(program.plan), program.fine
    memories, decided, told_of = dict[str, list[Memory]](), dict[tuple[str, int], Sequence[Decision]](), list[Any]()
    for tick, signals, fact in zip(calls, numbers, facts, strict=True):
        leaders = {name: decided[name, tick.step] for name in followed if (name, tick.step) in decided}
        before = memories.get(tick.branch, fine.start())
        told_of.append(rebuilds_uncond(program, fine, before, tick))
        decisions, memories[tick.branch] = decide_all(
            program, fine, before, tick, signals_of=signals, followed=leaders, facts=fact
        )
        decided[tick.branch, tick.step] = fine.spread(decisions)
        told_of += [*map(told, decisions), *map(known, memories[tick.branch])]
    return told_of


def agree(bound: Plan, calls: Sequence[Tick], data: st.DataObject) -> None:
    sites = len(bound.sites)
    numbers = [data.draw(measured(sites)) for _ in calls]
    several = st.dictionaries(st.integers(0, sites - 1), st.sampled_from(FACTS), max_size=2)
    facts = [data.draw(several) for _ in calls]
    lowered = prepare(bound, Lowering(bound.resolved.tables))
    assert run(prepare(bound), calls, numbers, facts) == run(lowered, calls, numbers, facts)


ACTIONS = (*strategies.ACTIONS, "reuse mean", "predict linear(weight: 1 / (3 - gap))")
SINGLE = ("attention", "self_attention", "feedforward", '"attn"', '"ff$"', "attention or feedforward")
SHIPPED = ("adacache", "dbcache", "easycache", "fastercache", "fbc", "magcache", "pab", "teacache")


@given(st.booleans(), ticks(), st.data())
def test_lowered_rules_decide_as_the_interpreter(measured: bool, calls: list[Tick], data: st.DataObject) -> None:
    """Any policy on any clock, with numbers that are missing or not finite, facts and several branches."""
    options: dict[str, Any] = {
        "approximate": strategies.APPROXIMATION if not measured and data.draw(st.booleans()) else None
    }
    if options["approximate"] is None:
        options = {"measured": measured, "actions": ACTIONS, "selectors": SINGLE}
    agree(plan(data.draw(strategies.policies(follow="cond", **options))), calls, data)


@given(st.sampled_from(SHIPPED), ticks(), st.data())
def test_lowered_rules_of_shipped_policies_decide_as_the_interpreter(
    name: str, calls: list[Tick], data: st.DataObject
) -> None:
    """Shipped policies have what the drawn ones lack: tables, params, intervals."""
    agree(shipped(name), calls, data)


CLAUSES = (
    "while ema(t - prev(t), 0.25) > -50",
    "while sum(t, decay: 0.5) < 900",
    "while total(abs(t - kept(t))) < 300",
    "while latch(t < 500) or not latch(sum(1) > 2)",
    "while at_step(2, kept(t)) - t < 100",
    "while at_step(step, t) < 9",
    "while product(1.5) < 4",
    "while sum(product(2)) < 20",
    "while step - kept(step, 2) < 4",
    "while prev(prev(step)) < 3",
    "while sum(drift) < 1",
    "while drift + prev(drift) < 1",
    "while abs(drift - kept(drift)) < 1 at most 2 in a row",
    "when step > 1 every 2 offset step / 3",
    "every 3 from end",
    "every gap + 1",
    "every 2 since compute",
    "on {0, 2, 3}",
    'mask "1010"',
    "at most step / 2 in all",
    "at most 1 + progress * 3 in a row",
    "when t / (step - 2) > 100",
)


@given(st.sampled_from(CLAUSES), ticks(), st.data())
def test_every_form_of_a_clause_is_lowered(clause: str, calls: list[Tick], data: st.DataObject) -> None:
    """Each accumulator, memory, schedule and bound decides and remembers as the interpreter does."""
    agree(written(clause), calls, data)


@functools.cache
def shipped(name: str) -> Plan:
    return plan(cachepolicy.load(name))


@functools.cache
def written(clause: str) -> Plan:
    return plan(cachepolicy.parse(f"signal drift = l1(input(blocks[0]))\nmatch blocks[1:4] {clause} -> reuse"))


# --- expressions -----------------------------------------------------------------------------------------

_names = st.sampled_from(["step", "steps", "t", "a", "b"]).map(lambda name: ir.Name(name=name))
_constants = (st.integers(-3, 12) | st.sampled_from([0.5, 1e300, math.inf])).map(lambda value: ir.Number(value=value))


def _truths(numbers: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    interval = st.builds(ir.Interval, low=numbers, high=numbers, low_closed=st.booleans(), high_closed=st.booleans())
    listed = st.lists(numbers, min_size=1, max_size=3).map(lambda items: ir.SetOf(items=tuple(items)))
    signs = st.lists(st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), min_size=1, max_size=3)
    chains = signs.flatmap(
        lambda signs: st.lists(numbers, min_size=len(signs) + 1, max_size=len(signs) + 1).map(
            lambda operands: ir.Comparison(operators=tuple(signs), operands=tuple(operands))
        )
    )
    simple = chains | st.builds(ir.Membership, value=numbers, container=interval | listed | st.just(ir.Off()))
    pairs = st.lists(simple, min_size=2, max_size=3).map(tuple)
    return (
        simple
        | st.builds(ir.Negation, operand=simple)
        | st.builds(ir.Both, operands=pairs)
        | st.builds(ir.Either, operands=pairs)
    )


def _compound(numbers: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    two, three = st.tuples(numbers, numbers), st.tuples(numbers, numbers, numbers)
    listed = st.lists(numbers, min_size=1, max_size=3).map(lambda items: ir.ListOf(items=tuple(items)))
    return st.one_of(
        st.builds(ir.Arithmetic, operator=st.sampled_from("+-*/%"), left=numbers, right=numbers),
        st.builds(ir.Negative, operand=numbers),
        st.builds(
            ir.Call, function=st.sampled_from(["abs", "sqrt", "exp", "log", "l1", "sum"]), arguments=st.tuples(numbers)
        ),
        st.builds(ir.Call, function=st.sampled_from(["min", "max", "cross"]), arguments=two),
        st.builds(ir.Call, function=st.just("clamp"), arguments=three),
        st.builds(ir.Call, function=st.just("poly"), arguments=st.tuples(listed, numbers)),
        st.builds(ir.Conditional, then=numbers, condition=_truths(numbers), otherwise=numbers),
        st.builds(ir.Lookup, table=st.sampled_from(["a", "missing"]), index=numbers | st.just(ir.Name(name="step"))),
    )


_numbers = st.recursive(_names | _constants, _compound, max_leaves=6)


@given(_numbers | _truths(_numbers), st.data())
def test_a_closure_gives_what_evaluate_gives(expression: ir.Expression, data: st.DataObject) -> None:
    """Any expression has the value of the interpreter, or none where it has none."""
    names: dict[str, Any] = data.draw(st.dictionaries(st.sampled_from(["t", "a", "b"]), st.none() | _number))
    names |= {"step": data.draw(st.integers(0, 9)), "steps": data.draw(st.none() | st.integers(1, 10))}
    environment = Environment(names, {"a": (1.0, 2.0, 3.0)})

    def leaf(node: ir.Expression) -> Closure | None:
        return (lambda _x, _y: evaluate(node, environment)) if isinstance(node, ir.Name) else None

    def outcome(work: Callable[[], Any]) -> str:
        try:
            return repr(work())
        except Undefined:
            return "no value"

    compiled = Compiler(leaf, environment.tables).closure(expression)
    assert outcome(lambda: evaluate(expression, environment)) == outcome(lambda: compiled(None, None))
