"""Karlo v1-alpha (Kakao Brain 2022): DALL-E 2 in diffusers' format, a pipeline of the class `UnCLIPPipeline`."""

from collections.abc import Iterator

from dalle_cli.importing.publication import Importer, Part, Publication, Source
from dalle_cli.importing.unclip_prior import prior_part, unclip_schedule
from dalle_cli.importing.unets import decoder_sizes, decoder_tensors, upsampler_sizes, upsampler_tensors
from dalle_cli.models.decoder import Decoder
from dalle_cli.models.upsampler import Upsampler

INDEX, CONFIG = "model_index.json", "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
FIRST, LAST = f"super_res_first/{WEIGHTS}", f"super_res_last/{WEIGHTS}"
MODELS = ("prior", "decoder", "text_proj", "super_res_first", "super_res_last")
SCHEDULERS = ("prior_scheduler", "decoder_scheduler", "super_res_scheduler")
TERMS = (
    "The license forbids the uses that its attachment A lists, among them harming, deceiving or discriminating against "
    "people, medical advice and law enforcement."
)
PAPER = (
    "Karlo (Kakao Brain 2022), a DALL-E 2 (Ramesh et al. 2022, arXiv 2204.06125) of 3.3 billion parameters: a "
    "diffusion prior, a decoder to 64 pixels and an upsampler to 256. It reads English."
)


def recognize(source: Source) -> bool:
    """Whether it is a pipeline of this class."""
    return INDEX in source.files and source.json(INDEX).get("_class_name") == "UnCLIPPipeline"


def files(source: Source) -> list[str]:
    """Weights, sizes and schedules; not the text tower, which is that of CLIP L/14; the prior only if there is one."""
    models, schedulers = list(MODELS), list(SCHEDULERS)
    if not _has_prior(source):
        del models[0], schedulers[0]
    return [
        INDEX,
        *(f"{folder}/{name}" for folder in models for name in (CONFIG, WEIGHTS)),
        *(f"{folder}/scheduler_config.json" for folder in schedulers),
    ]


def _has_prior(source: Source) -> bool:
    return any(name.startswith("prior/") for name in source.files)


def plan(source: Source) -> Publication:
    """Prior, decoder and upsampler, all with the CLIP that is written before them."""
    return Publication("Karlo v1-alpha", tuple(_parts(source)), {}, "creativeml-openrail-m", TERMS, PAPER)


def _parts(source: Source) -> Iterator[Part]:
    if _has_prior(source):
        yield prior_part(source, "prior/", "prior_scheduler")
    weights = (f"decoder/{WEIGHTS}", f"text_proj/{WEIGHTS}")
    shapes = {name: shape for file in weights for name, shape in source.tensors(file).shapes.items()}
    sizes = decoder_sizes(shapes, source.json(f"decoder/{CONFIG}"))
    sampling = {"steps": 25, "guidance": 8.0, **unclip_schedule(source, "decoder_scheduler", "epsilon")}
    yield Part(
        "decoder.safetensors", "weights.decoder", Decoder, sizes, weights, decoder_tensors, sampling,
        encoder="clip.safetensors",
    )  # fmt: skip
    shapes = {f"{file}:{name}": shape for file in (FIRST, LAST) for name, shape in source.tensors(file).shapes.items()}
    larger = upsampler_sizes(
        shapes, source.json(f"super_res_first/{CONFIG}"), FIRST, LAST, low_size=sizes.image_size
    )  # fmt: skip
    sampling = {"steps": 7, **unclip_schedule(source, "super_res_scheduler", "epsilon")}
    yield Part(
        "upsampler.safetensors", "weights.upsampler", Upsampler, larger, (FIRST, LAST),
        lambda names: upsampler_tensors(names, FIRST, LAST), sampling,
    )  # fmt: skip


IMPORTER = Importer(
    "Karlo", recognize, files, plan, clip="hf://openai/clip-vit-large-patch14", clip_header={"normalized": False},
    prior=("prior/", "prior_scheduler/"),
)  # fmt: skip
