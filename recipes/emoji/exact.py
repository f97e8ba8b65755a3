"""Say whether images show what captions of the emoji's world state: exactly, by reader.py, with nothing learned.

Run `python recipes/emoji/exact.py SPRITES.tar IMAGES.safetensors` (an artifact with `images` and `text`) or `...
truth.tar`. `--table NAME=STEM ...` compares one sample with the best by CLIP; `--self-check` scores scenes that are
rendered for it, spoiled ones and shuffled captions.
"""

import argparse
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import grammar
import numpy as np
import world
from grammar import Scene
from PIL import Image, ImageFilter
from reader import Found, Reader, Reading
from sprites import Pixels
from world import LARGE, PART, SMALL, WHOLE, World


def compare(reading: Reading, scene: Scene, own: Callable[[str], str]) -> dict[str, bool]:
    """Which facts of a scene an image shows: those that its caption names, and `right` for all there is to it.

    `own` gives the name of a thing's own color.
    """
    wanted = [i for item in scene.items for i in [item] * item.count]
    objects = reading.objects
    pairs = Counter((o.thing, o.color) for o in objects)
    asked = Counter((i.thing, "" if i.color == own(i.thing) else i.color) for i in wanted)
    facts = {
        "thing": {o.thing for o in objects} == {i.thing for i in wanted},
        "color": pairs == asked,
        "count": len(objects) == len(wanted) and not reading.more,
        "ground": reading.ground == scene.ground,
        "style": all(o.style == scene.style for o in objects),
        "worn": Counter((o.thing, o.worn) for o in objects) == Counter((i.thing, i.worn) for i in wanted),
        "walked": reading.walked == (scene.relation == "walks"),
        "relation": _related(objects, scene),
        "size": _sized(objects, scene),
    }
    said = {"thing", "ground"} | ({"color"} if any(i.color for i in scene.items) else set())
    said |= {"count"} if scene.kind == "count" else set()
    said |= {"style"} if scene.kind == "style" else set()
    said |= {"worn"} if any(i.worn for i in scene.items) else set()
    said |= {"walked"} if scene.relation == "walks" else set()
    said |= {"relation"} if scene.relation else set()
    said |= {"size"} if any(i.size for i in scene.items) else set()
    return {name: value for name, value in facts.items() if name in said} | {"right": all(facts.values())}


def _related(objects: Sequence[Found], scene: Scene) -> bool:
    """Whether two things stand as a scene says."""
    if not scene.relation:
        return True
    names = [item.thing for item in scene.items]
    if len(objects) != 2 or sorted(o.thing for o in objects) != sorted(names):
        return False
    a, b = sorted(objects, key=lambda o: names.index(o.thing))
    if scene.relation in ("with", "walks"):
        return scene.relation == "with" or (a.x < b.x and objects[0].thing == a.thing)
    across, down = b.x - a.x + (b.size - a.size) / 2, b.y - a.y + (b.size - a.size) / 2
    if abs(across) > abs(down):
        return scene.relation in ("beside", "left" if across > 0 else "right")
    return scene.relation == ("above" if down > 0 else "below")


def _sized(objects: Sequence[Found], scene: Scene) -> bool:
    """Whether things have the sizes that a scene gives them."""
    if scene.kind in ("count", "worn", "walked"):
        return True
    alone = len(scene.items) == 1
    sizes = {"small": SMALL, "large": WHOLE if alone else LARGE, "": WHOLE if alone else PART}
    return {(o.thing, o.size) for o in objects} == {(i.thing, sizes[i.size]) for i in scene.items}


def verdicts(reader: Reader, images: Sequence[Pixels], scenes: Sequence[Scene]) -> list[dict[str, bool]]:
    """What `compare` says of each image and its scene."""
    own = reader.world.sprites.own
    return [compare(r, s, own) for r, s in zip(reader.read(images), scenes, strict=True)]


def summary(scenes: Sequence[Scene], verdicts: Sequence[dict[str, bool]]) -> dict[str, dict[str, float]]:
    """Shares of images that are right, and of those that show each fact, for each kind of scene and for `all`."""
    found: dict[str, dict[str, float]] = {}
    for kind in ("all", *sorted({scene.kind for scene in scenes})):
        own = [v for s, v in zip(scenes, verdicts, strict=True) if kind in ("all", s.kind)]
        names = dict.fromkeys(name for v in own for name in v)
        shares = {name: float(np.mean([v[name] for v in own if name in v])) for name in names}
        found[kind] = {"images": float(len(own)), "right": shares.pop("right"), **shares}
    return found


# Self-check and command line


def degrade(pixels: Pixels, how: str, seed: int = 0) -> Pixels:
    """Spoil an image: `blur` (Gaussian, 0.6), `jpeg` (quality 60), `noise` (sigma 8) or `codec`, blur and noise."""
    image = Image.fromarray(pixels)
    if how == "jpeg":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=60, subsampling=0)
        return np.asarray(Image.open(buffer))
    if how in ("blur", "codec"):
        pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.6)))
    if how in ("noise", "codec"):
        noise = np.random.default_rng(seed).normal(0, 8, pixels.shape)
        return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)
    return pixels


def self_check(reader: Reader, count: int, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Shares on fresh ground truth, a part of it withheld, on spoiled truth and on shuffled captions."""
    kinds = [(kind, False) for kind in (*reader.world.kinds, "ground")] + [(kind, True) for kind in world.NEW]
    sampled = [reader.world.sample(seed, "check", i, *kinds[i % len(kinds)]) for i in range(count)]
    images = [image for _, image, _ in sampled]
    scenes = [grammar.parse(captions[i % 2]) for i, (_, _, captions) in enumerate(sampled)]
    found = {"truth": summary(scenes, verdicts(reader, images, scenes))}
    for how in ("blur", "jpeg", "noise", "codec"):
        spoiled = [degrade(image, how, i) for i, image in enumerate(images)]
        found[how] = summary(scenes, verdicts(reader, spoiled, scenes))
    shuffled = [scenes[i] for i in np.random.default_rng(seed).permutation(count)]
    return found | {"shuffled": summary(shuffled, verdicts(reader, images, shuffled))}


def _read(path: Path) -> tuple[list[Pixels], list[str]]:
    """Images and captions of an `images` artifact, or of a tar that world.py wrote."""
    if path.suffix == ".tar":
        with tarfile.open(path) as tar:
            files = {m.name: stream.read() for m in tar if (stream := tar.extractfile(m)) is not None}
        names = [n for n in sorted(files) if n.endswith(".png")]
        images = [np.asarray(Image.open(io.BytesIO(files[n])).convert("RGB")) for n in names]
        return images, [json.loads(files[n[:-4] + ".json"])["caption"][0] for n in names]
    from dalle_cli.artifacts import open_artifact

    artifact = open_artifact(path)
    stored = artifact.array("images")
    return [np.asarray(stored[i]).transpose(1, 2, 0) for i in range(len(stored))], list(artifact.strings("text"))


def score(reader: Reader, path: Path) -> dict[str, dict[str, float]]:
    """`summary` of a file of images."""
    images, texts = _read(path)
    scenes = [grammar.parse(text) for text in texts]
    return summary(scenes, verdicts(reader, images, scenes))


def show(found: dict[str, dict[str, float]]) -> str:
    """A table of shares, a kind of scene in each line."""
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    lines = [f"{'':10}" + "".join(f"{name:>10}" for name in names)]
    for kind, row in found.items():
        cells = (f"{row[n]:10.0f}" if n == "images" else f"{row[n]:10.1%}" if n in row else f"{'':10}" for n in names)
        lines.append(f"{kind:10}" + "".join(cells))
    return "\n".join(lines)


def table(reader: Reader, sets: Sequence[str]) -> str:
    """Shares of every candidate and of the best by CLIP, for NAME=STEM with STEM.images and STEM.best.safetensors."""
    rows = [f"{'right':28}{'prompts':>9}{'one sample':>12}{'best of':>9}{'reranked':>10}"]
    for name, _, stem in (entry.partition("=") for entry in sets):
        every, best = (score(reader, Path(f"{stem}.{kind}.safetensors"))["all"] for kind in ("images", "best"))
        each = every["images"] / best["images"]
        rows.append(f"{name:28}{best['images']:9.0f}{every['right']:12.1%}{each:9.0f}{best['right']:10.1%}")
    return "\n".join(rows)


def main() -> None:
    """Print the shares of images that match their captions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sprites", type=Path, help="tar that sprites.py wrote")
    parser.add_argument("images", type=Path, nargs="?", help="artifact with images and their captions, or a tar")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--self-check", action="store_true", help="score ground truth that is rendered for it")
    parser.add_argument("--count", type=int, default=1200, help="scenes of the self-check (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the self-check (%(default)s)")
    parser.add_argument("--table", nargs="+", metavar="NAME=STEM", help="compare all candidates with the best of each")
    args = parser.parse_args()
    reader = Reader(World(args.sprites))
    if args.table:
        print(table(reader, args.table))
    elif args.self_check:
        checked = self_check(reader, args.count, args.seed)
        print(
            json.dumps(checked) if args.json else "\n\n".join(f"{name}\n{show(own)}" for name, own in checked.items())
        )
    elif args.images is None:
        parser.error("name an artifact of images, or give --self-check")
    else:
        found = score(reader, args.images)
        print(json.dumps(found) if args.json else show(found))


if __name__ == "__main__":
    main()
