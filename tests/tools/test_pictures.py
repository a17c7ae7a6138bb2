# ruff: noqa: E402 - the imports below need torch, and the tests are skipped without it
"""Pictures side by side, at a size that can be looked at."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL")

from cachepolicy.tools.pictures import GAIN, LARGE, Strip, contact_sheet, difference, line, to_pil


@pytest.mark.parametrize(
    ("height", "width", "scale", "size"),
    [
        (32, 32, None, (96, 96)),
        (32, 16, 2, (32, 64)),
        (100, 200, None, (200, 100)),
        (1024, 512, None, (128, LARGE)),
    ],
)
def test_small_pictures_grow_and_large_ones_shrink(height, width, scale, size):
    """Three pictures are side by side with gaps of two pixels, unless a scale is given at a readable size."""
    image = line(torch.zeros(3, 3, height, width), scale)
    assert (3 * size[0] + 4, size[1]) == image.size


@pytest.mark.parametrize("channels", [1, 3])
def test_differences_are_black_where_nothing_differs(channels):
    """A difference is enlarged by the gain, and grey pictures are as good as coloured ones."""
    reference = torch.zeros(1, channels, 4, 4)
    other = reference.clone()
    other[..., 0, 0] = 1 / GAIN
    levels = to_pil(difference(reference, other))[0].convert("L")
    assert [128, 0] == [levels.getpixel((0, 0)), levels.getpixel((1, 0))]
    sheet = contact_sheet([Strip("one", reference), Strip("two", other, difference(reference, other))])
    assert 3 * 96 < sheet.height < 3 * 96 + 80
