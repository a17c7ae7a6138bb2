"""`approximate uncond copy`, `delta` and `affine`: batched and sequential guidance, against both halves worked out."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import cachepolicy
from cachepolicy.planning.simulation import simulate
from cachepolicy.testing import checks
from cachepolicy.testing.models import Toy, inputs, redraw
from tests.support.guided_toy import GuidedToy

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing")
STEPS = 8


def run(policy: str | None, *, branches: Sequence[str] = ()) -> tuple[list[tuple[Tensor, Tensor]], Any]:
    """Return the predictions (uncond, cond) by step and the trajectory. Without branches, the halves are one batch."""
    model = GuidedToy(Toy(cross=True)).eval()
    redraw(model, 4)
    x, y = inputs(Toy(), seed=3)
    y = 3 * y
    found = list[tuple[Tensor, Tensor]]()
    options: dict[str, Any] = {"steps": STEPS, "guidance": not branches}
    attached = (
        contextlib.nullcontext() if policy is None else cachepolicy.apply(model, cachepolicy.parse(policy), **options)
    )
    with attached as applied, torch.no_grad():
        for step in range(STEPS):
            states, t = x * (1 + 0.1 * step), torch.tensor(900.0 - 100 * step)
            if not branches:
                found.append(tuple(model(states.repeat(2, 1, 1), t, torch.cat([-y, y])).chunk(2)))  # pyright: ignore[reportArgumentType]
                continue
            outputs = dict[str, Tensor]()
            for branch in branches:
                with model.cache_context(branch):
                    outputs[branch] = model(states, t, y if branch == "cond" else -y)
            found.append((outputs["uncond"], outputs["cond"]))
        trajectory = None if applied is None else applied.trace.trajectories[0]
    if trajectory is not None:
        checks.well_formed(trajectory)
        checks.trace_agrees(trajectory)
    return found, trajectory


def row(trajectory: Any, branches: Sequence[str]) -> str:
    return trajectory.rows("uncond" if branches else "")["model"]


BOTH = pytest.mark.parametrize("branches", [(), ("cond", "uncond")], ids=["batched", "sequential"])


@BOTH
def test_copy_switches_guidance_off(branches: Sequence[str]) -> None:
    """The unconditional half is the conditional one, from the first step on that the run can tell the halves."""
    expected, _ = run(None, branches=branches)
    found, trajectory = run("match model when not (3 <= step <= 4) -> approximate uncond copy", branches=branches)
    assert ("RRRCCRRR" if branches else "CRRCCRRR") == row(trajectory, branches)
    for step, ((uncond, cond), (real, same)) in enumerate(zip(found, expected, strict=True)):
        assert torch.allclose(cond, same, atol=1e-6)
        off = row(trajectory, branches)[step] == "R"
        assert torch.equal(cond, uncond) if off else torch.allclose(uncond, real, atol=1e-6)


@BOTH
def test_a_copy_is_not_the_conditional_tensor(branches: Sequence[str]) -> None:
    """A caller that writes to one of them does not change the other."""
    found, _ = run("match model -> approximate uncond copy", branches=branches)
    assert all(uncond.data_ptr() != cond.data_ptr() for uncond, cond in found)


@BOTH
def test_delta_keeps_the_difference(branches: Sequence[str]) -> None:
    """The unconditional half is c minus the c - u of the last step that computed both."""
    found, trajectory = run("match model every 3 -> approximate uncond delta", branches=branches)
    assert "CRRCRRCR" == row(trajectory, branches)
    for step, (uncond, cond) in enumerate(found):
        kept = found[step - step % 3]
        if step % 3:
            assert torch.allclose(uncond, cond - (kept[1] - kept[0]), atol=1e-6)


@BOTH
def test_affine_sums_both_halves(branches: Sequence[str]) -> None:
    """The first factor is that of this step; the others are of the last computed steps, of which two are needed."""
    action = "approximate uncond affine(cond: [0.5, 0.25, step / 10], uncond: [0.5, -0.25])"
    text = f"match model every 2 -> {action}"
    found, trajectory = run(text, branches=branches)
    assert "CCCRCRCR" == row(trajectory, branches)
    assert "CCCRCRCR" == simulate(cachepolicy.parse(text), steps=STEPS).rows["model"]
    last = list[int]()
    for step, (uncond, cond) in enumerate(found):
        if row(trajectory, branches)[step] == "C":
            last.insert(0, step)
            continue
        (u1, c1), (u2, c2) = (found[each] for each in last[:2])
        assert torch.allclose(uncond, 0.5 * cond + 0.25 * c1 + step / 10 * c2 + 0.5 * u1 - 0.25 * u2, atol=1e-5)


@pytest.mark.parametrize("action", ["copy", "delta", "affine(cond: [1])"])
def test_these_compute_where_uncond_runs_first(action: str) -> None:
    """The conditional prediction of the step is not there yet."""
    _, trajectory = run(f"match model -> approximate uncond {action}", branches=("uncond", "cond"))
    assert {"C" * STEPS} == {trajectory.rows("uncond")["model"], trajectory.rows("cond")["model"]}


@BOTH
def test_methods_may_be_mixed(branches: Sequence[str]) -> None:
    """A step that computes both halves keeps what any of them reads."""
    found, trajectory = run(
        "match model when step in {2, 5} -> approximate uncond delta\n"
        "match model when step == 3 -> approximate uncond copy\n"
        'match model every 4 -> approximate uncond spectral(low: 1, high: 1, format: "BSC", grid: [1, 2, 2])\n',
        branches=branches,
    )
    assert "CRRRCRRR" == row(trajectory, branches)
    for step in (1, 2, 5, 6, 7):
        kept = found[step - step % 4]
        uncond, cond = found[step]
        assert torch.allclose(uncond, cond - (kept[1] - kept[0]), atol=1e-5)
    assert torch.equal(*found[3])


def gated(
    policy: str, *, compiled: bool = False, guidance: bool | None = True
) -> tuple[list[Tensor], Any, list[Tensor]]:
    """Return the outputs of a batched run and its trajectory."""
    model = GuidedToy(Toy(cross=True)).eval()
    redraw(model, 4)
    x, y = inputs(Toy(), seed=3)
    outputs = list[Tensor]()
    with cachepolicy.apply(model, cachepolicy.parse(policy), steps=STEPS, guidance=guidance) as run, torch.no_grad():
        called = torch.compile(model, backend="eager") if compiled else model
        for step in range(STEPS):
            states, t = x * (1 + 0.1 * step), torch.tensor(900.0 - 100 * step)
            outputs.append(called(states.repeat(2, 1, 1), t, torch.cat([-3 * y, 3 * y])))
        (trajectory,) = run.trace.trajectories
    checks.trace_agrees(trajectory)
    return outputs, trajectory


def test_reuse_mean_answers_both_halves_with_their_mean() -> None:
    """With the mean in place of its output, a site gives what the model gives with the mean written out."""
    outputs, trajectory = gated("match cross_attention when step > 0 every 4 -> reuse mean")
    assert {"CRRRCRRR"} == set(trajectory.rows().values()), trajectory.facts
    model = GuidedToy(Toy(cross=True)).eval()
    redraw(model, 4)
    x, y = inputs(Toy(), seed=3)
    for block in model.blocks:
        block.cross.forward = _averaging(block.cross.forward)
    with torch.no_grad():
        for step in range(STEPS):
            states, t = x * (1 + 0.1 * step), torch.tensor(900.0 - 100 * step)
            for block in model.blocks:
                block.cross.forward.computes = step % 4 == 0
            expected = model(states.repeat(2, 1, 1), t, torch.cat([-3 * y, 3 * y]))
            assert torch.equal(expected, outputs[step])


def _averaging(original: Any) -> Any:
    kept = list[Tensor]()

    def forward(*args: Any) -> Tensor:
        if forward.computes:
            kept[:] = [original(*args)]
            return kept[0]
        first, second = kept[0].chunk(2)
        return torch.cat([(first + second) / 2] * 2)

    forward.computes = True
    return forward


def test_reuse_mean_with_half_a_batch() -> None:
    """T-GATE: from a step on there is no guidance, and cross-attention answers with the mean of both halves."""
    _, trajectory = gated(
        "match model when step >= 3 -> approximate uncond copy\nmatch cross_attention when step >= 3 -> reuse mean"
    )
    rows = trajectory.rows()
    assert "CCCRRRRR" == rows.pop("model")
    assert {"CCCRRRRR"} == set(rows.values())


def test_reuse_mean_computes_without_a_guidance_batch() -> None:
    """In two calls by the decision itself, and in other batches as the run finds."""
    _, trajectory = run("match cross_attention -> reuse mean", branches=("cond", "uncond"))
    assert {"C" * STEPS} == {*trajectory.rows("cond").values(), *trajectory.rows("uncond").values()}
    _, trajectory = gated("match cross_attention -> reuse mean", guidance=False)
    assert {"C" * STEPS} == set(trajectory.rows().values())
    assert {"it has no two halves to take the mean of"} == set(trajectory.facts.values())


def test_reuse_mean_in_compiled_graphs() -> None:
    """The same numbers as without a compiler."""
    policy = "match cross_attention when step > 0 every 4 -> reuse mean"
    expected, (outputs, trajectory) = gated(policy)[0], gated(policy, compiled=True)
    assert all(map(torch.equal, expected, outputs))
    assert {"CRRRCRRR"} == set(trajectory.rows().values())


@pytest.mark.parametrize("selector", ["model", "blocks"])
def test_reuse_mean_needs_single_modules(selector: str) -> None:
    """A span and the model itself are refused."""
    with pytest.raises(cachepolicy.PolicyError, match="E209"):
        gated(f"match {selector} -> reuse mean")


@BOTH
def test_adaptive_guidance(branches: Sequence[str]) -> None:
    """Guidance ends for good where both predictions point the same way."""
    text = (
        "signal v = output(model)\n"
        "signal alike = cosine(cross(cond, prev(v)), cross(uncond, prev(v)))\n"
        "match model while latch(alike >= {}) -> approximate uncond copy"
    )
    found, _ = run(None, branches=branches)
    cosines = [torch.nn.functional.cosine_similarity(u.flatten(), c.flatten(), dim=0).item() for u, c in found]
    limit = sorted(cosines)[STEPS // 2]
    first = next(step for step, value in enumerate(cosines) if value >= limit) + 1
    _, trajectory = run(text.format(limit - 1e-6), branches=branches)
    assert "C" * first + "R" * (STEPS - first) == row(trajectory, branches)
