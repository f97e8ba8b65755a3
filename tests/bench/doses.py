"""What harm does to scores: real pictures are blurred, made noisy or given others' captions, dose by dose.

Half of a data set is the reference. The other half is harmed and judged against it by the code of `evaluate`; retrieval
looks for a picture's own original, so there the reference is that other half as it was.

S side in pixels.
"""

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from dalle_cli.artifacts import digest_bytes
from dalle_cli.data.augment import center
from dalle_cli.data.loader import ImageSource
from dalle_cli.devices import arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.evaluation.blur import gaussian_blur
from dalle_cli.evaluation.cache import FeaturePass
from dalle_cli.evaluation.feature_batch import Features
from dalle_cli.evaluation.features import ClipFeatures, load_features, title
from dalle_cli.evaluation.image_metrics import Comparison, score
from dalle_cli.evaluation.image_sets import GENERATED, ImageSet, open_image_set
from dalle_cli.evaluation.options import EvaluateOptions
from dalle_cli.evaluation.retrieval import shuffled
from dalle_cli.models.pixels import from_uint8, to_uint8
from dalle_cli.viz.metric_charts import METRICS

DOSES: dict[str, Sequence[float]] = {
    "blur": (0.5, 1, 2, 4, 8),  # standard deviation in pixels
    "noise": (0.025, 0.05, 0.1, 0.2, 0.4),  # standard deviation, of a range of pixels of 1
    "others' captions": (0.1, 0.25, 0.5, 0.75, 1),  # share
}
CAPTIONS = "others' captions"
GROWS = ("frechet", "kernel")  # with harm; the other scores fall
FAR, OWN = "others", "originals"  # the two references
SEED = 0


class Cell(NamedTuple):
    """A score and its interval of 95 %."""

    value: float
    low: float
    high: float


Row = dict[str, Cell]  # scores of pictures that were given one dose


@dataclass(frozen=True)
class Harmed:
    """Images of S x S that are blurred or made noisy as they are read; dose 0 leaves them as they are."""

    pictures: ImageSource
    size: int
    kind: str
    dose: float

    @property
    def ids(self) -> Sequence[str]:
        """As they were."""
        return self.pictures.ids

    @property
    def skipped(self) -> Any:
        """As they were."""
        return self.pictures.skipped

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, i: int) -> Image.Image:
        """Picture i, its noise a function of i."""
        found = center(self.pictures.read(i), self.size)
        pixels = from_uint8(torch.from_numpy(np.ascontiguousarray(found.transpose(2, 0, 1)))[None])
        if self.kind == "blur":
            pixels = gaussian_blur(pixels, self.dose)
        elif self.kind == "noise":
            generator = torch.Generator().manual_seed(i)
            pixels = pixels + self.dose * torch.randn(pixels.shape, generator=generator)
        return Image.fromarray(np.ascontiguousarray(to_uint8(pixels)[0].permute(1, 2, 0).numpy()))


class Trial:
    """A data set in two halves, and the features that they are judged by."""

    def __init__(self, dataset: str, features: str, folder: Path, limit: int | None = None):
        machine = arithmetic("auto", "float32")
        self.whole = open_image_set(GENERATED, dataset, limit)
        self.network: Features = load_features(features, None, machine)
        size = self.whole.size()
        self.run = FeaturePass(
            folder / "doses.features", [self.network], [0.0], size, machine, batch_size=64, workers=2
        )
        self.half = replace(self.whole, rows=self.whole.rows[1::2])
        self.references = {
            FAR: replace(self.whole, name=FAR, rows=self.whole.rows[0::2]),
            OWN: replace(self.half, name=OWN),
        }

    @property
    def clip(self) -> ClipFeatures | None:
        """The network, if it knows captions."""
        return self.network if isinstance(self.network, ClipFeatures) else None

    def texts(self) -> dict[str, str]:
        """The first caption of each picture that is harmed, by id; no more where one has none."""
        ids = [self.half.images.ids[row] for row in self.half.rows.tolist()]
        return {own: self.half.captions[own][0] for own in ids if self.half.captions.get(own)}

    def exchanged(self, share: float) -> dict[str, str]:
        """The captions, a share of them those of other pictures; a larger share takes in a smaller one's pictures.

        Raises:
            DalleError: no captions to exchange.
        """
        texts = self.texts()
        number = {text: i for i, text in enumerate(sorted(set(texts.values())))}
        other = shuffled(np.array([number[text] for text in texts.values()], np.int64), SEED)
        if other is None:
            raise DalleError("expected captions that differ from picture to picture, found none; give other pictures")
        turn = np.random.default_rng(SEED).permutation(len(texts))
        names = sorted(number)
        return {
            own: names[other[i]] if turn[i] < share * len(texts) else text
            for i, (own, text) in enumerate(texts.items())
        }

    def harmed(self, kind: str, dose: float) -> ImageSet:
        """The harmed half."""
        texts = self.exchanged(dose) if kind == CAPTIONS else self.texts()
        harmed = Harmed(self.whole.images, self.run.size, kind, dose)
        pixels = "" if kind == CAPTIONS else f"{kind} {dose:g}"
        source = digest_bytes(f"{self.whole.digest} {pixels}".encode())
        return replace(self.half, images=harmed, captions={own: (text,) for own, text in texts.items()}, source=source)

    def scores(self, kind: str = "none", dose: float = 0.0) -> Row:
        """All scores at one dose."""
        side = self.harmed(kind, dose)
        far = self._against(side, FAR, [])
        own = self._against(side, OWN, ["retrieval"])
        return _cells({**far, **own["retrieval"], "retrieval": None})

    def _against(self, side: ImageSet, reference: str, names: Sequence[str]) -> dict[str, Any]:
        options = EvaluateOptions(scores=",".join(names), seed=SEED)
        comparison = Comparison((side, self.references[reference]), self.network, self.clip, self.run, options)
        return score(comparison)[0][0]


def _cells(scores: Mapping[str, Any]) -> Row:
    """Those of the scores that have an interval."""
    found = {name: scores[name] for name in METRICS if isinstance(scores.get(name), dict)}
    return {name: Cell(told["value"], told["low"], told["high"]) for name, told in found.items() if "low" in told}


def verdict(name: str, harmless: Cell, doses: Sequence[float], cells: Sequence[Cell]) -> str:
    """From which dose on a score is worse beyond both intervals; else that it is blind, or misled, to such harm."""
    grows = name in GROWS
    worse = [c.low > harmless.high if grows else c.high < harmless.low for c in cells]
    better = [c.high < harmless.low if grows else c.low > harmless.high for c in cells]
    if any(better):
        return "misled"
    if not worse[-1]:
        return "blind" if not any(worse) else "unsteady"
    first = len(worse) - len(list(itertools.takewhile(bool, reversed(worse))))
    values = [harmless.value, *(c.value for c in cells)]
    steps = [b > a if grows else b < a for a, b in itertools.pairwise(values)]
    return f"from {doses[first]:g}" + ("" if all(steps[first:]) else ", not with every dose")


def table(harmless: Row, found: Mapping[str, Sequence[Row]], called: str) -> str:
    """Markdown: a row a dose, a column a score; under each kind of harm, what each score saw of it."""
    names = {name: title for name, (title, *_) in METRICS.items()} | {"frechet": called}
    columns = [name for name in names if name in harmless]
    lines = [["harm", "dose", *(names[name] for name in columns)], ["---"] * (2 + len(columns))]
    lines.append(["none", "", *(_figure(harmless[name]) for name in columns)])
    for kind, rows in found.items():
        doses = DOSES[kind]
        for dose, row in zip(doses, rows, strict=True):
            lines.append([kind, f"{dose:g}", *(_figure(row[name]) for name in columns)])
        told = [verdict(name, harmless[name], doses, [row[name] for row in rows]) for name in columns]
        lines.append([f"**{kind}**", "worse", *(f"**{word}**" for word in told)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figure(cell: Cell) -> str:
    value, half = cell.value, cell.high - cell.value if cell.high > cell.value else cell.value - cell.low
    digits = 3 if abs(value) < 10 else 1
    return f"{value:.{digits}f} ± {half:.{digits}f}"


def report(dataset: str, features: str, limit: int | None = None) -> str:
    """A data set and features as `evaluate` takes them -> the table, and what it was made of."""
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(dataset, features, Path(folder), limit)
        kinds = [kind for kind in DOSES if kind != CAPTIONS or (trial.clip is not None and trial.texts())]
        harmless = trial.scores()
        found = {kind: [trial.scores(kind, dose) for dose in DOSES[kind]] for kind in kinds}
        made = f"{len(trial.half.rows)} pictures against {len(trial.references[FAR].rows)} others"
        made += f", {trial.run.size} pixels, features {trial.network.name}"
        return f"{made}; ± is half of an interval of 95 %.\n\n{table(harmless, found, title(trial.network))}"
