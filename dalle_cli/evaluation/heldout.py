"""What training held out and left out, as its weights say."""

from dalle_cli.artifacts import Artifact
from dalle_cli.data import exclude


def validation_share(weights: Artifact) -> float | None:
    """The share of ids that training held out; None if the weights do not say, or none were."""
    train = weights.config.get("train")
    share = train.get("validation") if isinstance(train, dict) else None
    return float(share) if isinstance(share, (int, float)) and 0 < share <= 1 else None


def excluded_digest(weights: Artifact) -> str | None:
    """The digest of the ids that training left out; None if it left out none."""
    return weights.history[-1]["inputs"].get("exclude") if weights.history else None


def other_split(weights: Artifact, excluded: frozenset[str]) -> str | None:
    """What is wrong if training left out other ids than these, and so held out a share of other samples."""
    wanted, found = excluded_digest(weights), exclude.exclude_digest(excluded).get("exclude")
    if wanted in (None, found):
        return None
    given = f"{len(excluded)} others (sha256 {found[:12]})" if found else "none"
    return f"expected --exclude with the ids that training left out (sha256 {wanted[:12]}), found {given}"
