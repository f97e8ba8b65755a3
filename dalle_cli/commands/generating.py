"""How `generate` makes pictures of candidates: by codes and a dVAE, or by embeddings, a decoder and upsamplers.

Shapes: B candidates, S side in pixels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles as bundle
from dalle_cli.options import AUTO, is_given, refuse

if TYPE_CHECKING:
    from dalle_cli.artifacts import Artifact
    from dalle_cli.commands.drawing import Candidate
    from dalle_cli.commands.drawing_embeddings import EmbeddingSettings
    from dalle_cli.commands.picture_prompt import Kept
    from dalle_cli.devices import Arithmetic

PRIORS = {"codes": "weights.prior.codes", "embeddings": "weights.prior.embeddings"}  # the first where there are both
OF_CODES = ("sketch_guidance", "image", "keep_rows", "mask", "int8", "compiled")
OF_EMBEDDINGS = ("sampler", "steps", "decoder_sampler", "decoder_steps", "decoder_guidance", "eta", "upsampler_steps")
IF_SAID = ("temperature", "top_k", "top_p")  # which a diffusion prior over embeddings does not know

Told = Callable[[int], None]


@dataclass(frozen=True)
class Way:
    """What the two systems do each in its own manner."""

    at_once: int  # candidates that are drawn in a batch
    n_parts: int  # of a candidate, whose making `pictures` tells of
    pictures: Callable[[Told], Iterator[Any]]  # of all candidates, B after B: (B, 3, S, S) uint8
    history: Callable[[], list[dict[str, Any]]]  # what led to the latents
    options: dict[str, Any]  # of what makes pictures of them
    inputs: "dict[str, Artifact]"
    kept: "Kept | None" = None


def way(ctx: typer.Context, rows: "Sequence[Candidate]", machine: "Arithmetic") -> Way:
    """The way of the model that the command line names.

    Raises:
        DalleError: weights that are missing or do not fit each other, or an option of the other system.
    """
    given = ctx.params
    kinds = [kind for name, kind in PRIORS.items() if given["latents"] in (None, name)]
    if not kinds:
        found = f"found {given['latents']!r}"
        raise DalleError(f"expected --latents among {', '.join(PRIORS)}, {found}; take one, or leave it out")
    prior = bundle.weights(given["model"], *kinds)
    if prior.kind == PRIORS["codes"]:
        refuse(ctx, "a prior over codes", *OF_EMBEDDINGS)
        return of_codes(prior, rows, given, machine)
    refuse(ctx, "a prior over embeddings", *OF_CODES)
    return of_embeddings(prior, rows, given, _settings(ctx, prior), machine)


def of_codes(prior: "Artifact", rows: "Sequence[Candidate]", given: Mapping[str, Any], machine: "Arithmetic") -> Way:
    """Codes, which a dVAE decodes."""
    from dalle_cli.commands import drawing, drawn_with, picture_prompt

    names = ("n", "temperature", "top_k", "top_p", "guidance", "seed", "guidance_from", "guidance_to", "int8")
    said = {name: given[name] for name in names}
    said |= drawn_with.all_made_for(prior, given)
    settings = drawn_with.Settings(**said)
    asked = picture_prompt.Asked(given["image"], given["keep_rows"], given["mask"])
    vae = bundle.weights(given["model"], "weights.dvae")
    dvae = drawing.decoder(vae, prior.fact("encoder", str), prior.path, machine)
    kept = picture_prompt.read(asked, vae, dvae, machine)
    drawer = drawing.Drawer(prior, rows, settings, machine, given["compiled"], kept)
    at_once = drawer.fitting(given["batch_size"])

    def pictures(told: Told) -> Iterator[Any]:
        for codes in drawer.batches(at_once, told):
            for at in range(0, len(codes), drawing.AT_ONCE):
                yield drawing.decode(dvae, codes[at : at + drawing.AT_ONCE], machine)

    return Way(at_once, drawer.n_codes, pictures, drawer.history, {}, {"dvae": vae}, kept)


def of_embeddings(
    prior: "Artifact", rows: "Sequence[Candidate]", given: Mapping[str, Any], settings: "EmbeddingSettings",
    machine: "Arithmetic",
) -> Way:  # fmt: skip
    """Embeddings, which a decoder and the upsamplers beside it paint; a candidate is told of when it is painted."""
    from dalle_cli.commands import drawing, drawing_embeddings, painting

    asked = painting.Asked(
        steps=given["decoder_steps"], sampler=given["decoder_sampler"], guidance=given["decoder_guidance"],
        eta=given["eta"], upsampler_steps=given["upsampler_steps"], seed=given["seed"],
    )  # fmt: skip
    painter = painting.Painter(given["model"], asked, machine)
    painter.check(prior)
    clip = drawing_embeddings.clip_of(prior, given["model"])
    drawer = drawing_embeddings.EmbeddingDrawer(prior, clip, rows, settings, machine)
    at_once = drawing_embeddings.AT_ONCE if given["batch_size"] == AUTO else given["batch_size"]

    def pictures(told: Told) -> Iterator[Any]:
        done = 0
        for embeddings in drawer.batches(at_once, lambda _: None):
            for at in range(0, len(embeddings), drawing.AT_ONCE):
                part = embeddings[at : at + drawing.AT_ONCE]
                numbers = range(done, done + len(part))  # rows of the file that `sample` would have written
                painted = painter.paint(part, numbers, [rows[number].text for number in numbers])
                done += len(part)
                told(len(part))
                yield painted

    own = {"steps": "decoder_steps", "sampler": "decoder_sampler", "guidance": "decoder_guidance", "model": "decoder"}
    options = {own.get(name, name): value for name, value in painter.options.items()}
    inputs = {own.get(name, name): weights for name, weights in painter.inputs.items()}
    return Way(at_once, 1, pictures, drawer.history, options, inputs)


def _settings(ctx: typer.Context, prior: "Artifact") -> "EmbeddingSettings":
    """How embeddings are drawn; what was not said is left to the prior and its kind."""
    from dalle_cli.commands.drawing_embeddings import EmbeddingSettings
    from dalle_cli.commands.drawn_with import made_for

    names = ("n", "seed", "guidance_from", "guidance_to", "sampler", "steps")
    said = {name: ctx.params[name] for name in (*names, *(name for name in IF_SAID if is_given(ctx, name)))}
    return EmbeddingSettings(**said, guidance=made_for(prior, "guidance", ctx.params["guidance"]))
