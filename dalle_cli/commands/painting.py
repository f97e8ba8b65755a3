"""What the stages that paint embeddings share: a decoder and the upsamplers beside it, from rows to pictures.

Shapes: B batch, D width of an embedding, S side in pixels.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dalle_cli import console
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles as bundle

if TYPE_CHECKING:
    from dalle_cli.artifacts import Artifact
    from dalle_cli.devices import Arithmetic
    from dalle_cli.sampling.decoder import Brush

STEPS, SAMPLER, UPSAMPLER_STEPS = 20, "dpm++", 10


@dataclass(frozen=True)
class Asked:
    """What was said of how to paint; None is left to the defaults."""

    steps: int | None = None
    sampler: str | None = None
    guidance: float | None = None
    eta: float | None = None
    upsampler_steps: int | None = None
    seed: int | None = None

    def refuse(self, source: object) -> None:
        """Raises: DalleError if anything was said, where there is nothing to paint."""
        for name, value in asdict(self).items():
            if value is not None:
                option = f"--{name.replace('_', '-')}"
                raise DalleError(f"expected {option} with embeddings alone, found codes in {source}; leave it out")

    def brushes(self) -> "tuple[Brush, Brush]":
        """The decoder's and the upsamplers'."""
        from dalle_cli.sampling.decoder import Brush

        sampler, eta = self.sampler or SAMPLER, self.eta or 0.0
        guidance = 1.0 if self.guidance is None else self.guidance
        return (
            Brush(self.steps or STEPS, sampler, guidance, eta),
            Brush(self.upsampler_steps or UPSAMPLER_STEPS, sampler, 1.0, eta),
        )


class Painter:
    """A decoder, its tokenizer if it reads captions, and the upsamplers of the same bundle, one after another."""

    def __init__(self, model: str | None, asked: Asked, machine: "Arithmetic"):
        """Raises: DalleError for weights that are missing or do not follow each other."""
        from dalle_cli.data import tokenizer as tokenizers
        from dalle_cli.pipelines import loading as load
        from dalle_cli.sampling.decoder import chained

        self.weights = bundle.weights(model, "weights.decoder")
        self.brush, self.upsampler_brush = asked.brushes()
        self.seed, self.machine = asked.seed or 0, machine
        self.decoder = load.decoder(self.weights, machine.device)
        c = self.decoder.config
        self.tokenizer = tokenizers.load(bundle.tokenizer(self.weights)) if c.n_text else None
        found = bundle.upsamplers(model)
        models = [load.upsampler(weights, machine.device) for weights in found]
        order = chained([m.config for m in models], c.image_size)
        self.upsamplers = [(found[i], models[i]) for i in order]

    @property
    def side(self) -> int:
        """Of the pictures that come out."""
        last = self.upsamplers[-1][1].config if self.upsamplers else self.decoder.config
        return last.image_size

    @property
    def options(self) -> dict[str, Any]:
        """What a history says of how the pictures were painted."""
        told = {**asdict(self.brush), "seed": self.seed, "dtype": self.machine.name}
        return {**told, "upsampler_steps": self.upsampler_brush.steps} if self.upsamplers else told

    @property
    def inputs(self) -> "dict[str, Artifact]":
        """The weights, for a history."""
        upsamplers = {f"upsampler_{i}": weights for i, (weights, _) in enumerate(self.upsamplers, 1)}
        return {"model": self.weights, **upsamplers}

    def check(self, embeddings: "Artifact") -> None:
        """Raises: DalleError if they are another CLIP's than the decoder was trained with."""
        theirs, ours = embeddings.fact("encoder", str), self.weights.fact("encoder", str)
        bundle.check_digest("CLIP", theirs, ours, self.weights.path)

    def paint(
        self, embeddings: Any, numbers: Sequence[int], texts: Sequence[str] | None = None, start: Any = None
    ) -> Any:
        """(B, D), the rows' numbers, of which with the seed the noise is a function, B captions -> (B, 3, S, S) uint8.

        Without captions, and where one is empty, it is null. `start` is what `invert` found, in place of noise.
        """
        import numpy as np
        import torch

        from dalle_cli.diffusion.noise import row_noise
        from dalle_cli.sampling.decoder import paint, upsample

        tokens, lengths = self._tokens(list(texts) if texts is not None else [""] * len(numbers))
        rows = torch.from_numpy(np.asarray(embeddings).astype(np.float32))
        with self.machine.autocast():
            noise = row_noise(self.seed, numbers, "decoder")
            pictures = paint(self.decoder, rows, tokens, lengths, self.brush, noise, start=start)
            for _, upsampler in self.upsamplers:
                noise = row_noise(self.seed, numbers, f"upsampler {upsampler.config.image_size}")
                pictures = upsample(upsampler, pictures, self.upsampler_brush, noise)
        return pictures.cpu().numpy()

    def invert(self, pictures: Any, embeddings: Any, iterations: int) -> Any:
        """The noise from which pictures are painted again, without captions: (B, 3, S, S) uint8, (B, D) -> the same.

        S is the decoder's. It is on the CPU, and no function of the seed.
        """
        import numpy as np
        import torch

        from dalle_cli.sampling.decoder import invert

        tokens, lengths = self._tokens([""] * len(pictures))
        rows, pixels = torch.from_numpy(np.asarray(embeddings).astype(np.float32)), torch.from_numpy(pictures)
        steps, guidance = self.brush.steps, self.brush.guidance
        with self.machine.autocast():
            found = invert(self.decoder, pixels, rows, tokens, lengths, steps, iterations, guidance=guidance)
        return found.cpu()

    def _tokens(self, texts: list[str]) -> Any:
        """Tokens (B, T) and lengths (B,), int64."""
        import numpy as np
        import torch

        length = self.decoder.config.n_text
        if self.tokenizer is None:
            return torch.zeros(len(texts), length, dtype=torch.int64), torch.zeros(len(texts), dtype=torch.int64)
        tokens, lengths, cut = self.tokenizer.encode_batch(texts, length)
        if cut:
            console.warn(f"captions of more than {length} tokens, which were cut: {cut}")
        written = [bool(text) for text in texts]
        return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(lengths.astype(np.int64) * written)
