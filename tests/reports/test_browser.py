"""The report in a real browser: keyboard, pointer, branches, schemes, sizes, and that nothing leaves the machine."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from cachepolicy.reports.html.page import page
from cachepolicy.reports.run_record import Picture, RunRecord
from tests.support import report_data as reports
from tests.support.browser import Shown, launched


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reports") / "flux.html"
    path.write_text(page([reports.flux()]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def drifting(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reports") / "drifting.html"
    path.write_text(page([reports.drifting().last]), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["flux", "drifting"])
def test_a_page_opens_quietly(browser, request, name, width, scheme):
    """No error, no request but for the file itself, nothing caught of what the policy planted, no sideways scroll."""
    path = request.getfixturevalue(name)
    with Shown(browser, path, width=width, scheme=scheme) as shown:
        shown.page.locator("td").first.click()
        for each in shown.page.locator("summary").all():
            each.click()
        assert [] == shown.console
        assert [path.as_uri()] == [each for each in shown.requests if each != "data:,"]
        assert shown.page.evaluate("window.caught") is None
        assert width == shown.page.evaluate("document.documentElement.scrollWidth")


def test_the_grid_is_walked_with_the_keyboard(browser, flux):
    """One cell is reached by tab; arrows, Home and End move from there, and stop at the edges."""
    with Shown(browser, flux) as shown:
        assert 2 == shown.page.locator(".grid td[tabindex='0']").count()  # one in each branch's grid
        shown.page.locator(".grid td[tabindex='0']:visible").focus()
        press = shown.page.keyboard.press
        first = shown.focused()
        assert 0 == first[1]
        press("ArrowLeft")
        press("ArrowUp")
        assert first == shown.focused()
        press("ArrowRight")
        press("ArrowDown")
        second = shown.focused()
        assert 1 == second[1]
        assert first[0] != second[0]
        press("End")
        assert (second[0], 49) == shown.focused()
        press("ArrowRight")
        assert (second[0], 49) == shown.focused()
        press("Control+Home")
        assert first == shown.focused()
        press("Control+End")
        assert 49 == shown.focused()[1]
        press("Home")
        assert 0 == shown.focused()[1]
        assert 1 == shown.page.locator(".grid:visible td[tabindex='0']").count()


@pytest.mark.parametrize("width", [360, 1280])
def test_the_reasons_never_cover_the_cell(browser, flux, width):
    """However far one walks through all sites, the cell with the focus is whole in view and above its reasons."""
    with Shown(browser, flux, width=width) as shown:
        for button in shown.page.locator(".grid:visible button").all():
            button.click()
        shown.page.locator(".grid td[tabindex='0']:visible").focus()
        for key in ["ArrowDown"] * 45 + ["End", "PageUp", "PageUp", "Control+End", "Control+Home"]:
            shown.page.keyboard.press(key)
            cell = shown.page.locator(".grid td:focus").bounding_box()
            reasons = shown.page.locator(".inspector").bounding_box()
            assert cell["y"] >= 0
            assert cell["y"] + cell["height"] <= min(reasons["y"], 800)
            assert 0 <= cell["x"] <= width - cell["width"]


def test_a_focused_cell_is_seen_and_named(browser, flux):
    """It has an outline, a name for screen readers with rule and reason, and the reasons as its description."""
    with Shown(browser, flux) as shown:
        cell = shown.page.locator(".grid:visible td.R").first
        shown.page.locator(".grid td[tabindex='0']:visible").focus()
        cell.click()
        assert "solid" == cell.evaluate("(cell) => getComputedStyle(cell).outlineStyle")
        assert "reuses, rule 2: the rule reuses" == cell.get_attribute("aria-label")
        described = shown.page.locator(f"#{cell.get_attribute('aria-describedby')}")
        assert "owns the step" in described.inner_text()


def test_a_cell_says_which_rule_decided_and_why(browser, drifting):
    """On focus and on pointing: site, step, decision, the rule's text, each clause with its numbers."""
    with Shown(browser, drifting) as shown:
        cells = shown.page.locator(".grid tbody tr").filter(has_text="transformer_blocks[1:8]").first.locator("td")
        cells.nth(2).click()
        told = shown.told()
        for words in ("transformer_blocks[1:8]", "step 2", "computes", "its `while` is false", "Rule 1 owns the step"):
            assert words in told
        assert "match blocks[1:] while drift <= 0.1 -> reuse residual" in told
        assert "no while drift <= 0.1 (drift = 0.2)" in told
        cells.nth(3).hover()
        assert "drift = 0.05" in shown.told()
        assert "step 3" in shown.told()
        shown.page.locator("h1").hover()
        assert "step 2" in shown.told()


def test_a_reuse_is_explained_when_the_page_opens(browser, drifting):
    """Its cell is marked until another one is chosen."""
    with Shown(browser, drifting) as shown:
        chosen = shown.page.locator("td[data-chosen]")
        assert "R" == chosen.inner_text()
        assert "reuses" in shown.told()
        shown.page.locator("td").first.click()
        assert 0 == chosen.count()


def test_samples_scroll_in_their_own_box(browser, tmp_path):
    """On a phone the page itself does not scroll sideways, and all pictures are drawn."""
    dot = base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")
    pictures = [Picture(f"picture {number}", "image/gif", dot) for number in range(5)]
    rows = [("seed 0, uncached", *["1.00"] * 5)]
    heads = ("sample", "seconds of the call", "of these in the model", "PSNR, dB", "SSIM", "LPIPS")
    record = RunRecord("Samples", [("Prompt", "a " * 200)], heads, rows, pictures=[("Seed 0", pictures)])
    path = tmp_path / "run.html"
    path.write_text(page([reports.drifting().last], record=record), encoding="utf-8")
    with Shown(browser, path, width=360) as shown:
        assert [] == shown.console
        assert 360 == shown.page.evaluate("document.documentElement.scrollWidth")
        box = shown.page.locator(".pictures")
        assert box.evaluate("box => box.scrollWidth > box.clientWidth")
        assert [1] * 5 == shown.page.locator(".pictures img").evaluate_all("all => all.map((one) => one.naturalWidth)")


def test_sites_alike_open_and_close(browser, flux):
    """A row of several sites opens to a row for each, by its button or by Enter, and says whether it is open."""
    with Shown(browser, flux) as shown:
        button = shown.page.locator(".grid:visible button").first
        assert "false" == button.get_attribute("aria-expanded")
        inner = shown.page.locator(".grid:visible tbody").first.locator("tr.inner")
        assert not inner.first.is_visible()
        button.click()
        assert "true" == button.get_attribute("aria-expanded")
        assert [True] * inner.count() == [each.is_visible() for each in inner.all()]
        shown.page.locator(".grid:visible td").first.click()
        assert "sites are decided alike" in shown.told()
        shown.page.keyboard.press("ArrowDown")
        assert "transformer_blocks.0.attn" == shown.focused()[0]
        shown.page.keyboard.press("ArrowUp")
        shown.page.keyboard.press("Enter")
        assert "false" == button.get_attribute("aria-expanded")


def test_a_branch_is_chosen(browser, flux):
    """One branch is shown at a time; its radio button shows the other, by keyboard too."""
    with Shown(browser, flux) as shown:
        grids = {name: shown.page.locator(f"[data-branch={name}] .grid") for name in ("cond", "uncond")}
        assert [True, False] == [grid.is_visible() for grid in grids.values()]
        shown.page.get_by_role("radio", name="cond", exact=True).focus()
        shown.page.keyboard.press("ArrowRight")
        assert [False, True] == [grid.is_visible() for grid in grids.values()]
        shown.page.locator(".grid:visible td").first.click()
        assert "branch uncond" in shown.told()


def test_cells_show_rules_instead(browser, flux):
    """The letters give way to the numbers of the rules, and come back."""
    with Shown(browser, flux) as shown:
        cell = shown.page.locator(".grid:visible td.R").first
        shown.page.get_by_label("the rule").check()
        assert "2" == cell.inner_text()
        shown.page.get_by_label("the decision").check()
        assert "R" == cell.inner_text()


def test_light_and_dark_have_colours_of_their_own(browser, flux):
    """The page follows the system's scheme."""
    found = []
    for scheme in ("light", "dark"):
        with Shown(browser, flux, scheme=scheme) as shown:
            found.append(shown.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    light, dark = ([int(part) for part in each.strip("rgb()").split(",")] for each in found)
    assert min(light) > 200
    assert max(dark) < 60


@pytest.mark.parametrize("width", [360, 1280])
def test_long_names_give_way(browser, flux, width):
    """A long name never widens its column beyond half of a phone; it gives way inside, and the grid scrolls inside."""
    with Shown(browser, flux, width=width) as shown:
        heads = shown.page.locator(".grid:visible tbody tr:not(.inner) th").all()
        assert all(head.bounding_box()["width"] <= max(0.5 * width, 330) for head in heads)
        assert all(head.evaluate("(head) => head.scrollWidth <= head.clientWidth") for head in heads)
        grid = shown.page.locator(".grid:visible")
        assert grid.evaluate("(grid) => grid.scrollWidth >= grid.clientWidth")
        grid.evaluate("(grid) => { grid.scrollLeft = 200; }")
        assert heads[0].bounding_box()["x"] >= 0


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
@pytest.mark.parametrize("name", ["flux", "drifting"])
def test_axe_finds_nothing(browser, request, name, width, scheme):
    """The rules of axe-core about contrast, names, roles, focus and structure hold."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with Shown(browser, request.getfixturevalue(name), width=width, scheme=scheme, bypass_csp=True) as shown:
        shown.page.locator(".grid:visible td").nth(3).click()
        for each in shown.page.locator("summary").all():
            each.click()
        found = axe.run(shown.page).response["violations"]
        assert [] == [(each["id"], each["help"], each["nodes"][0]["html"]) for each in found]
