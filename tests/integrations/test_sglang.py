"""The plugin for SGLang on stand-ins with the recorded interfaces; `tests/engines` runs it on SGLang's own classes."""

from __future__ import annotations

import json
import logging
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

import torch
from torch import nn

import cachepolicy
from cachepolicy.errors import PolicyError
from cachepolicy.integrations import sglang as plugin
from tests.support import recorded_sglang as recorded
from tests.support.engine_models import FBC, POLICY
from tests.support.recorded_sglang import HookRegistry, request, run


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "some.cp"
    path.write_text(POLICY)
    return path


@pytest.fixture
def hooked(policy: Path) -> Iterator[Any]:
    """The class of the stage, with the hooks of a server that has a policy."""
    with pytest.MonkeyPatch.context() as patch:
        stage = recorded.installed(patch)
        patch.setenv(plugin.CONFIG, json.dumps({"policy": str(policy), "policies": {"fbc": FBC}}))
        plugin.register()
        HookRegistry.apply_hooks()
        yield stage


def plain() -> Any:
    return recorded.stage_class()(recorded.TOY.build(), None)


def applied(text: Any, steps: int = 8, **params: Any) -> torch.Tensor:
    """What `cachepolicy.apply` on the denoiser alone gives."""
    stage, ctx = plain(), recorded.context(steps)
    with torch.no_grad(), cachepolicy.apply(stage.transformer, text, scheduler=ctx.scheduler, **params):
        stage._run_denoising_loop(ctx, request(), None)
    return ctx.latents


def test_the_entry_point_names_the_function() -> None:
    """SGLang finds `register` by the group of its plugins."""
    points = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]
    assert "cachepolicy.integrations.sglang:register" == points["sglang.multimodal_gen.plugins"]["cachepolicy"]


def test_without_a_config_nothing_is_hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin is loaded in every server of an environment, and has no effect where no policy is named."""
    recorded.installed(monkeypatch)
    monkeypatch.delenv(plugin.CONFIG, raising=False)
    plugin.register()
    assert {} == dict(HookRegistry._hooks)


def test_a_request_gets_what_apply_gives(hooked: Any) -> None:
    """With the params of the server, its own, another policy of the server, and without a policy."""
    stage = hooked(recorded.TOY.build(), None)
    parsed = cachepolicy.parse(POLICY)
    assert torch.equal(applied(parsed), run(stage, request()))
    assert torch.equal(applied(parsed, n=4), run(stage, request({"n": 4})))
    assert torch.equal(applied("fbc", threshold=50.0), run(stage, request({"policy": "fbc"})))
    assert torch.equal(run(plain(), request()), run(stage, request(False)))
    assert torch.equal(applied(parsed, 5), run(stage, request(), 5))


def test_every_request_has_a_record(hooked: Any) -> None:
    """It is in the extras of the request."""
    batch = request()
    run(hooked(recorded.TOY.build(), None), batch)
    record = batch.extra["cachepolicy"]
    assert (8, 16) == (record["steps"], record["model_calls"])
    assert "R" in record["rows"][0]["first"]["blocks[1:4]"]


def test_two_experts_have_one_policy(hooked: Any) -> None:
    """The second denoiser of a stage is one of the run."""
    stage = hooked(recorded.TOY.build(), None, transformer_2=recorded.TOY.build(1))
    run(stage, request())
    assert {"transformer", "transformer_2"} == set(plugin._served[stage].run.plans)


@pytest.mark.parametrize("said", [7, {"n": "x"}, {"m": 1}, {"policy": "/etc/passwd"}, {"options": {"steps": 0}}])
def test_garbage_is_refused_for_that_request_alone(hooked: Any, said: Any) -> None:
    """The error has the diagnostic, and the next request gets its picture."""
    stage = hooked(recorded.TOY.build(), None)
    with pytest.raises(ValueError, match="cachepolicy: E"):
        run(stage, request(said))
    assert torch.equal(applied(cachepolicy.parse(POLICY)), run(stage, request()))


@pytest.mark.parametrize(
    "given", ["{", '{"policy": "no-such"}', '{"policy": "fbc", "params": {"x": 1}}', "no-such-file"]
)
def test_a_mistake_in_the_config_stops_the_start(hooked: Any, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """The constructor of the stage raises, and leaves no hook on the model."""
    monkeypatch.setenv(plugin.CONFIG, given)
    model = recorded.TOY.build()
    with pytest.raises(PolicyError):
        hooked(model, None)
    assert nn.Module.__call__ is type(model).__call__


def test_the_config_may_be_a_file(hooked: Any, monkeypatch: pytest.MonkeyPatch, policy: Path) -> None:
    """Its path stands in the environment."""
    path = policy.with_suffix(".json")
    path.write_text(json.dumps({"policy": str(policy), "params": {"n": 4}}))
    monkeypatch.setenv(plugin.CONFIG, str(path))
    assert torch.equal(applied(cachepolicy.parse(POLICY), n=4), run(hooked(recorded.TOY.build(), None), request()))


def test_a_stage_that_loads_late_gets_its_policy_then(hooked: Any) -> None:
    """A model that comes with the first request, and one that replaces it."""
    stage = hooked(None, None)
    for _ in range(2):
        stage.transformer = recorded.TOY.build()
        assert torch.equal(applied(cachepolicy.parse(POLICY)), run(stage, request()))


def test_a_cache_of_sglang_runs_alone(hooked: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A request that asks for TeaCache or Cache-DiT is served without a policy, and the log says so."""
    stage = hooked(recorded.TOY.build(), None)
    with caplog.at_level(logging.WARNING, plugin.logger.name):
        got = run(stage, request(enable_teacache=True))
    assert torch.equal(run(plain(), request()), got)
    assert "enable_teacache" in caplog.text
    stage._cache_dit_enabled = True
    assert torch.equal(run(plain(), request()), run(stage, request()))


def test_no_graph_is_taken_of_a_denoiser_with_a_policy(hooked: Any) -> None:
    """A graph would repeat the decisions of the step in which it was recorded."""
    assert hooked(recorded.TOY.build(), None)._maybe_get_bcg_runner(None) is None
    assert "a graph" == hooked(None, None)._maybe_get_bcg_runner(None)
