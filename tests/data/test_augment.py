"""Augmentations keep to the papers' ranges, use all of them, and average areas exactly."""

import numpy as np
import pytest
from PIL import Image

from dalle_cli.data import augment
from dalle_cli.errors import DalleError

SIZE = 64


def coordinates(width, height):
    """A picture whose pixels say where they are: red is x, green is y (at most 256 of each)."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def draws(name, image, n=400, size=SIZE, **options):
    function = augment.by_name(name, **options)
    out = [function(image, size, np.random.default_rng(i)).astype(int) for i in range(n)]
    assert all(pixels.shape == (size, size, 3) for pixels in out)
    return out


def spacing(pixels):
    """How many old pixels a new one spans, negative if flipped."""
    return (pixels[0, -1, 0] - pixels[0, 0, 0]) / (pixels.shape[1] - 1)


@pytest.mark.parametrize(("s", "t"), [(5, 3), (7, 7), (64, 63), (9, 1), (12, 4), (100, 37)])
def test_area_against_pixels_repeated_t_times(s, t):
    pixels = np.random.default_rng(s).integers(0, 256, (s, s, 3), dtype=np.uint8)
    # Each old pixel as t x t small ones: every new pixel is then the mean of exactly s x s of them.
    fine = pixels.astype(np.float64).repeat(t, axis=0).repeat(t, axis=1)
    expected = fine.reshape(t, s, t, s, 3).mean(axis=(1, 3))
    assert np.abs(augment.area(pixels, t) - expected).max() <= 0.5 + 1e-3


def test_dvae_sizes_are_uniform_between_nine_eighths_and_three_halves():
    shown = np.array([abs(spacing(p)) for p in draws("dvae", coordinates(200, 200))])
    t = 200 / shown  # the size that the 200 pixels were resized to
    low, high = 72, 96
    assert t.min() > low - 1.5
    assert t.max() < high + 1.5
    assert np.histogram(t, bins=4, range=(low, high))[0].min() > 60  # 100 expected in each quarter


def test_dvae_small_pictures_keep_their_size():
    image = coordinates(68, 68)  # s < 9/8 S, so t = s: no pixel is resampled, only the crop and the flip vary
    out = draws("dvae", image, flip=False)
    assert {float(spacing(p)) for p in out} == {1.0}
    assert {(p[0, 0, 0], p[0, 0, 1]) for p in out} == {(x, y) for x in range(5) for y in range(5)}


def test_dvae_crops_anywhere_along_the_long_side():
    left = np.array([min(p[0, 0, 0], p[0, -1, 0]) for p in draws("dvae", coordinates(256, 64))])
    assert left.min() < 5
    assert left.max() > 187
    assert abs(left.mean() - 96) < 10


def test_dvae_flips_half_of_the_time_and_only_if_asked():
    image = coordinates(100, 100)
    assert 0.4 < np.mean([spacing(p) < 0 for p in draws("dvae", image)]) < 0.6
    assert not any(spacing(p) < 0 for p in draws("dvae", image, flip=False))
    assert not any(spacing(p) < 0 for p in draws("prior", image))


def test_prior_crops_near_the_center():
    image = coordinates(256, 64)  # slack 192: the crop begins at 72 to 119
    left = {int(p[0, 0, 0]) for p in draws("prior", image, n=800)}
    assert left == set(range(72, 120))
    top = {int(p[0, 0, 1]) for p in draws("prior", coordinates(64, 256), n=800)}
    assert top == set(range(72, 120))


def test_prior_sizes_are_between_one_and_nine_eighths():
    t = np.array([200 / spacing(p) for p in draws("prior", coordinates(200, 200))])
    assert t.min() > 63
    assert t.max() < 73.5
    assert t.min() < 65.5
    assert t.max() > 71
    assert {float(spacing(p)) for p in draws("prior", coordinates(64, 64), n=5)} == {1.0}


@pytest.mark.parametrize("name", ["dvae", "prior", "center"])
@pytest.mark.parametrize("size", [(1, 1), (20, 10), (63, 63), (64, 64), (65, 300), (72, 71)])
def test_every_size_of_picture_works(name, size):
    image = Image.new("RGB", size, (9, 99, 199))
    assert all((p == [9, 99, 199]).all() for p in draws(name, image, n=3))


def test_center_is_the_middle_and_takes_no_chances():
    out = draws("center", coordinates(200, 64), n=3)
    assert out[0][0, 0].tolist() == [68, 0, 0]
    assert out[0][-1, -1].tolist() == [131, 63, 0]
    assert (out[0] == out[1]).all()
    assert (out[1] == out[2]).all()
    half = draws("center", coordinates(128, 128), n=1)[0]
    np.testing.assert_array_equal(half[0, :, 0], np.rint(np.arange(64) * 2 + 0.5))


def test_place_keeps_the_whole_picture_and_fills_with_its_borders_color():
    """A black frame around white around a red middle, on blue edges: nothing is lost, and what is new is blue."""
    pixels = np.full((SIZE, SIZE, 3), (0, 0, 255), np.uint8)
    pixels[8:56, 8:56] = (255, 0, 0)
    pixels[0, :9] = 255  # less than half of the border
    tops, sides = set(), set()
    for out in draws("place", Image.fromarray(pixels)):
        rows, columns = np.nonzero(out[..., 0] > out[..., 2])
        inside = rows > 4  # the white piece of the border is red, too
        side = round((rows[inside].max() - rows[inside].min() + 1) * 64 / 48)
        assert abs(side - (columns[inside].max() - columns[inside].min() + 1) * 64 / 48) < 2
        tops.add(int(rows[inside].min()))
        sides.add(side)
        assert (out[-1, -1] == (0, 0, 255)).all()
    assert min(sides) in (59, 60, 61)
    assert max(sides) == SIZE
    assert min(tops) in (7, 8)
    assert max(tops) >= 11
    shrunk = augment.place(Image.fromarray(pixels), 16, np.random.default_rng(0))
    assert shrunk.shape == (16, 16, 3)


def test_same_generator_same_picture():
    image = coordinates(150, 110)
    for name, function in augment.AUGMENTATIONS.items():
        a, b = (function(image, SIZE, np.random.default_rng(7)) for _ in range(2))
        np.testing.assert_array_equal(a, b)
        if name != "center":
            assert (function(image, SIZE, np.random.default_rng(8)) != a).any()


def test_unknown_name():
    with pytest.raises(DalleError, match=r"expected an augmentation of dvae, prior, place, center, found cutout"):
        augment.by_name("cutout")
