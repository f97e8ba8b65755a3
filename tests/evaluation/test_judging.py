"""Scores of a dVAE and of a prior from files: what is judged, what is refused, and the pictures that are drawn."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import run_bad, run_cli, run_ok
from PIL import Image
from stage_runs import rows, training

from dalle_cli.artifacts import digest_file, open_artifact, write_artifact
from dalle_cli.data.augment import center
from dalle_cli.data.datasets import open_dataset
from dalle_cli.data.order import held_out
from dalle_cli.devices import arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.evaluation.dvae import evaluate_dvae
from dalle_cli.evaluation.image_sets import open_images
from dalle_cli.evaluation.options import EvaluateOptions
from dalle_cli.evaluation.prior import evaluate_prior
from dalle_cli.evaluation.reconstruction import psnr, squared_error, ssim
from dalle_cli.models.pixels import from_uint8, to_uint8
from dalle_cli.pipelines import loading

CPU = torch.device("cpu")
MACHINE = arithmetic("cpu", "float32")
SHARE = 0.2  # that the chain's recipe holds out


def of_dvae(chain, out, data=None, weights=None, **options):
    options = {"batch_size": 5, "workers": 0, "exclude": None, **options}
    weights = open_artifact(chain.dvae) if weights is None else weights
    images = open_images(str(data or chain.data))
    return evaluate_dvae(weights, *images, out / "scores.json", EvaluateOptions(**options), MACHINE)


def of_prior(chain, out, weights=None, captions=None, codes=None, **options):
    weights = open_artifact(chain.prior) if weights is None else weights
    inputs = (open_artifact(captions or chain.captions, "captions"), open_artifact(codes or chain.codes, "codes"))
    return evaluate_prior(weights, *inputs, EvaluateOptions(**{"batch_size": 2, **options}), MACHINE)


def rebuilt(chain):
    """All pictures of the chain's data set and their reconstructions, uint8, made here; and the ids."""
    data = open_dataset(str(chain.data), need_captions=False)
    dvae = loading.dvae(open_artifact(chain.dvae), CPU)
    pixels = np.stack([center(data.read(i), 16).transpose(2, 0, 1) for i in range(len(data))])
    images = torch.from_numpy(pixels)
    return images, to_uint8(dvae.reconstruct(from_uint8(images))), list(data.ids)


def changed(path, to, config=None, **tensors):
    """A copy of an artifact with another header or other columns."""
    old = open_artifact(path)
    columns = {name: np.asarray(old.array(name)) for name in old.columns}
    strings = {name: list(old.strings(name)) for name in old.headers[0].table.strings if name in old}
    write_artifact(to, old.kind, {**columns, **strings, **tensors}, {**old.config, **(config or {})}, old.history)
    return to


# dVAE


def test_a_dvae_is_scored_by_what_decode_would_show(chain, tmp_path):
    images, shown, ids = rebuilt(chain)
    told = of_dvae(chain, tmp_path)
    assert told["psnr"] == pytest.approx(psnr(squared_error(images, shown)).mean().item(), abs=1e-9)
    assert told["ssim"] == pytest.approx(ssim(images, shown).mean().item(), abs=1e-9)
    assert (told["images"], told["skipped"]) == (24, 0)
    codes = loading.dvae(open_artifact(chain.dvae), CPU).encode(from_uint8(images))
    share = np.unique(codes.numpy(), return_counts=True)[1] / codes.numel()
    bits = -(share * np.log2(share)).sum()
    assert (told["n_vocab"], told["codes_used"]) == (20, len(share))
    assert told["perplexity"] == pytest.approx(2**bits)
    assert told["bits_per_pixel"] == pytest.approx(np.log2(20) * 16 / 256)  # 4 x 4 codes of 16 x 16 pixels
    assert told["bits_per_pixel_entropy"] == pytest.approx(bits * 16 / 256)
    mask = torch.tensor([held_out(name, SHARE) for name in ids])
    assert 0 < mask.sum() < 24
    part = psnr(squared_error(images[mask], shown[mask])).mean().item()
    assert told["trained_on"] is True
    assert told["held_out"]["psnr"] == pytest.approx(part, abs=1e-9)
    assert told["held_out"]["images"] == int(mask.sum())
    json.dumps(told, allow_nan=False)


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"batch_size": 64, "workers": 2}])
def test_neither_batches_nor_workers_change_a_dvaes_scores(chain, tmp_path, changes):
    first, second = of_dvae(chain, tmp_path), of_dvae(chain, tmp_path, **changes)
    assert {**first, "held_out": 0} == pytest.approx({**second, "held_out": 0}, rel=1e-6)


def test_a_limit_is_spread_over_the_data(chain, tmp_path):
    images, shown, _ = rebuilt(chain)
    some = [0, 4, 9, 14, 19]
    told = of_dvae(chain, tmp_path, limit=5)
    assert told["images"] == 5
    assert told["psnr"] == pytest.approx(psnr(squared_error(images[some], shown[some])).mean().item(), abs=1e-9)


def test_broken_pictures_are_left_out_and_listed(chain, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(chain.data, data)
    (data / "03.png").write_bytes((data / "03.png").read_bytes()[:60])
    told = of_dvae(chain, tmp_path / "new", data)
    assert (told["images"], told["skipped"], told["trained_on"]) == (23, 1, False)
    assert "held_out" not in told
    (row,) = map(json.loads, (tmp_path / "new" / "scores.skipped.jsonl").read_text().splitlines())
    assert row["id"] == "03"
    shutil.rmtree(data)
    data.mkdir()
    (data / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    with pytest.raises(DalleError, match="expected images that can be read, found none of 1"):
        of_dvae(chain, tmp_path, data)


def test_the_grid_shows_the_worst_first_each_beside_its_original(chain, tmp_path):
    from dalle_cli.viz.grid import GAP, MARGIN, TITLE_LINE

    images, shown, _ = rebuilt(chain)
    worst = int(torch.argsort(psnr(squared_error(images, shown)), stable=True)[0])
    of_dvae(chain, tmp_path, grid=tmp_path / "worst.png")
    drawn = np.asarray(Image.open(tmp_path / "worst.png"))
    top, side = MARGIN + TITLE_LINE + GAP, 112  # 16 pixels, enlarged seven times
    for place, pixels in enumerate((images[worst], shown[worst])):
        left = MARGIN + place * (side + GAP)
        middles = drawn[top + 3 : top + side : 7, left + 3 : left + side : 7].astype(int)
        assert abs(middles - pixels.permute(1, 2, 0).numpy()).mean() < 3  # enlarging blends at edges
    (tmp_path / "notes.png").write_text("mine")
    with pytest.raises(DalleError, match="expected to write a PNG"):
        of_dvae(chain, tmp_path, grid=tmp_path / "notes.png")
    assert (tmp_path / "notes.png").read_text() == "mine"


def test_the_frechet_distance_is_between_originals_and_reconstructions(chain, tmp_path):
    images, shown, _ = rebuilt(chain)
    clip = loading.clip(open_artifact(chain.clip), CPU)
    sides = [clip.encode_image(from_uint8(pixels)).double().numpy() for pixels in (images, shown)]
    (mean_a, a), (mean_b, b) = ((rows.mean(0), np.cov(rows.T)) for rows in sides)
    linalg = pytest.importorskip("scipy.linalg")
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    told = of_dvae(chain, tmp_path, features=str(chain.clip))["frechet"]
    assert told["value"] == pytest.approx(expected, rel=1e-4)
    assert told["value"] > 1e-3 * np.trace(a)  # the tiny dVAE rebuilds badly
    assert told["name"] == f"Frechet distance ({told['features']})"
    with pytest.raises(DalleError, match=r"expected at least 17 images .* found 16"):
        of_dvae(chain, tmp_path, features=str(chain.clip), limit=16)


# Prior


def test_a_prior_is_judged_on_what_training_held_out(chain, tmp_path):
    """The figures are those of the loop's last validation, which is of the same average of the weights."""
    last = [row["validation"] for row in rows(chain.prior) if "validation" in row][-1]
    told = of_prior(chain, tmp_path)
    assert told["image_nats"] == pytest.approx(last["image_nats"], rel=1e-5)
    assert told["text_nats"] == pytest.approx(last["text_nats"], rel=1e-5)
    ids = open_dataset(str(chain.data), need_captions=False).ids
    assert (told["pairs"], told["held_out"]) == (sum(held_out(name, SHARE) for name in ids), True)
    assert told["image_nats_uniform"] == np.log(20)
    assert told["caption_dropout"] == 0.1
    assert np.mean(told["by_position"]) == pytest.approx(told["image_nats"])
    assert np.mean(told["gain_over_null_by_position"]) == pytest.approx(told["gain_over_null"])
    assert told["gain_over_shuffled"] != 0
    json.dumps(told, allow_nan=False)


def test_the_unigram_is_of_the_codes_that_training_saw(chain, tmp_path):
    artifact = open_artifact(chain.codes)
    codes = np.asarray(artifact.array("codes")).reshape(24, -1)
    mask = np.array([held_out(name, SHARE) for name in artifact.strings("ids")])
    counts = np.bincount(codes[~mask].ravel(), minlength=20) + 1
    expected = -np.log(counts / counts.sum())[codes[mask]].mean()
    assert of_prior(chain, tmp_path)["image_nats_unigram"] == pytest.approx(expected)
    own = [np.bincount(np.delete(codes, i, 0).ravel(), minlength=20) + 1 for i in range(24)]
    expected = np.mean([-np.log(n / n.sum())[row].mean() for n, row in zip(own, codes, strict=True)])
    assert of_prior(chain, tmp_path, everything=True)["image_nats_unigram"] == pytest.approx(expected)


def test_everything_and_a_limit(chain, tmp_path):
    told = of_prior(chain, tmp_path, everything=True)
    assert (told["pairs"], told["held_out"]) == (24, False)
    assert of_prior(chain, tmp_path, limit=3)["pairs"] == 3
    only = of_prior(chain, tmp_path, limit=1)
    assert only["pairs"] == 1
    assert only["image_nats_error"] is only["gain_over_shuffled"] is None


def test_the_batch_size_changes_no_score_of_a_prior(chain, tmp_path):
    first, second = of_prior(chain, tmp_path), of_prior(chain, tmp_path, batch_size=64)
    for name, value in first.items():
        if not isinstance(value, list):
            assert value == pytest.approx(second[name], rel=1e-5, abs=1e-6), name


def test_rows_are_joined_by_id(chain, tmp_path):
    expected = of_prior(chain, tmp_path)
    old = open_artifact(chain.captions)
    order = np.arange(24)[::-1]
    columns = {name: np.asarray(old.array(name))[order] for name in old.columns}
    strings = {name: [old.strings(name)[i] for i in order] for name in ("ids", "text")}
    turned = changed(chain.captions, tmp_path / "turned.safetensors", **columns, **strings)
    assert of_prior(chain, tmp_path, captions=turned)["image_nats"] == expected["image_nats"]


def test_captions_that_are_all_alike_leave_nothing_to_shuffle(chain, tmp_path):
    tokens = np.repeat(np.asarray(open_artifact(chain.captions).array("tokens"))[:1], 24, 0)
    lengths = np.repeat(np.asarray(open_artifact(chain.captions).array("lengths"))[:1], 24)
    same = changed(chain.captions, tmp_path / "same.safetensors", tokens=tokens, lengths=lengths)
    told = of_prior(chain, tmp_path, captions=same)
    assert told["gain_over_shuffled"] is None
    assert told["gain_over_null"] is not None


def test_other_peoples_captions_and_codes_are_refused(chain, tmp_path):
    captions = changed(chain.captions, tmp_path / "c.safetensors", {"tokenizer": "0" * 64})
    with pytest.raises(DalleError, match=r"expected the tokenizer that .*prior.safetensors was made with"):
        of_prior(chain, tmp_path, captions=captions)
    codes = changed(chain.codes, tmp_path / "z.safetensors", {"encoder": "0" * 64})
    with pytest.raises(DalleError, match="expected the image encoder that"):
        of_prior(chain, tmp_path, codes=codes)
    codes = changed(chain.codes, tmp_path / "v.safetensors", {"n_vocab": 30})
    with pytest.raises(DalleError, match=r"20, 4.*found .*30, 4"):
        of_prior(chain, tmp_path, codes=codes)
    with pytest.raises(DalleError, match="expected captions, found codes"):
        of_prior(chain, tmp_path, captions=chain.drawn)


def weights_of(chain, to, **train):
    """The prior with another table of training."""
    from safetensors.torch import load_file

    old = open_artifact(chain.prior)
    config = {**old.config, "train": {**old.config["train"], **train}}
    tensors = {name: tensor.numpy() for name, tensor in load_file(chain.prior).items()}
    write_artifact(to, old.kind, tensors, config, old.history)
    return open_artifact(to)


def test_weights_that_held_nothing_out(chain, tmp_path, capsys):
    told = of_prior(chain, tmp_path, weights_of(chain, tmp_path / "p.safetensors", validation=0.0))
    assert (told["pairs"], told["held_out"]) == (24, False)
    assert "using all pairs" in capsys.readouterr().err
    with pytest.raises(DalleError, match="expected pairs that training held out, found none of 24"):
        of_prior(chain, tmp_path, weights_of(chain, tmp_path / "q.safetensors", validation=1e-9))


def test_the_heat_map(chain, tmp_path):
    pytest.importorskip("matplotlib")
    for name in "ab":
        of_prior(chain, tmp_path, plot=tmp_path / f"{name}.png")
    assert Image.open(tmp_path / "a.png").size[0] > 1000
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    (tmp_path / "notes.png").write_text("mine")
    with pytest.raises(DalleError, match="expected to write an image"):
        of_prior(chain, tmp_path, plot=tmp_path / "notes.png")


def test_the_heat_maps_colors_stand_for_the_values():
    pytest.importorskip("matplotlib")
    from dalle_cli.viz.charts import Heat, Label, heat_maps

    grid = [[1.0, 2.0], [3.0, -1.0]]
    picture = heat_maps([Heat(Label("a", "nats"), grid), Heat(Label("b"), grid, signed=True)], "two")
    shown = [panel.images[0] for panel in picture.axes if panel.images]
    assert [image.get_array().tolist() for image in shown] == [grid, grid]
    assert shown[0].get_clim() == (-1, 3)
    assert shown[1].get_clim() == (-3, 3)  # 0 in the middle
    assert [panel.get_title(loc="left") for panel in picture.axes if panel.images] == ["a", "b"]
    assert [text.get_text() for text in picture.texts] == ["two"]


def test_a_stored_picture_is_rebuilt_as_one_of_a_data_set(chain, tmp_path):
    images, _, ids = rebuilt(chain)
    path = write_artifact(tmp_path / "x.safetensors", "images", {"images": images.numpy(), "ids": ids}, {}, [])
    told = of_dvae(chain, tmp_path, path)
    assert told == {**{k: v for k, v in of_dvae(chain, tmp_path).items() if k != "held_out"}, "trained_on": False}


# Without some ids


@pytest.fixture(scope="module")
def lacking(chain, tmp_path_factory):
    """Ids, some of which would have been held out, and some seen; their list; a dVAE and a prior trained without."""
    folder = tmp_path_factory.mktemp("lacking")
    ids = open_dataset(str(chain.data), need_captions=False).ids
    held = [name for name in ids if held_out(name, SHARE)]
    assert len(held) > 2
    gone = {*held[:2], *[n for n in ids if n not in held][:3]}
    listed = folder / "gone.txt"
    listed.write_text("".join(f"{name}\n" for name in gone))
    for name in ("dvae", "prior"):
        run_ok(*training(chain, name, folder / f"{name}.safetensors", "--exclude", listed))
    return gone, listed, folder


def grids(chain):
    """The codes of the chain's pictures, (24, 16), which of them are held out, and their ids."""
    artifact = open_artifact(chain.codes)
    ids = list(artifact.strings("ids"))
    return np.asarray(artifact.array("codes")).reshape(24, -1), np.array([held_out(n, SHARE) for n in ids]), ids


def unigram(codes, seen, judged):
    """What the counts of some rows give for others, in nats."""
    counts = np.bincount(codes[seen].ravel(), minlength=20) + 1
    return -np.log(counts / counts.sum())[codes[judged]].mean()


def test_a_prior_trained_without_some_is_judged_on_what_it_held_out_of_the_others(chain, lacking, tmp_path):
    gone, listed, folder = lacking
    out, prior = tmp_path / "p.json", folder / "prior.safetensors"
    inputs = ("evaluate", prior, chain.captions, chain.codes, "--device", "cpu", "-o", out)
    result = run_cli(*inputs, "--exclude", listed)
    assert result.status == 0, result.stderr
    assert "5 of 24 images are excluded by gone.txt" in result.stderr
    document = json.loads(out.read_text())
    told, last = document["scores"], [row["validation"] for row in rows(prior) if "validation" in row][-1]
    assert told["image_nats"] == pytest.approx(last["image_nats"], rel=1e-5)
    assert told["text_nats"] == pytest.approx(last["text_nats"], rel=1e-5)
    codes, mask, ids = grids(chain)
    left = np.array([name not in gone for name in ids])
    assert (told["pairs"], told["exclude"], told["held_out"]) == ((mask & left).sum(), 5, True)
    assert told["image_nats_unigram"] == pytest.approx(unigram(codes, ~mask & left, mask & left))
    assert document["inputs"]["exclude"] == digest_file(listed)


def test_another_list_than_that_of_training_is_refused(chain, lacking, tmp_path):
    gone, listed, folder = lacking
    inputs = ("evaluate", folder / "prior.safetensors", chain.captions, chain.codes, "-o", tmp_path / "p.json")
    digest = open_artifact(folder / "prior.safetensors").history[-1]["inputs"]["exclude"]
    line = run_bad(*inputs)
    assert f"the ids that training left out (sha256 {digest[:12]}), found none; give that list" in line
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{name}\n" for name in sorted(gone)[1:]))
    assert "found 4 others (sha256 " in run_bad(*inputs, "--exclude", other)
    assert not (tmp_path / "p.json").exists()
    run_ok(*inputs, "--everything")
    assert json.loads((tmp_path / "p.json").read_text())["scores"]["pairs"] == 24
    run_ok(*inputs, "--everything", "--exclude", listed)
    assert json.loads((tmp_path / "p.json").read_text())["scores"]["pairs"] == 19


def test_ids_that_training_saw_are_left_out_of_what_is_judged_alone(chain, lacking, tmp_path):
    gone, listed, _ = lacking
    codes, mask, ids = grids(chain)
    left = np.array([name not in gone for name in ids])
    told = of_prior(chain, tmp_path, exclude=listed)
    assert told["pairs"] == (mask & left).sum() < mask.sum()
    assert told["image_nats_unigram"] == pytest.approx(unigram(codes, ~mask, mask & left))


def test_a_dvae_is_judged_without_them(chain, lacking, tmp_path, capsys):
    gone, listed, folder = lacking
    images, shown, ids = rebuilt(chain)
    left = torch.tensor([name not in gone for name in ids])
    mask = torch.tensor([held_out(name, SHARE) for name in ids])
    told = of_dvae(chain, tmp_path, exclude=listed)
    assert (told["images"], told["exclude"]) == (19, 5)
    assert told["psnr"] == pytest.approx(psnr(squared_error(images[left], shown[left])).mean().item(), abs=1e-9)
    assert told["held_out"]["images"] == int((left & mask).sum()) < int(mask.sum())
    weights = open_artifact(folder / "dvae.safetensors")
    capsys.readouterr()
    told = of_dvae(chain, tmp_path, weights=weights, exclude=listed)
    assert told["held_out"]["images"] == int((left & mask).sum())
    assert "warning" not in capsys.readouterr().err
    told = of_dvae(chain, tmp_path, weights=weights)
    assert (told["images"], told["trained_on"], "held_out" in told) == (24, True, False)
    assert "warning: expected --exclude with the ids that training left out" in capsys.readouterr().err


def test_pairs_that_were_all_held_out_are_said_to_be(chain, tmp_path):
    """Captions of the held-out pictures alone, as of a test set cut off beforehand."""
    codes, mask, _ = grids(chain)
    old = open_artifact(chain.captions)
    kept = [i for i, name in enumerate(old.strings("ids")) if held_out(name, SHARE)]
    columns = {name: np.asarray(old.array(name))[kept] for name in old.columns}
    strings = {name: [old.strings(name)[i] for i in kept] for name in ("ids", "text")}
    told = of_prior(chain, tmp_path, captions=changed(chain.captions, tmp_path / "c.safetensors", **columns, **strings))
    expected = of_prior(chain, tmp_path)
    assert (told["held_out"], told["pairs"], told["image_nats"]) == (True, mask.sum(), expected["image_nats"])
    own = [np.delete(np.flatnonzero(mask), i) for i in range(mask.sum())]  # nothing else is there to count
    each = [unigram(codes, seen, row) for seen, row in zip(own, np.flatnonzero(mask), strict=True)]
    assert told["image_nats_unigram"] == pytest.approx(np.mean(each))


def test_scores_that_are_no_numbers_are_refused_in_a_line(chain, tmp_path):
    from safetensors.torch import load_file

    old = open_artifact(chain.prior)
    tensors = {name: np.full_like(tensor.numpy(), np.nan) for name, tensor in load_file(chain.prior).items()}
    write_artifact(tmp_path / "nan.safetensors", old.kind, tensors, old.config, old.history)
    inputs = ("evaluate", tmp_path / "nan.safetensors", chain.captions, chain.codes, "-o", tmp_path / "p.json")
    assert "found NaN or infinity" in run_bad(*inputs)
    assert not (tmp_path / "p.json").exists()


def test_options_of_something_else_are_refused(chain, tmp_path):
    dvae = ("evaluate", chain.dvae, "--reference", chain.data, "-o", tmp_path / "s.json")
    prior = ("evaluate", chain.prior, chain.captions, chain.codes, "-o", tmp_path / "s.json")
    for option in (("--blur", "0,1"), ("--scores", "clip"), ("-k", 3), ("--size", 8), ("--plot", "x.png")):
        assert "for a dVAE, found it; leave it out" in run_bad(*dvae, *option)
    for option in (("--reference", chain.data), ("--features", chain.clip), ("--grid", "x.png"), ("--blur", "1")):
        assert "for a prior, found it; leave it out" in run_bad(*prior, *option)
    assert "expected no --everything for a dVAE" in run_bad(*dvae, "--everything")


# The command


def test_evaluate_tells_by_kind(chain, tmp_path):
    out = run_ok("evaluate", chain.dvae, "--reference", chain.data, "-o", tmp_path / "d.json", "--device", "cpu")
    scores = json.loads((tmp_path / "d.json").read_text())["scores"]
    assert out == str(tmp_path / "d.json")
    assert scores["psnr"] == pytest.approx(of_dvae(chain, tmp_path)["psnr"], rel=1e-6)
    inputs = (chain.prior, chain.captions, chain.codes)
    run_ok("evaluate", *inputs, "-o", tmp_path / "p.json", "--device", "cpu", "--plot", tmp_path / "p.png")
    scores = json.loads((tmp_path / "p.json").read_text())["scores"]
    assert scores["image_nats"] == pytest.approx(of_prior(chain, tmp_path)["image_nats"], rel=1e-5)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_features_reach_the_judge_of_a_dvae(chain, tmp_path):
    told = {}
    for name, more in (("with", ("--features", chain.clip)), ("without", ())):
        out = tmp_path / f"{name}.json"
        run_ok("evaluate", chain.dvae, "--reference", chain.data, "-o", out, "--device", "cpu", *more)
        told[name] = json.loads(out.read_text())["scores"]
    assert "frechet" not in told["without"]
    expected = of_dvae(chain, tmp_path, features=str(chain.clip))["frechet"]
    assert told["with"]["frechet"] == {**expected, "value": pytest.approx(expected["value"], rel=1e-5)}
