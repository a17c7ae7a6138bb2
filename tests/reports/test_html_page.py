"""The report says what the trace says, and nothing that a policy or a model says becomes part of the page."""

from __future__ import annotations

import html
import itertools
import json
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cachepolicy
from cachepolicy.language.highlighting import coloured
from cachepolicy.planning.cost_model import Work, forecast, format_bytes
from cachepolicy.planning.module_tree import sites_skeleton
from cachepolicy.planning.schedule import Tick
from cachepolicy.planning.simulation import replay, simulate
from cachepolicy.planning.tally import tally
from cachepolicy.reports.html.page import page
from cachepolicy.reports.run_record import Picture, RunRecord
from cachepolicy.reports.stats import curves, gains, points
from cachepolicy.reports.text import draw
from cachepolicy.testing import strategies
from cachepolicy.tracing.trace import Trace, from_json
from tests.support import report_data as reports


class Page(HTMLParser):
    """The parts of a page that tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements = Counter[str]()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.figures: dict[str, str] = {}
        self.rows: list[tuple[str, str]] = []
        self.data: dict = {}
        self.texts: list[tuple[list[str], str]] = []
        self._path: list[str] = []
        self._head = ""
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.elements[name] += 1
        self.attributes += [(name, key, value) for key, value in attributes]
        self._path.append(name)
        if name == "tr":
            self.rows.append((dict(attributes).get("class") or "", ""))

    def handle_endtag(self, name):
        while self._path and self._path.pop() != name:
            pass

    def handle_data(self, text):
        inside = self._path[-1:] or [""]
        self.texts.append((list(self._path), text))
        if inside == ["dt"]:
            self._head = text
        elif self._path[-2:] == ["dd", "b"]:
            self.figures[self._head] = text
        elif self._path[-2:] == ["dd", "small"]:
            self.figures[self._head] += f" ({text})"
        elif inside == ["td"] and text in "CR·":
            kind, letters = self.rows[-1]
            self.rows[-1] = kind, letters + text.replace("·", ".")
        elif inside == ["script"] and text.startswith("{"):
            self.data = json.loads(text)

    def text_of(self, name: str) -> str:
        """The text of the first element of that name."""
        start = next(index for index, (path, _) in enumerate(self.texts) if name in path)
        inside = itertools.takewhile(lambda piece: name in piece[0], self.texts[start:])
        return "".join(text for _, text in inside)


def letters(read: Page) -> list[str]:
    """The rows of the grids, without those that repeat the row above for each of its sites."""
    return [row for kind, row in read.rows if row and kind != "inner"]


# --- numbers


@given(policy=strategies.policies(steps=6), timesteps=strategies.timesteps(6, 6), branches=strategies.branches())
def test_the_grid_is_the_trace(policy, timesteps, branches):
    """Every site has a row in every branch, with the letters of the trace; the page's reasons are the decisions'."""
    schedule = simulate(policy, steps=6, timesteps=timesteps, branches=branches)
    trajectory = reports.as_trace(schedule).last
    read = Page(page([trajectory]))
    expected, told = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for branch in branches:
        expected.update(trajectory.rows(branch).items())
    reasons, texts = read.data.get("reasons", []), read.data.get("texts", [])
    word = {"computes": "C", "reuses": "R", "is hidden": "."}
    for row in read.data["rows"]:
        if row["count"] == 1:
            told[row["site"], "".join(word[reasons[cell][0]] for cell in row["cells"])] += 1
    assert expected == told
    said = Counter(
        (reasons[cell][1], texts[reasons[cell][2]])
        for row in read.data["rows"]
        if row["count"] == 1
        for cell in row["cells"]
    )
    made = Counter(
        (-1 if each.rule is None else each.rule, each.reason) for _, decisions in schedule for each in decisions
    )
    assert made == said
    drawn = [row for _, row in read.rows if row]
    assert sorted("".join(word[reasons[cell][0]] for cell in row["cells"]) for row in read.data["rows"]) == sorted(
        drawn
    )


def test_the_figures_are_the_trace():
    """Skipped calls and FLOPs, time, memory and speed-ups are those of the trajectory."""
    trajectory = reports.drifting().last
    work = Work(1000, {name: 10 for site in trajectory.plan.sites for name in site.modules})
    figures = Page(page([trajectory], work=work)).figures
    counted, outlook = tally(trajectory).calls, forecast(trajectory.plan, trajectory, work)
    skipped, total = counted["reuse"] + counted["hidden"], sum(counted.values())
    assert (
        f"{100 * skipped / total:.1f} % ({skipped} of {total}, {counted['hidden']} of them hidden)"
        == figures["Site calls skipped"]
    )
    assert f"{100 * outlook.share:.1f} %" == figures["FLOPs skipped"].partition(" (")[0]
    assert f"{outlook.speed_up:.2f}×" == figures["Speed-up of the model, predicted"].partition(" ")[0]
    assert f"{sum(call.seconds for call in trajectory.calls):.4g} s" == figures["Time in the model"].partition(" (")[0]
    assert "8.0 KiB" == figures["Memory held"].partition(" (")[0]
    assert f"8 (8 calls of the model, {len(trajectory.plan.sites)} sites)" == figures["Steps"]


def test_a_speed_up_is_measured_against_what_is_known():
    """Against the caller's seconds, else against calls that computed everything; without those it is not told."""
    trajectory = reports.as_trace(simulate("fora", steps=8)).last
    assert 10.0 == gains(trajectory, uncached=10 * trajectory.seconds).speed_up
    assert {0.5} == {call.seconds for call in trajectory.calls if all(each.computes for each in call.decided)}
    assert pytest.approx(8 * 0.5 / trajectory.seconds) == gains(trajectory).speed_up
    trajectory.calls[1:] = [call for call in trajectory.calls[1:] if call.seconds == 0.125]
    assert gains(trajectory).speed_up is None
    assert "Speed-up of the model, measured" not in Page(page([trajectory])).figures
    assert gains(reports.flux(4)).seconds is None


def test_two_denoisers_share_what_was_measured():
    """The seconds of the uncached run are those of all denoisers, so each part has the speed-up of all."""
    first, second = reports.drifting().last, reports.as_trace(simulate("fora", steps=8)).last
    text = page([first, second], uncached=3 * (first.seconds + second.seconds))
    assert ["3.00×"] * 2 == re.findall(r"<dt>Speed-up of the model, measured</dt><dd><b>([^<]*)</b>", text)


def test_rules_stand_beside_their_share():
    """Each rule of the policy's text, and each that comes by `use`, has its share of the decisions."""
    trajectory = reports.drifting().last
    text, counted = page([trajectory]), tally(trajectory)
    total = sum(counted.calls.values())
    shares = re.findall(r"<b>Rule (\d+)</b> decides ([\d.]+) %, reuses (\d+) of (\d+)", text)
    expected = [
        (
            str(bound.index + 1),
            f"{100 * counted.owned[bound.index] / total:.1f}",
            str(counted.reused[bound.index]),
            str(counted.owned[bound.index]),
        )
        for bound in trajectory.plan.rules
    ]
    assert expected == shares
    assert "Rules that it uses" in text
    assert trajectory.plan.resolved.digest in text


def test_rules_that_do_nothing_say_so():
    """A rule that takes nothing and one whose schedule is off are told from one that never decides."""
    assert "Rule 4 takes nothing here" in page([reports.flux(4)])
    assert 2 == page([simulate("pab", steps=4)]).count('<p class="share">off</p>')


def test_signals_stand_against_their_limits():
    """The curve of a rule has the measured values, its limit and the decisions, in the drawing and in the table."""
    trajectory = reports.drifting().last
    (drift,) = curves(trajectory.plan)
    assert "drift <= 0.1" == drift.text
    run = points(trajectory.plan, drift, trajectory.plan.rules[0].sites[0], list(trajectory), "")
    assert reports.DRIFTS == [point.value for point in run]
    assert {0.1} == {point.limit for point in run}
    text = page([trajectory])
    assert all(f"step {step}: {value:.4g} &lt;= 0.1?" in text for step, value in enumerate(reports.DRIFTS))
    assert sum(point.decision.computes for point in run) == len(re.findall(r'class="mark computes"', text))


def test_accumulators_and_chains_are_curves_too():
    """A sum over what was measured is the curve of its rule; a chain has two limits; the clock alone is none."""
    policy = cachepolicy.parse(
        "signal drift = l1(input(blocks[0]))\n"
        'match "attn1" while sum(drift) < 0.5 and t > 10 -> reuse\n'
        'match "attn2" while 0.1 < drift <= 0.4 or drift in [0.6, 0.7) -> reuse\n'
        'match "ff" while step - kept(step) < 3 -> reuse\n'
    )
    schedule = simulate(policy, steps=4, signals={"drift": 0.2})
    texts = [each.text for each in curves(schedule.plan)]
    assert [
        "sum(drift) < 0.5",
        "drift > 0.1",
        "drift <= 0.4",
        "drift >= 0.6",
        "drift < 0.7",
        "step - kept(step) < 3",
    ] == texts
    total = points(schedule.plan, curves(schedule.plan)[0], schedule.plan.rules[0].sites[0], list(schedule), "")
    assert [0.2, 0.2, 0.4, 0.6] == pytest.approx([point.value for point in total])
    assert [True, False, False, True] == [point.decision.computes for point in total]


def test_an_undefined_number_is_shown_as_such():
    """Where a signal has no value the table says so, and the drawing has a cross."""
    trace = reports.drifting()
    text = trace.to_json().replace('"drift": 0.3', '"drift": "NaN"')
    drawn = page([from_json(text).last])
    assert "step 5: undefined &lt;= 0.1? computes" in drawn
    assert 'class="mark none computes"' in drawn


def test_nothing_is_a_page_too():
    """No trajectory, no site, no call: the page says so."""
    assert "Nothing has run yet." in page([])
    assert "every module computes" in page([simulate(cachepolicy.parse('match optional "nowhere" -> skip'), steps=2)])


def test_two_denoisers_have_a_part_each():
    """Trajectories stand one below the other, with names of their own."""
    read = Page(page([reports.drifting().last, reports.flux(4)]))
    assert 2 == read.elements["article"]
    ids = [value for _, key, value in read.attributes if key == "id"]
    assert len(set(ids)) == len(ids)


def test_the_terminal_tells_time_and_memory():
    """The grid of a trace ends with the seconds and the most bytes held."""
    trajectory = reports.drifting().last
    assert (
        f"{trajectory.seconds:.2f} s in 8 calls of the model, at most 8.0 KiB held" == draw(trajectory).splitlines()[-1]
    )


# --- what others say is text


def test_nothing_of_a_policy_or_a_model_becomes_markup():
    """Titles, notes, sources and site names that are markup stand in the page as text, and in scripts as data."""
    text = page([reports.flux(4)])
    read, plain = Page(text), Page(page([simulate("fora", steps=4, branches=("cond", "uncond"))]))
    assert set(plain.elements) == set(read.elements)
    assert 2 == read.elements["script"]
    assert not [key for _, key, _ in read.attributes if key.startswith("on")]
    assert reports.HOSTILE in html.unescape(text)
    assert any("<script>" in row["site"] for row in read.data["rows"])


def test_a_page_loads_nothing():
    """There is no address in it but the empty icon, and the policy of the page forbids what could load one."""
    read = Page(page([reports.drifting().last]))
    assert {"data:,"} == {value for _, key, value in read.attributes if key in {"src", "href", "action", "srcset"}}
    (content,) = [
        value for name, key, value in read.attributes if name == "meta" and key == "content" and "default-src" in value
    ]
    assert "default-src 'none'" in content


STRINGS = st.text(st.characters(categories=("L", "N", "P", "S"), exclude_characters='"'))
"""What a policy can say in a string."""


@given(title=STRINGS, source=STRINGS, name=st.text(st.characters(exclude_characters="."), min_size=1))
def test_text_cannot_end_what_it_stands_in(title, source, name):
    """Any title, source and site name is read back from elements, attributes and the script's data as it was."""
    policy = cachepolicy.parse("match attention every 2 -> reuse")
    policy = policy.model_copy(update={"title": title, "source": source})
    schedule = simulate(policy, steps=2, skeleton=sites_skeleton([f"blocks.0.attn{name}"]))
    read = Page(page([schedule]))
    plain = Page(page([simulate(policy, steps=2, skeleton=sites_skeleton(["blocks.0.attn"]))]))
    assert plain.elements == read.elements
    titles = [value for _, key, value in read.attributes if key == "title"]
    assert [f"blocks.0.attn{name}"] == titles
    assert f"blocks.0.attn{name}" == read.data["rows"][0]["site"]
    assert f"{title or 'a policy'} on names" == read.text_of("h1")
    lead = f"The policy is from {source}. " if source else ""
    assert f"What a run will do. {lead}Its hash is {schedule.plan.resolved.digest}." == read.text_of("p")


# --- size


def test_many_sites_are_a_page_of_moderate_size():
    """114 sites, 50 steps and two branches stay below half a mebibyte."""
    assert len(page([reports.flux()]).encode()) < 2**19


def test_many_different_numbers_are_a_page_of_moderate_size():
    """The same where every site has signals of its own: below two mebibytes."""
    policy = cachepolicy.parse("signal drift = l1(input(blocks[0]))\nmatch attention while drift < 0.5 -> reuse\n")
    names = [f"blocks.{block}.attn" for block in range(114)]
    plan = cachepolicy.plan(policy, sites=names)
    ticks = [Tick(step, 999.0 - step, 50) for step in range(50)]
    signals = {site: {"drift": [site / 1000 + step / 100 for step in range(50)]} for site in range(114)}
    measured = {
        (tick.step, ""): {site: {"drift": signals[site]["drift"][tick.step]} for site in signals} for tick in ticks
    }
    text = page([reports.as_trace(replay(plan, ticks, signals=measured), signals).last])
    assert len(text.encode()) < 2**21
    assert "6 of 114 different curves are drawn" in text


def test_bytes_have_units():
    """A number of bytes is written with the unit that fits."""
    assert ["512 B", "1.5 KiB", "2.0 MiB", "3.0 GiB"] == [
        format_bytes(each, digits=1) for each in (512, 1536, 2**21, 3 * 2**30)
    ]


# --- notebooks


def test_notebooks_show_a_table():
    """A schedule, a trajectory and a trace have a compact table: no script, the rows folded, names escaped."""
    for shown in (reports.flux(4), reports.drifting().last, reports.drifting()):
        text = shown._repr_html_()
        assert "<script" not in text
        assert "<table" in text
        assert "site calls" in text
    assert "branch cond" in reports.flux(4)._repr_html_()
    assert "nothing has run yet" in Trace()._repr_html_()


def test_samples_stand_above_what_the_policy_did():
    """Facts, the table and the pictures of each seed are shown as text and data; labels tell seeds apart."""
    record = RunRecord(
        f"Samples {reports.HOSTILE}",
        [("Prompt", reports.HOSTILE), ("Seeds", "1, 2")],
        ("sample", "seconds of the call"),
        [("seed 1, uncached", "2.00")],
        "Each sample was made once.",
        [("Seed 1", [Picture("uncached", "image/png", b"png")])],
    )
    first, second = reports.drifting().last, reports.as_trace(simulate("fora", steps=8)).last
    text = page([first, second], uncached=[3 * first.seconds, 2 * second.seconds], labels=["seed 1"], record=record)
    assert ["3.00×", "2.00×"] == re.findall(r"<dt>Speed-up of the model, measured</dt><dd><b>([^<]*)</b>", text)
    assert 'src="data:image/png;base64,cG5n"' in text
    assert '<th scope="row">seed 1, uncached</th><td>2.00</td>' in text
    assert "on builtin, seed 1</h1>" in text
    assert "<img src=x" not in text


def test_a_policy_is_coloured_without_changing_its_text():
    """The pieces make up the text, each with its role."""
    text = 'cachepolicy 1\n# why\nparam n: int = 2 in [1, inf)\nmatch "a" every n at most 3 in a row -> reuse\n'
    pieces = list(coloured(text))
    assert text == "".join(piece for piece, _ in pieces)
    assert {("match", "statement"), ("reuse", "action"), ('"a"', "string"), ("# why", "comment")} <= set(pieces)
    assert '<span class="act">reuse</span>' in page([simulate("fora", steps=4)])
