"""Published diffusion priors: outputs against diffusers' prior and scheduler, ECLIPSE's against a twin, every name."""

import pytest
import torch
from karlo_publication import in_double
from tensor_lists import applied, check_covers, n_parameters, published_shapes

from dalle_cli.diffusion.noise import noise_for
from dalle_cli.errors import DalleError
from dalle_cli.importing.unclip_prior import VARIANCES, prior_part, prior_sizes, prior_tensors
from dalle_cli.models.diffusion_prior import DiffusionPrior
from dalle_cli.sampling.embeddings import PromptBatch, sample_diffusion
from reference import eclipse

HEADS, TEXT, WIDTH = 2, 7, 12  # of the small prior: n_text and the width of states and embeddings
LENGTHS = torch.tensor([7, 3, 2, 5])


@pytest.fixture(scope="module")
def theirs():
    """diffusers' prior with large weights, so that everything in it matters, and statistics that are not trivial."""
    from diffusers import PriorTransformer

    torch.manual_seed(3)
    oracle = PriorTransformer(
        num_attention_heads=HEADS, attention_head_dim=8, num_layers=3, embedding_dim=WIDTH, num_embeddings=TEXT,
        additional_embeddings=4,
    )  # fmt: skip
    for name, parameter in oracle.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name), 0.3)
    oracle.proj_to_clip_embeddings.weight.data *= 3  # so that clipping matters
    oracle.clip_std.data.abs_().add_(0.5)
    return oracle.double().eval().requires_grad_(False)


def imported(tensors):
    """Our prior of a publisher's tensors."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    model = DiffusionPrior(prior_sizes(shapes, {"num_attention_heads": HEADS})).double().eval()
    model.load_state_dict(applied(prior_tensors(shapes), tensors))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def ours(theirs):
    return imported(theirs.state_dict())


def prompts(seed=1, rows=4):
    torch.manual_seed(seed)
    states, z_t = torch.randn(rows, TEXT, WIDTH).double(), 3 * torch.randn(rows, WIDTH).double()
    return PromptBatch(states, LENGTHS[:rows], z_t)


def called(oracle, x, t, given):
    mask = torch.arange(TEXT) < given.lengths[:, None]
    return oracle(x, t, given.z_t, given.tokens, mask).predicted_image_embedding


def test_one_call(theirs, ours):
    given, x = prompts(), torch.randn(4, WIDTH).double()
    for t in (0, 1, 999):
        steps = torch.full((4,), t)
        expected = called(theirs, x, steps, given)
        torch.testing.assert_close(ours(x, steps, *given), expected, rtol=0, atol=1e-4)
    assert expected.std(0).min() > 0.1


def test_a_caption_read_once_serves_all_steps(ours):
    """With captions of several lengths, and several candidates of each."""
    given = prompts()
    prompt = ours.prefill(*given)
    x, t = torch.randn(12, WIDTH).double(), torch.arange(12) * 80
    whole = ours(x, t, *(column.repeat_interleave(3, 0) for column in given))
    torch.testing.assert_close(ours.step(x, t, prompt), whole, rtol=0, atol=1e-12)


def test_pads_are_not_attended_to(ours):
    given, x, t = prompts(), torch.randn(4, WIDTH).double(), torch.full((4,), 500)
    beyond = torch.arange(TEXT) >= LENGTHS[:, None]
    noised = given.tokens + 5 * beyond[..., None]
    torch.testing.assert_close(ours(x, t, noised, *given[1:]), ours(x, t, *given), rtol=0, atol=0)
    shorter = ours(x, t, given.tokens, LENGTHS - 1, given.z_t)
    assert (shorter - ours(x, t, *given)).abs().amax(1).min() > 1e-3
    assert (ours(x, t, given.tokens, LENGTHS, given.z_t / 2) - ours(x, t, *given)).abs().amax(1).min() > 1e-3


def noise_of(indices, step):
    """Our noise of these candidates."""
    return noise_for(0, indices, step, (WIDTH,), "prior 0").double()


def their_samples(oracle, given, null, indices, steps, scale, clip, monkeypatch):
    """As their pipeline samples, with our noise."""
    from diffusers import UnCLIPScheduler
    from diffusers.schedulers import scheduling_unclip

    how = {"variance_type": "fixed_small_log", "clip_sample_range": clip, "prediction_type": "sample"}
    scheduler = in_double(UnCLIPScheduler(**how))
    scheduler.set_timesteps(steps)
    both = PromptBatch(*(torch.cat([n.expand_as(g), g]) for n, g in zip(null, given, strict=True)))
    x, times = noise_of(indices, 0), scheduler.timesteps
    for i, t in enumerate(times):
        monkeypatch.setattr(scheduling_unclip, "randn_tensor", lambda *_, step=i + 1, **__: noise_of(indices, step))
        without, conditional = called(oracle, torch.cat([x, x]), t, both).chunk(2)
        before = times[i + 1] if i + 1 < len(times) else None
        x = scheduler.step(without + scale * (conditional - without), t, x, prev_timestep=before).prev_sample
    return oracle.post_process_latents(x)


@pytest.mark.parametrize(("clip", "scale"), [(5.0, 4.0), (10.0, 2.0)])
def test_a_whole_trajectory(theirs, ours, monkeypatch, clip, scale):
    given, null = prompts(), PromptBatch(*(column[2:3] for column in prompts(seed=2)))
    indices = [5, 6, 1, 9]
    how = {"steps": 8, "guidance_scale": scale, "clip": clip, "spacing": "linspace", "variance": "fixed_small"}
    got = torch.cat(list(sample_diffusion(ours, given, indices, 0, best_of=1, null=null, batch_size=3, **how)))
    expected = their_samples(theirs, given, null, indices, 8, scale, clip, monkeypatch)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    for other in ({"clip": 0.0}, {"spacing": "trailing"}, {"guidance_scale": 1.0}, {"variance": "fixed_large"}):
        wrong = torch.cat(list(sample_diffusion(ours, given, indices, 0, best_of=1, null=null, **{**how, **other})))
        assert (wrong - expected).abs().amax(1).min() > 1e-2, other


def without_time(tensors):
    """ECLIPSE's layout: no timestep, and one position less."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("time_embedding.")}
    return {**kept, "positional_embedding": kept["positional_embedding"][:, :-1]}


def test_eclipse(theirs):
    """One pass from noise; the result is used as it is."""
    tensors, given, indices = without_time(theirs.state_dict()), prompts(), [5, 6, 1, 9]
    model = imported(tensors)
    (got,) = sample_diffusion(model, given, indices, 0, steps=1, best_of=1)
    for row, x in enumerate(noise_of(indices, 0)):
        states, length, z_t = (column[row] for column in given)
        expected = eclipse.prior(x, states, int(length), z_t, tensors, HEADS)
        torch.testing.assert_close(got[row], expected, rtol=0, atol=1e-4)
    with pytest.raises(DalleError, match="expected 1 step of a prior without timesteps, found 2"):
        next(sample_diffusion(model, given, indices, 0, steps=2))


@pytest.mark.parametrize(
    ("name", "config", "total", "time"),
    [
        ("karlo_prior", {"num_attention_heads": 32}, 1_022_030_080, True),
        ("kandinsky22_prior", {"num_attention_heads": 32}, 1_026_225_920, True),
        ("eclipse_karlo_prior", {"num_attention_heads": 16}, 33_143_040, False),
        ("eclipse_kandinsky22_prior", {"num_attention_heads": 16}, 34_193_152, False),
    ],
)
def test_every_published_tensor(name, config, total, time):
    shapes = published_shapes(name)
    sizes = prior_sizes(shapes, config)
    with torch.device("meta"):
        model = DiffusionPrior(sizes)
    check_covers(model, prior_tensors(shapes), shapes)
    assert n_parameters(shapes) == total
    assert (sizes.n_text, sizes.time, sizes.text_width) == (77, time, sizes.n_embedding)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == total  # nothing is stored twice


class Files:
    """A source with these JSON files and the tensors of one list."""

    def __init__(self, shapes, **files):
        self.shapes, self.by_name = shapes, {name.replace("__", "/") + ".json": own for name, own in files.items()}

    def json(self, name):
        return self.by_name[name]

    def tensors(self, name):
        assert name == "prior/diffusion_pytorch_model.safetensors"
        return self


SCHEDULE = {
    "beta_schedule": "squaredcos_cap_v2", "clip_sample": True, "clip_sample_range": 5.0, "num_train_timesteps": 1000,
    "prediction_type": "sample", "variance_type": "fixed_small_log",
}  # fmt: skip


def test_sampling_as_the_schedule_says():
    shapes, config = published_shapes("karlo_prior"), {"num_attention_heads": 32}
    files = Files(shapes, prior__config=config, scheduler__scheduler_config=SCHEDULE)
    part = prior_part(files, "prior/", "scheduler")
    assert part.sampling == {
        "steps": 25, "guidance": 4.0, "best_of": 1, "sampler": "ddpm", "spacing": "linspace",
        "variance": "fixed_small", "clip": 5.0,
    }  # fmt: skip
    other = Files(published_shapes("eclipse_karlo_prior"), prior__config={"num_attention_heads": 16})
    assert prior_part(other, "prior/").sampling == {"steps": 1, "guidance": 1.0, "best_of": 1}
    for key, value in (("prediction_type", "epsilon"), ("beta_schedule", "linear"), ("num_train_timesteps", 4)):
        wrong = Files(shapes, prior__config=config, scheduler__scheduler_config={**SCHEDULE, key: value})
        with pytest.raises(DalleError, match=f"expected {key}"):
            prior_part(wrong, "prior/", "scheduler")
    odd = Files(shapes, prior__config=config, scheduler__scheduler_config={**SCHEDULE, "variance_type": "learned"})
    with pytest.raises(DalleError, match=f"among {', '.join(VARIANCES)}"):
        prior_part(odd, "prior/", "scheduler")
    with pytest.raises(DalleError, match="expected num_attention_heads"):
        prior_part(Files(shapes, prior__config={}), "prior/", "scheduler")
