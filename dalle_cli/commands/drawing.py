"""What `sample`, `decode`, `rerank` and `generate` share: each step from columns to columns, in memory.

Shapes: P prompts, K candidates of each, N = P * K, T caption length, H W code grid, S side in pixels.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_cli import bundle, console
from dalle_cli.errors import DalleError

if TYPE_CHECKING:
    from dalle_cli.artifacts import Artifact
    from dalle_cli.devices import Arithmetic
    from dalle_cli.models.dvae import DVAE


@dataclass(frozen=True)
class Settings:
    """How to draw; `batch_size` has no part in the result."""

    n: int
    temperature: float
    top_k: int
    top_p: float
    guidance: float
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "guidance"):
            if not math.isfinite(value := getattr(self, name)):
                raise DalleError(f"expected a finite --{name.replace('_', '-')}, found {value}")


@dataclass(frozen=True)
class Columns:
    """What an artifact will hold."""

    tensors: dict[str, Any]
    config: dict[str, Any]
    history: list[dict[str, Any]]


def read_prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    """The prompts given as arguments, then those of the file, empty lines left out.

    Raises:
        DalleError: none, or a file that cannot be read.
    """
    texts = list(prompts or [])
    if file is not None:
        try:
            texts += file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DalleError(f"expected prompts, one a line in UTF-8, found {error}; check --prompts") from None
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise DalleError('expected a prompt, found none; give one, as "a red circle", or --prompts FILE')
    return texts


def sample(weights: "Artifact", texts: list[str], s: Settings, machine: "Arithmetic") -> Columns:
    """Draw `s.n` candidates for each prompt; candidate k of a prompt is a function of (seed, prompt, k) alone."""
    import numpy as np
    import torch

    from dalle_cli import load
    from dalle_cli.artifacts import digest_bytes, history
    from dalle_cli.data import tokenizer as tokenizers
    from dalle_cli.sampling.autoregressive import sample_codes

    prior, encoder = load.prior(weights, machine.device), weights.fact("encoder", str)
    bpe = tokenizers.load(bundle.tokenizer(weights))
    tokens, lengths, cut = bpe.encode_batch(texts, prior.config.n_text)
    if cut:
        console.warn(f"{cut} prompts are longer than {prior.config.n_text} tokens and were cut")
    indices = [int(digest_bytes(text.encode())[:16], 16) << 32 | k for text in texts for k in range(s.n)]
    of_prompt = np.repeat(np.arange(len(texts)), s.n if len(texts) > 1 else 1)
    n_codes = len(indices) * prior.config.grid**2
    with console.progress("sample", n_codes, unit="codes") as advance, machine.autocast():
        codes = sample_codes(
            prior,
            torch.from_numpy(tokens[of_prompt].astype(np.int64)),
            torch.from_numpy(lengths[of_prompt].astype(np.int64)),
            indices,
            s.seed,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            guidance_scale=s.guidance,
            batch_size=s.batch_size,
            progress=advance,
        )
    options = {**asdict(s), "dtype": machine.name}
    del options["batch_size"]
    tensors = {
        "codes": codes.cpu().numpy().astype(np.uint16 if prior.config.n_image_vocab <= 2**16 else np.int32),
        "prompt": np.repeat(np.arange(len(texts), dtype=np.int32), s.n),
        "seed": np.full(len(indices), s.seed, dtype=np.int64),
        "ids": [f"{p:05d}-{k:05d}" for p in range(len(texts)) for k in range(s.n)],
        "text": [text for text in texts for _ in range(s.n)],
    }
    config = {"n_vocab": prior.config.n_image_vocab, "grid": prior.config.grid, "encoder": encoder}
    return Columns(tensors, config, history("sample", options, model=weights))


def decoder(weights: "Artifact", encoder: str, source: object, machine: "Arithmetic") -> "DVAE":
    """The dVAE that made these codes.

    Raises:
        DalleError: the codes were made by another.
    """
    from dalle_cli import load

    bundle.check_digest("dVAE", weights.digest, encoder, source)
    return load.dvae(weights, machine.device)


def decode(dvae: "DVAE", codes: Any, machine: "Arithmetic") -> Any:
    """(B, H, W) codes -> (B, 3, S, S) uint8.

    Raises:
        DalleError: a code beyond the vocabulary, or a grid of another size.
    """
    import numpy as np
    import torch

    from dalle_cli.models.pixels import to_uint8

    rows = np.asarray(codes).astype(np.int64)
    if rows.size and not 0 <= rows.min() <= rows.max() < dvae.config.n_vocab:
        raise DalleError(f"expected codes below {dvae.config.n_vocab}, found {rows.max()}; the file is not this dVAE's")
    grid = (dvae.config.grid, dvae.config.grid)
    if rows.shape[1:] != grid:
        raise DalleError(f"expected codes of {grid}, found {rows.shape[1:]}; the file is not this dVAE's")
    with machine.autocast():
        return to_uint8(dvae.decode(torch.from_numpy(rows).to(machine.device))).cpu().numpy()


class Judge:
    """A CLIP with its tokenizer: scores pictures against captions."""

    def __init__(self, weights: "Artifact", machine: "Arithmetic"):
        from dalle_cli import load
        from dalle_cli.data import tokenizer as tokenizers

        self.machine = machine
        self.clip = load.clip(weights, machine.device)
        self.tokenizer = tokenizers.load(bundle.tokenizer(weights))

    def score(self, images: Any, texts: list[str]) -> Any:
        """Cosine of each picture with its caption: (B, 3, S, S) uint8, B captions -> (B,) float32."""
        import numpy as np
        import torch

        from dalle_cli.models.pixels import from_uint8

        device = self.machine.device
        unique = sorted(set(texts))
        tokens, lengths, _ = self.tokenizer.encode_batch(unique, self.clip.config.n_text)
        pixels = from_uint8(torch.from_numpy(np.array(images)).to(device))
        with torch.inference_mode(), self.machine.autocast():
            text = self.clip.encode_text(
                torch.from_numpy(tokens.astype(np.int64)).to(device),
                torch.from_numpy(lengths.astype(np.int64)).to(device),
            )
            picture = self.clip.encode_image(pixels)
        of = {t: i for i, t in enumerate(unique)}
        own = text[torch.tensor([of[t] for t in texts], device=device)]
        return torch.cosine_similarity(picture.float(), own.float()).cpu().numpy()


def check_keep(groups: list[str], keep: int) -> None:
    """Raises: DalleError if a prompt has fewer pictures than are to be kept."""
    fewest = min(Counter(groups).values(), default=0)
    if keep > fewest:
        raise DalleError(f"expected at least {keep} images per prompt to keep {keep}, found {fewest}; lower --keep")


def best(scores: Any, groups: list[str], keep: int) -> Any:
    """Rows of the `keep` best of each group (0: all), groups in the order they first come, best first; ties by row."""
    import numpy as np

    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    ranked = [sorted(rows, key=lambda r: (-float(scores[r]), r))[: keep or None] for rows in members.values()]
    return np.array([row for rows in ranked for row in rows], dtype=np.int64)


def check_png(path: Path, force: bool) -> None:
    """Raises: DalleError if anything but a PNG lies at `path`."""
    if path.is_dir() or (path.exists() and not force and not _is_png(path)):
        raise DalleError(f"expected to write a PNG to {path}, found something else there; choose another -o or --force")


def _is_png(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"\x89PNG"


def save_sheet(
    path: Path, pixels: list[Any], texts: list[str], scores: list[float] | None, columns: int, title: str | None,
    force: bool,
) -> Path:  # fmt: skip
    """Draw a contact sheet and write it as PNG.

    Raises:
        DalleError: something that is no PNG lies there.
    """
    from dalle_cli.artifacts.container import replace_file
    from dalle_cli.data.sheet import sheet

    check_png(path, force)
    alike = len(set(texts)) < len(texts)
    groups = [texts.index(text) for text in texts] if alike else None  # a row for each prompt, unless one picture each
    image = sheet(pixels, texts, scores, columns=columns or None, title=title, groups=groups)
    replace_file(path, lambda part: image.save(part, format="PNG"))
    return path


def preview(pixels: list[Any], columns: int) -> None:
    """Show pictures in the terminal."""
    import os
    import shutil

    from dalle_cli.data.terminal import render

    truecolor = os.environ.get("COLORTERM", "") in ("truecolor", "24bit")
    console.preview(render(pixels, shutil.get_terminal_size().columns, columns or None, truecolor))
