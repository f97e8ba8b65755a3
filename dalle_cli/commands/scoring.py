"""What `score` and `rerank` know of a prior: log p(codes | caption) of codes, and of pictures by their codes.

Shapes: B pictures of a batch, T caption length, W side of the code grid, S side in pixels.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dalle_cli import console
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles as bundle

if TYPE_CHECKING:
    from dalle_cli.artifacts import Artifact
    from dalle_cli.devices import Arithmetic

BY = ("prior", "contrast")


def check_by(by: str, *more: str) -> None:
    """Raises: DalleError if there is no such score."""
    if by not in (names := (*more, *BY)):
        raise DalleError(f"expected --by {', '.join(names[:-1])} or {names[-1]}, found {by!r}")


class Scorer:
    """A prior with its tokenizer and, where pictures are scored, the dVAE whose codes it draws.

    `inputs` are the weights, as a history names them.

    Raises:
        DalleError: the weights are not there, or do not fit each other.
    """

    def __init__(self, model: str | None, machine: "Arithmetic", by: str, pictures: bool):
        from dalle_cli.commands.drawing import decoder
        from dalle_cli.data import tokenizer as tokenizers
        from dalle_cli.pipelines import loading as load

        self.weights, self.machine, self.by = bundle.weights(model, "weights.prior.codes"), machine, by
        self.encoder, self.cut = self.weights.fact("encoder", str), False
        self.inputs: dict[str, Artifact | str] = {"prior": self.weights}
        if pictures:
            vae = bundle.weights(model, "weights.dvae")
            self.dvae = decoder(vae, self.encoder, self.weights.path, machine)
            self.inputs["dvae"] = vae
        self.tokenizer = tokenizers.load(bundle.tokenizer(self.weights))
        self.prior = load.prior(self.weights, machine.device)

    def check(self, codes: "Artifact") -> None:
        """Raises: DalleError if these codes are not of the prior's encoder."""
        bundle.check_digest("image encoder", codes.fact("encoder", str), self.encoder, self.weights.path)

    def encode(self, images: Any) -> Any:
        """(B, 3, H, W) uint8 -> (B, W, W) codes; one of another size is cropped and resized as `encode-images` does."""
        import numpy as np
        from PIL import Image

        from dalle_cli.commands.encode_images import encode
        from dalle_cli.data.augment import center

        size = self.dvae.config.image_size
        pixels = [center(Image.fromarray(np.ascontiguousarray(row.transpose(1, 2, 0))), size) for row in images]
        return encode(self.dvae, np.stack(pixels).transpose(0, 3, 1, 2).copy(), self.machine)

    def pictures(self, images: Any, texts: Sequence[str]) -> Any:
        """Scores of pictures: (B, 3, H, W) uint8, B captions -> (B,) float32."""
        return self.codes(self.encode(images), texts)

    def codes(self, codes: Any, texts: Sequence[str]) -> Any:
        """Scores of codes, in nats, of the whole grid: (B, W, W), B captions -> (B,) float32.

        `prior`: log p(codes | caption). `contrast`: that less log p(codes | no caption), which guidance sharpens.

        Raises:
            DalleError: they are no codes of the prior's grid and vocabulary.
        """
        import numpy as np
        import torch

        from dalle_cli.commands.drawing import checked
        from dalle_cli.evaluation.likelihood import nats

        config, device = self.prior.config, self.machine.device
        grids = torch.from_numpy(checked(codes, config.n_image_vocab, config.grid)).to(device)
        unique = sorted(set(texts))
        tokens, lengths, cut = self.tokenizer.encode_batch(unique, config.n_text)
        if cut and not self.cut:
            self.cut = True
            console.warn(f"captions longer than {config.n_text} tokens are cut")
        of = {text: number for number, text in enumerate(unique)}
        own = np.array([of[text] for text in texts])
        words, ends = (torch.from_numpy(x[own].astype(np.int64)).to(device) for x in (tokens, lengths))
        with self.machine.autocast():
            score = -nats(self.prior, words, ends, grids)[1].sum(1)
            if self.by == "contrast":
                score += nats(self.prior, words, torch.zeros_like(ends), grids)[1].sum(1)
        return score.numpy().astype(np.float32)
