"""The transcriptions of published methods against values that their sources print or that follow by hand."""

from __future__ import annotations

import math

import pytest

from tests.methods import transcriptions as reference


def steps_of(computed: list[bool]) -> set[int]:
    return {step for step, full in enumerate(computed) if full}


def test_taylorseer_schedules() -> None:
    """The authors' and diffusers' schedules of 28 steps differ."""
    assert {0, 1, 2, 7, 12, 17, 22, 27} == steps_of(reference.taylorseer(28, 5, 3))
    assert {0, 1, 2, 4, 9, 14, 19, 24} == steps_of(reference.taylorseer_diffusers(28, 5, 3))


def test_recursive_differences_are_not_newtons() -> None:
    """TaylorSeer of order 2 predicts 15, 23, 33, 45 on squares, and order 1 is exact on lines."""
    full = {0, 1, 2, 3, 8, 13, 18}
    computed = [step in full for step in range(13)]
    squares = reference.taylor_values([step**2 for step in range(13)], computed, 2)
    assert [15, 23, 33, 45] == squares[4:8]
    assert [75.6, 88.4, 102.4, 117.6] == pytest.approx([number or 0.0 for number in squares[9:]])
    lines = reference.taylor_values([3 + 2 * step for step in range(13)], computed, 1)
    assert all(value is None or value == pytest.approx(3 + 2 * step) for step, value in enumerate(lines))


def test_hermite_scales() -> None:
    """A scale of the square root of one half makes order 1 Taylor's, and order 2 half a difference less."""
    computed = [step in {0, 1, 2, 3} for step in range(8)]
    values = [math.exp(step / 3) for step in range(8)]
    taylor = reference.taylor_values(values, computed, 1)[4:]
    assert [value or 0.0 for value in taylor] == pytest.approx(
        [value or 0.0 for value in reference.hermite_values(values, computed, 1, math.sqrt(0.5))[4:]]
    )
    second = values[3] - 2 * values[2] + values[1]
    for hermite, taylor in zip(
        reference.hermite_values(values, computed, 2, math.sqrt(0.5))[4:],
        reference.taylor_values(values, computed, 2)[4:],
        strict=True,
    ):
        assert hermite is not None
        assert taylor is not None
        assert taylor - second / 2 == pytest.approx(hermite)


def test_chebyshev_interpolates() -> None:
    """Without a ridge and a mix, as many points as coefficients are interpolated."""
    history = [(-1.0, 2.0), (-0.5, 1.0), (0.0, 3.0), (0.25, -1.0)]
    for position, value in history:
        assert value == pytest.approx(reference.chebyshev_value(history, position, 3, 0.0, 1.0))


def test_bdf2_is_exact_on_lines() -> None:
    """BDF2 continues a line, whatever the gaps."""
    computed = [step in {0, 1, 4, 9} for step in range(12)]
    for step, value in enumerate(reference.bdf2_values([5 - 3 * step for step in range(12)], computed)):
        if value is not None and step > 1:
            assert 5 - 3 * step == pytest.approx(value)


def test_magcache_of_constant_magnitudes() -> None:
    """Ratios of 1 never add an error, so that the limit of skips decides."""
    assert {0, 1, 2, 6, 10} == steps_of(reference.magcache([1.0] * 12, 0.06, 3, 0.25))


def test_teacache_of_a_steady_change() -> None:
    """A probe that grows by the same share at each step computes at equal distances."""
    probes = [[1.01**step] for step in range(20)]
    assert {0, 4, 8, 12, 16, 19} == steps_of(reference.teacache(probes, [0, 0, 0, 1, 0], 0.035))


def test_first_block_cache_anchors_at_the_last_computed_step() -> None:
    """A slow drift is seen, since the anchor does not move with cached steps; NaN computes."""
    assert {0, 5} == steps_of(reference.first_block_cache([[1 + 0.01 * step] for step in range(9)], 0.045))
    assert [True, True] == reference.first_block_cache([[0.0], [0.0]], 1.0)


def test_guidance_stops_for_good() -> None:
    """The similarity of a step decides from the next step on."""
    cond = [[1.0, 0.0]] * 5
    uncond = [[0.0, 1.0], [0.5, 0.5], [1.0, 0.01], [0.0, 1.0], [0.0, 1.0]]
    assert [True, True, True, False, False] == reference.adaptive_guidance(cond, uncond, 0.99)


def test_wiener_filter_without_noise_whitens() -> None:
    """Without noise the gain is the same at all frequencies, so that the grid stays as it is."""
    grid = [[1.0, 2.0, -1.0], [0.5, 4.0, 0.0]]
    for expected, row in zip(grid, reference.wiener_filter(grid, 0.0, 2.0), strict=True):
        assert expected == pytest.approx(row)


def test_bands_add_up() -> None:
    """The low and the high band add up to the vector, and a constant is in the low band."""
    (low,), (high,) = reference.grid_bands([[3.0] * 10], 0.1)
    assert [3.0] * 10 == pytest.approx(low)
    assert [0.0] * 10 == pytest.approx(high, abs=1e-12)
