"""The Pareto front, the tables, the page and the chart of a comparison."""

from __future__ import annotations

import base64
import math
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepolicy.reports.comparison import Distance, Row, markdown_table, pareto_front, text_table
from cachepolicy.reports.html.comparison import PictureRow, Summary, comparison_page, plot
from tests.support.browser import Shown, launched


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


def test_a_bar_in_a_name_starts_no_cell():
    """It is escaped in Markdown."""
    named = replace(row(0, 0.5, 40.0), name="a | b")
    assert markdown_table([named]).splitlines()[2].startswith(r"| a \| b | 0.500 |")


def comparison() -> str:
    """A page with a tuning's summary, rows, pictures and a policy."""
    rows = [
        row(0, 1.0, math.inf),
        row(1, 0.5, 41.27),
        Row("<b>", "baseline", "row 1", "UniPC", 5, 0.5, 5, Distance((30.0,), 30.0, 30.0), None, 1.0, 2.0, 2.0),
    ]
    summary = Summary([("Cost", "0.5", "of all calls")], [(0.2, 30.0), (0.5, 40.0)], [(0.5, 41.0)], "CRCR")
    pixel = base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    )
    pictures = [PictureRow("row 1", pixel, pixel)]
    policies = {"row 1": "match model -> compute # </pre><script>alert(1)</script>"}
    return comparison_page("A comparison", rows, policies=policies, pictures=pictures, summary=summary)


def test_a_page_escapes_what_others_wrote():
    """Names and policies are text, never markup."""
    text = comparison()
    assert "<script" not in text
    assert "&lt;b&gt;" in text


def test_a_plot_is_an_svg_file_with_the_names():
    """It is well-formed, and each row has a mark with its name."""
    drawing = ET.fromstring(plot([row(0, 1.0, 50.0), row(1, 0.5, 41.27)]))
    texts = [element.text for element in drawing.iter() if element.tag.endswith("text")]
    assert {"row 0", "row 1"} <= {*texts}


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_a_page_opens_quietly(browser, tmp_path, width, scheme):
    """No error, no request but for the file itself and no sideways scroll."""
    path = tmp_path / "compare.html"
    path.write_text(comparison(), encoding="utf-8")
    with Shown(browser, path, width=width, scheme=scheme) as shown:
        assert [] == shown.console
        assert [path.as_uri()] == [each for each in shown.requests if not each.startswith("data:")]
        assert width == shown.page.evaluate("document.documentElement.scrollWidth")
        assert 2 == shown.page.locator("svg").count()
