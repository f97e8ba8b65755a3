"""Diffusion decoder: from a CLIP image embedding and a caption to an image (Ramesh et al. 2022, sec. 2.1).

Shapes: B batch, S side in pixels, s side of a sketch, D width of an embedding z_i, T caption length, K context width, E
width of the timestep's embedding; pixels are in [-1, 1].
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_cli.errors import DalleError
from dalle_cli.models.clip import Encoder
from dalle_cli.models.unet import UNet, UNetConfig

SKETCHED_BY = 4  # hidden width of the sketch's MLP, in units of context_width
CAPTIONS = ("tokens", "states")


@dataclass(frozen=True)
class DecoderConfig(UNetConfig):
    """Sizes of a decoder; the defaults are the paper's (table 3), of which the text transformer is GLIDE's.

    Raises: DalleError where sizes do not fit together.
    """

    n_embedding: int = 1024  # D
    unit_variance: bool = True  # scale z_i to entries of unit variance; else use it unchanged
    n_extra: int = 4  # tokens that z_i becomes
    context_width: int = 2048  # K
    n_text: int = 256  # T; 0 for a decoder without captions
    n_text_vocab: int = 16384
    text_layers: int = 24
    text_heads: int = 32
    sketch: int = 0  # s: side of an image predicted from embedding and caption, an input of the U-Net; 0 = none
    captions: str = "tokens"  # or "states": those of CLIP's frozen text tower, in place of a trained text transformer
    text_width: int = 768  # of these states
    embedding_norm: bool = False  # layer norms of what z_i becomes, in the timestep's embedding and as tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_embedding", "n_extra", "context_width", "text_layers", "text_heads", "text_width"):
            if getattr(self, name) < 1:
                raise DalleError(f"expected {name} of at least 1, found {getattr(self, name)}; raise it")
        if self.sketch < 0 or (self.sketch and self.image_size % self.sketch):
            raise DalleError(f"expected sketch to divide image_size {self.image_size}, found {self.sketch}; change it")
        if self.sketch and (self.captions != "tokens" or self.channels != 3):
            raise DalleError("expected sketch 0 beside states as captions, or where images are latents; leave it out")
        if self.n_text < 0 or (self.n_text and self.n_text_vocab < 1):
            raise DalleError(f"expected captions of a vocabulary, found {self.n_text} tokens of {self.n_text_vocab}")
        if self.captions not in CAPTIONS:
            raise DalleError(f"expected captions {' or '.join(CAPTIONS)}, found {self.captions!r}; take one of them")
        if self.n_text and self.captions == "tokens" and self.context_width % self.text_heads:
            found = f"{self.context_width} and {self.text_heads}"
            raise DalleError(f"expected text_heads to divide context_width, found {found}; change one of them")


class Conditioning(NamedTuple):
    """The U-Net's inputs besides x_t and the timestep: (B, E), (B, n_extra + T, K), (B, 3, s, s).

    `visible` (B, n_extra + T) bool are the context tokens that are attended to; None is all.
    """

    added: Tensor
    context: Tensor
    sketch: Tensor | None = None
    visible: Tensor | None = None

    def first(self, n: int) -> "Conditioning":
        """The first n rows."""
        return Conditioning(*(None if part is None else part[:n] for part in self))  # type: ignore[arg-type]


class TextEncoder(nn.Module):
    """A transformer over captions, without a causal mask (GLIDE, sec. 4); learned pads follow a caption's end.

    The null caption has length 0: pads alone.
    """

    def __init__(self, n_text: int, n_vocab: int, width: int, n_layer: int, n_head: int) -> None:
        super().__init__()
        self.n_text = n_text
        self.tokens = nn.Embedding(n_vocab, width)
        self.positions = nn.Embedding(n_text, width)
        self.pads = nn.Embedding(n_text, width)
        for table in (self.tokens, self.positions, self.pads):
            nn.init.normal_(table.weight, std=0.02)
        self.encoder = Encoder(n_layer, width, n_head, "gelu", causal=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(B, T) int64, (B,) int64 -> (B, T, K).

        Raises: DalleError for captions of another length.
        """
        if tokens.shape[1] != self.n_text:
            raise DalleError(f"expected captions of {self.n_text} tokens, found {tokens.shape[1]}; tokenize them anew")
        written = torch.arange(self.n_text, device=tokens.device) < lengths[:, None]
        x = torch.where(written[..., None], self.tokens(tokens), self.pads.weight)
        return self.norm(self.encoder(x + self.positions.weight))  # type: ignore[no-any-return]


class TextProjection(nn.Module):
    """States of CLIP's frozen text tower as context tokens: a linear layer, then a norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.shape = (config.n_text, config.text_width)
        self.project = nn.Linear(config.text_width, config.context_width)
        self.norm = nn.LayerNorm(config.context_width)

    def forward(self, states: Tensor) -> Tensor:
        """(B, T, text_width) -> (B, T, K).

        Raises: DalleError for states of another size.
        """
        if tuple(states.shape[1:]) != self.shape:
            expected, found = (" x ".join(map(str, shape)) for shape in (self.shape, states.shape[1:]))
            raise DalleError(f"expected captions as {expected} states, found {found}; take those of the decoder's CLIP")
        return self.norm(self.project(states.to(self.project.weight.dtype)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """z_i is added to the timestep's embedding and becomes extra context tokens; z_i and caption may each be null."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels + (3 if config.sketch else 0)
        self.unet = UNet(config, in_channels=channels, context=config.context_width)
        self.null_embedding = nn.Parameter(torch.randn(config.n_embedding))
        self.embedding_time = nn.Linear(config.n_embedding, config.time_width)
        self.embedding_tokens = nn.Linear(config.n_embedding, config.n_extra * config.context_width)
        self.text: TextEncoder | TextProjection | None = None
        self.text_time: nn.Linear | None = None
        if config.n_text:
            self.text, width = self._text(config)
            self.text_time = nn.Linear(width, config.time_width)
        self.sketch = self._sketching(config) if config.sketch else None
        if config.embedding_norm:
            self.embedding_time_norm = nn.LayerNorm(config.time_width)
            self.embedding_tokens_norm = nn.LayerNorm(config.context_width)

    @staticmethod
    def _text(config: DecoderConfig) -> tuple[TextEncoder | TextProjection, int]:
        """What makes context tokens of captions, and the width of what the timestep's embedding gets of them."""
        c = config
        if c.captions == "states":
            return TextProjection(c), c.n_embedding
        return TextEncoder(c.n_text, c.n_text_vocab, c.context_width, c.text_layers, c.text_heads), c.context_width

    @staticmethod
    def _sketching(config: DecoderConfig) -> nn.Module:
        n_in, hidden = config.n_embedding, SKETCHED_BY * config.context_width
        n_in += config.context_width if config.n_text else 0
        last = nn.Linear(hidden, 3 * config.sketch**2)
        return nn.Sequential(nn.Linear(n_in, hidden), nn.SiLU(), last, nn.Unflatten(1, (3, config.sketch, -1)))

    def condition(
        self, embeddings: Tensor, given: Tensor, tokens: Tensor, lengths: Tensor, z_t: Tensor | None = None
    ) -> Conditioning:
        """Conditioning from (B, D) z_i, (B,) bool that is false where z_i is null, (B, T) and (B,) int64 captions.

        A caption of length 0 is null. A decoder of states takes them, (B, T, text_width), in place of tokens, and the
        captions' embeddings z_t (B, D), not normalized; its null caption is the text "". A decoder without captions
        ignores them.

        Raises: DalleError for embeddings or captions of another size.
        """
        c = self.config
        if embeddings.shape[1] != c.n_embedding:
            raise DalleError(f"expected embeddings of {c.n_embedding} numbers, found {embeddings.shape[1]}")
        if c.unit_variance:
            embeddings = F.normalize(embeddings, dim=1) * math.sqrt(c.n_embedding)
        z = torch.where(given[:, None], embeddings.to(self.null_embedding.dtype), self.null_embedding)
        added, context = self.embedding_time(z), self.embedding_tokens(z).unflatten(1, (c.n_extra, -1))
        if c.embedding_norm:
            added, context = self.embedding_time_norm(added), self.embedding_tokens_norm(context)
        inputs, visible = [z], None
        if self.text is not None and self.text_time is not None:
            states, summary, visible = self._captions(tokens, lengths, z_t)
            added, context = added + self.text_time(summary), torch.cat([context, states], dim=1)
            inputs.append(states[:, -1])
        return Conditioning(added, context, self.sketch(torch.cat(inputs, dim=1)) if self.sketch else None, visible)

    def _captions(self, tokens: Tensor, lengths: Tensor, z_t: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Context tokens (B, T, K) of captions, what the timestep's embedding gets of them, and what is visible."""
        if isinstance(self.text, TextEncoder):
            states = self.text(tokens, lengths)
            return states, states[:, -1], None  # GLIDE also adds its last position to the timestep's embedding
        assert self.text is not None
        assert self.text_time is not None
        if z_t is None or z_t.shape[1] != self.config.n_embedding:
            found = "none" if z_t is None else f"some of {z_t.shape[1]} numbers"
            raise DalleError(f"expected captions' embeddings of {self.config.n_embedding} numbers, found {found}")
        written = torch.arange(self.config.n_text, device=lengths.device) < lengths[:, None]
        visible = F.pad(written, (self.config.n_extra, 0), value=True)
        return self.text(tokens), z_t.to(self.text_time.weight.dtype), visible

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """(B, 3, S, S) at timesteps (B,) -> (B, 3 or 6, S, S): the prediction, then its variance parameter."""
        if conditioning.sketch is not None:
            # the sketch is trained by its own loss alone
            beside = F.interpolate(conditioning.sketch.detach(), x.shape[2:], mode="bilinear")
            x = torch.cat([x, beside.to(x.dtype)], dim=1)
        c = conditioning
        return self.unet(x, t, c.added, c.context, c.visible)  # type: ignore[no-any-return]

    def denoise(
        self, x: Tensor, t: Tensor, embeddings: Tensor, given: Tensor, tokens: Tensor, lengths: Tensor,
        z_t: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`condition`, then `forward`."""
        return self(x, t, self.condition(embeddings, given, tokens, lengths, z_t))  # type: ignore[no-any-return]
