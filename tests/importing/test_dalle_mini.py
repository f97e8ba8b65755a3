"""DALL-E mini and mega: min-dalle's own modules against ours, both formats, the published sizes, and the command."""

import json
import re
import shutil
from pathlib import Path

import karlo_publication
import min_dalle_files
import msgpack
import numpy as np
import pytest
import torch
from conftest import run_cli, run_ok
from min_dalle_files import GUIDANCE, PROMPTS, SIZES, STEPS
from PIL import Image
from safetensors.torch import load_file
from tensor_lists import applied, check_covers, n_parameters, published_shapes

from dalle_cli.artifacts import open_artifact
from dalle_cli.errors import DalleError
from dalle_cli.importing import bundle, dalle_mini, vqgan
from dalle_cli.importing.source import open_source
from dalle_cli.models.bart import EncoderDecoderConfig, EncoderDecoderPrior
from dalle_cli.models.vqgan import VQGAN, VQGANConfig
from dalle_cli.pipelines.scoring import BY
from dalle_cli.sampling.autoregressive import sample_codes
from dalle_cli.sampling.categorical import CategoricalOptions

MEGA = {"n_layer": 24, "n_head": 32, "n_embd": 2048, "n_hid": 4096, "n_text_vocab": 50272}
GREEDY = CategoricalOptions(top_k=1, guidance_scale=GUIDANCE)


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    """A folder as of kuprel/min-dalle with small models, and `expected.pt`."""
    return min_dalle_files.publish(tmp_path_factory.mktemp("min-dalle"))


def planned(folder: Path, tmp_path: Path):
    source = open_source(str(folder), tmp_path / "scratch")
    assert dalle_mini.IMPORTER.recognize(source)
    source.fetch(dalle_mini.IMPORTER.files(source))
    return source, dalle_mini.IMPORTER.plan(source)


def read_prior(folder: Path, tmp_path: Path) -> EncoderDecoderPrior:
    """The prior of a publication, in float32."""
    source, publication = planned(folder, tmp_path)
    part = publication.parts[1]
    names = bundle._source_names(source, part)
    tensors = {name: file.read(own).float() for name, (file, own) in names.items()}
    model = EncoderDecoderPrior(part.sizes)
    model.load_state_dict(applied(part.tensors({name: tuple(t.shape) for name, t in tensors.items()}), tensors))
    return model.eval()


def captions(prompts=PROMPTS) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.ones(len(prompts), SIZES["n_text"], dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    return tokens, lengths


def guided(prior: EncoderDecoderPrior, tokens, lengths, codes) -> torch.Tensor:
    """Guided logits, teacher-forced: (B, W*W, V)."""
    with torch.no_grad():
        own, null = (prior(tokens, n, codes)[1] for n in (lengths, torch.zeros_like(lengths)))
    return null + GUIDANCE * (own - null)


# ---- against min-dalle's own modules


def test_matches_min_dalle(published, tmp_path):
    prior, expected = read_prior(published, tmp_path), torch.load(published / "expected.pt")
    tokens, lengths = captions()
    for row, (codes, logits, states) in enumerate(expected):
        one = tokens[row : row + 1], lengths[row : row + 1]
        null, visible = prior.encode(one[0], torch.zeros(1, dtype=torch.long))
        own, shown = prior.encode(*one)
        assert int(visible.sum()) == 2
        torch.testing.assert_close(null[visible], states[0][visible[0]], rtol=0, atol=1e-5)
        torch.testing.assert_close(own[shown], states[1][shown[0]], rtol=0, atol=1e-5)
        grid = torch.zeros(1, 256, dtype=torch.long)
        grid[0, :STEPS] = codes
        made = guided(prior, *one, grid.view(1, 16, 16))[0, :STEPS]
        torch.testing.assert_close(made, logits, rtol=0, atol=1e-4)
        assert len(codes.unique()) > 4


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_samples_min_dalles_codes(published, tmp_path, batch_size):
    """The greedy sequence through the caches, each caption with its own candidate."""
    prior, expected = read_prior(published, tmp_path), torch.load(published / "expected.pt")
    codes = sample_codes(prior, *captions(), [0, 1, 2], 0, GREEDY, batch_size=batch_size)
    assert torch.equal(codes.flatten(1)[:, :STEPS], torch.stack([codes for codes, _, _ in expected]))


def test_every_norm_and_mask_counts(published, tmp_path):
    """Each piece that a port may forget changes the result: the comparisons above would notice."""
    prior, (tokens, lengths) = read_prior(published, tmp_path), captions()
    codes = torch.arange(256).view(1, 16, 16).expand(3, -1, -1) % SIZES["n_codes"]
    before = guided(prior, tokens, lengths, codes)
    with torch.no_grad():
        for name, parameter in prior.named_parameters():
            kept = parameter.clone()
            parameter.copy_(torch.ones_like(kept) if name.endswith("norm.weight") else torch.zeros_like(kept))
            assert (guided(prior, tokens, lengths, codes) - before).abs().max() > 1e-3, name
            parameter.copy_(kept)
    assert torch.equal(guided(prior, tokens, lengths, codes), before)
    other = tokens.clone()
    other[1, 3:] = 17  # behind a caption's end nothing is read
    assert torch.equal(guided(prior, other, lengths, codes), before)
    assert not torch.allclose(guided(prior, other, lengths + 1, codes), before, atol=1e-3)


# ---- the formats


def flax_tree(tensors: dict[str, torch.Tensor], side: str, n_layer: int) -> dict:
    """A side of min-dalle's model as dalle-mini's flax files have it: stacked layers, transposed matrices."""
    modules = {theirs: ours for ours, theirs in dalle_mini.FLAX_MODULES.items()}
    assert len(modules) < len(dalle_mini.FLAX_MODULES)  # both layer norms and those of the MLP are numbered from 0
    tree: dict = {}
    for name, tensor in tensors.items():
        if name == "lm_head.weight":
            continue
        path, leaf = name.split(".")[:-1], name.split(".")[-1]
        if path[0] == "layers":
            if path[1] != "0":
                continue
            tensor = torch.stack([tensors[name.replace("layers.0.", f"layers.{i}.")] for i in range(n_layer)])
            path = ["layers", f"FlaxBart{side.title()}Layers", *path[2:]]
        matrix = path[-1].endswith("_proj") or path[-1].startswith("fc")
        kind = leaf if leaf == "bias" else "kernel" if matrix else "embedding" if "embed_" in path[-1] else "scale"
        at = tree
        for part in path:
            at = at.setdefault(dalle_mini.FLAX_MODULES.get(part, part), {})
        at[kind] = (tensor.mT if matrix else tensor).contiguous().numpy()
    return tree


def packed(value) -> bytes:
    """An array as flax packs it; one of the stacks in chunks, as flax does with large ones."""
    data = msgpack.packb((value.shape, value.dtype.name, value.tobytes()), use_bin_type=True)
    return msgpack.ExtType(1, data)


def write_flax(tree: dict, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(msgpack.packb(tree, default=packed, use_bin_type=True))


def flax_vqgan_tree(state: dict[str, torch.Tensor]) -> dict:
    """taming's tensors as vqgan-jax has them."""
    tree: dict = {}
    for name, tensor in state.items():
        stem, leaf = name.rsplit(".", 1)
        parts: list[str] = []
        for part in stem.split("."):
            if part.isdigit():
                parts[-1] += f"_{part}"
            else:
                parts.append(part)
        norm, table = "norm" in parts[-1], parts[-1] == "embedding"
        kind = leaf if leaf == "bias" else "scale" if norm else "embedding" if table else "kernel"
        at = tree
        for part in parts:
            at = at.setdefault(part, {})
        at[kind] = np.ascontiguousarray((tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor).numpy())
    return tree


@pytest.fixture(scope="session")
def flax(published, tmp_path_factory) -> Path:
    """The same models in dalle-mini's format, with a VQGAN both ways."""
    folder = tmp_path_factory.mktemp("dalle-mini")
    files = {side: torch.load(published / f"{side}_mini.pt") for side in ("encoder", "decoder")}
    tree = {"model": {side: flax_tree(tensors, side, SIZES["layers"]) for side, tensors in files.items()}}
    tree["lm_head"] = {"kernel": files["decoder"]["lm_head.weight"].mT.contiguous().numpy()}
    write_flax(tree, folder / "flax_model.msgpack")
    config = {"image_vocab_size": SIZES["n_codes"], "decoder_attention_heads": SIZES["heads"], "sinkhorn_iters": 1}
    (folder / "config.json").write_text(json.dumps(config))
    merges = [["Ġ", "r"], ["Ġr", "e"], ["Ġre", "d"]]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": min_dalle_files.words(), "merges": merges}}))
    torch.manual_seed(2)
    codec = VQGAN(min_dalle_files.vqgan_sizes())
    detoker = torch.load(published / "detoker.pt")
    own = {
        name: detoker.get(name, detoker.get(name.removeprefix("quantize."), t))
        for name, t in codec.state_dict().items()
    }
    write_flax(flax_vqgan_tree(own), folder / "vqgan_imagenet_f16_16384" / "flax_model.msgpack")
    return folder


def test_flax_files_are_the_same_model(published, flax, tmp_path):
    theirs, ours = (read_prior(folder, tmp_path).state_dict() for folder in (published, flax))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def imported(folder: Path, out: Path, tmp_path: Path) -> Path:
    """A bundle without a CLIP."""

    class Silent:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            return lambda *_: None

        def __exit__(self, *_): ...

    return bundle.write([planned(folder, tmp_path)], out, None, Silent) or out


def test_bundles_of_both_formats(published, flax, tmp_path):
    made = [imported(folder, tmp_path / folder.name, tmp_path) for folder in (published, flax)]
    priors = [open_artifact(folder / "prior.safetensors") for folder in made]
    configs = [artifact.config for artifact in priors]
    assert configs[0]["model"] == configs[1]["model"]
    assert configs[0]["sampling"] == {"guidance": 10.0, "temperature": 1.0}
    assert configs[0]["model"]["null"] == [0, 2]
    a, b = (load_file(str(artifact.path)) for artifact in priors)
    assert all(torch.equal(a[name], b[name]) for name in a)
    alone, both = (load_file(str(folder / "dvae.safetensors")) for folder in made)
    assert alone.keys() < both.keys()
    assert all(torch.equal(alone[name], both[name]) for name in alone)
    assert [open_artifact(folder / "dvae.safetensors").config["model"]["encoder"] for folder in made] == [False, True]
    assert (made[0] / "tokenizer.json").read_bytes() == (made[1] / "tokenizer.json").read_bytes()


# ---- the published sizes


def on_meta(config: EncoderDecoderConfig) -> EncoderDecoderPrior:
    with torch.device("meta"):
        return EncoderDecoderPrior(config)


@pytest.mark.parametrize(
    ("size", "sizes", "parameters"),
    [("mini", {}, 202_591_224 + 235_242_488), ("mega", MEGA, 1_110_022_144 + 1_477_498_880)],
)
def test_published_priors_fit(size, sizes, parameters):
    files = [published_shapes(f"min_dalle_{size}_{side}") for side in ("encoder", "decoder")]
    shapes = {
        f"{side}.pt:{name}": shape
        for side, file in zip(("encoder", "decoder"), files, strict=True)
        for name, shape in file.items()
    }
    flax = published_shapes(f"dalle_{size}_flax")
    for names in (shapes, flax):
        config = dalle_mini.prior_config(names, 16384)
        assert config == EncoderDecoderConfig(**sizes)
        check_covers(on_meta(config), dalle_mini.prior_tensors(names, config), names)
        assert n_parameters(names) == parameters
    ours = sum(p.numel() for p in on_meta(config).parameters())
    unused = files[1]["embed_tokens.weight"][0] - 16384  # rows of codes that are never sampled; one is the start
    assert parameters - ours == (2 * unused - 1) * config.n_embd


def test_a_flax_vqgan_has_the_published_sizes():
    """No list of its tensors is published: that of the same model in PyTorch, in flax's names."""
    shapes = published_shapes("mindalle_stage1")
    with torch.device("meta"):
        model = VQGAN(VQGANConfig())
        tree = {}
        for name, shape in shapes.items():
            stem, leaf = name.rsplit(".", 1)
            parts = stem.split(".")
            for i in reversed(range(1, len(parts))):
                if parts[i].isdigit():
                    parts[i - 1 : i + 1] = [f"{parts[i - 1]}_{parts[i]}"]
            kind = "embedding" if parts[-1] == "embedding" else "scale" if "norm" in parts[-1] else "kernel"
            own = ".".join([*parts, "bias" if leaf == "bias" else kind])
            tree[own] = (*shape[2:], shape[1], shape[0]) if len(shape) == 4 else shape
    assert vqgan.vqgan_config(vqgan.flax_shapes(tree)) == VQGANConfig()
    check_covers(model, vqgan.flax_tensors(tree), tree)
    assert "encoder.down_4.attn_1.q.kernel" in tree


# ---- the command, and what our commands make of the bundle


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """A folder with a small CLIP as transformers writes it."""
    folder, words = tmp_path_factory.mktemp("clip"), karlo_publication.tokenizer()
    karlo_publication.clip(len(words)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(flax, clip, tmp_path_factory) -> Path:
    """The imported bundle."""
    out = tmp_path_factory.mktemp("bundles") / "mini"
    run_ok("import", flax, "--clip", clip, "-o", out)
    return out


def test_generates_from_the_bundle(model, tmp_path):
    image = tmp_path / "red.png"
    run_ok("generate", "red", "-n", 2, "--keep", 1, "-m", model, "-o", image, "--no-terminal")
    with Image.open(image) as shown:
        assert shown.size[0] >= 256


def test_codes_do_not_depend_on_the_batch_size(model, tmp_path):
    made = []
    for batch_size in (1, 3):
        out = tmp_path / f"{batch_size}.safetensors"
        run_ok("sample", "red", "-n", 3, "-m", model, "-o", out, "--batch-size", batch_size, "--dtype", "float32")
        made.append(load_file(str(out))["codes"])
    assert torch.equal(*made)
    assert len(made[0].unique()) > 10
    assert open_artifact(out).history[-1]["options"]["guidance"] == 10.0  # of the header


def test_encodes_scores_and_inpaints(model, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).resize((256, 256)).save(images / "a.png")
    (images / "a.txt").write_text("red")
    codes, out = tmp_path / "codes.safetensors", tmp_path / "again.safetensors"
    run_ok("encode-images", images, "-m", model, "-o", codes)
    scores = [json.loads(run_ok("score", images, "-m", model, "--by", by, "--json", "--force")) for by in BY]
    assert scores[0]["mean"] < 0
    assert scores[0]["mean"] != scores[1]["mean"] != 0
    run_ok("sample", "red", "-m", model, "--image", images / "a.png", "--keep-rows", 8, "-o", out)
    known, made = load_file(str(codes))["codes"], load_file(str(out))["codes"]
    assert torch.equal(known[0, :8], made[0, :8])
    assert not torch.equal(known[0, 8:], made[0, 8:])


def test_training_is_refused(model, tmp_path):
    """In one line, before anything is read."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (256, 256)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("red")
    run_ok(
        "tokenize",
        tmp_path / "images",
        "-t",
        model / "tokenizer.json",
        "--set",
        "tokenizer.length=8",
        "-o",
        tmp_path / "captions.safetensors",
    )
    run_ok("encode-images", tmp_path / "images", "-m", model, "-o", tmp_path / "codes.safetensors")
    tail = ("-o", tmp_path / "new.safetensors", "--init")
    prior = ("train-prior", tmp_path / "captions.safetensors", tmp_path / "codes.safetensors", *tail)
    for command, kind in ((prior, "prior"), (("train-dvae", tmp_path / "images", *tail), "dvae")):
        result = run_cli(*command, model / f"{kind}.safetensors")
        assert result.status == 1
        (line,) = result.stderr.strip().splitlines()
        assert "can be sampled here, not trained" in line
    assert not (tmp_path / "new.safetensors").exists()


# ---- files that are not what they should be


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("encoder_mini.pt", lambda t: t.pop("layers.1.glu.fc0.weight"), "layers.1.glu.fc0.weight"),
        ("decoder_mini.pt", lambda t: t.update(more=torch.zeros(2)), "found 'decoder_mini.pt:more'"),
        ("decoder_mini.pt", lambda t: t.update({"final_ln.bias": torch.zeros(3)}), r"\[32\] for norm.bias"),
        ("decoder_mini.pt", lambda t: t.update({"embed_tokens.weight": torch.zeros(50, 32)}), "a start code behind"),
        ("detoker.pt", lambda t: t.pop("post_quant_conv.bias"), "post_quant_conv.bias"),
        ("detoker.pt", None, "DALL-E mini's VQGAN"),
        ("vocab_mini.json", None, "vocab_mini.json and merges_mini.txt"),
    ],
)  # fmt: skip
def test_other_files_are_refused(published, clip, tmp_path, file, change, message):
    folder = tmp_path / "files"
    shutil.copytree(published, folder)
    if change is None:
        (folder / file).unlink()
    else:
        tensors = torch.load(folder / file)
        change(tensors)
        torch.save(tensors, folder / file)
    result = run_cli("import", folder, "--clip", clip, "-o", tmp_path / "out")
    assert result.status == 1
    (line,) = result.stderr.strip().splitlines()
    assert re.search(message, line), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files"]


def test_another_architecture_is_refused(flax, tmp_path):
    folder = tmp_path / "files"
    shutil.copytree(flax, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sinkhorn_iters": 3}))
    with pytest.raises(DalleError, match="expected sinkhorn_iters 1 in DALL-E mini's JSON, found 3"):
        planned(folder, tmp_path)


def test_a_decoder_alone_does_not_encode(published, clip, tmp_path):
    run_ok("import", published, "--clip", clip, "-o", tmp_path / "mini")
    Image.new("RGB", (256, 256)).save(tmp_path / "a.png")
    result = run_cli(
        "sample", "red", "-m", tmp_path / "mini", "--image", tmp_path / "a.png", "-o", tmp_path / "b.safetensors"
    )
    assert result.status == 1
    assert "expected a VQGAN with an encoder, found a decoder alone" in result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 3}, "n_embd a multiple of n_head"),
        ({"n_layer": 0}, "n_layer of at least 1"),
        ({"null": ()}, "tokens of the null caption"),
        ({"null": (0, 99_999)}, "tokens of the null caption"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(DalleError, match=message):
        EncoderDecoderConfig(**changes)
