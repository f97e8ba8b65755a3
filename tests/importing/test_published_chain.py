"""Every command of the chain with an imported Malevich, and training that starts from imported weights."""

from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import numpy as np
import published_priors as published
import pytest
from conftest import run_bad, run_cli, run_ok
from interruptions import Crash, after_update
from PIL import Image
from stage_runs import lasting_rows, rows

from dalle_cli.artifacts import open_artifact
from dalle_cli.importing import mindalle
from dalle_cli.pipelines import prior as pipeline

LENGTH = {"malevich": published.N_TEXT - 1, "mindalle": published.N_TEXT}


class Chain(NamedTuple):
    """An imported bundle, and captions and codes of a few photos made with it."""

    name: str
    bundle: object
    captions: object
    codes: object

    def training(self, out, *more):
        settings = {"steps": 20, "batch_size": 4, "lr": 1e-3, "log_every": 5, "checkpoint_every": 8}
        settings |= {"warmup": 0, "bpe_dropout": 0}
        sets = [word for k, v in settings.items() for word in ("--set", f"prior.train.{k}={v}")]
        return ("train-prior", self.captions, self.codes, "--init", self.bundle, *sets, "-o", out, *more)


@pytest.fixture(scope="module", params=["malevich", "mindalle"])
def chain(request, tmp_path_factory):
    root, name = tmp_path_factory.mktemp(request.param), request.param
    (published.publish_malevich if name == "malevich" else published.publish_mindalle)(root / "files")
    with mock.patch.object(mindalle, "IMPORTER", replace(mindalle.IMPORTER, clip="")):  # which is imported elsewhere
        run_ok("import", root / "files", "-o", root / "bundle")
    (root / "photos").mkdir()
    words = published.WORDS.split() if name == "malevich" else " ".join(published.CAPTIONS).split()
    for i in range(6):
        Image.new("RGB", (48, 48), (40 * i, 255 - 40 * i, 120)).save(root / "photos" / f"{i}.png")
        (root / "photos" / f"{i}.txt").write_text(" ".join(words[i % 3 : i % 3 + 3]), encoding="utf-8")
    made = Chain(name, root / "bundle", root / "captions.safetensors", root / "codes.safetensors")
    length = ("--set", f"tokenizer.length={LENGTH[name]}")
    run_ok("tokenize", root / "photos", "-t", root / "bundle" / "tokenizer.json", *length, "-o", made.captions)
    run_ok("encode-images", root / "photos", "-m", root / "bundle", "-o", made.codes)
    return made


def test_captions_have_the_tokens_that_sampling_uses(chain):
    """Those of training and those of a prompt: the same ids, and EOS where there is one."""
    captions = open_artifact(chain.captions)
    texts = list(captions.strings("text"))
    weights = open_artifact(chain.bundle / "prior.safetensors")
    tokens, lengths = pipeline.encode_prompts(weights, texts, LENGTH[chain.name])
    assert np.array_equal(captions.array("tokens"), tokens)
    assert np.array_equal(captions.array("lengths"), lengths)
    last = [row[n - 1] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    assert all((token == 3) == (chain.name == "malevich") for token in last)


def test_every_command_takes_the_bundle(chain, tmp_path):
    model = ("-m", chain.bundle)
    codes, images, scores, best = (tmp_path / f"{name}.safetensors" for name in ("codes", "images", "scores", "best"))
    run_ok("sample", "шла саша", "-n", 3, *model, "-o", codes)
    settings = open_artifact(codes).history[-1]["options"]
    assert settings["top_k"] == (2048 if chain.name == "malevich" else 256)
    assert settings.get("top_p") == (0.995 if chain.name == "malevich" else 1.0)
    run_ok("decode", codes, *model, "-o", images)
    run_ok("score", images, *model, "-o", scores)
    run_ok("rerank", images, "--by", "prior", "--codes", codes, "--keep", 1, *model, "-o", best)
    assert len(open_artifact(best).array("images")) == 1
    run_ok("generate", "шла саша", "-n", 2, *model, "-o", tmp_path / "best.png", "--no-terminal")  # without a CLIP
    assert min(Image.open(tmp_path / "best.png").size) >= 256


def test_fine_tuning_lowers_the_loss_and_resumes_exactly(chain, tmp_path):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    run_ok(*chain.training(whole))
    losses = [row["loss"] for row in rows(whole) if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    with after_update(11), pytest.raises(Crash):
        run_cli(*chain.training(cut))
    assert "resuming from update 8" in run_cli(*chain.training(cut)).stderr
    assert cut.read_bytes() == whole.read_bytes()
    assert lasting_rows(cut) == lasting_rows(whole)
    config, before = open_artifact(whole).config, open_artifact(chain.bundle / "prior.safetensors").config
    for name in ("model", "tokenizer", "encoder"):
        assert config[name] == before[name]
    assert config["sampling"].items() >= before["sampling"].items()


def test_bpe_dropout_is_refused_before_training(chain, tmp_path):
    message = run_bad(*chain.training(tmp_path / "out.safetensors", "--set", "prior.train.bpe_dropout=0.1"))
    assert "expected a byte-level BPE for BPE dropout" in message
    assert not (tmp_path / "out.run").exists()
