"""Captions as states of CLIP's frozen text tower, for training models that take them.

B batch, T caption length, W width of the states, D embedding width.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from dalle_cli.artifacts import Artifact
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles
from dalle_cli.models.clip import CLIP
from dalle_cli.pipelines import loading
from dalle_cli.sampling.embeddings import PromptBatch


class StatesOf:
    """Captions as states of a CLIP's text tower, which is not trained; the null caption is the text ""."""

    def __init__(self, clip: CLIP, null: Sequence[int]):
        """`null` are the tokens of the text ""."""
        self.clip, self.tokens = clip.requires_grad_(False).eval(), torch.tensor(null)

    @classmethod
    def find(cls, captions: Artifact, *folders: Path) -> "StatesOf":
        """Those of the CLIP that embedded these captions, which lies in one of the folders.

        Raises:
            DalleError: there is none, or the captions have other tokens than it takes.
        """
        encoder = captions.require("encoder", str)
        weights = bundles.find_weights(encoder, *folders, captions.path.parent)
        if weights is None:
            where = " or ".join(dict.fromkeys(str(folder) for folder in (*folders, captions.path.parent)))
            raise DalleError(
                f"expected the CLIP of sha256 {encoder[:12]}, whose states the model takes, in {where}, found none; "
                "copy it there"
            )
        own, given = (source.require("tokenizer", str) for source in (weights, captions))
        bundles.check_digest("tokenizer", given, own, weights.path)
        clip, found = loading.clip(weights, torch.device("cpu")), captions.require("n_text", int)
        if found != (n := clip.config.n_text):
            raise DalleError(f"expected captions of {n} tokens, found {found}; tokenize with tokenizer.length = {n}")
        return cls(clip, loading.tokenizer(weights).encode([""])[0])

    @torch.no_grad()
    def __call__(self, read: PromptBatch) -> PromptBatch:
        """States (B, T, W), lengths and z_t of tokens and lengths; of a length of 0, those of the null caption."""
        null, n = torch.zeros_like(read.tokens[0]), len(self.tokens)
        null[:n] = self.tokens
        dropped = read.lengths == 0
        tokens, lengths = torch.where(dropped[:, None], null, read.tokens), torch.where(dropped, n, read.lengths)
        clip = self.clip.to(tokens.device)
        states = clip.text_states(tokens)
        return PromptBatch(states, lengths, clip.pool_text(states, lengths))

    @property
    def null(self) -> PromptBatch:
        """The null caption."""
        device = next(self.clip.parameters()).device
        tokens = torch.zeros(1, self.clip.config.n_text, dtype=torch.int64, device=device)
        return self(PromptBatch(tokens, torch.zeros(1, dtype=torch.int64, device=device), tokens[:, :1]))
