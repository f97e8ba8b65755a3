"""CLIP: embeddings of images and captions, and scores of how well they match.

Shapes: B batch, N captions, D width of an embedding, S side of the images in pixels.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.artifacts import Artifact
from dalle_cli.data.tokenizer import Tokenizer
from dalle_cli.devices import Arithmetic
from dalle_cli.models.pixels import from_uint8
from dalle_cli.pipelines import loading

BATCH = 256  # captions to embed at once
_open: "WeakValueDictionary[tuple[str, ...], ClipScorer]" = WeakValueDictionary()


class ClipScorer:
    """A CLIP with its tokenizer, which is loaded for the first caption.

    Image embeddings have length 1, unless the header of the weights has `normalized` false: then they keep the length
    that CLIP gives them, as priors and decoders of some published models need it.
    """

    kind = "embeddings"

    def __init__(self, weights: Artifact, machine: Arithmetic):
        self.weights, self.machine = weights, machine
        self.clip = loading.clip(weights, machine.device, machine.dtype)
        self.size, self.width = self.clip.config.image_size, self.clip.config.n_proj
        self.normalized = bool(weights.config.get("normalized", True))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the CLIP was trained with.

        Raises:
            DalleError: it is not beside the weights, or has more tokens than they know.
        """
        return loading.tokenizer(self.weights)

    @property
    def header(self) -> dict[str, Any]:
        """The header of an artifact of these embeddings."""
        return {"encoder": self.weights.digest}

    @property
    def empty(self) -> Any:
        """No rows: (0, D)."""
        return np.zeros((0, self.width), np.float32)

    def image_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] -> (B, D) float32 on the device, not normalized."""
        with torch.inference_mode(), self.machine.autocast():
            return self.clip.encode_image(images).float()

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """N captions -> (N, D) float32 on the device, not normalized."""
        tokens, lengths = self._tokens(texts)
        with torch.inference_mode(), self.machine.autocast():
            return self.clip.encode_text(tokens, lengths).float()

    def text_states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """What models are conditioned on: N captions -> states (N, T, C), lengths (N,) int64, z_t (N, D).

        The states are those of the last layer after the final norm; rows beyond a length belong to no token. z_t is not
        normalized. States and z_t are float32, all on the device. All captions are computed at once.
        """
        tokens, lengths = self._tokens(texts)
        with torch.inference_mode(), self.machine.autocast():
            states = self.clip.text_states(tokens)
            return states.float(), lengths, self.clip.pool_text(states, lengths).float()

    def encode(self, images: Any) -> Any:
        """z_i of images: (B, 3, S, S) uint8 -> (B, D) float32 of length 1, if `normalized`."""
        z = self.image_features(self._pixels(images))
        return (F.normalize(z, dim=-1) if self.normalized else z).cpu().numpy()

    def encode_texts(self, texts: Sequence[str], batch_size: int = BATCH) -> Any:
        """z_t of captions: N strings -> (N, D) float32 of length 1."""
        parts = [self.text_features(texts[at : at + batch_size]) for at in range(0, len(texts), batch_size)]
        return np.concatenate([self.empty, *(F.normalize(part, dim=-1).cpu().numpy() for part in parts)])

    def score(self, images: Any, texts: Sequence[str]) -> Any:
        """Cosine of each image with its caption: (B, 3, S, S) uint8, B captions -> (B,) float32 in [-1, 1]."""
        unique = sorted(set(texts))
        rows = {text: row for row, text in enumerate(unique)}
        own = self.text_features(unique)[[rows[text] for text in texts]]
        return torch.cosine_similarity(self.image_features(self._pixels(images)), own).cpu().numpy()

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens (N, T) and lengths (N,) int64 on the device."""
        tokens, lengths, _ = self.tokenizer.encode_batch(list(texts), self.clip.config.n_text)
        first, second = (torch.from_numpy(x.astype(np.int64)).to(self.machine.device) for x in (tokens, lengths))
        return first, second

    def _pixels(self, images: Any) -> Tensor:
        return from_uint8(torch.from_numpy(np.array(images)).to(self.machine.device))


def shared_clip(weights: Artifact, machine: Arithmetic) -> ClipScorer:
    """The CLIP of these weights; the same object while one is in use, as a prior, a decoder and ranking share one."""
    key = (weights.digest, str(machine.device), machine.name)
    scorer = _open.get(key)
    if scorer is None:
        scorer = _open[key] = ClipScorer(weights, machine)
    return scorer
