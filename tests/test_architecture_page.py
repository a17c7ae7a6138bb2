"""The architecture page names the files in which a reader finds what the page says is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FOUND_BY = {
    "the decision function": "def decide(",
    "the same rules as closures, for the engine": "class Lowered",
    "the place where a hit is answered": "def site_override(",
    "the timestep scale of Mochi": "MochiTransformer3DModel",
    "the facts of a run": "class Fact(",
    "the text of E310": '"E310",',
    "the HTML report": "def page(",
    "the First Block Cache policy": "policy first_block_cache",
    "the clock": "def read(",
    "the selector kinds": '"self_attention"',
    "the names of attention modules": "CROSS_ATTENTION = ",
}
"""A piece of text that only the right file has."""


def paths() -> dict[str, str]:
    """The rows of the table `Where to find it`."""
    section = PAGE.partition("## Where to find it")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| (the .+?) \| `(.+?)` \|$", section, re.MULTILINE))


def test_the_table_has_a_row_for_each_thing() -> None:
    """The page names a path for each of the things that readers look for, and for nothing untested."""
    assert FOUND_BY.keys() == paths().keys()


@pytest.mark.parametrize("thing", FOUND_BY)
def test_the_path_leads_to_the_thing(thing: str) -> None:
    """The file that the page names exists and contains the definition."""
    assert FOUND_BY[thing] in (ROOT / paths()[thing]).read_text(encoding="utf-8")


def test_every_package_is_on_the_map() -> None:
    """The map has a row for each package, and no row for one that is gone."""
    packages = {path.parent.name for path in (ROOT / "cachepolicy").glob("*/__init__.py")}
    section = PAGE.partition("## Packages")[2].partition("\n## ")[0]
    named = {name.partition(".")[0] for name in re.findall(r"^\| `([a-z.]+)`", section, re.MULTILINE)}
    assert packages == named - {"errors"}


def test_every_file_that_is_named_exists() -> None:
    """A path in the table of changes is one of a file or folder."""
    section = PAGE.partition("## I want to add")[2].partition("\n## ")[0]
    named = [name for name in re.findall(r"`([\w./]+)`", section) if "/" in name and "XXX" not in name]
    assert named
    assert [] == [name for name in named if not (ROOT / name).exists() and not (ROOT / "cachepolicy" / name).exists()]
