"""The small pictures that upsamplers are trained on: deterministic, of the right size, and each flaw is there."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dalle_cli.data import augment, degrade
from dalle_cli.errors import DalleError

NAMES = ("none", "blur", "bsr")


def rng(*seed):
    return np.random.default_rng(seed)


def picture(side=32):
    """Large shapes and fine grain, so that both blur and noise can be seen."""
    y, x = np.mgrid[:side, :side]
    smooth = np.stack([np.sin(x / 5), np.cos(y / 7), np.sin((x + y) / 6)], axis=-1) * 90 + 128
    return np.clip(smooth + rng(7).integers(-25, 26, smooth.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("side", "small"), [(32, 8), (32, 16), (12, 3), (16, 4), (24, 24)])
def test_size_and_determinism(name, side, small):
    make, pixels = degrade.by_name(name), picture(side)
    kept = pixels.copy()
    one, again, other = make(pixels, small, rng(0, 1)), make(pixels, small, rng(0, 1)), make(pixels, small, rng(0, 2))
    assert one.shape == (small, small, 3)
    assert one.dtype == np.uint8
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(pixels, kept)
    assert (name == "bsr") == (not np.array_equal(one, other))


def test_none_is_the_average():
    pixels = picture()
    expected = pixels.reshape(8, 4, 8, 4, 3).astype(float).mean((1, 3))
    np.testing.assert_allclose(degrade.none(pixels, 8, rng()), expected, atol=0.51)


@pytest.mark.parametrize("sigma", [0.6, 2.0])
def test_blur(sigma):
    """3 x 3 pixels, the picture mirrored at its edges, as scipy has it."""
    pixels = picture()
    small = augment.area(pixels, 16).astype(float)
    line = np.exp(-(np.array([-1, 0, 1]) ** 2) / (2 * sigma**2))
    line /= line.sum()
    expected = small
    for axis in (0, 1):
        expected = ndimage.correlate1d(expected, line, axis=axis, mode="reflect")
    got = degrade.by_name("blur", sigma)(pixels, 16, rng())
    np.testing.assert_allclose(got, expected, atol=0.51)
    assert np.abs(got.astype(float) - small).max() > 3


@pytest.mark.parametrize(("along", "across", "angle"), [(2.0, 2.0, 0.0), (4.0, 0.7, 0.5), (0.1, 0.1, 0.0)])
def test_filters(along, across, angle):
    kernel = degrade.gaussian(9, along, across, angle)
    assert kernel.sum() == pytest.approx(1)
    expected = np.stack(
        [ndimage.convolve(picture()[..., c].astype(float), kernel, mode="reflect") for c in range(3)], axis=-1
    )
    np.testing.assert_allclose(degrade.filtered(picture(), kernel), expected.clip(0, 255), atol=0.51)


def test_a_kernel_lies_along_its_angle():
    kernel = degrade.gaussian(21, 6.0, 1.0, np.pi / 4)
    y, x = np.mgrid[-10:11, -10:11]
    covariance = np.cov(np.stack([x.ravel(), y.ravel()]), aweights=kernel.ravel())
    assert covariance[0, 1] > 5  # towards where x and y grow together
    values = np.linalg.eigvalsh(covariance)
    assert values[0] == pytest.approx(1.0, rel=0.2)
    assert values[1] > 15


def test_a_kernel_larger_than_the_picture():
    np.testing.assert_array_equal(degrade.filtered(np.full((4, 4, 3), 77, np.uint8), degrade.gaussian(21, 5, 5, 0)), 77)


def test_bsr_is_stronger_than_blur_and_weaker_with_less_strength():
    pixels = picture(64)
    clean = augment.area(pixels, 16).astype(float)
    errors = {}
    for name, strength in (("blur", 1.0), ("bsr", 1.0), ("bsr", 0.2)):
        make = degrade.by_name(name, strength=strength)
        found = [np.abs(make(pixels, 16, rng(seed)) - clean).mean() for seed in range(30)]
        errors[name, strength] = np.mean(found)
    assert errors["blur", 1.0] < errors["bsr", 0.2] < errors["bsr", 1.0]
    assert errors["bsr", 1.0] < 60  # the picture is still there


@pytest.mark.parametrize("flaw", ["_blurred", "_reduced", "_noised", "_compressed"])
def test_every_flaw_is_in_the_chain(flaw, monkeypatch):
    pixels, called = picture(), []
    original = getattr(degrade, flaw)

    def spy(*args, **named):
        out = original(*args, **named)
        called.append((args[0].shape, out.shape, np.array_equal(args[0], out)))
        return out

    monkeypatch.setattr(degrade, flaw, spy)
    for seed in range(6):
        degrade.bsr(pixels, 8, rng(seed))
    assert len(called) >= 6
    assert sum(not same for _, _, same in called) >= 4
    if flaw != "_reduced":  # in random order: before the reduction, and after it
        assert {before[0] for before, _, _ in called} == {8, 32}


def test_the_noise_is_of_three_kinds():
    flat = np.full((32, 32, 3), 128, np.uint8)
    gray = colored = 0
    for seed in range(40):
        noise = degrade._noised(flat, rng(seed), 1.0).astype(float) - 128
        assert 0.5 < noise.std() < 26
        if np.array_equal(noise[..., 0], noise[..., 1]):
            gray += 1
        elif abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.12:
            colored += 1
    assert 8 <= gray <= 24
    assert 8 <= colored <= 28
    assert gray + colored < 40


def test_jpeg_leaves_its_blocks():
    pixels = picture()
    out = degrade._compressed(pixels, rng(0), 1.0)
    found = []
    for quality in range(30, 96):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
        found.append(np.array_equal(np.asarray(Image.open(file)), out))
    assert any(found)


def test_crops():
    image = Image.fromarray(picture(64))
    cut = degrade.crops(augment.center, 32)
    whole = augment.center(image, 32)
    seen = set()
    for seed in range(40):
        pixels = cut(image, 8, rng(seed))
        places = [(i, j) for i in range(25) for j in range(25) if np.array_equal(whole[i : i + 8, j : j + 8], pixels)]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 30
    assert {place for pair in seen for place in pair} >= {0, 24} or max(max(p) for p in seen) >= 23
    np.testing.assert_array_equal(cut(image, 32, rng(0)), whole)


def test_names():
    for wrong in (("magic", 0.6, 1.0), ("blur", 0.0, 1.0), ("bsr", 0.6, 0.0), ("bsr", 0.6, 1.5)):
        with pytest.raises(DalleError):
            degrade.by_name(*wrong)
