"""Published VQGANs at full size: sizes from shapes, and names to ours."""

import pytest
import torch
from tensor_lists import applied, check_covers, n_parameters, published_shapes

from dalle_cli.errors import DalleError
from dalle_cli.importing.vqgan import vqgan_config, vqgan_tensors
from dalle_cli.models.vqgan import VQGAN, VQGANConfig

F8 = {"multipliers": (1, 1, 2, 4), "attention": (32,), "n_vocab": 8192, "quantizer": "gumbel"}


@pytest.mark.parametrize(
    ("name", "config", "parameters"),
    [
        ("min_dalle_detoker", VQGANConfig(encoder=False), 46_709_891),
        ("mindalle_stage1", VQGANConfig(), 76_073_859),
        ("rudalle_vqgan_gumbelf8", VQGANConfig(**F8), 68_995_971),
    ],
)
def test_published_vqgans_fit(name, config, parameters):
    shapes = published_shapes(name)
    assert vqgan_config(shapes) == config
    with torch.device("meta"):
        check_covers(VQGAN(config), vqgan_tensors(shapes), shapes)
    assert n_parameters(shapes) == parameters


def test_prefix_and_discriminator():
    shapes = published_shapes("min_dalle_detoker")
    longer = {f"model.{name}": shape for name, shape in shapes.items()} | {"loss.discriminator.main.0.weight": (64, 3)}
    assert vqgan_config(longer, prefix="model.") == vqgan_config(shapes)
    names = {name: origin.names[0] for name, origin in vqgan_tensors(longer, prefix="model.").items()}
    assert names["quantize.embedding.weight"] == "model.embedding.weight"
    assert len(names) == len(shapes)


def test_pixels_are_the_publishers():
    assert vqgan_config(published_shapes("min_dalle_detoker"), pixels="unit").pixels == "unit"


def test_a_vqgan_of_a_publisher_decodes_as_ours():
    torch.manual_seed(0)
    sizes = {"image_size": 256, "width": 32, "multipliers": (1, 1), "depth": 1, "attention": (), "n_latent": 4}
    ours = VQGAN(VQGANConfig(**sizes, n_embd=4, n_vocab=9, encoder=False))
    theirs = {name.removeprefix("quantize."): tensor for name, tensor in ours.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    read = VQGAN(vqgan_config(shapes))
    read.load_state_dict(applied(vqgan_tensors(shapes), theirs))
    codes = torch.arange(8).view(1, 2, 4)
    assert torch.equal(read.decode(codes), ours.decode(codes))


def test_something_else_is_refused():
    with pytest.raises(DalleError, match="found none"):
        vqgan_config({"layers.0.weight": (3, 3)})
    shapes = published_shapes("min_dalle_detoker")
    del shapes["embedding.weight"]
    with pytest.raises(DalleError, match=r"a tensor quantize\.embedding\.weight"):
        vqgan_config(shapes)
