"""`dalle doctor`: each planted fault is found by the check of it, and sound small models pass."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import COLORS, run_bad, run_cli, run_ok
from PIL import Image
from planted_embeddings import CLIP, TOKENIZER
from planted_embeddings import pairs as planted_pairs

from dalle_cli.artifacts import open_artifact, write_artifact
from dalle_cli.artifacts.weights import load_tensors, save_tensors
from dalle_cli.doctor import checks as doctor
from dalle_cli.doctor.overfit import SHARE, learning_rate, overfit

TRAIN = """warmup = 5
ema = 0.9
log_every = 1000
validate_every = 1000
checkpoint_every = 1000
validation = 0.25"""
TRANSFORMER = "n_layer = 2\nn_head = 2\nn_embd = 16"
UNET = """width = 16
multipliers = [1, 2]
depth = 1
groups = 4
dropout = 0.0
n_timestep = 100
prediction = "x_start" """


def table(name, fixed, **more):
    """A table of a recipe."""
    return "\n".join([f"[{name}]", fixed, *(f"{key} = {json.dumps(value)}" for key, value in more.items()), ""])


RECIPE = "\n".join([
    table("prior", TRANSFORMER, conv_kernel=3),
    table("prior.train", TRAIN, steps=80, batch_size=32, lr=1e-2, bpe_dropout=0.0, caption_dropout=0.1),
    table("embedding_prior.diffusion", TRANSFORMER, n_timestep=50),
    table("embedding_prior.diffusion.train", TRAIN, steps=160, batch_size=32, lr=8e-3),
    table("embedding_prior.autoregressive", TRANSFORMER, n_component=8, n_bucket=16, n_dot=8),
    table("embedding_prior.autoregressive.train", TRAIN, steps=150, batch_size=64, lr=1e-2),
    table("decoder", UNET, image_size=8, attention=[4], head_width=8, context_width=16, text_layers=1, text_heads=2),
    table("decoder.train", TRAIN, steps=100, batch_size=16, lr=8e-3, grid_images=0, caption_dropout=0.2),
    table("upsampler_1", UNET, image_size=16, low_size=8),
    table("upsampler_1.train", TRAIN, steps=40, batch_size=8, lr=6e-3, crop=1, corruption="none", grid_images=0),
])  # fmt: skip
OPTIONS = ("--workers", 0, "--device", "cpu")


def rows_of(*arguments, **more):
    """The findings in JSON: question -> (verdict, value)."""
    report = json.loads(run_ok("doctor", *arguments, *OPTIONS, "--json", **more))
    assert report["verdict"] == max((row["verdict"] for row in report["findings"]), key=doctor.VERDICTS.index)
    return {row["question"]: (row["verdict"], row["value"]) for row in report["findings"]}


def one(rows, words):
    """The only row whose question holds these words."""
    (found,) = [row for question, row in rows.items() if words in question]
    return found


def sane(rows):
    """Nothing but ok, and all with a number."""
    assert {question: row for question, row in rows.items() if row[0] != "ok"} == {}
    assert all(math.isfinite(value) for _, value in rows.values())


def changed(weights, out, edit):
    """A copy of weights after an edit of its tensors."""
    found = open_artifact(weights)
    tensors = load_tensors(found)
    edit(tensors)
    return save_tensors(out, found.kind, tensors, found.config, found.history)


def zeroed(*starts):
    """An edit: what begins so is 0."""

    def edit(tensors):
        names = [name for name in tensors if name.startswith(starts)]
        assert len({name for name in starts if any(n.startswith(name) for n in names)}) == len(starts)
        for name in names:
            tensors[name] = torch.zeros_like(tensors[name])

    return edit


def scaled(factor, *names):
    """An edit: these tensors times a factor."""

    def edit(tensors):
        for name in names:
            tensors[name] *= factor

    return edit


def blind_upsampler(tensors):
    tensors["unet.conv_in.weight"][:, 3:] = 0


def deaf_clip(tensors):
    zeroed("text_model.embeddings.token_embedding")(tensors)
    tensors["logit_scale"].fill_(math.log(100))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def trained(root, out, stage, *arguments):
    """Weights that a stage trains by the recipe."""
    run_ok(stage, *arguments, "--config", root / "recipe.toml", "--dtype", "float32", "-o", out)
    return out


CUT = zeroed("captions.")
NOTHING = pytest.approx(0, abs=1e-6)
UNREAD = {
    "loss with others' captions": "bad", "more than to that of another caption": "not ok", "length of z_i": "ok",
    "captions dropped": "ok",
}  # fmt: skip
FAULTS = {  # weights, their inputs, an edit, and what is found: words of the question -> verdict, or verdict and value
    # the null of the autoregressive prior has a dot product of its own
    "diffusion prior ignores captions": ("diffusion", "planted", CUT, {
        **UNREAD, "loss with null captions": ("bad", NOTHING), "distance of samples": "bad", "scale of z_i": "ok",
    }),
    "autoregressive prior ignores captions": ("autoregressive", "planted", CUT, UNREAD),
    "scale does not fit": ("diffusion", "planted", scaled(10, "principal.scale"), {
        "scale of z_i": ("bad", pytest.approx(10, rel=0.15)),
    }),
    "buckets are narrow": ("autoregressive", "planted", scaled(0.1, "low", "high"), {"beyond the buckets": "bad"}),
    "prior does not see what is noised": ("diffusion", "planted", zeroed("image_in."), {
        "another noised z_i": ("bad", 0), "loss with others' captions": "ok",
    }),
    "decoder ignores z_i": ("decoder", "painted", zeroed("embedding_time.", "embedding_tokens."), {
        "output with another's z_i": "bad", "output with the null z_i": "bad", "loss with others' z_i": "bad",
        "output with another's caption": "ok",
    }),
    "decoder ignores captions": ("decoder", "painted", zeroed("text.norm."), {
        "another's caption": "bad", "the null caption": "bad", "output with another's z_i": "ok",
    }),
    "nothing guides the decoder": (
        "decoder", "painted", zeroed("text.norm.", "embedding_time.", "embedding_tokens."), {"gray levels": ("bad", 0)}
    ),
    "upsampler is blind": ("upsampler", "images", blind_upsampler, {
        "another's low-resolution image": "bad", "others' low-resolution images": "bad",
    }),
    "dVAE encodes nothing": ("dvae", "chain_data", zeroed("encoder."), {
        "codes in use": ("bad", 1), "perplexity": ("bad", pytest.approx(1)), "PSNR": "bad",
    }),
    "CLIP reads nothing": ("clip", "chain_data", deaf_clip, {
        "own caption nearest": "bad", "inverse temperature": ("warning", pytest.approx(100)),
    }),
    "prior ignores captions": ("prior", "coded", zeroed("token.", "pad."), {
        "others' captions": ("bad", NOTHING), "null captions": ("bad", NOTHING),
    }),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(request, tmp_path, chain, fault):
    weights, inputs, edit, expected = FAULTS[fault]
    shutil.copy(chain.tokenizer, tmp_path)  # which a CLIP has beside it
    cut = changed(request.getfixturevalue(weights), tmp_path / "cut.safetensors", edit)
    rows = rows_of(cut, *request.getfixturevalue(inputs), "--no-overfit")
    for words, wanted in expected.items():
        verdict, value = one(rows, words)
        if wanted == "not ok":
            assert verdict != "ok", words
        else:
            assert (verdict, value) == wanted if isinstance(wanted, tuple) else verdict == wanted, words


# Priors over embeddings


@pytest.fixture(scope="module")
def planted(root):
    """Captions and embeddings, of which z_i follows z_t."""
    folder = root / "planted"
    folder.mkdir()
    planted_pairs(folder)
    return folder / "captions.safetensors", folder / "embeddings.safetensors"


@pytest.fixture(scope="module")
def diffusion(root, planted):
    return trained(root, root / "diffusion.safetensors", "train-prior", *planted)


@pytest.fixture(scope="module")
def autoregressive(root, planted):
    choice = ("--set", "embedding_prior.kind=autoregressive")
    return trained(root, root / "autoregressive.safetensors", "train-prior", *planted, *choice)


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_a_sane_prior_over_embeddings_passes(request, planted, kind):
    rows = rows_of(request.getfixturevalue(kind), *planted)
    sane(rows)
    assert len(rows) == (16 if kind == "diffusion" else 11)
    assert one(rows, "captions dropped")[1] == 0.1
    assert one(rows, "length of z_i")[1] == pytest.approx(1, abs=1e-4)
    if kind == "diffusion":
        bins = [value for question, (_, value) in rows.items() if "timesteps" in question]
        assert bins[0] < bins[-1]
        assert one(rows, "scale of z_i")[1] == pytest.approx(1, abs=0.15)


def test_embeddings_that_are_ten_times_as_long(diffusion, planted, tmp_path):
    found = open_artifact(planted[1])
    columns = {"embeddings": 10 * np.asarray(found.array("embeddings")[:]), "ids": list(found.strings("ids"))}
    write_artifact(tmp_path / "long.safetensors", "embeddings", columns, found.config, [])
    rows = rows_of(diffusion, planted[0], tmp_path / "long.safetensors", "--no-overfit")
    assert one(rows, "length of z_i") == ("bad", pytest.approx(10, rel=1e-3))
    assert one(rows, "not those of training") == ("warning", 1)


def test_captions_that_were_never_dropped(root, planted, tmp_path):
    sets = ("--set", "embedding_prior.diffusion.train.caption_dropout=0.0")
    sets += ("--set", "embedding_prior.diffusion.train.steps=2")
    rows = rows_of(
        trained(root, tmp_path / "prior.safetensors", "train-prior", *planted, *sets), *planted, "--no-overfit"
    )
    assert one(rows, "captions dropped") == ("warning", 0)
    assert one(rows, "more than to that of another caption")[0] != "ok"  # nor is it trained
    assert "bad" in {verdict for verdict, _ in rows.values()}


# Decoders and upsamplers


@pytest.fixture(scope="module")
def painted(root):
    """Images of a color, which z_i tells, in their left or right half, which the caption tells."""
    folder, rng = root / "pictures", np.random.default_rng(0)
    folder.mkdir()
    ids, z, tokens = [], [], []
    for i in range(64):
        color, side = i % 4, i // 4 % 2
        pixels = np.zeros((16, 16, 3), np.uint8)
        pixels[:, 8 * side : 8 * side + 8] = list(COLORS.values())[color]
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        ids.append(f"{i:02d}")
        z.append(np.eye(8)[color] + 0.02 * rng.normal(size=8))
        tokens.append([side + 1, 0])
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    write_artifact(root / "z.safetensors", "embeddings", {"embeddings": z, "ids": ids}, {"encoder": CLIP}, [])
    header = {"n_vocab": 4, "n_text": 2, "tokenizer": TOKENIZER}
    columns = {"tokens": np.array(tokens, np.uint16), "lengths": np.ones(64, np.uint16)}
    text = [("left", "right")[row[0] - 1] for row in tokens]
    write_artifact(root / "text.safetensors", "captions", {**columns, "ids": ids, "text": text}, header, [])
    return folder, root / "z.safetensors", "--captions", root / "text.safetensors"


@pytest.fixture(scope="module")
def decoder(root, painted):
    return trained(root, root / "decoder.safetensors", "train-decoder", *painted)


def test_a_sane_decoder_passes(decoder, painted):
    rows = rows_of(decoder, *painted)
    sane(rows)
    assert len(rows) == 16
    assert one(rows, "scale of z_i") == ("ok", pytest.approx(1))
    assert [question for question in rows if "timesteps" in question] == [
        f"loss at timesteps {first} to {first + 24}" for first in (0, 25, 50, 75)
    ]


def test_a_decoder_of_embeddings_that_are_not_scaled(root, painted, tmp_path):
    sets = ("--set", "decoder.unit_variance=false", "--set", "decoder.train.steps=2")
    out = trained(root, tmp_path / "decoder.safetensors", "train-decoder", *painted, *sets)
    rows = rows_of(out, *painted, "--no-overfit")
    assert one(rows, "scale of z_i") == ("bad", pytest.approx(8**-0.5, rel=0.01))
    assert one(rows, "least of them")[0] != "ok"  # it has learned nothing yet


def test_a_decoder_without_captions(root, painted, tmp_path):
    steps = ("--set", "decoder.train.steps=2")
    out = trained(root, tmp_path / "decoder.safetensors", "train-decoder", *painted[:2], *steps)
    (painted[0] / "00.png").rename(tmp_path / "00.png")
    (painted[0] / "00.png").write_bytes(b"no image")
    try:
        rows = rows_of(out, *painted[:2], "--no-overfit", "--limit", 5)
    finally:
        (tmp_path / "00.png").replace(painted[0] / "00.png")
    assert not [question for question in rows if "caption" in question]
    assert len(rows) == 12


@pytest.fixture(scope="module")
def images(painted):
    return painted[:1]


@pytest.fixture(scope="module")
def upsampler(root, images):
    return trained(root, root / "upsampler.safetensors", "train-decoder", *images, "--upsampler", 1)


# dVAE, its prior, CLIP: those of the tiny chain, trained for longer


@pytest.fixture(scope="module")
def chain_data(chain):
    return (chain.data,)


def longer(chain, folder, name, stage, *arguments):
    """A stage of the chain with 80 steps at a higher rate."""
    sets = [f"{name}.train.{setting}" for setting in ("steps=80", "lr=6e-3", "validate_every=500")]
    sets += ["clip.train.weight_decay=0.0"] * (name == "clip")
    shutil.copy(chain.tokenizer, folder)
    config = ("--config", chain.recipe, "--dtype", "float32", *(word for one in sets for word in ("--set", one)))
    run_ok(stage, chain.data, *arguments, *config, "-o", folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


@pytest.fixture(scope="module")
def dvae(chain, tmp_path_factory):
    return longer(chain, tmp_path_factory.mktemp("dvae"), "dvae", "train-dvae")


@pytest.fixture(scope="module")
def clip(chain, tmp_path_factory):
    return longer(chain, tmp_path_factory.mktemp("clip"), "clip", "train-clip", "-t", chain.tokenizer)


@pytest.mark.parametrize(
    ("weights", "inputs"), [("upsampler", "images"), ("dvae", "chain_data"), ("clip", "chain_data")]
)
def test_sound_weights_pass(request, weights, inputs):
    sane(rows_of(request.getfixturevalue(weights), *request.getfixturevalue(inputs)))


@pytest.fixture(scope="module")
def coded(root):
    """Captions of a word, and grids of codes about that word's own code."""
    rng, n = np.random.default_rng(0), 200
    words = rng.integers(0, 6, n)
    codes = np.where(rng.random((n, 4, 4)) < 0.7, words[:, None, None], rng.integers(0, 6, (n, 4, 4)))
    ids, folder = [f"{i:03d}" for i in range(n)], root / "coded"
    folder.mkdir()
    tokens = np.stack([words, np.zeros_like(words)], axis=1).astype(np.uint16)
    columns = {"tokens": tokens, "lengths": np.ones(n, np.uint16), "ids": ids, "text": [str(word) for word in words]}
    header = {"n_vocab": 6, "n_text": 2, "tokenizer": TOKENIZER}
    write_artifact(folder / "captions.safetensors", "captions", columns, header, [])
    header = {"n_vocab": 6, "grid": 4, "encoder": CLIP}
    columns = {"codes": codes.astype(np.uint16), "ids": ids}
    write_artifact(folder / "codes.safetensors", "codes", columns, header, [])
    return folder / "captions.safetensors", folder / "codes.safetensors"


@pytest.fixture(scope="module")
def prior(root, coded):
    return trained(root, root / "prior.safetensors", "train-prior", *coded)


def test_a_prior_over_codes(prior, coded):
    rows = rows_of(prior, *coded)
    text = one(rows, "nats per caption token")  # drawn evenly: there is nothing in it to learn
    sane({question: row for question, row in rows.items() if row != text})


# Eight rows, overfitted


def steps_of(model, loss):
    return lambda number: (loss(model), loss(model).detach())


def test_what_cannot_be_overfitted():
    """A model that learns passes; one whose loss hangs on nothing, or that is too small for it, does not."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    counted = []

    def loss(model):
        return (model(x) - y).square().mean()

    wide = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2))
    found = overfit(wide, steps_of(wide, loss), 64, lambda: counted.append(1), 400)
    assert found.verdict == "ok"
    assert found.value <= SHARE
    assert 0 < len(counted) < 400
    cut = torch.nn.Linear(4, 2)
    with torch.no_grad():
        start = loss(cut).item()
    found = overfit(cut, lambda number: (loss(cut).detach(), loss(cut).detach()), 64, lambda: None, 5)
    assert (found.verdict, found.value) == ("bad", 1)
    assert loss(cut).item() == start
    small = torch.nn.Linear(4, 2, bias=False)
    assert overfit(small, steps_of(small, loss), 64, lambda: None, 50).verdict == "bad"
    broken = torch.nn.Linear(4, 2)
    found = overfit(broken, lambda number: (loss(broken) * math.nan,) * 2, 64, lambda: None, 50)
    assert found.verdict == "bad"
    assert learning_rate(3968) < learning_rate(512) < learning_rate(16)


def test_weights_are_not_touched(diffusion, planted):
    before = diffusion.read_bytes()
    rows_of(diffusion, *planted)
    assert diffusion.read_bytes() == before


# What is said


@pytest.mark.parametrize(
    ("value", "verdict"), [(5.0, "ok"), (2.0, "warning"), (1.0, "bad"), (math.nan, "bad"), (-math.inf, "bad")]
)
def test_verdicts(value, verdict):
    assert doctor.at_least("a", value, 3, 1.5, "b").verdict == verdict
    assert doctor.at_most("a", -value, -3, -1.5, "b").verdict == verdict


def test_a_gain_must_be_sure():
    sure, lucky, none = (torch.tensor(row) for row in ([1.0, 1.1, 0.9, 1.0], [3.0, -1.2, 3.2, -1.0], [0.0] * 4))
    assert doctor.gain("a", sure, "").verdict == "ok"
    assert doctor.gain("a", lucky, "").verdict == "bad"
    assert doctor.gain("a", lucky + 1.2, "").verdict == "warning"
    assert doctor.gain("a", none, "").verdict == doctor.gain("a", -sure, "").verdict == "bad"


def test_a_line_says_number_expectation_and_what_to_do(diffusion, planted, tmp_path):
    cut = changed(diffusion, tmp_path / "cut.safetensors", CUT)
    result = run_cli("doctor", cut, *planted, *OPTIONS, "--no-overfit")
    assert result.status == 0
    *lines, summary = result.stdout.splitlines()
    assert summary.endswith(f"{sum(line.startswith('bad') for line in lines)} bad")
    for line in lines:
        assert line.split()[0] in doctor.VERDICTS
        assert "  expected " in line
        assert (";" in line) == (not line.startswith("ok")), line
    (loss,) = [line for line in lines if "others' captions" in line]
    assert "expected above" in loss
    assert "captions are not read" in loss
    assert "cut.safetensors" in result.stderr
    again = run_cli("doctor", cut, *planted, *OPTIONS, "--no-overfit")
    assert again.stdout == result.stdout


def test_a_run_is_weights_their_folder_or_a_bundle(diffusion, planted, tmp_path):
    of_file = rows_of(diffusion, *planted, "--no-overfit")
    assert rows_of(diffusion.with_suffix(".run"), *planted, "--no-overfit") == of_file
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    shutil.copy(diffusion, bundle)
    assert rows_of(bundle, *planted, "--no-overfit") == of_file
    shutil.copy(diffusion, bundle / "second.safetensors")
    assert "second.safetensors" in run_bad("doctor", bundle, *planted)
    (tmp_path / "unfinished.run").mkdir()
    assert "let the training end" in run_bad("doctor", tmp_path / "unfinished.run", *planted)


def test_what_cannot_be_looked_at(diffusion, decoder, planted, painted, tmp_path):
    assert "CAPTIONS EMBEDDINGS" in run_bad("doctor", diffusion, planted[0])
    assert "--captions" in run_bad("doctor", decoder, *painted[:2])
    assert "these alone" in run_bad("doctor", diffusion, *planted, "--captions", planted[0])
    assert "weights.dvae" in run_bad("doctor", planted[0], *planted)
    assert "no such file" in run_bad("doctor", tmp_path / "none.safetensors", *planted)
    found = open_artifact(planted[1])
    columns = {"embeddings": np.asarray(found.array("embeddings")[:]), "ids": list(found.strings("ids"))}
    write_artifact(tmp_path / "other.safetensors", "embeddings", columns, {"encoder": "e" * 64}, [])
    assert "image encoder" in run_bad("doctor", diffusion, planted[0], tmp_path / "other.safetensors")
    assert "2 rows" in run_bad("doctor", diffusion, *planted, "--limit", 1)
