"""Samplers on targets whose flow is known: where they land, how fast they come near, and what guidance does."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.diffusion.denoiser import Denoised, Guidance, Threshold, denoiser, guidance_interval
from dalle_cli.diffusion.noise import row_noise
from dalle_cli.diffusion.process import PREDICTIONS, Process, target
from dalle_cli.diffusion.samplers import SAMPLERS, ddim, ddim_invert, ddpm, dpm_solver, heun, sample
from dalle_cli.diffusion.schedules import Timesteps, cosine, karras, linear, make_schedule, select_timesteps, to_sigma
from dalle_cli.errors import DalleError
from reference import diffusion as reference

FIXED = ("fixed_small", "fixed_large")  # variances
GAUSSIAN = reference.Gaussian([0.5, -1.0, 0.2, 2.0], [1.0, 0.3, 0.05, 2.0])
MIXTURE = reference.Mixture([[1.0, 0.5], [-0.8, -0.2]], [0.3, 0.7], 0.25)
SOLVERS = {"ddim": ddim, "dpm++": dpm_solver, "heun": heun}


def exact(data, process):
    """The best network for these data: E[x_start | x_t], told as the process's prediction."""

    def network(x, t):
        level = process.schedule.alpha_bar(t[0].item())
        x_start = torch.from_numpy(data.x_start(x.numpy(), level))
        epsilon = (x - math.sqrt(level) * x_start) / math.sqrt(1 - level)
        return target(process.prediction, x_start, epsilon, level)

    return network


def start(data, level, n=64):
    """Draws of x_t at the level where a sampler starts: (n, D) float64."""
    x = row_noise(0, range(n))(0, data.mean.shape if data is GAUSSIAN else (2,)).double()
    if data is MIXTURE:
        return x
    mean, deviation = data.marginal(level)
    return torch.from_numpy(mean) + torch.from_numpy(deviation) * x


def generated(n):
    """Noise of many samples, quicker than row_noise."""
    return lambda step, shape: torch.randn(n, *shape, generator=torch.Generator().manual_seed(step))


def error(found, expected):
    return float(np.abs(found.numpy() - expected).max())


# ---- probability flow


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm++", 2), ("heun", 2)])
def test_order_of_convergence_on_a_gaussian(solver, order, name, prediction):
    """Between two levels, in 20 to 160 steps equal in sigma^(1/7): the error falls with the order of the solver."""
    process = Process(make_schedule(name, 1000), prediction)
    denoise = denoiser(exact(GAUSSIAN, process), process)
    errors = []
    for n in (20, 40, 80, 160):
        whole = karras(process.schedule, n + 1)
        steps = Timesteps(whole.timesteps[:-1], whole.alphas_cumprod[:-1])  # ends at the least sigma, not at data
        x = start(GAUSSIAN, steps.alphas_cumprod[0])
        errors.append(
            error(
                SOLVERS[solver](denoise, x, steps),
                GAUSSIAN.flow(x.numpy(), steps.alphas_cumprod[0], steps.alphas_cumprod[-1]),
            )
        )
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders[-1] == pytest.approx(order, abs=0.2)
    assert errors[-1] < (0.1 if order == 1 else 2e-3)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm++", 2), ("heun", 2)])
def test_order_of_convergence_on_a_mixture(solver, order):
    process = Process(cosine(1000), "v")
    denoise = denoiser(exact(MIXTURE, process), process)
    errors = []
    for n in (40, 80, 160):
        whole = karras(process.schedule, n + 1)
        steps = Timesteps(whole.timesteps[:-1], whole.alphas_cumprod[:-1])
        x = start(MIXTURE, steps.alphas_cumprod[0], 16)
        expected = MIXTURE.flow(x.numpy(), steps.alphas_cumprod[0], steps.alphas_cumprod[-1])
        errors.append(error(SOLVERS[solver](denoise, x, steps), expected))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders[-1] == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading", "karras"])
@pytest.mark.parametrize("solver", ["ddim", "dpm++", "heun"])
def test_whole_way_to_data(solver, spacing):
    """From pure noise to data, as a stage draws, with the last step to level 1."""
    process = Process(cosine(1000), "x_start")
    denoise = denoiser(exact(GAUSSIAN, process), process)
    errors = []
    for n in (25, 100, 400):
        steps = select_timesteps(process.schedule, n, spacing)
        x = start(GAUSSIAN, steps.alphas_cumprod[0])
        drawn = sample(solver, denoise, process.schedule, x, n, row_noise(0, range(64)), spacing=spacing)
        errors.append(error(drawn, GAUSSIAN.flow(x.numpy(), steps.alphas_cumprod[0], 1.0)))
    assert errors[2] < errors[1] < errors[0] < 0.5  # also where the first step goes from a sigma of 20,000 to 16
    assert errors[2] < (0.06 if solver == "ddim" else 0.02)


@pytest.mark.parametrize("solver", ["ddim", "dpm++", "heun"])
def test_starts_where_no_data_are_left(solver):
    """Zero terminal SNR: the first level is 0, its sigma infinite."""
    process = Process(make_schedule("linear", 1000, zero_snr=True), "v")
    denoise = denoiser(exact(GAUSSIAN, process), process)
    x = start(GAUSSIAN, 0.0)
    drawn = sample(solver, denoise, process.schedule, x, 200, row_noise(0, range(64)), spacing="trailing")
    assert error(drawn, GAUSSIAN.flow(x.numpy(), 0.0, 1.0)) < 0.1


def test_heun_calls_the_network_twice_a_step_but_for_the_last():
    process = Process(linear(100))
    calls = []

    def network(x, t):
        calls.append(t[0].item())
        return x

    sample("heun", denoiser(network, process), process.schedule, torch.zeros(1, 2), 5, row_noise(0, [0]))
    assert len(calls) == 9
    assert calls[1::2] == calls[2::2]


# ---- ancestral sampling


@pytest.mark.parametrize("variance", FIXED)
@pytest.mark.parametrize("n", [10, 100])
def test_ddpm_by_moments(n, variance):
    """What n steps draw is Gaussian, with moments that follow exactly; more steps bring them to the data's."""
    process = Process(linear(1000), "epsilon")
    steps = select_timesteps(process.schedule, n)
    noise = generated(4000)
    drawn = ddpm(denoiser(exact(GAUSSIAN, process), process), noise(0, (4,)).double(), steps, noise, variance)
    mean, deviation = GAUSSIAN.ancestral(steps.alphas_cumprod, variance == "fixed_large")
    check_moments(drawn, mean, deviation)
    if n == 100:
        np.testing.assert_allclose(mean, GAUSSIAN.mean, atol=0.02)
        np.testing.assert_allclose(deviation, GAUSSIAN.deviation, rtol=0.1, atol=0.02)


def test_ddim_with_eta_1_by_moments():
    process = Process(cosine(1000), "v")
    noise = generated(4000)
    steps = select_timesteps(process.schedule, 40)
    drawn = ddim(denoiser(exact(GAUSSIAN, process), process), noise(0, (4,)).double(), steps, 1.0, noise)
    check_moments(drawn, *GAUSSIAN.ancestral(steps.alphas_cumprod, large=False))


def check_moments(drawn, mean, deviation):
    """Within 4.5 standard errors, each coordinate."""
    n = len(drawn)
    assert (np.abs(drawn.mean(0).numpy() - mean) < 4.5 * deviation / math.sqrt(n)).all()
    assert (np.abs(drawn.std(0).numpy() / deviation - 1) < 4.5 / math.sqrt(2 * n)).all()


@pytest.mark.parametrize("zero_snr", [False, True])
def test_ddim_with_eta_1_is_ddpm(zero_snr):
    process = Process(make_schedule("cosine", 100, zero_snr=zero_snr), "v")
    denoise = denoiser(exact(MIXTURE, process), process)
    noise = row_noise(5, range(8))
    x, steps = noise(0, (2,)).double(), select_timesteps(process.schedule, 30)
    torch.testing.assert_close(ddim(denoise, x, steps, 1.0, noise), ddpm(denoise, x, steps, noise), rtol=0, atol=1e-9)
    assert not torch.allclose(ddim(denoise, x, steps, 0.5, noise), ddim(denoise, x, steps, 1.0, noise), atol=0.01)
    assert not torch.allclose(ddim(denoise, x, steps, 0.5, noise), ddim(denoise, x, steps), atol=0.01)


def test_eta_is_a_share_of_the_deviation():
    """One step with x_start known: what it adds is eta times what DDPM adds, and the variance of x_s stays."""
    one = Timesteps((3,), (0.2, 0.6))
    x, flat = torch.full((5, 1), 0.7, dtype=torch.double), torch.ones(5, 1, dtype=torch.double)

    def moved(eta, scale):
        return ddim(lambda x, t: Denoised(0 * x, flat), x, one, eta, lambda step, shape: scale * flat)

    unit = ddpm(lambda x, t: Denoised(0 * x, flat), x, one, lambda step, shape: flat)
    unit = unit - ddpm(lambda x, t: Denoised(0 * x, flat), x, one, lambda step, shape: 0 * flat)
    for eta in (0.3, 0.5, 1.0):
        added = moved(eta, 1) - moved(eta, 0)
        torch.testing.assert_close(added, eta * unit)
        torch.testing.assert_close(added**2 + moved(eta, 0) ** 2, (1 - 0.6) * flat)


def test_learned_variance_lies_between_the_fixed_ones():
    """-1 and 1 are the bounds; between them the logarithm is interpolated (Nichol & Dhariwal 2021, eq. 15)."""
    process = Process(linear(100), "epsilon", learned_variance=True)
    plain = Process(linear(100), "epsilon")
    noise = row_noise(6, range(8))
    x, steps = noise(0, (2,)).double(), select_timesteps(process.schedule, 10)

    def drawn(place):
        network = exact(MIXTURE, plain)
        learned = denoiser(lambda x, t: torch.cat([network(x, t), torch.full_like(x, place)], 1), process)
        return ddpm(learned, x, steps, noise)

    def fixed(variance):
        return ddpm(denoiser(exact(MIXTURE, plain), plain), x, steps, noise, variance)

    torch.testing.assert_close(drawn(-1.0), fixed("fixed_small"), rtol=0, atol=1e-12)
    torch.testing.assert_close(drawn(1.0), fixed("fixed_large"), rtol=0, atol=1e-12)
    one = Timesteps(steps.timesteps[:1], steps.alphas_cumprod[:2])
    middle = ddpm(lambda x, t: Denoised(0 * x, x, torch.full_like(x, 0.5)), x, one, noise)
    ends = [ddpm(lambda x, t: Denoised(0 * x, x), x, one, noise, variance) for variance in FIXED]
    none = ddpm(lambda x, t: Denoised(0 * x, x), x, one, lambda step, shape: torch.zeros(8, *shape))
    with pytest.raises(DalleError, match="a learned variance for learned_range"):
        ddpm(lambda x, t: Denoised(0 * x, x), x, one, noise, "learned_range")
    with pytest.raises(DalleError, match="a variance among learned_range, fixed_small, fixed_large, found 'large'"):
        ddpm(lambda x, t: Denoised(0 * x, x), x, one, noise, "large")
    geometric = none + (noise(1, (2,)).sign() * ((ends[0] - none) * (ends[1] - none)).sqrt())
    torch.testing.assert_close(middle, geometric, rtol=0, atol=1e-12)


# ---- inversion


def test_inversion_and_back_comes_nearer_with_steps_and_with_iterations():
    process = Process(cosine(1000), "epsilon")
    denoise = denoiser(exact(MIXTURE, process), process)
    x = torch.tensor([[1.1, 0.4], [0.9, 0.8], [-0.9, -0.1], [-1.2, -0.3]], dtype=torch.double)
    errors = []
    for n in (25, 50, 100, 200):
        steps = select_timesteps(process.schedule, n, "karras")
        errors.append(error(ddim(denoise, ddim_invert(denoise, x, steps), steps), x.numpy()))
    assert all(b < 0.7 * a for a, b in itertools.pairwise(errors))
    steps = select_timesteps(process.schedule, 25, "karras")
    for iterations, most in ((1, 1.0), (3, 0.1), (20, 1e-6)):
        back = ddim(denoise, ddim_invert(denoise, x, steps, iterations), steps)
        assert error(back, x.numpy()) < most * errors[0] * 1.001


def test_inversion_finds_the_noise_of_the_flow():
    process = Process(linear(1000), "v")
    denoise = denoiser(exact(GAUSSIAN, process), process)
    steps = select_timesteps(process.schedule, 500)
    x = start(GAUSSIAN, 1.0)
    found = ddim_invert(denoise, x, steps)
    assert error(found, GAUSSIAN.flow(x.numpy(), 1.0, steps.alphas_cumprod[0])) < 0.1
    with pytest.raises(DalleError, match="1 iteration or more"):
        ddim_invert(denoise, x, steps, 0)


# ---- guidance


class Recorder:
    """A network of given outputs for conditional and null rows, which counts the rows of each call."""

    def __init__(self, process, learned=False):
        self.process, self.learned, self.rows = process, learned, []

    def __call__(self, x, t):
        self.rows.append(len(x))
        condition = torch.tensor([1.0] * 3 + [-0.5] * 3, dtype=x.dtype)[: len(x)].unsqueeze(1)
        output = torch.tanh(x + condition) * (1 + t[0] / 100)
        return torch.cat([output, condition.expand_as(x)], 1) if self.learned else output


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guidance_is_that_of_the_equation(prediction):
    process = Process(linear(100), prediction)
    x = row_noise(1, range(3))(0, (4,)).double()
    network = Recorder(process)
    conditional, null = network(torch.cat([x, x]), torch.full((6,), 40)).chunk(2)
    single = [denoiser(lambda x, t, out=out: out, process)(x, 40) for out in (conditional, null)]
    guided = denoiser(network, process, Guidance(3.0))(x, 40)
    for field in (0, 1):  # x_start and epsilon alike, whatever is predicted
        expected = single[1][field] + 3 * (single[0][field] - single[1][field])
        torch.testing.assert_close(guided[field], expected, rtol=0, atol=1e-10)


def test_guidance_of_scale_1_is_the_identity_and_costs_nothing():
    process = Process(linear(100))
    x = row_noise(1, range(3))(0, (4,)).double()
    network = Recorder(process)
    assert torch.equal(
        denoiser(network, process, Guidance(1.0))(x, 40).x_start, denoiser(network, process)(x, 40).x_start
    )
    assert network.rows == [3, 3]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("at", [0, 4, 9])
def test_guidance_at_a_single_step_changes_the_result(sampler, at):
    """First, middle and last: each is guided alone, and no other call has null rows."""
    process = Process(cosine(100), "x_start")
    steps = select_timesteps(process.schedule, 10)
    noise = row_noise(2, range(3))
    x = noise(0, (4,)).double()
    sigma = to_sigma(steps.alphas_cumprod[at])
    network = Recorder(process)

    def drawn(guidance):
        network.rows.clear()
        denoise = denoiser(network, process, guidance)
        return sample(sampler, denoise, process.schedule, x, 10, noise, spacing="trailing")

    free = drawn(Guidance())
    guided = drawn(Guidance(4.0, sigma * 0.99, sigma))
    times = 2 if sampler == "heun" and at > 0 else 1
    assert network.rows.count(6) == times
    assert network.rows.count(3) == len(network.rows) - times
    assert (guided - free).abs().max() > 1e-3
    assert torch.equal(drawn(Guidance(4.0, sigma, sigma)), free)


def test_guidance_intervals_that_meet_share_no_step():
    schedule = linear(100)
    spans = [guidance_interval(schedule, 2.0, a, b) for a, b in itertools.pairwise((0, 0.07, 0.5, 0.97, 1))]
    held = [[span.applies_at(schedule.alpha_bar(t)) for span in spans] for t in range(99, -1, -1)]
    assert all(sum(row) == 1 for row in held)
    assert [row.index(True) for row in held] == sorted(row.index(True) for row in held)
    assert [sum(column) for column in zip(*held, strict=True)] == [7, 43, 47, 3]
    everything = guidance_interval(make_schedule("linear", 100, zero_snr=True), 2.0, 0, 1)
    assert all(everything.applies_at(level) for level in (0.0, 0.5, 0.9999))
    with pytest.raises(DalleError, match="a guidance interval within 0 to 1"):
        guidance_interval(schedule, 2.0, 0.5, 0.4)


def test_guided_variance_is_the_conditional_one():
    process = Process(linear(100), learned_variance=True)
    x = row_noise(1, range(3))(0, (4,)).double()
    guided = denoiser(Recorder(process, learned=True), process, Guidance(3.0))(x, 40)
    assert torch.equal(guided.interpolation, torch.ones_like(x))
    assert guided.x_start.shape == x.shape


# ---- thresholds


def test_threshold_clips_and_epsilon_follows():
    process = Process(linear(1000))
    x = 3 * row_noise(1, range(3))(0, (4,)).double()
    free = denoiser(lambda x, t: torch.zeros_like(x), process)(x, 700)
    cut = denoiser(lambda x, t: torch.zeros_like(x), process, threshold=Threshold(2.0))(x, 700)
    assert free.x_start.abs().max() > 2
    assert torch.equal(cut.x_start, free.x_start.clamp(-2, 2))
    level = process.schedule.alpha_bar(700)
    torch.testing.assert_close(math.sqrt(level) * cut.x_start + math.sqrt(1 - level) * cut.epsilon, x)


@settings(max_examples=30, deadline=None)
@given(quantile=st.floats(0.01, 0.99), limit=st.floats(0.1, 3), scale=st.floats(0.1, 10))
def test_dynamic_threshold_matches_numpy(quantile, limit, scale):
    x = scale * row_noise(1, range(3))(0, (2, 5)).double()
    found = Threshold(limit, quantile)(x)
    for row, out in zip(x.numpy(), found.numpy(), strict=True):
        cut = max(np.quantile(np.abs(row), quantile), limit)
        np.testing.assert_allclose(out, np.clip(row, -cut, cut) / cut * limit, atol=1e-12)
    assert found.abs().max() <= limit + 1e-12


# ---- samples


def test_samplers_by_name():
    process = Process(linear(100), "v")
    denoise = denoiser(exact(MIXTURE, process), process)
    noise = row_noise(8, range(3))
    x, trailing = noise(0, (2,)).double(), select_timesteps(process.schedule, 7)
    expected = {
        "ddpm": ddpm(denoise, x, trailing, noise),
        "ddim": ddim(denoise, x, trailing, 0.6, noise),
        "dpm++": dpm_solver(denoise, x, trailing),
        "heun": heun(denoise, x, karras(process.schedule, 7)),
    }
    assert tuple(expected) == SAMPLERS
    for name, drawn in expected.items():
        assert torch.equal(sample(name, denoise, process.schedule, x, 7, noise, eta=0.6), drawn)
    linspace = ddim(denoise, x, select_timesteps(process.schedule, 7, "linspace"))
    assert torch.equal(sample("ddim", denoise, process.schedule, x, 7, noise, spacing="linspace"), linspace)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(sampler):
    process = Process(cosine(100), "v")

    def network(x, t):
        return torch.sin(x + t.view(-1, 1) / 30)

    def drawn(indices):
        noise = row_noise(7, indices, "prior")
        denoise = denoiser(network, process, threshold=Threshold(1.5, 0.9))
        return sample(sampler, denoise, process.schedule, noise(0, (5,)), 8, noise, eta=0.7)

    together = drawn([2, 5, 11])
    assert torch.equal(together, torch.cat([drawn([i]) for i in (2, 5, 11)]))
    assert (together[0] - together[1]).abs().max() > 0.01


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_low_precision_networks_leave_x_in_its_own(prediction):
    process = Process(cosine(100), prediction)
    noise = row_noise(7, [0])
    denoise = denoiser(lambda x, t: x.bfloat16(), process)
    assert [part.dtype for part in denoise(noise(0, (5,)), 40)[:2]] == [torch.float32] * 2
    assert sample("ddim", denoise, process.schedule, noise(0, (5,)), 8, noise).dtype == torch.float32


def test_bad_settings_are_refused():
    process = Process(cosine(10))
    denoise, noise = denoiser(lambda x, t: x, process), row_noise(0, [0])
    x, steps = torch.zeros(1, 2), select_timesteps(process.schedule, 3)
    with pytest.raises(DalleError, match=r"expected a sampler among ddpm, ddim, dpm\+\+, heun, found 'euler'"):
        sample("euler", denoise, process.schedule, x, 3, noise)
    with pytest.raises(DalleError, match=r"eta in \[0, 1\], found 1\.5"):
        ddim(denoise, x, steps, 1.5, noise)
    with pytest.raises(DalleError, match=r"expected noise for eta 0\.5, found none"):
        ddim(denoise, x, steps, 0.5)
