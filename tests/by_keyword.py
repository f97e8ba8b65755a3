"""The samplers of autoregressive priors with their options as keywords, as most tests want them."""

from typing import Any

from dalle_cli.sampling import autoregressive, embeddings
from dalle_cli.sampling.categorical import CategoricalOptions


def split(options: dict[str, Any]) -> tuple[CategoricalOptions, dict[str, Any]]:
    """The options of the categorical distribution, and the other ones."""
    own = {name: options.pop(name) for name in CategoricalOptions.__dataclass_fields__ if name in options}
    return CategoricalOptions(**own), options


def sample_codes(*args, **options):
    chosen, rest = split(options)
    return autoregressive.sample_codes(*args, chosen, **rest)


def sample_autoregressive(*args, **options):
    chosen, rest = split(options)
    return embeddings.sample_autoregressive(*args, chosen, **rest)
