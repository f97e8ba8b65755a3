"""The stages between artifacts: sample, decode, rerank. Each reads files, writes a file, and returns its metrics.

Shapes: N rows, B of them in a batch, H W code grid, D embedding width, S side of the images in pixels.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle_cli.artifacts import Artifact, ShardWriter, history, open_artifact, write_artifact
from dalle_cli.artifacts.container import check_replaceable
from dalle_cli.config import build
from dalle_cli.devices import Arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles
from dalle_cli.options import AUTO, DecoderOptions, InpaintingOptions, SamplingOptions, given, refuse_given
from dalle_cli.pipelines.clip import ClipScorer
from dalle_cli.pipelines.codec import Codec
from dalle_cli.pipelines.decoder import ImageDecoder
from dalle_cli.pipelines.inpainting import InpaintingMask, read_mask, repeat_options
from dalle_cli.pipelines.prior import PRIORS, open_prior
from dalle_cli.pipelines.prompts import Candidate, Progress, Quiet, batched, columns
from dalle_cli.pipelines.ranking import best, check_keep

Metrics = dict[str, Any]


def sample(
    rows: Sequence[Candidate], n: int, options: SamplingOptions, model: str | None, out: Path, *,
    machine: Arithmetic, inpainting: InpaintingOptions | None = None, batch_size: int = 64, compiled: bool = False,
    force: bool = False, past: Artifact | None = None, picked: str | None = None, progress: Progress = Quiet,
) -> Metrics:  # fmt: skip
    """Sample latents of candidates and write them; `past` are the codes of which the rows `picked` are sampled again.

    Raises:
        DalleError: no prior, an option that it does not have, or something else at `out`.
    """
    kinds = (PRIORS["codes"],) if past is not None else tuple(PRIORS.values())
    weights = bundles.weights(model, *kinds)
    if past is not None:
        bundles.check_digest("prior", weights.digest, entry(past)["inputs"].get("model", ""), past.path)
    inpainting = inpainting or InpaintingOptions()
    if weights.kind != PRIORS["codes"]:
        refuse_given(inpainting, "a prior over embeddings")
        refuse_given(options, "a prior over embeddings", "int8", "sketch_guidance")
    prior = open_prior(weights, machine, model)
    settings = prior.settings(options)
    check_replaceable(out, prior.kind, force)
    mask = open_mask(inpainting, prior, model, machine)
    at_once = prior.batch_size(rows, settings, batch_size)
    shown = {"batch": at_once} if batch_size == AUTO else {}
    with progress("sample", len(rows) * prior.n_parts, unit=prior.kind) as advance:
        how: dict[str, Any] = {"mask": mask, "batch_size": at_once, "compiled": compiled}
        batches = prior.sample(rows, options, **how, progress=lambda k: advance(k, **shown))
        latents = np.concatenate(list(batches))
    made = prior.history(n, options, mask, past, picked)
    write_artifact(out, prior.kind, {prior.kind: latents, **columns(rows, settings["seed"])}, prior.header, made, force)
    return {"prompts": len({row.prompt for row in rows}), "samples": len(rows), "of_image": mask}


def latents_of(model: str | None) -> str:
    """What the prior of a model samples: `codes` or `embeddings`."""
    return bundles.weights(model, *PRIORS.values()).kind.removeprefix("weights.prior.")


def open_mask(options: InpaintingOptions, prior: Any, model: str | None, machine: Arithmetic) -> InpaintingMask | None:
    """The mask of an image, encoded by the dVAE of `model`, which must be the prior's; None without an image."""
    options.check()
    if options.image is None:
        return None
    dvae = bundles.weights(model, "weights.dvae")
    return read_mask(options, Codec.of(dvae, prior.encoder, prior.weights.path, machine))


def entry(past: Artifact) -> dict[str, Any]:
    """What the history of codes says of their sampling."""
    found: dict[str, Any] = past.history[-1] if past.history else {}
    return found


def sample_again(
    source: Path, rows: str | None, options: SamplingOptions, inpainting: InpaintingOptions
) -> tuple[Artifact, list[Candidate], SamplingOptions, InpaintingOptions, str | None]:
    """What `sample` wrote, the candidates of some rows of it, and its settings under the options given; its dtype.

    Raises:
        DalleError: codes that were not sampled, or a way of saying what to sample beside --from.
    """
    past = open_artifact(source, "codes")
    if not all(name in past for name in ("prompt", "seed", "text")) or entry(past).get("stage") != "sample":
        raise DalleError(f"expected codes that `sample` wrote, found others in {source}; give --from another file")
    inpainting = repeat_options(inpainting, entry(past), source)
    recorded = entry(past)["options"]
    before = {name: value for name, value in recorded.items() if name not in ("n", "dtype", "rows", "keep_rows")}
    again = build(SamplingOptions, {**before, **given(options)}, "sample")
    return past, past_candidates(past, rows), again, inpainting, str(recorded.get("dtype", "float32"))


def past_candidates(past: Artifact, rows: str | None) -> list[Candidate]:
    """The candidates of these rows, counted from 0, or of all.

    Raises:
        DalleError: no such row, or one that is not of the file's own sampling.
    """
    try:
        picked = range(len(past)) if rows is None else [int(number) for number in rows.split(",")]
    except ValueError:
        raise DalleError(f"expected --rows as 3,17, found {rows!r}") from None
    if not picked or not 0 <= min(picked) <= max(picked) < len(past):
        raise DalleError(f"expected --rows from 0 to {len(past) - 1}, found {rows}; the file has {len(past)}")
    ids, text, seed = past.strings("ids"), past.strings("text"), entry(past)["options"].get("seed")
    prompts, seeds = np.asarray(past.array("prompt")), np.asarray(past.array("seed"))
    found = []
    for row in picked:
        number = re.fullmatch(r"(\d{5,9})-(\d{5,9})", ids[row])
        if number is None or int(number[1]) != prompts[row] or seeds[row] != seed:
            raise DalleError(f"expected a row of one sampling, found {ids[row]!r} of seed {seeds[row]} in {past.path}")
        found.append(Candidate(text[row], int(number[1]), int(number[2])))
    return found


def decode(
    latents: Artifact, model: str | None, out: Path, *, machine: Arithmetic, options: DecoderOptions | None = None,
    seed: int | None = None, batch_size: int = 64, shard_size: int = 4096, force: bool = False,
    progress: Progress = Quiet,
) -> Metrics:  # fmt: skip
    """Decode codes with a dVAE, or embeddings with a diffusion decoder, to an artifact of images.

    Raises:
        DalleError: weights that did not make the latents, or options that are for embeddings.
    """
    options = options or DecoderOptions()
    if latents.kind == "codes":
        size, made, decoded = _decode_codes(latents, model, machine, options, seed)
    else:
        size, made, decoded = _decode_embeddings(latents, model, machine, options, seed)
    writer = ShardWriter(out, "images", len(latents), shard_size, {}, made, force)
    ids, text = latents.strings("ids"), latents.strings("text") if "text" in latents else None
    with progress("decode", len(latents), unit="images") as advance:
        for shard in writer.missing():
            start, stop = writer.bounds(shard)
            pixels = np.empty((stop - start, 3, size, size), dtype=np.uint8)
            for rows in batched(stop - start, batch_size):
                pixels[rows] = decoded(start + rows.start, start + rows.stop)
                advance(rows.stop - rows.start)
            table = {"images": pixels, "ids": ids[start:stop]}
            writer.write(shard, table if text is None else {**table, "text": text[start:stop]})
    return {"images": len(latents) if writer.wrote else "all there already"}


Decoded = tuple[int, list[dict[str, Any]], Callable[[int, int], Any]]  # size, history, images of rows


def _decode_codes(
    codes: Artifact, model: str | None, machine: Arithmetic, options: DecoderOptions, seed: int | None
) -> Decoded:
    refuse_given(options, f"codes, as {codes.path} holds")
    if seed is not None:
        raise DalleError(f"expected no --seed for codes, as {codes.path} holds, found one; leave it out")
    codec = Codec.of(bundles.weights(model, "weights.dvae"), codes.require("encoder", str), codes.path, machine)
    grids, made = codes.array("codes"), history("decode", {"dtype": machine.name}, codes=codes, model=codec.weights)
    return codec.size, made, lambda start, stop: codec.decode(grids[start:stop])


def _decode_embeddings(
    embeddings: Artifact, model: str | None, machine: Arithmetic, options: DecoderOptions, seed: int | None
) -> Decoded:
    decoder = ImageDecoder(model, machine, options, seed or 0)
    decoder.check(embeddings)
    table, texts = embeddings.array("embeddings"), embeddings.strings("text") if "text" in embeddings else None
    made = history("decode", decoder.settings, embeddings=embeddings, **decoder.inputs)

    def decoded(start: int, stop: int) -> Any:
        captions = None if texts is None else texts[start:stop]
        return decoder.decode(table[start:stop], range(start, stop), captions)

    return decoder.size, made, decoded


def rerank(
    images: Artifact, model: str | None, out: Path, *, machine: Arithmetic, keep: int = 0, prompt: str | None = None,
    by: str = "clip", codes: Path | None = None, batch_size: int = 64, force: bool = False,
    progress: Progress = Quiet,
) -> Metrics:  # fmt: skip
    """Score images against their texts (or one prompt), by CLIP or by a prior, and write the best of each text.

    Raises:
        DalleError: no texts, no images, fewer than are to be kept, or something else at `out`.
    """
    if by not in ("clip", "prior", "contrast"):
        raise DalleError(f"expected --by clip, prior or contrast, found {by!r}")
    if codes is not None and by == "clip":
        raise DalleError("expected --by prior or contrast beside --codes, found clip; leave --codes out")
    if prompt is None and "text" not in images:
        raise DalleError(f"expected images with their prompts, found none in {images.path}; give --prompt")
    if not len(images):
        raise DalleError(f"expected images to rank, found none in {images.path}")
    texts = [prompt] * len(images) if prompt is not None else list(images.strings("text"))
    check_keep(texts, keep)
    check_replaceable(out, "images", force)
    ranked, score, inputs = _scorer(by, model, machine, images, codes)
    ids = images.strings("ids")
    scores = np.empty(len(images), dtype=np.float32)
    with progress("rerank", len(images), unit="images") as advance:
        for rows in batched(len(images), batch_size):
            scores[rows] = score(ranked[rows], texts[rows])
            advance(rows.stop - rows.start)
    order = best(scores, texts, keep)
    table = {
        "images": np.asarray(images.array("images")[order]),
        "score": scores[order],
        "ids": [ids[int(row)] for row in order],
        "text": [texts[int(row)] for row in order],
    }
    options = {"keep": keep, "prompt": prompt, "dtype": machine.name} | ({} if by == "clip" else {"by": by})
    write_artifact(out, "images", table, {}, history("rerank", options, images=images, **inputs), force)
    return {"kept": len(order), "of": len(images), "best": float(scores.max()), "mean": float(scores.mean())}


def _scorer(
    by: str, model: str | None, machine: Arithmetic, images: Artifact, codes: Path | None
) -> tuple[Any, Callable[[Any, list[str]], Any], dict[str, Artifact | str]]:
    """The column that is scored, what scores B rows of it against B texts, (B,) float32, and a history's inputs."""
    if by == "clip":
        clip = bundles.weights(model, "weights.clip")
        return images.array("images"), ClipScorer(clip, machine).score, {"model": clip}
    from dalle_cli.pipelines.scoring import PriorScorer

    scorer = PriorScorer(model, machine, by, images=codes is None)
    if codes is None:
        return images.array("images"), scorer.score_images, scorer.inputs
    latents = open_artifact(codes, "codes")
    scorer.check(latents)
    return own_codes(latents, images), scorer.score_codes, {"codes": latents, **scorer.inputs}


def own_codes(codes: Artifact, images: Artifact) -> Any:
    """The codes of each image, by id: (N, H, W).

    Raises:
        DalleError: the images were decoded from others, or an id is that of several codes.
    """
    of = {name: row for row, name in enumerate(codes.strings("ids"))}
    made = any(e["stage"] == "decode" and e["inputs"].get("codes") == codes.digest for e in images.history)
    if not made or not set(images.strings("ids")) <= of.keys():
        raise DalleError(f"expected the codes that {images.path} was decoded from, found others: {codes.path}")
    if len(of) < len(codes):
        raise DalleError(f"expected codes of an id each, found ids that occur twice in {codes.path}; leave --codes out")
    return codes.array("codes")[np.array([of[name] for name in images.strings("ids")])]
