"""Every sampler against the schedulers of `diffusers`, step for step, in float64.

The schedulers keep float32 tables; they are given ours, as what is compared are the steps. That the tables agree is a
test of its own. Importing them takes some seconds, so this file holds nothing else.
"""

import pytest
import torch

from dalle_cli.diffusion.denoiser import Guidance, Threshold, denoiser
from dalle_cli.diffusion.noise import row_noise
from dalle_cli.diffusion.process import PREDICTIONS, Process
from dalle_cli.diffusion.samplers import ddim, ddim_invert, ddpm, dpm_solver, heun, sample
from dalle_cli.diffusion.schedules import Schedule, cosine, karras, linear, make_schedule, select_timesteps, to_sigma

pytest.importorskip("diffusers", reason="the oracle of this file")
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UnCLIPScheduler,
)
from diffusers.schedulers import scheduling_ddpm, scheduling_dpmsolver_multistep, scheduling_unclip

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs
TYPES = {"epsilon": "epsilon", "x_start": "sample", "v": "v_prediction"}
NOISE = row_noise(0, range(3))
SHAPE = (2, 3, 2)
START = NOISE(0, SHAPE).double()


def network(x, t):
    """Something smooth that no sampler knows."""
    mixed = x.roll(1, dims=1)
    return torch.tanh(0.7 * x - 0.4 * mixed + t.view(-1, 1, 1, 1).double() / 800) + 0.1 * mixed


def noise(step, shape):
    return NOISE(step, shape).double()


def equip(scheduler, schedule):
    """Our float64 tables instead of its float32 ones, which must agree."""
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), schedule.alphas_cumprod, rtol=2e-4, atol=1e-8)
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.alphas = schedule.alphas_cumprod / schedule.previous
    scheduler.betas = 1 - scheduler.alphas
    return scheduler


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("prediction", "limit"), [("epsilon", 1.0), ("x_start", 5.0), ("epsilon", None)])
@pytest.mark.parametrize("n", [7, 25, 100])
def test_ddpm_is_unclip(monkeypatch, prediction, limit, learned, n):
    """Karlo's scheduler: timesteps in a line, betas of the steps, learned variance between logarithms."""
    schedule = cosine(1000)
    scheduler = equip(
        UnCLIPScheduler(
            variance_type="learned_range" if learned else "fixed_small_log",
            clip_sample=limit is not None,
            clip_sample_range=limit or 1.0,
            prediction_type=TYPES[prediction],
        ),
        schedule,
    )
    scheduler.one = torch.tensor(1.0, dtype=torch.double)
    scheduler.set_timesteps(n)
    steps = select_timesteps(schedule, n, "linspace")
    assert scheduler.timesteps.tolist() == list(steps.timesteps)

    def two(x, t):
        return torch.cat([network(x, t), torch.sin(5 * x)], 1) if learned else network(x, t)

    x = START
    for i, t in enumerate(scheduler.timesteps.tolist()):
        monkeypatch.setattr(scheduling_unclip, "randn_tensor", lambda shape, i=i, **_: noise(i + 1, SHAPE))
        previous = int(scheduler.timesteps[i + 1]) if i + 1 < n else None
        x = scheduler.step(two(x, torch.full((3,), t)), t, x, prev_timestep=previous).prev_sample
    process = Process(schedule, prediction, learned)
    found = ddpm(denoiser(two, process, threshold=limit and Threshold(limit)), START, steps, noise)
    torch.testing.assert_close(found, x, rtol=1e-8, atol=1e-8)


def guided_network(x, t):
    """An epsilon and a variance parameter; the second half of the rows is null, and another in both."""
    conditional = torch.arange(len(x)).view(-1, 1, 1, 1) < len(START)
    return torch.cat([network(x, t), torch.sin(5 * x)], 1) * torch.where(conditional, 1.0, 0.6)


def guided_as_published(output, scale):
    """Guidance of epsilon alone; the variance is that of the conditional half."""
    (conditional, variance), (null, _) = (half.chunk(2, dim=1) for half in output.chunk(2))
    return null + scale * (conditional - null), variance


def test_guidance_with_learned_variance_is_karlos(monkeypatch):
    schedule, scale = cosine(1000), 8.0
    scheduler = equip(UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"), schedule)
    scheduler.one = torch.tensor(1.0, dtype=torch.double)
    scheduler.set_timesteps(25)
    x = START
    for i, t in enumerate(scheduler.timesteps.tolist()):
        monkeypatch.setattr(scheduling_unclip, "randn_tensor", lambda shape, i=i, **_: noise(i + 1, SHAPE))
        previous = int(scheduler.timesteps[i + 1]) if i + 1 < 25 else None
        output = torch.cat(guided_as_published(guided_network(torch.cat([x, x]), torch.full((6,), t)), scale), 1)
        x = scheduler.step(output, t, x, prev_timestep=previous).prev_sample
    denoise = denoiser(guided_network, Process(schedule, "epsilon", True), Guidance(scale), Threshold(1.0))
    found = sample("ddpm", denoise, schedule, START, 25, noise, spacing="linspace")
    torch.testing.assert_close(found, x, rtol=1e-8, atol=1e-8)
    fixed = sample("ddpm", denoise, schedule, START, 25, noise, spacing="linspace", variance="fixed_small")
    assert (fixed - x).abs().max() > 0.01


@pytest.mark.parametrize("n", [7, 50, 100])
def test_fixed_variance_beside_learned_channels_is_kandinskys(monkeypatch, n):
    """Betas of their range, timesteps with an offset, x_start of any size; the variance's channels are unused."""
    schedule, scale = make_schedule("linear", 1000, betas=(0.00085, 0.012)), 4.0
    betas = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012, "variance_type": "fixed_small"}
    spaced = {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False}
    scheduler = equip(DDPMScheduler(**betas, **spaced), schedule)
    scheduler.one = torch.tensor(1.0, dtype=torch.double)
    scheduler.set_timesteps(n)
    x = START
    for i, t in enumerate(scheduler.timesteps.tolist()):
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, i=i, **_: noise(i + 1, SHAPE))
        epsilon, _ = guided_as_published(guided_network(torch.cat([x, x]), torch.full((6,), t)), scale)
        x = scheduler.step(epsilon, t, x).prev_sample
    denoise = denoiser(guided_network, Process(schedule, "epsilon", True), Guidance(scale))
    how = {"spacing": "leading+1", "variance": "fixed_small"}
    assert scheduler.timesteps.tolist() == list(select_timesteps(schedule, n, "leading+1").timesteps)
    torch.testing.assert_close(sample("ddpm", denoise, schedule, START, n, noise, **how), x, rtol=1e-8, atol=1e-8)
    for other in ({**how, "spacing": "leading"}, {**how, "variance": None}):
        assert (sample("ddpm", denoise, schedule, START, n, noise, **other) - x).abs().max() > 1e-3


@pytest.mark.parametrize("threshold", [None, Threshold(0.8), Threshold(1.0, 0.7)], ids=["free", "clip", "dynamic"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_ddim_is_ddim(prediction, eta, threshold, zero_snr):
    if zero_snr and prediction == "epsilon":
        return  # refused by ours: see test_diffusion_schedules
    schedule = make_schedule("linear", 1000, zero_snr)
    scheduler = DDIMScheduler(
        clip_sample=threshold == Threshold(0.8),
        clip_sample_range=0.8,
        thresholding=threshold == Threshold(1.0, 0.7),
        dynamic_thresholding_ratio=0.7,
        sample_max_value=1e9,
        prediction_type=TYPES[prediction],
        timestep_spacing="trailing",
        rescale_betas_zero_snr=zero_snr,
    )
    scheduler = equip(scheduler, schedule)
    scheduler.set_timesteps(20)
    steps = select_timesteps(schedule, 20)
    assert scheduler.timesteps.tolist() == list(steps.timesteps)
    x = START
    for i, t in enumerate(steps.timesteps):
        output = network(x, torch.full((3,), t))
        step_noise = noise(i + 1, SHAPE) if eta else None
        x = scheduler.step(output, t, x, eta, use_clipped_model_output=threshold is not None, variance_noise=step_noise)
        x = x.prev_sample
    found = ddim(denoiser(network, Process(schedule, prediction), threshold=threshold), START, steps, eta, noise)
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("n", [1, 3, 25, 40, 1000])
def test_spacings(spacing, n):
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    if spacing == "linspace" and n == 1:
        return  # theirs takes the timestep nearest to data
    assert scheduler.timesteps.tolist() == list(select_timesteps(linear(1000), n, spacing).timesteps)


def test_every_number_of_steps_on_a_line_is_karlos():
    scheduler, schedule = UnCLIPScheduler(), linear(1000)
    for n in range(2, 1001):
        scheduler.set_timesteps(n)
        assert scheduler.timesteps.tolist() == list(select_timesteps(schedule, n, "linspace").timesteps)


def test_inversion_is_ddim_inverse():
    """Theirs leaves out the step from data to the first timestep, so ours is begun behind it."""
    schedule = linear(1000)
    scheduler = equip(DDIMInverseScheduler(clip_sample=False, timestep_spacing="leading"), schedule)
    scheduler.initial_alpha_cumprod = torch.tensor(1.0, dtype=torch.double)
    scheduler.set_timesteps(20)
    steps = select_timesteps(schedule, 20, "leading")
    x = START
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(network(x, torch.full((3,), t)), t, x).prev_sample
    found = ddim_invert(denoiser(network, Process(schedule)), START, steps)
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spacing", ["trailing", "karras"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("n", [5, 20])
def test_dpm_solver_is_dpm_solver(monkeypatch, n, prediction, spacing):
    class Wide:
        """torch, but for the one line of theirs that takes samples to float32."""

        float32 = torch.float64

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(scheduling_dpmsolver_multistep, "torch", Wide())
    schedule = linear(1000)
    scheduler = equip(
        DPMSolverMultistepScheduler(prediction_type=TYPES[prediction], timestep_spacing="trailing"), schedule
    )
    scheduler.set_timesteps(n)
    steps = select_timesteps(schedule, n, spacing)
    if spacing == "trailing":
        assert scheduler.timesteps.tolist() == list(steps.timesteps)
    scheduler.sigmas = torch.tensor([to_sigma(level) for level in steps.alphas_cumprod], dtype=torch.double)
    x = START
    for t, theirs in zip(steps.timesteps, scheduler.timesteps, strict=True):
        x = scheduler.step(network(x, torch.full((3,), t, dtype=torch.double)), theirs, x).prev_sample
    found = dpm_solver(denoiser(network, Process(schedule, prediction)), START, steps)
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_heun_is_heun():
    schedule = Schedule(linear(1000).alphas_cumprod[:800])  # up to a sigma of 25: above 80 ours goes as DDIM
    betas = (1 - schedule.alphas_cumprod / schedule.previous).tolist()
    scheduler = HeunDiscreteScheduler(800, trained_betas=betas, use_karras_sigmas=True, timestep_spacing="linspace")
    equip(scheduler, schedule)
    scheduler.set_timesteps(12)
    steps = karras(schedule, 12, sigma_max=1e9)
    sigmas = torch.tensor([to_sigma(level) for level in steps.alphas_cumprod], dtype=torch.double)
    each = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    torch.testing.assert_close(scheduler.sigmas.double(), each, rtol=1e-6, atol=0)
    scheduler.sigmas = each
    torch.testing.assert_close(
        scheduler.timesteps.double(),
        torch.tensor(steps.timesteps).double()[[0, *(i // 2 for i in range(2, 24))]],
        rtol=0,
        atol=1e-3,
    )
    x = START * (1 + each[0] ** 2) ** 0.5
    for i, theirs in enumerate(scheduler.timesteps):
        t = torch.full((3,), steps.timesteps[(i + 1) // 2], dtype=torch.double)
        x = scheduler.step(network(scheduler.scale_model_input(x, theirs), t), theirs, x).prev_sample
    found = heun(denoiser(network, Process(schedule)), START, steps)
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)
