"""The report of a real run, from Python and from the command line, and the files that are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import cachepolicy
from cachepolicy.cli.commands import main
from cachepolicy.errors import PolicyError
from cachepolicy.language.parser import parse
from cachepolicy.testing.models import Toy, ToyDiT
from cachepolicy.tools.flops import Flops, count, counting
from tests.support import report_data as reports

POLICY = parse('policy toy "A toy"\nmatch self_attention every 2 -> reuse\n')
TIMESTEPS = [900.0, 600.0, 300.0, 100.0]


def arguments(t: float = 900.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4, 8, generator=generator), torch.randn(2, 3, 8, generator=generator)
    return x, torch.tensor([t, t]), y


def sampled(model: ToyDiT) -> None:
    with torch.no_grad():
        for t in TIMESTEPS:
            model(*arguments(t))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "trace.json"
    reports.drifting().save(path)
    return path


def report(*given: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["report", *map(str, given)], env={"COLUMNS": "120", "NO_COLOR": "1"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


def test_a_run_reports_itself(tmp_path):
    """The report of a live run is given and written; with FLOPs it names those that were skipped."""
    model = Toy(blocks=2).build()
    flops = count(model, *arguments())
    with cachepolicy.apply(model, POLICY) as run:
        sampled(model)
        text = run.report(tmp_path / "report.html", flops=flops, uncached=100.0)
    assert text == (tmp_path / "report.html").read_text("utf-8")
    assert "A toy on ToyDiT" in text
    assert "against the uncached run" in text
    assert "FLOPs skipped" not in run.report()
    assert "site calls skipped" in run._repr_html_()


def test_the_flops_that_a_report_names_are_those_that_did_not_run():
    """What the report subtracts is what a count of the real run lacks."""
    model = Toy(blocks=2).build()
    once = count(model, *arguments())
    with cachepolicy.apply(model, POLICY) as run, counting(model) as ran:
        sampled(model)
    work = cachepolicy.planning.cost_model.Work(once.total, once.modules)
    outlook = cachepolicy.planning.cost_model.forecast(run.plan, run.trace.last, work)
    assert ran.total == outlook.total - outlook.skipped
    assert f"{100 * outlook.share:.1f} %" in run.report(flops=Flops(once.total, once.modules))


def test_a_run_without_a_trace_has_no_report():
    """The error says what to ask `apply` for."""
    model = Toy().build()
    with cachepolicy.apply(model, POLICY, trace=False) as run, pytest.raises(PolicyError, match="keeps no trace"):
        run.report()
    assert "keeps no trace" in run._repr_html_()


def test_two_denoisers_are_reported_together():
    """Of a session that ran through several models, each has its part; of earlier sessions none has."""
    trace = reports.drifting()
    earlier, other = reports.flux(2), reports.as_trace(reports.flux(2)).last
    trace.begin("another", earlier.plan)
    trace.begin(("session", "mine"), other.plan).calls.extend(other.calls)
    assert [other.plan, trace.trajectories[0].plan] == [each.plan for each in reversed(trace.latest)]
    assert () == cachepolicy.tracing.trace.Trace().latest


# --- the command


def test_a_saved_trace_is_drawn(saved):
    """Without a file to write, the grid, the rules' shares and the time are printed."""
    code, text = report(saved)
    assert 0 == code
    assert "CRCRRCCR" in text
    assert "rule 1: owns 8 calls, answers 4" in text
    assert "8 calls of the model" in text


def test_files_are_written(saved, tmp_path):
    """The page is that of Python, and the document for viewers is JSON."""
    code, _ = report(saved, "--html", tmp_path / "r.html", "--perfetto", tmp_path / "r.json")
    assert 0 == code
    text = (tmp_path / "r.html").read_text("utf-8")
    assert text == cachepolicy.reports.html.page.page(cachepolicy.load_trace(saved).latest)
    assert 8 == sum(event["ph"] == "X" for event in json.loads((tmp_path / "r.json").read_text())["traceEvents"])


def test_the_report_as_data(saved):
    """`--json` gives sites, rows, rules and counts of each trajectory."""
    (part,) = json.loads(report(saved, "--json")[1])
    assert "drifting" == part["policy"]
    assert 8 == len(part["timesteps"])


def test_the_schema_is_printed():
    """`--schema` needs no trace."""
    code, text = report("--schema")
    assert 0 == code
    assert "cachepolicy_trace" in json.loads(text)["properties"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "name a saved trace"),
        (("gone.json",), "error[E260]: `gone.json` cannot be read: no such file"),
        (("{saved}", "--html", "{saved}/r.html"), "error[E152]: `{saved}/r.html` cannot be written"),
    ],
)
def test_what_cannot_be_read_or_written_is_said(saved, given, said):
    """Exit code 2, and the file's name."""
    code, text = report(*(each.format(saved=saved) for each in given))
    assert 2 == code
    assert said.format(saved=saved) in text


def test_reports_are_made_without_torch(saved):
    """A saved trace is read, drawn and written where torch is not installed."""
    from tests.test_package import ROOT, run_python

    code = f"""
import sys
sys.modules["torch"] = sys.modules["diffusers"] = None
from cachepolicy import load_trace
from cachepolicy.tracing import perfetto
from cachepolicy.reports.html.page import page
trace = load_trace({str(saved)!r})
assert perfetto.perfetto_json(trace) and page(trace.latest)
"""
    assert "" == run_python(code, environment={"PYTHONPATH": str(ROOT)})
