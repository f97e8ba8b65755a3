"""`-m hf://...` of published weights: fetched, checked and imported when first used, then a bundle like ours."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import karlo_publication
import min_dalle_files
import pytest
from conftest import run_ok
from hub_worker import alone
from PIL import Image
from planted_publication import FILES, publish

from dalle_cli.artifacts import digest_file, open_artifact
from dalle_cli.importing import dalle_mini

pytest_plugins = "hub_worker"
ROOT = Path(__file__).parents[2]
PROMPT = ("generate", "a red circle", "-n", 2, "--no-terminal")
LARGE = 24 << 20  # bytes: huggingface-hub writes to disk in steps of 10 MiB


def files(folder):
    """Name and bytes of each file of a publication."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def planted(chain, tmp_path_factory):
    return files(publish(chain.model, tmp_path_factory.mktemp("published")))


@pytest.fixture(scope="module")
def cache(environment):
    return Path(environment["HF_HOME"]) / "dalle"


def bad_line(result):
    """The last line of a command that must have failed, which is the only one that names an error."""
    assert result.status == 1, result
    assert result.stdout == ""
    *notes, line = result.stderr.splitlines()
    assert line.startswith("dalle: error: expected ")
    assert "Traceback" not in result.stderr
    assert not [note for note in notes if "error" in note]
    return line


def test_from_nothing_to_an_image_and_once_more_offline(quiet, dalle, planted, chain, environment, cache, tmp_path):
    repo = quiet.add("me/planted", planted)
    images = [tmp_path / f"{i}.png" for i in range(5)]
    result = dalle(*PROMPT, "-m", "hf://me/planted", "-o", images[0])
    assert result.status == 0, result.stderr
    needed = sum(len(planted[name]) for name in (*FILES.values(), "words.json", "planted.json"))
    assert f"Planted, {needed / 1e3:.1f} kB to fetch" in result.stderr
    assert "this is done once" in result.stderr
    assert result.stderr.count("Not for commercial use.") == 1
    run_ok(*PROMPT, "-m", chain.model, "-o", images[1])
    assert images[0].read_bytes() == images[1].read_bytes()
    assert not [line for line in quiet.log if "notes.txt" in line]
    (folder,) = (cache / "me--planted").glob("*-stored-*")
    assert folder.name.startswith(repo.refs["main"])
    source = open_artifact(folder / "prior.safetensors").config["source"]
    assert (source["repository"], source["revision"]) == ("me/planted", repo.refs["main"])
    card = (folder / "README.md").read_text()
    for text in ("license: cc-by-nc-sa-4.0", "Not for commercial use.", "A made-up model.", repo.refs["main"]):
        assert text in card
    quiet.log.clear()
    result = dalle(*PROMPT, "-m", "hf://me/planted", "-o", images[2])
    assert (result.status, result.stderr.count("\n")) == (0, 1)
    assert not [line for line in quiet.log if "resolve" in line or "cdn" in line]
    quiet.log.clear()
    dalle(*PROMPT, "-m", f"hf://me/planted@{repo.refs['main']}", "-o", images[3])
    assert quiet.log == []  # a commit never changes
    shutil.rmtree(Path(environment["HF_HOME"]) / "hub")  # what was fetched is not needed any more
    result = alone(environment, *PROMPT, "-m", "hf://me/planted", "-o", images[4], HF_HUB_OFFLINE="1")
    assert result.status == 0, result.stderr
    assert "no connection" in result.stderr
    assert "using what was imported before" in result.stderr
    assert len({image.read_bytes() for image in images}) == 1


def test_a_new_commit_is_imported_and_the_old_one_stays(quiet, good, planted, cache, tmp_path):
    repo = quiet.add("me/revised", planted)
    first = repo.refs["main"]
    good(*PROMPT, "-m", "hf://me/revised", "-o", tmp_path / "a.png")
    repo.commit({**planted, "LICENSE": b"another"})
    good(*PROMPT, "-m", "hf://me/revised", "-o", tmp_path / "a.png")
    good(*PROMPT, "-m", f"hf://me/revised@{first}", "-o", tmp_path / "a.png")
    licenses = [(p / "LICENSE").read_bytes() for p in (cache / "me--revised").glob("*-stored-*")]
    assert sorted(licenses) == [b"another", b"do as you like"]


def test_a_changed_byte(quiet, dalle, planted, cache, tmp_path):
    for name in (FILES["prior"], "words.json"):
        repository = f"me/changed-{Path(name).stem}"
        quiet.add(repository, planted)
        quiet.changed.add(name)
        line = bad_line(dalle(*PROMPT, "-m", f"hf://{repository}", "-o", tmp_path / "a.png"))
        assert f"expected {name} of hf://{repository} of digest" in line
        assert "changed bytes" in line
        assert not list((cache / repository.replace("/", "--")).iterdir())
        quiet.changed.clear()
        assert dalle(*PROMPT, "-m", f"hf://{repository}", "-o", tmp_path / "a.png").status == 0


def padded(planted):
    """The same publication with a weights file so large that it arrives in pieces: its license grows."""
    return {**planted, FILES["dvae"]: planted[FILES["dvae"]] + bytes(LARGE)}


def test_a_broken_connection(quiet, dalle, planted, cache, tmp_path):
    """Closed: taken up where it broke. Reset: one line, and what has arrived is kept."""
    quiet.add("me/closed", padded(planted))
    quiet.cut[FILES["dvae"]] = 15 << 20
    assert dalle(*PROMPT, "-m", "hf://me/closed", "-o", tmp_path / "a.png").status == 0
    assert quiet.served[FILES["dvae"]] < LARGE + (6 << 20)
    table = padded(planted)
    table[FILES["dvae"]] += b"\1"
    quiet.add("me/reset", table)
    quiet.cut[FILES["dvae"]], quiet.reset = 15 << 20, True
    assert "no connection" in bad_line(dalle(*PROMPT, "-m", "hf://me/reset", "-o", tmp_path / "a.png"))
    quiet.reset = False
    assert not list((cache / "me--reset").iterdir())
    quiet.log.clear()
    assert dalle(*PROMPT, "-m", "hf://me/reset", "-o", tmp_path / "a.png").status == 0
    assert not [line for line in quiet.log if "words.json" in line]


def test_an_import_that_was_killed(quiet, dalle, planted, environment, cache, tmp_path):
    """It leaves a temporary folder that no command takes for a bundle, and that the next run sweeps."""
    table = padded(planted)
    table[FILES["dvae"]] += b"\2"
    quiet.add("me/killed", table)
    quiet.stall[FILES["dvae"]] = 21 << 20
    code = "import sys; sys.argv[0] = 'dalle'; exec(open(sys.argv.pop(1)).read())"
    program = tmp_path / "planted.py"
    program.write_text(
        "from dalle_cli.importing import known; from planted_publication import IMPORTER\n"
        "known.importers = lambda: iter([IMPORTER])\nfrom dalle_cli.cli import main; main()"
    )
    command = [sys.executable, "-c", code, program, *PROMPT, "-m", "hf://me/killed", "-o", tmp_path / "a.png"]
    process = subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.DEVNULL)
    assert quiet.stalled.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = list((cache / "me--killed").iterdir())
    assert left
    assert all(path.name.startswith(".") for path in left)
    assert dalle(*PROMPT, "-m", "hf://me/killed", "-o", tmp_path / "a.png").status == 0
    found = sorted(p.name.split("-")[0] for p in (cache / "me--killed").iterdir())
    assert found == [*quiet.repos["me/killed"].commits, "refs"]


def test_a_repository_of_something_else(quiet, bad, dalle, tmp_path):
    quiet.add("me/other", {"weights/model.bin": b"abc", "config.json": b'{"model_type": "bert"}'})
    line = bad("import", "hf://me/other", "-o", tmp_path / "out")
    assert "expected the files of a known publication (" in line
    assert "found config.json, weights/model.bin in hf://me/other" in line
    line = bad(*PROMPT, "-m", "hf://me/other", "-o", tmp_path / "a.png")
    assert "found none" in line
    assert list(tmp_path.iterdir()) == []
    quiet.add("me/names", {"../../evil.bin": b"abc", "/etc/evil": b"abc", "a/../b": b"abc", ".hidden/x": b"abc"})
    assert "found no files" in bad("import", "hf://me/names", "-o", tmp_path / "out")
    assert "found none that this login sees" in bad("import", "hf://me/nowhere", "-o", tmp_path / "out")


def test_the_import_command_with_a_revision_and_a_dtype(quiet, dalle, planted, tmp_path):
    repo = quiet.add("me/tagged", planted)
    repo.commit(planted, "v1")
    repo.commit({"README.md": b"gone"})
    out = tmp_path / "out"
    result = dalle("import", "hf://me/tagged@v1", "--dtype", "bfloat16", "-o", out)
    assert result.status == 0, result.stderr
    assert result.stdout == f"{out}\n"
    header = open_artifact(out / "prior.safetensors").headers[0]
    assert header.config["source"]["revision"] == repo.refs["v1"]
    assert {info.dtype for info in header.tensors.values() if len(info.shape) > 1} == {"BF16"}
    assert {info.dtype for info in header.tensors.values() if len(info.shape) == 1} == {"F32"}
    again = tmp_path / "again"
    assert dalle("import", f"hf://me/tagged@{repo.refs['v1']}", "--dtype", "bfloat16", "-o", again).status == 0
    assert {p.name: digest_file(p) for p in out.iterdir()} == {p.name: digest_file(p) for p in again.iterdir()}


def test_the_cache_can_be_elsewhere_and_in_another_dtype(quiet, dalle, planted, tmp_path):
    quiet.add("me/half", planted)
    command = (*PROMPT, "--dtype", "bfloat16", "-m", "hf://me/half", "-o", tmp_path / "a.png")
    where = {"DALLE_CACHE": str(tmp_path / "mine")}
    for dtype, stored in (("", "F32"), ("bfloat16", "BF16")):
        result = dalle(*command, **where, DALLE_IMPORT_DTYPE=dtype)
        assert result.status == 0, result.stderr
        (folder,) = (tmp_path / "mine" / "me--half").glob(f"*-{dtype or 'stored'}-*")
        assert open_artifact(folder / "prior.safetensors").headers[0].tensors["image_head.weight"].dtype == stored
    assert "expected DALLE_IMPORT_DTYPE bfloat16" in bad_line(dalle(*command, **where, DALLE_IMPORT_DTYPE="int3"))


def test_training_and_other_commands_take_it(quiet, good, planted, chain, tmp_path):
    quiet.add("me/used", planted)
    codes = good("sample", "a red circle", "-n", 2, "-m", "hf://me/used", "-o", tmp_path / "codes.safetensors")
    good("decode", codes, "-m", "hf://me/used", "-o", tmp_path / "images.safetensors")
    codes = good("encode-images", chain.data, "-m", "hf://me/used", "-o", tmp_path / "all.safetensors")
    good(
        "train-prior", chain.captions, codes, "--init", "hf://me/used", "--set", "prior.train.steps=2",
        "--set", "prior.train.warmup=0", "-o", tmp_path / "tuned.safetensors",
    )  # fmt: skip
    history = open_artifact(tmp_path / "tuned.safetensors").history
    assert "import" in [entry["stage"] for entry in history]


# The true ones, tiny


def generated(path):
    image = Image.open(path)
    assert len(image.convert("RGB").getcolors(1 << 20)) > 10
    return path.read_bytes()


def test_karlo(quiet, dalle, tmp_path):
    source, clip = karlo_publication.publish(*karlo_publication.components(), tmp_path)
    quiet.add("tiny/karlo", files(source))
    quiet.add("openai/clip-vit-large-patch14", files(clip))
    command = ("generate", "a red bear on the blue grass", "-n", 2, "-m", "hf://tiny/karlo", "--no-terminal")
    result = dalle(*command, "-o", tmp_path / "a.png")
    assert result.status == 0, result.stderr
    assert "Karlo, " in result.stderr
    assert "to fetch" in result.stderr
    assert not [line for line in quiet.log if "text_encoder" in line]
    quiet.status = 503
    result = dalle(*command, "-o", tmp_path / "b.png")
    quiet.status = 0
    assert result.status == 0, result.stderr
    assert generated(tmp_path / "a.png") == generated(tmp_path / "b.png")


def test_dalle_mini(quiet, dalle, tmp_path):
    """In min-dalle's format; the repository of the VQGAN with an encoder has none here, so its decoder is taken."""
    folder = min_dalle_files.publish(tmp_path)
    words = karlo_publication.tokenizer()
    for part in (karlo_publication.clip(len(words)), words):
        part.save_pretrained(tmp_path / "clip")
    quiet.add("tiny/mini", files(folder))
    quiet.add("openai/clip-vit-base-patch32", files(tmp_path / "clip"))
    quiet.add(dalle_mini.VQGAN_REPOSITORY, {"README.md": b"moved"})
    command = ("generate", "red", "-n", 2, "-m", "hf://tiny/mini", "--no-terminal")
    result = dalle(*command, "-o", tmp_path / "a.png")
    assert result.status == 0, result.stderr
    quiet.status = 503
    result = dalle(*command, "-o", tmp_path / "b.png")
    quiet.status = 0
    assert result.status == 0, result.stderr
    assert generated(tmp_path / "a.png") == generated(tmp_path / "b.png")
