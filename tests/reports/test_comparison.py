"""The Pareto front and the tables of a comparison."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from cachepolicy.reports.comparison import Distance, Row, markdown_table, pareto_front, text_table


def row(number: int, cost: float, psnr: float) -> Row:
    distance = Distance((psnr,), psnr, psnr)
    return Row(f"row {number}", "policy", None, "Euler", 10, cost, 10 * cost, distance, None, 1.0, 1.0, 1.0)


POINTS = st.lists(st.tuples(st.sampled_from([0.2, 0.3, 0.5, 1.0]), st.sampled_from([30.0, 40.0, math.inf])))


@given(POINTS)
def test_the_front_is_what_nothing_beats(points):
    """A row is on it unless another one is as cheap and as near, and better in one; of equal rows one is on it."""
    rows = [row(number, *point) for number, point in enumerate(points)]
    beaten = {one for one in points for other in points if other != one and other[0] <= one[0] and other[1] >= one[1]}
    front = [(one.cost, one.uncached.mean) for one in pareto_front(rows, "uncached")]
    assert sorted({*points} - beaten) == front


def test_the_reference_is_not_on_its_front():
    """A row without a distance from the reference is left out."""
    assert [] == pareto_front([row(0, 0.5, 30.0)], "converged")


def test_tables_have_a_line_for_each_row():
    """Equal samples are called so, and columns without numbers are left out."""
    rows = [row(0, 1.0, math.inf), row(1, 0.5, 41.27)]
    text = text_table(rows)
    assert 3 == len(text.splitlines()) == len(markdown_table(rows).splitlines()) - 1
    assert "equal" in text
    assert "41.3" in text
    assert "converged" not in text
