"""CLIP, an image and a text encoder into one space (Radford et al. 2021, arXiv 2103.00020).

Modules are named as in `transformers.CLIPModel`, so that published safetensors load as they are.

Shapes: B batch, T text positions, S image side in pixels, P patches, C width, D shared space; pixels are in [0, 1].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_cli.errors import DalleError
from dalle_cli.models import kernels
from dalle_cli.models.blocks import StackedBlock

HASH_BASE = 0x9E3779B97F4A7C15 - 2**64  # any large odd number
MAX_LOG_SCALE = math.log(100.0)  # sec. 2.5: the scale is clipped, or training becomes unstable


def quick_gelu(x: Tensor) -> Tensor:
    """The published model's approximation of GELU, `x sigmoid(1.702 x)`."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}
LOSSES = ("softmax", "sigmoid")


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of a CLIP; the defaults are the published ViT-B/32.

    `vision_layers` 0 is a text encoder alone. `vision_hidden` is the width inside the vision layers' MLPs; 0 is four
    times `vision_width`.

    Raises: DalleError where sizes do not fit together.
    """

    n_proj: int = 512
    image_size: int = 224
    patch_size: int = 32
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    n_text_vocab: int = 49408
    n_text: int = 77
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    activation: str = "quick_gelu"
    loss: str = "softmax"
    pixel_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    vision_hidden: int = 0

    def __post_init__(self) -> None:
        for name in ("pixel_mean", "pixel_std"):  # TOML and JSON only know lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != 3:
                raise DalleError(f"expected clip.{name} of 3 channels, found {getattr(self, name)}; correct it")
        if min(self.pixel_std) <= 0:
            raise DalleError(f"expected clip.pixel_std above 0, found {self.pixel_std}; correct it")
        for name, size in vars(self).items():
            least = 0 if name in ("vision_layers", "vision_hidden") else 1
            if isinstance(size, int) and size < least:
                raise DalleError(f"expected clip.{name} of at least {least}, found {size}; raise it")
        if self.image_size % self.patch_size:
            raise DalleError(
                f"expected clip.image_size divisible by clip.patch_size, found {self.image_size} and "
                f"{self.patch_size}; change one of them"
            )
        for name, width, heads in (
            ("vision", self.vision_width, self.vision_heads),
            ("text", self.text_width, self.text_heads),
        ):
            if width % heads:
                raise DalleError(
                    f"expected clip.{name}_width divisible by clip.{name}_heads, found {width} and {heads}; "
                    "change one of them"
                )
        for name, value, known in (
            ("activation", self.activation, tuple(ACTIVATIONS)),
            ("loss", self.loss, LOSSES),
        ):
            if value not in known:
                raise DalleError(f"expected clip.{name} to be one of {', '.join(known)}, found {value!r}; choose one")


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class CLIPAttention(nn.Module):
    """Multi-head self-attention; q, k and v stay separate because the published names are."""

    def __init__(self, width: int, n_head: int, causal: bool) -> None:
        super().__init__()
        self.n_head = n_head
        self.causal = causal
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        q, k, v = (
            proj(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        h = (kernels.causal_attention if self.causal else kernels.attention)(q, k, v)
        return self.out_proj(h.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linear layers, wider between them: four times as wide unless `hidden` says otherwise."""

    def __init__(self, width: int, activation: str, hidden: int = 0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden or 4 * width)
        self.fc2 = nn.Linear(hidden or 4 * width, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.fc2(self.activation(self.fc1(x)))  # type: ignore[no-any-return]


class CLIPLayer(StackedBlock):
    """Pre-norm transformer layer."""

    def __init__(self, width: int, n_head: int, activation: str, causal: bool, hidden: int = 0) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-5)
        self.self_attn = CLIPAttention(width, n_head, causal)
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = MLP(width, activation, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """A stack of layers."""

    def __init__(
        self, n_layer: int, width: int, n_head: int, activation: str, causal: bool, hidden: int = 0
    ) -> None:  # fmt: skip
        super().__init__()
        self.layers = nn.ModuleList(CLIPLayer(width, n_head, activation, causal, hidden) for _ in range(n_layer))
        for layer in self.layers:
            assert isinstance(layer, CLIPLayer)
            self._init_layer(layer, width, n_layer)

    @staticmethod
    def _init_layer(layer: CLIPLayer, width: int, n_layer: int) -> None:
        """Standard deviations of the publisher's code: by width, and by depth where the residual is written."""
        attention, mlp = layer.self_attn, layer.mlp
        residual = width**-0.5 * (2 * n_layer) ** -0.5
        for linear, std in (
            (attention.q_proj, width**-0.5),
            (attention.k_proj, width**-0.5),
            (attention.v_proj, width**-0.5),
            (attention.out_proj, residual),
            (mlp.fc1, (2 * width) ** -0.5),
            (mlp.fc2, residual),
        ):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        for layer in self.layers:
            x = layer(x)
        return x


class TextEmbeddings(nn.Module):
    """Learned token and position embeddings, added."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.n_text_vocab, config.text_width)
        self.position_embedding = nn.Embedding(config.n_text, config.text_width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, C)."""
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]  # type: ignore[no-any-return]


class TextTransformer(nn.Module):
    """Causal transformer over caption tokens."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config.text_layers, config.text_width, config.text_heads, config.activation, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.text_width, eps=1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, C)."""
        return self.final_layer_norm(self.encoder(self.embeddings(tokens)))  # type: ignore[no-any-return]


class VisionEmbeddings(nn.Module):
    """A learned class token, then the image's patches in raster order, plus positions."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width, patch = config.vision_width, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)
        nn.init.normal_(self.patch_embedding.weight, std=(3 * patch**2) ** -0.5)
        nn.init.normal_(self.position_embedding.weight, std=width**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalized -> (B, 1 + P, C)."""
        # autocast makes the patches bfloat16; the residual stream keeps the parameters' dtype
        patches = self.patch_embedding(images).to(self.class_embedding.dtype).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(images), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """Vision transformer, pooled at the class token."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        width = config.vision_width
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(width, eps=1e-5)  # sic: the published name
        self.encoder = Encoder(
            config.vision_layers,
            width,
            config.vision_heads,
            config.activation,
            causal=False,
            hidden=config.vision_hidden,
        )
        self.post_layernorm = nn.LayerNorm(width, eps=1e-5)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalized -> (B, C)."""
        x = self.encoder(self.pre_layrnorm(self.embeddings(images)))
        return self.post_layernorm(x[:, 0])  # type: ignore[no-any-return]


class CLIP(nn.Module):
    """Image and text encoders into one space; without vision layers, the text encoder alone."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)
        whole = config.vision_layers > 0
        if whole:
            self.vision_model = VisionTransformer(config)
            self.visual_projection = nn.Linear(config.vision_width, config.n_proj, bias=False)
        self.text_projection = nn.Linear(config.text_width, config.n_proj, bias=False)
        if whole:
            nn.init.normal_(self.visual_projection.weight, std=config.vision_width**-0.5)
        nn.init.normal_(self.text_projection.weight, std=config.text_width**-0.5)
        sigmoid = config.loss == "sigmoid"
        if whole:
            self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0 if sigmoid else 1 / 0.07)))
        if whole and sigmoid:
            self.logit_bias = nn.Parameter(torch.tensor(-10.0))
        self.register_load_state_dict_pre_hook(_drop_position_ids)  # type: ignore[no-untyped-call]

    def encode_image(self, images: Tensor) -> Tensor:
        """Images to embeddings, not normalized: (B, 3, S, S) in [0, 1] -> (B, D) float32; resized where S differs.

        Raises: DalleError where images are not square, or there are no vision layers.
        """
        if not self.config.vision_layers:
            raise DalleError("expected a CLIP that reads images, found a text encoder alone; give a whole CLIP")
        return _project(self.vision_model(self._pixels(images)), self.visual_projection)

    def encode_text(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Captions to embeddings, not normalized: (B, T) int64, (B,) int64 -> (B, D) float32.

        Pooled at the last token (position `lengths - 1`; an empty caption at position 0); later positions are ignored.
        """
        return self.pool_text(self.text_states(tokens), lengths)

    def pool_text(self, states: Tensor, lengths: Tensor) -> Tensor:
        """Embeddings of captions by their hidden states, not normalized: (B, T, C), (B,) int64 -> (B, D) float32."""
        last = (lengths.long() - 1).clamp(min=0)  # where a tokenizer writes one, the position of EOS
        return _project(states[torch.arange(len(states), device=states.device), last], self.text_projection)

    def text_states(self, tokens: Tensor) -> Tensor:
        """Hidden state of each position, for models conditioned on captions: (B, T) int64 -> (B, T, C).

        Raises: DalleError where T exceeds `n_text`.
        """
        if tokens.shape[1] > self.config.n_text:
            raise DalleError(
                f"expected captions of at most {self.config.n_text} tokens, found {tokens.shape[1]}; "
                "tokenize them shorter, or train with a larger clip.n_text"
            )
        return self.text_model(tokens)  # type: ignore[no-any-return]

    def loss(
        self, images: Tensor, tokens: Tensor, lengths: Tensor, gather: Callable[[Tensor], Tensor] = lambda rows: rows
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Contrastive loss of a batch of pairs, and `loss`, `accuracy` (image to text, in the batch), `scale`.

        (B, 3, S, S) in [0, 1], (B, T) int64, (B,) int64 -> (). Rows with equal captions count as pairs of each other.
        `gather` returns the rows of all processes, (b, ...) -> (B, ...), when each holds a part of the batch: the loss
        is then of this process's rows against all columns; its mean over processes is the loss of the full batch.
        """
        if self.training:
            with torch.no_grad():  # clipping the parameter itself lets it decrease again
                self.logit_scale.clamp_(max=MAX_LOG_SCALE)
        image, text = self.encode_image(images), self.encode_text(tokens, lengths)
        own = caption_hash(tokens, lengths)
        pairs = own[:, None] == gather(own)
        similarities = self.similarity(image, gather(text))
        with torch.autocast(images.device.type, enabled=False):
            scale = self.scale()
            if self.config.loss == "sigmoid":
                loss = sigmoid_loss(scale * similarities + self.logit_bias, pairs)
            else:
                to_images = self.similarity(text, gather(image))
                loss = (softmax_loss(scale * similarities, pairs) + softmax_loss(scale * to_images, pairs)) / 2
        best = similarities.detach().argmax(dim=1, keepdim=True)
        accuracy = pairs.gather(1, best).float().mean()
        return loss, {"loss": loss.detach(), "accuracy": accuracy, "scale": scale.detach()}

    def scale(self) -> Tensor:
        """The inverse temperature, at most 100: -> ()."""
        return _at_least_float32(self.logit_scale).clamp(max=MAX_LOG_SCALE).exp()

    @staticmethod
    def similarity(image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
        """Cosines of all images with all texts, in [-1, 1]: (N, D), (M, D) -> (N, M) float32."""
        with torch.autocast(image_embeddings.device.type, enabled=False):
            images = F.normalize(_at_least_float32(image_embeddings), dim=-1)
            return images @ F.normalize(_at_least_float32(text_embeddings), dim=-1).T

    def _pixels(self, images: Tensor) -> Tensor:
        """Resized and normalized: (B, 3, any, any) in [0, 1] -> (B, 3, S, S)."""
        height, width = images.shape[-2:]
        size, weight = self.config.image_size, self.visual_projection.weight
        if height != width:
            raise DalleError(f"expected square images, found {width} x {height}; crop them first")
        images = _at_least_float32(images)  # bfloat16 would lose 8-bit steps
        if height != size:
            images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(
                0, 1
            )  # it overshoots
        mean, std = (images.new_tensor(x).view(3, 1, 1) for x in (self.config.pixel_mean, self.config.pixel_std))
        return ((images - mean) / std).to(weight.dtype)


def caption_hash(tokens: Tensor, lengths: Tensor) -> Tensor:
    """A hash of each caption up to its end, a polynomial modulo 2^64: (B, T) int64, (B,) int64 -> (B,) int64.

    A batch of a small data set repeats captions, which must not count as negatives of each other.
    """
    powers = torch.full((tokens.shape[1],), HASH_BASE, device=tokens.device).cumprod(0)
    written = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    return ((tokens + 1) * powers * written).sum(1)


def softmax_loss(logits: Tensor, pairs: Tensor) -> Tensor:
    """Cross-entropy of rows (sec. 2.3, fig. 3); a row's target is spread evenly over its pairs: (b, B) twice -> ()."""
    positive = logits.masked_fill(~pairs, 0).sum(1) / pairs.sum(1)
    return (logits.logsumexp(1) - positive).mean()


def sigmoid_loss(logits: Tensor, pairs: Tensor) -> Tensor:
    """Each image and text on its own, summed over texts, averaged over images (arXiv 2303.15343, eq. 1)."""
    return -F.logsigmoid(torch.where(pairs, logits, -logits)).sum() / len(logits)


def _project(x: Tensor, projection: nn.Linear) -> Tensor:
    """Projection outside of autocast: embeddings are compared by small differences of angle."""
    with torch.autocast(x.device.type, enabled=False):
        return _at_least_float32(F.linear(x.to(projection.weight.dtype), projection.weight))


def _drop_position_ids(_module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Older published files also store the constant position ids 0, 1, 2, ...; drop them."""
    for part in ("text_model", "vision_model"):
        state.pop(f"{prefix}{part}.embeddings.position_ids", None)
