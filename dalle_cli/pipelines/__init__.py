"""What users import and commands call: each arrow of the chain as an object that takes arrays and gives arrays."""

from dalle_cli.hub import bundles
from dalle_cli.importing import cached
from dalle_cli.pipelines.clip import ClipScorer
from dalle_cli.pipelines.codec import Codec
from dalle_cli.pipelines.decoder import ImageDecoder
from dalle_cli.pipelines.editing import Editor, SourceImage
from dalle_cli.pipelines.pipeline import Generated, Pipeline, Settings, load
from dalle_cli.pipelines.prior import EmbeddingPrior, TokenPrior

bundles.publication = cached.bundle_of  # `-m hf://...` of published weights

__all__ = [
    "ClipScorer",
    "Codec",
    "Editor",
    "EmbeddingPrior",
    "Generated",
    "ImageDecoder",
    "Pipeline",
    "Settings",
    "SourceImage",
    "TokenPrior",
    "load",
]
