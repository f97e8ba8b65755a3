"""ECLIPSE's prior for Karlo (Patel et al. 2023): a thirtieth of Karlo's in size, and one pass instead of many steps."""

from dalle_cli.errors import DalleError
from dalle_cli.importing.publication import Importer, Publication, Source
from dalle_cli.importing.unclip_prior import WEIGHTS, prior_part

CONFIG = "config.json"
TERMS = "The license forbids the uses that it lists, among them harming, deceiving or discriminating against people."
PAPER = "ECLIPSE (Patel et al. 2023, arXiv 2312.04655), a prior for the decoder of another model, in one pass."


def recognize(source: Source) -> bool:
    """Whether it is a prior alone, without a timestep among its positions."""
    if not {CONFIG, WEIGHTS} <= source.files.keys():
        return False
    config = source.json(CONFIG)
    return config.get("_class_name") == "PriorTransformer" and config.get("additional_embeddings") == 3


def files(source: Source) -> list[str]:
    """Weights and sizes."""
    return [CONFIG, WEIGHTS]


def plan(source: Source) -> Publication:
    """The prior.

    Raises:
        DalleError: it has a timestep, as a diffusion prior that comes alone.
    """
    part = prior_part(source)
    if part.sizes.time:
        raise DalleError(f"expected a prior of one pass, found one with timesteps in {source.name}; give its pipeline")
    return Publication("ECLIPSE's prior", (part,), {}, "openrail++", TERMS, PAPER)


IMPORTER = Importer(
    "ECLIPSE", recognize, files, plan, clip="hf://openai/clip-vit-large-patch14", clip_header={"normalized": False}
)  # fmt: skip
