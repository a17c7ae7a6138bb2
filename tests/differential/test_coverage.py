"""The page about coverage says what running every model under every policy gives, and no row gets worse."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

from coverage_table import RANKS, TABLE, recorded, row, table, worse

from tests.support import zoo

pytestmark = [pytest.mark.filterwarnings("ignore")]

EXAMPLES = ("dit", "wan", "flux", "unet2d_condition", "wan_vace", "krea2")
"""The rows of the fast tier, one of each kind."""

ROWS = [pytest.param(name, marks=() if name in EXAMPLES else pytest.mark.deep) for name in zoo.names()]


@pytest.mark.parametrize("name", ROWS)
def test_no_row_gets_worse(name: str) -> None:
    """What ran runs, and what was equal to diffusers is equal."""
    assert worse(recorded()[name], row(name)) == []


def test_every_model_has_a_row() -> None:
    """The record holds the zoo, in its order."""
    assert list(recorded()) == list(zoo.names())


def test_the_page_is_the_record() -> None:
    """Nobody edits the page by hand."""
    assert TABLE.read_text("utf-8") == table(recorded())


def test_nothing_is_wrong_or_fails() -> None:
    """Every model runs, or is refused with a reason."""
    bad = RANKS[RANKS.index("wrong") :]
    assert [
        (name, policy) for name, cells in recorded().items() for policy in cells if cells[policy]["ours"] in bad
    ] == []
