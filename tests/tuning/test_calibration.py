# pyright: reportPrivateImportUsage=false, reportOptionalMemberAccess=false
"""`calibrate`: constants of published methods, against the formulas written out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import cachepolicy
from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.language.evaluate import constant
from cachepolicy.planning.check import check_text, run_expectations
from cachepolicy.tools.emoji import load_pipeline
from cachepolicy.tuning.calibration import REACH, Calibration, Method, _Series, _smoothcache, _teacache, calibrate
from tests.support.tiny_pipelines import PIPELINES

STEPS = 8


def call(seed: int, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"class_labels": [seed], "num_inference_steps": STEPS, "generator": generator, **more}


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def seen(pipe) -> dict[str, list[torch.Tensor]]:
    """What goes through the model in one call: the blocks' input and output, the first norm, all attention outputs."""
    kept: dict[str, list[torch.Tensor]] = {}
    blocks = pipe.transformer.transformer_blocks

    def keep(name: str, value: Any) -> None:
        kept.setdefault(name, []).append((value[0] if isinstance(value, tuple) else value).detach().clone())

    handles = [
        blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: keep("in", [*args, *kwargs.values()][0]), with_kwargs=True
        ),
        blocks[-1].register_forward_hook(lambda _, __, output: keep("out", output)),
        blocks[0].norm1.register_forward_hook(lambda _, __, output: keep("norm", output)),
    ]
    for number, block in enumerate(blocks):
        handles.append(block.attn1.register_forward_hook(lambda _, __, output, n=number: keep(f"attn{n}", output)))
    pipe(**call(3), output_type="pt")
    for handle in handles:
        handle.remove()
    return kept


def values(found: Calibration) -> dict[str, Any]:
    """The tables and params of a policy by name."""
    statements = found.policy.statements
    tables = {each.name: list(each.values) for each in statements if isinstance(each, ir.Table)}
    return tables | {each.name: constant(each.default) for each in statements if isinstance(each, ir.Param)}


def change(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().mean() / other.abs().mean())


def test_magcache_has_the_ratios_of_the_residuals(pipe, seen) -> None:
    """Each is the mean over tokens of the ratio of norms, the first 1; the run decides as the recording says."""
    found = calibrate(pipe, [call(3)], "magcache", cost=0.5)
    residuals = [out - into for into, out in zip(seen["in"], seen["out"], strict=True)]
    pairs = zip(residuals[1:], residuals[:-1], strict=True)
    expected = [1.0, *(float((now.norm(dim=-1) / before.norm(dim=-1)).mean()) for now, before in pairs)]
    assert expected == pytest.approx(values(found)["ratios"], rel=1e-4)
    (row,) = [each.row for each in found.policy.statements if isinstance(each, ir.Expect)]
    with cachepolicy.apply(pipe, found.policy) as run:
        pipe(**call(9))
    assert [row] == list(run.trace.rows().values())
    assert row.count("C") / STEPS == found.cost <= 0.5


def test_teacache_has_the_polynomial_of_the_changes(pipe, seen) -> None:
    """The coefficients are those of a least-squares fit to the changes of the norm and of the blocks' output."""
    found = calibrate(pipe, [call(3)], "teacache")
    moved = [change(now, before) for before, now in zip(seen["norm"], seen["norm"][1:], strict=False)]
    changed = [change(now, before) for before, now in zip(seen["out"], seen["out"][1:], strict=False)]
    fitted = np.polyval(np.polyfit(moved, changed, 4), moved)
    assert fitted == pytest.approx(np.polyval(values(found)["coefficients"], moved), rel=1e-2)


def test_smoothcache_reuses_what_changes_little(pipe, seen) -> None:
    """A reuse is at most as far as the error of each distance allows, and further would be too far."""
    found = calibrate(pipe, [call(3)], "smoothcache")
    outputs = [steps for name, steps in seen.items() if name.startswith("attn")]

    def error(step: int, later: int) -> float:
        errors = [float((one[step] - one[later]).abs().mean() / one[later].abs().mean()) for one in outputs]
        return sum(errors) / len(errors)

    row = next(each.row for each in found.policy.statements if isinstance(each, ir.Expect))
    computed = [step for step, letter in enumerate(row) if letter == "C"]
    assert (0, STEPS - 1) == (computed[0], computed[-1])
    for step, following in pairwise(computed):
        if following > step + 1:
            assert error(step, following - 1) <= found.threshold + 1e-5
        if following < STEPS - 1 and following - step <= REACH:
            assert error(step, following) > found.threshold


@pytest.mark.parametrize("method", get_args(Method))
@pytest.mark.parametrize("kind", ["flux", "wan", "pixart"])
def test_models_of_all_forms_are_calibrated(kind: str, method: Method) -> None:
    """Two lists of blocks, guidance in two calls or in one: the policy is checked, tested, formatted, and runs."""
    tiny = PIPELINES[kind]()

    def sample(generator: torch.Generator) -> torch.Tensor:
        return tiny(num_inference_steps=6)

    calls = [{"generator": torch.Generator()}]
    found = calibrate(tiny.pipe, calls, method, sample=sample, cost=0.6)
    assert not [each for each in check_text(found.text.encode(), source="a.cp") if each.severity == "error"]
    assert run_expectations(found.policy).hold
    assert found.text == cachepolicy.format(found.policy)
    with cachepolicy.apply(tiny.pipe, found.policy) as run:
        assert torch.isfinite(tiny(num_inference_steps=6)).all()
    assert any("R" in row for row in run.trace.rows(run.trace.last.branches[0]).values())


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=3), st.integers(0, 99))
def test_a_polynomial_is_found_again(coefficients: list[float], seed: int) -> None:
    """Where the changes follow a polynomial, it is what is written."""
    moved = np.random.default_rng(seed).uniform(0.05, 1.0, 20)
    series = _Series(steps=21, probe="input(blocks[0])")
    for step, value in enumerate(moved.tolist(), 1):
        series.moved[0, step] = value
        series.changed[0, step] = float(np.polyval(coefficients, value))
    text = _teacache([series], 0.5).text
    (param,) = [each for each in cachepolicy.parse(text).statements if getattr(each, "name", "") == "coefficients"]
    assert isinstance(param, ir.Param)
    found: Any = constant(param.default)
    expected = np.polyval(coefficients, moved)
    assert expected == pytest.approx(np.polyval(found, moved), abs=1e-3)


@given(st.floats(0.1, 1.0), st.integers(2, 30))
def test_the_share_of_computed_steps_is_kept_where_it_can_be(cost: float, steps: int) -> None:
    """With errors that grow with the distance, the threshold keeps the cost where gaps allow it; the ends compute."""
    series = _Series(steps=steps)
    for step in range(steps):
        for distance in range(1, REACH + 1):
            series.errors["feedforward", distance, step].append(0.01 * distance + 0.001 * step)
    made = _smoothcache([series], cost)
    row = next(line for line in made.text.splitlines() if line.startswith("expect")).split(": ")[1].split()
    assert ("C", "C") == (row[0], row[-1])
    assert row.count("C") / steps == pytest.approx(made.cost)
    longest = -(-(steps - 1) // (REACH + 1)) + 1
    # The ends take one step more than the longest gaps allow.
    assert made.cost <= max(cost, (longest + 1) / steps) + 1e-9


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"method": "teacash"}, "E407"),
        ({"calls": []}, "E403"),
        ({"calls": [call(0), call(1, num_inference_steps=3)]}, "E403"),
    ],
)
def test_mistakes_have_codes(pipe, change: dict[str, Any], code: str) -> None:
    """An unknown method, no call, and calls of different lengths."""
    with pytest.raises(PolicyError) as caught:
        calibrate(pipe, **{"calls": [call(0)], "method": "magcache", **change})
    assert code == caught.value.diagnostics[0].code


def test_a_model_without_blocks_has_a_code() -> None:
    """E407 names the method that fits."""

    class Plain(nn.Module):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            return sample

    with pytest.raises(PolicyError, match="`Plain` has none") as caught:
        calibrate(
            Plain(), [call(0)], "magcache", sample=lambda **_: torch.zeros(1), scheduler=load_pipeline().scheduler
        )
    assert "E407" == caught.value.diagnostics[0].code
