"""`dalle doctor`: the questions that people ask of a training that went wrong, answered by its weights and its data.

It ends with status 0 whatever it finds, and with 1 if it could not look.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from dalle_cli.options import Device, Dtype, Json, Limit, Seed, Without, Workers

if TYPE_CHECKING:
    from torch import Tensor

    from dalle_cli.artifacts import Artifact
    from dalle_cli.data.datasets import Dataset
    from dalle_cli.data.pairs import Pairs
    from dalle_cli.devices import Arithmetic
    from dalle_cli.doctor.checks import Finding
    from dalle_cli.training.loop import Task

EXAMPLE = """dalle doctor embedding-prior.safetensors captions.safetensors embeddings/
dalle doctor decoder.safetensors photos/ embeddings/ --captions captions.safetensors
dalle doctor prior.safetensors captions.safetensors codes/ --no-overfit --json"""
TAKES = {  # what each is looked at on
    "weights.dvae": ("DATASET",),
    "weights.clip": ("DATASET",),
    "weights.prior.codes": ("CAPTIONS", "CODES"),
    "weights.prior.embeddings": ("CAPTIONS", "EMBEDDINGS"),
    "weights.decoder": ("DATASET", "EMBEDDINGS"),
    "weights.upsampler": ("DATASET",),
}
LOOKS = 2  # of each examination
BATCH = 64
QUIET = {  # how eight rows are learned by heart: nothing left to chance
    "accumulate": 1, "augment": "center", "flip": False, "bpe_dropout": 0.0, "caption_dropout": 0.0,
    "embedding_dropout": 0.0, "corruption": "none", "sketch_only": False, "sketch_redrawn": 0.0,
    "sketch_batch": 8,
}  # fmt: skip


class Case(NamedTuple):
    """What is looked at, and how."""

    weights: "Artifact"
    inputs: list[str]
    captions: Path | None
    without: Path | None
    machine: "Arithmetic"
    seed: int
    limit: int | None
    workers: int


class Seat(NamedTuple):
    """What was found, and what a fresh model is trained with: its task, its width, and the error that should fall."""

    findings: list["Finding"]
    digests: dict[str, str]
    rows: int
    held_out: bool
    task: "Task"
    width: int
    error: "Callable[[Tensor, dict[str, Tensor]], Tensor]"


def run(
    weights: Annotated[
        str, typer.Argument(metavar="RUN", help="Weights that a train-* wrote, or the .run folder or bundle of them.")
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT...",
            help="What it was trained with: of a dVAE, a CLIP or an upsampler the data set; of a prior captions and "
            "codes or embeddings; of a decoder the data set and embeddings.",
        ),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option("--captions", metavar="FILE", help="What `tokenize` wrote, for a decoder that reads captions."),
    ] = None,
    no_overfit: Annotated[
        bool, typer.Option("--no-overfit", help="Do not train fresh weights of these sizes on eight rows.")
    ] = False,
    without: Without = None,
    limit: Limit = 64,
    seed: Seed = 0,
    workers: Workers = 2,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Look a trained model over for the usual failures; ends with status 0 whatever it finds."""
    from dalle_cli import console
    from dalle_cli.devices import arithmetic
    from dalle_cli.doctor import checks as doctor

    found = weights_of(weights)
    given = check_inputs(found, inputs or [], captions)
    case = Case(found, given, captions, without, arithmetic(device, dtype), seed, limit, workers)
    examine = {
        "weights.dvae": dvae, "weights.clip": clip, "weights.prior.codes": prior, "weights.decoder": decoder,
        "weights.prior.embeddings": embedding_prior, "weights.upsampler": upsampler,
    }[found.kind]  # fmt: skip
    with console.progress("look", LOOKS, unit="looks") as advance:
        seat = examine(case, advance)
    told = found.history[-1]["inputs"] if found.history else {}
    findings = [doctor.same_inputs(told, seat.digests), *seat.findings]
    if not no_overfit:
        findings.append(by_heart(seat, case))
    if as_json:
        facts: dict[str, object] = {"stage": "doctor", "kind": found.kind}
        facts |= {"inputs": {"model": found.digest, **seat.digests}}
        facts |= {"rows": seat.rows, "held_out": seat.held_out, "verdict": doctor.worst(findings)}
        console.emit_json({**facts, "findings": doctor.table(findings)})
        return
    kept = "held out" if seat.held_out else "of training, as none is held out"
    console.note(f"{found.path.name}: {found.headers[0].table.about}, on {seat.rows} rows {kept}")
    console.emit(doctor.lines(findings))


def weights_of(run: str) -> "Artifact":
    """The weights that a path, a .run folder or a bundle leads to.

    Raises:
        DalleError: none, or several.
    """
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.errors import DalleError
    from dalle_cli.hub import bundles as bundle

    path = Path(run)
    if path.suffix == ".run":
        path = path.with_suffix(".safetensors")
        if not path.exists():
            raise DalleError(f"expected weights beside {run}, found none yet; let the training end")
    elif not path.is_file():
        path = bundle.locate(run)
    if path.is_file():
        return open_artifact(path, *TAKES)
    files = [file for file in sorted(path.glob("*.safetensors")) if open_artifact(file).kind in TAKES]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise DalleError(f"expected one file of weights in {path}, found {names}; name one of them")
    return open_artifact(files[0])


def check_inputs(weights: "Artifact", inputs: list[str], captions: Path | None) -> list[str]:
    """Raises: DalleError unless they are as many as this kind of weights takes."""
    from dalle_cli.errors import DalleError

    wanted = TAKES[weights.kind]
    if len(inputs) != len(wanted):
        what = f"{' '.join(wanted)} for {weights.kind}"
        raise DalleError(f"expected {what}, found {len(inputs)} inputs; give what it was trained with")
    reads = weights.kind == "weights.decoder" and weights.fact("model", dict).get("n_text") != 0
    if reads != (captions is not None):
        found = "--captions" if captions else "none"
        wanted_captions = "--captions for a decoder that reads them" if reads else "no captions besides"
        raise DalleError(f"expected {wanted_captions}, found {found}; {'give them' if reads else 'leave them out'}")
    return inputs


def by_heart(seat: Seat, case: Case) -> "Finding":
    """Whether a fresh model of the same sizes learns eight rows."""
    import torch

    from dalle_cli import console
    from dalle_cli.doctor.overfit import UPDATES, overfit
    from dalle_cli.training.loop import mix

    where, task = case.machine, seat.task
    batches = task.batches(0)
    batch = tuple(t.to(where.device) for t in next(batches))
    batches.close()
    model = task.model.to(where.device)

    def step(number: int) -> "tuple[Tensor, Tensor]":
        torch.manual_seed(mix(case.seed, number))
        generator = torch.Generator(where.device).manual_seed(mix(case.seed, number))
        with where.autocast():
            loss, figures = task.loss(batch, number, generator)
        return loss, seat.error(loss, figures)

    with console.progress("learn by heart", UPDATES, unit="updates") as advance:
        return overfit(model, step, seat.width, advance)


def learning(cls: Any, case: Case) -> Any:
    """How the weights were trained, on eight rows and without chance.

    Raises:
        DalleError: settings that are not known here.
    """
    from dataclasses import fields, replace

    from dalle_cli import config
    from dalle_cli.doctor.overfit import ROWS

    options = config.build(cls, case.weights.fact("train", dict), "train")
    known = {field.name for field in fields(cls)}
    return replace(options, batch_size=ROWS, **{name: value for name, value in QUIET.items() if name in known})


def trained(case: Case, name: str) -> object:
    """A setting of the training as it was."""
    return case.weights.fact("train", dict).get(name, 0.0)


def pictures(case: Case, need_captions: bool = False) -> "tuple[Dataset, str]":
    """The data set as training read it, without what is left out; and its digest."""
    from dalle_cli import config
    from dalle_cli.data.datasets import open_dataset
    from dalle_cli.data.exclude import leave_out
    from dalle_cli.data.filters import Filters

    told = case.weights.history[-1].get("options", {}).get("data", {}) if case.weights.history else {}
    filters = config.build(Filters, told, "data")
    data = open_dataset(case.inputs[0], need_captions=need_captions, filters=filters)
    return data.without(leave_out(case.without, data.ids)), data.digest


def dvae(case: Case, advance: Callable[[], None]) -> Seat:
    """A dVAE, on pictures."""
    from dalle_cli.doctor.codes import examine_dvae
    from dalle_cli.doctor.inputs import judged, read
    from dalle_cli.pipelines import loading as load
    from dalle_cli.training.dvae import DVAETask, DVAETrain

    model, (data, digest) = load.dvae(case.weights, case.machine.device), pictures(case)
    task = DVAETask(model.config, learning(DVAETrain, case), data, case.seed, case.workers)
    rows, kept = judged(task.held_out, task.rows, case.limit)
    images, rows = read(data, model.config.image_size, rows, case.workers, case.machine.device)
    with case.machine.autocast():
        findings = examine_dvae(model, images, advance)
    # the loss itself is no error: a likelihood's may be below 0
    return Seat(
        findings, {"dataset": digest}, len(rows), kept, task, model.config.n_hid, lambda _, f: 10 ** (-f["psnr"] / 10)
    )


def clip(case: Case, advance: Callable[[], None]) -> Seat:
    """A CLIP, on pictures with captions."""
    import torch

    from dalle_cli.data import tokenizer
    from dalle_cli.doctor.codes import examine_clip
    from dalle_cli.doctor.inputs import judged, read
    from dalle_cli.hub import bundles as bundle
    from dalle_cli.pipelines import loading as load
    from dalle_cli.training.clip import CLIPTask, CLIPTrain

    model, (data, digest) = load.clip(case.weights, case.machine.device), pictures(case, need_captions=True)
    bpe = tokenizer.load(bundle.tokenizer(case.weights))
    task = CLIPTask(model.config, learning(CLIPTrain, case), data, bpe, case.seed, case.workers)
    rows, kept = judged(task.held_out, task.rows, case.limit)
    images, rows = read(data, model.config.image_size, rows, case.workers, case.machine.device)
    texts = [data.captions[row][0] for row in rows.tolist()]
    tokens, lengths, _ = bpe.encode_batch(texts, model.config.n_text)
    text = (torch.from_numpy(x.astype("int64")).to(case.machine.device) for x in (tokens, lengths))
    with case.machine.autocast():
        findings = examine_clip(model, images, next(text), next(text), advance)
    return Seat(findings, {"dataset": digest}, len(rows), kept, task, model.config.vision_width, lambda loss, _: loss)


def prior(case: Case, advance: Callable[[], None]) -> Seat:
    """A prior over codes, on captions and codes."""
    from dalle_cli.commands import judging
    from dalle_cli.doctor.codes import examine_prior
    from dalle_cli.doctor.inputs import judged
    from dalle_cli.evaluation.likelihood import Judge
    from dalle_cli.hub import bundles as bundle
    from dalle_cli.pipelines import loading as load
    from dalle_cli.training.prior import PriorTask, PriorTrain

    pairs = joined(case, "codes")
    model = load.prior(case.weights, case.machine.device)
    judging.check_made_for(case.weights, model, pairs.captions, pairs.latents)
    dvae = bundle.find_weights(case.weights.fact("encoder", str), case.weights.path.parent, pairs.latents.path.parent)
    task = PriorTask(model.config, learning(PriorTrain, case), pairs, None, case.seed, dvae)
    places, kept = judged(task.held_out, task.places, case.limit)
    counts = judging.count(model, pairs, task.places, BATCH)
    others = judging.other_captions(pairs, places, BATCH)
    judge = Judge(model, counts, shuffle=others is not None)
    advance()
    for at in range(0, len(places), BATCH):
        here = slice(at, at + BATCH)
        with case.machine.autocast():
            judge.add(judging.trial(pairs, places[here], (places if others is None else others)[here]))
    advance()
    findings = examine_prior(judge.figures(), trained(case, "caption_dropout"))
    digests = {"captions": pairs.captions.digest, "codes": pairs.latents.digest}
    return Seat(findings, digests, len(places), kept, task, model.config.n_embd, lambda _, f: f["image_nats"])


def joined(case: Case, kind: str) -> "Pairs":
    """Captions and latents of a kind, without what is left out.

    Raises:
        DalleError: of another tokenizer or encoder than the weights.
    """
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.data.exclude import leave_out
    from dalle_cli.data.pairs import Pairs
    from dalle_cli.hub import bundles as bundle

    texts, latents = open_artifact(case.inputs[0], "captions"), open_artifact(case.inputs[1], kind)
    for what, name, source in (("tokenizer", "tokenizer", texts), ("image encoder", "encoder", latents)):
        bundle.check_digest(what, source.fact(name, str), case.weights.fact(name, str), case.weights.path)
    pairs = Pairs(texts, latents)
    return pairs.without(leave_out(case.without, pairs.ids))


def embedding_prior(case: Case, advance: Callable[[], None]) -> Seat:
    """A prior over embeddings, on captions and embeddings."""
    from dalle_cli.doctor.embeddings import examine
    from dalle_cli.doctor.inputs import judged, seen
    from dalle_cli.models.diffusion_prior import DiffusionPrior
    from dalle_cli.pipelines import loading as load
    from dalle_cli.training.embedding_prior import AutoregressivePriorTask, DiffusionPriorTask, EmbeddingPriorTrain

    pairs = joined(case, "embeddings")
    model = load.embedding_prior(case.weights, case.machine.device)
    options = learning(EmbeddingPriorTrain, case)
    task: DiffusionPriorTask | AutoregressivePriorTask
    if isinstance(model, DiffusionPrior):
        task = DiffusionPriorTask(model.config, options, pairs, case.seed)
    else:
        task = AutoregressivePriorTask(model.config, options, pairs, case.seed)
    places, kept = judged(task.held_out, task.places, case.limit)
    pairs_seen = seen(pairs, places, case.machine.device)
    with case.machine.autocast():
        findings = examine(model, pairs_seen, trained(case, "caption_dropout"), case.seed, advance)
    digests = {"captions": pairs.captions.digest, "embeddings": pairs.latents.digest}
    return Seat(findings, digests, len(places), kept, task, model.config.n_embd, lambda loss, _: loss)


def decoder(case: Case, advance: Callable[[], None]) -> Seat:
    """A decoder, on pictures, embeddings, and captions where it reads them."""
    from dalle_cli.artifacts import open_artifact
    from dalle_cli.data.conditions import Conditions
    from dalle_cli.doctor.decoder import examine_decoder
    from dalle_cli.doctor.inputs import judged, read, told
    from dalle_cli.hub import bundles as bundle
    from dalle_cli.pipelines import loading as load
    from dalle_cli.training.decoder import DecoderTask, DecoderTrain

    model, (data, digest) = load.decoder(case.weights, case.machine.device), pictures(case)
    sources = {"embeddings": open_artifact(case.inputs[1], "embeddings")}
    if case.captions is not None:
        sources["captions"] = open_artifact(case.captions, "captions")
    for what, name, source in (("image encoder", "encoder", "embeddings"), ("tokenizer", "tokenizer", "captions")):
        if source in sources:
            made, wanted = sources[source].fact(name, str), case.weights.fact(name, str)
            bundle.check_digest(what, made, wanted, case.weights.path)
    about = Conditions(sources["embeddings"], sources.get("captions"))
    data = data.without(about.missing(data.ids))
    task = DecoderTask(model.config, learning(DecoderTrain, case), data, about, case.seed, case.workers)
    rows, kept = judged(task.held_out, task.rows, case.limit)
    images, rows = read(data, model.config.image_size, rows, case.workers, case.machine.device)
    task.held_out = rows  # what its validation looks at
    with case.machine.autocast():
        bins = task.validate(model, case.machine.device)
        dropout = trained(case, "embedding_dropout"), trained(case, "caption_dropout")
        about_them = told(images, about, [data.ids[row] for row in rows.tolist()])
        findings = examine_decoder(model, about_them, bins, dropout, case.seed, advance)
    digests = {"dataset": digest, **{name: source.digest for name, source in sources.items()}}
    return Seat(findings, digests, len(rows), kept, task, model.config.width, lambda _, figures: figures["mse"])


def upsampler(case: Case, advance: Callable[[], None]) -> Seat:
    """An upsampler, on pictures."""
    from dalle_cli.doctor.decoder import examine_upsampler
    from dalle_cli.doctor.inputs import judged, read
    from dalle_cli.pipelines import loading as load
    from dalle_cli.sampling.decoder import to_signed
    from dalle_cli.training.upsampler import UpsamplerTask, UpsamplerTrain

    model, (data, digest) = load.upsampler(case.weights, case.machine.device), pictures(case)
    task = UpsamplerTask(model.config, learning(UpsamplerTrain, case), data, case.seed, case.workers)
    rows, kept = judged(task.held_out, task.rows, case.limit)
    images, rows = read(data, model.config.image_size, rows, case.workers, case.machine.device)
    task.held_out, size = rows, model.config.low_size
    small = to_signed(images).view(len(images), 3, size, -1, size, model.config.factor).mean((3, 5))
    with case.machine.autocast():
        bins = task.validate(model, case.machine.device)
        findings = examine_upsampler(model, images, small, bins, case.seed, advance)
    return Seat(
        findings, {"dataset": digest}, len(rows), kept, task, model.config.width, lambda _, figures: figures["mse"]
    )
