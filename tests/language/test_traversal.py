"""Rewriting keeps meanings: folded expressions are worth what they were, and sizes are those of what is written out."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cachepolicy.language import ir
from cachepolicy.language.evaluate import Environment, Undefined, evaluate
from cachepolicy.language.traversal import fold_constants, measure_size, substitute, transform, walk

numbers = st.integers(-5, 5).map(lambda value: ir.Number(value=value)) | st.sampled_from([0.5, 2.0, float("inf")]).map(
    lambda value: ir.Number(value=value)
)
names = st.sampled_from(["step", "t", "unknown"]).map(lambda name: ir.Name(name=name))


def arithmetic(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(
        lambda operator, left, right: ir.Arithmetic(operator=operator, left=left, right=right),
        st.sampled_from(["+", "-", "*", "/", "%"]),
        inner,
        inner,
    ) | inner.map(lambda operand: ir.Negative(operand=operand))


values = st.recursive(numbers | names, arithmetic, max_leaves=6)
comparisons = st.builds(
    lambda operator, left, right: ir.Comparison(operators=(operator,), operands=(left, right)),
    st.sampled_from(["<", "<=", ">", ">=", "==", "!="]),
    values,
    values,
) | st.builds(
    lambda value, low, high, closed: ir.Membership(
        value=value, container=ir.Interval(low=low, high=high, low_closed=closed)
    ),
    values,
    numbers,
    numbers,
    st.booleans(),
)
conditions = st.recursive(
    comparisons | st.booleans().map(lambda value: ir.Boolean(value=value)),
    lambda inner: (
        st.tuples(inner, inner).map(lambda operands: ir.Both(operands=operands))
        | st.tuples(inner, inner).map(lambda operands: ir.Either(operands=operands))
        | inner.map(lambda operand: ir.Negation(operand=operand))
    ),
    max_leaves=6,
)
choices = st.builds(
    lambda then, condition, otherwise: ir.Conditional(then=then, condition=condition, otherwise=otherwise),
    values,
    conditions,
    values,
)


def worth(expression: ir.Expression) -> object:
    """The value where `step` and `t` are known, or that it has none."""
    try:
        return evaluate(expression, Environment({"step": 3, "t": 250.0}))
    except Undefined:
        return "undefined"


@given(values | conditions | choices)
def test_folding_changes_no_value(expression: ir.Expression) -> None:
    """A folded expression is worth the same, also where it is worth nothing."""
    before = worth(expression)
    assert before == worth(transform(expression, fold_constants))


@given(values | conditions | choices)
def test_folding_is_done_once(expression: ir.Expression) -> None:
    """What is folded stays as it is, and the original is not touched."""
    text = expression.model_dump_json()
    once = transform(expression, fold_constants)
    assert once == transform(once, fold_constants)
    assert text == expression.model_dump_json()


@given(values | conditions | choices)
def test_nothing_to_rewrite_is_the_same_object(expression: ir.Expression) -> None:
    """A rewrite that changes nothing copies nothing."""
    assert transform(expression, lambda node: node) is expression


@given(values | conditions, values)
def test_sizes_are_those_of_the_whole(expression: ir.Expression, let: ir.Expression) -> None:
    """Counting a name as what it stands for gives the size of what is written out."""
    written = substitute(expression, {"step": let})
    nodes, depth = measure_size(expression, {"step": measure_size(let, {})})
    assert sum(1 for _ in walk(written)) == nodes
    assert measure_size(written, {}) == (nodes, depth)
