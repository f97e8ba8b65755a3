"""Which artifact was made from which, by the digests in their histories.

A history names its inputs by digest alone. The stage that made an input outside the folder is known only where a single
earlier entry can have made it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dalle_cli.report.scan import Item

# The stages that can have made an input, by its name (of a model: by the stage that read it); likelier groups first.
MAKERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "captions": (("tokenize",),),
    "codes": (("sample",), ("encode-images",)),
    "embeddings": (("sample",), ("encode-images",)),
    "images": (("decode", "generate"),),
    "drawn": (("sample",),),
    "dvae": (("train-dvae",),),
    "clip": (("train-clip",),),
    "prior": (("train-prior",),),
    "encode-images model": (("train-dvae", "train-clip"),),
    "sample model": (("train-prior",),),
    "decode model": (("train-dvae", "train-decoder"),),
    "rerank model": (("train-clip",),),
}


@dataclass
class Node:
    """An artifact or an input: its name, the stage that made it, its place in the page ("" if it is not there)."""

    name: str
    about: str
    title: str
    anchor: str = ""
    inputs: list[str] = field(default_factory=list)  # digests


@dataclass(frozen=True)
class Branch:
    """A node with its inputs; `again` marks one whose inputs the list shows further up."""

    node: Node
    inputs: list["Branch"]
    again: bool = False


def trace(items: Sequence[Item], anchors: Mapping[str, str]) -> dict[str, Node]:
    """All artifacts and their inputs by digest; `anchors` are their places in the page, by name."""
    nodes: dict[str, Node] = {}
    for item in items:
        made = item.history[-1]["stage"] if item.history else item.kind
        nodes.setdefault(item.digest or item.name, Node(item.label, made, item.name, anchors[item.name]))
    for item in items:
        if item.history:
            _follow(nodes, item.digest or item.name, item.history, len(item.history) - 1)
    return nodes


def _follow(nodes: dict[str, Node], made: str, history: list[dict[str, Any]], place: int) -> None:
    """Add the inputs of a stage, and what is known of theirs."""
    stage = history[place]["stage"]
    for name, digest in sorted(history[place]["inputs"].items()):
        if digest == made or digest in nodes[made].inputs:
            continue
        nodes[made].inputs.append(digest)
        if digest not in nodes:
            maker = _maker(stage, name, history[:place])
            label = "data set" if name == "dataset" else name
            about = f"sha256 {digest[:8]}" if maker is None else history[maker]["stage"]
            nodes[digest] = Node(label, about, f"{label}, sha256 {digest}; not in this folder")
            if maker is not None:
                _follow(nodes, digest, history, maker)


def _maker(stage: str, name: str, earlier: list[dict[str, Any]]) -> int | None:
    for stages in MAKERS.get(f"{stage} {name}" if name == "model" else name, ()):
        if found := [i for i, entry in enumerate(earlier) if entry["stage"] in stages]:
            return found[0] if len(found) == 1 else None
    return None


def tree(nodes: Mapping[str, Node]) -> list[Branch]:
    """A branch for each node that is no other's input, with its inputs below it; nothing that stands alone."""
    inputs = {digest for node in nodes.values() for digest in node.inputs}
    shown: set[str] = set()

    def branch(digest: str) -> Branch:
        node, again = nodes[digest], digest in shown
        shown.add(digest)
        return Branch(node, [] if again else [branch(one) for one in node.inputs], again and bool(node.inputs))

    last = [digest for digest in nodes if digest not in inputs and nodes[digest].inputs]
    branches = [branch(digest) for digest in last]
    # A header that lies about its inputs can make a circle, which has no last node.
    return branches + [branch(digest) for digest in nodes if nodes[digest].inputs and digest not in shown]
