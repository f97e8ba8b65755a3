"""Bundles travel: fetched from a hub on loopback, kept, continued, refused where changed; put there, fetched back."""

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import run_bad, run_cli, run_ok, start
from hub_server import GOOD, POOR, Handler
from hub_worker import NOWHERE, alone

from dalle_cli.artifacts import open_artifact, write_artifact
from dalle_cli.artifacts.container import read_header
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles, card, transfer

pytest_plugins = "hub_worker"
ROOT = Path(__file__).parents[2]
TOKENIZER = b'{"version": "1.0"}'
LARGE = 24 << 20  # bytes: huggingface-hub writes to disk in steps of 10 MiB


def weights(path, kind, size=64, **config):
    """A weights file of about `size` bytes, whose digest is a function of all arguments."""
    values = np.random.default_rng(size).integers(0, 255, size, dtype=np.uint8)
    write_artifact(path, kind, {"w": values}, {"model": {"n": size}, **config}, [])
    return hashlib.sha256(path.read_bytes()).hexdigest()


def plant(folder, size=400_000):
    """A bundle whose parts fit each other; for what does not run them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    tokenizer = hashlib.sha256(TOKENIZER).hexdigest()
    encoder = weights(folder / "dvae.safetensors", "weights.dvae", size)
    weights(folder / "prior.safetensors", "weights.prior.codes", size + 1, tokenizer=tokenizer, encoder=encoder)
    weights(folder / "clip.safetensors", "weights.clip", size + 2, tokenizer=tokenizer)
    return folder


def read(folder):
    """Name and bytes of each file that is not hidden."""
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if not p.name.startswith(".")}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return plant(tmp_path_factory.mktemp("planted") / "model")


# Fetching


def test_names_that_are_no_repositories():
    for name in (
        "hf://a/b/c",
        "hf://",
        "hf://a",
        "hf://a b/c",
        "hf://a/b@",
        "hf://../b",
        "hf://a/b@../../x",
        "hf://a/b@x y",
    ):
        assert "hf://owner/repo@revision" in run_bad("sample", "x", "-m", name), name
        with pytest.raises(DalleError, match="hub repository"):
            transfer.parse(name)
    assert transfer.parse("hf://a-b/c.d_e@refs/pr/1") == transfer.Repository("a-b/c.d_e", "refs/pr/1")
    assert str(transfer.parse("hf://a/b@main")) == "hf://a/b"


def test_pull_fetches_a_bundle_and_nothing_else(quiet, good, planted, tmp_path):
    ours = {**read(planted), "README.md": b"---\nlicense: mit\n---\n", "LICENSE": b"yes", "scores.json": b"{}"}
    evil = {
        "../up.json": b"{}",
        "pytorch_model.bin": b"\x80\x04",
        "x.pkl": b"\x80\x04",
        "run.py": b"1",
        "sub/prior.safetensors": b"0",
    }
    quiet.add("me/all", {**ours, **evil, "other.safetensors": b"no header of ours"})
    folder = good("pull", "hf://me/all")
    assert read(folder) == ours
    assert not [line for line in quiet.log if any(name in line for name in evil)]
    log = list(quiet.log)
    quiet.log.clear()
    assert good("pull", "me/all") == folder
    assert [line for line in quiet.log if line.startswith("HEAD") or "prior" in line] == []  # only what there is
    assert len(quiet.log) < len(log) / 2
    assert good("pull", "hf://me/all", "-o", tmp_path / "copy") == str(tmp_path / "copy")
    assert read(tmp_path / "copy") == ours
    assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir())


def test_a_copy_is_continued_and_goes_over_nothing_else(quiet, good, bad, planted, tmp_path):
    quiet.add("me/copied", read(planted))
    out = tmp_path / "copy"
    good("pull", "hf://me/copied", "-o", out)
    (out / "dvae.safetensors").unlink()
    good("pull", "hf://me/copied", "-o", out)
    assert read(out) == read(planted)
    (out / "tokenizer.json").write_text("{}")
    assert "found tokenizer.json" in bad("pull", "hf://me/copied", "-o", out)
    good("pull", "hf://me/copied", "-o", out, "--force")
    assert read(out) == read(planted)
    (out / "novel.txt").write_text("mine")
    assert "found novel.txt" in bad("pull", "hf://me/copied", "-o", out)
    good("pull", "hf://me/copied", "-o", out, "--force")
    assert (out / "novel.txt").read_text() == "mine"
    assert "found a file" in bad("pull", "hf://me/copied", "-o", out / "novel.txt")


def test_revisions(quiet, good, bad, planted, tmp_path):
    repo = quiet.add("me/revised", read(planted))
    first = repo.refs["main"]
    repo.commit({**repo.commits[first], "README.md": b"second"})
    repo.commit({**repo.commits[first], "README.md": b"tagged"}, "v1")
    assert (Path(good("pull", "hf://me/revised")) / "README.md").read_bytes() == b"second"
    assert (Path(good("pull", "hf://me/revised@v1")) / "README.md").read_bytes() == b"tagged"
    assert not (Path(good("pull", f"hf://me/revised@{first}")) / "README.md").exists()
    quiet.served.clear()
    repo.commit({**repo.commits[first], "README.md": b"third"})
    assert (Path(good("pull", "hf://me/revised")) / "README.md").read_bytes() == b"third"
    assert sum(quiet.served.values()) == len(b"third")  # the rest is what it was
    assert "no revision v9" in bad("pull", "hf://me/revised@v9")


def test_a_bundle_that_is_none_or_not_whole(quiet, dalle, bad, planted):
    quiet.add("me/other", {"model.safetensors": b"\x02\0\0\0\0\0\0\0{}", "config.json": b"{}"})
    assert "found none there" in bad("pull", "hf://me/other")
    assert not [line for line in quiet.log if "config.json" in line]
    files = read(planted)
    del files["dvae.safetensors"]
    quiet.add("me/part", files)
    result = dalle("pull", "hf://me/part")
    assert result.status == 0
    assert "warning: this bundle is not whole: expected the encoder of prior.safetensors" in result.stderr


@pytest.fixture
def cached(quiet, good, planted):
    quiet.add("me/cached", read(planted))
    folder = good("pull", "hf://me/cached")
    quiet.log.clear()
    return folder


@pytest.mark.parametrize("why", [NOWHERE, {"HF_HUB_OFFLINE": "1"}], ids=["no connection", "told so"])
def test_offline(cached, environment, quiet, why):
    result = alone(environment, "pull", "hf://me/cached", **why)
    assert result.status == 0, result.stderr
    assert result.stdout == cached + "\n"
    note, _ = result.stderr.splitlines()
    assert note.startswith("hf://me/cached: no connection (")
    assert "using the copy in the cache (commit " in note
    result = alone(environment, "pull", "hf://me/never", **why)
    assert result.status == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("dalle: error: expected the hub repository hf://me/never, found no connection (")
    assert quiet.log == []


def test_a_hub_that_has_a_bad_day(cached, quiet, dalle, bad):
    quiet.status = 503
    result = dalle("pull", "hf://me/cached")
    assert result.status == 0
    assert "status 503" in result.stderr
    assert "using the copy in the cache (commit " in result.stderr
    assert "found status 503" in bad("pull", "hf://me/never")


def test_a_commit_that_is_cached_needs_no_hub(cached, quiet, bad, tmp_path):
    """`-m` with a commit: nothing can have changed. The planted prior is no model, which is seen after the fetching."""
    commit = Path(cached).name
    line = bad("sample", "x", "-m", f"hf://me/cached@{commit}", "-o", tmp_path / "x.safetensors")
    assert "found 'model.n'" in line
    assert quiet.log == []


# Large files


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    weights(folder / "dvae.safetensors", "weights.dvae", LARGE)
    return read(folder)


def test_a_closed_connection_is_taken_up_where_it_broke(quiet, good, large):
    quiet.add("me/closed", large)
    quiet.cut["dvae.safetensors"] = at = 15 << 20
    assert read(good("pull", "hf://me/closed")) == large
    assert quiet.cut == {}
    gets = [line for line in quiet.log if line.startswith("GET cdn/")]
    assert len(gets) == 3  # header, first part, second part
    assert quiet.served["dvae.safetensors"] - LARGE < at - (10 << 20) + 200_000  # beyond 10 MiB, and the header


def test_a_reset_connection_leaves_nothing_half(quiet, good, bad, large, environment):
    data = large["dvae.safetensors"][:-1] + b"\1"  # a file that is not in the cache
    quiet.add("me/reset", {"LICENSE": b"yes", "dvae.safetensors": data})
    quiet.cut["dvae.safetensors"], quiet.reset = 22 << 20, True
    assert "no connection" in bad("pull", "hf://me/reset")
    cache = Path(environment["HF_HOME"]) / "hub" / "models--me--reset"
    assert sum(p.stat().st_size for p in (cache / "blobs").iterdir()) == len(b"yes")
    quiet.log.clear()
    assert read(good("pull", "hf://me/reset")) == {"LICENSE": b"yes", "dvae.safetensors": data}
    assert not [line for line in quiet.log if "LICENSE" in line]  # what has arrived is kept


def test_a_process_that_was_killed_leaves_nothing_that_is_used(quiet, good, environment, large):
    data = large["dvae.safetensors"][:-1] + b"\7"
    quiet.add("me/killed", {"LICENSE": b"yes", "dvae.safetensors": data})
    quiet.stall["dvae.safetensors"] = 21 << 20
    process = start("pull", "hf://me/killed", env=environment)
    assert quiet.stalled.wait(60)
    cache = Path(environment["HF_HOME"]) / "hub" / "models--me--killed"
    wait_for(lambda: [p for p in (cache / "blobs").glob("*.incomplete") if p.stat().st_size >= 20 << 20])
    process.send_signal(signal.SIGKILL)
    process.wait()
    quiet.log.clear()
    assert read(good("pull", "hf://me/killed")) == {"LICENSE": b"yes", "dvae.safetensors": data}
    assert not [line for line in quiet.log if "LICENSE" in line]


def wait_for(found, seconds=30):
    import time

    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


# Changed bytes


@pytest.mark.parametrize("name", ["prior.safetensors", "tokenizer.json"])
def test_changed_bytes_are_refused_and_kept_nowhere(quiet, good, bad, planted, name, environment):
    repository = f"me/changed-{name.partition('.')[0]}"
    quiet.add(repository, read(planted))
    quiet.changed.add(name)
    line = bad("pull", f"hf://{repository}")
    assert f"expected {name} of hf://{repository} of digest" in line
    assert "changed bytes" in line
    assert "Cannot find" not in line
    cache = Path(environment["HF_HOME"]) / "hub" / f"models--{repository.replace('/', '--')}"
    data = read(planted)[name]
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    assert flipped not in [p.read_bytes() for p in cache.rglob("*") if p.is_file()]
    assert "changed bytes" in bad("pull", f"hf://{repository}")  # asked for again, refused again
    quiet.changed.clear()
    assert read(good("pull", f"hf://{repository}")) == read(planted)


def test_bytes_that_changed_in_the_cache(quiet, good, bad, planted, environment, tmp_path):
    quiet.add("me/rotten", read(planted))
    folder = Path(good("pull", "hf://me/rotten"))
    blob = (folder / "prior.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    line = bad("sample", "x", "-m", "hf://me/rotten", "-o", tmp_path / "x.safetensors")
    assert "expected prior.safetensors of hf://me/rotten of digest" in line
    assert not blob.exists()
    assert read(good("pull", "hf://me/rotten")) == read(planted)
    blob.write_bytes(data)
    result = alone(environment, "pull", "hf://me/rotten", **NOWHERE)  # seen without the hub, too
    assert result.status == 1
    assert "expected prior.safetensors of hf://me/rotten of digest" in result.stderr
    assert not blob.exists()


@pytest.mark.parametrize("lie", ["../../../planted", "a" * 63, "A" * 64])
def test_a_digest_that_is_none_becomes_no_path(quiet, bad, planted, lie, monkeypatch):
    quiet.add("me/lying", read(planted))
    sibling = Handler.sibling

    def lying(self, path, data):
        about = sibling(self, path, data)
        return {**about, "lfs": {**about["lfs"], "sha256": lie}} if "lfs" in about else about

    monkeypatch.setattr(Handler, "sibling", lying)
    assert f"expected digests in hex from hf://me/lying, found '{lie}'" in bad("pull", "hf://me/lying")


# Who may


def test_what_may_not_be_seen(quiet, good, bad, planted):
    quiet.add("me/private", read(planted), private=True)
    quiet.add("me/gated", read(planted), gated=True)
    for token in ("", POOR):
        assert "found none that this login sees; check the name" in bad("pull", "hf://me/private", token=token)
        assert "found none that this login sees; check the name" in bad("pull", "hf://me/missing", token=token)
        assert "found that it is gated; ask for access on its page" in bad("pull", "hf://me/gated", token=token)
    assert "found that the token is refused (status 401); log in" in bad("pull", "hf://me/gated", token="hf_wrong")
    assert read(good("pull", "hf://me/private", token=GOOD)) == read(planted)
    assert read(good("pull", "hf://me/gated", token=GOOD)) == read(planted)
    assert quiet.leaked == []  # the token stays with the hub: large files come from elsewhere


# Stages


def test_a_stage_fetches_what_it_needs(quiet, good, chain, tmp_path, environment):
    """The models are padded, so that a header and a file can be told apart by what was sent."""
    files = {p.name: p.read_bytes() for p in chain.model.iterdir() if p.is_file()}
    for name in ("decoy", "other"):
        weights(
            tmp_path / f"{name}.safetensors", {"decoy": "weights.decoder", "other": "weights.upsampler"}[name], 1 << 20
        )
        files[f"{name}.safetensors"] = (tmp_path / f"{name}.safetensors").read_bytes()
    quiet.add("me/chain", {**files, "README.md": b"card"})
    given = ("a red circle on white", "-n", 4, "-o", tmp_path / "hub.codes.safetensors")
    good("sample", *given, "-m", "hf://me/chain")
    assert quiet.served["decoy.safetensors"] < 100_100
    assert quiet.served["prior.safetensors"] >= len(files["prior.safetensors"])
    assert "README.md" not in quiet.served
    cached = {p.name for p in (Path(environment["HF_HOME"]) / "hub" / "models--me--chain" / "snapshots").glob("*/*")}
    assert cached == {"prior.safetensors", "tokenizer.json"}
    assert (tmp_path / "hub.codes.safetensors").read_bytes() == chain.drawn.read_bytes()  # digests, no path, no URL
    quiet.log.clear()
    good("decode", tmp_path / "hub.codes.safetensors", "-m", "hf://me/chain")
    assert (tmp_path / "hub.images.safetensors").read_bytes() == chain.images.read_bytes()
    assert b"hf://" not in (tmp_path / "hub.images.safetensors").read_bytes()
    assert quiet.endpoint.encode() not in (tmp_path / "hub.images.safetensors").read_bytes()


def test_generate_asks_the_hub_once(quiet, good, chain, tmp_path):
    quiet.add("me/once", {p.name: p.read_bytes() for p in chain.model.iterdir() if p.is_file()})
    good("generate", "a red circle", "-n", 2, "-m", "hf://me/once", "-o", tmp_path / "red.png")
    assert len([line for line in quiet.log if line.startswith("GET api/")]) == 1
    run_ok("generate", "a red circle", "-n", 2, "-m", chain.model, "-o", tmp_path / "same.png")
    assert (tmp_path / "red.png").read_bytes() == (tmp_path / "same.png").read_bytes()


def test_a_kind_that_a_bundle_has_not(quiet, bad, good, planted, tmp_path, environment):
    quiet.add("me/noprior", {name: data for name, data in read(planted).items() if name != "prior.safetensors"})
    sample = ("sample", "x", "-m", "hf://me/noprior", "-o", tmp_path / "x.safetensors")
    found = bad(*sample)
    assert "expected weights.prior.codes or " in found
    assert "found none in the bundle hf://me/noprior" in found
    good("pull", "hf://me/noprior")
    code = "from dalle_cli.hub import transfer; transfer.fetch('hf://me/noprior', ['weights.prior.codes'])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**environment, **NOWHERE}, capture_output=True, text=True, check=False)
    error = done.stderr.splitlines()[-1]
    assert "expected weights.prior.codes in hf://me/noprior, found none in the cache, and no connection" in error


# Putting


def test_what_is_put_is_what_is_fetched(quiet, good, planted, tmp_path):
    folder = plant(tmp_path / "model")
    (folder / "scores.json").write_text(json.dumps({"withheld": {"R@1": 0.375, "R@5": 0.75}, "judge": "a stranger"}))
    (folder / "NOTICE").write_text("pictures by many")
    (folder / "prior.run").mkdir()
    (folder / ".DS_Store").write_bytes(b"\0")
    url = good("push", folder, "me/put", "--license", "mit", "--message", "hello", token=GOOD)
    assert url == f"{quiet.endpoint}/me/put"
    repo = quiet.repos["me/put"]
    assert repo.message == "hello"
    assert not repo.private
    assert len(repo.commits) == 2  # the first, which made it, and one
    text = (folder / "README.md").read_text()
    for part in ("license: mit", "library_name: dalle", "pipeline_tag: text-to-image", "| withheld R@1 | 0.375 |"):
        assert part in text
    for name in ("prior", "dvae", "clip"):
        assert f"| {name}.safetensors | " in text
    assert open_artifact(folder / "prior.safetensors").digest[:12] in text
    ours = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")}
    assert set(ours) == {*read(planted), "README.md", "NOTICE", "scores.json"}
    assert read(good("pull", "hf://me/put", "-o", tmp_path / "back")) == ours
    again = (folder / "README.md").read_bytes()
    good("push", folder, "me/put", token=GOOD)
    assert (folder / "README.md").read_bytes() == again


def test_putting_a_second_time_replaces(quiet, good, bad, tmp_path):
    folder = plant(tmp_path / "model", 1000)
    good("push", folder, "me/twice", "--license", "mit", token=GOOD)
    (folder / "clip.safetensors").unlink()
    weights(folder / "judge.safetensors", "weights.clip", 2000, tokenizer=hashlib.sha256(TOKENIZER).hexdigest())
    assert "found clip.safetensors there; --force deletes" in bad("push", folder, "me/twice", token=GOOD)
    good("push", folder, "me/twice", "--force", token=GOOD)
    assert read(good("pull", "hf://me/twice", "-o", tmp_path / "back")) == read(folder)


def test_private_stays_private(quiet, good, bad, tmp_path):
    folder = plant(tmp_path / "model", 1000)
    good("push", folder, "me/secret", "--private", "--license", "mit", token=GOOD)
    assert quiet.repos["me/secret"].private
    before = quiet.add("me/open", {}).refs["main"]
    assert "found it public" in bad("push", folder, "me/open", "--private", token=GOOD)
    assert quiet.repos["me/open"].refs["main"] == before


def test_what_is_not_put(quiet, good, bad, tmp_path):
    folder = plant(tmp_path / "model", 1000)
    for token in ("", POOR, "hf_wrong"):
        assert "found that the token is refused" in bad("push", folder, "me/no", "--license", "mit", token=token)
    assert "found a revision" in bad("push", folder, "me/no@v1", token=GOOD)
    assert "hf://owner/repo" in bad("push", folder, "no", token=GOOD)
    assert "expected a bundle on this machine" in bad("push", "hf://me/put", "me/no", token=GOOD)
    assert "found no such file: nowhere" in bad("push", "nowhere", "me/no", token=GOOD)
    assert "found a file" in bad("push", folder / "dvae.safetensors", "me/no", token=GOOD)
    (folder / "model.pkl").write_bytes(b"\x80\x04")
    assert "found model.pkl" in bad("push", folder, "me/no", token=GOOD)
    assert "me/no" not in quiet.repos
    good("push", folder, "me/left", "--force", "--license", "mit", token=GOOD)
    assert "model.pkl" not in quiet.repos["me/left"].find("main")[1]
    (folder / "README.md").write_bytes(b"caf\xe9")
    assert "expected text as UTF-8" in bad("push", folder, "me/left", "--force", token=GOOD)
    (folder / "broken.json").write_text("{")
    assert "expected JSON" in bad("push", folder, "me/left", "--force", token=GOOD)


def test_a_warning_where_no_license_is_named(quiet, dalle, tmp_path):
    result = dalle("push", plant(tmp_path / "model", 1000), "me/nobody", token=GOOD)
    assert result.status == 0
    assert "names no license" in result.stderr


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "tokenizer.json").write_text("{}"), "expected the tokenizer of clip.safetensors"),
        (lambda f: weights(f / "dvae.safetensors", "weights.dvae", 5), "expected the encoder of prior.safetensors"),
        (lambda f: weights(f / "more.safetensors", "weights.clip", 5), "found clip.safetensors and more.safetensors"),
        (lambda f: weights(f / "state.safetensors", "checkpoint", 5), "expected weights, found checkpoint"),
        (lambda f: (f / "clip.safetensors").write_bytes(b"cut"), "found only 3 bytes"),
        (lambda f: [p.unlink() for p in f.glob("*.safetensors")], "found no .safetensors file"),
    ],
    ids=["tokenizer", "encoder", "two of a kind", "no weights", "broken", "empty"],
)
def test_a_bundle_is_whole(tmp_path, spoil, said):
    folder = plant(tmp_path / "model", 1000)
    assert [a.kind for a in bundles.whole(sorted(folder.iterdir()))] == [
        "weights.clip",
        "weights.dvae",
        "weights.prior.codes",
    ]
    spoil(folder)
    with pytest.raises(DalleError, match=said):
        bundles.whole(sorted(folder.iterdir()))


# The model card


def test_a_card_keeps_what_a_person_wrote(tmp_path):
    folder = plant(tmp_path / "model", 1000)
    artifacts = bundles.whole(sorted(folder.iterdir()))
    old = "---\n# chosen with care\nlicense: cc0-1.0\ntags: [radish]\n---\n# My model\n\nIt draws radishes.\n"
    text = card.write(old, "me/it", artifacts, {"psnr": 26.125}, None)
    assert "license: cc0-1.0" in text
    assert "- radish" in text
    assert "library_name: dalle" in text
    assert "It draws radishes." in text
    assert "| psnr | 26.12 |" in text
    assert card.write(text, "me/it", artifacts, {"psnr": 26.125}, None) == text
    later = card.write(text + "\nAnd more.\n", "me/it", artifacts, {"psnr": 27.0}, "mit")
    assert "| psnr | 27 |" in later
    assert "26.12" not in later
    assert later.endswith("\nAnd more.\n")
    assert card.license_of(later) == "mit"
    whole = later.replace("license: mit", "license: mit  # by hand")
    assert card.write(whole, "me/it", artifacts, {"psnr": 27.0}, None) == whole  # nothing to add: not written anew
    assert card.license_of("# no header") is None
    for broken in ("---\na: [\n---\n", "---\njust text\n---\n"):
        with pytest.raises(DalleError, match="YAML"):
            card.write(broken, "me/it", artifacts, None, None)


# Shipped bundles


def test_shipped_bundles_by_name_and_by_default(chain, monkeypatch, tmp_path):
    monkeypatch.setattr(bundles, "SHIPPED", tmp_path / "bundles")
    monkeypatch.chdir(tmp_path)
    assert "give -m FILE_OR_FOLDER or set DALLE_MODEL" in run_bad("sample", "x", "-o", "x.safetensors")
    assert "found no such file: emoji; check -m" in run_bad("sample", "x", "-m", "emoji", "-o", "x.safetensors")
    shipped = tmp_path / "bundles" / "emoji"
    shipped.mkdir(parents=True)
    for path in (p for p in chain.model.iterdir() if p.is_file()):
        (shipped / path.name).write_bytes(path.read_bytes())
    for options in ((), ("-m", "emoji")):
        run_ok("sample", "a red circle on white", "-n", 4, *options, "-o", tmp_path / "drawn.safetensors", "--force")
        assert (tmp_path / "drawn.safetensors").read_bytes() == chain.drawn.read_bytes()
    told = run_cli("generate", "a red circle on white", "-n", 2, "-o", tmp_path / "a.png").stderr
    assert f"sampled from emoji, the model that comes with the package; what it knows: {shipped / 'README.md'}" in told
    told = run_cli("generate", "a red circle on white", "-n", 2, "-m", "emoji", "-o", tmp_path / "b.png").stderr
    assert "drawn by" not in told
    assert "check -m (shipped: emoji)" in run_bad("sample", "x", "-m", "emojy", "-o", "x.safetensors")
    assert "no such file: ../bundles/emoji2" in run_bad("sample", "x", "-m", "../bundles/emoji2", "-o", "x.safetensors")
    plant(tmp_path / "emoji", 1000)  # a folder here goes before what is shipped, DALLE_MODEL before the default
    assert bundles.locate("emoji") == Path("emoji")
    assert bundles.locate(None) == shipped
    assert "no such file: elsewhere" in run_bad("sample", "x", "-o", "x.safetensors", env={"DALLE_MODEL": "elsewhere"})


def test_shipped_bundles_are_packed(tmp_path):
    """What pyproject.toml says is built with a bundle planted in the package."""
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for name in ("README.md", "LICENSE"):
        (tmp_path / name).write_text("x")
    package = tmp_path / "dalle_cli"
    plant(package / "bundles" / "emoji", 1000)
    (package / "bundles" / "emoji" / "README.md").write_text("card")
    (package / "__init__.py").write_text('__version__ = "1"\n')
    code = "from setuptools import setup; setup()"
    done = subprocess.run(
        [sys.executable, "-c", code, "-q", "build_py", "-d", "out"], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out" / "dalle_cli" / "bundles" / "emoji") == read(package / "bundles" / "emoji")
    assert read_header(tmp_path / "out" / "dalle_cli" / "bundles" / "emoji" / "dvae.safetensors").kind == "weights.dvae"
