"""CLIP in its publishers' layouts: the same tensors at full size, the same numbers from small random models."""

import importlib.util
import json
import math
import shutil
from pathlib import Path

import clip_publications as published
import numpy as np
import pytest
import torch
from conftest import run_bad, run_ok
from PIL import Image
from safetensors.torch import load_file, save_file
from tensor_lists import published_shapes
from torch.nn import functional as F

from dalle_cli.artifacts import open_artifact
from dalle_cli.devices import arithmetic
from dalle_cli.importing import bundle, clip
from dalle_cli.importing.source import open_source
from dalle_cli.models.clip import CLIP
from dalle_cli.pipelines.clip import ClipScorer


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    published.write_tokenizer(folder)
    return {name: (folder / name).read_bytes() for name in ("vocab.json", "merges.txt")}


class Listed:
    """A source of true tensor lists: names and shapes, and no numbers."""

    repository, revision = "", ""

    def __init__(self, tables, small):
        self.name, self.tables = "a list", tables
        self.small = {name: json.dumps(x).encode() if isinstance(x, dict) else x for name, x in small.items()}
        self.files = dict.fromkeys([*tables, *self.small], 1)

    def data(self, name):
        return self.small[name]

    def json(self, name):
        return json.loads(self.small[name])

    def tensors(self, name):
        return self.tables[name]


class Table:
    def __init__(self, name):
        self.shapes = published_shapes(name)

    def dtype(self, name):
        return torch.float32


def listed(tokenizer_json, files, **small):
    tables = {name: Table(table) for name, table in files.items()}
    return Listed(tables, {**tokenizer_json, **{name.replace("__", "/") + ".json": x for name, x in small.items()}})


L14 = {
    "model_type": "clip", "text_config": {"num_attention_heads": 12}, "vision_config": {"num_attention_heads": 16},
}  # fmt: skip
OPEN_L14 = {"embed_dim": 768, "text_cfg": {"heads": 12, "width": 768}, "vision_cfg": {"head_width": 64, "layers": 24}}
# Layout: files, JSON files, and what comes of it: parameters, heads of text and vision, activation.
LISTS = {
    "transformers B/32": (
        {"model.safetensors": "clip_vit_b32_transformers"}, {"config": {"model_type": "clip"}},
        (151_277_313, 8, 12, "quick_gelu"),
    ),
    "transformers L/14": (
        {"pytorch_model.bin": "clip_vit_l14_transformers"}, {"config": L14}, (427_616_513, 12, 16, "quick_gelu"),
    ),
    "OpenAI B/32": ({"ViT-B-32.pt": "clip_vit_b32_openai"}, {}, (151_277_313, 8, 12, "quick_gelu")),
    "OpenAI L/14": ({"ViT-L-14.pt": "clip_vit_l14_openai"}, {}, (427_616_513, 12, 16, "quick_gelu")),
    "open_clip B/32": ({"b32-quickgelu.bin": "open_clip_vit_b32"}, {}, (151_277_313, 8, 12, "quick_gelu")),
    "open_clip L/14": (
        {"open_clip_model.safetensors": "open_clip_vit_l14"}, {"open_clip_config": {"model_cfg": OPEN_L14}},
        (427_616_513, 12, 16, "gelu"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LISTS)
def test_the_published_tensors_are_ours_at_full_size(tokenizer_json, layout):
    files, small, (n, text_heads, vision_heads, activation) = LISTS[layout]
    source = listed(tokenizer_json, files, **small)
    assert clip.IMPORTER.recognize(source)
    assert {*files, *tokenizer_json} <= set(clip.IMPORTER.files(source))
    check_full_size(source, clip.IMPORTER.plan(source), n)
    config = clip.IMPORTER.plan(source).parts[0].sizes
    assert (config.text_heads, config.vision_heads, config.activation) == (text_heads, vision_heads, activation)
    assert (config.image_size, config.n_text, config.n_text_vocab, config.vision_hidden) == (224, 77, 49408, 0)


def check_full_size(source, made, n):
    plan = bundle.plan_part(source, made, made.parts[0], None)
    assert sum(math.prod(shape) for _, shape in plan.entries.values()) == n


@pytest.mark.parametrize(("folder", "table", "n", "heads"), [
    ("text_encoder", "karlo_text_encoder", 123_650_304, 12),
    ("text_encoder", "kandinsky22_text_encoder_bigg", 694_659_840, 20),
])  # fmt: skip
def test_text_encoders_alone_at_full_size(tokenizer_json, folder, table, n, heads):
    config = {"model_type": "clip_text_model", "num_attention_heads": heads, "hidden_act": "gelu"}
    source = listed(
        tokenizer_json, {f"{folder}/model.safetensors": table}, **{f"{folder}__config": config}
    )  # fmt: skip
    made = clip.parts(source, (f"{folder}/",), name="text")
    check_full_size(source, made, n)
    (part,) = made.parts
    assert (part.file, part.tokenizer, *made.texts) == ("text.safetensors", *["text-tokenizer.json"] * 2)
    assert (part.sizes.text_heads, part.sizes.vision_layers, part.sizes.activation) == (heads, 0, "gelu")


def imported(folder, tmp_path, *more):
    """The CLIP of a folder, imported by the command."""
    out = tmp_path / "made"
    run_ok("import", folder, "-o", out, *more)
    assert {"clip.safetensors", "clip-tokenizer.json", "README.md"} <= {path.name for path in out.iterdir()}
    return ClipScorer(open_artifact(out / "clip.safetensors"), arithmetic("cpu", "float32"))


IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def normalized(config, images=IMAGES):
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.pixel_mean, config.pixel_std))
    return (images - mean) / std


def check(scorer, image, text, atol=1e-5):
    """The embeddings of IMAGES and of TEXTS, and the scale."""
    torch.testing.assert_close(scorer.image_features(IMAGES), image, rtol=0, atol=atol)
    torch.testing.assert_close(scorer.text_features(published.TEXTS), text, rtol=0, atol=atol)


@pytest.mark.parametrize("pickled", [False, True])
def test_transformers(tmp_path, pickled):
    theirs = published.save_transformers(tmp_path / "in", pickled=pickled)
    scorer = imported(tmp_path / "in", tmp_path)
    tokens = published.published_tokens(tmp_path / "in")
    pixels = normalized(scorer.clip.config)
    with torch.no_grad():
        answer = theirs(input_ids=tokens, pixel_values=pixels)
        image, text = theirs.get_image_features(pixels), theirs.get_text_features(tokens)
        last = theirs.text_model(tokens).last_hidden_state
    check(scorer, image.pooler_output, text.pooler_output)
    states, lengths, z_t = scorer.text_states(published.TEXTS)
    assert lengths.tolist() == (tokens.argmax(1) + 1).tolist()  # EOS has the highest number; a cut caption keeps it
    assert lengths.max() == published.LENGTH
    torch.testing.assert_close(states, last, rtol=0, atol=1e-5)
    torch.testing.assert_close(z_t, text.pooler_output, rtol=0, atol=1e-5)
    assert (z_t.norm(dim=1) - 1).abs().min() > 0.05  # not normalized
    logits = scorer.clip.scale() * scorer.clip.similarity(scorer.image_features(IMAGES), z_t)
    torch.testing.assert_close(logits.detach(), answer.logits_per_image, rtol=0, atol=1e-4)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_open_clip(tmp_path, quick_gelu):
    theirs = published.save_open_clip(tmp_path / "in", quick_gelu)
    scorer = imported(tmp_path / "in", tmp_path)
    assert scorer.clip.config.activation == ("quick_gelu" if quick_gelu else "gelu")
    assert scorer.clip.config.pixel_mean == (0.5, 0.4, 0.3)
    check_openai_names(scorer, theirs, tmp_path)
    other = published.open_clip_model(scorer.clip.config.n_text_vocab, not quick_gelu)[0]
    other.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        found = other.encode_image(normalized(scorer.clip.config))
    assert (found - scorer.image_features(IMAGES)).abs().max() > 1e-3  # the other activation is another model


def check_openai_names(scorer, theirs, tmp_path, atol=1e-5):
    tokens = published.published_tokens(tmp_path / "in")
    with torch.no_grad():
        image, text = theirs.encode_image(normalized(scorer.clip.config)), theirs.encode_text(tokens)
    check(scorer, image, text, atol)


@pytest.mark.parametrize("name", ["epoch_3.pt", "epoch_3-quickgelu.pt"])
def test_a_checkpoint_of_open_clips_trainer(tmp_path, name):
    theirs = published.save_training_checkpoint(tmp_path / "in", name)
    scorer = imported(tmp_path / "in", tmp_path)
    assert scorer.clip.config.activation == ("quick_gelu" if "quickgelu" in name else "gelu")
    check_openai_names(scorer, theirs, tmp_path)


@pytest.mark.parametrize("archive", [False, True])
def test_openai(tmp_path, archive):
    theirs = published.save_openai(tmp_path / "in", archive)
    scorer = imported(tmp_path / "in", tmp_path, "--dtype", "float32")
    assert (scorer.clip.config.activation, scorer.clip.config.vision_heads) == ("quick_gelu", 2)
    check_openai_names(scorer, theirs, tmp_path)
    assert "license: mit" in (tmp_path / "made" / "README.md").read_text()


@pytest.mark.parametrize(("card", "license_"), [
    (None, "unknown"), ("# A CLIP\nlicense: gpl\n", "unknown"),
    ("---\ntags: x\nlicense: apache-2.0\n---\n", "apache-2.0"),
])  # fmt: skip
def test_the_license_is_that_of_the_card(tokenizer_json, card, license_):
    small = {"README.md": card.encode()} if card else {}
    source = Listed({"open_clip_model.safetensors": Table("open_clip_vit_b32")}, {**tokenizer_json, **small})
    assert clip.parts(source).license == license_


def test_openai_against_its_own_code(tmp_path):
    if importlib.util.find_spec("clip") is None:
        pytest.skip("clip-anytorch is not installed")
    theirs = published.save_openais_own(tmp_path / "in")
    scorer = imported(tmp_path / "in", tmp_path)
    check_openai_names(scorer, theirs, tmp_path)
    with torch.no_grad():
        logits = theirs(normalized(scorer.clip.config), published.published_tokens(tmp_path / "in"))[0]
    score = scorer.clip.similarity(scorer.image_features(IMAGES), scorer.text_features(published.TEXTS))
    torch.testing.assert_close((scorer.clip.scale() * score).detach(), logits, rtol=0, atol=1e-4)


def test_encoders_in_files_of_their_own(tmp_path):
    text, vision = published.save_encoders(tmp_path)
    source = open_source(str(tmp_path), tmp_path / "none")
    made = clip.parts(source, ("text_encoder/", "image_encoder/"), "tokenizer/")
    whole = built(source, made)
    assert (whole.config.vision_hidden, whole.config.activation) == (52, "gelu")
    alone = built(source, clip.parts(source, ("text_encoder/",), "tokenizer/", "text"))
    tokens = published.published_tokens(tmp_path / "tokenizer")
    lengths = tokens.argmax(1) + 1
    pixels = normalized(whole.config)
    with torch.no_grad():
        theirs, seen = text(input_ids=tokens), vision(pixel_values=pixels)
        torch.testing.assert_close(whole.encode_image(IMAGES), seen.image_embeds, rtol=0, atol=1e-5)
        for model in (whole, alone):
            torch.testing.assert_close(model.text_states(tokens), theirs.last_hidden_state, rtol=0, atol=1e-5)
            torch.testing.assert_close(model.encode_text(tokens, lengths), theirs.text_embeds, rtol=0, atol=1e-5)
    assert whole.scale().item() == pytest.approx(100)
    assert "vision_model" not in dict(alone.named_children())


def built(source, made):
    """The model of a publication's part, its tensors read by the frame."""
    plan = bundle.plan_part(source, made, made.parts[0], None)
    model = CLIP(made.parts[0].sizes).eval()
    model.load_state_dict({name: plan.read(name) for name in plan.entries})
    return model


@pytest.mark.parametrize("side", [64, 224, 301])
def test_pixels_are_prepared_as_the_publisher_does(side):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    rng = np.random.default_rng(side)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    array = np.array(smooth)
    array[::7] = 255 - array[::7]  # and some edges
    expected = CLIPImageProcessorPil()(Image.fromarray(array), return_tensors="pt")["pixel_values"]
    sizes = {"vision_width": 8, "vision_layers": 1, "vision_heads": 1, "text_width": 8, "text_layers": 1}
    config = clip.CLIPConfig(**sizes, text_heads=1, n_proj=8, n_text_vocab=8)
    model, seen = CLIP(config), []
    model.vision_model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model.encode_image(torch.from_numpy(array).permute(2, 0, 1)[None] / 255)
    std = torch.tensor(config.pixel_std).view(3, 1, 1)
    assert ((seen[0] - expected) * std).abs().max() <= 1e-2
    assert F.mse_loss(seen[0], expected) < 1e-4


def test_as_ranker_and_as_features(chain, tmp_path):
    """An imported CLIP ranks images and gives `evaluate` its features, as one of ours does."""
    theirs = published.save_transformers(tmp_path / "in")
    model, images = tmp_path / "clip", open_artifact(chain.images)
    run_ok("import", tmp_path / "in", "-o", model)
    best = open_artifact(run_ok("rerank", chain.images, "-m", model, "-o", tmp_path / "best.safetensors"))
    pixels = normalized(clip.CLIPConfig(), torch.from_numpy(images.array("images")[:].copy()) / 255)
    tokens = published.published_tokens(tmp_path / "in", list(images.strings("text")))
    with torch.no_grad():
        answer = theirs(input_ids=tokens, pixel_values=pixels)
    cosines = (answer.image_embeds * answer.text_embeds).sum(1).numpy()
    order = np.argsort(-cosines)
    np.testing.assert_allclose(best.array("score")[:], cosines[order], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(best.array("images")[:], images.array("images")[:][order])

    decoded = run_ok("decode", chain.codes, "-m", chain.dvae, "-o", tmp_path / "decoded.safetensors")
    fixed = (decoded, "--reference", chain.data, "--workers", 0, "--bootstrap", 0)
    for i, options in enumerate((("-m", model), ("-m", chain.model, "--features", model / "clip.safetensors"))):
        told = json.loads(Path(run_ok("evaluate", *fixed, *options, "-o", tmp_path / f"{i}.json")).read_text())
        assert told["features"]["width"] == 20
        assert told["features"]["name"] == f"clip-{open_artifact(model / 'clip.safetensors').digest[:8]}"
        assert {"frechet", "kernel", "precision"} <= told["scores"][0].keys()
    scored = run_ok("evaluate", chain.images, *fixed[1:], "-m", model, "--scores", "clip", "-o", tmp_path / "c.json")
    found = json.loads(Path(scored).read_text())["scores"][0]["clip"]["value"]
    assert found == pytest.approx(100 * cosines.clip(0).mean(), abs=1e-3)


def rewritten(folder, name, change):
    """A JSON file of a publication, changed."""
    config = json.loads((folder / name).read_text())
    change(config)
    (folder / name).write_text(json.dumps(config))


def with_tensor(folder, name, tensor):
    path = folder / "open_clip_model.safetensors"
    save_file({**load_file(path), name: tensor}, path)


BAD = {
    "SigLIP": ("open_clip", lambda f: with_tensor(f, "logit_bias", torch.zeros(())), "found a SigLIP"),
    "CoCa": ("open_clip", lambda f: with_tensor(f, "text_decoder.x", torch.zeros(2)), "found a CoCa"),
    "custom": ("open_clip", lambda f: with_tensor(f, "text.ln_final.bias", torch.zeros(2)), "found a CustomTextCLIP"),
    "ResNet": ("open_clip", lambda f: with_tensor(f, "visual.layer1.0.x", torch.zeros(2)), "a CLIP with a ResNet"),
    "over": ("open_clip", lambda f: with_tensor(f, "ema", torch.zeros(2)), "only tensors of CLIP, found 'ema'"),
    "mask": (
        "open_clip",
        lambda f: rewritten(f, "open_clip_config.json", lambda c: c["model_cfg"]["text_cfg"].update(embed_cls=True)),
        "found text_cfg.embed_cls True",
    ),
    "timm": (
        "open_clip",
        lambda f: rewritten(f, "open_clip_config.json", lambda c: c["model_cfg"].update(custom_text=True)),
        "found custom_text True",
    ),
    "activation": (
        "transformers",
        lambda f: rewritten(f, "config.json", lambda c: c["text_config"].update(hidden_act="gelu_new")),
        "expected one of quick_gelu, gelu and a layer_norm_eps of 1e-05, found gelu_new, quick_gelu",
    ),
    "epsilon": (
        "transformers",
        lambda f: rewritten(f, "config.json", lambda c: c["vision_config"].update(layer_norm_eps=1e-6)),
        "found quick_gelu and 1e-05, 1e-06",
    ),
    "heads": (
        "transformers",
        lambda f: rewritten(f, "config.json", lambda c: c["vision_config"].update(num_attention_heads=5)),
        "expected clip.vision_width divisible by clip.vision_heads",
    ),
    "another": (
        "transformers", lambda f: rewritten(f, "config.json", lambda c: c.update(model_type="x")), "known publication",
    ),
    "no tokenizer": ("transformers", lambda f: (f / "vocab.json").unlink(), "expected tokenizer.json, or vocab.json"),
    "long tokenizer": (
        "transformers", lambda f: rewritten(f, "vocab.json", lambda c: c.update(more=len(c))), "a tokenizer of at most",
    ),
    "pixels": (
        "open_clip",
        lambda f: rewritten(f, "open_clip_config.json", lambda c: c["preprocess_cfg"].update(mean=[0.5])),
        "expected the files of CLIP",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    published.save_transformers(folder / "transformers")
    published.save_open_clip(folder / "open_clip")
    for tokenizer in (folder / "transformers").glob("tokenizer*.json"):
        tokenizer.unlink()
    return folder


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_in_one_line(layouts, tmp_path, case):
    layout, change, words = BAD[case]
    shutil.copytree(layouts / layout, tmp_path / "in")
    change(tmp_path / "in")
    line = run_bad("import", tmp_path / "in", "-o", tmp_path / "out")
    assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
