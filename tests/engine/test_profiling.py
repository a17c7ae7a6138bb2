"""A profiled run tells the time of every site, decides and computes the same, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

import cachepolicy
from cachepolicy.engine.hooks import site_override
from cachepolicy.engine.profiling import timed
from cachepolicy.errors import PolicyError
from cachepolicy.language.parser import parse
from cachepolicy.testing.models import Toy, ToyDiT
from cachepolicy.tracing.trace import from_json

POLICY = parse("match self_attention every 2 -> reuse")
SPAN = parse("match blocks[0:2] every 2 -> reuse residual")
TIMESTEPS = [900.0, 600.0, 300.0, 100.0]


def sampled(model: ToyDiT) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4, 8, generator=generator), torch.randn(2, 3, 8, generator=generator)
    with torch.no_grad():
        return [model(x, torch.tensor([t, t]), y) for t in TIMESTEPS]


@pytest.mark.parametrize("policy", [POLICY, SPAN], ids=["sites", "span"])
def test_every_site_that_was_called_has_its_time(policy):
    """One slice for each intercepted call, inside the call of the root."""
    model = Toy(blocks=3).build()
    with cachepolicy.apply(model, policy, trace="profile") as run:
        sampled(model)
    trajectory = run.trace.last
    expected = {name for site in run.plan.sites for name in site.modules}
    for call in trajectory.calls:
        assert expected <= {each.module for each in call.profile}
        assert all(call.began <= each.began for each in call.profile)
        assert all(each.began + each.seconds <= call.began + call.seconds + 1e-6 for each in call.profile)
    again = from_json(run.trace.to_json()).last
    assert [len(call.profile) for call in trajectory.calls] == [len(call.profile) for call in again.calls]


@pytest.mark.parametrize("policy", [POLICY, SPAN], ids=["sites", "span"])
def test_a_profile_changes_nothing_else(policy):
    """Outputs are the same to the bit, decisions too, and the module's class is its own again afterwards."""
    outputs, rows = list[list[torch.Tensor]](), list[dict[str, str]]()
    for trace in (True, "profile"):
        model = Toy(blocks=3).build()
        before = [type(module) for module in model.modules()]
        with cachepolicy.apply(model, policy, trace=trace) as run:
            outputs.append(sampled(model))
        rows.append(run.trace.rows())
        assert before == [type(module) for module in model.modules()]
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))
    assert rows[0] == rows[1]


def test_only_a_profiled_run_takes_the_slower_way():
    """Sites of another run are intercepted as ever, and its trace has no slices."""
    model = Toy(blocks=2).build()
    with cachepolicy.apply(model, POLICY) as run:
        sites = [model.get_submodule(site.name) for site in run.plan.sites]
        assert {(("__call__", site_override),)} == {type(site)._cachepolicy_methods for site in sites}
        sampled(model)
        assert all(not call.profile for call in run.trace.last.calls)
    with cachepolicy.apply(model, POLICY, trace="profile"):
        assert {(("__call__", timed(site_override)),)} == {type(site)._cachepolicy_methods for site in sites}


def test_a_failing_site_is_timed_too(monkeypatch):
    """An error inside a site passes through, and the run goes on afterwards."""
    model = Toy(blocks=2).build()
    with cachepolicy.apply(model, POLICY, trace="profile") as run:
        with monkeypatch.context() as patched:
            patched.setattr(model.get_submodule(run.plan.sites[0].name), "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                sampled(model)
        sampled(model)
    assert len(TIMESTEPS) == len(run.trace.last.calls)


def test_a_compiled_site_runs_untimed():
    """What is compiled has no clock in it: the graph is whole."""
    model = Toy(blocks=2).build()
    with cachepolicy.apply(model, POLICY, trace="profile") as run:
        expected = sampled(model)
        run.reset()
        for block in model.blocks:
            block.compile(backend="eager", fullgraph=True)
        assert all(torch.allclose(one, other) for one, other in zip(expected, sampled(model), strict=True))


def test_a_trace_of_another_kind_is_refused():
    """`trace` is True, False or "profile"."""
    with pytest.raises(PolicyError, match="`trace` is `'flame'`") as caught:
        cachepolicy.apply(Toy().build(), POLICY, trace="flame")
    assert "E309" == caught.value.diagnostics[0].code


def test_no_trace_keeps_nothing():
    """With `trace=False` there is nothing to look at, and the policy runs all the same."""
    model = Toy(blocks=2).build()
    with cachepolicy.apply(model, POLICY, trace=False) as run:
        sampled(model)
        assert run.trace is None
