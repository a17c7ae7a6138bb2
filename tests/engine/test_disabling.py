"""`CACHEPOLICY_DISABLE` in the environment: nothing is attached, and the code around `apply` goes on working."""

from __future__ import annotations

import logging

import pytest
import torch

import cachepolicy
from cachepolicy.diffusers import api
from cachepolicy.errors import PolicyError
from cachepolicy.testing.models import Toy, ToyDiT, inputs, sample

POLICY = cachepolicy.parse("match attention every 2 -> reuse")
TIMESTEPS = (900.0, 700.0, 500.0, 300.0)

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing")


def outputs(model: ToyDiT) -> torch.Tensor:
    x, y = inputs(model.toy)
    return torch.stack(list(sample(model, TIMESTEPS, x, y)))


@pytest.fixture
def _disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEPOLICY_DISABLE", "1")


@pytest.mark.usefixtures("_disabled")
def test_nothing_is_attached() -> None:
    """Classes, instance attributes and outputs are those of the bare model, inside and after the `with`."""
    model = Toy().build()
    before = [(type(module), set(module.__dict__)) for module in model.modules()]
    bare = outputs(model)
    with cachepolicy.apply(model, POLICY) as run:
        assert before == [(type(module), set(module.__dict__)) for module in model.modules()]
        assert torch.equal(bare, outputs(model))
        assert not run.attached
        assert ["blocks.0.attn", "blocks.1.attn"] == [site.name for site in run.plan.sites]
        assert (0, {}) == (len(run.trace), run.trace.rows())
        assert "nothing has run yet" in run.report()
        assert 0 == run.memory.held
        with run.session("a", steps=4), run.disabled():
            assert torch.equal(bare, outputs(model))
        run.reset()
        run.reset("a")
    run.remove()
    assert torch.equal(bare, outputs(model))


@pytest.mark.usefixtures("_disabled")
def test_code_that_attaches_and_removes_goes_on_working() -> None:
    """Applying twice, removing what is not there, and diffusers' names raise and warn nothing."""
    model = Toy(cross=True).build()
    for _ in range(2):
        cachepolicy.apply(model, POLICY)
        cachepolicy.remove(model)
    config = api.PyramidAttentionBroadcastConfig(2, spatial_attention_block_identifiers=("blocks",))
    for attach in (api.enable_cache, api.apply_pyramid_attention_broadcast):
        assert not attach(model, config).attached
        assert not api.is_cache_enabled(model)
        api.reset_stateful_cache(model)
        api.disable_cache(model)


@pytest.mark.usefixtures("_disabled")
def test_mistakes_are_still_errors() -> None:
    """A wrong policy, param or option is reported as without the variable."""
    for policy, options, code in (
        ("no such policy", {}, "E150"),
        (POLICY, {"interval": 2}, "E160"),
        (POLICY, {"steps": 0}, "E309"),
        (POLICY, {"scheduler": "euler"}, "E309"),
        (POLICY, {"scheduler": dict}, "E309"),
        (cachepolicy.parse('match "nothing" -> reuse'), {}, "E200"),
    ):
        with pytest.raises(PolicyError) as caught:
            cachepolicy.apply(Toy().build(), policy, **options)
        assert code == caught.value.diagnostics[0].code


def test_a_policy_that_is_attached_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is read by `apply`; a run that was attached before reuses, and can be removed."""
    model = Toy().build()
    run = cachepolicy.apply(model, POLICY)
    monkeypatch.setenv("CACHEPOLICY_DISABLE", "1")
    outputs(model)
    assert "CRCR" == run.trace.rows()["blocks.0.attn"]
    cachepolicy.remove(model)
    assert ToyDiT is type(model)


@pytest.mark.parametrize("value", ["", "0", "false", "False", "no", "off", " "])
def test_values_that_do_not_disable(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """The usual words for no mean the same as no variable."""
    monkeypatch.setenv("CACHEPOLICY_DISABLE", value)
    with cachepolicy.apply(Toy().build(), POLICY) as run:
        assert run.attached


@pytest.mark.parametrize("value", ["1", "true", "yes", "anything"])
def test_values_that_disable(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """Any other value disables."""
    monkeypatch.setenv("CACHEPOLICY_DISABLE", value)
    with cachepolicy.apply(Toy().build(), POLICY) as run:
        assert not run.attached


def test_it_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One warning, however many models; one more when the variable was taken away and set again."""
    for times in (1, 2):
        monkeypatch.delenv("CACHEPOLICY_DISABLE", raising=False)
        cachepolicy.apply(Toy().build(), POLICY)
        monkeypatch.setenv("CACHEPOLICY_DISABLE", "1")
        for _ in range(3):
            cachepolicy.apply(Toy().build(), POLICY)
        found = [record for record in caplog.records if "CACHEPOLICY_DISABLE" in record.getMessage()]
        assert [("cachepolicy", logging.WARNING)] * times == [(record.name, record.levelno) for record in found]


@pytest.mark.usefixtures("_disabled")
def test_pipelines_share_and_follow() -> None:
    """A server that makes a pipeline for each request gets bare ones, with the pictures of no policy."""
    pytest.importorskip("diffusers")
    from tests.support.tiny_pipelines import flux

    tiny = flux()
    bare = tiny()
    run = cachepolicy.apply(tiny.pipe, "fora", interval=3)
    shared = run.share(scheduler=type(tiny.pipe.scheduler).from_config(tiny.pipe.scheduler.config))
    assert type(tiny.pipe) is type(shared)
    assert run.follow(shared) is shared
    assert torch.equal(bare, tiny())
    assert "_cachepolicy" not in shared.__dict__
