"""Inpainting: codes of an image that stay while the rest is sampled, by rows or by a mask, and sampled again."""

import dataclasses
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from artifact_files import array, strings
from by_keyword import sample_codes
from conftest import run_bad, run_ok
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dalle_cli import devices
from dalle_cli.artifacts import digest_bytes, open_artifact, write_artifact
from dalle_cli.errors import DalleError
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.pipelines.inpainting import white_cells
from dalle_cli.sampling.categorical import sample_categorical, uniforms

SMALL = PriorConfig(n_layer=3, n_head=2, n_embd=32, n_text_vocab=11, n_text=6, n_image_vocab=40, grid=5, conv_kernel=3)
TOKENS, LENGTHS = torch.tensor([[1, 2, 3, 4, 0, 0]]), torch.tensor([4])
PROMPT = "a blue bar on black"
RED = "00"  # the id of a red circle on white


def build(dtype=torch.float, **changes):
    """A prior whose every parameter is random, and large enough for captions and neighbors to matter."""
    model = Prior(dataclasses.replace(SMALL, **changes))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3, generator=generator)
    return model.to(dtype).eval()


def sample(model, n=4, seed=7, **options):
    return sample_codes(model, TOKENS, LENGTHS, range(n), seed, **options)


def some_codes(n=4):
    return torch.randint(40, (n, 5, 5), generator=torch.Generator().manual_seed(3))


def chess():
    return torch.arange(25).view(5, 5) % 2 == 0


# ---- codes that are kept


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("attention", ["sparse", "full"])
def test_the_rest_is_sampled_as_without_a_cache(attention, scale):
    """The whole grid again, one full pass for each code, with kept codes in their places."""
    model, codes, kept = build(torch.double, attention=attention), some_codes(2), chess()
    sampled = sample(model, 2, known=codes, keep=kept, guidance_scale=scale)
    expected = torch.where(kept, codes, 0).flatten(1)
    noise = torch.stack([uniforms(7, i, 25) for i in range(2)])
    for j in range(25):
        grid = expected.view(2, 5, 5)
        conditional = model(TOKENS.expand(2, -1), LENGTHS.expand(2), grid)[1][:, j]
        null = model(TOKENS.expand(2, -1), torch.zeros(2, dtype=torch.int64), grid)[1][:, j]
        if not kept.flatten()[j]:
            expected[:, j] = sample_categorical(null + scale * (conditional - null), noise[:, j])
    assert torch.equal(sampled.flatten(1), expected)
    assert torch.equal(sampled[:, kept], codes[:, kept])
    assert not torch.equal(sampled[:, ~kept], sample(model, 2, guidance_scale=scale)[:, ~kept])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_keeping_nothing_is_plain_and_keeping_all_is_the_codes(monkeypatch, scale):
    model, codes = build(), some_codes()
    none, all_ = torch.zeros(5, 5, dtype=torch.bool), torch.ones(5, 5, dtype=torch.bool)
    plain = sample(model, guidance_scale=scale)
    assert torch.equal(sample(model, guidance_scale=scale, known=codes, keep=none), plain)
    monkeypatch.setattr(Prior, "step", lambda *_: pytest.fail("nothing is sampled"))
    assert torch.equal(sample(model, guidance_scale=scale, known=codes, keep=all_), codes)
    assert torch.equal(sample(model, guidance_scale=scale, known=codes[0], keep=all_), codes[:1].expand(4, -1, -1))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_noise_of_what_is_sampled_stays(scale):
    """Kept are the very codes that would have been sampled: whatever the mask, the grid is the same."""
    model = build()
    plain = sample(model, guidance_scale=scale)
    for kept in (chess(), ~chess(), torch.arange(25).view(5, 5) > 12, torch.arange(25).view(5, 5) <= 12):
        assert torch.equal(sample(model, guidance_scale=scale, known=plain, keep=kept), plain)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_kept_code_is_seen_by_all_after_it_and_by_none_before(scale):
    model, codes, kept = build(attention="full"), some_codes(1)[0], torch.zeros(5, 5, dtype=torch.bool)
    kept[1, 2] = kept[3, 3] = True
    other = codes.clone()
    other[1, 2] = (codes[1, 2] + 1) % 40
    options = {"n": 400, "batch_size": 400, "guidance_scale": scale, "keep": kept}
    differs = (sample(model, known=codes, **options) != sample(model, known=other, **options)).any(0).flatten()
    assert not differs[:7].any()
    free = ~kept.flatten()[8:]
    assert differs[7]
    assert differs[8:][free].all()
    assert not differs[18]  # which is kept


def test_batches_are_of_any_size_and_rows_have_codes_of_their_own():
    model, codes = build(), some_codes(7)
    for scale in (1.0, 3.0):
        options = {"n": 7, "guidance_scale": scale, "keep": chess()}
        sampled = sample(model, known=codes, batch_size=7, **options)
        assert torch.equal(sampled[:, chess()], codes[:, chess()])
        for batch_size in (1, 3):
            assert torch.equal(sample(model, known=codes, batch_size=batch_size, **options), sampled)
        one = sample_codes(model, TOKENS, LENGTHS, [5], 7, known=codes[5], keep=chess(), guidance_scale=scale)
        assert torch.equal(one[0], sampled[5])


def test_static_caches_are_fed_kept_codes(monkeypatch):
    model, codes = build(), some_codes()
    sampled = sample(model, known=codes, keep=chess(), guidance_scale=2.0)
    monkeypatch.setattr(devices, "compiled", lambda step, *_: step)  # what is compiled, but as it stands
    assert torch.equal(sample(model, known=codes, keep=chess(), guidance_scale=2.0, compiled=True), sampled)


@pytest.mark.parametrize(
    ("codes", "kept", "found"),
    [
        (some_codes(), None, "one without the other"),
        (None, chess(), "one without the other"),
        (some_codes()[:, :4], chess(), "5 x 5 codes"),
        (some_codes(3), chess(), "5 x 5 codes"),
        (some_codes(), chess()[:4], "5 x 5 codes"),
        (some_codes() + 1, chess(), "below 40, found 1 to 40"),
        (some_codes() - 1, chess(), "below 40, found -1"),
    ],
)
def test_codes_that_do_not_fit_are_refused(codes, kept, found):
    with pytest.raises(DalleError, match=found):
        sample(build(), known=codes, keep=kept)


# ---- masks


@settings(max_examples=40)
@given(st.integers(1, 23), st.integers(0, 9), st.booleans(), st.integers(1, 7), st.data())
def test_a_code_is_sampled_if_white_touches_it(side, more, tall, grid, data):
    pixels = np.zeros((side, side), np.uint8)
    white = data.draw(st.lists(st.tuples(st.integers(0, side - 1), st.integers(0, side - 1)), max_size=3))
    for y, x in white:
        pixels[y, x] = 255
    whole = np.full((side, side + more), 255, np.uint8)  # white beyond the square
    whole[:, more // 2 : more // 2 + side] = pixels.T if tall else pixels
    expected = np.zeros((grid, grid), bool)
    for i in range(grid):
        for j in range(grid):
            top, left, size = Fraction(i * side, grid), Fraction(j * side, grid), Fraction(side, grid)
            for y, x in white:
                high = min(top + size, y + 1) - max(top, y)
                wide = min(left + size, x + 1) - max(left, x)
                expected[i, j] |= high > 0 and wide > 0
    assert np.array_equal(white_cells(Image.fromarray(whole.T if tall else whole).convert("RGB"), grid), expected)


def test_of_gray_the_brighter_half_is_white():
    mask = Image.fromarray(np.array([[[127] * 3, [128] * 3], [[255, 0, 0], [0, 255, 0]]], np.uint8))
    assert white_cells(mask, 2).tolist() == [[False, True], [False, True]]


# ---- the commands


def sample_with(chain, out, *more, n=6, prompt=PROMPT):
    run_ok("sample", prompt, "-n", n, "-m", chain.model, "-o", out, *more)
    return array(out, "codes")


def own_codes(chain, name=RED):
    """What `encode-images` made of a picture of the data set."""
    return array(chain.codes, "codes")[strings(chain.codes, "ids").index(name)]


def write_mask(path, white, size=(16, 16)):
    mask = Image.new("RGB", size)
    mask.paste((255, 255, 255), white)
    mask.save(path)
    return path


@pytest.mark.parametrize("guidance", [1, 3])
def test_the_upper_rows_are_the_images_own(chain, tmp_path, guidance):
    picture = chain.data / f"{RED}.png"
    more = ("--image", picture, "--guidance", guidance)
    sampled = sample_with(chain, tmp_path / "a", *more, "--keep-rows", 1)
    assert (sampled[:, :1] == own_codes(chain)[:1]).all()
    assert len(np.unique(sampled[:, 1:], axis=0)) > 1
    assert np.array_equal(sample_with(chain, tmp_path / "b", *more, "--keep-rows", 1, "--batch-size", 4), sampled)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    half = sample_with(chain, tmp_path / "c", *more)
    assert (half[:, :2] == own_codes(chain)[:2]).all()
    assert not (half[:, 2:] == own_codes(chain)[2:]).all()
    plain = sample_with(chain, tmp_path / "d", "--guidance", guidance)
    nothing = sample_with(chain, tmp_path / "e", *more, "--keep-rows", 0)
    assert nothing.tobytes() == plain.tobytes()
    assert not np.array_equal(plain, sampled)
    assert (sample_with(chain, tmp_path / "f", *more, "--keep-rows", 4) == own_codes(chain)).all()


def test_what_the_mask_leaves_black_is_the_images_own(chain, tmp_path):
    mask = write_mask(tmp_path / "mask.png", (7, 4, 9, 13))  # touches columns 1 and 2 of rows 1 to 3
    sampled = sample_with(chain, tmp_path / "a", "--image", chain.data / f"{RED}.png", "--mask", mask)
    anew = np.zeros((4, 4), bool)
    anew[1:4, 1:3] = True
    assert (sampled[:, ~anew] == own_codes(chain)[~anew]).all()
    assert len(np.unique(sampled[:, anew], axis=0)) > 1
    plain = sample_with(chain, tmp_path / "b")
    write_mask(mask, (0, 0, 3, 3), (3, 3))  # all white
    assert np.array_equal(
        sample_with(chain, tmp_path / "c", "--image", chain.data / f"{RED}.png", "--mask", mask), plain
    )


def test_an_image_is_cropped_and_resized_as_encode_images_does(chain, tmp_path):
    """A photo that lies on its side, neither square nor of the model's size."""
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(noise).resize((61, 43)).save(folder / "x.jpg", exif=exif)
    run_ok("encode-images", folder, "-m", chain.dvae, "-o", tmp_path / "own.safetensors")
    sampled = sample_with(chain, tmp_path / "a", "--image", folder / "x.jpg", "--keep-rows", 4, n=1)
    assert np.array_equal(sampled, array(tmp_path / "own.safetensors", "codes"))


def test_generate_keeps_as_sample_does(chain, tmp_path):
    mask = write_mask(tmp_path / "mask.png", (0, 0, 8, 16))
    for number, how in enumerate((("--keep-rows", 1), ("--mask", mask))):
        more = ("--image", chain.data / f"{RED}.png", *how)
        sample_with(chain, tmp_path / "x.codes.safetensors", *more)
        images = run_ok("decode", tmp_path / "x.codes.safetensors", "-m", chain.model)
        best = run_ok("rerank", images, "-m", chain.model)
        made = tmp_path / f"{number}.safetensors"
        png = tmp_path / "a.png"
        run_ok("generate", PROMPT, "-n", 6, "--keep", 0, "-m", chain.model, "-o", png, "--images", made, *more)
        assert strings(made, "ids") == strings(best, "ids")
        np.testing.assert_allclose(array(made, "images").astype(int), array(best, "images").astype(int), atol=1)
        entry = next(entry for entry in open_artifact(made).history if entry["stage"] == "sample")
        assert entry == open_artifact(tmp_path / "x.codes.safetensors").history[-1]


def test_the_history_says_what_was_kept(chain, tmp_path):
    picture, mask = chain.data / f"{RED}.png", write_mask(tmp_path / "mask.png", (0, 0, 8, 16))
    plain = {"model": open_artifact(chain.prior).digest}
    own = {**plain, "dvae": open_artifact(chain.dvae).digest, "image": digest_bytes(picture.read_bytes())}
    for name, more, options, inputs in (
        ("a", (), {}, plain),
        ("b", ("--image", picture), {"keep_rows": 2}, own),
        ("c", ("--image", picture, "--keep-rows", 3), {"keep_rows": 3}, own),
        ("d", ("--image", picture, "--mask", mask), {}, {**own, "mask": digest_bytes(mask.read_bytes())}),
    ):
        sample_with(chain, tmp_path / name, *more, n=1)
        entry = open_artifact(tmp_path / name).history[-1]
        assert entry["inputs"] == inputs
        assert {k: v for k, v in entry["options"].items() if k == "keep_rows"} == options
        stages = [e["stage"] for e in open_artifact(tmp_path / name).history]
        assert len(set(stages)) == len(stages)


# ---- sampled again


@pytest.mark.parametrize("how", ["rows", "mask"])
def test_rows_with_an_image_are_sampled_again(chain, tmp_path, how):
    picture, mask = chain.data / f"{RED}.png", write_mask(tmp_path / "mask.png", (0, 0, 8, 16))
    more = ("--image", picture, *(("--keep-rows", 1) if how == "rows" else ("--mask", mask)))
    files = more[:2] if how == "rows" else more  # how many rows stands in the history
    base = sample_with(chain, tmp_path / "a", *more, "--seed", 4, "--guidance", 2)
    again = ("sample", "-m", chain.model, "-o", tmp_path / "b", "--from")
    made = run_ok(*again, tmp_path / "a", "--rows", "3,1", *files)
    assert np.array_equal(array(made, "codes"), base[[3, 1]])
    first, last = open_artifact(tmp_path / "a").history[-1], open_artifact(made).history[-1]
    assert last["options"] == {**first["options"], "rows": "3,1"}
    assert last["inputs"] == {**first["inputs"], "drawn": open_artifact(tmp_path / "a").digest}
    third = run_ok(*again[:-2], tmp_path / "c", "--from", made, "--rows", 1, *files)
    assert np.array_equal(array(third, "codes"), base[[1]])


def test_rows_are_refused_without_their_image(chain, tmp_path):
    picture, mask = chain.data / f"{RED}.png", write_mask(tmp_path / "mask.png", (0, 0, 8, 16))
    sample_with(chain, tmp_path / "plain", n=2)
    sample_with(chain, tmp_path / "rows", "--image", picture, n=2)
    sample_with(chain, tmp_path / "mask", "--image", picture, "--mask", mask, n=2)

    def refused(name, *more):
        line = run_bad("sample", "--from", tmp_path / name, "-m", chain.model, "-o", tmp_path / "out", *more)
        assert not (tmp_path / "out").exists()
        return line

    digest = digest_bytes(picture.read_bytes())[:12]
    assert f"expected --image (sha256 {digest})" in refused("rows")
    assert "expected --mask (sha256" in refused("mask", "--image", picture)
    assert f"sha256 {digest}), found" in refused("rows", "--image", chain.data / "05.png")
    other = write_mask(tmp_path / "other.png", (0, 0, 9, 16))
    assert "expected the mask" in refused("mask", "--image", picture, "--mask", other)
    assert "was sampled without one; leave it out" in refused("plain", "--image", picture)
    assert "was sampled without one; leave it out" in refused("rows", "--image", picture, "--mask", mask)
    assert "found both" in refused("mask", "--image", picture, "--mask", mask, "--keep-rows", 1)
    more = run_ok(
        *("sample", "--from", tmp_path / "rows", "-m", chain.model, "-o", tmp_path / "out"),
        *("--image", picture, "--keep-rows", 3),
    )
    assert np.array_equal(
        array(more, "codes"), sample_with(chain, tmp_path / "3", "--image", picture, "--keep-rows", 3, n=2)
    )


def test_a_history_that_lies_of_rows_is_refused(chain, tmp_path):
    picture = chain.data / f"{RED}.png"
    sample_with(chain, tmp_path / "a", "--image", picture, n=1)
    past = open_artifact(tmp_path / "a")
    columns = {name: np.array(past.array(name)) for name in ("codes", "prompt", "seed")}
    columns |= {name: list(past.strings(name)) for name in ("ids", "text")}
    for rows in ("two", 1.5, True, -1, 9):
        entry = {**past.history[-1], "options": {**past.history[-1]["options"], "keep_rows": rows}}
        write_artifact(tmp_path / "b", "codes", columns, past.config, [*past.history[:-1], entry])
        run_bad("sample", "--from", tmp_path / "b", "-m", chain.model, "--image", picture, "-o", tmp_path / "c")


# ---- what cannot be


@pytest.mark.parametrize("stage", ["sample", "generate"])
def test_bad_input_is_one_line(chain, tmp_path, stage):
    picture = chain.data / f"{RED}.png"
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:60])
    files = set(tmp_path.iterdir())
    for more, found in (
        (("--keep-rows", 2), "expected --image beside --keep-rows"),
        (("--mask", picture), "expected --image beside --mask"),
        (("--image", picture, "--mask", picture, "--keep-rows", 2), "found both"),
        (("--image", picture, "--keep-rows", 5), "expected --keep-rows from 0 to 4, found 5"),
        (("--image", tmp_path / "none.png"), "No such file"),
        (("--image", tmp_path), "directory"),
        (("--image", tmp_path / "text.png"), "unreadable"),
        (("--image", tmp_path / "cut.png"), "unreadable"),
        (("--image", picture, "--mask", tmp_path / "text.png"), "check --mask"),
        (("--image", picture, "--mask", tmp_path / "none.png"), "check --mask"),
    ):
        assert found in run_bad(stage, PROMPT, "-m", chain.model, "-o", tmp_path / "out", *more)
        assert set(tmp_path.iterdir()) == files


def test_the_dvae_must_be_the_priors(chain, tmp_path):
    model, more = tmp_path / "model", ("--image", chain.data / f"{RED}.png", "-o", tmp_path / "out")
    shutil.copytree(chain.model, model, ignore=shutil.ignore_patterns("*.run"))
    (model / "dvae.safetensors").unlink()
    assert "expected weights.dvae" in run_bad("sample", PROMPT, "-m", model, *more)
    dvae = open_artifact(chain.dvae)
    tensors = {name: np.array(dvae.headers[0].map(name)) for name in dvae.headers[0].tensors}
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    write_artifact(model / "dvae.safetensors", dvae.kind, tensors, dvae.config, dvae.history)
    assert f"expected the dVAE that {model}/prior.safetensors was made with" in run_bad(
        "sample", PROMPT, "-m", model, *more
    )
    run_ok("sample", PROMPT, "-m", model, "-n", 1, "-o", tmp_path / "out")  # without a picture it is not asked for
