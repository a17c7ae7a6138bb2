"""Norms of tensors in pieces are those of the whole tensor, however it is cut."""

from __future__ import annotations

import itertools
import math

import pytest

torch = pytest.importorskip("torch")

from hypothesis import assume, given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from cachepolicy.engine import streams  # noqa: E402
from cachepolicy.engine.distributed.norms import MESSAGE_WIDTH, dtype_of, norm_of, numbers_of, share, summed  # noqa: E402
from cachepolicy.language.vocabulary import NORMS  # noqa: E402

FUNCTIONS = [*((name, 2) for name in sorted(NORMS)), ("l1", 1), ("l2", 1)]
PRECISION = {torch.float64: 1e-12, torch.float32: 2**-22, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def tensors(seed: int, count: int, samples: int, tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(samples, tokens, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def combined(function: str, pieces: list[list[torch.Tensor]], *, by_sample: bool) -> float:
    """The norm from the added numbers of pieces, one list of tensors each."""
    shares = [share(function, x, rest[0] if rest else None, by_sample=by_sample) for x, *rest in pieces]
    rows = torch.tensor([numbers_of([each])[0] for each in shares], dtype=torch.float64)
    return norm_of(function, rows.sum(0).tolist(), shares[0].dtype)


def whole(function: str, given: list[torch.Tensor], *, by_sample: bool) -> float:
    """What one process without others makes of the whole tensors."""
    measured = [streams.Stream(each) for each in given]
    norm = streams.worst_norm if by_sample else streams.norm_of
    return float(norm(function, measured).item())


CASES = {
    "function": st.sampled_from(FUNCTIONS),
    "dtype": st.sampled_from(list(PRECISION)),
    "seed": st.integers(0, 1000),
    "samples": st.integers(1, 3),
    "cuts": st.lists(st.integers(0, 9), max_size=4),
    "by_sample": st.booleans(),
}


@given(**CASES)
def test_pieces_of_any_size_add_up_to_the_whole(function, dtype, seed, samples, cuts, by_sample):
    """Cut anywhere along the tokens, into empty pieces too, the norm is the uncut one's, and one process' but for the
    rounding of its own summation."""
    name, arguments = function
    given = tensors(seed, arguments, samples, 9, dtype)
    places = [0, *sorted(cuts), 9]
    pieces = [[each[:, start:stop] for each in given] for start, stop in itertools.pairwise(places)]
    got = combined(name, pieces, by_sample=by_sample)
    assert combined(name, [given], by_sample=by_sample) == pytest.approx(got, rel=PRECISION[dtype], abs=1e-12)
    assert whole(name, given, by_sample=by_sample) == pytest.approx(got, rel=8 * PRECISION[dtype], abs=PRECISION[dtype])


@given(**CASES, threshold=st.floats(0, 2))
def test_pieces_decide_as_the_whole(function, dtype, seed, samples, cuts, by_sample, threshold):
    """On the same side of any threshold that is not within rounding of the norm."""
    name, arguments = function
    given = tensors(seed, arguments, samples, 9, dtype)
    expected = whole(name, given, by_sample=by_sample)
    assume(not math.isclose(expected, threshold, rel_tol=16 * PRECISION[dtype], abs_tol=PRECISION[dtype]))
    places = [0, *sorted(cuts), 9]
    pieces = [[each[:, start:stop] for each in given] for start, stop in itertools.pairwise(places)]
    assert (expected <= threshold) == (combined(name, pieces, by_sample=by_sample) <= threshold)


@given(**{**CASES, "by_sample": st.just(value=False)}, copies=st.integers(2, 4))
def test_copies_of_one_tensor_have_its_norm(function, dtype, seed, samples, cuts, by_sample, copies):
    """Where processes hold the same instead of pieces, sums and counts grow alike."""
    name, arguments = function
    given = tensors(seed, arguments, samples, 4, dtype)
    once = combined(name, [given], by_sample=False)
    assert once == pytest.approx(combined(name, [given] * copies, by_sample=False), rel=PRECISION[dtype], abs=1e-12)


@pytest.mark.parametrize("function", sorted(NORMS))
def test_one_nan_makes_the_norm_nan(function):
    """Wherever the NaN is, with one norm a sample too."""
    given = tensors(0, 2, 2, 6, torch.float32)
    given[0][1, 5, 2] = math.nan
    for by_sample in (False, True):
        pieces = [[each[:, :3] for each in given], [each[:, 3:] for each in given]]
        assert math.isnan(combined(function, pieces, by_sample=by_sample))


@given(st.integers(0, 24), st.sampled_from([torch.float32, torch.float16]), st.integers(1, 3))
def test_differing_counts_elements(count, dtype, cut):
    """However small a difference is, it counts, and it is not rounded away among many elements."""
    x = torch.ones(1, 4, 6, dtype=dtype)
    y = x.clone().view(-1)
    y[:count] += torch.finfo(dtype).eps
    y = y.view(1, 4, 6)
    pieces = [[x[:, :cut], y[:, :cut]], [x[:, cut:], y[:, cut:]]]
    assert count / 24 == pytest.approx(combined("differing", pieces, by_sample=False))
    assert count / 24 == pytest.approx(whole("differing", [x, y], by_sample=False))
    many = torch.ones(1, 2**17, dtype=dtype)
    other = many.clone()
    other[0, 5] += torch.finfo(dtype).eps
    assert 2**-17 == whole("differing", [many, other], by_sample=False)


def test_nothing_at_all_has_no_norm():
    """Empty tensors, and a distance from zero relative to zero."""
    empty = torch.zeros(1, 0, 4)
    assert math.isnan(combined("l1", [[empty]], by_sample=False))
    assert math.isnan(combined("relative_l1", [[torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)]], by_sample=False))
    assert math.isinf(combined("relative_l1", [[torch.ones(1, 2, 4), torch.zeros(1, 2, 4)]], by_sample=False))
    assert 0.0 == combined("cosine", [[torch.zeros(1, 2, 4), torch.ones(1, 2, 4)]], by_sample=False)


def test_a_known_magnitude_is_used():
    """The sum of |y| need not be made twice."""
    x, y = tensors(3, 2, 2, 5, torch.float32)
    known = share("relative_l1", x, y, by_sample=False, magnitude=summed(y.abs(), by_sample=False))
    assert numbers_of([known]) == numbers_of([share("relative_l1", x, y, by_sample=False)])


def test_numbers_hold_a_row_a_sample():
    """Two samples are two rows; tensors of no dimension and of one are one row, or one an element."""
    x, y = tensors(3, 2, 2, 5, torch.float32)
    assert 2 * MESSAGE_WIDTH == len(numbers_of([share("l1", x, y, by_sample=True)])[0])
    assert [[2.0, 0, 0, 1.0, 0, 0]] == numbers_of([share("l1", torch.tensor(-2.0), None, by_sample=True)])
    assert [[5.0, 0, 0, 2.0, 0, 0]] == numbers_of([share("l1", torch.tensor([-2.0, 3.0]), None, by_sample=False)])
    assert [[2.0, 0, 0, 1.0, 0, 0, 3.0, 0, 0, 1.0, 0, 0]] == numbers_of(
        [share("l1", torch.tensor([-2.0, 3.0]), None, by_sample=True)]
    )
    assert [] == numbers_of([])


def test_dtypes_go_as_numbers():
    """Each dtype of activations comes back; any other number means that processes differ, and float64."""
    for dtype in PRECISION:
        assert dtype is dtype_of(float(share("l1", torch.zeros(1, dtype=dtype), None, by_sample=False).code))
    assert torch.float64 is dtype_of(1.5)
