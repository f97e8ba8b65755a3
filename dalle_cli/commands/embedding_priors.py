"""What `train-prior` does where the latents are CLIP embeddings: which prior, by the recipe, and its run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_cli.errors import DalleError

if TYPE_CHECKING:
    from dalle_cli.artifacts import Artifact
    from dalle_cli.data.pairs import Pairs
    from dalle_cli.devices import Arithmetic

SECTION = "embedding_prior"
KINDS = ("diffusion", "autoregressive")


@dataclass(frozen=True)
class Choice:
    """Which prior over embeddings is trained; the numbers of each are in a table of its own."""

    kind: str = "diffusion"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            found = f"found {self.kind!r}"
            raise DalleError(f"expected {SECTION}.kind among {', '.join(KINDS)}, {found}; correct the recipe")


@dataclass(frozen=True)
class Inputs:
    """Captions and latents, joined; what history says of the ids left out; where to write; what to begin with."""

    captions: "Artifact"
    latents: "Artifact"
    pairs: "Pairs"
    gone: Mapping[str, str]
    out: Path
    init: str | None = None


def train_prior(
    table: Mapping[str, Any], given: Inputs, machine: "Arithmetic", seed: int, fresh: bool, force: bool
) -> dict[str, float]:
    """Train the prior that the recipe chooses; the last validation's figures.

    Raises:
        DalleError: a recipe that does not fit the inputs, and as `training.loop.train`.
    """
    from dataclasses import asdict

    from dalle_cli import config as recipes
    from dalle_cli.artifacts import history
    from dalle_cli.models.diffusion_prior import DiffusionPriorConfig
    from dalle_cli.models.embedding_prior import EmbeddingPriorConfig
    from dalle_cli.training import warm_start as beginning
    from dalle_cli.training.embedding_prior import (
        AutoregressivePriorTask,
        DiffusionPriorTask,
        EmbeddingPriorTrain,
    )
    from dalle_cli.training.loop import train
    from dalle_cli.training.run import Run

    texts, latents, pairs = given.captions, given.latents, given.pairs
    kind, body = chosen(table)
    name = f"{SECTION}.{kind}"
    known = {"kind": kind, "n_text_vocab": texts.fact("n_vocab", int), "n_text": texts.fact("n_text", int)}
    known["n_embedding"] = pairs.width
    start = beginning.opened(given.init, "weights.prior.embeddings", "train-prior")
    known = beginning.sizes(start, known, body)
    if start is None and kind == "autoregressive" and not body.get("n_component"):
        body = {**body, "n_component": n_component(body, pairs)}
    cls = DiffusionPriorConfig if kind == "diffusion" else EmbeddingPriorConfig
    model, options = recipes.section({name: body}, name, cls, known, train=EmbeddingPriorTrain)
    task = DiffusionPriorTask if kind == "diffusion" else AutoregressivePriorTask
    facts = {"tokenizer": texts.fact("tokenizer", str), "encoder": latents.fact("encoder", str)}
    header = {"model": asdict(model), "train": asdict(options), **facts}
    beginning.check_inputs(start, header)
    told = {"seed": seed, "dtype": machine.name}
    made = history("train-prior", told, captions=texts, embeddings=latents, **given.gone, **beginning.named(start))
    run = Run(given.out, "weights.prior.embeddings", header, made, force)
    return train(lambda: task(model, options, pairs, seed), options, run, machine, seed, fresh, start)


def chosen(table: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kind of prior that a recipe asks for, and the table of its numbers.

    Raises:
        DalleError: an unknown kind or key.
    """
    from dalle_cli import config as recipes

    body = table.get(SECTION, {})
    if not isinstance(body, dict):
        raise DalleError(f"expected a table [{SECTION}], found {body!r}")
    own = {key: value for key, value in body.items() if key not in KINDS}
    kind = recipes.build(Choice, own, SECTION, KINDS).kind
    numbers = body.get(kind, {})
    if not isinstance(numbers, dict):
        raise DalleError(f"expected a table [{SECTION}.{kind}], found {numbers!r}")
    return kind, numbers


def n_component(body: Mapping[str, Any], pairs: "Pairs") -> int:
    """How many components hold 99% of the variance of the training embeddings."""
    from dalle_cli import console
    from dalle_cli.config import build
    from dalle_cli.devices import rank
    from dalle_cli.training.embedding_prior import HELD, EmbeddingPriorTrain, measured

    train = build(EmbeddingPriorTrain, body.get("train", {}), f"{SECTION}.autoregressive.train")
    n = measured(pairs, pairs.split(train.validation)[0]).n_holding(HELD)
    if rank() == 0:
        console.note(f"{n} of {pairs.width} principal components hold {HELD:.0%} of the variance: n_component = {n}")
    return n
