"""Opens weights and the inputs of their kind, and makes the `Examination` to examine."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dalle_cli import config
from dalle_cli.artifacts import Artifact, open_artifact
from dalle_cli.data import tokenizer
from dalle_cli.data.datasets import open_dataset
from dalle_cli.data.exclude import read_exclude_list
from dalle_cli.data.filters import Filters
from dalle_cli.data.order import split
from dalle_cli.data.pairs import Conditions, Pairs
from dalle_cli.doctor.examination import Examination, Metrics, Request
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles
from dalle_cli.models.diffusion_prior import DiffusionPrior
from dalle_cli.pipelines import loading
from dalle_cli.training import clip, decoder, dvae, embedding_prior, prior, upsampler
from dalle_cli.training.config import deterministic
from dalle_cli.training.states import StatesOf

COUNTED = 4096  # training pairs, evenly spread, whose codes and tokens are counted


class ModelKind(NamedTuple):
    """What weights of a kind are examined on, and how their task is made."""

    inputs: tuple[str, ...]
    load: Callable[..., Any]  # (weights, device) -> model
    task: Callable[..., Any]
    settings: type
    columns: str  # of a training batch
    width: str  # the field of the model's config; of the patch transformer n_embd
    error: Callable[[Tensor, Metrics], Tensor] = lambda loss, _: loss  # what learning must lower


def _mse(_loss: Tensor, metrics: Metrics) -> Tensor:
    return metrics["mse"]


KINDS = {
    "weights.dvae": ModelKind(
        ("DATASET",), loading.dvae, dvae.DVAETask, dvae.DVAETrain, "images", "n_hid",
        lambda _, metrics: 10 ** (-metrics["psnr"] / 10),  # the loss may be below 0
    ),
    "weights.clip": ModelKind(
        ("DATASET",), loading.clip, clip.CLIPTask, clip.CLIPTrain, "images tokens lengths", "vision_width"
    ),
    "weights.prior.codes": ModelKind(
        ("CAPTIONS", "CODES"), loading.prior, prior.PriorTask, prior.PriorTrain, "tokens lengths codes", "n_embd",
        lambda _, metrics: metrics["image_nats"],
    ),
    "weights.prior.embeddings": ModelKind(
        ("CAPTIONS", "EMBEDDINGS"), loading.embedding_prior, embedding_prior.DiffusionPriorTask,
        embedding_prior.EmbeddingPriorTrain, "tokens lengths z_t z_i t noise", "n_embd",
    ),
    "weights.decoder": ModelKind(
        ("DATASET", "EMBEDDINGS"), loading.decoder, decoder.DecoderTask, decoder.DecoderTrain,
        "images noise t z_i given tokens lengths", "width", _mse,
    ),
    "weights.upsampler": ModelKind(
        ("DATASET",), loading.upsampler, upsampler.UpsamplerTask, upsampler.UpsamplerTrain,
        "images noise t low levels low_noise", "width", _mse,
    ),
}  # fmt: skip


def find_weights(run: str) -> Artifact:
    """The weights that a file, a .run folder or a bundle leads to.

    Raises:
        DalleError: none, or several.
    """
    path = Path(run)
    if path.suffix == ".run":
        path = path.with_suffix(".safetensors")
        if not path.exists():
            raise DalleError(f"expected weights beside {run}, found none yet; let the training end")
    elif not path.is_file():
        path = bundles.locate(run)
    if path.is_file():
        return open_artifact(path, *KINDS)
    files = [file for file in sorted(path.glob("*.safetensors")) if open_artifact(file).kind in KINDS]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise DalleError(f"expected one file of weights in {path}, found {names}; name one of them")
    return open_artifact(files[0])


def open_examination(request: Request) -> Examination:
    """The trained model, and its task on held-out rows.

    Raises:
        DalleError: other inputs than this kind takes, or inputs made with another tokenizer or encoder.
    """
    weights, wanted = request.weights, [*KINDS[request.weights.kind].inputs]
    if weights.kind == "weights.decoder" and weights.require("model", dict).get("n_text") != 0:
        wanted.append("--captions")
    given = len(request.inputs)
    if given + wanted.count("--captions") != len(wanted) or ("--captions" in wanted) != bool(request.captions):
        found = f"{given} inputs with{'' if request.captions else 'out'} --captions"
        raise DalleError(f"expected {' '.join(wanted)} for {weights.kind}, found {found}; give it these alone")
    return _of_images(request) if wanted[0] == "DATASET" else _of_pairs(request)


def _of_images(request: Request) -> Examination:
    weights, history, clip = request.weights, request.weights.history, request.weights.kind == "weights.clip"
    filters = config.build(Filters, history[-1].get("options", {}).get("data", {}) if history else {}, "data")
    data = open_dataset(request.inputs[0], need_captions=clip, filters=filters)
    digests, beside = {"dataset": data.digest}, list[Any]()
    data = data.exclude(read_exclude_list(request.exclude, data.ids))
    if clip:
        beside.append(tokenizer.load(bundles.tokenizer(weights)))
    elif weights.kind == "weights.decoder":
        sources = [_checked(weights, request.inputs[1], "embeddings", "encoder")]
        sources += [_checked(weights, request.captions, "captions", "tokenizer")] if request.captions else []
        beside.append(Conditions(*sources))
        digests |= {source.kind: source.digest for source in sources}
        data = data.exclude(beside[0].missing(data.ids))
    others, held_out, _ = _choose(request, data.ids)
    data = data.exclude(others)
    return _examination(request, len(data), (data, *beside), request.workers, digests=digests, held_out=held_out)


def _of_pairs(request: Request) -> Examination:
    weights, of_codes = request.weights, request.weights.kind == "weights.prior.codes"
    captions = _checked(weights, request.inputs[0], "captions", "tokenizer")
    latents = _checked(weights, request.inputs[1], "codes" if of_codes else "embeddings", "encoder")
    pairs = Pairs(captions, latents)
    pairs = pairs.exclude(read_exclude_list(request.exclude, pairs.ids))
    others, held_out, training = _choose(request, pairs.ids)
    chosen = pairs.exclude(others)
    facts = {"digests": {"captions": captions.digest, latents.kind: latents.digest}, "held_out": held_out}
    if not of_codes:
        takes_states = weights.require("model", dict).get("captions") == "states"
        after = (StatesOf.find(captions, weights.path.parent),) if takes_states else ()
        return _examination(request, len(chosen), (chosen,), *after, **facts)
    dvae = bundles.find_weights(weights.require("encoder", str), weights.path.parent, latents.path.parent)
    spread = training[np.linspace(0, len(training) - 1, min(len(training), COUNTED)).astype(np.int64)]
    rows, code_rows = pairs.draw(spread, np.zeros((len(spread), 2)))
    arrays = zip(("tokens", "lengths", "codes"), (*pairs.tokens(rows), pairs.codes(code_rows)), strict=True)
    counted = {name: torch.from_numpy(array) for name, array in arrays}
    return _examination(request, len(chosen), (chosen, None), dvae, counted=counted, **facts)


def _examination(request: Request, n: int, before: Sequence[Any], *after: Any, **facts: Any) -> Examination:
    """A examination on n rows; a task takes its data before the seed, and what else it needs after it."""
    kind, options = KINDS[request.weights.kind], deterministic(_settings(request.weights), n)
    model = kind.load(request.weights, request.machine.device)
    facts |= {
        "model": model,
        "width": getattr(model.config, kind.width, None) or model.config.n_embd,
        "error": kind.error,
    }
    names, arguments = tuple(kind.columns.split()), (model.config, options, *before, request.seed, *after)
    if request.weights.kind == "weights.prior.codes":
        facts["loss"] = model.loss  # without the true sketch, which would give codes away
    if request.weights.kind != "weights.prior.embeddings" or isinstance(model, DiffusionPrior):
        return Examination(request, kind.task(*arguments), names=names, **facts)

    def loss(tokens: Tensor, lengths: Tensor, z_t: Tensor, z_i: Tensor, dots: Tensor) -> Any:
        # With the dot product of the own caption: another's would be news even to a prior that reads no captions.
        return model.loss(tokens, lengths, z_t, model.quantize_dot(dots), model.quantize(z_i))

    task = embedding_prior.AutoregressivePriorTask(*arguments)
    examination = Examination(request, task, names=names[:4], loss=loss, **facts)
    examination.columns["dots"] = (examination.columns["z_t"] * examination.columns["z_i"]).sum(-1)
    return examination


def _settings(weights: Artifact) -> Any:
    """How the weights were trained."""
    return config.build(KINDS[weights.kind].settings, weights.require("train", dict), "train")


def _checked(weights: Artifact, source: object, kind: str, name: str) -> Artifact:
    """Raises: DalleError unless an input was made with the tokenizer or the encoder that the weights name."""
    found, what = open_artifact(str(source), kind), "image encoder" if name == "encoder" else name
    bundles.check_digest(what, found.require(name, str), weights.require(name, str), weights.path)
    return found


def _choose(request: Request, ids: Sequence[str]) -> tuple[frozenset[str], bool, Any]:
    """The ids to leave out, whether the others were held out of training, and the places of training.

    Raises:
        DalleError: fewer than two rows remain.
    """
    training, held_out = split(ids, _settings(request.weights).validation)
    places = held_out if len(held_out) > 1 else training
    if request.limit is not None and request.limit < len(places):
        places = places[np.arange(request.limit) * len(places) // request.limit]
    if len(places) < 2:
        raise DalleError(f"expected 2 rows or more to compare, found {len(places)}; give more, or raise --limit")
    return frozenset(ids).difference(ids[place] for place in places.tolist()), len(held_out) > 1, training
