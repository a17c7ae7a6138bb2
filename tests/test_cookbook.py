"""The cookbook is that of the policies as they are."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("diffusers")

from benchmarks import cookbook
from cachepolicy._resources import shipped_policies
from cachepolicy.engine.introspection import describe
from cachepolicy.tools.emoji import load_pipeline


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """The numbers that the pages were written from."""
    return json.loads(cookbook.MEASURED.read_text("utf-8"))


@pytest.mark.parametrize("name", sorted(json.loads(cookbook.MEASURED.read_text("utf-8"))))
def test_a_page_shows_the_policy_as_it_is(name: str, measured: dict[str, Any]) -> None:
    """Its text, params and grid are today's, and its numbers were measured with a policy that meant the same."""
    assert cookbook.digest(name) == measured[name]["digest"], "measure it again: python -m benchmarks.cookbook " + name
    skeleton = describe(load_pipeline().transformer)
    expected = cookbook.page(name, measured[name], skeleton)
    assert expected == (cookbook.FOLDER / f"{name}.md").read_text("utf-8"), "python -m benchmarks.cookbook --pages"
    assert (cookbook.FOLDER / f"{name}.png").is_file()


@pytest.mark.parametrize("name", sorted(cookbook.TEXTS))
def test_a_page_with_words_is_that_of_its_policy(name: str, measured: dict[str, Any]) -> None:
    """Its text, params, presets and grid are today's, whether it was measured or not."""
    expected = cookbook.page(name, measured.get(name), describe(load_pipeline().transformer))
    assert expected == (cookbook.FOLDER / f"{name}.md").read_text("utf-8"), "python -m benchmarks.cookbook --pages"


def test_the_index_names_all(measured: dict[str, Any]) -> None:
    """Every shipped policy has a page or stands among those without one, and no page lacks a policy."""
    index = cookbook.index(sorted(measured))
    assert index == (cookbook.FOLDER / "index.md").read_text("utf-8"), "python -m benchmarks.cookbook --pages"
    pages = {*measured, *cookbook.TEXTS}
    assert pages <= {*shipped_policies()}
    assert all(f"\n{name}\n" in index for name in pages)
    assert all(f"`{name}`" in index for name in {*shipped_policies()} - pages)
