"""Noise schedules, the timesteps that samplers visit, conversions between predictions, and the noise of a sample."""

import hashlib
import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dalle_cli.diffusion.noise import noise_for, row_noise
from dalle_cli.diffusion.process import (
    PREDICTIONS,
    Process,
    posterior_mean,
    target,
    to_epsilon,
    to_x_start,
    variance_bounds,
)
from dalle_cli.diffusion.schedules import (
    Schedule,
    cosine,
    karras,
    linear,
    make_schedule,
    select_timesteps,
    to_alpha_bar,
    to_sigma,
    zero_terminal_snr,
)
from dalle_cli.errors import DalleError
from reference import diffusion as reference

VALUES = st.floats(-5, 5)


# ---- schedules


@pytest.mark.parametrize("n", [2, 30, 1000, 4000])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedule_matches_reference(name, n):
    expected = torch.tensor(getattr(reference, name)(n), dtype=torch.double)
    torch.testing.assert_close(make_schedule(name, n).alphas_cumprod, expected, rtol=1e-11, atol=0)
    rescaled = torch.tensor(reference.zero_snr(expected.tolist()), dtype=torch.double)
    torch.testing.assert_close(make_schedule(name, n, zero_snr=True).alphas_cumprod, rescaled, rtol=1e-9, atol=1e-18)


def test_ends_of_the_schedules():
    """Ho et al. name betas of 1e-4 and 0.02, and D_KL(q(x_T) || N(0, I)) of about 1e-5; zero SNR has none left."""
    first, last = linear(1000).alphas_cumprod[[0, -1]].tolist()
    assert first == pytest.approx(1 - 1e-4)
    assert 3e-5 < last < 5e-5
    assert cosine(1000).alphas_cumprod[-1] < 1e-8
    for schedule in (linear(1000), cosine(1000)):
        rescaled = zero_terminal_snr(schedule)
        assert rescaled.alphas_cumprod[-1] == 0
        assert rescaled.alphas_cumprod[0] == pytest.approx(schedule.alphas_cumprod[0].item(), rel=1e-12)
        assert rescaled.snr[-1] == 0
        assert math.isinf(rescaled.log_sigmas[-1])


@pytest.mark.parametrize("betas", [[0.5, 0.6], [1.2, 0.5], [0.9, 0.9]])
def test_bad_schedules_are_refused(betas):
    with pytest.raises(DalleError, match="expected decreasing alphas_cumprod"):
        Schedule(torch.tensor(betas, dtype=torch.double))


def test_bad_settings_are_refused():
    with pytest.raises(DalleError, match=r"expected alphas_cumprod .* found torch\.float32"):
        Schedule(torch.tensor([0.9, 0.5]))
    with pytest.raises(DalleError, match="among cosine, linear, flow, found 'cosin'"):
        make_schedule("cosin", 1000)
    with pytest.raises(DalleError, match="2 timesteps or more, found 1"):
        make_schedule("linear", 1)
    with pytest.raises(DalleError, match="1 to 10 steps"):
        select_timesteps(linear(10), 11)
    with pytest.raises(DalleError, match="expected a spacing"):
        select_timesteps(linear(10), 5, "even")
    with pytest.raises(DalleError, match="expected 1 to 9 steps"):
        select_timesteps(linear(10), 10, "leading+1")
    for betas in ((0.02, 1e-4), (0.0, 0.02), (0.1, 1.0), (0.1,)):
        with pytest.raises(DalleError, match="expected two betas between 0 and 1, the smaller one first"):
            make_schedule("linear", 10, betas=betas)
    with pytest.raises(DalleError, match="expected a prediction"):
        Process(linear(10), "noise")
    with pytest.raises(DalleError, match="all noise, found epsilon"):
        Process(make_schedule("linear", 10, zero_snr=True), "epsilon")
    with pytest.raises(DalleError, match="expected 6 channels from the network, found 3"):
        Process(linear(10), learned_variance=True).split(torch.zeros(1, 3), torch.zeros(1, 3))


# ---- levels between timesteps


@pytest.mark.parametrize("schedule", [linear(100), cosine(100)], ids=["linear", "cosine"])
@settings(max_examples=50, deadline=None)
@given(t=st.floats(0, 99))
def test_timestep_inverts_level(schedule, t):
    sigma = to_sigma(schedule.alpha_bar(t))
    assert schedule.timestep(sigma) == pytest.approx(t, abs=1e-6)
    assert to_alpha_bar(sigma) == pytest.approx(schedule.alpha_bar(t), rel=1e-9)


def test_levels_between_timesteps_are_linear_in_log_sigma():
    schedule = cosine(50)
    assert schedule.alpha_bar(7) == schedule.alphas_cumprod[7]
    t = np.linspace(0, 49, 1001)
    expected = np.interp(t, np.arange(50), schedule.log_sigmas.numpy())
    found = [math.log(to_sigma(schedule.alpha_bar(at))) for at in t]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    assert schedule.timestep(1e-9) == 0
    assert schedule.timestep(1e9) == 49


# ---- the timesteps of a sampler


def test_spacings_are_those_of_the_paper():
    """Lin et al. 2023, table 2, T = 1000 and 10 steps, counted from 0."""
    schedule = linear(1000)
    assert select_timesteps(schedule, 10, "leading").timesteps == tuple(range(900, -1, -100))
    assert select_timesteps(schedule, 10, "trailing").timesteps == tuple(range(999, 98, -100))
    assert select_timesteps(schedule, 10, "linspace").timesteps == (999, 888, 777, 666, 555, 444, 333, 222, 111, 0)


@pytest.mark.parametrize("n", [1, 2, 7, 64, 100])
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading", "karras"])
def test_steps_fall_and_end_at_data(spacing, n):
    for schedule in (linear(100), make_schedule("cosine", 100, zero_snr=True)):
        steps = select_timesteps(schedule, n, spacing)
        assert len(steps.timesteps) == n == len(steps.alphas_cumprod) - 1
        assert all(a > b for a, b in itertools.pairwise(steps.timesteps))
        assert all(a < b for a, b in itertools.pairwise(steps.alphas_cumprod))
        assert steps.alphas_cumprod[-1] == 1
        assert steps.alphas_cumprod[:-1] == pytest.approx([schedule.alpha_bar(t) for t in steps.timesteps], rel=1e-9)


def test_karras_sigmas():
    schedule = linear(1000)
    sigmas = [to_sigma(level) for level in karras(schedule, 9, sigma_max=50, rho=5).alphas_cumprod]
    assert sigmas[0] == pytest.approx(50)
    assert sigmas[-2] == pytest.approx(to_sigma(schedule.alpha_bar(0)))
    assert sigmas[-1] == 0
    gaps = np.diff(np.array(sigmas[:-1]) ** (1 / 5))
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-9)
    assert to_sigma(karras(schedule, 9, sigma_max=1e9).alphas_cumprod[0]) == pytest.approx(
        schedule.log_sigmas[-1].exp()
    )


# ---- predictions


@settings(max_examples=100, deadline=None)
@given(level=st.floats(0.01, 0.99), x_start=VALUES, epsilon=VALUES)
def test_conversions_invert_each_other(level, x_start, epsilon):
    x_start, epsilon = (torch.tensor([v], dtype=torch.double) for v in (x_start, epsilon))
    x = math.sqrt(level) * x_start + math.sqrt(1 - level) * epsilon
    for prediction in PREDICTIONS:
        output = target(prediction, x_start, epsilon, level)
        torch.testing.assert_close(to_x_start(prediction, output, x, level), x_start, rtol=0, atol=1e-11)
        torch.testing.assert_close(to_epsilon(prediction, output, x, level), epsilon, rtol=0, atol=1e-11)
        expected = reference.estimate(prediction, output.item(), x.item(), level)
        assert to_x_start(prediction, output, x, level).item() == pytest.approx(expected, abs=1e-11)


@settings(max_examples=100, deadline=None)
@given(level=st.floats(0, 0.9), gap=st.floats(0.01, 0.9), x_start=VALUES, x=VALUES)
def test_posterior_is_bayes_rule(level, gap, x_start, x):
    following = level + gap * (1 - level) * 0.99
    mean, variance = reference.posterior(x_start, x, level, following)
    start, now = torch.tensor([x_start], dtype=torch.double), torch.tensor([x], dtype=torch.double)
    assert posterior_mean(start, now, level, following).item() == pytest.approx(mean, abs=1e-9)
    small, large = variance_bounds(level, following)
    assert small == pytest.approx(variance, rel=1e-9)
    assert small <= large <= 1


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 5, 5)])
def test_noised_is_one_level_for_each_sample(shape):
    schedule = cosine(1000)
    generator = torch.Generator().manual_seed(0)
    x_start, noise = torch.randn(2, *shape, generator=generator)
    t = torch.tensor([0, 3, 500, 999])
    x = Process(schedule).add_noise(x_start, t, noise)
    for i in range(4):
        level = schedule.alphas_cumprod[t[i]].item()
        expected = math.sqrt(level) * x_start[i] + math.sqrt(1 - level) * noise[i]
        torch.testing.assert_close(x[i], expected)
    assert x.dtype == torch.float32


# ---- noise


def test_noise_depends_on_seed_index_step_and_stage_only():
    both = noise_for(1, [4, 9], 2, (3, 5), "decoder")
    assert torch.equal(both[1:], noise_for(1, [9], 2, (3, 5), "decoder"))
    assert torch.equal(both, row_noise(1, [4, 9], "decoder")(2, (3, 5)))
    alone = both[0]
    others = [(2, 4, 2, "decoder"), (1, 5, 2, "decoder"), (1, 4, 3, "decoder"), (1, 4, 2, "prior"), (1, 4, 2, "")]
    for seed, index, step, stage in others:
        assert (noise_for(seed, [index], step, (3, 5), stage)[0] - alone).abs().min() > 0
    assert noise_for(1, [], 0, (3, 5)).shape == (0, 3, 5)


def test_noise_by_hand():
    """The stream's bytes as signed numbers of 32 bits, least byte first, through the quantiles of another library."""
    stream = hashlib.shake_256(f"prior 7 {2**70 + 3} 11".encode()).digest(20)
    whole = [int.from_bytes(stream[i : i + 4], "little", signed=True) for i in range(0, 20, 4)]
    expected = [statistics.NormalDist().inv_cdf((number + 2**31 + 0.5) / 2**32) for number in whole]
    assert noise_for(7, [2**70 + 3], 11, (5,), "prior")[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_noise_is_normal_and_independent():
    noise = noise_for(0, range(4), 0, (50_000,)).double()
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    correlation = np.corrcoef(torch.cat([noise, noise_for(0, range(4), 1, (50_000,))]).numpy())
    assert np.abs(correlation - np.eye(8)).max() < 0.02
    neighbors = torch.corrcoef(torch.stack([noise[:, 1:].flatten(), noise[:, :-1].flatten()]))[0, 1]
    assert abs(neighbors) < 0.01
