"""What a schedule skips and claims where guidance is approximated, batched, sequential or built into the model."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import cachepolicy
from cachepolicy.cli.commands import main
from cachepolicy.diffusers.guidance import distilled_by
from cachepolicy.planning.cost_model import Work, forecast
from cachepolicy.planning.guidance import reads_guidance, without_uncond
from cachepolicy.planning.simulation import plan, simulate
from cachepolicy.planning.tally import tally
from cachepolicy.reports import overview
from cachepolicy.reports.stats import gains, speed_up
from cachepolicy.reports.text import draw, outcome_to_json, summary
from cachepolicy.testing import strategies
from tests.support import report_data as reports

GUIDED = 'match model when t < {} every {} -> approximate uncond spectral(low: 1, high: 1, layout: "uncond first")\n'


@given(st.integers(0, 1000), st.integers(1, 5), strategies.timesteps(), strategies.branches())
def test_calls_and_flops_agree_on_what_approximation_skips(window, interval, timesteps, branches):
    """Half of a guidance batch is half a call, an answered call of its own a whole one, as in the FLOPs."""
    policy = cachepolicy.parse(GUIDED.format(window, interval))
    schedule = simulate(policy, steps=len(timesteps), timesteps=timesteps, branches=branches)
    counts, outlook = tally(schedule), forecast(schedule.plan, schedule, Work(1000, {}))
    assert pytest.approx(outlook.share) == counts.skipped / counts.total
    halves = sum(row.count("R") for row in schedule.rows_of("").values()) if branches == ("",) else 0
    assert counts.calls["reuse"] - halves / 2 == counts.skipped


def test_every_report_counts_half_a_call():
    """The summary, the JSON form, the overview and the page say the same number."""
    schedule = simulate(cachepolicy.parse(GUIDED.format(2000, 2)), steps=10)
    assert "2.5 of 10 site calls skipped (25.0 %)" in summary(schedule)
    assert "answers 5, 5 of them by half" in draw(schedule)
    assert 2.5 == outcome_to_json(schedule)["skipped"]
    assert 2.5 == gains(schedule).tally.skipped
    assert "2.5 of 10 site calls skipped" in schedule._repr_html_()
    skeleton = schedule.plan.skeleton
    found = overview.prospects(skeleton, None, steps=50)
    expected = tally(simulate("fastercache", steps=50)).skipped
    assert expected == found["fastercache"].counts.skipped
    assert expected == overview.overview_to_json(skeleton, None, found)["policies"]["fastercache"]["skipped"]


def test_nothing_skipped_is_no_speed_up():
    """A difference of seconds is noise where the policy skipped nothing."""
    trajectory = reports.as_trace(simulate(cachepolicy.parse("match attention -> compute"), steps=4)).last
    assert 0 == tally(trajectory).skipped
    assert gains(trajectory, uncached=10.0).speed_up is None
    assert gains(trajectory).speed_up is None
    assert speed_up(1.0, 2.0, 0) is None
    assert 2.0 == speed_up(1.0, 2.0, 0.5)
    assert speed_up(1.0, None, 3) is None


def test_a_distilled_model_computes_where_uncond_would_be_approximated():
    """The rule computes, and a warning says so with a way out; with the way out there is no warning."""
    distilled = without_uncond(plan("fastercache"))
    schedule = simulate(distilled, steps=10)
    assert {"C" * 10} == set(schedule.rows.values())
    (warning,) = [finding for finding in distilled.warnings if finding.code == "W516"]
    assert "this model has no unconditional half, so rule 1 computes" == warning.message
    assert "distilled=True" in (warning.help or "")
    assert () == without_uncond(plan("fastercache", distilled=True)).warnings
    plain = plan("fora")
    assert plain.rules == without_uncond(plain).rules
    assert [True, False] == [reads_guidance(plan(name)) for name in ("fastercache", "fora")]


@pytest.mark.parametrize(
    ("pipeline", "config", "expected"),
    [
        ("FluxPipeline", {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}, "distilled"),
        ("FluxPipeline", {"_class_name": "FluxTransformer2DModel"}, "sequential"),
        ("WanPipeline", {"_class_name": "WanTransformer3DModel"}, "sequential"),
        ("CogVideoXPipeline", {"_class_name": "CogVideoXTransformer3DModel"}, "batched"),
        (None, {"_class_name": "WanTransformer3DModel"}, "unknown"),
        ("os.system", {"_class_name": "WanTransformer3DModel"}, "unknown"),
    ],
)
def test_the_form_of_guidance_is_read_from_the_files(tmp_path, pipeline, config, expected):
    """From the model's config and the pipeline's class; a class that is not diffusers' shows nothing."""
    from cachepolicy.tools.meta_model import read_model

    layers = {"num_layers": 1} | ({"num_single_layers": 1} if "Flux" in config["_class_name"] else {})
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | layers), encoding="utf-8")
    if pipeline is not None:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}), encoding="utf-8")
    guidance = read_model(tmp_path if pipeline else folder).guidance
    assert expected == guidance.form
    assert (("cond", "uncond") if expected == "sequential" else ("",)) == guidance.branches
    assert guidance.source in str(guidance)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"guidance_embeds": True}, "guidance_embeds"),
        ({"guidance_scale_embeds": True, "guidance_embeds": False}, "guidance_scale_embeds"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim"),
        ({"is_turbo": True}, "is_turbo"),
        ({"time_cond_proj_dim": None, "is_turbo": False}, None),
        ({}, None),
        (None, None),
    ],
)
def test_a_config_shows_that_guidance_is_built_in(config, expected):
    """By a scale that is an input of the model, or by weights that contain it."""
    assert expected == distilled_by(config)


def test_a_distilled_pipeline_is_read_from_its_index(tmp_path):
    """The config of the model is that of the variant with guidance."""
    from cachepolicy.tools.meta_model import read_model

    folder = tmp_path / "transformer"
    folder.mkdir()
    config = {"_class_name": "WanTransformer3DModel", "num_layers": 1}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    index = {"_class_name": "WanPipeline", "is_distilled": True}
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    guidance = read_model(tmp_path).guidance
    assert ("distilled", "is_distilled") == (guidance.form, guidance.source)


def test_pipelines_are_imported_on_the_usual_device(tmp_path, monkeypatch):
    """Only the model is built on the meta device: modules of pipelines hold tensors with data."""
    import torch

    from cachepolicy.tools import meta_model

    devices = list[str]()
    monkeypatch.setattr(
        meta_model, "_guidance", lambda *_: devices.append(torch.empty(1).device.type) or meta_model.Guidance()
    )
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"_class_name": "WanTransformer3DModel", "num_layers": 1}), encoding="utf-8")
    meta_model.read_model(config)
    assert ["cpu"] == devices


def test_what_is_assumed_is_said():
    """`plan` prints how guidance runs, or what it assumes, and gives it as JSON."""

    def command(*arguments: str) -> str:
        return CliRunner().invoke(main, ["plan", *arguments, "--steps", "4"]).stdout

    assert "assumed: guidance runs both halves in one call" in command("fastercache")
    assert "guidance" not in command("fora")
    assert "cond, then uncond" in command("fora", "--branch", "cond", "--branch", "uncond")
    assert "unknown" == json.loads(command("fora", "--json"))["guidance"]["form"]
