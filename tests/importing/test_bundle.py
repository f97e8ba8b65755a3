"""A publication becomes a bundle that our commands use as their own: all of it, or nothing."""

import planted_publication
import pytest
import torch
from conftest import run_cli, run_ok
from safetensors.torch import load_file

from dalle_cli.artifacts import digest_file, open_artifact
from dalle_cli.importing import known


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    monkeypatch.setattr(known, "importers", lambda: iter([planted_publication.IMPORTER]))


@pytest.fixture(scope="module")
def published(chain, tmp_path_factory):
    return planted_publication.publish(chain.model, tmp_path_factory.mktemp("published"))


def test_an_imported_bundle_samples_what_the_model_does(chain, published, tmp_path):
    out = tmp_path / "made"
    result = run_cli("import", published, "-o", out)
    assert result.status == 0, result.stderr
    assert result.stdout == f"{out}\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made"]
    names = ["LICENSE", "README.md", "clip.safetensors", "dvae.safetensors", "prior.safetensors", "tokenizer.json"]
    assert sorted(p.name for p in out.iterdir()) == names
    for name in ("clip", "dvae", "prior"):
        ours, theirs = open_artifact(chain.model / f"{name}.safetensors"), open_artifact(out / f"{name}.safetensors")
        a, b = load_file(str(ours.path)), load_file(str(theirs.path))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert theirs.config["model"] == ours.config["model"]
        (entry,) = theirs.history
        assert entry["stage"] == "import"
        file = planted_publication.FILES[name]
        assert entry["inputs"] == theirs.config["source"]["files"] == {file: digest_file(published / file)}
        assert "revision" not in theirs.config["source"]
    assert open_artifact(out / "prior.safetensors").config["encoder"] == digest_file(out / "dvae.safetensors")
    images = [tmp_path / f"{name}.png" for name in ("a", "b")]
    for model, image in zip((chain.model, out), images, strict=True):
        run_ok("generate", "a red circle", "-n", 4, "-m", model, "-o", image, "--no-terminal")
    assert images[0].read_bytes() == images[1].read_bytes()
