"""What stages share that embed captions by a CLIP, or draw embeddings for them.

Shapes: P prompts, N candidates, B of them in a batch, D embedding width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dalle_cli import console
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles as bundle
from dalle_cli.options import AUTO

if TYPE_CHECKING:
    from dalle_cli.artifacts import Artifact
    from dalle_cli.commands.drawing import Candidate, Columns
    from dalle_cli.devices import Arithmetic
    from dalle_cli.models.diffusion_prior import DiffusionPriorConfig
    from dalle_cli.models.embedding_prior import EmbeddingPriorConfig

AT_ONCE = 64  # candidates, where `auto` is asked for: a prior over embeddings takes little memory for each
STEPS = 64  # of a diffusion prior; the paper's number, from memory
TEXTS = 256  # captions that a CLIP embeds at once


@dataclass(frozen=True)
class EmbeddingSettings:
    """How to draw: all that a drawn embedding is a function of, beside weights, prompt and candidate.

    None where nothing was said: a diffusion prior has sampler and steps, an autoregressive one the other three.
    """

    n: int
    guidance: float
    seed: int
    guidance_from: float = 0.0
    guidance_to: float = 1.0
    sampler: str | None = None
    steps: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        for name in ("guidance", "temperature", "top_p"):
            if not math.isfinite(value := getattr(self, name) or 0.0):
                raise DalleError(f"expected a finite --{name.replace('_', '-')}, found {value}")
        if self.guidance_from > self.guidance_to:
            found = f"{self.guidance_from} and {self.guidance_to}"
            raise DalleError(f"expected --guidance-from no more than --guidance-to, found {found}; exchange them")

    def of(self, config: "DiffusionPriorConfig | EmbeddingPriorConfig") -> "EmbeddingSettings":
        """The same with what this kind of prior does where nothing was said.

        Raises:
            DalleError: something was said that such a prior does not know.
        """
        steps = min(STEPS, getattr(config, "n_timestep", STEPS))
        own: dict[str, Any] = {"sampler": "ddpm", "steps": steps}
        others: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        if config.kind != "diffusion":
            own, others = others, own
        for name in others:
            if getattr(self, name) is not None:
                found = f"--{name.replace('_', '-')}"
                known = ", ".join(f"--{n.replace('_', '-')}" for n in own)
                raise DalleError(f"expected {known} for a prior of kind {config.kind!r}, found {found}; leave it out")
        said = {name: value for name, value in asdict(self).items() if value is not None}
        return EmbeddingSettings(**{**own, **said})

    def told(self) -> dict[str, Any]:
        """What a history says of them."""
        whole = (self.guidance_from, self.guidance_to) == (0, 1)
        silent = {"guidance_from": whole, "guidance_to": whole}
        return {k: v for k, v in asdict(self).items() if v is not None and not silent.get(k)}


class TextEncoder:
    """A CLIP's text side with its tokenizer."""

    def __init__(self, weights: "Artifact", machine: "Arithmetic"):
        from dalle_cli.data import tokenizer as tokenizers
        from dalle_cli.pipelines import loading as load

        self.machine = machine
        self.clip = load.clip(weights, machine.device)
        self.tokenizer = tokenizers.load(bundle.tokenizer(weights))

    def embed(self, texts: Sequence[str], batch_size: int = TEXTS) -> Any:
        """z_t of N captions, of length 1: (N, D) float32."""
        import numpy as np
        import torch
        from torch.nn import functional as F

        found = [np.zeros((0, self.clip.config.n_proj), np.float32)]
        for begin in range(0, len(texts), batch_size):
            part = list(texts[begin : begin + batch_size])
            tokens, lengths, _ = self.tokenizer.encode_batch(part, self.clip.config.n_text)
            read = (torch.from_numpy(x.astype(np.int64)).to(self.machine.device) for x in (tokens, lengths))
            with torch.inference_mode(), self.machine.autocast():
                found.append(F.normalize(self.clip.encode_text(*read).float(), dim=-1).cpu().numpy())
        return np.concatenate(found)


def clip_of(prior: "Artifact", model: str | None) -> "Artifact":
    """The CLIP that a prior was trained with: that of the model that was named, or one beside the prior.

    Raises:
        DalleError: it is nowhere there.
    """
    encoder = prior.fact("encoder", str)
    if (beside := bundle.find_weights(encoder, prior.path.parent)) is not None and beside.kind == "weights.clip":
        return beside
    if prior.path.is_file() and model is not None and bundle.locate(model) == prior.path:
        raise DalleError(
            f"expected the CLIP of sha256 {encoder[:12]}, which {prior.path.name} was trained with, beside it, found "
            "none; copy it there"
        )
    weights = bundle.weights(model, "weights.clip")
    bundle.check_digest("CLIP", weights.digest, encoder, prior.path)
    return weights


class EmbeddingDrawer:
    """A prior over embeddings, which has read the candidates' prompts and has their z_t."""

    def __init__(
        self, weights: "Artifact", clip: "Artifact", rows: "Sequence[Candidate]", s: EmbeddingSettings,
        machine: "Arithmetic",
    ):  # fmt: skip
        import numpy as np
        import torch

        from dalle_cli.data import tokenizer as tokenizers
        from dalle_cli.pipelines import loading as load
        from dalle_cli.sampling.embeddings import Read

        self.weights, self.clip, self.rows, self.machine = weights, clip, rows, machine
        self.prior = load.embedding_prior(weights, machine.device)
        self.settings = s.of(self.prior.config)
        self.texts = list(dict.fromkeys(row.text for row in rows))
        length = self.prior.config.n_text
        tokens, lengths, cut = tokenizers.load(bundle.tokenizer(weights)).encode_batch(self.texts, length)
        if cut:
            console.warn(f"prompts of more than {length} tokens, which were cut: {cut}")
        z_t = torch.from_numpy(TextEncoder(clip, machine).embed(self.texts))
        words, ends = (torch.from_numpy(x.astype(np.int64)) for x in (tokens, lengths))
        self.read = Read(words, ends, z_t)

    def batches(self, batch_size: int, progress: Callable[[int], None]) -> Iterator[Any]:
        """(B, D) float32 of length 1, of `batch_size` candidates after another; the last may be fewer.

        Candidate k of a prompt is a function of (weights, settings, prompt, k) alone.
        """
        from dalle_cli.artifacts import digest_bytes
        from dalle_cli.models.diffusion_prior import DiffusionPrior
        from dalle_cli.sampling.embeddings import autoregressed, diffused

        s, of = self.settings, {text: i for i, text in enumerate(self.texts)}
        noise = {text: int(digest_bytes(text.encode())[:16], 16) << 32 for text in self.texts}
        indices = [noise[row.text] | row.number for row in self.rows]
        captions, span = [of[row.text] for row in self.rows], (s.guidance_from, s.guidance_to)
        if isinstance(self.prior, DiffusionPrior):
            assert s.sampler is not None
            assert s.steps is not None
            drawn = diffused(
                self.prior, self.read, indices, s.seed, captions=captions, sampler=s.sampler, steps=s.steps,
                guidance_scale=s.guidance, guidance_span=span, batch_size=batch_size, progress=progress,
            )  # fmt: skip
        else:
            assert s.temperature is not None
            drawn = autoregressed(
                self.prior, self.read, indices, s.seed, captions=captions, temperature=s.temperature, top_k=s.top_k,
                top_p=s.top_p, guidance_scale=s.guidance, guidance_span=span, batch_size=batch_size, progress=progress,
            )  # fmt: skip
        while True:
            with self.machine.autocast():  # never across a yield: it is the caller's arithmetic, too
                batch = next(drawn, None)
            if batch is None:
                return
            yield batch.float().cpu().numpy()

    def history(self) -> list[dict[str, Any]]:
        """What led to the embeddings."""
        from dalle_cli.artifacts import history

        options = {**self.settings.told(), "dtype": self.machine.name}
        return history("sample", options, model=self.weights, clip=self.clip)


def sample(drawer: EmbeddingDrawer, batch_size: int) -> "Columns":
    """Draw all candidates."""
    import numpy as np

    from dalle_cli.commands.drawing import Columns

    rows, at_once = drawer.rows, AT_ONCE if batch_size == AUTO else batch_size
    with console.progress("sample", len(rows), unit="embeddings") as advance:
        embeddings = np.concatenate(list(drawer.batches(at_once, advance)))
    tensors = {
        "embeddings": embeddings,
        "prompt": np.array([row.prompt for row in rows], dtype=np.int32),
        "seed": np.full(len(rows), drawer.settings.seed, dtype=np.int64),
        "ids": [row.id for row in rows],
        "text": [row.text for row in rows],
    }
    return Columns(tensors, {"encoder": drawer.weights.fact("encoder", str)}, drawer.history())
