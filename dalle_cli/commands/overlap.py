"""`dalle overlap`."""

from pathlib import Path
from typing import Annotated

from dalle_cli.options import BatchSize, DeviceOptions, Force, OutFile, Workers, arg, opt

EXAMPLE = """dalle overlap train.tar test.tar -o overlap.txt --grid closest.png
dalle overlap train.tar test.tar --of train -o seen.txt
dalle train-dvae train.tar --exclude seen.txt -o dvae.safetensors"""

Train = Annotated[str, arg("TRAIN", "What a model is trained on: a data set or an images artifact.")]
Test = Annotated[str, arg("TEST", "What must not be in it: likewise.")]
Of = Annotated[str, opt("SET", "Whose ids to list for --exclude: test or train; the pairs go to a .json.")]
Threshold = Annotated[
    float | None, opt("X", "Pairs of this cosine similarity are near-duplicates; 0.95 if left out.", min=-1.0, max=1.0)
]
FeaturesFile = Annotated[
    str | None,
    opt("FILE[:OUTPUT]", "Compare by the features of a network, as in `evaluate`, that is by content, not by pixels."),
]
Neighbors = Annotated[
    int, opt("N", "Compare each image of TEST with its N nearest of TRAIN.", "-k", "--neighbors", min=1)
]
Grid = Annotated[
    Path | None, opt("FILE", "An image grid of the pairs around the threshold, to choose it by, as PNG.", "--grid")
]


def run(
    train: Train,
    test: Test,
    out: OutFile,
    of: Of = "test",
    threshold: Threshold = None,
    features: FeaturesFile = None,
    neighbors: Neighbors = 8,
    grid: Grid = None,
    batch_size: BatchSize = 64,
    workers: Workers = 2,
    machine: DeviceOptions = DeviceOptions(),
    force: Force = False,
) -> None:
    """Find the images of one data set that are in another, too."""
    from dalle_cli import console
    from dalle_cli.evaluation import exclude_list

    made = exclude_list.overlap(
        train, test, out, machine.open(), of=of, threshold=threshold, features=features, neighbors=neighbors,
        grid=grid, batch_size=batch_size, workers=workers, force=force,
    )  # fmt: skip
    console.result(out, **made)
