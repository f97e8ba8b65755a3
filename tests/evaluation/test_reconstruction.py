"""Scores of reconstructions against closed forms, a slow twin, and scikit-image; how codes are used."""

import math

import numpy as np
import pytest
import torch

from dalle_cli.errors import DalleError
from dalle_cli.evaluation import reconstruction as module
from dalle_cli.evaluation.reconstruction import Reconstructions, psnr, squared_error, ssim, usage
from reference import reconstruction as reference


def pictures(n=3, height=13, width=16, seed=0, noise=30):
    """Random pictures, and others near them: (n, 3, height, width) uint8, twice."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 256, (n, 3, height, width))
    second = np.clip(first + rng.normal(0, noise, first.shape), 0, 255)
    return torch.from_numpy(first.astype(np.uint8)), torch.from_numpy(second.astype(np.uint8))


def decibels(images, shown):
    return psnr(squared_error(images, shown))


# Images


@pytest.mark.parametrize("off", [1, 2, 50, 255])
def test_psnr_of_a_constant_error_is_its_closed_form(off):
    images = torch.zeros(2, 3, 5, 7, dtype=torch.uint8)
    expected = 20 * math.log10(255 / off)
    torch.testing.assert_close(decibels(images, images + off), torch.full((2,), expected, dtype=torch.double))


def test_psnr_of_one_wrong_value_and_of_equal_pictures():
    images, _ = pictures(1, 4, 4)
    shown = images.clone()
    shown[0, 1, 2, 3] ^= 1  # off by 1 in one of 48 values
    assert decibels(images, shown).item() == pytest.approx(10 * math.log10(255**2 * 48), abs=1e-12)
    assert decibels(images, images).item() == 100


def test_psnr_does_not_wrap_round_at_zero():
    dark, bright = torch.full((1, 3, 2, 2), 1, dtype=torch.uint8), torch.full((1, 3, 2, 2), 250, dtype=torch.uint8)
    assert decibels(dark, bright).item() == decibels(bright, dark).item() == pytest.approx(20 * math.log10(255 / 249))


def test_both_equal_the_slow_twin():
    images, shown = pictures()
    for i in range(len(images)):
        a, b = images[i].tolist(), shown[i].tolist()
        assert decibels(images, shown)[i].item() == pytest.approx(reference.psnr(a, b), abs=1e-11)
        assert ssim(images, shown)[i].item() == pytest.approx(reference.ssim(a, b), abs=1e-11)


@pytest.mark.parametrize("size", [(11, 11), (40, 29), (64, 64)])
def test_both_equal_scikit_image(size):
    metrics = pytest.importorskip("skimage.metrics")
    images, shown = pictures(4, *size, noise=60)
    for i, (a, b) in enumerate(zip(images.numpy(), shown.numpy(), strict=True)):
        assert decibels(images, shown)[i].item() == pytest.approx(metrics.peak_signal_noise_ratio(a, b), abs=1e-10)
        theirs = metrics.structural_similarity(
            a, b, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        )
        assert ssim(images, shown)[i].item() == pytest.approx(theirs, abs=1e-10)


def test_ssim_of_flat_pictures_is_its_closed_form():
    """Without variance only the luminance is left: (2ab + C1) / (a^2 + b^2 + C1)."""
    a, b = torch.full((1, 3, 12, 12), 100, dtype=torch.uint8), torch.full((1, 3, 12, 12), 140, dtype=torch.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b).item() == pytest.approx((2 * 100 * 140 + c1) / (100**2 + 140**2 + c1), abs=1e-12)
    assert ssim(a, a).item() == pytest.approx(1, abs=1e-12)


def test_ssim_falls_with_noise_and_is_negative_for_a_negative():
    scores = [ssim(*pictures(noise=noise)).mean().item() for noise in (1, 10, 40, 120)]
    assert scores == sorted(scores, reverse=True)
    images, _ = pictures()
    assert (ssim(images, 255 - images) < -0.5).all()


def test_ssim_of_few_pictures_at_a_time_is_the_same(monkeypatch):
    images, shown = pictures(7)
    whole = ssim(images, shown)
    monkeypatch.setattr(module, "MAX_VALUES", 2 * 3 * 13 * 16)
    torch.testing.assert_close(ssim(images, shown), whole, rtol=0, atol=1e-14)


def test_a_picture_smaller_than_a_window_is_refused():
    with pytest.raises(DalleError, match="at least 11 pixels for SSIM, found 10 x 16"):
        ssim(*pictures(1, 10, 16))


# Codes


def test_usage_equals_the_slow_twin():
    codes = np.random.default_rng(0).integers(0, 9, 200) ** 2
    found = usage(torch.bincount(torch.from_numpy(codes), minlength=100))
    assert found == pytest.approx(reference.usage(codes.tolist()), abs=1e-12)


def test_usage_of_known_shares():
    assert usage(torch.tensor([5, 5, 0, 5, 5])) == pytest.approx((4, 4, 2))
    assert usage(torch.tensor([0, 7, 0])) == pytest.approx((1, 1, 0))
    assert usage(torch.tensor([2, 1, 1])) == pytest.approx((3, 2**1.5, 1.5))


# All of a data set


def collected(batch_size, keep=0, n=10, size=16):
    images, shown = pictures(n, size, size)
    shown[4] = images[4]
    codes = torch.from_numpy(np.random.default_rng(1).integers(0, 5, (n, 2, 4)))
    scores = Reconstructions(8, keep)
    for at in range(0, n, batch_size):
        here = slice(at, at + batch_size)
        scores.add(list(range(n))[here], images[here], shown[here], codes[here])
    return scores, images, shown, codes


def test_means_are_those_of_the_twin():
    scores, images, shown, codes = collected(4)
    of_each = [min(reference.psnr(a, b), 100) for a, b in zip(images.tolist(), shown.tolist(), strict=True)]
    alike = [reference.ssim(a, b) for a, b in zip(images.tolist(), shown.tolist(), strict=True)]
    told = scores.image_metrics()
    assert told["psnr"] == pytest.approx(np.mean(of_each))
    assert told["psnr_error"] == pytest.approx(np.std(of_each, ddof=1) / math.sqrt(10))
    assert told["ssim"] == pytest.approx(np.mean(alike))
    assert told["ssim_error"] == pytest.approx(np.std(alike, ddof=1) / math.sqrt(10))
    apart = ((images.double() - shown.double()) ** 2).mean().item()
    assert told["psnr_pooled"] == pytest.approx(10 * math.log10(255**2 / apart))
    assert (told["images"], told["identical"]) == (10, 1)
    used, perplexity, bits = reference.usage(codes.flatten().tolist())
    assert scores.code_metrics() == pytest.approx(
        {
            "bits_per_pixel": 3 * 8 / 256,  # log2(8) bits for each of 2 x 4 codes, over 16 x 16 pixels
            "bits_per_pixel_entropy": bits * 8 / 256,
            "n_vocab": 8,
            "codes_used": used,
            "perplexity": perplexity,
        }
    )


def test_the_batch_size_changes_nothing():
    first, second = collected(1, 3)[0], collected(10, 3)[0]
    assert first.image_metrics() == pytest.approx(second.image_metrics(), rel=1e-12)
    assert first.code_metrics() == second.code_metrics()
    assert [seen.row for seen in first.worst] == [seen.row for seen in second.worst]


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_the_worst_are_kept_worst_first(batch_size):
    scores, images, shown, _ = collected(batch_size, 4)
    values = decibels(images, shown)
    expected = torch.argsort(values, stable=True)[:4].tolist()
    assert [seen.row for seen in scores.worst] == expected
    for seen in scores.worst:
        assert torch.equal(seen.image, images[seen.row])
        assert torch.equal(seen.decoded, shown[seen.row])
        assert seen.psnr == values[seen.row].item()
        assert seen.ssim == pytest.approx(ssim(images, shown)[seen.row].item(), abs=1e-12)
        assert seen.image.untyped_storage().nbytes() == seen.image.numel()  # not the batch's


def test_a_mask_takes_a_part():
    scores, images, shown, _ = collected(4)
    mask = torch.zeros(10, dtype=torch.bool)
    mask[[2, 4, 7]] = True
    part = scores.image_metrics(mask)
    assert (part["images"], part["identical"]) == (3, 1)
    assert part["psnr"] == pytest.approx(decibels(images, shown)[mask].mean().item())
    assert part["ssim"] == pytest.approx(ssim(images, shown)[mask].mean().item())
    assert scores.image_metrics(torch.zeros(10, dtype=torch.bool)) == {"images": 0}


def test_small_pictures_have_no_ssim():
    scores, *_ = collected(4, 2, size=8)
    assert not {"ssim", "ssim_error"} & set(scores.image_metrics())
    assert scores.worst[0].ssim is None
