"""What every training stage does around its task: recipe, initial weights, provenance, and the run.

The stages themselves (`train_dvae` and the others) stand beside their tasks.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dalle_cli import config as recipes
from dalle_cli import console
from dalle_cli.artifacts import Artifact, history
from dalle_cli.data.datasets import Dataset, open_dataset
from dalle_cli.data.exclude import exclude_digest, read_exclude_list
from dalle_cli.data.filters import Filters
from dalle_cli.data.pairs import Pairs, vocabulary
from dalle_cli.data.skips import SkipLog
from dalle_cli.devices import arithmetic, rank
from dalle_cli.paths import skip_list
from dalle_cli.training import warm_start
from dalle_cli.training.config import header as header_of
from dalle_cli.training.distributed import process_group
from dalle_cli.training.loop import train
from dalle_cli.training.options import TrainingOptions
from dalle_cli.training.run import Run
from dalle_cli.training.task import Task


class Trainable(NamedTuple):
    """A model that can be trained: stage, kind of weights, section of the recipe, and the section's dataclasses."""

    stage: str
    kind: str
    section: str
    model: type[Any]
    train: type[Any]


@dataclass
class StageInputs:
    """What the inputs of a stage decide."""

    provenance: dict[str, Artifact | str]  # inputs, by the names that the weights' history gives them
    sizes: dict[str, Any] = field(default_factory=dict)  # of the model, such as the vocabulary
    header: dict[str, str] = field(default_factory=dict)  # digests that the weights record: tokenizer, encoder
    settings: dict[str, Any] = field(default_factory=dict)  # options that the history records, beside seed and dtype
    skipped: SkipLog | None = None  # samples that cannot be read


def image_inputs(
    dataset: str | Path, options: TrainingOptions, need_captions: bool = False
) -> tuple[Dataset, StageInputs]:
    """A data set, without the excluded ids, as the input of a stage.

    Raises:
        DalleError: no such data set, or a list of ids to exclude that is none.
    """
    (filters,) = recipes.section(recipes.read(options.config, options.sets), "data", Filters)
    data = open_dataset(str(dataset), need_captions=need_captions, filters=filters)
    gone, digest = read_exclude_list(options.exclude, data.ids), data.digest
    data = data.exclude(gone)
    return data, StageInputs(
        {"dataset": digest, **exclude_digest(gone)}, settings={"data": asdict(filters)}, skipped=data.skipped
    )


def pair_inputs(captions: Artifact, latents: Artifact, options: TrainingOptions) -> tuple[Pairs, StageInputs]:
    """Captions and latents joined by id, without the excluded ids, as the input of a stage.

    Raises:
        DalleError: no id in common, or a list of ids to exclude that is none.
    """
    pairs = Pairs(captions, latents)
    gone = read_exclude_list(options.exclude, pairs.ids)
    if pairs.unmatched and rank() == 0:
        console.note(
            f"{len(pairs)} images have captions and {latents.kind}; {pairs.unmatched} have only one and are left out"
        )
    sizes = {"n_text_vocab": vocabulary(captions), "n_text": captions.require("n_text", int)}
    header = {"tokenizer": captions.require("tokenizer", str), "encoder": latents.require("encoder", str)}
    inputs: dict[str, Artifact | str] = {"captions": captions, latents.kind: latents, **exclude_digest(gone)}
    return pairs.exclude(gone), StageInputs(inputs, sizes, header)


class TrainingStage:
    """One training: `model` and `train` are its hyper-parameters, `start` the weights that it starts from, if any."""

    def __init__(
        self, what: Trainable, out: str | Path, options: TrainingOptions, inputs: StageInputs,
        table: dict[str, Any] | None = None,
    ):  # fmt: skip
        """`table` is the recipe, by default that of the options.

        Raises:
            DalleError: a recipe that does not fit the inputs or the initial weights.
        """
        self.options, self.inputs, self.out = options, inputs, Path(out)
        table = recipes.read(options.config, options.sets) if table is None else table
        self.start = warm_start.open_weights(options.init, what.kind, what.stage)
        sizes = warm_start.model_settings(self.start, inputs.sizes, table.get(what.section, {}), what.model)
        self.model, train = recipes.section(table, what.section, what.model, sizes, train=what.train)
        self.train, sampling = warm_start.sampling_settings(self.start, what.kind, table.get(what.section), train)
        header = {"model": asdict(self.model), **header_of(self.train, sampling), **inputs.header}
        warm_start.check_inputs(self.start, header)
        self.machine = arithmetic(options.device, options.dtype)
        settings = {"seed": options.seed, "dtype": self.machine.name, **inputs.settings}
        made = history(what.stage, settings, **inputs.provenance, **warm_start.history_inputs(self.start))
        self.weights = Run(self.out, what.kind, header, made, options.force, what.model, what.train)

    def run(self, build: Callable[[], Task]) -> dict[str, Any]:
        """Train the task that `build` gives, from its last checkpoint if there is one, and write the weights.

        Returns the last validation's metrics, none if the run was finished before; and `skipped`, a summary of the
        samples that could not be read, if there were any.
        """
        o, skipped = self.options, self.inputs.skipped
        with process_group(self.machine.device, self.train.timeout) as group:
            metrics: dict[str, Any] = train(
                build, self.train, self.weights, self.machine, o.seed, o.fresh, self.start
            )  # fmt: skip
            if skipped is not None:
                group.collect(skipped)
        if skipped is not None and group.rank == 0:
            skipped.write(skip_list(self.out))
        return metrics | ({"skipped": skipped.summary()} if skipped is not None and skipped.count else {})
