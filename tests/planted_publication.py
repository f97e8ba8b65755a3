"""A made-up publication: the tiny chain's models in a publisher's layout, and the importer that knows it."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dalle_cli.artifacts import open_artifact
from dalle_cli.config import build
from dalle_cli.importing.publication import From, Importer, Part, Publication
from dalle_cli.models.clip import CLIP
from dalle_cli.pipelines.loading import CONFIGS, DVAE, Prior

MODELS = {"dvae": DVAE, "clip": CLIP, "prior": Prior}
FILES = {"dvae": "codec/dvae.pt", "clip": "clip/model.safetensors", "prior": "prior/pytorch_model.bin"}


def publish(bundle, folder):
    """The weights of a bundle under other names, matrices transposed, in three formats; their sizes in a JSON."""
    about = {}
    for name, file in FILES.items():
        artifact = open_artifact(Path(bundle) / f"{name}.safetensors")
        about[name] = {"kind": artifact.kind, "config": artifact.config}
        tensors = {
            f"net.{key}": (t.T if t.ndim == 2 else t).contiguous() for key, t in load_file(str(artifact.path)).items()
        }
        path = Path(folder) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "clip":
            save_file(tensors, str(path))
        elif name == "prior":
            torch.save({"state_dict": tensors, "epoch": 3}, path)
        else:
            torch.save(tensors, path, _use_new_zipfile_serialization=False)
    (Path(folder) / "planted.json").write_text(json.dumps(about))
    (Path(folder) / "words.json").write_bytes((Path(bundle) / "tokenizer.json").read_bytes())
    (Path(folder) / "LICENSE").write_text("do as you like")
    (Path(folder) / "notes.txt").write_text("not wanted")
    return Path(folder)


def _turned(tensor):
    return tensor.T if tensor.ndim == 2 else tensor


def _part(about, name, **more):
    config = about[name]["config"]
    model = MODELS[name]
    return Part(
        file=f"{name}.safetensors", kind=about[name]["kind"], model=model,
        sizes=build(CONFIGS[model], config["model"], "model"), sources=(FILES[name],),
        tensors=lambda names: {
            key.removeprefix("net."): From.one(key, _turned)
            for key in names
            if key.startswith("net.") and key != "net.position_ids"
        },
        header={key: value for key, value in config.items() if key not in ("model", "tokenizer", "encoder")},
        ignored=(r"net\.position_ids",), **more,
    )  # fmt: skip


def _plan(source):
    about = source.json("planted.json")
    return Publication(
        name="Planted",
        parts=(
            _part(about, "dvae"),
            _part(about, "clip", tokenizer="tokenizer.json"),
            _part(about, "prior", tokenizer="tokenizer.json", encoder="dvae.safetensors"),
        ),
        texts={"tokenizer.json": source.data("words.json")},
        license="cc-by-nc-sa-4.0",
        terms="Not for commercial use.",
        paper="A made-up model.",
    )


IMPORTER = Importer(
    name="Planted",
    recognize=lambda source: "planted.json" in source.files,
    files=lambda source: ("planted.json", "words.json", *FILES.values()),
    plan=_plan,
)
