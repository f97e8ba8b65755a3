"""VQGANs in the names of taming-transformers, which DALL-E mini, minDALL-E and ruDALL-E share."""

import re

import torch
from torch import Tensor

from dalle_cli.errors import DalleError
from dalle_cli.importing.publication import From, Shape, Shapes, n_layers, renamed
from dalle_cli.models.vqgan import VQGANConfig

IMAGE_SIZE = 256  # of every publication; no tensor depends on it
IGNORED = (r"loss\..*",)  # what a checkpoint keeps of its discriminator

OWN = r"(?:encoder|decoder|quant_conv|post_quant_conv|quantize)\..+"
CODEBOOKS = ("quantize.embed.weight", "quantize.embedding.weight", "embedding.weight")  # Gumbel, nearest, min-dalle's


def vqgan_config(shapes: Shapes, pixels: str = "signed", prefix: str = "") -> VQGANConfig:
    """The sizes of a VQGAN from its tensors, whose names may begin with `prefix`; `pixels` as in `VQGANConfig`.

    Raises:
        DalleError: tensors of something else.
    """
    own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    n_levels = n_layers(own, r"decoder\.up\.(\d+)\.block\.")
    widths = [_shape(own, f"decoder.up.{level}.block.0.conv1.weight")[0] for level in range(n_levels)]
    attends = [level for level in range(n_levels) if f"decoder.up.{level}.attn.0.q.weight" in own]
    book = next((name for name in CODEBOOKS if name in own), "quantize.embedding.weight")
    n_vocab, n_embd = _shape(own, book)[:2]
    return VQGANConfig(
        image_size=IMAGE_SIZE,
        width=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        depth=n_layers(own, r"decoder\.up\.0\.block\.(\d+)\.") - 1,
        attention=tuple(IMAGE_SIZE >> level for level in attends),
        n_latent=_shape(own, "decoder.conv_in.weight")[1],
        n_embd=n_embd,
        n_vocab=n_vocab,
        quantizer="gumbel" if book == "quantize.embed.weight" else "nearest",
        pixels=pixels,
        encoder="encoder.conv_in.weight" in own,
    )


def vqgan_tensors(shapes: Shapes, prefix: str = "") -> dict[str, From]:
    """The origin of every tensor of a VQGAN whose names begin with `prefix`, those of decoders alone too."""
    start = re.escape(prefix)
    return renamed(shapes, [(f"{start}({OWN})", r"\1"), (f"{start}embedding\\.weight", "quantize.embedding.weight")])


def flax_names(shapes: Shapes) -> dict[str, str]:
    """The names in a flax file of the same model -> taming's."""
    made = {}
    for name in shapes:
        stem, leaf = name.rsplit(".", 1)
        stem = re.sub(r"(?<!mid\.)\b(up|down|block|attn)_(\d+)\b", r"\1.\2", stem)  # in "mid" they keep these names
        made[name] = f"{stem}.{'bias' if leaf == 'bias' else 'weight'}"
    return made


def flax_shapes(shapes: Shapes) -> dict[str, Shape]:
    """The shapes of a flax file's tensors in taming's names and layout."""
    return {
        ours: tuple(_laid_out(torch.empty(shapes[name], device="meta")).shape)
        for name, ours in flax_names(shapes).items()
    }


def flax_tensors(shapes: Shapes) -> dict[str, From]:
    """The origin of every tensor of a VQGAN in a flax file."""
    theirs = {ours: name for name, ours in flax_names(shapes).items()}
    origins = vqgan_tensors(flax_shapes(shapes))
    return {ours: From.one(theirs[origin.names[0]], _laid_out) for ours, origin in origins.items()}


def _laid_out(tensor: Tensor) -> Tensor:
    """A convolution's kernel (H, W, in, out) as torch has it, (out, in, H, W); other tensors as they are."""
    return tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise DalleError(f"expected a VQGAN with a tensor {name}, found none; the file is of something else")
    return shapes[name]
