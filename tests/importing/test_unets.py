"""Published U-Nets: outputs against diffusers' own, saved as it saves them; every name and shape at full size."""

import json

import pytest
import torch
from planted_weights import randomized
from safetensors.torch import load_file
from tensor_lists import applied, check_covers, n_parameters, published_shapes
from torch.nn import functional as F

from dalle_cli.errors import DalleError
from dalle_cli.importing.unets import decoder_sizes, decoder_tensors, upsampler_sizes, upsampler_tensors
from dalle_cli.models.decoder import Decoder
from dalle_cli.models.upsampler import Upsampler

TEXT, WIDTH, CONTEXT = 7, 12, 20  # caption positions, width of CLIP's embeddings and states, width of the context
LENGTHS = torch.tensor([7, 3, 2])  # the last one: start and end, the null caption
UP, DOWN = (
    ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
)
UNET = {
    "sample_size": 16, "block_out_channels": (8, 16, 24, 32), "layers_per_block": 3, "attention_head_dim": 4,
    "down_block_types": (DOWN[0], *DOWN[1:] * 3), "up_block_types": (*UP[1:] * 3, UP[0]),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "norm_num_groups": 4, "resnet_time_scale_shift": "scale_shift",
}  # fmt: skip
UPSAMPLER = {
    "sample_size": 16, "in_channels": 6, "out_channels": 3, "block_out_channels": (8, 16), "layers_per_block": 2,
    "down_block_types": DOWN[:1] * 2, "up_block_types": UP[:1] * 2, "add_attention": False, "norm_num_groups": 4,
}  # fmt: skip


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def saved(model, folder):
    """The tensors and the config of a model as diffusers saves them."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return load_file(str(folder / "diffusion_pytorch_model.safetensors")), config


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def loaded(model, made):
    model.load_state_dict(made)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def karlo(tmp_path_factory):
    """Karlo's decoder, small: diffusers' two models, and ours of their files."""
    from diffusers import UNet2DConditionModel
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    folder = tmp_path_factory.mktemp("karlo")
    unet = UNet2DConditionModel(**UNET, cross_attention_dim=CONTEXT, class_embed_type="identity", out_channels=6,
                                in_channels=3)  # fmt: skip
    text = UnCLIPTextProjModel(clip_extra_context_tokens=3, clip_embeddings_dim=WIDTH, time_embed_dim=32,
                               cross_attention_dim=CONTEXT)  # fmt: skip
    for number, model in enumerate((unet, text)):
        randomized(model, number).eval().requires_grad_(False)
    tensors, config = saved(unet, folder / "decoder")
    tensors |= saved(text, folder / "text_proj")[0]
    sizes = decoder_sizes(shapes_of(tensors), config, n_text=TEXT)
    return unet, text, loaded(Decoder(sizes), applied(decoder_tensors(shapes_of(tensors)), tensors))


def captions(rows=3):
    return {
        "tokens": randn(rows, TEXT, WIDTH, seed=2),
        "lengths": LENGTHS[:rows],
        "z_t": 3 * randn(rows, WIDTH, seed=3),
    }


def test_karlos_decoder(karlo):
    """With guidance: the second half of our rows is null, which is the first half of theirs."""
    unet, text, ours = karlo
    z_i, told, x, t = 2 * randn(2, WIDTH), captions(), randn(2, 3, 16, 16, seed=4), torch.tensor([3, 700])
    rows = torch.tensor([2, 2, 0, 1])  # null captions first, as there
    states, added = text(
        image_embeddings=z_i, prompt_embeds=told["z_t"][rows], text_encoder_hidden_states=told["tokens"][rows],
        do_classifier_free_guidance=True,
    )  # fmt: skip
    mask = F.pad(torch.arange(TEXT) < LENGTHS[rows, None], (3, 0), value=True)
    twice = torch.cat([x, x]), torch.cat([t, t])
    expected = unet(*twice, states, class_labels=added, attention_mask=mask).sample
    given = torch.tensor([False, False, True, True])
    got = ours.denoise(*twice, torch.cat([z_i, z_i]), given, *(column[rows] for column in told.values()))
    assert expected.std() > 0.05
    assert (expected[:2] - expected[2:]).abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def denoised(model, **changed):
    z_i, given = 2 * randn(3, WIDTH), torch.tensor([True, True, True])
    inputs = {"embeddings": z_i, "given": given, **captions(), **changed}
    return model.denoise(randn(3, 3, 16, 16, seed=4), torch.tensor([3, 300, 700]), **inputs)


def test_pads_are_not_attended_to_and_the_rest_is(karlo):
    ours, told = karlo[2], captions()
    beyond = (torch.arange(TEXT) >= LENGTHS[:, None])[..., None]
    whole = denoised(ours)
    torch.testing.assert_close(denoised(ours, tokens=told["tokens"] + 5 * beyond), whole, rtol=0, atol=0)
    changes = {
        "a state": {"tokens": told["tokens"] + 5 * ~beyond},
        "the length": {"lengths": LENGTHS - 1},
        "z_t": {"z_t": told["z_t"] / 2},
        "z_i": {"embeddings": randn(3, WIDTH, seed=9)},
        "the length of z_i": {"embeddings": randn(3, WIDTH)},
        "the null": {"given": torch.tensor([False] * 3)},
    }
    for name, change in changes.items():
        assert (denoised(ours, **change) - whole).abs().flatten(1).amax(1).min() > 1e-3, name


def test_captions_that_do_not_fit(karlo):
    told = captions()
    for wrong, says in (
        ({"tokens": told["tokens"][:, 1:]}, "captions as 7 x 12 states, found 6 x 12"),
        ({"z_t": None}, "captions' embeddings of 12 numbers, found none"),
        ({"z_t": told["z_t"][:, 1:]}, "captions' embeddings of 12 numbers, found some of 11"),
    ):
        with pytest.raises(DalleError, match=says):
            denoised(karlo[2], **wrong)


def test_karlos_upsampler(tmp_path):
    """Both U-Nets, whose tensors have the same names."""
    from diffusers import UNet2DModel

    theirs, tensors, files = [], {}, ("first/x.safetensors", "last/x.safetensors")
    for number, file in enumerate(files):
        theirs.append(randomized(UNet2DModel(**UPSAMPLER), number).eval().requires_grad_(False))
        own, config = saved(theirs[-1], tmp_path / str(number))
        tensors |= {f"{file}:{name}": tensor for name, tensor in own.items()}
    sizes = upsampler_sizes(shapes_of(tensors), config, *files, low_size=8)
    assert (sizes.image_size, sizes.factor, sizes.learned_variance, sizes.clamp) == (16, 2, False, False)
    ours = loaded(Upsampler(sizes), applied(upsampler_tensors(shapes_of(tensors), *files), tensors))
    x, enlarged, t = randn(2, 3, 16, 16), randn(2, 3, 16, 16, seed=2), torch.tensor([3, 700])
    expected = [unet(torch.cat([x, enlarged], dim=1), t).sample for unet in theirs]
    assert (expected[0] - expected[1]).abs().max() > 0.1
    for last, output in enumerate(expected):
        torch.testing.assert_close(ours(x, t, enlarged, last=bool(last)), output, rtol=0, atol=1e-4)
    one = saved(theirs[1], tmp_path / "one")[0]
    alone = loaded(
        Upsampler(upsampler_sizes(shapes_of(one), config, low_size=8)), applied(upsampler_tensors(shapes_of(one)), one)
    )
    for last in (False, True):
        torch.testing.assert_close(alone(x, t, enlarged, last=last), expected[1], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def kandinsky(tmp_path_factory):
    """Kandinsky 2.2's decoder, small, in latents: diffusers' model, and ours of its file; null z_i are zeros."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        **UNET, in_channels=4, out_channels=8, cross_attention_dim=CONTEXT, encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="image_proj", addition_embed_type="image",
    )  # fmt: skip
    randomized(unet).eval().requires_grad_(False)
    tensors, config = saved(unet, tmp_path_factory.mktemp("kandinsky"))
    sizes = decoder_sizes(shapes_of(tensors), config)
    made = applied(decoder_tensors(shapes_of(tensors)), tensors) | {"null_embedding": torch.zeros(WIDTH)}
    return unet, loaded(Decoder(sizes), made)


def test_kandinskys_decoder(kandinsky):
    unet, ours = kandinsky
    z_i, x, t = 2 * randn(3, WIDTH), randn(3, 4, 16, 16, seed=4), torch.tensor([3, 300, 700])
    given, none = torch.tensor([True, True, False]), torch.zeros(3, 0, dtype=torch.int64)
    expected = unet(x, t, None, added_cond_kwargs={"image_embeds": z_i * given[:, None]}).sample
    assert expected.shape == (3, 8, 16, 16)
    assert expected.std() > 0.05
    got = ours.denoise(x, t, z_i, given, none, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert (ours.denoise(x, t, z_i, ~given, none, none[:, 0:1].sum(1)) - got).abs().flatten(1).amax(1).min() > 1e-3


HEADS = {"attention_head_dim": 64, "sample_size": 64}


def test_every_tensor_of_karlos_decoder():
    unet, text = published_shapes("karlo_decoder"), published_shapes("karlo_text_proj")
    assert n_parameters(unet) == 885_439_686
    assert n_parameters(text) == 7_878_400
    shapes = {**unet, **text}
    sizes = decoder_sizes(shapes, HEADS)
    assert (sizes.width, sizes.multipliers, sizes.depth, sizes.attention) == (320, (1, 2, 3, 4), 3, (32, 16, 8))
    assert (sizes.n_embedding, sizes.n_extra, sizes.n_text, sizes.context_width) == (768, 4, 77, 1536)
    with torch.device("meta"):
        model = Decoder(sizes)
    check_covers(model, decoder_tensors(shapes), shapes)


def test_every_tensor_of_karlos_upsamplers():
    own = published_shapes("karlo_super_res_first")
    assert n_parameters(own) == 691_579_523
    shapes = {f"{file}:{name}": shape for file in ("a", "b") for name, shape in own.items()}
    sizes = upsampler_sizes(shapes, {"sample_size": 256}, "a", "b", low_size=64)
    assert (sizes.width, sizes.multipliers, sizes.depth, sizes.attention) == (320, (1, 2, 3, 4), 3, ())
    with torch.device("meta"):
        model = Upsampler(sizes)
    check_covers(model, upsampler_tensors(shapes, "a", "b"), shapes)


def test_every_tensor_of_kandinskys_decoder():
    """But for the null embedding, which its file does not have."""
    shapes = published_shapes("kandinsky22_decoder")
    sizes = decoder_sizes(shapes, HEADS)
    assert (sizes.width, sizes.multipliers, sizes.depth, sizes.attention) == (384, (1, 2, 3, 4), 3, (32, 16, 8))
    assert (sizes.n_embedding, sizes.n_extra, sizes.n_text, sizes.context_width) == (1280, 32, 0, 768)
    assert (sizes.channels, sizes.out_channels) == (4, 8)
    with torch.device("meta"):
        model = Decoder(sizes)
    del model.null_embedding
    check_covers(model, decoder_tensors(shapes), shapes)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({**HEADS, "freq_shift": 1}, "expected freq_shift 0 in a U-Net's config.json, found 1"),
        ({**HEADS, "attention_head_dim": [64, 32]}, "expected one attention_head_dim"),
        ({**HEADS, "sample_size": None}, "expected sample_size"),
    ],
    ids=str,
)
def test_other_unets(config, says):
    shapes = {**published_shapes("karlo_decoder"), **published_shapes("karlo_text_proj")}
    with pytest.raises(DalleError, match=says):
        decoder_sizes(shapes, config)
    with pytest.raises(DalleError, match="expected a tensor"):
        decoder_sizes(published_shapes("karlo_decoder"), HEADS)
