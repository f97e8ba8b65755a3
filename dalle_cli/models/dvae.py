"""Discrete VAE (Ramesh et al. 2021, sec. 2.1 and app. A), and a light residual variant for small recipes.

Shapes: B batch, V vocabulary, D quantizer channels, H W code grid, C channels; pixels are S x S in [0, 1],
S = H * reduction.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_cli.errors import DalleError
from dalle_cli.models.blocks import StackedBlock
from dalle_cli.models.kernels import float32_linear
from dalle_cli.models.pixels import check_sides
from dalle_cli.models.quantizers import FiniteScalarQuantizer, GumbelQuantizer, Quantized, VectorQuantizer

LOGIT_LAPLACE_EPS = 0.1
# A scale below the rounding of 8-bit pixels has no meaning; on flat white backgrounds it would shrink without end.
MIN_LOG_SCALE = -6.0
CHOICES = {
    "quantizer": ("gumbel", "vq", "fsq"),
    "block": ("bottleneck", "residual"),
    "likelihood": ("logit_laplace", "l1", "mse"),
}


@dataclass(frozen=True)
class DVAEConfig:
    """Sizes and choices of a dVAE; the defaults are the paper's.

    Raises: DalleError where a value cannot be built.
    """

    image_size: int = 256
    n_groups: int = 4
    n_blk_per_group: int = 2
    n_hid: int = 256
    n_init: int = 128
    n_vocab: int = 8192
    quantizer: str = "gumbel"
    block: str = "bottleneck"
    n_embd: int = 256
    commitment: float = 0.25
    fsq_levels: tuple[int, ...] = (8, 5, 5, 5)
    likelihood: str = "logit_laplace"
    local_codes: bool = False  # residual block only: a code depends only on the pixels of its own cell

    def __post_init__(self) -> None:
        object.__setattr__(self, "fsq_levels", tuple(self.fsq_levels))  # TOML and JSON have lists
        for name in ("image_size", "n_blk_per_group", "n_hid", "n_init", "n_vocab", "n_embd"):
            if getattr(self, name) < 1:
                raise DalleError(f"expected {name} of at least 1, found {getattr(self, name)}; raise it")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise DalleError(f"expected {name} among {', '.join(choices)}, found {getattr(self, name)!r}; pick one")
        if not 2 <= self.n_groups <= 6:
            raise DalleError(f"expected n_groups from 2 to 6, found {self.n_groups}; 2, 3, 4 reduce by 2, 4, 8")
        if self.image_size % self.reduction:
            raise DalleError(
                f"expected image_size divisible by {self.reduction} (n_groups {self.n_groups}), "
                f"found {self.image_size}; change either"
            )
        if self.n_hid % 4:
            raise DalleError(f"expected n_hid divisible by 4, found {self.n_hid}; round it")
        if self.quantizer == "fsq":
            self._check_levels()

    def _check_levels(self) -> None:
        if not self.fsq_levels or min(self.fsq_levels) < 3:
            raise DalleError(f"expected fsq_levels of at least 3 each, found {list(self.fsq_levels)}; raise them")
        if self.n_vocab != (product := math.prod(self.fsq_levels)):
            raise DalleError(
                f"expected n_vocab {product}, the product of fsq_levels {list(self.fsq_levels)}, "
                f"found {self.n_vocab}; set n_vocab = {product}"
            )

    @property
    def reduction(self) -> int:
        """Pixels per code, along one side."""
        return int(2 ** (self.n_groups - 1))

    @property
    def grid(self) -> int:
        """Codes along one side."""
        return self.image_size // self.reduction

    @property
    def n_output(self) -> int:
        """Channels of the decoder's output: mean and log scale for logit_laplace, else the pixels."""
        return 6 if self.likelihood == "logit_laplace" else 3


class Float32Conv2d(nn.Conv2d):
    """1x1 convolution in its weights' own precision even under autocast (app. A.1); backward in autocast's."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve; (B, C, H, W) -> (B, C', H, W), channels_last."""
        rows = input.permute(0, 2, 3, 1)
        return float32_linear(rows, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def conv(n_in: int, n_out: int, kernel: int, stride: int = 1, kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    """Build a convolution that keeps the size (divides it by stride): weights N(0, 1/(n_in k^2)), bias 0 (app. A.1)."""
    layer = kind(n_in, n_out, kernel, stride=stride, padding=(kernel - 1) // 2)
    nn.init.normal_(layer.weight, std=1 / math.sqrt(n_in * kernel**2))
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class BottleneckBlock(StackedBlock):
    """The paper's residual block of four convolutions; the residual is scaled by 1 / n_layers**2 (app. A.1)."""

    def __init__(self, n_in: int, n_out: int, n_layers: int, kernels: tuple[int, int, int, int]) -> None:
        super().__init__()
        n_mid = n_out // 4
        self.post_gain = 1 / n_layers**2
        self.id_path = conv(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.conv_1 = conv(n_in, n_mid, kernels[0])
        self.conv_2 = conv(n_mid, n_mid, kernels[1])
        self.conv_3 = conv(n_mid, n_mid, kernels[2])
        self.conv_4 = conv(n_mid, n_out, kernels[3])

    def forward(self, x: Tensor) -> Tensor:
        """Transform; (B, n_in, H, W) -> (B, n_out, H, W)."""
        h = self.conv_1(F.relu(x))
        for layer in (self.conv_2, self.conv_3, self.conv_4):
            h = layer(F.relu(h, inplace=True))  # safe: nothing else uses a convolution's result
        return torch.add(self.id_path(x), h, alpha=self.post_gain)


class ResidualBlock(StackedBlock):
    """Pre-activation block: (GroupNorm, SiLU, 3x3) twice; the second convolution starts small."""

    def __init__(self, width: int, n_layers: int, local: bool = False) -> None:
        super().__init__()
        kernel = 1 if local else 3
        self.norm_1, self.conv_1 = group_norm(width, local), conv(width, width, kernel)
        self.norm_2, self.conv_2 = group_norm(width, local), conv(width, width, kernel)
        with torch.no_grad():
            self.conv_2.weight /= math.sqrt(n_layers)

    def forward(self, x: Tensor) -> Tensor:
        """Transform; (B, C, H, W) -> same."""
        h = self.conv_1(F.silu(self.norm_1(x)))
        out: Tensor = x + self.conv_2(F.silu(self.norm_2(h)))
        return out


def group_norm(width: int, local: bool = False) -> nn.Module:
    """Normalize groups of 16 channels, or of the largest power of two below that divides the width; local: nothing."""
    return nn.Identity() if local else nn.GroupNorm(width // math.gcd(width, 16), width)


def stack(layers: Mapping[str, nn.Module]) -> nn.Sequential:
    """Chain named layers; the names are those of the published checkpoints."""
    return nn.Sequential(OrderedDict(layers))


def bottleneck_group(
    config: DVAEConfig, n_in: int, n_out: int, kernels: tuple[int, int, int, int], resize: dict[str, nn.Module]
) -> nn.Sequential:
    """Build the blocks of one resolution, then a layer that changes the resolution."""
    n_layers = config.n_groups * config.n_blk_per_group
    widths = [n_in] + [n_out] * config.n_blk_per_group
    blocks = {f"block_{j + 1}": BottleneckBlock(w, n_out, n_layers, kernels) for j, w in enumerate(widths[:-1])}
    return stack({**blocks, **resize})


def bottleneck_encoder(config: DVAEConfig, n_features: int) -> nn.Sequential:
    """Build the paper's encoder, widths n_hid x 1, 2, 4, 8; squeezed pixels (B, 3, S, S) -> (B, D, H, W)."""
    widths = [config.n_hid * 2**i for i in range(config.n_groups)]
    layers: dict[str, nn.Module] = {"input": conv(3, config.n_hid, 7)}
    for i, (n_in, n_out) in enumerate(zip([config.n_hid, *widths], widths, strict=False)):
        resize: dict[str, nn.Module] = {"pool": nn.MaxPool2d(2)} if n_out < widths[-1] else {}
        layers[f"group_{i + 1}"] = bottleneck_group(config, n_in, n_out, (3, 3, 3, 1), resize)
    return stack({**layers, "relu": nn.ReLU(), "output": conv(widths[-1], n_features, 1, kind=Float32Conv2d)})


def bottleneck_decoder(config: DVAEConfig, n_features: int) -> nn.Sequential:
    """Build the paper's decoder, widths n_hid x 8, 4, 2, 1; vectors (B, D, H, W) -> (B, n_output, S, S)."""
    widths = [config.n_hid * 2**i for i in reversed(range(config.n_groups))]
    layers: dict[str, nn.Module] = {"input": conv(n_features, config.n_init, 1, kind=Float32Conv2d)}
    for i, (n_in, n_out) in enumerate(zip([config.n_init, *widths], widths, strict=False)):
        resize: dict[str, nn.Module] = {"upsample": nn.Upsample(scale_factor=2)} if n_out > widths[-1] else {}
        layers[f"group_{i + 1}"] = bottleneck_group(config, n_in, n_out, (1, 3, 3, 3), resize)
    return stack({**layers, "relu": nn.ReLU(), "output": conv(widths[-1], config.n_output, 1)})


def residual_group(config: DVAEConfig, width: int, local: bool = False) -> nn.Sequential:
    """Build the light blocks of one resolution."""
    n_layers = (config.n_groups - 1) * config.n_blk_per_group
    return stack({f"block_{j + 1}": ResidualBlock(width, n_layers, local) for j in range(config.n_blk_per_group)})


def residual_encoder(config: DVAEConfig, n_features: int) -> nn.Sequential:
    """Build the light encoder: 2x2 pixels to channels, then n_groups - 1 groups; (B, 3, S, S) -> (B, D, H, W)."""
    width, local = config.n_hid, config.local_codes
    layers: dict[str, nn.Module] = {"unshuffle": nn.PixelUnshuffle(2), "input": conv(12, width, 1 if local else 3)}
    for i in range(config.n_groups - 1):
        if i > 0:
            layers[f"down_{i}"] = conv(width, 2 * width, 2, stride=2)
            width *= 2
        layers[f"group_{i + 1}"] = residual_group(config, width, local)
    output = conv(width, n_features, 1, kind=Float32Conv2d)
    return stack({**layers, "norm": group_norm(width, local), "silu": nn.SiLU(), "output": output})


def residual_decoder(config: DVAEConfig, n_features: int) -> nn.Sequential:
    """Build the light encoder's mirror, ending in channels to 2x2 pixels; (B, D, H, W) -> (B, n_output, S, S)."""
    width = config.n_hid * 2 ** (config.n_groups - 2)
    layers: dict[str, nn.Module] = {"input": conv(n_features, config.n_init, 1, kind=Float32Conv2d)}
    layers["widen"] = conv(config.n_init, width, 3)
    for i in range(config.n_groups - 1):
        if i > 0:
            width //= 2
            layers[f"up_{i}"] = stack({"conv": conv(2 * width, 4 * width, 1), "shuffle": nn.PixelShuffle(2)})
        layers[f"group_{i + 1}"] = residual_group(config, width)
    output = conv(width, 4 * config.n_output, 3)
    end = {"norm": group_norm(width), "silu": nn.SiLU(), "output": output, "shuffle": nn.PixelShuffle(2)}
    return stack({**layers, **end})


def full_precision(x: Tensor) -> Tensor:
    """Widen half precisions to float32; float32 and float64 stay as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def logit_laplace_nll(images: Tensor, output: Tensor) -> Tensor:
    """Negative log-likelihood of pixels under the logit-Laplace density (sec. 2.1, app. A.3), nats per value.

    Images in [0, 1], squeezed here to [eps, 1 - eps]; (B, 3, S, S), (B, 6, S, S) -> (B, 3, S, S).
    """
    mu, log_scale = output.chunk(2, 1)
    log_scale = log_scale.clamp_min(MIN_LOG_SCALE)
    x = squeeze(images)
    return math.log(2) + log_scale + (x * (1 - x)).log() + (x.logit() - mu).abs() * (-log_scale).exp()


def squeeze(images: Tensor) -> Tensor:
    """Map [0, 1] into [eps, 1 - eps], where the logit is finite (app. A.3, phi)."""
    return (1 - 2 * LOGIT_LAPLACE_EPS) * images + LOGIT_LAPLACE_EPS


def peak_signal_to_noise(images: Tensor, decoded: Tensor) -> Tensor:
    """Mean over the images of each one's PSNR in dB (at most 100); (B, 3, S, S) in [0, 1], twice -> ()."""
    return -10 * (images - decoded).square().mean((1, 2, 3)).clamp_min(1e-10).log10().mean()


def code_statistics(codes: Tensor, n_vocab: int) -> dict[str, Tensor]:
    """Count the codes of a batch: how many differ, exp of their entropy, and the (V,) int64 histogram."""
    counts = torch.bincount(codes.flatten(), minlength=n_vocab)
    share = counts / counts.sum()
    perplexity = torch.special.entr(share).sum().exp()
    return {"codes_used": (counts > 0).sum(), "perplexity": perplexity, "code_counts": counts}


class DVAE(nn.Module):
    """Encoder, quantizer and decoder between pixels and a grid of codes.

    Weights and activations are channels_last, which is faster for convolutions on CPU.
    """

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.quantizer: GumbelQuantizer | VectorQuantizer | FiniteScalarQuantizer
        if config.quantizer == "gumbel":
            self.quantizer = GumbelQuantizer(config.n_vocab)
        elif config.quantizer == "vq":
            self.quantizer = VectorQuantizer(config.n_vocab, config.n_embd, config.commitment)
        else:
            self.quantizer = FiniteScalarQuantizer(config.fsq_levels)
        plain = config.block == "residual"
        n_features = self.quantizer.n_features
        self.encoder = (residual_encoder if plain else bottleneck_encoder)(config, n_features)
        self.decoder = (residual_decoder if plain else bottleneck_decoder)(config, n_features)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, images: Tensor) -> Tensor:
        """Run the encoder; (B, 3, S, S) in [0, 1] -> (B, D, H, W), float32 even under autocast.

        Raises: DalleError where the pixels do not divide into codes.
        """
        check_sides(images, self.config.reduction)
        pixels = squeeze(images) if self.config.likelihood == "logit_laplace" else 2 * images - 1
        out: Tensor = self.encoder(pixels.contiguous(memory_format=torch.channels_last))
        return full_precision(out)

    def logits(self, images: Tensor) -> Tensor:
        """Score every code at every position; (B, 3, S, S) in [0, 1] -> (B, V, H, W) float32.

        Raises: DalleError for quantizers without logits.
        """
        if self.config.quantizer != "gumbel":
            raise DalleError(f"expected quantizer gumbel for logits, found {self.config.quantizer}; use encode")
        return self.features(images)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Find the codes, without noise; (B, 3, S, S) in [0, 1] -> (B, H, W) int64."""
        return self.quantizer.codes(self.features(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes to pixels; (B, H, W) int64 -> (B, 3, S, S) float32 in [0, 1]."""
        if isinstance(self.quantizer, GumbelQuantizer):
            first = self.decoder[0]
            assert isinstance(first, nn.Conv2d)
            assert first.bias is not None
            # a 1x1 convolution of one-hot codes is a gather of its columns
            h = (F.embedding(codes, first.weight.flatten(1).T) + first.bias).permute(0, 3, 1, 2)
        else:
            h = self.decoder[0](self.quantizer.vectors(codes))
        return self.to_images(full_precision(self.decoder[1:](h)))

    def reconstruct(self, images: Tensor) -> Tensor:
        """Encode to codes and decode; (B, 3, S, S) in [0, 1] -> same."""
        return self.decode(self.encode(images))

    def to_images(self, output: Tensor) -> Tensor:
        """Convert the decoder's output to images (app. A.3); (B, n_output, S, S) -> (B, 3, S, S) in [0, 1]."""
        if self.config.likelihood == "logit_laplace":
            mean = output[:, :3].sigmoid()
            return ((mean - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS)).clamp(0, 1)
        return (output / 2 + 0.5).clamp(0, 1)

    def reconstruction_loss(self, images: Tensor, output: Tensor) -> Tensor:
        """Average over pixel values: nats for logit_laplace, |error| or error**2 of pixels in [-1, 1] else."""
        if self.config.likelihood == "logit_laplace":
            return logit_laplace_nll(images, output).mean()
        measure = F.l1_loss if self.config.likelihood == "l1" else F.mse_loss
        return measure(output, 2 * images - 1)

    def loss(
        self, images: Tensor, *, temperature: float, beta: float, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Negative evidence lower bound per pixel value (eq. 1), plus the codebook loss for vq; and metrics.

        KL and reconstruction are sums over an image divided by its number of pixel values and averaged over the
        batch, so that beta acts per code as beta * H * W / (3 * S * S). Without a generator no Gumbel noise is drawn.
        Metrics are detached: recon, kl (nats per code; ln V for vq and fsq, which add nothing to the loss), codebook,
        psnr (dB, of the images decoded from the relaxed codes), codes_used, perplexity, code_counts (V,).
        """
        images = full_precision(images)
        quantized: Quantized = self.quantizer(self.features(images), temperature, generator)
        output = full_precision(self.decoder(quantized.vectors))
        recon = self.reconstruction_loss(images, output)
        per_value = quantized.codes[0].numel() / images[0].numel()
        total = recon + quantized.codebook
        if self.config.quantizer == "gumbel":
            total = total + beta * per_value * quantized.kl
        with torch.no_grad():
            psnr = peak_signal_to_noise(images, self.to_images(output))
        metrics = {"recon": recon.detach(), "kl": quantized.kl.detach(), "psnr": psnr}
        metrics["codebook"] = quantized.codebook.detach()
        return total, metrics | code_statistics(quantized.codes, self.config.n_vocab)

    def forward(
        self, images: Tensor, *, temperature: float, beta: float, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, so that torch's distributed wrappers see the call."""
        return self.loss(images, temperature=temperature, beta=beta, generator=generator)

    @torch.no_grad()
    def revive(self, images: Tensor, generator: torch.Generator) -> int:
        """Move vq's dead codes onto features of these images and return how many moved; 0 for other quantizers.

        The training loop calls it before the first update (which starts the codebook from data) and every so often.
        """
        if not isinstance(self.quantizer, VectorQuantizer):
            return 0
        return self.quantizer.revive(self.features(images), generator)
