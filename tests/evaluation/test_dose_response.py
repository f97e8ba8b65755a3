"""Scores worsen step by step as real pictures are blurred, made noisy, or given others' captions.

600 emoji of the small recipe: one half is the reference, the other is degraded. Features are those of a small CLIP with
fixed random weights, so that no score depends on a training. What does not move is said here, too.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from dalle_cli.artifacts import open_artifact, write_artifact
from dalle_cli.data.loader import sequential
from dalle_cli.evaluation import kernel
from dalle_cli.evaluation import retrieval as matches
from dalle_cli.evaluation.blur import gaussian_blur
from dalle_cli.evaluation.frechet import Moments, between
from dalle_cli.evaluation.image_sets import open_image_set
from dalle_cli.evaluation.manifold import precision_recall
from dalle_cli.evaluation.store import FeatureRows
from dalle_cli.models.clip import CLIP, CLIPConfig

SMALL = Path(__file__).parents[2] / "recipes" / "emoji" / "small.tar"
SIZE = 32
DOSES = {"blur": (0, 0.5, 1, 2, 4), "noise": (0, 0.1, 0.2, 0.4)}  # pixels; standard deviation


@pytest.fixture(scope="module")
def halves():
    """Images in [0, 1], every other one."""
    side = open_image_set("reference", str(SMALL))
    images = [found for _, found in sequential(side.images, SIZE, range(len(side.images)), 100)]
    pictures = torch.from_numpy(np.concatenate(images)).float() / 255
    return pictures[0::2], pictures[1::2]


@pytest.fixture(scope="module")
def embed():
    torch.manual_seed(0)
    sizes = {"n_proj": 32, "image_size": SIZE, "patch_size": 4, "vision_width": 64, "vision_layers": 2}
    text = {"n_text_vocab": 9, "n_text": 2, "text_width": 8, "text_layers": 1, "text_heads": 1, "vision_heads": 2}
    clip = CLIP(CLIPConfig(**sizes, **text)).eval()

    def call(pictures):
        with torch.inference_mode():
            return torch.cat([clip.encode_image(part) for part in pictures.split(100)]).double().numpy()

    return call


@pytest.fixture(scope="module")
def responses(halves, embed):
    """For each kind of harm the scores at each dose."""
    reference, others = halves
    noise = torch.randn(others.shape, generator=torch.Generator().manual_seed(1))
    real = embed(reference)
    found = {}
    for kind, doses in DOSES.items():
        for dose in doses:
            harmed = gaussian_blur(others, dose) if kind == "blur" else (others + dose * noise).clamp(0, 1)
            drawn = embed(harmed)
            precision, recall = precision_recall(drawn, real)
            found.setdefault(kind, []).append(
                {
                    "frechet": between(Moments.of([drawn], 32), Moments.of([real], 32)),
                    "kernel": kernel.squared_mmd(drawn, real),
                    "precision": precision.mean(),
                    "recall": recall.mean(),
                }
            )
    return found


def rising(values):
    return all(b > a for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("kind", DOSES)
def test_distances_grow_and_recall_falls_with_each_dose(responses, kind):
    found = {name: [table[name] for table in responses[kind]] for name in responses[kind][0]}
    assert rising(found["frechet"]), found
    assert rising([-value for value in found["recall"]]), found
    seen = found["kernel"][1:] if kind == "blur" else found["kernel"]  # half a pixel of blur is within its error
    assert rising(seen), found
    assert found["frechet"][-1] > 10 * found["frechet"][0]
    assert found["kernel"][-1] > 0.1


def test_precision_falls_with_noise_and_is_blind_to_blur(responses):
    """A blurred picture lies inside of what is real: what it lacks, variety of detail, is what recall sees."""
    assert rising([-table["precision"] for table in responses["noise"]])
    assert responses["noise"][-1]["precision"] < 0.5
    blurred = [table["precision"] for table in responses["blur"]]
    assert max(blurred) - min(blurred) < 0.05


@pytest.fixture(scope="module")
def captioned(halves, embed, tmp_path_factory):
    """Images, and planted captions: the embedding of a caption is that of its picture and something of its own."""
    folder = tmp_path_factory.mktemp("captioned")
    pictures = embed(halves[0])
    pictures -= pictures.mean(axis=0)
    captions = pictures + 0.25 * pictures.std() * np.random.default_rng(0).standard_normal(pictures.shape)
    rows = []
    for name, values in (("pictures", pictures), ("captions", captions)):
        columns = {"embeddings": values.astype(np.float32), "ids": [str(i) for i in range(len(values))]}
        path = write_artifact(folder / f"{name}.safetensors", "embeddings", columns, {}, [])
        rows.append(FeatureRows(open_artifact(path)))
    return rows


def test_clip_score_and_retrieval_fall_with_the_share_of_shuffled_captions(captioned):
    pictures, captions = captioned
    own = np.arange(len(pictures))
    other = matches.shuffled(own, 0)
    score, first, fifth = [], [], []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        given = np.where(own < share * len(own), other, own)
        score.append(100 * matches.cosines(pictures, captions, given).mean())
        ranks = matches.ranks(captions, pictures, given[:, None].tolist(), 100, 0)
        first.append((ranks < 1).mean())
        fifth.append((ranks < 5).mean())
    for values in (score, first, fifth):
        assert rising([-value for value in values]), values
    assert first[0] > 0.9
    assert abs(score[-1]) < 5  # as the shuffled baseline
    assert fifth[-1] < 0.15  # by chance 0.05
