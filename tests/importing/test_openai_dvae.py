"""OpenAI's dVAE: its own encoder and decoder, pickled whole, imported by the command."""

import dall_e
import pytest
import torch
from conftest import run_bad, run_ok
from PIL import Image
from published_priors import randomized
from tensor_lists import check_covers, n_parameters, published_shapes

from dalle_cli.artifacts import open_artifact
from dalle_cli.importing.openai_dvae import FILES, dvae_config, dvae_tensors
from dalle_cli.models.dvae import DVAE, DVAEConfig
from dalle_cli.pipelines import loading

LISTS = {"encoder.pkl": "openai_dvae_encoder", "decoder.pkl": "openai_dvae_decoder"}


def publish(folder):
    """The publisher's two modules, small, saved as they publish them: whole."""
    folder.mkdir()
    sizes = {"n_hid": 64, "n_blk_per_group": 1, "vocab_size": 512}
    made = randomized(dall_e.Encoder(**sizes)), randomized(dall_e.Decoder(**sizes, n_init=16))
    for parameter in (*made[0].parameters(), *made[1].parameters()):
        parameter.mul_(1.6 if parameter.ndim > 1 else 1)  # ReLUs take half, and residuals are scaled down
    logits = made[0].blocks.output.conv
    logits.w -= logits.w.mean(1, keepdim=True)  # or few codes would be the likeliest everywhere
    for module, name in zip(made, FILES, strict=True):
        torch.save(module, folder / name)
    return made


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    root = tmp_path_factory.mktemp("dvae")
    modules = publish(root / "files")
    run_ok("import", root / "files", "-o", root / "bundle")
    return (*modules, root / "bundle")


def test_codes_and_pixels_are_the_publishers(imported):
    encoder, decoder, bundle = imported
    ours = loading.dvae(open_artifact(bundle / "dvae.safetensors"), torch.device("cpu"))
    colors = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).round()
    images = torch.nn.functional.interpolate(colors, scale_factor=8)
    with torch.no_grad():
        logits = encoder(dall_e.map_pixels(images))
        codes = logits.argmax(1)
        one_hot = torch.nn.functional.one_hot(codes, 512).permute(0, 3, 1, 2).float()
        output = decoder(one_hot)
        torch.testing.assert_close(ours.logits(images), logits, rtol=0, atol=1e-4)
        assert torch.equal(ours.encode(images), codes)
        expected = dall_e.unmap_pixels(torch.sigmoid(output[:, :3]))
        torch.testing.assert_close(ours.decode(codes), expected, rtol=0, atol=1e-4)
    assert len(codes.unique()) > 5
    assert expected.std() > 0.1


def test_commands_take_the_bundle(imported, tmp_path):
    image = Image.new("RGB", (40, 30), (220, 30, 30))
    (tmp_path / "photos").mkdir()
    image.save(tmp_path / "photos" / "red.png")
    run_ok("encode-images", tmp_path / "photos", "-m", imported[2], "-o", tmp_path / "codes.safetensors")
    codes = open_artifact(tmp_path / "codes.safetensors")
    assert (codes.require("grid", int), codes.require("n_vocab", int)) == (32, 512)
    run_ok("decode", tmp_path / "codes.safetensors", "-m", imported[2], "-o", tmp_path / "images.safetensors")
    assert "OpenAI's modified MIT License" in (imported[2] / "README.md").read_text()


def test_published_files_at_full_size():
    lists = {name: published_shapes(LISTS[name]) for name in FILES}
    config = dvae_config(*lists.values())
    assert config == DVAEConfig()
    shapes = {f"{name}:{own}": shape for name, own_shapes in lists.items() for own, shape in own_shapes.items()}
    with torch.device("meta"):
        check_covers(DVAE(config), dvae_tensors(shapes), shapes)
    assert [n_parameters(shapes) for shapes in lists.values()] == [53_786_240, 43_829_766]


def test_two_encoders_are_refused(imported, tmp_path):
    publish(tmp_path / "files")
    (tmp_path / "files" / "decoder.pkl").write_bytes((tmp_path / "files" / "encoder.pkl").read_bytes())
    assert "files" in run_bad("import", tmp_path / "files", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
