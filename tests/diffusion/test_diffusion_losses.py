"""Losses of denoising networks: against slow twins, and what each part may move."""

import math

import pytest
import torch

from dalle_cli.diffusion.losses import by_timestep, discretized_log_likelihood, losses, min_snr_weights, normal_kl
from dalle_cli.diffusion.noise import noise_for
from dalle_cli.diffusion.process import PREDICTIONS, Process, target
from dalle_cli.diffusion.schedules import cosine, linear, make_schedule
from reference import diffusion as reference

T = torch.tensor([0, 0, 1, 7, 20, 39])


def batch(process, shape=(3, 4), scale=0.3):
    """Pixels, noise, x_t, and an output near what it should be: all float64 but for the timesteps."""
    whole = (scale * noise_for(0, range(6), 0, shape).double()).clamp(-1, 1)
    x_start = ((whole + 1) * 127.5).round() / 127.5 - 1
    x_start[1, 0, 0], x_start[1, 0, 1] = -1, 1  # the outermost bins are open
    noise = noise_for(0, range(6), 1, shape).double()
    x = process.add_noise(x_start, T, noise)
    level = process.schedule.at(T, x)
    output = target(process.prediction, x_start, noise, level) + 0.1 * noise_for(0, range(6), 2, shape)
    if process.learned_variance:
        output = torch.cat([output, noise_for(0, range(6), 3, shape).double()], 1)
    return output, x_start, x, T, noise


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_learned_variance_loss_matches_reference(prediction, name):
    process = Process(make_schedule(name, 40), prediction, learned_variance=True)
    output, x_start, x, t, noise = batch(process)
    found = losses(process, output, x_start, x, t, noise)
    table = process.schedule.alphas_cumprod.tolist()
    wanted = target(prediction, x_start, noise, process.schedule.at(t, x))
    for i in range(6):
        values = zip(*(part[i].flatten().tolist() for part in (output[:, :3], output[:, 3:], x_start, x)), strict=True)
        terms = [
            reference.bound(prediction, o, (place + 1) / 2, start, now, int(t[i]), table)
            for o, place, start, now in values
        ]
        assert found.bound[i].item() == pytest.approx(sum(terms) / len(terms), rel=1e-9)
    simple = [(output[i, :3] - wanted[i]).square().mean().item() for i in range(6)]
    assert found.simple.tolist() == pytest.approx(simple)
    total = [s + 0.001 * 40 * b for s, b in zip(simple, found.bound.tolist(), strict=True)]
    assert found.total.tolist() == pytest.approx(total)
    heavier = losses(process, output, x_start, x, t, noise, bound_weight=0.5)
    assert (heavier.total - found.total).tolist() == pytest.approx([0.499 * 40 * b for b in found.bound.tolist()])


def test_the_bound_teaches_the_variance_alone():
    """Nichol & Dhariwal 2021, sec. 3.1: the mean is detached; the squared error knows no variance."""
    process = Process(linear(40), learned_variance=True)
    output, *rest = batch(process)
    output.requires_grad_()
    (of_bound,) = torch.autograd.grad(losses(process, output, *rest).bound.sum(), output)
    (of_simple,) = torch.autograd.grad(losses(process, output, *rest).simple.sum(), output)
    assert of_bound[:, :3].abs().max() == 0
    assert (of_bound[:, 3:].flatten(1).abs().amax(1) > 0).all()
    assert of_simple[:, 3:].abs().max() == 0
    assert (of_simple[:, :3].flatten(1).abs().amax(1) > 0).all()


def test_bound_is_least_at_the_true_variance():
    """Where x_start is known, the lower bound is the variance and the divergence is 0."""
    process = Process(linear(40), "x_start", learned_variance=True)
    _, x_start, x, t, noise = batch(process)
    perfect = torch.cat([x_start, torch.full_like(x_start, -1)], 1)
    known = losses(process, perfect, x_start, x, t, noise)
    assert known.simple.abs().max() == 0
    assert known.bound[2:].abs().max() < 1e-9
    for place in (-1.2, -0.8, 1.0):
        other = losses(process, torch.cat([x_start, torch.full_like(x_start, place)], 1), x_start, x, t, noise)
        assert (other.bound[2:5] > known.bound[2:5] + 1e-7).all()  # at the last timestep the bounds are one


def test_without_learned_variance_the_loss_is_the_squared_error():
    process = Process(linear(40), "x_start")
    output, x_start, x, t, noise = batch(process)
    found = losses(process, output, x_start, x, t, noise)
    assert found.bound is None
    assert torch.equal(found.total, (output - x_start).square().mean((1, 2)))


def test_losses_work_on_embeddings_and_in_low_precision():
    process = Process(cosine(40), "x_start")
    parts = batch(process, (8, 2))
    vectors = [part.flatten(1).bfloat16() if part.is_floating_point() else part for part in parts]
    found = losses(process, *vectors)
    assert found.total.dtype == torch.float32
    exact = losses(process, *[part.flatten(1) if part.is_floating_point() else part for part in parts])
    torch.testing.assert_close(found.total.double(), exact.total, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_float32_loses_nothing_near_data(name):
    """1 - alphas_cumprod has three digits in float32: coefficients are worked out in float64."""
    process = Process(make_schedule(name, 1000), learned_variance=True)
    parts = batch(process)
    exact = losses(process, *parts)
    found = losses(process, *[part.float() if part.is_floating_point() else part for part in parts])
    torch.testing.assert_close(found.bound.double(), exact.bound, rtol=2e-4, atol=2e-6)


# ---- weights


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_matches_reference(prediction, gamma):
    schedule = cosine(100)
    expected = [reference.min_snr(prediction, level, gamma) for level in schedule.alphas_cumprod.tolist()]
    assert min_snr_weights(schedule, prediction, gamma).tolist() == pytest.approx(expected, rel=1e-12)


def test_min_snr_makes_all_predictions_one_loss():
    """The same wrong x_start costs the same, as whatever it is predicted; without weights it does not."""
    x_start, noise, wrong = (noise_for(0, range(6), step, (8,)).double() for step in range(3))
    weighted, plain = [], []
    for prediction in PREDICTIONS:
        process = Process(linear(40), prediction)
        x, level = process.add_noise(x_start, T, noise), process.schedule.at(T, x_start)
        epsilon = (x - level.sqrt() * wrong) / (1 - level).sqrt()
        output = target(prediction, wrong, epsilon, level)
        weighted.append(losses(process, output, x_start, x, T, noise, min_snr=5.0).total)
        plain.append(losses(process, output, x_start, x, T, noise).total)
    for other in weighted[1:]:
        torch.testing.assert_close(other, weighted[0])
    assert (plain[0] / plain[1] - 1).abs().min() > 0.1


def test_min_snr_where_no_data_are_left():
    schedule = make_schedule("cosine", 50, zero_snr=True)
    assert [min_snr_weights(schedule, prediction)[-1].item() for prediction in PREDICTIONS] == [1, 0, 0]
    process = Process(schedule, "v", learned_variance=True)
    last = torch.tensor([49])
    x_start, noise, output = (noise_for(0, [0], step, (2, 3)) for step in range(3))
    found = losses(
        process, torch.cat([output, output], 1), x_start, process.add_noise(x_start, last, noise), last, noise
    )
    assert found.total.isfinite().all()


# ---- parts


def test_pixels_have_a_distribution():
    """The masses of the 256 bins add up to 1, wherever the mean lies."""
    values = torch.arange(256, dtype=torch.double) / 127.5 - 1
    for mean, deviation in ((0.1, 0.2), (-1.3, 0.5), (1.0, 0.01), (0.0, 3.0)):
        logs = discretized_log_likelihood(values, torch.tensor(mean), torch.tensor(2 * math.log(deviation)).double())
        assert logs.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_normal_kl_matches_torch():
    mean_q, log_q, mean_p, log_p = noise_for(0, range(4), 0, (10,)).double()
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean_q, (log_q / 2).exp()), normal(mean_p, (log_p / 2).exp()))
    torch.testing.assert_close(normal_kl(mean_q, log_q, mean_p, log_p), expected)


def test_by_timestep_adds_up():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    sums, counts = by_timestep(values, torch.tensor([0, 249, 250, 999]), 1000, 4)
    assert sums.tolist() == [3, 4, 0, 8]
    assert counts.tolist() == [2, 1, 0, 1]
    assert not sums.requires_grad
