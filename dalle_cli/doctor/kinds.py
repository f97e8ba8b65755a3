"""Opens weights and the inputs of their kind, and makes the `Subject` to examine."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle_cli import config
from dalle_cli.artifacts import Artifact, open_artifact
from dalle_cli.data.conditions import Conditions
from dalle_cli.data.datasets import Dataset, open_dataset
from dalle_cli.data.exclude import leave_out
from dalle_cli.data.filters import Filters
from dalle_cli.data.pairs import Pairs
from dalle_cli.doctor.subject import Request, Subject
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles
from dalle_cli.models.diffusion_prior import DiffusionPrior
from dalle_cli.pipelines import loading
from dalle_cli.pipelines.clip import ClipScorer
from dalle_cli.pipelines.codec import Codec
from dalle_cli.training.clip import CLIPTask, CLIPTrain
from dalle_cli.training.decoder import DecoderTask, DecoderTrain
from dalle_cli.training.dvae import DVAETask, DVAETrain
from dalle_cli.training.embedding_prior import AutoregressivePriorTask, DiffusionPriorTask, EmbeddingPriorTrain
from dalle_cli.training.prior import PriorTask, PriorTrain
from dalle_cli.training.upsampler import UpsamplerTask, UpsamplerTrain

INPUTS = {  # what each kind of weights is examined on
    "weights.dvae": ("DATASET",),
    "weights.clip": ("DATASET",),
    "weights.prior.codes": ("CAPTIONS", "CODES"),
    "weights.prior.embeddings": ("CAPTIONS", "EMBEDDINGS"),
    "weights.decoder": ("DATASET", "EMBEDDINGS"),
    "weights.upsampler": ("DATASET",),
}
COUNTED = 4096  # training pairs, evenly spread, whose codes and tokens are counted


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
        return open_artifact(path, *INPUTS)
    files = [file for file in sorted(path.glob("*.safetensors")) if open_artifact(file).kind in INPUTS]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise DalleError(f"expected one file of weights in {path}, found {names}; name one of them")
    return open_artifact(files[0])


def open_subject(request: Request) -> Subject:
    """The trained model, and its task on held-out rows.

    Raises:
        DalleError: other inputs than this kind takes, or inputs made with another tokenizer or encoder.
    """
    weights, wanted = request.weights, INPUTS[request.weights.kind]
    if len(request.inputs) != len(wanted):
        what = f"{' '.join(wanted)} for {weights.kind}"
        raise DalleError(f"expected {what}, found {len(request.inputs)} inputs; give what it was trained with")
    reads = weights.kind == "weights.decoder" and weights.fact("model", dict).get("n_text") != 0
    if reads != (request.captions is not None):
        found = "--captions" if request.captions else "none"
        named = "--captions for a decoder that reads captions" if reads else "no captions besides"
        raise DalleError(f"expected {named}, found {found}; {'give them' if reads else 'leave them out'}")
    opens = {
        "weights.dvae": _dvae, "weights.clip": _clip, "weights.prior.codes": _prior, "weights.decoder": _decoder,
        "weights.prior.embeddings": _embedding_prior, "weights.upsampler": _upsampler,
    }  # fmt: skip
    return opens[weights.kind](request)


def _images(request: Request, conditions: Conditions | None = None, captions: bool = False) -> tuple[Dataset, Any]:
    """The chosen rows of the data set as training filtered it; and what a subject says of them."""
    history = request.weights.history
    filters = config.build(Filters, history[-1].get("options", {}).get("data", {}) if history else {}, "data")
    data = open_dataset(request.inputs[0], need_captions=captions, filters=filters)
    digests = {"dataset": data.digest}
    data = data.without(leave_out(request.exclude, data.ids))
    if conditions is not None:
        data = data.without(conditions.missing(data.ids))
        digests |= {s.kind: s.digest for s in (conditions.embeddings, conditions.captions) if s is not None}
    others, held_out, _ = request.choose(data.ids)
    return data.without(others), {"request": request, "digests": digests, "held_out": held_out}


def _pairs(request: Request, kind: str) -> tuple[Pairs, Any, Any]:
    """The chosen pairs of captions and latents, some rows of both that training saw; what a subject says of them."""
    captions = request.check(open_artifact(request.inputs[0], "captions"), "tokenizer")
    latents = request.check(open_artifact(request.inputs[1], kind), "encoder")
    pairs = Pairs(captions, latents)
    pairs = pairs.without(leave_out(request.exclude, pairs.ids))
    others, held_out, training = request.choose(pairs.ids)
    digests = {"captions": captions.digest, kind: latents.digest}
    spread = training[np.linspace(0, len(training) - 1, min(len(training), COUNTED)).astype(np.int64)]
    rows = pairs.draw(spread, np.zeros((len(spread), 2)))
    return pairs.without(others), rows, {"request": request, "digests": digests, "held_out": held_out}


def _dvae(request: Request) -> Subject:
    data, facts = _images(request)
    model, options = Codec(request.weights, request.machine).dvae, request.options(DVAETrain, len(data))
    task = DVAETask(model.config, options, data, request.seed, request.workers)
    # the loss is no error: the likelihood's may be below 0
    return Subject(
        **facts, task=task, model=model, names=("images",), width=model.config.n_hid,
        error=lambda _, metrics: 10 ** (-metrics["psnr"] / 10),
    )  # fmt: skip


def _clip(request: Request) -> Subject:
    data, facts = _images(request, captions=True)
    scorer, options = ClipScorer(request.weights, request.machine), request.options(CLIPTrain, len(data))
    task = CLIPTask(scorer.clip.config, options, data, scorer.tokenizer, request.seed, request.workers)
    names, width = ("images", "tokens", "lengths"), scorer.clip.config.vision_width
    return Subject(**facts, task=task, model=scorer.clip, names=names, width=width)


def _prior(request: Request) -> Subject:
    pairs, (captions, codes), facts = _pairs(request, "codes")
    model, options = loading.prior(request.weights, request.machine.device), request.options(PriorTrain, len(pairs))
    folders = request.weights.path.parent, pairs.latents.path.parent
    dvae = bundles.find_weights(request.weights.fact("encoder", str), *folders)
    names = ("tokens", "lengths", "codes")
    counted = dict(zip(names, map(torch.from_numpy, (*pairs.tokens(captions), pairs.codes(codes))), strict=True))
    return Subject(
        **facts, task=PriorTask(model.config, options, pairs, None, request.seed, dvae), model=model, names=names,
        width=model.config.n_embd, error=lambda _, metrics: metrics["image_nats"], counted=counted,
        loss=lambda tokens, lengths, codes: model.loss(tokens, lengths, codes),  # without a sketch, which shows codes
    )  # fmt: skip


def _embedding_prior(request: Request) -> Subject:
    pairs, _, facts = _pairs(request, "embeddings")
    model = loading.embedding_prior(request.weights, request.machine.device)
    options, names = request.options(EmbeddingPriorTrain, len(pairs)), ("tokens", "lengths", "z_t", "z_i")
    facts |= {"model": model, "width": model.config.n_embd}
    if isinstance(model, DiffusionPrior):
        task = DiffusionPriorTask(model.config, options, pairs, request.seed)
        return Subject(**facts, task=task, names=(*names, "t", "noise"))

    def loss(tokens: Any, lengths: Any, z_t: Any, z_i: Any, dots: Any) -> Any:
        # The dot product stays that of the own caption: one with another's would tell a prior that reads no captions.
        return model.loss(tokens, lengths, z_t, model.quantize_dot(dots), model.quantize(z_i))

    task = AutoregressivePriorTask(model.config, options, pairs, request.seed)
    subject = Subject(**facts, task=task, names=names, loss=loss)
    subject.columns["dots"] = (subject.columns["z_t"] * subject.columns["z_i"]).sum(-1)
    return subject


def _decoder(request: Request) -> Subject:
    embeddings = request.check(open_artifact(request.inputs[1], "embeddings"), "encoder")
    captions = request.check(open_artifact(request.captions, "captions"), "tokenizer") if request.captions else None
    conditions = Conditions(embeddings, captions)
    data, facts = _images(request, conditions)
    model, options = loading.decoder(request.weights, request.machine.device), request.options(DecoderTrain, len(data))
    return Subject(
        **facts, task=DecoderTask(model.config, options, data, conditions, request.seed, request.workers), model=model,
        names=("images", "noise", "t", "z_i", "given", "tokens", "lengths"), width=model.config.width,
        error=lambda _, metrics: metrics["mse"],
    )  # fmt: skip


def _upsampler(request: Request) -> Subject:
    data, facts = _images(request)
    model = loading.upsampler(request.weights, request.machine.device)
    task = UpsamplerTask(model.config, request.options(UpsamplerTrain, len(data)), data, request.seed, request.workers)
    return Subject(
        **facts, task=task, model=model, names=("images", "noise", "t", "low", "levels"), width=model.config.width,
        error=lambda _, metrics: metrics["mse"],
    )  # fmt: skip
