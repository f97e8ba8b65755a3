"""`generate` holds the best only; `sample --from` draws again; guided parts of the grid; batches as memory allows."""

import contextlib
import itertools
import json
import shutil
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from artifact_files import array, strings
from conftest import run_bad, run_cli, run_ok
from hypothesis import given
from hypothesis import strategies as st

from dalle_cli import console
from dalle_cli.artifacts import open_artifact, write_artifact
from dalle_cli.errors import DalleError
from dalle_cli.models.cache import FEW
from dalle_cli.models.packed import pack
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.pipelines import load, loading, pipeline
from dalle_cli.pipelines.codec import Codec
from dalle_cli.pipelines.prior import TokenPrior
from dalle_cli.pipelines.prompts import Candidate
from dalle_cli.pipelines.ranking import TopK, best
from dalle_cli.sampling import autoregressive, memory

PROMPT, OTHER = "a red circle on white", "a blue bar on black"


def generate(chain, folder, *more, n=12, prompts=(PROMPT,)):
    out = ("-o", folder / "a.png", "--images", folder / "a.safetensors")
    return run_cli("generate", *prompts, "-n", n, "-m", chain.model, *more, *out)


@pytest.fixture(scope="module")
def piped(chain, tmp_path_factory):
    """The four stages one after another: 12 candidates of two prompts, the best three of each."""
    folder = tmp_path_factory.mktemp("piped")
    codes, images, best = (folder / f"{name}.safetensors" for name in ("codes", "images", "best"))
    run_ok("sample", PROMPT, OTHER, "-n", 12, "-m", chain.model, "-o", codes)
    run_ok("decode", codes, "-m", chain.model, "-o", images)
    run_ok("rerank", images, "-m", chain.model, "--keep", 3, "-o", best)
    run_ok("show", best, "-o", folder / "best.png")
    return folder


# ---- generate in bounded memory


@pytest.mark.parametrize("batch_size", [1, 5, 12, 64, "auto"])
def test_generate_is_the_four_stages(chain, piped, tmp_path, monkeypatch, batch_size):
    monkeypatch.setattr(pipeline, "AT_ONCE", 4)
    result = generate(chain, tmp_path, "--keep", 3, "--batch-size", batch_size, prompts=(PROMPT, OTHER))
    assert (result.status, result.stdout) == (0, f"{tmp_path / 'a.png'}\n"), result.stderr
    made, best = tmp_path / "a.safetensors", piped / "best.safetensors"
    assert strings(made, "ids") == strings(best, "ids")
    assert strings(made, "text") == strings(best, "text") == [PROMPT] * 3 + [OTHER] * 3
    np.testing.assert_allclose(array(made, "images").astype(int), array(best, "images").astype(int), atol=1)
    np.testing.assert_allclose(array(made, "score"), array(best, "score"), atol=1e-6)
    if batch_size == 12:
        assert (tmp_path / "a.png").read_bytes() == (piped / "best.png").read_bytes()


def test_without_options_the_best_four_of_eight_are_kept_and_a_terminal_shows_them(chain, tmp_path, monkeypatch):
    common = ("generate", PROMPT, "-m", chain.model)
    run_ok(*common, "-o", tmp_path / "a.png", "--images", tmp_path / "a.safetensors")
    run_ok(*common, "-n", 8, "--keep", 4, "-o", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert len(strings(tmp_path / "a.safetensors", "ids")) == 4
    assert "kept 2, of 2" in run_cli(*common, "-n", 2, "-o", tmp_path / "c.png").stderr
    shown = {}
    for terminal in (False, True):
        monkeypatch.setattr("os.isatty", lambda _, terminal=terminal: terminal)
        for more in ((), ("--terminal",), ("--no-terminal",)):
            shown[terminal, more] = "▀" in run_cli(*common, "-n", 2, *more, "-o", tmp_path / "d.png", "--force").stderr
    assert shown == {(t, m): m == ("--terminal",) or (t and m == ()) for t, m in shown}


def most_alive(monkeypatch, prior, decoder, run, method="decode"):
    """How many arrays of latents and images were alive at a time, and how many there were in all."""
    refs, most = [], 0

    class Watched(np.ndarray):
        pass

    def watch(made):
        nonlocal most
        refs.append(weakref.ref(array := made.view(Watched)))
        most = max(most, sum(ref() is not None for ref in refs))
        return array

    with monkeypatch.context() as patched:
        patched.setattr(decoder, method, lambda *a, decode=getattr(decoder, method): watch(decode(*a)))
        sample = prior.sample
        patched.setattr(prior, "sample", lambda *a, **k: map(watch, sample(*a, **k)))
        assert run().status == 0
    return most, len(refs)


def test_nothing_of_the_others_is_alive(chain, tmp_path, monkeypatch):
    """Codes and images of whole batches: no more are alive of 60 candidates than of 12."""
    few, many = (
        most_alive(
            monkeypatch, TokenPrior, Codec, lambda n=n: generate(chain, tmp_path, "--keep", 2, "--batch-size", 4, n=n)
        )
        for n in (12, 60)
    )
    assert few[0] == many[0] <= 4  # codes and images of this batch, and of the one before it


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_the_top_holds_no_more_than_it_keeps(order):
    def peak(n_batches):
        top = TopK(2)
        tracemalloc.start()
        for batch in range(n_batches):
            rows = [Candidate("x", 0, 4 * batch + k) for k in range(4)]
            scores = np.arange(4, dtype=np.float32) + 4 * batch
            top.add(rows, scores if order == "rising" else -scores, np.zeros((4, 3, 64, 64), np.uint8))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(100) < peak(5) + 3 * 64 * 64  # less than one picture more
    assert peak(100) < 10 * 3 * 64 * 64


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("ab")), min_size=1, max_size=20), st.integers(0, 4))
def test_the_top_ranks_as_rerank_does(rows, keep):
    scores = np.array([score for score, _ in rows], dtype=np.float32)
    texts = [text for _, text in rows]
    top = TopK(keep)
    for at in range(0, len(rows), 3):
        own = [Candidate(texts[i], 0, i) for i in range(at, min(at + 3, len(rows)))]
        top.add(own, scores[at : at + 3], np.zeros((len(own), 3, 1, 1), np.uint8))
    assert [one.candidate.number for one in top.ranked()] == best(scores, texts, keep).tolist()
    assert top.best() == scores.max()


def interrupt(monkeypatch, decoder, call, method="decode"):
    """Ctrl-C while the batch of this number, from 1, is decoded."""
    calls, decode = [], getattr(decoder, method)

    def stop(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return decode(*arguments)

    monkeypatch.setattr(decoder, method, stop)


def test_an_interrupt_keeps_the_best_so_far(chain, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    assert generate(chain, tmp_path / "whole", "--keep", 2, n=8).status == 0
    interrupt(monkeypatch, Codec, 3)
    result = generate(chain, tmp_path, "--keep", 2, "--batch-size", 4)
    assert (result.status, result.stdout) == (130, f"{tmp_path / 'a.png'}\n")
    assert "interrupted: these are the best of the first 8 of 12" in result.stderr
    made, whole = tmp_path / "a.safetensors", tmp_path / "whole/a.safetensors"
    assert strings(made, "ids") == strings(whole, "ids")
    np.testing.assert_allclose(array(made, "score"), array(whole, "score"), atol=1e-6)
    assert open_artifact(made).history[-1]["options"]["seen"] == 8
    assert "seen" not in open_artifact(whole).history[-1]["options"]


def test_an_interrupt_before_the_first_batch_leaves_nothing(chain, tmp_path, monkeypatch):
    interrupt(monkeypatch, Codec, 1)
    result = generate(chain, tmp_path, "--batch-size", 4)
    assert (result.status, result.stdout) == (130, "")
    assert list(tmp_path.iterdir()) == []


# ---- a bundle without a CLIP that reads images


@pytest.fixture(scope="module", params=["none", "text"])
def unranked(chain, tmp_path_factory, request):
    """The chain's bundle without its CLIP, or with the text encoder of one alone."""
    folder = tmp_path_factory.mktemp("unranked") / "model"
    shutil.copytree(chain.model, folder, ignore=shutil.ignore_patterns("*.run", "clip*"))
    if request.param == "text":
        clip = open_artifact(chain.clip)
        header = {**clip.config, "model": {**clip.config["model"], "vision_layers": 0}}
        write_artifact(folder / "clip.safetensors", "weights.clip", {"logit_scale": np.float32([1])}, header, [])
    return folder


def test_without_a_clip_all_are_kept_as_they_were_sampled(chain, unranked, tmp_path):
    for folder in ("plain", "ranked"):
        (tmp_path / folder).mkdir()
    out = ("-o", tmp_path / "plain" / "a.png", "--images", tmp_path / "plain" / "a.safetensors")
    result = run_cli("generate", PROMPT, OTHER, "-n", 6, "-m", unranked, *out)
    assert result.status == 0, result.stderr
    assert "nothing ranks them: all are kept" in result.stderr
    assert "kept 12, of 12" in result.stderr
    assert "best" not in result.stderr
    assert generate(chain, tmp_path / "ranked", "--keep", 0, n=6, prompts=(PROMPT, OTHER)).status == 0
    plain, ranked = tmp_path / "plain/a.safetensors", tmp_path / "ranked/a.safetensors"
    ids = strings(plain, "ids")
    assert ids == sorted(ids)
    assert "score" not in open_artifact(plain)
    assert open_artifact(plain).history[-1]["inputs"].keys() == {"dvae"}
    order = [strings(ranked, "ids").index(name) for name in ids]
    np.testing.assert_array_equal(array(plain, "images"), array(ranked, "images")[order])


def test_without_a_clip_the_first_are_kept(unranked, tmp_path, caplog):
    model = load(str(unranked))
    images = model.generate([PROMPT, OTHER], n=4, keep=2)
    assert caplog.messages == [
        "no CLIP in model reads images, so nothing ranks them: the first 2 of each prompt are kept"
    ]
    assert [image.info["candidate"] for image in images] == [0, 1] * 2
    assert [image.score for image in images] == [None] * 4
    caplog.clear()
    assert len(model.generate(PROMPT, n=1)) == 1
    assert caplog.messages == []
    with pytest.raises(DalleError, match="expected "):
        model.scorer  # noqa: B018


def reported(monkeypatch):
    """What the console's progress gets: (total, unit), then (candidates, metrics) each time."""
    calls = []

    @contextlib.contextmanager
    def progress(label, total, done=0, unit=""):
        calls.append((total, {"unit": unit}))
        yield lambda n=1, /, **metrics: calls.append((n, metrics))

    monkeypatch.setattr(console, "progress", progress)
    return calls


def check_progress(calls, images):
    assert calls[0] == (12, {"unit": "candidates"})
    assert sum(n for n, _ in calls[1:]) == 12
    bests = [metrics["best"] for _, metrics in calls[1:] if "best" in metrics]
    assert bests == sorted(bests)
    assert bests[-1] == array(images, "score").max()
    assert not any("batch" in metrics for _, metrics in calls)


def test_progress_tells_of_candidates_and_the_best(chain, tmp_path, monkeypatch):
    calls = reported(monkeypatch)
    assert generate(chain, tmp_path, "--keep", 2, "--batch-size", 5).status == 0
    check_progress(calls, tmp_path / "a.safetensors")


# ---- sample --from


SETTINGS = ("--temperature", 0.8, "--top-k", 15, "--guidance", 3, "--guidance-to", 0.5, "--seed", 5)


@pytest.fixture(scope="module")
def sampled(chain, tmp_path_factory):
    path = tmp_path_factory.mktemp("sampled") / "x.codes.safetensors"
    run_ok("sample", PROMPT, OTHER, "-n", 10, "-m", chain.model, "-o", path, *SETTINGS)
    return path


def again(chain, source, out, *more):
    return run_ok("sample", "--from", source, "-m", chain.model, "-o", out, *more)


def test_rows_are_sampled_again(chain, sampled, tmp_path):
    made = again(chain, sampled, tmp_path / "y.safetensors", "--rows", "3,17,0")
    for name in ("codes", "prompt", "seed"):
        assert array(made, name).tobytes() == array(sampled, name)[[3, 17, 0]].tobytes()
    for name in ("ids", "text"):
        assert strings(made, name) == [strings(sampled, name)[row] for row in (3, 17, 0)]
    assert open_artifact(made).config == open_artifact(sampled).config
    first, last = open_artifact(sampled).history[-1], open_artifact(made).history[-1]
    assert first in open_artifact(made).history
    assert last["options"] == {**first["options"], "rows": "3,17,0"}
    assert last["inputs"] == {"model": first["inputs"]["model"], "drawn": open_artifact(sampled).digest}
    third = again(chain, made, tmp_path / "z.safetensors", "--rows", 1)  # and what was sampled again, once more
    assert array(third, "codes").tobytes() == array(sampled, "codes")[[17]].tobytes()
    whole = again(chain, sampled, tmp_path / "w.safetensors", "--batch-size", 3)
    assert array(whole, "codes").tobytes() == array(sampled, "codes").tobytes()


def test_an_option_that_differs_is_heeded(chain, sampled, tmp_path):
    made = again(chain, sampled, tmp_path / "y.safetensors", "--rows", "3,17", "--temperature", 2, "--top-k", 0)
    assert not np.array_equal(array(made, "codes"), array(sampled, "codes")[[3, 17]])
    options = open_artifact(made).history[-1]["options"]
    assert (options["temperature"], options["top_k"], options["guidance"], options["guidance_to"]) == (2, 0, 3, 0.5)
    seeded = again(chain, sampled, tmp_path / "z.safetensors", "--rows", "3", "--seed", 6)
    assert array(seeded, "seed").tolist() == [6]
    assert not np.array_equal(array(seeded, "codes"), array(sampled, "codes")[[3]])
    same = again(chain, sampled, tmp_path / "w.safetensors", "--rows", "3", "--temperature", 0.8)
    assert np.array_equal(array(same, "codes"), array(sampled, "codes")[[3]])


def test_int8_is_heeded_again_and_can_be_left_out(chain, sampled, tmp_path):
    eight = again(chain, sampled, tmp_path / "x.safetensors", "--rows", "3,17", "--int8")
    assert open_artifact(eight).history[-1]["options"]["int8"] is True
    kept = again(chain, eight, tmp_path / "y.safetensors")
    assert open_artifact(kept).history[-1]["options"]["int8"] is True
    assert array(kept, "codes").tobytes() == array(eight, "codes").tobytes()
    without = again(chain, eight, tmp_path / "z.safetensors", "--no-int8")
    assert "int8" not in open_artifact(without).history[-1]["options"]
    assert array(without, "codes").tobytes() == array(sampled, "codes")[[3, 17]].tobytes()


def test_another_prior_is_refused(chain, sampled, tmp_path):
    shutil.copytree(chain.model, tmp_path / "model", ignore=shutil.ignore_patterns("*.run"))
    prior = open_artifact(chain.prior)
    tensors = {name: np.array(prior.headers[0].map(name)) for name in prior.headers[0].tensors}
    tensors["start"] = tensors["start"] + 1
    write_artifact(tmp_path / "model/prior.safetensors", prior.kind, tensors, prior.config, prior.history)
    out = ("-o", tmp_path / "y.safetensors")
    error = run_bad("sample", "--from", sampled, "--rows", 3, "-m", tmp_path / "model", *out)
    assert f"expected the prior that {sampled} was made with (sha256 {prior.digest[:12]})" in error
    assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--rows", "20"), "expected --rows from 0 to 19, found 20"),
        (("--rows", "-1"), "expected --rows from 0 to 19, found -1"),
        (("--rows", "3;4"), "expected --rows as 3,17, found '3;4'"),
        (("-n", 4), "found -n"),
        ((PROMPT,), "found a prompt"),
        (("--temperature", "nan"), "temperature"),
    ],
)
def test_what_cannot_be_sampled_again_is_refused(chain, sampled, tmp_path, more, message):
    line = run_bad("sample", "--from", sampled, *more, "-m", chain.model, "-o", tmp_path / "y.safetensors")
    assert message in line


def test_codes_that_were_not_sampled_are_refused(chain, sampled, tmp_path):
    out = ("-m", chain.model, "-o", tmp_path / "y.safetensors")
    assert "that `sample` wrote" in run_bad("sample", "--from", chain.codes, *out)
    assert "expected --from beside --rows" in run_bad("sample", PROMPT, "--rows", 3, *out)
    assert "over itself" in run_bad("sample", "--from", sampled, "-m", chain.model)
    lying = open_artifact(sampled)
    columns = {name: np.array(lying.array(name)) for name in ("codes", "prompt", "seed")}
    columns |= {name: list(lying.strings(name)) for name in ("ids", "text")}
    for change in ({"seed": columns["seed"] + 1}, {"ids": ["x"] * 20}, {"prompt": columns["prompt"] + 1}):
        path = tmp_path / "lying.safetensors"
        write_artifact(path, "codes", {**columns, **change}, lying.config, lying.history)
        assert "expected a row of one sampling" in run_bad("sample", "--from", path, "--rows", 2, *out)
    for options in ({"temperature": "hot"}, {"unheard_of": 1}, {"dtype": 3}, {"top_k": -1}):
        entry = {**lying.history[-1], "options": {**lying.history[-1]["options"], **options}}
        write_artifact(path, "codes", columns, lying.config, [*lying.history[:-1], entry])
        run_bad("sample", "--from", path, "--rows", 2, *out)


# ---- guidance by part of the grid


def test_the_guided_part_is_written_down_and_matters(chain, tmp_path):
    def codes(name, *more):
        run_ok("sample", PROMPT, "-n", 6, "-m", chain.model, "-o", tmp_path / name, "--guidance", 300, *more)
        return array(tmp_path / name, "codes"), open_artifact(tmp_path / name).history[-1]["options"]

    whole, told = codes("a")
    assert "guidance_from" not in told
    late, told = codes("b", "--guidance-from", 0.5)
    assert (told["guidance_from"], told["guidance_to"]) == (0.5, 1.0)
    early, _ = codes("c", "--guidance-to", 0.5)
    assert not np.array_equal(whole, late)
    assert np.array_equal(whole[:, :2], early[:, :2])  # of 4 x 4 codes the first half is sampled alike
    assert not np.array_equal(whole[:, 2:], early[:, 2:])
    out = ("-m", chain.model, "-o", tmp_path / "d")
    assert "exchange them" in run_bad("sample", PROMPT, *out, "--guidance-from", 0.6, "--guidance-to", 0.5)
    result = generate(chain, tmp_path, "--guidance", 300, "--guidance-from", 0.5, n=2)
    assert result.status == 0
    assert '"guidance_from": 0.5' in json.dumps(open_artifact(tmp_path / "a.safetensors").history)


# ---- batches as memory allows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_bytes_of_a_candidate_cover_its_caches(guided, own, dtype):
    sizes = {"n_layer": 6, "n_head": 4, "n_embd": 64, "n_text_vocab": 9, "n_text": 40, "n_image_vocab": 8, "grid": 16}
    prior = pack(Prior(PriorConfig(**sizes)).eval().requires_grad_(False), 8, dtype)

    def held(candidates):
        rows = candidates if own else 1
        tokens = torch.zeros(rows, prior.config.n_text, dtype=torch.int64)
        prompt = autoregressive._prefill(prior, tokens, torch.ones(rows, dtype=torch.int64))
        null = autoregressive._prefill(prior, tokens[:1], torch.zeros(1, dtype=torch.int64)) if guided else None
        cache = autoregressive._open(prior, prompt, null, candidates // rows)
        layers = [x for y in cache.layers for x in (y.keys, y.values, y.text_keys, y.text_values)]
        return sum(x.nbytes for x in (cache.logits, *layers))

    more = (held(24) - held(16)) / 8
    assert more < memory.candidate_bytes(prior, guided, own, dtype) < 2 * more
    assert held(2) - held(1) < memory.candidate_bytes(prior, guided, own, torch.float32)  # which few are kept in


def test_bytes_of_a_candidate_cover_the_reading_of_its_caption():
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_text_vocab": 9, "n_text": 64, "n_image_vocab": 8, "grid": 2}
    prior = Prior(PriorConfig(**sizes)).eval().requires_grad_(False)

    def held(captions):
        tokens, lengths = torch.zeros(captions, 64, dtype=torch.int64), torch.ones(captions, dtype=torch.int64)
        with torch.profiler.profile(profile_memory=True) as profiler:
            autoregressive._prefill(prior, tokens, lengths)
        told = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        return max(itertools.accumulate(event.nbytes() for event in sorted(told, key=lambda event: event.start_ns())))

    more = (held(24) - held(16)) / 8
    assert more < memory.candidate_bytes(prior, False, True, torch.float32) < 2 * more


def test_the_batch_is_as_large_as_fits(chain, monkeypatch):
    prior = loading.prior(open_artifact(chain.prior), torch.device("cpu"))
    for dtype, some in ((torch.float32, 10), (torch.bfloat16, 30)):
        each = memory.candidate_bytes(prior, True, False, dtype)
        cases = ((0, 9, 1), (2 * some * each, 99, some), (2 * some * each, 4, 4), (10**15, 10**6, memory.CAP))
        for free, n, expected in cases:
            monkeypatch.setattr(memory, "free_memory", lambda _, free=free: free)
            assert memory.fitting_batch(prior, n, True, False, dtype) == expected
        assert each > memory.candidate_bytes(prior, False, False, dtype)


def test_so_few_that_their_caches_are_float32(chain, monkeypatch):
    prior = loading.prior(open_artifact(chain.prior), torch.device("cpu"))
    few = (FEW - 1) // prior.config.n_head
    half, whole = (memory.candidate_bytes(prior, False, False, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert half < whole
    monkeypatch.setattr(memory, "free_memory", lambda _: 2 * few * half)
    assert memory.fitting_batch(prior, 99, False, False, torch.bfloat16) == few * half // whole
    monkeypatch.setattr(memory, "free_memory", lambda _: 2 * (few + 1) * half)
    assert memory.fitting_batch(prior, 99, False, False, torch.bfloat16) == few + 1


def test_free_memory_is_what_the_machine_tells(tmp_path):
    assert 0 < memory.free_memory(torch.device("cpu")) < 2**50
    for name, text in (
        ("memory.max", "1000"),
        ("memory.current", "700"),
        ("memory.stat", "anon 600\ninactive_file 50"),
    ):
        (tmp_path / name).write_text(text)
    assert memory._left_to_the_group(tmp_path) == 350
    (tmp_path / "memory.max").write_text("max")
    assert memory._left_to_the_group(tmp_path) is None
    assert memory._left_to_the_group(tmp_path / "none") is None


def test_auto_changes_no_result_and_is_silent(chain, tmp_path, monkeypatch):
    told = []
    fitting = memory.fitting_batch
    monkeypatch.setattr(memory, "fitting_batch", lambda *a: told.append(fitting(*a)) or 3)
    run_ok("sample", PROMPT, "-n", 7, "-m", chain.model, "-o", tmp_path / "a")
    assert told == []
    result = run_cli("sample", PROMPT, "-n", 7, "-m", chain.model, "-o", tmp_path / "b", "--batch-size", "auto")
    assert told == [7]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert result.stderr.splitlines() == ["b: prompts 1, samples 7"]
    for wrong in ("0", "-3", "many"):
        assert run_cli("sample", PROMPT, "-m", chain.model, "--batch-size", wrong).status == 2
