"""Measure samples for withheld images: the figures of the emoji model in docs/results.md.

`python recipes/emoji/measure.py STEP --help` tells of each step. Tables are Markdown on stdout. `make -C recipes/emoji
measure` runs them all.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from prepare import STYLES
from withheld import (
    Entry,
    Pixels,
    Prompt,
    PromptList,
    composed,
    order,
    pick,
    read_list,
    read_samples,
    read_tar,
    strangers,
    twin,
    withheld,
    write_list,
    write_samples,
)

from dalle_cli.errors import DalleError

REPLICATES = 1000
GOOD = 0.99  # what the classifier of styles must reach on real images that it never saw


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(values: Sequence[float], seed: int) -> str:
    """The mean of shares and its interval of 95 %, in per cent; prompts are resampled."""
    from dalle_cli.evaluation.bootstrap import of_mean

    found = of_mean(np.array(values), REPLICATES, seed, 0)
    value, low, high = (100 * found[name] for name in ("value", "low", "high"))
    return f"{value:.1f}% ({low:.1f} to {high:.1f})"


def by_style(listed: PromptList, shares: Sequence[float], seed: int) -> list[str]:
    """Cells: over all prompts, then of each style."""
    groups = [list(range(len(shares)))]
    groups += [[i for i, p in enumerate(listed.prompts) if p.style == style] for style in STYLES]
    return [percent([shares[i] for i in own], seed) if len(own) else "" for own in groups]


def sampled_sets(args: argparse.Namespace, listed: PromptList) -> dict[str, list[list[Pixels]]]:
    """The samples, and the best of them, by their names in the tables."""
    sampled = read_samples(args.images, listed)
    n = len(sampled[0])
    sets = {"one sample" if n == 1 else f"one sample (mean of {n})": sampled}
    if args.best is not None:
        best = read_samples(args.best, listed)
        sets[f"best of {n} by CLIP"] = [own[:1] for own in best]
    return sets


# Steps


def write_lists(args: argparse.Namespace) -> None:
    """Write withheld-en, withheld-ko, stranger and zero-shot, each as .txt and .json."""
    test = read_tar(args.test)
    lists = {f"withheld-{language}": withheld(test, language, args.seed) for language in ("en", "ko")}
    lists["stranger"] = strangers(lists["withheld-en"], args.seed)
    texts = Path(__file__).with_name("zero-shot.txt").read_text(encoding="utf-8").split("\n")
    lists["zero-shot"] = composed([text for text in texts if text], test)
    for name, listed in lists.items():
        write_list(args.out / name, listed)
        counts = {style: sum(p.style == style for p in listed.prompts) for style in STYLES}
        summary = ", ".join(f"{count} {style}" for style, count in counts.items())
        print(f"{args.out / name}.txt: {len(listed.prompts)} prompts ({summary})", file=sys.stderr)


def write_network(args: argparse.Namespace) -> None:
    """Write the network that images are compared by."""
    from nearest import cut_network

    cut_network(args.wheel, args.out)


def write_stand_ins(args: argparse.Namespace) -> None:
    """Write the true images, others in their place, or their reconstructions, as if they were samples."""
    listed, test = read_list(args.list), read_tar(args.test)
    true = pick(test, [p.key for p in listed.prompts], args.test)
    if args.by == "reconstruction":
        from rates import dvae_codes

        from dalle_cli.devices import arithmetic
        from dalle_cli.hub import bundles

        weights = bundles.weights(args.model, "weights.dvae")
        shown = dvae_codes(weights, [e.image for e in true], arithmetic("cpu", "float32"))[1]
    elif args.by == "true":
        shown = [e.image for e in true]
    else:
        train = read_tar(args.train)
        shown = [_stand_in(p, train, args.by, args.seed).image for p in listed.prompts]
    write_samples(args.out, listed, [[image] for image in shown], f"stand-in: {args.by}")


def _stand_in(prompt: Prompt, train: Sequence[Entry], by: str, seed: int) -> Entry:
    """A random training image of the prompt's style, or its concept's in another style, which again is random."""
    key = str(prompt.key)
    if by == "random":
        found = [e for e in train if e.style == prompt.style]
    else:
        found = [e for style in STYLES if style != prompt.style and (e := twin(prompt, train, style)) is not None]
    if not found:
        raise DalleError(f"expected another image of {prompt.label}, found none in training; give the whole train.tar")
    return min(found, key=lambda e: order(seed, key, e.key))


def compare_distances(args: argparse.Namespace) -> None:
    """Print how well each distance finds concepts across styles, on training images."""
    from distances import compare
    from nearest import network

    rows = compare(read_tar(args.train), network(args.features), args.seed)
    print(table(("features", "distance", "R@1", "R@5"), [(f, d, f"{a:.1%}", f"{b:.1%}") for f, d, a, b in rows]))


def retrieve(args: argparse.Namespace) -> None:
    """Print how often an image is nearest to its true image, beside what others in its place would reach."""
    from nearest import Gallery, network

    listed = read_list(args.list)
    sets = sampled_sets(args, listed)
    gallery = Gallery(listed, read_tar(args.test), read_tar(args.train), network(args.features), args.seed)
    found = {name: gallery.ranks(sampled) for name, sampled in sets.items()}
    found["a random training image of the style"] = gallery.random_ranks()
    found["the concept's true image in another style"] = gallery.other_style_ranks()
    rows = []
    for name, ranks in found.items():
        for k in (1, 5):
            shares = [float(np.mean(np.array(own) < k)) if own else 0.0 for own in ranks]
            rows.append([name if k == 1 else "", f"R@{k}", *by_style(listed, shares, args.seed)])
    sizes = {style: len(keys) for style, keys in listed.among.items()}
    counts = [f"{style} ({len(gallery.rows[style])} among {sizes[style]})" for style in gallery.styles]
    print(table(("image", "", f"all ({len(listed.prompts)})", *counts), rows))


def train_classifier(args: argparse.Namespace) -> None:
    """Train the classifier of styles on real training images, and say what it is worth on real withheld ones."""
    import style_net

    train, test = read_tar(args.train), read_tar(args.test)
    net = style_net.train(train, args.epochs, args.seed, lambda line: print(line, file=sys.stderr))
    style_net.save(net, args.out)
    print(table(("style of real images, never seen", "images", "right"), _worth(net, test)))


def _worth(net: Any, test: Sequence[Entry]) -> list[list[str]]:
    from style_net import named, numbers

    right = named(net, [e.image for e in test]) == numbers(test).numpy()
    rows = []
    for style in ("all", *STYLES):
        own = [bool(right[i]) for i, e in enumerate(test) if style in ("all", e.style)]
        rows.append([style, str(len(own)), f"{np.mean(own):.2%}" if own else ""])
    if right.mean() < GOOD:
        print(f"warning: expected {GOOD:.0%} right on real images, found {right.mean():.1%}", file=sys.stderr)
    return rows


def measure_style(args: argparse.Namespace) -> None:
    """Print how often an image looks to be in the style that was asked for."""
    from style_net import load, named

    listed = read_list(args.list)
    if any(p.style is None for p in listed.prompts):
        raise DalleError(f"expected prompts that name a style, found others in {args.list}; name withheld-*.json")
    net = load(args.net)
    wanted = [STYLES.index(str(p.style)) for p in listed.prompts]
    rows = []
    for name, sampled in sampled_sets(args, listed).items():
        found = named(net, [image for own in sampled for image in own]).reshape(len(sampled), -1)
        shares = [float(np.mean(row == style)) for row, style in zip(found, wanted, strict=True)]
        rows.append([name, *by_style(listed, shares, args.seed)])
    print(table(("style right", "all", *STYLES), rows))


def count_bits(args: argparse.Namespace) -> None:
    """Print bits per image as codes, PNG and WebP."""
    from rates import Kept, decibels, dvae_codes, others, prior_bits

    from dalle_cli.devices import arithmetic
    from dalle_cli.hub import bundles

    machine = arithmetic("cpu", "float32")
    encoder = bundles.weights(args.model, "weights.dvae")
    entries = some_of(read_tar(args.tar), args.part, encoder, args.limit)
    images = [e.image for e in entries]
    codes, shown = dvae_codes(encoder, images, machine)
    quality, n = decibels(images, shown), codes[0].numel()
    plain = math.log2(encoder.require("model", dict)["n_vocab"])
    kept = {f"{n} codes, written plainly ({plain:.2f} bits each)": Kept(np.full(len(codes), n * plain), quality)}
    if not args.no_prior:
        prior = bundles.weights(args.model, "weights.prior.codes")
        bits = prior_bits(prior, encoder, codes, [e.captions[0] for e in entries], machine)
        for name, given in (("caption", "given the caption"), ("none", "given nothing")):
            nats = float(bits[name].mean()) * math.log(2) / n
            kept[f"{n} codes by the prior, {given} ({nats:.3f} nats each)"] = Kept(bits[name], quality)
        kept["the caption, by the same prior"] = Kept(bits["text"])
    kept |= others(images, quality)
    pixels = images[0].shape[0] * images[0].shape[1]
    rows = []
    for name, form in kept.items():
        mean = float(form.bits.mean())
        error = float(form.bits.std(ddof=1)) / math.sqrt(len(form.bits)) if len(form.bits) > 1 else 0.0
        db = "" if form.psnr is None else f"{form.psnr.mean():.1f} dB"
        rows.append([name, f"{mean:,.0f} ± {error:,.0f}", f"{mean / pixels:.3f}", db])
    print(table((f"{len(images)} images ({args.part})", "bits per image", "per pixel", "PSNR"), rows))


def some_of(entries: Sequence[Entry], part: str, weights: Any, limit: int | None) -> list[Entry]:
    """The images of a part: `all`, `validation` (what training held out of train.tar), or a split's name.

    Raises:
        DalleError: none.
    """
    from dalle_cli.data.order import held_out
    from dalle_cli.evaluation.heldout import validation_share
    from dalle_cli.evaluation.image_sets import spread

    share = validation_share(weights) or 0.0
    kept = [e for e in entries if part in ("all", e.split) or (part == "validation" and held_out(e.key, share))]
    if not kept:
        raise DalleError(f"expected images of {part}, found none; name another tar or --part")
    return [kept[i] for i in spread(len(kept), limit).tolist()]


def write_grid(args: argparse.Namespace) -> None:
    """Write an image grid: for each prompt the true image, if any, and the samples; or --blind, for a rater."""
    from dalle_cli.artifacts.container import replace_file
    from dalle_cli.pipelines.output import check_png
    from dalle_cli.viz.grid import image_grid

    check_png(args.out, True)
    listed = read_list(args.list)
    sampled = read_samples(args.images, listed)[: args.most]
    test = read_tar(args.test)
    pixels: list[Pixels] = []
    texts: list[str] = []
    for number, (prompt, own) in enumerate(zip(listed.prompts, sampled, strict=False), 1):
        true = [] if args.blind or prompt.key is None else [pick(test, [prompt.key], args.test)[0].image]
        said = str(number) if args.blind else prompt.prompt
        pixels += [*true, *own]
        texts += [f"true: {said}", *["sample"] * len(own)] if true else [said] * len(own)
    columns = args.columns or (6 if args.blind else len(sampled[0]) + 1)
    image = image_grid(pixels, texts, columns=columns, title=args.title)
    replace_file(args.out, lambda part: image.save(part, format="PNG"))
    print(args.out)


# Command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(metavar="STEP", required=True)

    def step(name: str, run: Callable[[argparse.Namespace], None], *files: str) -> argparse.ArgumentParser:
        made = steps.add_parser(name, help=(run.__doc__ or "").rstrip("."), description=run.__doc__)
        made.set_defaults(run=run)
        for file in files:
            made.add_argument(file, type=Path)
        made.add_argument("--seed", type=int, default=0, help="of all that is chosen at random (%(default)s)")
        return made

    def sampled(made: argparse.ArgumentParser) -> None:
        made.add_argument("--best", type=Path, help="the best of each prompt, from dalle rerank --keep 1")

    step("prompts", write_lists, "test", "out")
    step("features", write_network, "wheel", "out")
    made = step("stand-ins", write_stand_ins, "list", "test", "train", "out")
    made.add_argument("--by", choices=("true", "other-style", "random", "reconstruction"), required=True)
    made.add_argument("-m", "--model", help="with the dVAE of a reconstruction")
    step("distances", compare_distances, "train").add_argument("--features", required=True)
    made = step("retrieval", retrieve, "images", "list", "test", "train")
    made.add_argument("--features", required=True, help="the file of the step `features`, or what dalle evaluate takes")
    sampled(made)
    made = step("classifier", train_classifier, "train", "test", "out")
    made.add_argument("--epochs", type=int, default=20, help="(%(default)s)")
    sampled(step("style", measure_style, "images", "list", "net"))
    made = step("bits", count_bits, "tar")
    made.add_argument("-m", "--model", help="a bundle with dVAE and prior; the shipped one if left out")
    made.add_argument(
        "--part", default="all", help="withheld-style, withheld-concept, validation, or all (%(default)s)"
    )
    made.add_argument("--limit", type=int, help="so many images, evenly spread")
    made.add_argument("--no-prior", action="store_true", help="for a dVAE without a prior")
    made = step("grid", write_grid, "images", "list", "test", "out")
    made.add_argument("--blind", action="store_true", help="numbers in place of prompts, and no true images")
    made.add_argument("--most", type=int, help="prompts (all)")
    made.add_argument("--columns", type=int)
    made.add_argument("--title")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one step. Exit status: 0, or 1 after one line on stderr that says what is wrong."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except DalleError as error:
        print(f"measure: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
