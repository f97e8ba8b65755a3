"""Artifacts: safetensors files, or folders of shards, that say what they are and how they were made."""

from dalle_cli.artifacts.artifact import Artifact, history, open_artifact
from dalle_cli.artifacts.container import digest_bytes, digest_file, write_artifact
from dalle_cli.artifacts.kinds import KINDS, Kind
from dalle_cli.artifacts.shards import ShardWriter
from dalle_cli.artifacts.strings import Strings

__all__ = [
    "KINDS",
    "Artifact",
    "Kind",
    "ShardWriter",
    "Strings",
    "digest_bytes",
    "digest_file",
    "history",
    "open_artifact",
    "write_artifact",
]
