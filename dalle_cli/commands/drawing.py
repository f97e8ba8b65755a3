"""What `sample`, `decode`, `rerank` and `generate` share: each step from columns to columns, in memory.

Shapes: P prompts, K candidates of each, N = P * K, T caption length, H W code grid, S side in pixels.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_cli import console
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles as bundle
from dalle_cli.options import AUTO

if TYPE_CHECKING:
    from dalle_cli.artifacts import Artifact
    from dalle_cli.commands.drawn_with import Settings
    from dalle_cli.commands.picture_prompt import Kept
    from dalle_cli.devices import Arithmetic
    from dalle_cli.models.dvae import DVAE


AT_ONCE = 64  # pictures that `generate` decodes and scores at once, however many candidates it draws at once


@dataclass(frozen=True)
class Candidate:
    """One picture to be: its prompt, the prompt's number in the list, and its own number among the prompt's."""

    text: str
    prompt: int
    number: int

    @property
    def id(self) -> str:
        """What its row is called."""
        return f"{self.prompt:05d}-{self.number:05d}"


def candidates(texts: list[str], n: int) -> list[Candidate]:
    """`n` candidates of each prompt, prompt after prompt."""
    return [Candidate(text, p, k) for p, text in enumerate(texts) for k in range(n)]


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


class Drawer:
    """A prior with its tokenizer, which has read the candidates' prompts; `kept` is what stays of a picture."""

    def __init__(
        self, weights: "Artifact", rows: Sequence[Candidate], s: "Settings", machine: "Arithmetic",
        compiled: bool = False, kept: "Kept | None" = None,
    ):  # fmt: skip
        import numpy as np
        import torch

        from dalle_cli.data import tokenizer as tokenizers
        from dalle_cli.pipelines import loading as load

        self.weights, self.rows, self.settings, self.machine = weights, rows, s, machine
        self.compiled, self.kept = compiled, kept
        self.encoder = weights.fact("encoder", str)
        self.prior = load.prior(weights, machine.device)
        self.texts = list(dict.fromkeys(row.text for row in rows))
        length = self.prior.config.n_text
        tokens, lengths, cut = tokenizers.load(bundle.tokenizer(weights)).encode_batch(self.texts, length)
        if cut:
            console.warn(f"prompts of more than {length} tokens, which were cut: {cut}")
        self.tokens = torch.from_numpy(tokens.astype(np.int64))
        self.lengths = torch.from_numpy(lengths.astype(np.int64))

    @property
    def n_codes(self) -> int:
        """Codes of one candidate."""
        return self.prior.config.grid**2

    def fitting(self, batch_size: int) -> int:
        """The batch size that was asked for; for `auto`, as many as fit."""
        from dalle_cli.sampling.memory import fitting_batch

        if batch_size != AUTO:
            return batch_size
        guided, several = self.settings.guidance != 1, len(self.texts) > 1
        return fitting_batch(self.prior, len(self.rows), guided, several, self.machine.dtype)

    def batches(self, batch_size: int, progress: Callable[[int], None]) -> Iterator[Any]:
        """(B, H, W) codes as an artifact holds them, of `batch_size` candidates after another; the last may be fewer.

        Candidate k of a prompt is a function of (weights, settings, prompt, k) alone.
        """
        import numpy as np
        import torch

        from dalle_cli.artifacts import digest_bytes
        from dalle_cli.models.packed import pack
        from dalle_cli.sampling.autoregressive import sample_batches

        at_once = min(batch_size, len(self.rows)) * (1 if self.settings.guidance == 1 else 2)
        pack(self.prior, at_once, self.machine.dtype, self.settings.int8, plain=self.compiled)
        s, of = self.settings, {text: i for i, text in enumerate(self.texts)}
        noise = {text: int(digest_bytes(text.encode())[:16], 16) << 32 for text in self.texts}
        drawn = sample_batches(
            self.prior,
            self.tokens,
            self.lengths,
            [noise[row.text] | row.number for row in self.rows],
            s.seed,
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            guidance_scale=s.guidance,
            guidance_span=(s.guidance_from, s.guidance_to),
            sketch_guidance=1.0 if s.sketch_guidance is None else s.sketch_guidance,
            captions=[of[row.text] for row in self.rows],
            given=None if self.kept is None else torch.from_numpy(self.kept.codes),
            kept=None if self.kept is None else torch.from_numpy(self.kept.cells),
            batch_size=batch_size,
            compiled=self.compiled,
            progress=progress,
        )
        dtype = np.uint16 if self.prior.config.n_image_vocab <= 2**16 else np.int32
        for batch in drawn:
            yield batch.cpu().numpy().astype(dtype)

    def history(self, past: "Artifact | None" = None, picked: str | None = None) -> list[dict[str, Any]]:
        """What led to the codes; `past` are the codes of which the rows `picked` are drawn again."""
        from dalle_cli.artifacts import history

        options = {**self.settings.told(), "dtype": self.machine.name}
        inputs: dict[str, Artifact | str] = {"model": self.weights}
        if past is not None:
            options, inputs = {**options, "rows": picked}, {"drawn": past, **inputs}
        if self.kept is not None:
            options, inputs = {**options, **self.kept.options}, {**inputs, **self.kept.inputs}
        return history("sample", options, **inputs)


def sample(drawer: Drawer, batch_size: int, past: "Artifact | None" = None, picked: str | None = None) -> Columns:
    """Draw all candidates; `past` are the codes of which the rows `picked` are drawn again."""
    import numpy as np

    rows, config, at_once = drawer.rows, drawer.prior.config, drawer.fitting(batch_size)
    chosen = {"batch": at_once} if batch_size == AUTO else {}
    with console.progress("sample", len(rows) * drawer.n_codes, unit="codes") as advance:
        codes = np.concatenate(list(drawer.batches(at_once, lambda n: advance(n, **chosen))))
    tensors = {
        "codes": codes,
        "prompt": np.array([row.prompt for row in rows], dtype=np.int32),
        "seed": np.full(len(rows), drawer.settings.seed, dtype=np.int64),
        "ids": [row.id for row in rows],
        "text": [row.text for row in rows],
    }
    facts = {"n_vocab": config.n_image_vocab, "grid": config.grid, "encoder": drawer.encoder}
    return Columns(tensors, facts, drawer.history(past, picked))


def decoder(weights: "Artifact", encoder: str, source: object, machine: "Arithmetic") -> "DVAE":
    """The dVAE that made these codes.

    Raises:
        DalleError: the codes were made by another.
    """
    from dalle_cli.models.packed import pack_pointwise
    from dalle_cli.pipelines import loading as load

    bundle.check_digest("dVAE", weights.digest, encoder, source)
    return pack_pointwise(load.dvae(weights, machine.device), machine.dtype)


def decode(dvae: "DVAE", codes: Any, machine: "Arithmetic") -> Any:
    """(B, H, W) codes -> (B, 3, S, S) uint8.

    Raises:
        DalleError: a code beyond the vocabulary, or a grid of another size.
    """
    import torch

    from dalle_cli.models.pixels import to_uint8

    rows = checked(codes, dvae.config.n_vocab, dvae.config.grid)
    with machine.autocast():
        return to_uint8(dvae.decode(torch.from_numpy(rows).to(machine.device))).cpu().numpy()


def checked(codes: Any, n_vocab: int, grid: int) -> Any:
    """(B, H, W) codes -> int64.

    Raises:
        DalleError: a code beyond the vocabulary, or a grid of another size.
    """
    import numpy as np

    rows = np.asarray(codes).astype(np.int64)
    if rows.size and not 0 <= rows.min() <= rows.max() < n_vocab:
        raise DalleError(f"expected codes below {n_vocab}, found {rows.max()}; the file is not this dVAE's")
    if rows.shape[1:] != (grid, grid):
        raise DalleError(f"expected codes of {(grid, grid)}, found {rows.shape[1:]}; the file is not this dVAE's")
    return rows


class Judge:
    """A CLIP with its tokenizer: scores pictures against captions."""

    def __init__(self, weights: "Artifact", machine: "Arithmetic"):
        from dalle_cli.data import tokenizer as tokenizers
        from dalle_cli.pipelines import loading as load

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


@dataclass(frozen=True)
class Place:
    """A picture on the podium: (3, S, S) uint8."""

    candidate: Candidate
    score: float
    picture: Any


class Podium:
    """The best `keep` of each prompt so far (0: all), as `best` ranks them; of the others nothing is held."""

    def __init__(self, keep: int):
        self.keep, self.seen = keep, 0
        self.groups: dict[str, list[Place]] = {}

    def offer(self, rows: Sequence[Candidate], scores: Any, pictures: Any) -> None:
        """Take what is good enough of a batch: B candidates, (B,) scores, (B, 3, S, S) uint8."""
        for row, score, picture in zip(rows, scores.tolist(), pictures, strict=True):
            group = self.groups.setdefault(row.text, [])
            at = bisect_right([-place.score for place in group], -score)  # behind its equals, which came before
            if not self.keep or at < self.keep:
                group.insert(at, Place(row, score, picture.copy()))  # a view would hold the whole batch
                del group[self.keep or len(group) :]
        self.seen += len(rows)

    def places(self) -> list[Place]:
        """Prompts in the order in which they first came, best first."""
        return [place for group in self.groups.values() for place in group[: self.keep or None]]

    def best(self) -> float:
        """The highest score of all."""
        return max(place.score for place in self.places())


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
    from dalle_cli.viz.grid import sheet

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

    from dalle_cli.viz.terminal import render

    truecolor = os.environ.get("COLORTERM", "") in ("truecolor", "24bit")
    console.preview(render(pixels, shutil.get_terminal_size().columns, columns or None, truecolor))
