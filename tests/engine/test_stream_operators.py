"""Signals that are calculated from probed tensors, against the same numbers worked out from recorded tensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import cachepolicy
from cachepolicy.engine.streams import Layout, half_of, layout_of, of_tokens, wiener
from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.language.evaluate import Undefined
from cachepolicy.testing import checks
from cachepolicy.testing.models import Toy, inputs, redraw
from tests.support.guided_toy import GuidedToy

pytestmark = pytest.mark.filterwarnings("ignore:the policy reused nothing")
STEPS = 6


def run(policy: str, *, branches: tuple[str, ...] = ("",), **options: Any) -> tuple[Any, dict[str, list[Tensor]]]:
    """Run a toy and return the trajectory, and the input and output of the model by branch."""
    model = GuidedToy(Toy(blocks=3, cross=True)).eval()
    redraw(model, 5)
    x, y = inputs(Toy(), seed=2)
    seen: dict[str, list[Tensor]] = {}
    with cachepolicy.apply(model, cachepolicy.parse(policy), steps=STEPS, **options) as applied, torch.no_grad():
        for step in range(STEPS):
            for number, branch in enumerate(branches):
                states = x * (1 + 0.1 * step * step)
                with model.cache_context(branch) if branch else contextlib.nullcontext():
                    output = model(states, torch.tensor(900.0 - 100 * step), y * (1 - 2 * number))
                seen.setdefault(f"in {branch}", []).append(states)
                seen.setdefault(f"out {branch}", []).append(output)
        (trajectory,) = applied.trace.trajectories
    checks.trace_agrees(trajectory)
    return trajectory, seen


def numbers(trajectory: Any, name: str, site: str, branch: str = "") -> list[float]:
    """What a run measured at a site, by step."""
    index = next(each.index for each in trajectory.plan.sites if each.name == site)
    found = {key[0]: values for key, values in trajectory.signals.items() if key[1] == branch}
    return [found[step][index][name] for step in range(STEPS)]


def alike(expected: list[float | None], got: list[float]) -> None:
    """Compare numbers; None stands for no value."""
    assert [None if value is None else pytest.approx(value, rel=1e-5) for value in expected] == [
        None if math.isnan(value) else value for value in got
    ]


def test_sums_differences_and_multiples_of_tensors() -> None:
    """`x - 0.5 * prev(x)` is calculated element by element, before the norm."""
    trajectory, seen = run(
        "signal x = input(model)\nsignal y = output(model)\nsignal d = l2(x - 0.5 * prev(x))\n"
        "signal e = l1(prev(x) + 3 * prev(y), x)\nmatch model every 2 while d + e < 0 -> reuse"
    )
    x, y = seen["in "], seen["out "]
    alike(
        [None, *((b - 0.5 * a).square().mean().sqrt().item() for a, b in pairwise(x))],
        numbers(trajectory, "d", "model"),
    )
    e = [(x[i] + 3 * y[i] - x[i + 1]).abs().mean().item() for i in range(STEPS - 1)]
    alike([None, *e], numbers(trajectory, "e", "model"))


def test_self_is_the_site_that_is_decided() -> None:
    """Every block compares its own input with that of its own last compute."""
    trajectory, _ = run(
        "signal d = relative_l1(input(self), kept(input(self)))\nmatch each blocks while d < 0.6 -> reuse residual"
    )
    measured = {site.name: numbers(trajectory, "d", site.name) for site in trajectory.plan.sites}
    assert 3 == len({tuple(values[1:]) for values in measured.values()})
    for name, row in trajectory.rows().items():
        assert "".join("R" if value < 0.6 else "C" for value in measured[name]) == row


def test_the_residual_of_self_is_read_where_it_computed() -> None:
    """`kept(residual(self))` has a value after a compute; `prev` of it only if that was the step before."""
    policy = (
        "signal r = l1(kept(residual(self)))\nsignal p = l1(prev(residual(self)))\n"
        "match attention every 3 while {} > 0 -> reuse"
    )
    trajectory, _ = run(policy.format("r"))
    assert {"CRRCRR"} == set(trajectory.rows().values())
    trajectory, _ = run(policy.format("p"))
    assert {"CRCCRC"} == set(trajectory.rows().values())


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ("l1(residual(self)) < 1", "E208"),
        ("l1(output(self)) < 1", "E208"),
        ("l1(kept(output(self))) < 1", None),
        ("mean(l1(input(self)) over each blocks) < 1", "E208"),
        ("mean(l1(input(self)) over each blocks[:1]) < 1", None),
        ("mean(l1(prev(input(self))) over each blocks) < 1", None),
        ("mean(l1(input(self)) over blocks) < 1", "E207"),
        ('mean(l1(input(self)) over "nothing") < 1', "E207"),
    ],
)
def test_what_self_and_over_can_measure(condition: str, code: str | None) -> None:
    """What runs later, or may be skipped, is not read at this step."""
    policy = f"signal s = {condition.removesuffix(' < 1')}\nmatch each blocks[1:] while s < 1 -> reuse\n"
    with contextlib.nullcontext() if code is None else pytest.raises(PolicyError) as caught:
        run(policy)
    assert code is None or {code} == {each.code for each in caught.value.diagnostics}


def test_self_of_a_span_is_refused() -> None:
    """A span has no one module that `self` could stand for."""
    with pytest.raises(PolicyError, match="E207"):
        run("signal s = l1(input(self))\nmatch blocks while s < 1 -> reuse")


@pytest.mark.parametrize(("function", "of"), [("mean", lambda v: sum(v) / len(v)), ("min", min), ("max", max)])
def test_over_several_sites(function: str, of: Callable[[list[float]], float]) -> None:
    """The members that have a value count; each keeps its own past."""
    trajectory, _ = run(
        "signal d = relative_l1(kept(residual(self)), kept(residual(self), 2)) / gap\n"
        f"signal all_ = {function}(d over each blocks)\nmatch each blocks while all_ < 0 and d > 0 -> reuse"
    )
    own = [numbers(trajectory, "d", site.name) for site in trajectory.plan.sites]
    together = numbers(trajectory, "all_", trajectory.plan.sites[0].name)
    alike([None, None, *(of([each[step] for each in own]) for step in range(2, STEPS))], together)
    assert 3 == len({each[3] for each in own})


def test_any_over_several_sites() -> None:
    """`any` is a condition."""
    trajectory, _ = run("signal d = l1(prev(residual(self)))\nmatch attention while any(d >= 0 over block) -> reuse")
    assert {"CRRRRR"} == set(trajectory.rows().values())


def test_cross_reads_another_branch_in_sequential_guidance() -> None:
    """At this step if that branch has run, and with `prev` one step earlier."""
    policy = (
        "signal v = output(model)\nsignal x = input(model)\n"
        "signal now = l1(cross(cond, v), prev(v))\nsignal back = cosine(cross(cond, prev(v)), prev(v))\n"
        "signal number = cross(uncond, prev(l1(v)))\nmatch model while now + back + number < -9 -> reuse"
    )
    trajectory, seen = run(policy, branches=("cond", "uncond"))
    cond, uncond = seen["out cond"], seen["out uncond"]
    now = [None, *((cond[i + 1] - uncond[i]).abs().mean().item() for i in range(STEPS - 1))]
    alike(now, numbers(trajectory, "now", "model", "uncond"))
    back = [
        torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
        for a, b in zip(cond, uncond, strict=True)
    ]
    alike([None, *back[:-1]], numbers(trajectory, "back", "model", "uncond"))
    alike([None, *(each.abs().mean().item() for each in uncond[:-1])], numbers(trajectory, "number", "model", "cond"))


def test_cross_reads_the_halves_of_a_guidance_batch() -> None:
    """The same numbers as with two calls, once the run knows that the batch is one of guidance."""
    policy = (
        "signal v = output(model)\nsignal s = cosine(cross(cond, prev(v)), cross(uncond, prev(v)))\n"
        "signal n = cross(uncond, l1(prev(v)))\nmatch model while s + n < -9 -> reuse"
    )
    sequential, _ = run(policy, branches=("cond", "uncond"))
    model = GuidedToy(Toy(blocks=3, cross=True)).eval()
    redraw(model, 5)
    x, y = inputs(Toy(), seed=2)
    with cachepolicy.apply(model, cachepolicy.parse(policy), steps=STEPS, guidance=True) as applied, torch.no_grad():
        for step in range(STEPS):
            states = x * (1 + 0.1 * step * step)
            model(states.repeat(2, 1, 1), torch.tensor(900.0 - 100 * step), torch.cat([-y, y]))
        (batched,) = applied.trace.trajectories
    for name in ("s", "n"):
        wanted = numbers(sequential, name, "model", "uncond")
        alike([None if math.isnan(each) else each for each in wanted], numbers(batched, name, "model"))


def test_cross_without_evidence_of_guidance_has_no_value() -> None:
    """A batch that may be of several pictures has no halves."""
    trajectory, _ = run("signal s = l1(cross(cond, input(model)))\nmatch model while s > 0 -> reuse")
    assert {"C" * STEPS} == set(trajectory.rows().values())


def test_tokens_of_a_probe() -> None:
    """A slice of the sequence, with the ends of Python's slices."""
    trajectory, seen = run(
        "signal a = l1(input(model, tokens: 1:3))\nsignal b = l1(input(model, tokens: -1:))\n"
        "signal c = l1(input(model, tokens: 99:))\nmatch model while a + b < 0 and c < 0 -> reuse"
    )
    alike([each[:, 1:3].abs().mean().item() for each in seen["in "]], numbers(trajectory, "a", "model"))
    alike([each[:, -1:].abs().mean().item() for each in seen["in "]], numbers(trajectory, "b", "model"))
    alike([None] * STEPS, numbers(trajectory, "c", "model"))


def test_the_tokens_of_the_picture() -> None:
    """The first tokens with the first frame number, or of the first image shape; all where there are no references."""
    ids = torch.zeros(10, 3)
    ids[:6, 1] = torch.arange(6) // 3
    ids[:6, 2] = torch.arange(6) % 3
    ids[6:, 0] = 1
    latent, x = ir.Tokens(latent=True), torch.randn(2, 10, 4)
    shown = layout_of({"img_ids": ids}, None, None)
    assert (6, 10, ((1, 2, 3),)) == (shown.picture, shown.total, shown.grids)
    assert torch.equal(x[:, :6], of_tokens(latent, x, shown))
    assert x is of_tokens(latent, x, Layout())
    shapes = layout_of({"img_shapes": [[(1, 2, 3), (1, 2, 2)]] * 2}, None, None)
    assert torch.equal(x[:, :6], of_tokens(latent, x, shapes))
    with pytest.raises(Undefined):
        of_tokens(latent, torch.randn(2, 11, 4), shown)
    with pytest.raises(Undefined):
        of_tokens(latent, torch.randn(2, 3, 4, 4), shown)


def test_the_grid_of_tokens_follows_from_the_latents() -> None:
    """Latents that the model cuts into patches of its configuration."""
    latents = torch.randn(1, 4, 3, 8, 6)
    assert ((3, 4, 3),) == layout_of({}, latents, (1, 2, 2)).grids
    assert ((8, 6), (8, 6)) == layout_of({}, latents[:, :, 0], None).grids * 2
    assert ((4, 3),) == layout_of({}, latents[:, :, 0], 2).grids


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.9, 1.0])
def test_the_filter_is_that_of_diffusers(sigma: float) -> None:
    """Equal latents give equal numbers, to the last bit."""
    sea_cache = pytest.importorskip("diffusers.hooks.sea_cache")
    x = torch.randn(2, 4, 3, 8, 6, generator=torch.Generator().manual_seed(1))
    filtered = wiener(x, 3.0, sigma, Layout())
    for one, sample in zip(filtered, x, strict=True):
        expected = sea_cache._apply_sea_filter(sample.movedim(0, -1), sigma=sigma, power_exp=3.0)
        assert torch.equal(expected, one.movedim(0, -1))


def test_the_filter_by_its_definition() -> None:
    """Tokens on a grid: the spectrum times the gains of both axes over their mean."""
    grid, beta, sigma = (4, 6), 2.0, 0.4
    x = torch.randn(1, 24, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gain(number: int) -> Tensor:
        power = torch.tensor([abs(f) ** -beta if f else 1e16 for f in torch.fft.fftfreq(number).tolist()])
        return (1 - sigma) * power / ((1 - sigma) ** 2 * power + sigma**2)

    gains = gain(grid[0])[:, None] * gain(grid[1])[None, :]
    spectrum = torch.fft.fft2(x[0].T.reshape(3, *grid)) * (gains / gains.mean())
    expected = torch.fft.ifft2(spectrum).real.reshape(3, 24).T
    assert torch.allclose(expected.float(), wiener(x, beta, sigma, Layout(grids=(grid,)))[0].float(), atol=1e-5)
    with pytest.raises(Undefined):
        wiener(x, beta, sigma, Layout(grids=((5, 5),)))


def test_the_filter_needs_sigma() -> None:
    """A run without a scheduler cannot tell it, and says so at the start."""
    with pytest.raises(PolicyError, match="E250"):
        run("signal s = l1(wiener(input(model), beta: 2))\nmatch model while s < 0 -> reuse")


def test_halves() -> None:
    """The conditional half stands where the batch has it, and is all there is where only it ran."""
    x = torch.arange(4.0).reshape(4, 1)
    assert torch.equal(x[2:], half_of("cond", x, 4, 1))
    assert torch.equal(x[:2], half_of("uncond", x, 4, 1))
    assert torch.equal(x[:2], half_of("cond", x, 4, 0))
    assert torch.equal(x, half_of("cond", x, 8, 0))
    for branch, rows in (("uncond", 8), ("other", 4)):
        with pytest.raises(Undefined):
            half_of(branch, x, rows, 0)


@pytest.mark.parametrize(("policy", "row"), [("fbc", "CRRR"), ("fbc_edit", "CCCC")])
def test_reference_tokens_do_not_hide_a_change_of_the_picture(policy: str, row: str) -> None:
    """Many tokens that stay the same make the change over all tokens small, and not that of the picture."""
    from tests.support import zoo

    model: Any = zoo.build("flux")
    inputs = zoo.entry("flux").inputs(batch=1)
    tokens, references = inputs["hidden_states"].shape[1], 3000
    kept = torch.randn(1, references, inputs["hidden_states"].shape[2], generator=torch.Generator().manual_seed(1))
    ids = torch.zeros(references, 3)
    ids[:, 0] = 1
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad(), cachepolicy.apply(model, policy, steps=4, threshold=0.3) as session:
        for step in range(4):
            picture = torch.randn(1, tokens, kept.shape[2], generator=generator)
            call = {
                **inputs,
                "hidden_states": torch.cat([picture, kept], dim=1),
                "img_ids": torch.cat([inputs["img_ids"], ids]),
                "timestep": torch.tensor([0.9 - 0.0001 * step]),
            }
            model(**call)
        assert session.trace is not None
        assert {row} == set(session.trace.rows().values())
