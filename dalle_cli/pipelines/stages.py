"""The stages sample, decode and rerank: each reads artifacts, writes one, and returns its metrics.

Shapes: N rows, B of them in a batch, H W code grid, D embedding width, S side of the images in pixels.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    weights, inpainting = bundles.weights(model, *kinds), inpainting or InpaintingOptions()
    if past is not None:
        bundles.check_digest("prior", weights.digest, sampling_entry(past)["inputs"].get("model", ""), past.path)
    if weights.kind != PRIORS["codes"]:
        refuse_given(inpainting, "a prior over embeddings")
    prior = open_prior(weights, machine, model)
    settings = prior.settings(options)
    check_replaceable(out, prior.kind, force)
    mask = open_mask(inpainting, prior.encoder, weights, model, machine)
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


def open_mask(
    options: InpaintingOptions, encoder: str, prior: Artifact, model: str | None, machine: Arithmetic
) -> InpaintingMask | None:
    """The mask of an image, encoded by the dVAE that the prior was trained with; None without an image."""
    options.check()
    if options.image is None:
        return None
    return read_mask(options, Codec.of(bundles.weights(model, "weights.dvae"), encoder, prior.path, machine))


def sampling_entry(past: Artifact) -> dict[str, Any]:
    """The last entry of the history of sampled codes."""
    found: dict[str, Any] = past.history[-1] if past.history else {}
    return found


class Resampling(NamedTuple):
    """What `sample --from` samples again: candidates of earlier codes, with their recorded settings as defaults."""

    past: Artifact
    rows: list[Candidate]
    n: int  # candidates per prompt then
    options: SamplingOptions
    inpainting: InpaintingOptions
    dtype: str


def resample(source: Path, rows: str | None, options: SamplingOptions, inpainting: InpaintingOptions) -> Resampling:
    """Read what `sample` wrote to `source`; options that are given here win over the recorded ones.

    Raises:
        DalleError: codes that `sample` did not write, rows that do not exist, or another image or mask than then.
    """
    past = open_artifact(source, "codes")
    entry = sampling_entry(past)
    if not all(name in past for name in ("prompt", "seed", "text")) or entry.get("stage") != "sample":
        raise DalleError(f"expected codes that `sample` wrote, found others in {source}; give --from another file")
    inpainting, recorded = repeat_options(inpainting, entry, source), entry["options"]
    before = {name: value for name, value in recorded.items() if name not in ("n", "dtype", "rows", "keep_rows")}
    again, wanted = build(SamplingOptions, {**before, **given(options)}, "sample"), past_candidates(past, rows)
    dtype = str(recorded.get("dtype", "float32"))
    return Resampling(past, wanted, recorded.get("n", len(wanted)), again, inpainting, dtype)


def past_candidates(past: Artifact, rows: str | None) -> list[Candidate]:
    """The candidates of these rows, counted from 0, or of all rows.

    Raises:
        DalleError: no such row, or one that was not sampled in the file's last sampling.
    """
    try:
        picked = range(len(past)) if rows is None else [int(number) for number in rows.split(",")]
    except ValueError:
        raise DalleError(f"expected --rows as 3,17, found {rows!r}") from None
    if not picked or not 0 <= min(picked) <= max(picked) < len(past):
        raise DalleError(f"expected --rows from 0 to {len(past) - 1}, found {rows}; the file has {len(past)}")
    ids, text, seed = past.strings("ids"), past.strings("text"), sampling_entry(past)["options"].get("seed")
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
    ids, text = latents.strings("ids"), latents.strings("text") if "text" in latents else None
    size, made, decode_rows = _open_decoder(latents, text, model, machine, options or DecoderOptions(), seed)
    writer = ShardWriter(out, "images", len(latents), shard_size, {}, made, force)
    with progress("decode", len(latents), unit="images") as advance:
        for shard in writer.missing():
            start, stop = writer.bounds(shard)
            pixels = np.empty((stop - start, 3, size, size), dtype=np.uint8)
            for rows in batched(stop - start, batch_size):
                pixels[rows] = decode_rows(range(start, stop)[rows])
                advance(rows.stop - rows.start)
            table = {"images": pixels, "ids": ids[start:stop]}
            writer.write(shard, table if text is None else {**table, "text": text[start:stop]})
    return {"images": len(latents) if writer.wrote else "all there already"}


def _open_decoder(
    latents: Artifact, text: Sequence[str] | None, model: str | None, machine: Arithmetic, options: DecoderOptions,
    seed: int | None,
) -> tuple[int, list[dict[str, Any]], Callable[[range], Any]]:  # fmt: skip
    """The size of the images, their history, and what decodes rows of the latents: range -> (B, 3, S, S) uint8."""
    table = latents.array(latents.kind)
    if latents.kind == "codes":
        refuse_given(options, f"codes, as {latents.path} holds")
        if seed is not None:
            raise DalleError(f"expected no --seed for codes, as {latents.path} holds, found one; leave it out")
        weights = bundles.weights(model, "weights.dvae")
        codec = Codec.of(weights, latents.require("encoder", str), latents.path, machine)
        made = history("decode", {"dtype": machine.name}, codes=latents, model=weights)
        return codec.size, made, lambda rows: codec.decode(table[rows.start : rows.stop])
    decoder = ImageDecoder(model, machine, options, seed or 0)
    decoder.check(latents)

    def decode_rows(rows: range) -> Any:
        part = slice(rows.start, rows.stop)
        return decoder.decode(table[part], rows, None if text is None else text[part])

    made = history("decode", decoder.settings, embeddings=latents, **decoder.inputs)
    return decoder.size, made, decode_rows


def rerank(
    images: Artifact, model: str | None, out: Path, *, machine: Arithmetic, keep: int = 0, prompt: str | None = None,
    by: str = "clip", codes: Path | None = None, batch_size: int = 64, force: bool = False,
    progress: Progress = Quiet,
) -> Metrics:  # fmt: skip
    """Score images against their texts (or one prompt), by CLIP or by a prior, and write the best of each text.

    Raises:
        DalleError: no texts, fewer images than to keep, codes of other images, or something else at `out`.
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
    column, score, inputs = _scorer(by, model, machine, images, codes)
    ids = images.strings("ids")
    scores = np.empty(len(images), dtype=np.float32)
    with progress("rerank", len(images), unit="images") as advance:
        for rows in batched(len(images), batch_size):
            scores[rows] = score(column[rows], texts[rows])
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
    """The column to score, what scores B of its rows against B texts, -> (B,) float32, and the history's inputs."""
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
